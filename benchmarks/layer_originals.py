"""The algorithms that the layers replace, written anew from their formulas.

They are the rivals of `benchmarks/layers.py`, in the form in which they break: the
determinant recursion that overflows, the CG on a skew block that diverges, the damped
Chebyshev series that stops at 1e-3. Formulas only; no line is taken from anywhere.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor


def determinant_diagonal(d: Tensor, k: Tensor, z: Tensor) -> Tensor:
    """G_i = theta_i phi_i / theta_N for one row, as a loop made for `torch.vmap`."""
    a = d - z
    n = a.shape[0]
    theta = [torch.ones_like(a[0]), a[0]]
    for i in range(1, n):
        theta.append(a[i] * theta[-1] - k[i - 1] * theta[-2])
    phi = [torch.ones_like(a[0])]
    if n > 1:
        phi.append(a[n - 1])
    for i in range(n - 3, -1, -1):
        phi.append(a[i + 1] * phi[-1] - k[i + 1] * phi[-2])
    out = torch.stack(theta[:n]) * torch.stack(phi[::-1]) / (theta[n] + 1e-18)
    finite = torch.isfinite(out.real) & torch.isfinite(out.imag)
    return torch.where(finite, out, torch.zeros_like(out))


class OriginalResolvent(torch.autograd.Function):
    """The vmap form with its diagonal-only backward."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, k: Tensor, z: Tensor) -> Tensor:
        """Run the recursion in complex128, keep complex64."""
        wide = torch.vmap(determinant_diagonal, in_dims=(0, None, None))
        out = wide(d.to(torch.complex128), k.to(torch.complex128), z)
        out = out.to(torch.complex64)
        ctx.save_for_backward(out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Apply -Re(g G^2)."""
        (out,) = ctx.saved_tensors
        return -(grad * out * out).real, None, None


@numba.njit(fastmath={"contract"}, error_model="numpy")
def handwritten_simd(a_re: Any, a_im: Any, k: Any, out: Any, u: Any) -> None:
    """Ratio form over `[N, B]`, the batch innermost: what one writes by hand."""
    n, rows = a_re.shape
    for i in range(n):
        for b in range(rows):
            re, im = a_re[i, b], a_im[i, b]
            if i > 0:
                x, y = u[i - 1, 0, b], u[i - 1, 1, b]
                f = k[i - 1] / (x * x + y * y)
                re -= f * x
                im += f * y
            u[i, 0, b] = re
            u[i, 1, b] = im
    w = np.zeros((2, rows), a_re.dtype)
    for i in range(n - 1, -1, -1):
        for b in range(rows):
            left_re, left_im = a_re[i, b] - u[i, 0, b], a_im[i, b] - u[i, 1, b]
            re, im = a_re[i, b] - w[0, b], a_im[i, b] - w[1, b]
            x, y = re - left_re, im - left_im
            f = 1 / (x * x + y * y)
            out[b, i, 0] = x * f
            out[b, i, 1] = -y * f
            if i > 0:
                f = k[i - 1] / (re * re + im * im)
                w[0, b] = f * re
                w[1, b] = -f * im


def skew_cg(h: Tensor, psi: Tensor, delta: float, steps: int) -> Tensor:
    """Plain CG on the real block of I + i delta H, which is I + skew, not positive."""

    def apply(re: Tensor, im: Tensor) -> tuple[Tensor, Tensor]:
        return re - delta * im @ h, im + delta * re @ h

    def dot(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> Tensor:
        return (x[0] * y[0] + x[1] * y[1]).sum(-1, keepdim=True)

    re, im = psi.real, psi.imag
    rhs = (re + delta * im @ h, im - delta * re @ h)
    x = rhs
    applied = apply(*x)
    r = (rhs[0] - applied[0], rhs[1] - applied[1])
    p, energy = r, dot(r, r)
    for _ in range(steps):
        ap = apply(*p)
        alpha = energy / (dot(p, ap) + 1e-12)
        x = (x[0] + alpha * p[0], x[1] + alpha * p[1])
        r = (r[0] - alpha * ap[0], r[1] - alpha * ap[1])
        fresh = dot(r, r)
        beta = fresh / (energy + 1e-12)
        p, energy = (r[0] + beta * p[0], r[1] + beta * p[1]), fresh
    return torch.complex(*x)


def damped_chebyshev(
    h: Tensor, psi: Tensor, delta: float, degree: int, largest: float
) -> Tensor:
    """Apply the series of 1 / (1 + i delta H), damped by Jackson's kernel."""
    nodes = max(4 * degree, 128)
    angle = (torch.arange(nodes, dtype=torch.float64) + 0.5) * math.pi / nodes
    values = 1 / (1 + 1j * delta * largest / 2 * (torch.cos(angle) + 1))
    order = torch.arange(degree, dtype=torch.float64)
    terms = 2 / nodes * (torch.cos(order[:, None] * angle) * values).sum(-1)
    terms[0] /= 2
    step = math.pi / (degree + 1)
    jackson = (degree - order + 1) * torch.cos(order * step)
    jackson = (jackson + torch.sin(order * step) / math.tan(step)) / (degree + 1)
    terms = (terms * jackson).to(torch.complex64).tolist()
    planes = torch.cat((psi.real, psi.imag))
    half = len(planes) // 2
    rhs = planes + delta * torch.cat((planes[half:], -planes[:half])) @ h

    def apply(x: Tensor) -> Tensor:
        return 2 / largest * (x @ h) - x

    before, now = rhs, apply(rhs)
    total_re = terms[0].real * before + terms[1].real * now
    total_im = terms[0].imag * before + terms[1].imag * now
    for term in terms[2:]:
        before, now = now, 2 * apply(now) - before
        total_re = total_re + term.real * now
        total_im = total_im + term.imag * now
    return torch.complex(
        total_re[:half] - total_im[half:], total_re[half:] + total_im[:half]
    )


def complex_lu(h: Tensor, psi: Tensor, delta: float) -> Tensor:
    """Solve with a complex128 LU, every token a right-hand side."""
    eye = torch.eye(len(h), dtype=torch.complex128)
    k = delta * h.to(torch.complex128)
    rhs = (psi.to(torch.complex128) @ (eye - 1j * k)).mT
    return torch.linalg.solve(eye + 1j * k, rhs).mT.to(torch.complex64)
