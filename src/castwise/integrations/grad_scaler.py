"""A stand-in for `torch.amp.GradScaler`: one import changes, the loop stays as it is.

    from castwise.integrations.grad_scaler import GradScaler

    scaler = GradScaler("cuda")
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)          # only where something looks at the gradients
    scaler.step(optimizer)
    scaler.update()
    scaler.last_finding                 # the parameter that made the step be skipped

Arguments, defaults, the order of calls that is asked for, every number and the state
dict are those of torch. Beyond it: gradients in fp16 and complex ones are unscaled,
hysteresis, a floor at which `update` stops with an explanation where torch goes on
until its scale is 0, and the first parameter to blame.

The scale is a number that the host knows: `update` and `get_scale` read nothing back
from the device. What is read back, once in a step, is whether to skip it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import Any, final

import torch

from castwise.distributed.gradients import unscale
from castwise.errors import LossScaleError
from castwise.loss_scale import DynamicScale, NonFinite

_NUMBERS = (
    "scale",
    "growth_factor",
    "backoff_factor",
    "growth_interval",
    "_growth_tracker",
)


class ScalerOrderError(LossScaleError, RuntimeError):
    """Calls came in an order, or with something, that torch refuses as well."""


class _Stage(Enum):
    READY = "ready"
    UNSCALED = "unscaled"
    STEPPED = "stepped"


@final
class GradScaler:
    """Scales losses, and steps optimizers unless a gradient is not finite.

    Args:
        device: Accepted as torch does; the gradients say where they are.
        init_scale: The first scale (default: 2**16).
        growth_factor: Factor after `growth_interval` good updates (default: 2).
        backoff_factor: Factor after a bad one (default: 0.5).
        growth_interval: Good updates in a row before it grows (default: 2000).
        enabled: Whether it does anything (default: True).
        hysteresis: Bad updates before it backs off (default: 1, as torch).
        floor: It goes no lower; a bad update there raises (default: 1, or `init_scale`
            if that is lower).
    """

    def __init__(
        self,
        device: str = "cuda",
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        *,
        hysteresis: int = 1,
        floor: float | None = None,
    ) -> None:
        self._device = device
        self._enabled = enabled
        self._loss_scale = DynamicScale(
            initial=init_scale,
            growth=growth_factor,
            backoff=backoff_factor,
            interval=growth_interval,
            hysteresis=hysteresis,
            floor=min(1.0, init_scale) if floor is None else floor,
        )
        self._stages: dict[int, _Stage] = {}
        self._findings: dict[int, NonFinite | None] = {}
        self._last: NonFinite | None = None

    @property
    def last_finding(self) -> NonFinite | None:
        """The gradient that was not finite before the last `update`; None if all were.

        Parameters are named if the optimizer was given names.
        """
        return self._last

    def scale(self, outputs: Any) -> Any:
        """Multiply a tensor, or every tensor of an iterable, by the scale."""
        if not self._enabled:
            return outputs
        if isinstance(outputs, torch.Tensor):
            return self._loss_scale.scaled(outputs)
        if isinstance(outputs, (list, tuple)):
            return type(outputs)(self.scale(each) for each in outputs)
        if isinstance(outputs, Iterable):
            return map(self.scale, outputs)
        raise ScalerOrderError(
            "scale needs a tensor or an iterable of tensors; got "
            f"{type(outputs).__name__}"
        )

    def unscale_(self, optimizer: torch.optim.Optimizer) -> None:
        """Divide an optimizer's gradients by the scale, before anything looks at them.

        Raises:
            ScalerOrderError: They were divided already since the last `update`.
        """
        if not self._enabled:
            return
        stage = self._stages.get(id(optimizer), _Stage.READY)
        if stage is not _Stage.READY:
            done = "unscale_" if stage is _Stage.UNSCALED else "step"
            raise ScalerOrderError(
                f"unscale_ comes once and before step; {done} was already called on "
                "this optimizer since the last update()"
            )
        gradients = _named_gradients(optimizer)
        if gradients:
            self._findings[id(optimizer)] = unscale(self._loss_scale, gradients)
        self._stages[id(optimizer)] = _Stage.UNSCALED

    def step(self, optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:
        """Step an optimizer, unless one of its gradients is not finite.

        Returns:
            What the optimizer's step returns; None if it was skipped.

        Raises:
            ScalerOrderError: It stepped already, has no gradient, or got a closure.
        """
        if not self._enabled:
            return optimizer.step(*args, **kwargs)
        if "closure" in kwargs:
            raise ScalerOrderError(
                "a closure computes gradients that were never checked; step without "
                "one, or disable the scaler"
            )
        stage = self._stages.get(id(optimizer), _Stage.READY)
        if stage is _Stage.STEPPED:
            raise ScalerOrderError(
                "step() was already called on this optimizer since the last update()"
            )
        if stage is _Stage.READY:
            self.unscale_(optimizer)
        if id(optimizer) not in self._findings:
            raise ScalerOrderError(
                "the optimizer holds no gradient; call scale(loss).backward() first"
            )
        self._stages[id(optimizer)] = _Stage.STEPPED
        if self._findings[id(optimizer)] is not None:
            return None
        return optimizer.step(*args, **kwargs)

    def update(self, new_scale: float | torch.Tensor | None = None) -> None:
        """Let the scale learn from all optimizers that stepped; or set it.

        Raises:
            ScalerOrderError: Nothing was unscaled since the last `update`.
            LossScaleError: A gradient overflowed at the floor.
        """
        if not self._enabled:
            return
        if new_scale is not None:
            self._set(scale=float(new_scale))
        elif not self._findings:
            raise ScalerOrderError(
                "no gradient was checked since the last update(); call step or "
                "unscale_ first"
            )
        found = [each for each in self._findings.values() if each is not None]
        self._last = found[0] if found else None
        checked = bool(self._findings)
        self._stages.clear()
        self._findings.clear()
        if new_scale is None and checked:
            self._loss_scale.adjust(self._last)

    def get_scale(self) -> float:
        """Return the scale; 1 when disabled."""
        return self._loss_scale.scale if self._enabled else 1.0

    def get_growth_factor(self) -> float:
        """Return the factor of growth."""
        return float(self._loss_scale.state_dict()["growth_factor"])

    def set_growth_factor(self, new_factor: float) -> None:
        """Set the factor of growth."""
        self._set(growth_factor=new_factor)

    def get_backoff_factor(self) -> float:
        """Return the factor after an overflow."""
        return float(self._loss_scale.state_dict()["backoff_factor"])

    def set_backoff_factor(self, new_factor: float) -> None:
        """Set the factor after an overflow."""
        self._set(backoff_factor=new_factor)

    def get_growth_interval(self) -> int:
        """Return after how many good updates it grows."""
        return int(self._loss_scale.state_dict()["growth_interval"])

    def set_growth_interval(self, new_interval: int) -> None:
        """Set after how many good updates it grows."""
        self._set(growth_interval=new_interval)

    def is_enabled(self) -> bool:
        """Return whether it does anything."""
        return self._enabled

    def state_dict(self) -> dict[str, Any]:
        """Return what torch returns: five numbers, or nothing when disabled."""
        if not self._enabled:
            return {}
        state = self._loss_scale.state_dict()
        return {name: state[name] for name in _NUMBERS}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a state of ours or of torch.

        Raises:
            ScalerOrderError: It is empty, from a disabled scaler.
        """
        if not self._enabled:
            return
        if not state_dict:
            raise ScalerOrderError(
                "the state is empty, as a disabled scaler writes it; start without it"
            )
        self._set(**{name: state_dict[name] for name in _NUMBERS})

    def _set(self, **numbers: float) -> None:
        state = self._loss_scale.state_dict()
        if "scale" in numbers:
            state["floor"] = min(state["floor"], numbers["scale"])
        self._loss_scale.load_state_dict({**state, **numbers})


def _named_gradients(optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Gradients by the names that the optimizer was given, or else by their place."""
    found = {}
    for at, group in enumerate(optimizer.param_groups):
        names = group.get("param_names")
        for place, weight in enumerate(group["params"]):
            if weight.grad is not None:
                name = f"param_groups[{at}]['params'][{place}]"
                found[name if names is None else names[place]] = weight.grad
    return found
