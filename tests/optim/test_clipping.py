from __future__ import annotations

import math

import pytest
import torch

from castwise.errors import SettingsError
from castwise.optim.clipping import clip_by_global_norm, global_norm


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
