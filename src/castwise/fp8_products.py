"""Matrix products in fp8, emulated: operands rounded to fp8, multiplied in bf16.

    operand     x -> fp8(x * s) / s      s a power of two per tensor: the largest that
                                         keeps the largest number of x within the format
    product     of operands held in bf16, which holds every such number exactly, summed
                in fp32: what a matrix unit for fp8 computes
    gradient    that of the result is rounded to fp8_e5m2 in the same way, and meets the
                rounded operands; through the rounding of an operand it passes unchanged

Scales come from the tensors themselves, at every product, so nothing is kept from step
to step. Infinities and NaNs stay what they are.
"""

from __future__ import annotations

import contextlib
import threading
from typing import TYPE_CHECKING, Any

import torch

from castwise.dtypes import dtype_of
from castwise.formats import FORMATS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch._ops import OpOverload

FP8 = ("fp8_e4m3", "fp8_e5m2")
"""Formats that are emulated."""

CARRIER = "bf16"
"""What holds numbers of these formats while they are computed with."""

GRADIENT = "fp8_e5m2"
"""What gradients of products are rounded to: range before digits."""

served: set[str] = set()
"""Kinds of devices whose kernels look here; `castwise.autocast` adds them."""

# Arguments of products that are added to the result, and not multiplied.
_ADDED = {"addmm": 0, "baddbmm": 0, "addbmm": 0, "addmv": 0, "_addmm_activation": 0}
_MAX_EXPONENT = 126


class _Now(threading.local):
    fmt: str | None = None


_now = _Now()


def format_now() -> str | None:
    """The format that operands are rounded to in this thread, if there is one."""
    return _now.fmt


@contextlib.contextmanager
def products_in(fmt: str | None) -> Iterator[None]:
    """Round operands of products to a format, or leave them alone again."""
    before, _now.fmt = _now.fmt, fmt
    try:
        yield
    finally:
        _now.fmt = before


def rounded(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """Round to a format with a scale for the whole tensor; held in bf16, no gradient.

    Args:
        x: Any floating tensor.
        fmt: `fp8_e4m3` or `fp8_e5m2`.
    """
    wide = x.detach().float()
    if not wide.numel():
        return wide.to(dtype_of(CARRIER))
    finite = wide.isfinite()
    largest = torch.where(finite, wide, 0.0).abs().amax()
    room = FORMATS[fmt].max / largest.clamp(min=2.0**-_MAX_EXPONENT)
    exponent = torch.frexp(room).exponent - 1
    exponent = exponent.clamp(-_MAX_EXPONENT, _MAX_EXPONENT)
    small = torch.ldexp(wide, exponent).to(dtype_of(fmt)).float()
    back = torch.ldexp(small, -exponent)
    return torch.where(finite, back, wide).to(dtype_of(CARRIER))


def is_rounded(x: torch.Tensor, fmt: str) -> bool:
    """Whether a tensor holds nothing but numbers that `rounded` gives."""
    same = rounded(x, fmt).to(x.dtype)
    return bool(((same == x) | (same.isnan() & x.isnan())).all())


def multiplied(op: OpOverload) -> dict[str, int]:
    """The operands of a product: names of its arguments, and their positions."""
    schema = op._schema  # noqa: SLF001 -- the schema has no public name
    added = _ADDED.get(schema.name.removeprefix("aten::"))
    return {
        argument.name: at
        for at, argument in enumerate(schema.arguments)
        if at != added
        and str(argument.type) in {"Tensor", "List[Tensor]"}
        and argument.name not in {"bias", "out"}
    }


def round_operands(
    args: tuple[Any, ...], kwargs: dict[str, Any], operands: dict[str, int], fmt: str
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return a product's arguments with its operands rounded."""
    at = set(operands.values())
    return (
        tuple(
            _operand(value, fmt) if index in at else value
            for index, value in enumerate(args)
        ),
        {
            name: _operand(value, fmt) if name in operands else value
            for name, value in kwargs.items()
        },
    )


def round_gradient(result: torch.Tensor) -> torch.Tensor:
    """Hand a product's result on; its gradient is rounded when it comes back."""
    out: torch.Tensor = _RoundedGradient.apply(result)  # type: ignore[no-untyped-call]
    return out


def round_straight_through(x: torch.Tensor, fmt: str) -> torch.Tensor:
    """Round a tensor; its gradient passes unchanged, in the format of `x`."""
    if not x.is_floating_point() or x.dtype is torch.float64:
        return x
    out: torch.Tensor = _Rounded.apply(x, fmt)  # type: ignore[no-untyped-call]
    return out


def _operand(value: Any, fmt: str) -> Any:
    if isinstance(value, torch.Tensor):
        return round_straight_through(value, fmt)
    return [_operand(each, fmt) for each in value]


class _Rounded(torch.autograd.Function):
    """Rounds on the way forward alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor, fmt: str) -> torch.Tensor:
        """Round."""
        return rounded(x, fmt)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, _output: Any) -> None:
        """Remember the format of what was rounded."""
        ctx.dtype = inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        """Hand the gradient on."""
        return gradients[0].to(ctx.dtype), None


class _RoundedGradient(torch.autograd.Function):
    """Rounds on the way back alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: torch.Tensor) -> torch.Tensor:
        """Hand it on."""
        return x.view_as(x)

    @staticmethod
    def setup_context(*_: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def backward(_ctx: Any, *gradients: Any) -> Any:
        """Round the gradient of a product."""
        (gradient,) = gradients
        return rounded(gradient, GRADIENT).to(gradient.dtype)
