"""Loss scales: what the loss is multiplied by so that small gradients survive fp16.

fp16 holds nothing below 6e-8, and many gradients are smaller. Multiplying the loss by a
scale lifts all of them at once (the chain rule is linear); dividing the gradients by it
before the update takes it back (Micikevicius et al., Mixed Precision Training, arXiv
1710.03740, section 3.2). A scale that is too high overflows instead: then the step is
skipped and the scale lowered. Every scale here is used in the same way,

    scale.scaled(loss).backward()
    finding = scale.unscale(gradients)      # in place; None, or the first bad gradient
    ...                                     # update the weights, or do not
    scale.adjust(finding)

and `NoScale` stands for "off", so nobody asks whether there is one.

`DynamicScale` computes the numbers of `torch.amp.GradScaler` with its defaults, in fp32
as there, and can be told three things more: how many overflows it takes to back off
(hysteresis), where to stop going down (floor) and up (ceiling). At the floor a lower
scale cannot help, so it stops with an explanation where GradScaler would skip steps for
ever, until its scale is 0 (pytorch#99640). The other two stop after a number of skipped
steps in a row.

Gradients in fp16 are unscaled in fp16, which GradScaler refuses: those below 6e-8 after
the division are lost. Complex and sparse gradients are accepted.
"""

from __future__ import annotations

import abc
import math
from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, final

import torch

from castwise.errors import LossScaleError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Mapping

FP32_MAX = torch.finfo(torch.float32).max
"""A scale is held in fp32, as in torch."""

PATIENCE = 25
"""How many steps in a row may be skipped where no lower scale can help."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NonFinite:
    """The first gradient that is not finite, in the order of the parameters."""

    parameter: str
    """Its parameter's name."""

    kind: Literal["inf", "NaN"]
    """NaN where there is at least one; overflow alone gives inf."""

    cause: str = ""
    """What made it, where somebody found out."""

    rank: int | None = None
    """The process whose rows hold it, where gradients are cut over processes."""

    def __str__(self) -> str:
        cause = f" ({self.cause})" if self.cause else ""
        rows = "" if self.rank is None else f" in the rows of rank {self.rank}"
        return f"the gradient of {self.parameter!r} holds {self.kind}{rows}{cause}"


class LossScale(abc.ABC):
    """What every loss scale can do."""

    @property
    @abc.abstractmethod
    def scale(self) -> float:
        """What the loss is multiplied by now."""

    @abc.abstractmethod
    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss to call `backward` on; the scale enters as a tensor."""

    @abc.abstractmethod
    def unscale(self, gradients: Mapping[str, torch.Tensor]) -> NonFinite | None:
        """Divide gradients by the scale, in place, and find one that is not finite."""

    @abc.abstractmethod
    def adjust(self, finding: NonFinite | None) -> None:
        """Learn from a step: `finding` is what `unscale` returned.

        Raises:
            LossScaleError: Steps were skipped and no other scale can help.
        """

    @abc.abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold, as plain numbers."""

    @abc.abstractmethod
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            LossScaleError: The state is that of another kind of scale, or incomplete.
        """


@final
class NoScale(LossScale):
    """No scale: for formats with the exponent range of fp32. Gradients are checked."""

    def __init__(self, *, patience: int = PATIENCE) -> None:
        self._skips = _SkipsInARow(patience)

    @property
    def scale(self) -> float:
        """Always 1."""
        return 1.0

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss itself."""
        return loss

    def unscale(self, gradients: Mapping[str, torch.Tensor]) -> NonFinite | None:
        """Only find; nothing is written."""
        return first_non_finite(gradients)

    def adjust(self, finding: NonFinite | None) -> None:
        """Count skipped steps; stop after too many in a row."""
        self._skips.count(finding, "there is no loss scale to lower")

    def state_dict(self) -> dict[str, Any]:
        """Return the number of steps skipped in a row."""
        return {"kind": "none", "skips_in_a_row": self._skips.number}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue counting."""
        values = _checked_state(state, "none", ("skips_in_a_row",))
        self._skips.number = int(values["skips_in_a_row"])


@final
class StaticScale(LossScale):
    """One scale for the whole run."""

    def __init__(self, scale: float, *, patience: int = PATIENCE) -> None:
        _require(0 < scale <= FP32_MAX, "a static loss scale", "above 0", scale)
        self._scale = _fp32(scale)
        self._tensors = _ScaleTensors()
        self._skips = _SkipsInARow(patience)

    @property
    def scale(self) -> float:
        """What the loss is multiplied by."""
        return self._scale

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the scale."""
        return loss * self._tensors.on(loss.device, self._scale)

    def unscale(self, gradients: Mapping[str, torch.Tensor]) -> NonFinite | None:
        """Divide and find in one pass."""
        return divide_and_find(gradients, self._scale)

    def adjust(self, finding: NonFinite | None) -> None:
        """Count skipped steps; stop after too many in a row."""
        self._skips.count(finding, f"the loss scale is fixed at {self._scale:g}")

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the number of steps skipped in a row."""
        return {
            "kind": "static",
            "scale": self._scale,
            "skips_in_a_row": self._skips.number,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue with the scale of the checkpoint."""
        values = _checked_state(state, "static", ("scale", "skips_in_a_row"))
        self._scale = float(values["scale"])
        self._skips.number = int(values["skips_in_a_row"])


@final
class DynamicScale(LossScale):
    """A scale that grows while steps succeed and backs off when one overflows.

    Args:
        initial: The first scale.
        growth: Factor after `interval` good steps in a row.
        backoff: Factor after an overflow.
        interval: Good steps before it grows.
        hysteresis: Overflows before it backs off; refilled when the scale grows.
        floor: It never goes lower; an overflow there raises.
        ceiling: It never goes higher.
    """

    def __init__(
        self,
        *,
        initial: float = 2.0**16,
        growth: float = 2.0,
        backoff: float = 0.5,
        interval: int = 2000,
        hysteresis: int = 1,
        floor: float = 1.0,
        ceiling: float = FP32_MAX,
    ) -> None:
        _require(growth > 1, "growth", "above 1", growth)
        _require(0 < backoff < 1, "backoff", "between 0 and 1", backoff)
        _require(interval >= 1, "interval", "1 or more", interval)
        _require(hysteresis >= 1, "hysteresis", "1 or more", hysteresis)
        _require(floor > 0, "floor", "above 0", floor)
        _require(
            floor <= initial <= ceiling <= FP32_MAX,
            "initial",
            f"between floor {floor:g} and ceiling {ceiling:g}, in fp32",
            initial,
        )
        self._scale = _fp32(initial)
        self._growth, self._backoff, self._interval = growth, backoff, interval
        self._hysteresis, self._floor, self._ceiling = hysteresis, floor, ceiling
        self._good_steps = 0
        self._overflows_left = hysteresis
        self._tensors = _ScaleTensors()

    @property
    def scale(self) -> float:
        """What the loss is multiplied by now."""
        return self._scale

    def scaled(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss times the scale."""
        return loss * self._tensors.on(loss.device, self._scale)

    def unscale(self, gradients: Mapping[str, torch.Tensor]) -> NonFinite | None:
        """Divide and find in one pass."""
        return divide_and_find(gradients, self._scale)

    def adjust(self, finding: NonFinite | None) -> None:
        """Grow or back off.

        Raises:
            LossScaleError: A gradient overflowed at the floor.
        """
        if finding is None:
            self._grow()
        else:
            self._back_off(finding)

    def _grow(self) -> None:
        self._good_steps += 1
        if self._good_steps == self._interval:
            higher = _fp32(self._scale * self._growth)
            self._scale = min(higher, _fp32(self._ceiling))
            self._good_steps = 0
            self._overflows_left = self._hysteresis

    def _back_off(self, finding: NonFinite) -> None:
        self._good_steps = 0
        self._overflows_left = max(self._overflows_left - 1, 0)
        if self._overflows_left:
            return
        if self._scale <= self._floor:
            raise LossScaleError(
                f"the loss scale is at its floor {self._floor:g} and {finding}, so a "
                f"lower scale cannot help: {_remedy(finding)}"
            )
        self._scale = max(_fp32(self._scale * self._backoff), _fp32(self._floor))

    def state_dict(self) -> dict[str, Any]:
        """Return what `torch.amp.GradScaler` returns, and what it has not."""
        return {
            "kind": "dynamic",
            "scale": self._scale,
            "growth_factor": self._growth,
            "backoff_factor": self._backoff,
            "growth_interval": self._interval,
            "_growth_tracker": self._good_steps,
            "hysteresis": self._hysteresis,
            "overflows_left": self._overflows_left,
            "floor": self._floor,
            "ceiling": self._ceiling,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from our state, or from one that `torch.amp.GradScaler` wrote."""
        needed = (
            "scale",
            "growth_factor",
            "backoff_factor",
            "growth_interval",
            "_growth_tracker",
        )
        values = _checked_state(state, "dynamic", needed)
        self._scale = float(values["scale"])
        self._growth = float(values["growth_factor"])
        self._backoff = float(values["backoff_factor"])
        self._interval = int(values["growth_interval"])
        self._good_steps = int(values["_growth_tracker"])
        self._hysteresis = int(values.get("hysteresis", self._hysteresis))
        self._overflows_left = int(values.get("overflows_left", self._hysteresis))
        self._floor = float(values.get("floor", self._floor))
        self._ceiling = float(values.get("ceiling", self._ceiling))


def loss_scale_of(text: str) -> LossScale:
    """Return the loss scale that a policy names: `none`, `dynamic`, `static:1024`."""
    kind, _, number = text.partition(":")
    if text == "none":
        return NoScale()
    if text == "dynamic":
        return DynamicScale()
    if kind == "static":
        try:
            return StaticScale(float(number))
        except ValueError:
            pass
    raise SettingsError(
        f"need a loss scale none, dynamic or static:<number>; got {text[:60]!r}"
    )


def divide_and_find(
    gradients: Mapping[str, torch.Tensor], scale: float
) -> NonFinite | None:
    """Divide gradients by the scale, in place, and find one that is not finite.

    One pass over memory, and one number read back from each device. All gradients are
    divided even where one is not finite, so that none is divided twice.
    """
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]
    groups = defaultdict(list)
    for gradient in gradients.values():
        values = _real_values(gradient)
        groups[values.device, values.dtype].append(values)
    found: dict[torch.device, torch.Tensor] = {}
    for (device, _), tensors in groups.items():
        flag = found.setdefault(device, torch.zeros((), device=device))
        inverse = torch.full((), 1.0 / scale, dtype=torch.float32, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, flag, inverse)
    if any(flag.item() for flag in found.values()):
        return _named(gradients)
    return None


def first_non_finite(gradients: Mapping[str, torch.Tensor]) -> NonFinite | None:
    """Find the first gradient that is not finite; one reading pass, nothing written."""
    groups: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]]
    groups = defaultdict(list)
    for gradient in gradients.values():
        values = _real_values(gradient)
        if values.numel():
            groups[values.device, values.dtype].append(values)
    per_device: dict[torch.device, list[torch.Tensor]] = defaultdict(list)
    for (device, dtype), tensors in groups.items():
        # The 2-norm, 20 times as fast on a CPU as the largest number. Its squares may
        # overflow although every number is finite: then each number is looked at.
        wide = dtype if dtype in {torch.float32, torch.float64} else torch.float32
        norms = torch._foreach_norm(tensors, 2, dtype=wide)  # noqa: SLF001 -- the only fused norm
        per_device[device].extend(each.float() for each in norms)
    if all(torch.stack(each).isfinite().all() for each in per_device.values()):
        return None
    return _named(gradients)


def _named(gradients: Mapping[str, torch.Tensor]) -> NonFinite | None:
    """Name the first gradient that is not finite; only asked when there is one."""
    for name, gradient in gradients.items():
        values = _real_values(gradient)
        if not values.isfinite().all():
            kind: Literal["inf", "NaN"] = "NaN" if values.isnan().any() else "inf"
            return NonFinite(parameter=name, kind=kind)
    return None


def _real_values(gradient: torch.Tensor) -> torch.Tensor:
    """A view of the numbers that a gradient is made of."""
    gradient = gradient.detach()
    if gradient.is_sparse:
        gradient = gradient._values()  # noqa: SLF001 -- in place, also when not coalesced
    if gradient.is_complex():
        gradient = gradient.conj() if gradient.is_conj() else gradient
        return torch.view_as_real(gradient)
    return gradient


class _ScaleTensors:
    """The scale as a 0-dim fp32 tensor, made once for each device and value."""

    def __init__(self) -> None:
        self._made: dict[torch.device, tuple[float, torch.Tensor]] = {}

    def on(self, device: torch.device, scale: float) -> torch.Tensor:
        value, tensor = self._made.get(device, (math.nan, None))
        if tensor is None or value != scale:
            tensor = torch.full((), scale, dtype=torch.float32, device=device)
            self._made[device] = scale, tensor
        return tensor


class _SkipsInARow:
    """Counts skipped steps where no lower scale can help, and stops the run."""

    def __init__(self, patience: int) -> None:
        _require(patience >= 1, "patience", "1 or more", patience)
        self.number = 0
        self._patience = patience

    def count(self, finding: NonFinite | None, why: str) -> None:
        self.number = 0 if finding is None else self.number + 1
        if finding is not None and self.number >= self._patience:
            raise LossScaleError(
                f"{self.number} steps in a row were skipped, {finding}, and {why}: "
                f"{_remedy(finding)}"
            )


def _remedy(finding: NonFinite) -> str:
    """What to do, by what is known."""
    if finding.cause:
        return "mend that operator, or compute its module in a wider format"
    return (
        "look for a division by zero, a logarithm of zero, a value too large for the "
        "format or too high a learning rate, or compute the module in fp32 or bf16"
    )


def _fp32(value: float) -> float:
    """Round to fp32, as torch holds a scale; beyond its range, its largest number."""
    return torch.tensor(min(value, FP32_MAX), dtype=torch.float32).item()


def _require(holds: bool, name: str, need: str, got: object) -> None:
    if not holds:
        raise SettingsError(f"{name} needs to be {need}; got {got}")


def _checked_state(
    state: Mapping[str, Any], kind: str, needed: tuple[str, ...]
) -> Mapping[str, Any]:
    """Refuse a state of another kind, or one with something missing."""
    written = state.get("kind", "dynamic")  # torch's own scaler names no kind
    if written != kind:
        raise LossScaleError(
            f"the state is of a loss scale of kind {written!r}, but this run has "
            f"{kind!r}; choose the same loss scale, or start without the state"
        )
    missing = [name for name in needed if name not in state]
    if missing:
        raise LossScaleError(
            f"the state of the loss scale lacks {', '.join(missing)}; it was not "
            "written by castwise or torch.amp.GradScaler"
        )
    return state
