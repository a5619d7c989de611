from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.distributed.gradients import clip, local_part, unscale
from castwise.errors import SettingsError
from castwise.loss_scale import DynamicScale, NonFinite
from two_ranks import TwoRanks

ROWS = torch.linspace(-3, 5, 7 * 3).reshape(
    7, 3
)  # 4 rows on one process, 3 on the other
WHOLE = torch.linspace(1, 2, 5)


def sharded(rows: torch.Tensor) -> torch.Tensor:
    """Rows cut over both processes."""
    mesh = init_device_mesh("cpu", (distributed.get_world_size(),))
    return distribute_tensor(rows, mesh, [Shard(0)])


def find(rank: int, faults: list[tuple[int, str, float]]) -> Any:
    """Put faults into the shards of single ranks; what does everybody find?"""
    gradients = {"a": sharded(ROWS * 8), "b": sharded(ROWS * 8), "c": WHOLE * 8}
    for at, name, value in faults:
        if rank == at:
            local_part(gradients[name])[-1] = value
    finding = unscale(DynamicScale(initial=8.0), gradients)
    return finding, gradients["b"].full_tensor()


def norms(_rank: int, max_norm: float | None) -> Any:
    """Clip sharded gradients beside a whole one."""
    gradients = [sharded(ROWS), WHOLE.clone(), sharded(ROWS[:1])]  # one rank: no row
    return clip(gradients, max_norm), gradients[0].full_tensor(), gradients[1]


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ([], None),
        ([(1, "b", math.inf)], NonFinite(parameter="b", kind="inf", rank=1)),
        ([(0, "b", math.nan)], NonFinite(parameter="b", kind="NaN", rank=0)),
        (
            [(0, "b", math.inf), (1, "a", math.nan)],
            NonFinite(parameter="a", kind="NaN", rank=1),
        ),
        (
            [(0, "a", math.inf), (1, "a", math.nan)],
            NonFinite(parameter="a", kind="NaN", rank=1),
        ),
    ],
)
def test_all_processes_find_what_one_of_them_found(
    two_ranks: TwoRanks, faults: Any, expected: NonFinite | None
) -> None:
    """The first parameter in order, NaN before inf, and whose rows hold it."""
    (zero, rows), (one, same) = two_ranks(find, faults)
    assert zero == one == expected
    assert torch.equal(rows, same) or expected is not None
    if expected is None:
        torch.testing.assert_close(rows, ROWS, rtol=0, atol=0)


def messages(_rank: int) -> list[tuple[str, int]]:
    """What goes round, by kind and bytes, while shards are unscaled and checked."""
    gradients = {"a": sharded(ROWS), "b": sharded(ROWS)}
    sent: list[tuple[str, int]] = []

    class Count(TorchDispatchMode):
        """Sees every collective, whoever calls it."""

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            if func.namespace in {"c10d", "_c10d_functional"}:
                (tensor,) = args[0]
                sent.append((func.__name__, tensor.numel() * tensor.element_size()))
            return func(*args, **(kwargs or {}))

    with Count():
        unscale(DynamicScale(initial=8.0), gradients)
    return sent


def test_one_number_goes_round_for_a_step(two_ranks: TwoRanks) -> None:
    """Whether to skip, for which parameter, why, and by whose rows: eight bytes."""
    for sent in two_ranks(messages):
        assert sent == [("allreduce_.default", 8)]


def test_the_norm_is_that_of_the_whole_gradients(two_ranks: TwoRanks) -> None:
    """Also where a process holds no row of a gradient, and beside whole gradients."""
    parts = [ROWS, WHOLE, ROWS[:1]]
    expected = float(torch.cat([part.flatten() for part in parts]).double().norm())
    for max_norm in (None, 1.5, 1e3):
        (zero, rows, whole), (one, _, _) = two_ranks(norms, max_norm)
        assert zero == one
        assert math.isclose(zero, expected, rel_tol=1e-6)
        factor = 1.5 / expected if max_norm == 1.5 else 1
        torch.testing.assert_close(rows, ROWS * factor)
        torch.testing.assert_close(whole, WHOLE * factor)


def test_whole_gradients_need_no_processes() -> None:
    """Nothing is initialised here, so whatever sends would fail."""
    assert not distributed.is_initialized()
    gradients = {"a": ROWS.clone() * 4, "b": WHOLE.clone() * 4}
    assert unscale(DynamicScale(initial=4.0), gradients) is None
    assert clip(gradients.values(), 1.0) == pytest.approx(
        math.hypot(float(ROWS.norm()), float(WHOLE.norm()))
    )
    assert float(gradients["a"].norm()) < 1
    with pytest.raises(SettingsError, match="above 0"):
        clip(gradients.values(), 0.0)
    assert clip([], 1.0) == 0
