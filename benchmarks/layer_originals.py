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


def determinant_diagonal(d: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
    """G_i = theta_i phi_i / theta_N for one row, as a loop made for `torch.vmap`.

    Couplings come by row and are multiplied inside of both loops, as in the original;
    that they belong to the next site in the second one is corrected.
    """
    a = d - z
    n = a.shape[0]
    theta = [torch.ones_like(a[0]), a[0]]
    for i in range(1, n):
        theta.append(a[i] * theta[-1] - c[i - 1] * b[i - 1] * theta[-2])
    phi = [torch.ones_like(a[0])]
    if n > 1:
        phi.append(a[n - 1])
    for i in range(n - 3, -1, -1):
        phi.append(a[i + 1] * phi[-1] - c[i + 1] * b[i + 1] * phi[-2])
    out = torch.stack(theta[:n]) * torch.stack(phi[::-1]) / (theta[n] + 1e-18)
    finite = torch.isfinite(out.real) & torch.isfinite(out.imag)
    out = torch.where(finite, out, torch.zeros_like(out))
    size = out.abs()
    return torch.where(size > 50, out * 50 / (size + 1e-9), out)


class OriginalResolvent(torch.autograd.Function):
    """The vmap form with its own backward, half diagonal, half "hypothesis 7"."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, b: Tensor, c: Tensor, z: Tensor) -> Tensor:
        """Run the recursion in complex128, keep complex64."""
        wide = torch.vmap(determinant_diagonal, in_dims=(0, 0, 0, None))
        out = wide(*(x.to(torch.complex128) for x in (d, b, c)), z)
        out = out.to(torch.complex64)
        ctx.save_for_backward(out)
        return torch.stack((out.real, out.imag), -1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        """Blend -Re(s G^2) and -Re(s / G^2)."""
        (out,) = ctx.saved_tensors
        upstream = torch.complex(grad[..., 0], grad[..., 1])
        square = out * out
        size = square.abs()
        safe = torch.where(size < 1e-3, square / (size + 1e-9) * 1e-3, square)
        blend = -0.5 * (upstream * square).real - 0.5 * (upstream / (safe + 1e-6)).real
        blend = torch.where(torch.isfinite(blend), blend, torch.zeros_like(blend))
        return blend.clamp(-1000, 1000), None, None, None


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


@numba.njit(fastmath={"contract"}, error_model="numpy")
def handwritten_simd_gradient(  # noqa: C901 -- in one piece, as one writes it by hand
    a_re: Any, a_im: Any, k: Any, s: Any, out: Any, store: Any
) -> None:
    """Pivots from both sides, then the two recurrences of the adjoint.

    `s` is the conjugate of the upstream gradient; writes dL/da; the batch innermost.
    """
    n, rows = a_re.shape
    for i in range(n):  # store: 1 / u, 1 / w, p, W
        for b in range(rows):
            re, im = a_re[i, b], a_im[i, b]
            if i > 0:
                re -= k[i - 1] * store[i - 1, 0, b]
                im -= k[i - 1] * store[i - 1, 1, b]
            f = 1 / (re * re + im * im)
            store[i, 0, b] = re * f
            store[i, 1, b] = -im * f
    for i in range(n - 1, -1, -1):
        for b in range(rows):
            re, im = a_re[i, b], a_im[i, b]
            if i < n - 1:
                re -= k[i] * store[i + 1, 2, b]
                im -= k[i] * store[i + 1, 3, b]
            f = 1 / (re * re + im * im)
            store[i, 2, b] = re * f
            store[i, 3, b] = -im * f
            if i > 0:
                re -= k[i - 1] * store[i - 1, 0, b]
                im -= k[i - 1] * store[i - 1, 1, b]
            f = 1 / (re * re + im * im)
            x, y = re * f, -im * f
            x, y = x * x - y * y, 2 * x * y
            p, q = s[i, 0, b], s[i, 1, b]
            store[i, 4, b] = q * y - p * x
            store[i, 5, b] = -(p * y + q * x)
    for i in range(n):
        for b in range(rows):
            p, q = store[i, 4, b], store[i, 5, b]
            if i > 0:
                x, y = store[i, 2, b], store[i, 3, b]
                re, im = k[i - 1] * (x * x - y * y), k[i - 1] * (2 * x * y)
                x, y = store[i - 1, 6, b], store[i - 1, 7, b]
                p += x * re - y * im
                q += x * im + y * re
            store[i, 6, b] = p
            store[i, 7, b] = q
    flow = np.zeros((2, rows), a_re.dtype)
    for i in range(n - 1, -1, -1):
        for b in range(rows):
            x, y = store[i, 0, b], store[i, 1, b]
            f = k[i] if i < n - 1 else 0.0
            re, im = f * (x * x - y * y), f * (2 * x * y)
            x, y = flow[0, b], flow[1, b]
            re, im = x * re - y * im, x * im + y * re
            out[b, i] = re + store[i, 6, b]
            flow[0, b] = store[i, 4, b] + re
            flow[1, b] = store[i, 5, b] + im


class HandwrittenResolvent(torch.autograd.Function):
    """The handwritten kernels as a layer needs them: rows in, rows out, gradients."""

    @staticmethod
    def forward(ctx: Any, d: Tensor, k: Tensor, z: complex) -> Tensor:
        """Turn the batch round, run, keep the input."""
        rows, length = d.shape
        ctx.save_for_backward(d, k)
        ctx.z = z
        out = np.empty((rows, length, 2), np.float32)
        handwritten_simd(*_columns(d, k, z), out, np.empty((length, 2, rows)))
        return torch.view_as_complex(torch.from_numpy(out))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Recompute, and run the adjoint."""
        d, k = ctx.saved_tensors
        rows, length = d.shape
        source = torch.view_as_real(grad.conj().resolve_conj()).double()
        source = source.permute(1, 2, 0).contiguous().numpy()
        out = np.empty((rows, length), np.float32)
        handwritten_simd_gradient(
            *_columns(d, k, ctx.z), source, out, np.empty((length, 8, rows))
        )
        return torch.from_numpy(out), None, None


def _columns(d: Tensor, k: Tensor, z: complex) -> tuple[Any, Any, Any]:
    """Return d - z with the batch innermost, and k, in fp64."""
    a = d.double().T.contiguous().numpy()
    return a - z.real, np.full_like(a, -z.imag), k.double().numpy()


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
