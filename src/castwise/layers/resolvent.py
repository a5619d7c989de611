"""The resolvent diagonal: diag((T - z I)^-1) of batched tridiagonal T, any length.

The textbook way multiplies determinants theta_i, phi_i; these grow like exp(0.75 i) and
overflow fp32 near site 115 and fp64 near site 950, after which every entry is wrong.
This room carries the *ratios* of consecutive determinants instead (Schur complements):

    left pivot   u_i = a_i - k_(i-1) / u_(i-1),    a_i = d_i - z
    right pivot  w_i = a_i - k_i / w_(i+1),        k_i = upper_i * lower_i
    diagonal     G_i = 1 / (u_i + w_i - a_i)

For k >= 0 and Im z = eta > 0 every pivot keeps |Im| >= eta: no zero pivot, no overflow,
|G| <= 1 / eta at any N. Rows that break all the same (negative k, real z) are solved by
projective pairs, or refused when T - z I is singular. Non-finite inputs come out
non-finite, and the backward is linear in the upstream gradient, so that a loss scale
works. G is also symmetric in its two directions: a language model that must not look
ahead uses `causal=True`, in which nothing comes from the right: 1 / u_i.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor

from castwise.decision import Decision
from castwise.errors import SettingsError
from castwise.layers import resolvent_solve as solve
from castwise.layers.odd_even import diagonal_and_bonds

Arithmetic = Literal["auto", "fp64", "fp32"]
Storage = Literal["recompute", "fp32", "fp16", "bf16"]

_STORED: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolventPrecision:
    """Three separate choices: the forward, the backward, and what is kept between."""

    forward: Arithmetic = "auto"
    """Arithmetic of the forward. `auto` is fp64 on the CPU, where it costs the same,
    and fp32 elsewhere; fp32 goes up to fp64 by itself where it would not suffice."""

    backward: Arithmetic = "auto"
    """Arithmetic of the backward; `auto` is that of the forward."""

    storage: Storage = "recompute"
    """What is kept for the backward: `recompute` keeps nothing but the inputs."""

    tolerance: float = 1e-6
    """Error of fp32, relative to the largest entry, above which fp64 takes over."""

    def __post_init__(self) -> None:
        """Check every field."""
        for name, value, known in (
            ("forward", self.forward, get_args(Arithmetic)),
            ("backward", self.backward, get_args(Arithmetic)),
            ("storage", self.storage, get_args(Storage)),
        ):
            if value not in known:
                raise SettingsError(
                    f"ResolventPrecision needs {name} to be one of"
                    f" {', '.join(known)}; got {value!r}."
                )
        if not self.tolerance > 0:
            raise SettingsError(
                "ResolventPrecision needs a positive tolerance; got"
                f" {self.tolerance}; 1e-6 suits fp32."
            )

    @property
    def stored_bytes_per_site(self) -> int:
        """Bytes kept for the backward beyond the inputs: two complex, or nothing."""
        if self.storage == "recompute":
            return 0
        return 4 * _STORED[self.storage].itemsize


DEFAULT_PRECISION = ResolventPrecision()
_WIDE_ENOUGH = (torch.float32, torch.float64, torch.complex64, torch.complex128)
_BY_INPUT = Decision(True, "the inputs are fp64")
_BY_SETTING = Decision(True, "the setting says so")
_BY_DEVICE = Decision(True, "on the CPU fp64 costs the same: division rules")


def resolvent_diagonal(
    diagonal: Tensor,
    upper: Tensor,
    lower: Tensor,
    z: Tensor | complex,
    *,
    precision: ResolventPrecision = DEFAULT_PRECISION,
    causal: bool = False,
) -> Tensor:
    """Compute diag((T - z I)^-1), differentiable to any order in all four inputs.

    Autocast has no say here. A diagonal in 16 bits is computed in fp32, but what its
    rounding lost is lost: about u * |a| * |G|^2, that is 2e-3 in bf16 at Im z = 1.

    Args:
        diagonal: `[..., N]`, real or complex, N >= 0.
        upper: couplings T[i, i+1], broadcastable to `[..., N-1]`.
        lower: couplings T[i+1, i], broadcastable to `[..., N-1]`.
        z: complex, a scalar or broadcastable to the batch `[...]`.
        precision: arithmetic of forward and backward, and what is kept between.
        causal: leave out what comes from the right: entry i is the last diagonal entry
            of the resolvent of the chain that ends at site i.

    Returns:
        `[..., N]`, complex128 for fp64 or complex128 inputs, complex64 for others.

    Raises:
        SettingsError: if the shapes do not fit.
        SolverError: if T - z I is singular.
    """
    if torch.compiler.is_dynamo_compiling():
        given = diagonal, upper, lower, z
        out: Tensor = _between_graphs(*given, precision=precision, causal=causal)
        return out
    device_type = "cpu" if diagonal.is_cpu else diagonal.device.type
    if torch.is_autocast_enabled(device_type):
        with torch.autocast(device_type, enabled=False):
            return _flattened(diagonal, upper, lower, z, precision, causal)
    return _flattened(diagonal, upper, lower, z, precision, causal)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _between_graphs(*given: Any, **settings: Any) -> Tensor:
    """Run where a graph has ended; elsewhere this guard would only cost time."""
    return resolvent_diagonal(*given, **settings)


def _flattened(
    diagonal: Tensor,
    upper: Tensor,
    lower: Tensor,
    z: Tensor | complex,
    precision: ResolventPrecision,
    causal: bool,
) -> Tensor:
    """Bring the inputs into one dtype and one batch dimension, and compute."""
    *batch, num_sites = diagonal.shape
    dtype = diagonal.dtype
    if not (dtype is upper.dtype is lower.dtype and dtype in _WIDE_ENOUGH):
        dtype = torch.float32
        for part in (diagonal, upper, lower):
            dtype = torch.promote_types(dtype, part.dtype)
    if num_sites == 0:
        return diagonal.to(dtype.to_complex())
    flat = len(batch) == 1
    if isinstance(z, Tensor) and z.dtype == torch.complex128:
        point = z
    else:
        point = torch.as_tensor(z, device=diagonal.device).to(torch.complex128)
    if point.dim():
        point = _expand("z", point, batch)
        point = point if flat else point.reshape(-1)
    out = cast(
        "Tensor",
        _Resolvent.apply(  # type: ignore[no-untyped-call]
            _as(diagonal if flat else diagonal.reshape(-1, num_sites), dtype),
            _as(_couplings("upper", upper, batch, num_sites - 1), dtype),
            _as(_couplings("lower", lower, batch, num_sites - 1), dtype),
            point,
            precision,
            causal,
        ),
    )
    return out if flat else out.reshape(*batch, num_sites)


def _as(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert where there is something to convert: to ask torch costs a call."""
    return value if value.dtype == dtype else value.to(dtype)


def arithmetic_of_forward(
    precision: ResolventPrecision, chain: solve.Chain
) -> Decision[bool]:
    """Choose whether the forward runs in fp64, and say why."""
    if chain.d.dtype is torch.float64 or chain.d.dtype is torch.complex128:
        return _BY_INPUT
    if precision.forward == "fp64":
        return _BY_SETTING
    if precision.forward == "auto" and chain.d.is_cpu:
        return _BY_DEVICE
    error = fp32_error(chain)
    if not error <= precision.tolerance:
        return Decision(
            True, f"fp32 could be wrong by {error:.1e} of the largest entry"
        )
    return Decision(False, f"fp32 is good to {error:.1e} of the largest entry")


def fp32_error(chain: solve.Chain) -> float:
    """Bound the error of fp32 arithmetic, relative to the largest entry.

    Rounding acts like a change of T by u |T|. For a Hermitian T the rows of G obey the
    Ward identity, sum_j |G_ij|^2 = Im G_ii / eta, so that such a change moves G_ii by
    at most u |T| Im G_ii / eta. With negative k it is not Hermitian: no bound, inf.
    """
    if chain.k.is_complex():
        return float("inf")
    size = chain.z.abs()
    found = [chain.z.imag.abs().amin(), size.amax(), *_least_and_largest(chain.d)]
    if chain.k.numel():
        found += torch.aminmax(chain.k)
    eta, shift, low, high, *bonds = torch.stack(found).tolist()  # waits once
    least, largest = bonds or (0.0, 0.0)
    if least < 0:
        return float("inf")
    norm = max(high, -low) + shift + 2 * math.sqrt(largest)
    return torch.finfo(torch.float32).eps / 2 * norm / eta if eta else float("inf")


def _least_and_largest(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return both in one pass that writes nothing; of complex numbers, the size."""
    return torch.aminmax(values.abs() if values.is_complex() else values)


class _Resolvent(torch.autograd.Function):
    """The resolvent diagonal of flattened inputs, with its exact adjoint."""

    @staticmethod
    def forward(
        ctx: Any,
        d: Tensor,
        upper: Tensor,
        lower: Tensor,
        z: Tensor,
        precision: ResolventPrecision,
        causal: bool,
    ) -> Tensor:
        chain = solve.Chain(d=d, k=upper * lower, z=z, causal=causal)
        wide = arithmetic_of_forward(precision, chain).value
        out = solve.diagonal(chain, wide=wide)
        ctx.causal = causal
        ctx.wide = precision.backward == "fp64" or (
            precision.backward == "auto" and wide
        )
        ctx.save_for_backward(d, upper, lower, z, *_keep(chain, out, precision, wide))
        return _as(out, d.dtype.to_complex())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        d, upper, lower, z, *kept = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative will be asked for
            higher = _differentiable_gradient(d, upper, lower, z, grad, ctx.causal)
            return (*higher, None, None)
        need_k = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        chain = solve.Chain(d=d, k=upper * lower, z=z, causal=ctx.causal)
        if kept:
            found = _gradient_from_kept(chain, kept[0], grad, ctx.wide, need_k)
        else:
            found = solve.gradient(chain, grad, wide=ctx.wide, need_k=need_k)
        by_upper = by_lower = None
        if found.bond is not None:
            by_upper = _as_input(found.bond * lower, upper)
            by_lower = _as_input(found.bond * upper, lower)
        by_z = _as_input(found.point, z) if ctx.needs_input_grad[3] else None
        return _as_input(found.site, d), by_upper, by_lower, by_z, None, None


def _as_input(analytic: Tensor, given: Tensor) -> Tensor:
    """Turn an analytic derivative into PyTorch's gradient of this input."""
    if analytic.shape != given.shape:
        analytic = analytic.sum_to_size(given.shape)
    if given.is_complex():
        return analytic.conj().to(given.dtype)
    return _as(analytic.real if analytic.is_complex() else analytic, given.dtype)


def _keep(
    chain: solve.Chain, out: Tensor, precision: ResolventPrecision, wide: bool
) -> list[Tensor]:
    """Round G and 1/u into the storage format, or keep nothing."""
    if precision.storage == "recompute":
        return []
    left = chain._replace(causal=True)
    inverse = out if chain.causal else solve.diagonal(left, wide=wide)
    both = torch.view_as_real(torch.stack((out, inverse)).resolve_conj())
    kept = both.to(_STORED[precision.storage])
    if torch.isinf(kept).any() and not torch.isinf(both).any():
        warnings.warn(
            f"The resolvent reaches {both.abs().max():.3g}, too large to keep in"
            f" {precision.storage}; this call keeps fp32 instead. Larger Im z, or"
            " storage='recompute', avoids this.",
            RuntimeWarning,
            stacklevel=2,
        )
        kept = both.to(torch.float32)
    return [kept]


def _gradient_from_kept(
    chain: solve.Chain, kept: Tensor, grad: Tensor, wide: bool, need_k: bool
) -> solve.Gradient:
    """Run the adjoint on stored G and 1/u; 1/w follows from 1/G = u + w - a."""
    real = torch.float64 if wide else torch.float32
    out, iu = torch.view_as_complex(kept.to(real))
    iw = 1 / (1 / out - 1 / iu + chain.a(wide))
    return solve.adjoint(chain, out, iu, iw, grad, need_k=need_k)


def _differentiable_gradient(
    d: Tensor, upper: Tensor, lower: Tensor, z: Tensor, grad: Tensor, causal: bool
) -> tuple[Tensor, ...]:
    """Compute the gradient as plain torch operations, so that it has one itself."""

    def plain(*inputs: Tensor) -> Tensor:
        d, upper, lower, z = inputs
        a = d - (z[:, None] if z.dim() else z)
        k = upper * lower
        k = k if k.dim() > 1 else k.unsqueeze(0)
        out, bonds = diagonal_and_bonds(a, k.to(a.dtype))
        out = solve.left_inverse(out, bonds) if causal else out
        return out.to(d.dtype.to_complex())

    pull = torch.func.vjp(plain, d, upper, lower, z)[1]
    return cast("tuple[Tensor, ...]", pull(grad))


def _couplings(name: str, value: Tensor, batch: list[int], length: int) -> Tensor:
    """Flatten couplings to `[B, N-1]`, or `[N-1]` or `[1, N-1]` that rows share."""
    if value.shape[-1:] != (length,) and value.shape[-1:] != (1,):
        raise SettingsError(
            f"resolvent_diagonal needs {name} with {length} entries, one fewer than the"
            f" diagonal; got shape {tuple(value.shape)}."
        )
    if value.dim() == 1 and value.shape[0] == length:
        return value
    if all(size == 1 for size in value.shape[:-1]):
        return _expand(name, value.reshape(1, value.shape[-1]), [1, length])
    return _expand(name, value, [*batch, length]).reshape(prod(batch), length)


def _expand(name: str, value: Tensor, shape: list[int]) -> Tensor:
    """Expand to a shape, or say what does not fit."""
    try:
        return value.expand(shape)
    except RuntimeError as error:
        raise SettingsError(
            f"resolvent_diagonal needs {name} broadcastable to {shape}; got shape"
            f" {tuple(value.shape)}."
        ) from error
