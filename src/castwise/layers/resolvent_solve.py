"""How the resolvent is computed: four tiers behind two functions, no autograd here.

    kernel      real chains on the CPU: SIMD machine code (`resolvent_kernel`)
    star        chains on a CUDA device where Triton is installed (`star_scan`)
    odd_even    everything else: vector steps in plain torch, on a CPU in NumPy
    projective  rows that came out non-finite although their inputs are finite

Gradients are analytic (dL/da, dL/dk, dL/dz of a holomorphic function); the caller
conjugates them into PyTorch's convention.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch._subclasses import FakeTensor

from castwise.decision import Decision
from castwise.layers import odd_even_numpy
from castwise.layers.kept_blocks import HUGE, LARGE, LINE, block
from castwise.layers.odd_even import diagonal_along, diagonal_and_bonds, linear_scan
from castwise.layers.projective import row_diagonal, row_gradient


class Chain(NamedTuple):  # a dataclass takes ten times as long to make
    """A batch of chains, flattened; what all rows share may lack their dimension."""

    d: Tensor
    """Diagonal `[B, N]`, real or complex."""

    k: Tensor
    """Products of opposite off-diagonals `[(1 or B,) N-1]`, of the dtype of `d`."""

    z: Tensor
    """Where the resolvent is taken, complex128 `[B]` or a scalar."""

    causal: bool
    """Whether nothing comes from the right."""

    @property
    def bonds(self) -> Tensor:
        """Return k, `[1 or B, N-1]`."""
        return self.k if self.k.dim() > 1 else self.k.unsqueeze(0)

    def a(self, wide: bool) -> Tensor:
        """Compute d - z, in fp64 arithmetic when wide."""
        shifted = self.d - (self.z[:, None] if self.z.dim() else self.z)
        return shifted if wide else shifted.to(torch.complex64)

    def row(self, index: int) -> tuple[list[complex], list[complex]]:
        """Return a and k of one row as Python numbers."""
        k = self.bonds[min(index, len(self.bonds) - 1)].to(torch.complex128)
        a = self.d[index] - (self.z[index] if self.z.dim() else self.z)
        return a.tolist(), k.tolist()


MANY = HUGE // 16  # sites; a result of fewer is not huge in any format
WORTH_A_THREAD = 1 << 14  # sites; below, waking a thread costs more than it saves


class Gradient(NamedTuple):
    """Analytic derivatives of the loss."""

    site: Tensor
    """By a, `[B, N]`; only its real part where d is real."""

    bond: Tensor | None
    """By k, `[B, N-1]` complex, when asked for."""

    point: Tensor
    """By z, `[B]` complex."""


@functools.cache
def _call_for() -> Any:
    """Return what prepares calls; once: a repeated import costs a microsecond."""
    from castwise.layers.resolvent_call import call_for  # noqa: PLC0415 -- numba is slow

    return call_for


@functools.cache
def kernel_available() -> Decision[bool]:
    """Say whether the compiled kernel can be used here, and why not."""
    try:
        from castwise.layers import resolvent_kernel  # noqa: PLC0415 -- numba is slow
    except ImportError as error:
        return Decision(False, f"numba cannot be imported: {error}")
    try:
        resolvent_kernel.check()
    except RuntimeError as error:  # no folder to keep machine code in
        return Decision(False, f"numba cannot compile here: {error}")
    return Decision(True, "numba compiles for this processor")


def diagonal(chain: Chain, *, wide: bool) -> Tensor:
    """Compute the diagonal `[B, N]`, in fp64 arithmetic when wide.

    Its dtype is that of the arithmetic, or that which the inputs ask for.
    """
    if _kernel_fits(chain):
        out, broken = _kernel_forward(chain, wide)
    else:
        starred = _star_fits(chain)
        out = _star_inverses(chain, wide)[0] if starred else _plain(chain, wide)
        broken = _not_finite(out)
    if broken is not None:
        for row in broken_rows(chain, broken):
            a_row, k_row = chain.row(row)
            if chain.causal:
                entries = [
                    row_diagonal(a_row[: end + 1], k_row[:end])[-1]
                    for end in range(len(a_row))
                ]
            else:
                entries = row_diagonal(a_row, k_row)
            out[row] = torch.tensor(entries, dtype=out.dtype)
    return out


def broken_rows(chain: Chain, broken: Tensor) -> list[int]:
    """Return the broken rows whose inputs are finite: those a better tier can save."""
    finite = torch.isfinite(torch.view_as_real(chain.a(wide=True))).all(-1).all(-1)
    finite &= torch.isfinite(torch.view_as_real(chain.bonds + 0j)).all(-1).all(-1)
    return torch.nonzero(broken & finite).flatten().tolist()


def gradient(chain: Chain, upstream: Tensor, *, wide: bool, need_k: bool) -> Gradient:
    """Recompute the pivots from the inputs and run the exact adjoint."""
    if _kernel_fits(chain):
        result, broken = _kernel_backward(chain, upstream, wide, need_k)
    else:
        starred = _star_fits(chain)
        run = _star_gradient if starred else _plain_gradient
        result = run(chain, upstream, wide, need_k)
        broken = _not_finite(result.point[:, None])
    if broken is not None:
        _repair(chain, upstream, result, broken)
    return result


def _not_finite(entries: Tensor) -> Tensor | None:
    """Mark the rows with an entry that is not finite, if any: nor is their sum."""
    if entries.is_cpu:
        return _marked(~np.isfinite(entries.numpy().sum(-1)))
    marks = ~torch.isfinite(torch.view_as_real(entries.sum(-1))).all(-1)
    return marks if marks.any() else None


def _marked(bad: Any) -> Tensor | None:
    """Return the marks of broken rows if there are any; asking NumPy is cheaper."""
    return torch.from_numpy(bad) if bad.any() else None


def _in_numpy(chain: Chain) -> bool:
    return chain.d.is_cpu


def _arrays(chain: Chain, wide: bool) -> tuple[Any, Any]:
    """Return a and k as NumPy arrays, in fp64 arithmetic when wide."""
    dtype = np.complex128 if wide else np.complex64
    d, z, k = chain.d.numpy(), chain.z.resolve_conj().numpy(), chain.bonds.numpy()
    z = z.reshape(-1, 1)
    if np.iscomplexobj(d):
        return (d - z).astype(dtype), k.astype(dtype)
    a = np.empty(d.shape, dtype)
    np.subtract(d, z.real, out=a.real, casting="same_kind")
    a.imag[:] = -z.imag
    return a, k.astype(dtype)


def _plain(chain: Chain, wide: bool) -> Tensor:
    """Compute the diagonal by the odd-even reduction."""
    if _in_numpy(chain):
        a, k = _arrays(chain, wide)
        dtype = a.dtype if chain.causal else np.result_type(chain.d.numpy(), 1j)
        found = odd_even_numpy.diagonal_and_bonds(a, k, bonds=chain.causal, dtype=dtype)
        out, bonds = map(torch.from_numpy, found)
    else:
        start = chain.a(wide)
        out, bonds = diagonal_and_bonds(start, chain.bonds.to(start.dtype))
    return left_inverse(out, bonds) if chain.causal else out


def _plain_gradient(
    chain: Chain, upstream: Tensor, wide: bool, need_k: bool
) -> Gradient:
    """Run the adjoint on the odd-even reduction."""
    if chain.causal:
        inverse = _plain(chain, wide)
        return adjoint(chain, inverse, inverse, inverse, upstream, need_k=need_k)
    if _in_numpy(chain):
        a, k = _arrays(chain, wide)
        along = np.conjugate(upstream.resolve_conj().numpy(), dtype=a.dtype)
        dtype = np.dtype(chain.d.numpy().dtype)
        by_a, by_h, trace = odd_even_numpy.diagonal_along(
            a, k, along, dtype, bonds=need_k
        )
        bond = torch.from_numpy(-by_h) if need_k else None
        return Gradient(torch.from_numpy(by_a), bond, torch.from_numpy(-trace))
    start = chain.a(wide)
    turned = upstream.conj().to(start.dtype).resolve_conj()
    _, site, bond = diagonal_along(start, chain.bonds.to(start.dtype), turned)
    return Gradient(site, -bond if need_k else None, -site.sum(-1))


def left_inverse(diagonal_: Tensor, bonds: Tensor) -> Tensor:
    """Compute 1 / u from the diagonal and the bonds: u_i = (1 - y_i) / G_i."""
    return torch.cat((diagonal_[..., :-1] / (1 - bonds), diagonal_[..., -1:]), dim=-1)


def right_inverse(diagonal_: Tensor, bonds: Tensor) -> Tensor:
    """Compute 1 / w from the diagonal and the bonds: w_(i+1) = (1 - y_i) / G_(i+1)."""
    return torch.cat((diagonal_[..., :1], diagonal_[..., 1:] / (1 - bonds)), dim=-1)


def adjoint(
    chain: Chain,
    out: Tensor,
    iu: Tensor,
    iw: Tensor,
    upstream: Tensor,
    *,
    need_k: bool,
    scan: Callable[[Tensor, Tensor], Tensor] = linear_scan,
) -> Gradient:
    """Run the adjoint from G, 1/u and 1/w by two first-order scans."""
    k = chain.bonds.to(out.dtype)
    source = -upstream.conj().to(out.dtype) * out * out
    leftward = _after_zero((k * iu[..., :-1] * iu[..., :-1]).flip(-1))
    bond = None
    if chain.causal:
        site = u = scan(leftward, source.flip(-1)).flip(-1)
        if need_k:
            bond = -u[..., 1:] * iu[..., :-1]
    else:
        rightward = _after_zero(k * iw[..., 1:] * iw[..., 1:])
        both = scan(  # in one pass: the vector steps are short
            torch.stack((leftward, rightward)), torch.stack((source.flip(-1), source))
        )
        u, w = both[0].flip(-1), both[1]
        site = u + w - source
        if need_k:
            bond = -(u[..., 1:] * iu[..., :-1] + w[..., :-1] * iw[..., 1:])
    return Gradient(site, bond, -site.sum(-1))


def _after_zero(factor: Tensor) -> Tensor:
    return torch.nn.functional.pad(factor, (1, 0))


def _repair(chain: Chain, upstream: Tensor, result: Gradient, broken: Tensor) -> None:
    """Replace the gradient of broken rows by the projective one, in place."""
    sane = torch.isfinite(torch.view_as_real(upstream)).all(-1).all(-1)
    for row in broken_rows(chain, broken & sane):
        a_row, k_row = chain.row(row)
        s_row = upstream[row].conj().to(torch.complex128).tolist()
        if chain.causal:
            site, bond = _causal_row_gradient(a_row, k_row, s_row)
        else:
            site, bond = row_gradient(a_row, k_row, s_row)
        exact = torch.tensor(site, dtype=torch.complex128)
        result.point[row] = -exact.sum()
        result.site[row] = exact if result.site.is_complex() else exact.real
        if result.bond is not None:
            result.bond[row] = torch.tensor(bond, dtype=torch.complex128)


def _causal_row_gradient(
    a: list[complex], k: list[complex], s: list[complex]
) -> tuple[list[complex], list[complex]]:
    """Sum the gradients of every leading block: slow, for broken rows only."""
    site, bond = [0j] * len(a), [0j] * len(k)
    for end in range(len(a)):
        last = [0j] * end + [s[end]]
        part = row_gradient(a[: end + 1], k[:end], last)
        site = [x + y for x, y in zip(site, part.site + [0j] * len(a), strict=False)]
        bond = [x + y for x, y in zip(bond, part.bond + [0j] * len(k), strict=False)]
    return site, bond


def _kernel_fits(chain: Chain) -> bool:
    return (  # `is_cpu`, since to ask for the type of a device makes a string
        chain.d.is_cpu
        and not chain.d.is_complex()
        and chain.d.shape[0] > 0
        and kernel_available().value
    )


@functools.cache
def star_available(device_type: str) -> Decision[bool]:
    """Say whether Triton can be used on a kind of device, and why not."""
    if device_type != "cuda":
        return Decision(False, f"Triton compiles for cuda; got {device_type}")
    if importlib.util.find_spec("triton") is None:
        return Decision(False, "triton is not installed")
    return Decision(True, "Triton compiles for cuda")


def _star_fits(chain: Chain) -> bool:
    return len(chain.d) > 0 and star_available(chain.d.device.type).value


def _star_inverses(chain: Chain, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return G, 1/u and 1/w; G is 1/u for a causal chain, which has no right."""
    from castwise.layers.star_scan import pivots  # noqa: PLC0415 -- needs triton

    a = chain.a(wide)
    k = chain.bonds.to(a.dtype)
    left = pivots(a, k, from_right=False)
    inverse = left.reciprocal()
    if chain.causal:
        return inverse, inverse, inverse
    right = pivots(a, k, from_right=True)
    return (left + right - a).reciprocal(), inverse, right.reciprocal()


def _star_gradient(
    chain: Chain, upstream: Tensor, wide: bool, need_k: bool
) -> Gradient:
    from castwise.layers.star_scan import linear_scan as scan  # noqa: PLC0415 -- needs triton

    entries = _star_inverses(chain, wide)
    return adjoint(chain, *entries, upstream, need_k=need_k, scan=scan)


def _has_no_numbers(chain: Chain) -> bool:
    """Whether only shapes are asked for, as by an estimate of memory."""
    return (
        isinstance(chain.d, FakeTensor)
        or isinstance(chain.k, FakeTensor)
        or isinstance(chain.z, FakeTensor)
    )


def _kernel_tensors(chain: Chain, wide: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return what machine code reads; it must live until that returns."""
    d, k, z = chain.d.contiguous(), chain.k.contiguous(), chain.z
    if d.is_neg():  # as a view of a conjugate's imaginary part is
        d = d.resolve_neg()
    if not wide and d.dtype == torch.float64:
        d, k = d.float(), k.float()
    return d, k, z.resolve_conj() if z.is_conj() else z


def _run_kernel(
    chain: Chain,
    wide: bool,
    held: tuple[Tensor, Tensor, Tensor],
    out: Tensor,
    *,
    grad: Tensor | None = None,
    bond: Tensor | None = None,
    point: Tensor | None = None,
) -> Tensor | None:
    """Call machine code; return which rows broke, if any."""
    d, k, z = held
    num_rows, num_sites = d.shape
    num_threads = _num_threads(num_rows * num_sites)
    call = _call_for()(
        (
            d.dtype is torch.float64,
            wide,
            k.dim() == 1 or k.shape[0] == 1,
            grad is not None,
            bond is not None,
        ),
        (num_rows, num_sites, chain.causal, num_threads),
    )
    broken = call(
        d.data_ptr(),
        k.data_ptr(),
        z.data_ptr(),
        16 * z.stride(0) if z.dim() else 0,
        num_rows * num_sites >= MANY and _goes_past_caches(out),
        out.data_ptr(),
        0 if grad is None else grad.data_ptr(),
        0 if bond is None else bond.data_ptr(),
        0 if point is None else point.data_ptr(),
    )
    return torch.from_numpy(call.bad != 0) if broken else None


def _goes_past_caches(out: Tensor) -> bool:
    """Whether a result is too large to wait in the caches, and all rows whole lines.

    Storing it there would first read what it replaces, and drop what is remembered.
    """
    return (
        out.nbytes >= HUGE
        and out.data_ptr() % LINE == 0
        and out.shape[1] * out.itemsize % LINE == 0
    )


def _num_threads(num_sites: int) -> int:
    """Return in how many threads so many sites are walked fastest."""
    if num_sites < 2 * WORTH_A_THREAD:
        return 1
    return min(torch.get_num_threads(), num_sites // WORTH_A_THREAD)


def _room(chain: Chain, length: int, dtype: torch.dtype) -> Tensor:
    """Return memory for a result."""
    num_rows = len(chain.d)
    num_bytes = num_rows * length * dtype.itemsize
    if num_bytes < LARGE or _has_no_numbers(chain):
        return torch.empty(num_rows, length, dtype=dtype)
    raw = torch.from_numpy(block(num_bytes))
    return raw.view(dtype).view(num_rows, length)


def _kernel_forward(chain: Chain, wide: bool) -> tuple[Tensor, Tensor | None]:
    """Return the diagonal, and which rows broke."""
    held = _kernel_tensors(chain, wide)
    out = _room(chain, chain.d.shape[1], held[0].dtype.to_complex())
    if _has_no_numbers(chain):
        return out, None
    return out, _run_kernel(chain, wide, held, out)


def _kernel_backward(
    chain: Chain, upstream: Tensor, wide: bool, need_k: bool
) -> tuple[Gradient, Tensor | None]:
    """Return the gradient, and which rows broke."""
    held = _kernel_tensors(chain, wide)
    num_rows, num_sites = chain.d.shape
    complex_dtype = held[0].dtype.to_complex()
    grad = upstream if upstream.dtype == complex_dtype else upstream.to(complex_dtype)
    grad = (grad.resolve_conj() if grad.is_conj() else grad).contiguous()
    site = _room(chain, num_sites, held[0].dtype)
    bond = _room(chain, num_sites - 1, complex_dtype) if need_k else None
    point = torch.empty(num_rows, dtype=torch.complex128)
    found = Gradient(site, bond, point)
    if _has_no_numbers(chain):
        return found, None
    broken = _run_kernel(chain, wide, held, site, grad=grad, bond=bond, point=point)
    return found, broken
