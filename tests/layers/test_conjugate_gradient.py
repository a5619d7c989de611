from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck

from castwise.errors import SettingsError, SolverError
from castwise.layers.conjugate_gradient import (
    CgSettings,
    Outcome,
    conjugate_gradient,
    solve,
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    """Return random numbers that are the same in every run."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def positive(size: int) -> Tensor:
    """Return a symmetric positive definite matrix."""
    root = draw(size, size)
    return root @ root.T / size + torch.eye(size)


def apply(x: Tensor, matrix: Tensor) -> Tensor:
    """Apply a dense matrix to the last dimension."""
    return x @ matrix.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1, 7, 63])
def test_a_converged_solution_is_one(size: int, dtype: torch.dtype) -> None:
    """The reported residual is the true one, below the tolerance, per system."""
    matrix, rhs = positive(size).to(dtype), draw(5, 3, size, seed=1).to(dtype)
    settings = CgSettings(tolerance=1e-5 if dtype == torch.float32 else 1e-12)
    solution = conjugate_gradient(apply, rhs, matrix, settings=settings)
    assert solution.outcome is Outcome.CONVERGED
    assert solution.residual.shape == (5, 3)
    true = (rhs - solution.require() @ matrix.T).norm(dim=-1) / rhs.norm(dim=-1)
    torch.testing.assert_close(solution.residual, true, rtol=0.1, atol=1e-7)
    assert true.max() <= settings.tolerance


def test_a_zero_right_hand_side_needs_no_step() -> None:
    """Also beside others that need some: no 0 / 0 in a finished system."""
    matrix, rhs = positive(9), draw(2, 9)
    rhs[0] = 0
    solution = conjugate_gradient(apply, rhs, matrix)
    assert solution.outcome is Outcome.CONVERGED
    assert torch.equal(solution.x[0], torch.zeros(9).double())
    assert conjugate_gradient(apply, rhs[:1], matrix).num_steps == 0
    assert conjugate_gradient(apply, rhs[:0], matrix).outcome is Outcome.CONVERGED


def test_a_good_start_saves_steps() -> None:
    """Starting at the solution takes no step."""
    matrix, rhs = positive(20), draw(20)
    first = conjugate_gradient(apply, rhs, matrix)
    again = conjugate_gradient(apply, rhs, matrix, start=first.x)
    assert again.num_steps == 0 < first.num_steps


def test_too_few_steps_are_named() -> None:
    """The half-answer is in the solution, and `require` refuses it."""
    settings = CgSettings(max_steps=2, tolerance=1e-10)
    solution = conjugate_gradient(apply, draw(30), positive(30), settings=settings)
    assert solution.outcome is Outcome.MAX_STEPS_REACHED
    assert solution.num_steps == 2
    with pytest.raises(SolverError, match="max_steps_reached after 2 steps"):
        solution.require()


@pytest.mark.parametrize("strength", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_skew_block_of_a_cayley_system_is_refused(
    strength: float, dtype: torch.dtype
) -> None:
    """I + skew has p.Ap > 0 for every p, and CG still diverges on it."""
    skew = draw(40, 40)
    skew = strength * (skew - skew.T) / 40**0.5
    matrix = (torch.eye(40) + skew).to(dtype)
    solution = conjugate_gradient(apply, draw(6, 40).to(dtype), matrix)
    assert solution.outcome is Outcome.NOT_POSITIVE_DEFINITE
    assert "normal equations" in solution.outcome.advice
    assert solution.num_steps <= 2


def test_an_indefinite_matrix_is_refused() -> None:
    """One negative eigenvalue is enough."""
    matrix = torch.diag(torch.tensor([1.0, 2.0, -3.0]))
    solution = conjugate_gradient(apply, torch.ones(3), matrix)
    assert solution.outcome is Outcome.NOT_POSITIVE_DEFINITE


def test_a_tolerance_below_rounding_is_a_breakdown() -> None:
    """The residual stops falling; steps beyond that are not wasted."""
    settings = CgSettings(tolerance=1e-12, max_steps=1000)
    matrix = positive(50).float()
    solution = conjugate_gradient(apply, draw(50).float(), matrix, settings=settings)
    assert solution.outcome is Outcome.BREAKDOWN
    assert solution.num_steps < 200
    assert "fp64" in solution.outcome.advice


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_values_are_named(bad: float) -> None:
    """In the right-hand side and in the operator."""
    rhs, matrix = draw(10), positive(10)
    assert conjugate_gradient(apply, rhs + bad, matrix).outcome is Outcome.NON_FINITE
    assert conjugate_gradient(apply, rhs, matrix * bad).outcome is Outcome.NON_FINITE


def test_gradients_follow_the_implicit_function_theorem() -> None:
    """Finite differences confirm them, twice."""
    root = draw(4, 4).requires_grad_()
    rhs = draw(2, 4, seed=3).requires_grad_()
    settings = CgSettings(tolerance=1e-13)

    def function(rhs: Tensor, root: Tensor) -> Tensor:
        return solve(lambda x, r: x + (x @ r) @ r.T, rhs, root, settings=settings)

    gradcheck(function, (rhs, root))
    gradgradcheck(function, (rhs, root))


def test_a_non_finite_upstream_gradient_comes_out_non_finite() -> None:
    """A loss scale must see it; an exception would end the run."""
    rhs = draw(3, 6).requires_grad_()
    matrix = positive(6).requires_grad_()
    out = solve(apply, rhs, matrix)
    out.backward(torch.full_like(out, float("inf")))
    assert rhs.grad is not None
    assert matrix.grad is not None
    assert not torch.isfinite(rhs.grad).any()
    assert not torch.isfinite(matrix.grad).any()


def test_a_differentiable_solve_never_returns_a_half_answer() -> None:
    """It raises where `conjugate_gradient` reports."""
    with pytest.raises(SolverError, match="max_steps"):
        solve(apply, draw(30), positive(30), settings=CgSettings(max_steps=1))


def test_settings_are_checked() -> None:
    """The message shows them."""
    with pytest.raises(SettingsError, match="max_steps=0"):
        CgSettings(max_steps=0)
