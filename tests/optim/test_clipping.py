from __future__ import annotations

import math
from typing import TYPE_CHECKING

import pytest
import torch

from castwise.errors import SettingsError
from castwise.optim.clipping import (
    clip_adaptively,
    clip_by_global_norm,
    clip_by_group,
    global_norm,
    name_nonfinite,
)

if TYPE_CHECKING:
    from pathlib import Path


def _parameter(weight: torch.Tensor, gradient: torch.Tensor) -> torch.nn.Parameter:
    parameter = torch.nn.Parameter(weight)
    parameter.grad = gradient
    return parameter


def test_clipping_gives_the_numbers_of_torch() -> None:
    """Same norm and same gradients as clip_grad_norm_, clipped or not."""
    torch.manual_seed(0)
    for max_norm in (0.5, 1e9):
        ours = [torch.randn(63), torch.randn(5, 1), torch.randn(1000)]
        theirs = [torch.nn.Parameter(torch.zeros_like(each)) for each in ours]
        for weight, gradient in zip(theirs, ours, strict=True):
            weight.grad = gradient.clone()
        want = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
        got = clip_by_global_norm(ours, max_norm)
        assert got == pytest.approx(want.item(), rel=1e-6)
        for weight, gradient in zip(theirs, ours, strict=True):
            torch.testing.assert_close(gradient, weight.grad, rtol=1e-6, atol=0)


def test_every_mixture_of_formats_has_one_norm() -> None:
    """3-4-12-84 makes 85, in whatever each part is held, summed in fp32 or wider."""
    gradients = [
        torch.tensor([3.0], dtype=torch.bfloat16),
        torch.tensor([4.0], dtype=torch.float16),
        torch.tensor([12.0], dtype=torch.float64),
        torch.tensor([84.0j]).conj(),
        torch.empty(0),
    ]
    assert global_norm(gradients) == pytest.approx(85.0, rel=1e-7)
    clip_by_global_norm(gradients, 8.5)
    assert global_norm(gradients) == pytest.approx(8.5, rel=4e-3)
    assert global_norm([]) == 0.0


def test_low_gradients_are_summed_in_fp32() -> None:
    """100,000 equal bf16 or fp16 numbers: no sum gets stuck, and none overflows."""
    for dtype in (torch.bfloat16, torch.float16):
        norm = global_norm([torch.full((100_000,), 2.0, dtype=dtype)])
        assert norm == pytest.approx(2.0 * math.sqrt(100_000), rel=1e-5)
    norm = global_norm([torch.full((4,), 60_000.0, dtype=torch.float16)])
    assert norm == pytest.approx(120_000.0, rel=1e-3)


def test_squares_that_overflow_fp32_do_not_make_the_norm_infinite() -> None:
    """Finite gradients have a finite norm, and clipping keeps their direction."""
    gradients = [torch.tensor([3e30]), torch.tensor([-4e30])]
    assert clip_by_global_norm(gradients, 5.0) == pytest.approx(5e30, rel=1e-6)
    torch.testing.assert_close(torch.cat(gradients), torch.tensor([3.0, -4.0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_norm_of_many_narrow_numbers_is_that_of_fp64(dtype: torch.dtype) -> None:
    """Machine code sums them on a CPU: odd sizes, other layouts, nothing but finite."""
    lot = torch.Generator().manual_seed(0)
    sizes = ((1_048_577,), (63,), (300, 1001), (0,), (1,))
    gradients = [torch.randn(size, generator=lot).to(dtype) for size in sizes]
    gradients.append(torch.randn(70, 30, generator=lot).to(dtype).T)
    exact = math.sqrt(sum(float(each.double().square().sum()) for each in gradients))
    assert global_norm(gradients) == pytest.approx(exact, rel=1e-6)
    largest = torch.finfo(dtype).max
    for value, norm in ((math.inf, math.inf), (math.nan, math.nan)):
        gradients[0][-1] = value
        assert global_norm(gradients) == pytest.approx(norm, nan_ok=True)
    gradients[0][-1] = largest
    assert global_norm(gradients) == pytest.approx(math.hypot(exact, largest), rel=1e-6)


def test_a_norm_that_is_not_finite_clips_nothing() -> None:
    """Dividing by it would make every other gradient 0 or NaN."""
    for bad in (math.inf, math.nan):
        gradients = [torch.ones(3), torch.tensor([bad])]
        assert not math.isfinite(clip_by_global_norm(gradients, 1.0))
        assert gradients[0].tolist() == [1.0, 1.0, 1.0]


def test_a_sparse_gradient_counts_what_it_adds_up_to() -> None:
    """Two entries of one place are one number."""
    sparse = torch.sparse_coo_tensor(
        [[1, 1]], torch.tensor([3.0, 4.0]), (5,), check_invariants=True
    )
    assert clip_by_global_norm([sparse], 3.5) == pytest.approx(7.0)
    assert sparse.to_dense()[1].item() == pytest.approx(3.5)


def test_a_bound_that_is_not_positive_is_refused() -> None:
    """Zero, negative and NaN would freeze or destroy the weights."""
    for wrong in (0.0, -1.0, math.nan):
        with pytest.raises(SettingsError, match="above 0"):
            clip_by_global_norm([torch.ones(1)], wrong)


def test_parameters_that_are_not_finite_are_named() -> None:
    """The name is that of the model, and only the guilty are named."""
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Linear(2, 1))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    assert name_nonfinite(model.named_parameters()) == ()
    for bad in (math.nan, -math.inf):
        assert model[1].weight.grad is not None
        model[1].weight.grad[0, 1] = bad
        assert name_nonfinite(model.named_parameters()) == ("1.weight",)


def test_each_group_is_clipped_to_its_own_limit() -> None:
    """A group's own limit wins over the common one, and groups do not mix."""
    parameters = [_parameter(torch.ones(4), torch.full((4,), 5.0)) for _ in range(3)]
    optimizer = torch.optim.SGD(
        [
            {"params": [parameters[0]], "max_norm": 1.0},
            {"params": [parameters[1]]},
            {"params": [parameters[2]], "max_norm": None},
        ],
        lr=0.1,
    )
    assert clip_by_group(optimizer.param_groups, max_norm=2.0) == [10.0, 10.0, 10.0]
    norms = [global_norm([p.grad]) for p in parameters if p.grad is not None]
    assert norms == pytest.approx([1.0, 2.0, 10.0], rel=1e-6)


def test_adaptive_clipping_measures_each_row_by_its_weight() -> None:
    """A row may move by a fraction of itself; zeros may move by that of the floor."""
    weight = torch.tensor([[3.0, 4.0], [300.0, 400.0], [0.0, 0.0]])
    gradient = torch.tensor([[3.0, 4.0], [3.0, 4.0], [0.0, 1.0]])
    parameter = _parameter(weight.bfloat16(), gradient.bfloat16())
    assert clip_adaptively([parameter], ratio=0.1, floor=1e-2) == 2
    assert parameter.grad is not None
    rows = parameter.grad.float().norm(dim=1)
    assert rows.tolist() == pytest.approx([0.5, 5.0, 1e-3], rel=2**-7)
    bias = _parameter(torch.tensor([3.0, 4.0]), torch.tensor([30.0, 40.0]))
    assert clip_adaptively([bias], ratio=0.1) == 1
    assert bias.grad is not None
    assert bias.grad.tolist() == pytest.approx([0.3, 0.4], rel=1e-6)


def test_adaptive_clipping_leaves_rows_that_are_not_finite() -> None:
    """They are for the check of the step to find."""
    gradient = torch.tensor([[math.inf, 0.0], [9.0, 0.0]])
    parameter = _parameter(torch.ones(2, 2), gradient)
    assert clip_adaptively([parameter], ratio=0.1) == 1
    assert parameter.grad is not None
    assert parameter.grad[0, 0] == math.inf


def test_adaptive_limits_that_freeze_the_weights_are_refused() -> None:
    """A ratio of 0 is no limit."""
    for wrong in ({"ratio": -1.0}, {"floor": 0.0}):
        with pytest.raises(SettingsError, match="above 0; got"):
            clip_adaptively([], **wrong)


def _shard_norm(rank: int, folder: str) -> None:
    """Check the norm in one of two processes; a failure is an exit code."""
    import torch.distributed as dist

    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    group = dist.group.WORLD
    shards = [torch.full((9,), 1e150, dtype=torch.float64)] if rank else []
    assert global_norm(shards, group) == pytest.approx(3e150, rel=1e-12)
    both = [torch.full((2 + rank,), 2.0, dtype=torch.bfloat16)]
    assert global_norm(both, group) == pytest.approx(math.sqrt(20), rel=1e-6)
    assert global_norm([torch.zeros(1)], group) == 0.0
    poison = [torch.tensor([math.nan if rank else 1.0])]
    assert math.isnan(global_norm(poison, group))
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_that_hold_shards_agree_on_the_norm(tmp_path: Path) -> None:
    """Two processes, each with its shards, get the norm of all of them."""
    torch.multiprocessing.spawn(_shard_norm, (str(tmp_path),), nprocs=2)
