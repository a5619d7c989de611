"""Checks on what really runs: one forward under a dispatch mode.

The mode stands below autocast, where every tensor has the format that it is computed
in, and sees arguments before the operator does, because PyTorch may refuse them.
"""

from __future__ import annotations

import contextlib
import math
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.formats import FORMATS
from castwise.numerics.call_site import CallSites
from castwise.numerics.lint.findings import Finding
from castwise.numerics.lint.subject import Subject, low_format
from castwise.numerics.lint.tables import (
    ANGLE_LIMIT,
    FP16_MAX,
    constant_finding,
    holds_frequencies,
    lost_integers,
    position_finding,
)
from castwise.numerics.lint.updates import eps_finding, vanishes
from castwise.policy.ops import DEFAULT_TABLE, operator_name

if TYPE_CHECKING:
    from types import CodeType, FrameType

    from torch._ops import OpOverload

_COPIES = frozenset({"_to_copy", "copy_"})
_POINTWISE = frozenset({"add", "add_", "div", "mul", "mul_", "sub", "sub_"})
_FLOORS = frozenset({"add", "add_", "clamp", "clamp_min", "maximum"})
_HARMLESS = frozenset({"clamp", "clamp_max", "clamp_min", "nan_to_num", "hardtanh"})
_PRODUCTS = {"mm": (0, 1), "bmm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}
_RUNNING = frozenset({"cumsum", "logcumsumexp"})
_ARITHMETIC = frozenset(
    {
        "_log_softmax",
        "_softmax",
        "abs",
        "add",
        "binary_cross_entropy",
        "div",
        "exp",
        "huber_loss",
        "log",
        "log_softmax",
        "mean",
        "mse_loss",
        "mul",
        "nll_loss",
        "nll_loss2d",
        "pow",
        "rsub",
        "smooth_l1_loss",
        "softmax",
        "sqrt",
        "sub",
        "sum",
    }
)
_SAFETY = 4.0
"""A sum in fp16 whose absolute terms come this close to the largest number is told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Smoothed:
    """A cross entropy with label smoothing, as the loss called it."""

    num_classes: int
    """Classes."""

    smoothing: float
    """The share that is spread over all classes."""

    @property
    def least_loss(self) -> float:
        """The entropy of the smoothed target: no prediction can do better."""
        rest = self.smoothing / self.num_classes
        top = 1 - self.smoothing + rest
        spread = (self.num_classes - 1) * rest * math.log(rest) if rest else 0.0
        return -(top * math.log(top) if top else 0.0) - spread


class LossCalls(TorchFunctionMode):
    """Sees by what name and with which settings a loss is called."""

    def __init__(self) -> None:
        super().__init__()
        self.smoothed: list[Smoothed] = []

    def __torch_function__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "cross_entropy":
            smoothing = float(kwargs.get("label_smoothing", 0.0))
            if smoothing:
                logits = args[0]
                at = 0 if logits.dim() == 1 else 1
                self.smoothed.append(
                    Smoothed(num_classes=logits.shape[at], smoothing=smoothing)
                )
        return func(*args, **kwargs)


class Observation(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Looks at every operator of a forward and of the loss."""

    def __init__(self, subject: Subject) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.findings: list[Finding] = []
        self.multiplying: set[CodeType] = set()
        """Code of the functions within which a product ran low."""
        self._sites = CallSites(subject.model)
        self._in_loss = False
        self._low = subject.around if subject.around in {"bf16", "fp16"} else None
        self._frequencies = {
            now.data_ptr(): (place, subject.capacity(module))
            for place, module, before, now in subject.tables()
            if holds_frequencies(place, type(module).__name__, before)
        }

    @contextlib.contextmanager
    def of_loss(self) -> Iterator[None]:
        """Look at what runs in here as at the loss."""
        self._in_loss = True
        try:
            yield
        finally:
            self._in_loss = False

    def __torch_dispatch__(
        self,
        func: OpOverload,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = operator_name(func._schema.name)  # noqa: SLF001 -- no public name
        self._before(name, func, args)
        result = func(*args, **kwargs)
        made = result[0] if isinstance(result, tuple) and result else result
        if isinstance(made, torch.Tensor) and made.is_floating_point():
            self._after(name, args, made)
        return result

    def _before(self, name: str, func: OpOverload, args: tuple[Any, ...]) -> None:
        """Look at constants that meet a tensor in fp16."""
        if name in _HARMLESS and name not in _FLOORS:
            return
        low = next((low_format(a) for a in args if isinstance(a, torch.Tensor)), None)
        if low is None:
            return
        schema = func._schema.arguments  # noqa: SLF001 -- no public name
        for value, argument in zip(args, schema, strict=False):
            number = _constant(value)
            if number is None or str(argument.type) not in {"Tensor", "number"}:
                continue
            if low.max < abs(number) < math.inf and name not in _HARMLESS:
                place, where = self._place(name)
                self.findings.append(constant_finding(place, where, number))
            elif vanishes(number, low) and name in _FLOORS:
                place, where = self._place(name)
                why = "nothing keeps the divisor from zero"
                self.findings.append(eps_finding(place, where, number, low, why))

    def _after(self, name: str, args: tuple[Any, ...], made: torch.Tensor) -> None:
        given = [each for each in args if isinstance(each, torch.Tensor)]
        if low_format(made) is not None and DEFAULT_TABLE.category(name) == "low":
            self.multiplying.update(_callers())
        if name in _COPIES or name in _POINTWISE or name == "arange":
            self._see_positions(name, given, made)
        if name in _COPIES and given:
            self._see_cast(given[-1], made)
        if name in {"sin", "cos"}:
            self._see_angle(name, given[0])
        if name == "binary_cross_entropy":
            self._see_probabilities(given[0])
        if name in _PRODUCTS and made.dtype is torch.float16:
            left, right = (args[at] for at in _PRODUCTS[name])
            self._see_product(name, left, right)
        if name in _RUNNING or name == "sum":
            self._see_sum(name, args, made)
        if self._in_loss and name in _ARITHMETIC:
            self._see_loss(name, given)

    def _see_positions(
        self, name: str, given: list[torch.Tensor], made: torch.Tensor
    ) -> None:
        fmt = low_format(made)
        if fmt is None:
            return
        for source in (made,) if name == "arange" else given:
            is_integer = not source.is_floating_point() and not source.is_complex()
            if source.dtype is torch.bool or source.dim() == 0:
                continue
            if not is_integer and name not in {"arange", *_COPIES}:
                continue
            largest = lost_integers(source, fmt)
            if largest is None:
                continue
            changed = source.double() != source.to(made.dtype).double()
            if name == "arange" or bool(changed.any()):
                place, where = self._place(name)
                self.findings.append(position_finding(place, where, largest, fmt))

    def _see_cast(self, source: torch.Tensor, made: torch.Tensor) -> None:
        fmt = low_format(made)
        if fmt is None or low_format(source) is not None:
            return
        known = self._frequencies.get(source.data_ptr())
        if known is not None:
            name, capacity = known
            error = float((source.double() - made.double()).abs().max()) * capacity
            if error >= ANGLE_LIMIT:
                _, where = self._place("cast")
                self.findings.append(
                    Finding(
                        check="rounded-angle",
                        place=name,
                        where=f"buffer {name}, {where}",
                        why=f"frequencies are cast to {fmt} before positions multiply "
                        "them",
                        figure=f"up to {error:.3g} rad at position {capacity}",
                        remedy="make the module an island in fp32",
                    )
                )
        self._see_masking(source, made)

    def _see_masking(self, source: torch.Tensor, made: torch.Tensor) -> None:
        if made.dtype is not torch.float16 or not source.is_floating_point():
            return
        beyond = source[(source.abs() > FP16_MAX) & source.isfinite()]
        if beyond.numel() and bool((beyond == beyond[0]).all()):
            place, where = self._place("cast")
            self.findings.append(constant_finding(place, where, float(beyond[0])))

    def _see_angle(self, name: str, angle: torch.Tensor) -> None:
        fmt = low_format(angle)
        if fmt is None or not angle.numel():
            return
        largest = float(angle.abs().amax())
        error = largest * fmt.eps / 2
        if math.isfinite(largest) and error >= ANGLE_LIMIT:
            place, where = self._place(name)
            self.findings.append(
                Finding(
                    check="rounded-angle",
                    place=place,
                    where=where,
                    why=f"{name} of an angle in {fmt}, which was rounded before",
                    figure=f"angles up to {largest:.4g} are off by up to {error:.2g} "
                    "rad",
                    remedy="compute the angle in fp32: make the module an island",
                )
            )

    def _see_probabilities(self, probabilities: torch.Tensor) -> None:
        low = self._low
        if low is None or low_format(probabilities) is not None:
            low = str(low_format(probabilities) or low)
        if low is None or probabilities.numel() < 8:
            return
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[low]
        if bool(
            (probabilities.to(dtype).to(probabilities.dtype) == probabilities).all()
        ):
            place, where = self._place("binary_cross_entropy")
            self.findings.append(bce_finding(place, where, low))

    def _see_product(self, name: str, left: torch.Tensor, right: torch.Tensor) -> None:
        largest = float((left.float().abs() @ right.float().abs()).amax())
        self._tell_sum(name, left.shape[-1], largest)

    def _see_sum(self, name: str, args: tuple[Any, ...], made: torch.Tensor) -> None:
        terms = args[0]
        fmt = low_format(terms) or low_format(made)
        if fmt is None:
            return
        length = terms.numel() // max(1, made.numel())
        if name in _RUNNING:
            length = terms.shape[args[1]] if terms.dim() else 1
            last = 2 ** (fmt.mantissa_bits + 1)
            if name == "cumsum" and length > last and bool((terms >= 0).all()):
                place, where = self._place(name)
                self.findings.append(
                    Finding(
                        check="long-reduction",
                        place=place,
                        where=where,
                        why=f"a running sum in {fmt} stalls after some {last} terms "
                        "of one size",
                        figure=f"{length} terms",
                        remedy="compute it in fp32: dtype=torch.float32, or an island",
                    )
                )
        if fmt.name == "fp16":
            dims = args[1] if len(args) > 1 and args[1] not in (None, []) else None
            total = terms.float().abs().sum(dims)
            self._tell_sum(name, length, float(total.amax()))

    def _tell_sum(self, name: str, length: int, largest: float) -> None:
        if math.isfinite(largest) and largest * _SAFETY > FP16_MAX:
            place, where = self._place(name)
            self.findings.append(
                Finding(
                    check="long-reduction",
                    place=place,
                    where=where,
                    why="a sum in fp16 comes close to the largest number",
                    figure=f"{length} terms, absolute values sum to {largest:.3g} of "
                    f"{FP16_MAX:.0f}",
                    remedy="compute it in bf16 or fp32, or divide before the sum",
                )
            )

    def _see_loss(self, name: str, given: list[torch.Tensor]) -> None:
        sized = [each for each in given if each.numel() > 1]
        formats = [low_format(each) for each in sized if each.is_floating_point()]
        if formats and all(fmt is not None for fmt in formats):
            _, where = self._place(name)
            self.findings.append(low_loss_finding(where, str(formats[0])))

    def _place(self, name: str) -> tuple[str, str]:
        site = self._sites.here()
        place = site.module if site.module is not None else "loss"
        return place, f"{place or 'the model'}: {site.call or name} at {site.where}"


def bce_finding(place: str, where: str, low: str) -> Finding:
    """Say that a probability was rounded before its logarithm is taken."""
    digits = FORMATS[low].mantissa_bits + 2
    return Finding(
        check="bce-on-probabilities",
        place=place,
        where=where,
        why=f"probabilities in {low} are 1 too early, and their loss has no gradient",
        figure=f"every logit above {digits * math.log(2):.1f} gives exactly 1",
        remedy="leave the sigmoid out and use binary_cross_entropy_with_logits",
    )


def low_loss_finding(where: str, low: str) -> Finding:
    """Say that the loss has the digits of a 16-bit format."""
    digits = FORMATS[low].mantissa_bits
    return Finding(
        check="low-loss",
        place="loss",
        where=where,
        why=f"the loss is computed in {low}, with {digits + 1} binary digits",
        figure=f"changes of the loss below {100 * FORMATS[low].eps:.2g} % are not seen",
        remedy="give the loss fp32: output.float(), or o=fp32 for the last module",
    )


def _callers() -> Iterator[CodeType]:
    """Code of every function that is being called."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 -- the public way is slower by a hundred times
    while frame is not None:
        yield frame.f_code
        frame = frame.f_back


def _constant(value: Any) -> float | None:
    if isinstance(value, bool):
        return None
    if isinstance(value, (int, float)):
        return float(value)
    is_scalar = isinstance(value, torch.Tensor) and value.dim() == 0
    if is_scalar and value.is_floating_point() and value.device.type == "cpu":
        return float(value)
    return None
