"""The Cayley propagator: a phase rotation, then a unitary step along a graph.

    psi <- (I + i K)^-1 (I - i K) psi,     K = dt/2 H,  H a real graph Laplacian

The step is unitary in exact arithmetic, and stays so to 1e-7 in fp32 when it is solved
well. One matrix serves all tokens, so nothing is iterated per token:

    explicit   C - I = -K S,  S = 2 K (I + K^2)^-1  from one Cholesky factorisation in
               fp64; the step is psi + psi (C - I) - i psi S: one real matrix product.
               Writing U - I and not U keeps the product small, and so its error.
    iterative  CG on I + K^2, which is symmetric positive definite. Never on the real
               block of I + i K, which is I + skew: there CG diverges in any precision.
    chebyshev  the series of 1 / (1 + i K), degree from a proven bound.

All three share one backward, from x = (psi + out) / 2 and y = g + U^H g:
dL/dpsi = U^H g,  dL/dK = y_re^T x_im - y_im^T x_re.
No output is kept between calls, and no solver answers with less than it was asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensor

from castwise.errors import SettingsError, SolverError
from castwise.layers import chebyshev
from castwise.layers.conjugate_gradient import (
    CgSettings,
    Outcome,
    Solution,
    conjugate_gradient,
)
from castwise.layers.hamiltonian import GraphHamiltonian, apply_laplacian
from castwise.layers.ieee_products import ieee_products
from castwise.layers.phase_rotation import rotate

Solver = Literal["auto", "explicit", "iterative", "chebyshev"]

# beyond it a dense factor is assumed dearer than edges; not measured yet
EXPLICIT_LIMIT = 1024
# above this |K| the fp64 Cholesky factor of I + K^2 loses digits, an LU of I + i K not
CHOLESKY_LIMIT = 1e3


def cayley_blocks(k: Tensor) -> tuple[Tensor, Tensor]:
    """Compute C - I and S of U = C - i S from K `[D, D]`, in fp64."""
    k = k.double()
    eye = torch.eye(len(k), dtype=k.dtype, device=k.device)
    has_numbers = not isinstance(k, FakeTensor)  # in an estimate of memory it has none
    if has_numbers and k.abs().sum(-1).max() > CHOLESKY_LIMIT:
        inverse = torch.linalg.inv(torch.complex(eye, k))
        return 2 * (inverse.real - eye), -2 * inverse.imag
    factor, info = torch.linalg.cholesky_ex(torch.addmm(eye, k, k))
    if (
        has_numbers and info.any()
    ):  # only a non-finite K gets here; it comes out non-finite
        return torch.full_like(k, float("nan")), torch.full_like(k, float("nan"))
    s = 2 * (k @ torch.cholesky_inverse(factor))
    return -(k @ s), s


class _Region:
    """The precision that a step ran in, for its backward."""

    def __init__(self, device_type: str, *, guarded: bool) -> None:
        self.device_type, self.guarded = device_type, guarded
        self.autocast = torch.is_autocast_enabled(device_type)
        self.dtype = torch.get_autocast_dtype(device_type)

    def enter(self) -> AbstractContextManager[Any]:
        if self.guarded:
            return ieee_products(self.device_type)
        return torch.autocast(self.device_type, self.dtype, enabled=self.autocast)


class _ExplicitStep(torch.autograd.Function):
    """psi + psi (U - I) with both blocks of U in one matrix product."""

    @staticmethod
    def forward(ctx: Any, planes: Tensor, k: Tensor, region: _Region) -> Tensor:
        blocks = torch.cat([b.to(planes.dtype) for b in cayley_blocks(k)], dim=1)
        with region.enter():
            out = _small_step(planes, blocks, 1)
        ctx.region = region
        ctx.save_for_backward((planes + out).mul_(0.5), blocks)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, blocks = ctx.saved_tensors
        with ctx.region.enter():
            by_psi = _small_step(grad, blocks, -1)
            by_k = None
            if ctx.needs_input_grad[1]:
                y = (by_psi + grad).flatten(1, -2)
                left = torch.cat((y[0], -y[1]))
                x = x.flatten(1, -2)
                by_k = (left.T @ torch.cat((x[1], x[0]))).double()
        return by_psi, by_k, None


def _small_step(planes: Tensor, blocks: Tensor, sign: int) -> Tensor:
    """Add psi (C - I) - i sign psi S."""
    size = planes.shape[-1]
    product = (planes.reshape(-1, size) @ blocks).view(*planes.shape[:-1], 2 * size)
    out = planes + product[..., :size]
    out[0].add_(product[1, ..., size:], alpha=sign)
    out[1].sub_(product[0, ..., size:], alpha=sign)
    return out


Resolve = Callable[[Callable[[Tensor], Tensor], Tensor, int], Tensor]


class _ResolvedStep(torch.autograd.Function):
    """2 (I + i K)^-1 psi - psi by a solver that only applies K."""

    @staticmethod
    def forward(
        ctx: Any,
        planes: Tensor,
        rings: Tensor,
        pair_weights: Tensor,
        pairs: Tensor,
        resolve: Resolve,
        region: _Region,
    ) -> Tensor:
        with region.enter():
            x = resolve(
                lambda v: apply_laplacian(v, rings, pair_weights, pairs), planes, 1
            )
        ctx.resolve, ctx.region = resolve, region
        ctx.save_for_backward(x, rings, pair_weights, pairs)
        return 2 * x - planes

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, rings, pair_weights, pairs = ctx.saved_tensors
        with ctx.region.enter():
            if torch.isfinite(grad).all():
                y = ctx.resolve(
                    lambda v: apply_laplacian(v, rings, pair_weights, pairs),
                    2 * grad,
                    -1,
                )
            else:  # an overflow for the loss scale to see
                y = torch.full_like(grad, float("nan"))
            turned = torch.stack((x[1], -x[0]))
            with torch.enable_grad():
                pull = torch.func.vjp(
                    lambda r, w: apply_laplacian(turned, r, w, pairs),
                    rings,
                    pair_weights,
                )[1]
                by_rings, by_pairs = pull(y)
        return y - grad, by_rings, by_pairs, None, None, None


class CayleyPropagator(nn.Module):
    """One layer: phase rotation, then the unitary step.

    Args:
        dim: number of channels D.
        dt: time step.
        envelope: initial strength of the damping of intensity peaks.
        sharpness: rate at which the phase turns with intensity.
        sparsity: neighbours of a channel on the first ring.
        num_scales: number of rings.
        long_range: long-range edges per channel.
        solver: `auto` is explicit up to 1,024 channels, iterative above.
        tolerance: residual of the iterative solver, error bound of the series.
        guarded: whether the layer holds itself in IEEE fp32 under any autocast and any
            TF32 switch. Without the guard the surroundings decide.
        seed: of the graph and its weights.
    """

    def __init__(
        self,
        dim: int,
        *,
        dt: float = 0.1,
        envelope: float = 0.1,
        sharpness: float = 1.0,
        sparsity: int = 6,
        num_scales: int = 3,
        long_range: float = 0.5,
        solver: Solver = "auto",
        tolerance: float = 1e-6,
        guarded: bool = True,
        seed: int = 42,
    ) -> None:
        super().__init__()
        if solver not in get_args(Solver):
            raise SettingsError(
                f"CayleyPropagator needs solver to be one of"
                f" {', '.join(get_args(Solver))}; got {solver!r}."
            )
        if solver == "auto":
            solver = "explicit" if dim <= EXPLICIT_LIMIT else "iterative"
        self.dt, self.sharpness, self.tolerance = dt, sharpness, tolerance
        self.solver: Solver = solver
        self.guarded = guarded
        self.envelope = nn.Parameter(torch.full((dim,), envelope))
        self.hamiltonian = GraphHamiltonian(
            dim,
            sparsity=sparsity,
            num_scales=num_scales,
            long_range=long_range,
            seed=seed,
        )

    # a compiled model calls it eagerly, between two graphs
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(self, psi: Tensor) -> Tensor:
        """Propagate `[..., D]`; real and 16-bit inputs become complex64.

        Raises:
            SolverError: if an iterative solver does not reach its tolerance.
        """
        planes = self.rotated(as_planes(psi))
        return as_complex(self.step(planes))

    def rotated(self, planes: Tensor) -> Tensor:
        """Rotate planes `[2, ..., D]`: the right-hand side of the step."""
        with torch.autocast(planes.device.type, enabled=False):
            return rotate(planes, self.envelope, sharpness=self.sharpness)

    def step(self, planes: Tensor) -> Tensor:
        """Take the unitary step on planes `[2, ..., D]`."""
        region = _Region(planes.device.type, guarded=self.guarded)
        with torch.autocast(planes.device.type, enabled=False):
            if self.solver == "explicit":
                k = self.dt / 2 * self.hamiltonian.dense()
            else:
                rings, weights = self._scaled_edges(planes.dtype)
        if self.solver == "explicit":
            out = _ExplicitStep.apply(planes, k, region)  # type: ignore[no-untyped-call]
        else:
            out = _ResolvedStep.apply(  # type: ignore[no-untyped-call]
                planes, rings, weights, self.hamiltonian.pairs, self._resolve(), region
            )
        return cast("Tensor", out)

    def _scaled_edges(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the edge weights of K."""
        rings, weights = self.hamiltonian.edge_weights(dtype)
        return self.dt / 2 * rings, self.dt / 2 * weights

    def _resolve(self) -> Resolve:
        """Return the solver of (I + i sign K) x = rhs."""
        if self.solver == "chebyshev":
            half_width = self.half_width()
            # the step doubles the error of the resolvent
            degree = chebyshev.degree_for(half_width, self.tolerance / 2)
            return lambda apply_k, rhs, sign: chebyshev.apply_series(
                apply_k, rhs, half_width, degree, sign
            )
        return lambda apply_k, rhs, sign: _solve_normal(
            apply_k, rhs, sign, self.tolerance
        )[0]

    def half_width(self) -> float:
        """Return half of a bound on the spectrum of K."""
        bound = self.hamiltonian.largest_eigenvalue_bound().item()
        return max(self.dt / 4 * bound, 1e-9)

    @torch.no_grad()
    def solve_step(self, psi: Tensor) -> Solution:
        """Take the layer's step and say how it ended: outcome, steps, true residual.

        `num_steps` is the number of CG steps, the degree of the series, or 1 for the
        one factorisation. This never raises for a solver that stops short.
        """
        rhs = self.rotated(as_planes(psi))
        num_steps, outcome, out = 1, Outcome.CONVERGED, None
        if self.solver == "iterative":
            rings, weights = self._scaled_edges(rhs.dtype)
            pairs = self.hamiltonian.pairs
            with ieee_products(rhs.device.type):
                x, inner = _solve_normal(
                    lambda v: apply_laplacian(v, rings, weights, pairs),
                    rhs,
                    1,
                    self.tolerance,
                    require=False,
                )
            out, num_steps, outcome = 2 * x - rhs, inner.num_steps, inner.outcome
        else:
            try:
                out = self.step(rhs)
            except SolverError:
                outcome = Outcome.MAX_STEPS_REACHED
                out = torch.full_like(rhs, float("nan"))
                num_steps = chebyshev.MAX_DEGREE
            if self.solver == "chebyshev" and outcome is Outcome.CONVERGED:
                num_steps = chebyshev.degree_for(self.half_width(), self.tolerance / 2)
        residual = self.residual(rhs, out)
        if outcome is Outcome.CONVERGED and not torch.isfinite(residual).all():
            outcome = Outcome.NON_FINITE
        return Solution(
            x=as_complex(out),
            outcome=outcome,
            num_steps=num_steps,
            residual=residual,
        )

    def residual(self, rhs: Tensor, out: Tensor) -> Tensor:
        """Compute ||(I + i K) out - (I - i K) rhs|| / ||rhs|| by token, in fp64."""
        k = self.dt / 2 * self.hamiltonian.dense()
        total, difference = (rhs.double() + out.double()), (out.double() - rhs.double())
        turned = total @ k
        error = difference + torch.stack((-turned[1], turned[0]))
        size = rhs.double().square().sum((0, -1)).sqrt()
        return error.square().sum((0, -1)).sqrt() / size


def _solve_normal(
    apply_k: Callable[[Tensor], Tensor],
    rhs: Tensor,
    sign: int,
    tolerance: float,
    *,
    require: bool = True,
) -> tuple[Tensor, Solution]:
    """Solve (I + i sign K) x = rhs by CG on I + K^2, both planes as real systems."""
    twice = apply_k(apply_k(rhs))
    # two terms of the geometric series, where it converges
    small = twice.square().sum(-1, keepdim=True) < rhs.square().sum(-1, keepdim=True)
    solution = conjugate_gradient(
        lambda v: v + apply_k(apply_k(v)),
        rhs,
        start=torch.where(small, rhs - twice, 0.0),
        settings=CgSettings(tolerance=tolerance / 2, max_steps=200),
    )
    v = solution.require() if require else solution.x
    pushed = sign * apply_k(v)
    return v + torch.stack((pushed[1], -pushed[0])), solution


def as_planes(psi: Tensor) -> Tensor:
    """Split into `[2, ..., D]` real and imaginary planes; never below fp32."""
    if not psi.is_complex():
        psi = psi.to(torch.promote_types(psi.dtype, torch.float32))
        return torch.stack((psi, torch.zeros_like(psi)))
    if psi.dtype.itemsize < 8:
        psi = psi.to(torch.complex64)
    return torch.stack((psi.real, psi.imag))


def as_complex(planes: Tensor) -> Tensor:
    """Join two planes into a complex tensor."""
    return torch.complex(planes[0], planes[1])
