from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from castwise.errors import TargetError
from castwise.numerics.replay import (
    SameDraws,
    Wide,
    as_leaves,
    runs_wide,
    seeded,
    wide_copy,
    wide_values,
)

CPU = torch.device("cpu")


class CastsByHand(nn.Module):
    """Names fp32 in every way that code names it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.register_buffer("table", torch.rand(7))
        self.plain = torch.rand(7)
        self.listed = [torch.rand(7)]
        self.phase = nn.Parameter(torch.randn(7, dtype=torch.cfloat))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Cut to fp32 again and again."""
        x = self.linear(x).float() * self.table.to(torch.float32)
        x = x + torch.zeros(7) + torch.full((7,), 0.1) + self.plain + self.listed[0]
        x = x.to(dtype=torch.float32).softmax(-1, dtype=torch.float32)
        out = torch.empty(3, 7, dtype=torch.float32)
        out[:] = x
        return (out * self.phase.to(torch.complex64)).abs()


def test_nothing_in_a_replay_falls_back_to_fp32() -> None:
    """What a model names by hand runs in float64, and is told with its line."""
    model = wide_copy(CastsByHand(), "fp64")
    assert model.phase.dtype == torch.complex128
    assert model.plain.dtype == model.listed[0].dtype == torch.float64
    x = wide_values(torch.rand(3, 7), "fp64")
    with runs_wide("it", model, "fp64") as wide:
        out = model(x)
    assert out.dtype == torch.float64
    assert {each.call for each in wide.lifted} == {"float", "to", "softmax", "empty"}
    assert all(
        Path(each.where.partition(":")[0]).name == "test_replay.py"
        for each in wide.lifted
    )


def test_a_replay_keeps_what_float64_knows() -> None:
    """The value agrees with one computed without any cast."""
    model = wide_copy(CastsByHand(), "fp64")
    x = torch.rand(3, 7, dtype=torch.float64)
    with Wide(model, "fp64"):
        got = model(x)
    assert got.dtype == torch.float64
    y = model.linear(x) * model.table
    y = y + 0.1 + model.plain + model.listed[0]
    wanted = (y.softmax(-1) * model.phase).abs()
    assert torch.allclose(got, wanted, rtol=1e-14, atol=0)


def test_gradients_pass_through_what_is_widened() -> None:
    """A leaf in fp32 that meets float64 gets its gradient."""
    leaf = torch.rand(5, requires_grad=True)
    with Wide(None, "fp64"):
        (leaf * torch.rand(5, dtype=torch.float64)).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_every_dtype_sees_the_same_draws(dtype: torch.dtype) -> None:
    """Masks are equal; noise is equal up to its rounding."""

    def draw(dtype: torch.dtype) -> list[torch.Tensor]:
        x = torch.ones(63, dtype=dtype)
        with seeded(3, CPU), SameDraws():
            return [
                functional.dropout(x, 0.4),
                torch.bernoulli(x / 2),
                torch.randn(63, dtype=dtype),
                torch.rand_like(x),
                x.clone().normal_(),
                functional.dropout(x, 0.4),
                nn.functional.gumbel_softmax(x, hard=True),
            ]

    for wide, narrow in zip(draw(torch.float32), draw(dtype), strict=True):
        assert narrow.dtype == dtype
        assert torch.allclose(narrow, wide.to(dtype), rtol=2.0**-7)


def test_without_it_float64_draws_differently() -> None:
    """The reason for this room: uniform numbers depend on the dtype."""
    torch.manual_seed(0)
    one = torch.rand(63)
    torch.manual_seed(0)
    assert not torch.allclose(torch.rand(63, dtype=torch.float64).float(), one)


def test_a_recomputed_dropout_drops_the_same() -> None:
    """Forward and recompute agree, in float64 as in fp32."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        x = torch.ones(63, dtype=dtype, requires_grad=True)
        with seeded(0, CPU), SameDraws():
            out = checkpoint(
                lambda x: functional.dropout(x).square(), x, use_reentrant=False
            )
            out.sum().backward()
        assert torch.equal(x.grad != 0, out != 0)
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1].float())


def test_a_seed_gives_random_states_and_takes_them_back() -> None:
    """Those of torch, Python and numpy."""
    before = torch.get_rng_state(), random.getstate(), _numpy_state()
    draws = []
    for _ in range(2):
        with seeded(5, CPU):
            draws.append((float(torch.rand(())), random.random(), np.random.rand()))  # noqa: NPY002 -- a user's draw
    assert draws[0] == draws[1]
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == random.getstate()
    assert (before[2] == _numpy_state()).all()


def _numpy_state() -> np.ndarray:
    return np.random.get_state()[1].copy()  # noqa: NPY002 -- what a user may draw from


@torch.library.custom_op("castwise_test::only_fp32", mutates_args=())
def only_fp32(x: torch.Tensor) -> torch.Tensor:
    """A kernel that was written for fp32."""
    if x.dtype != torch.float32:
        raise RuntimeError("\"only_fp32\" not implemented for 'Double'")
    return x.clone()


class NeedsFp32(nn.Module):
    """Calls a kernel that exists in fp32 alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call it."""
        return torch.ops.castwise_test.only_fp32(x * 2)


def test_what_cannot_run_wide_is_named_with_its_line() -> None:
    """The operator, the line, the reason and the remedy."""
    with (
        pytest.raises(
            TargetError,
            match=r"the model to run in fp64, and only_fp32 at .*test_replay.py:\d+ "
            r"does not: \"only_fp32\" not implemented.*reference=",
        ),
        runs_wide("the model", None, "fp64"),
    ):
        NeedsFp32()(torch.ones(3, dtype=torch.float64))


def test_a_model_that_cannot_be_copied_is_refused() -> None:
    """Tensors with a history cannot be copied; the message says so."""
    model = nn.Linear(3, 3)
    model.kept = model(torch.ones(3))
    with pytest.raises(TargetError, match=r"Linear cannot be copied.*history"):
        wide_copy(model, "fp64")


def test_gradients_land_in_leaves_though_code_writes_to_its_inputs() -> None:
    """Integers pass as they are; what is handed on is no leaf."""
    (x, ids), leaves = as_leaves((torch.ones(3), torch.arange(3)))
    x.mul_(2).sum().backward()
    assert len(leaves) == 1
    assert torch.equal(leaves[0].grad, torch.full((3,), 2.0))
    assert torch.equal(ids, torch.arange(3))
