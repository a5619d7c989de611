"""One sweep over memory: unscale, check, clip, update, round and write at once.

An ordinary step walks over the gradients to unscale them, to look for infinities, for
their norm, to clip them, and then several times over everything for the update. Memory
is what that costs. Here the gradients are read once for their norm, and then everything
is read and written once.

An infinity or NaN in any gradient stops the whole step before anything is written:
weights, moments and step counts stay what they were; `outcome` names the parameters.

Three ways to run a sweep give the same update, and `SweepSettings.backend` picks one:

    machine    CPU: machine code by numba, compiled on first use; bit for bit the twin
    compiled   CUDA: the twin, compiled by torch.compile into one kernel
    twin       anywhere: the readable update of `adamw`, `sgd`, `lion`, piece by piece

Weights are in fp32, or split (`hold_weights(optimizer, "split")`): then the sweep joins
and splits them on the way, and no fp32 weight ever reaches memory. Of a sharded weight
(FSDP2) every process sweeps its own part; norms and checks are those of the whole.
"""

from __future__ import annotations

import itertools
import math
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch.optim import Optimizer

from castwise.decision import Decision
from castwise.errors import SettingsError, WeightStorageError
from castwise.optim.known_finite import KnownFinite
from castwise.optim.shards import add_up, local, sharded_like, splits_blocks
from castwise.optim.state_formats import StateFormats
from castwise.optim.states import BLOCK, CODES, num_blocks
from castwise.optim.step_hooks import has_step_hooks
from castwise.optim.swept import CompiledSweeper, Sweeper, Swept, TorchSweeper

_BACKENDS = ("auto", "machine", "compiled", "twin")
_STATES = ("fp32", "8bit")


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepSettings:
    """What a sweep does besides the update."""

    states: Literal["fp32", "8bit"] = "fp32"
    """Format of the moments; `states.py` describes the 8-bit codes."""

    min_8bit_size: int = 4096
    """Parameters with fewer elements keep their states in fp32."""

    max_norm: float | None = None
    """Global norm that the gradients are clipped to; None does not clip."""

    check_finite: bool = True
    """Refuse a step whose gradients hold an infinity or NaN."""

    backend: Literal["auto", "machine", "compiled", "twin"] = "auto"
    """How the sweep runs; auto is machine on a CPU and compiled elsewhere."""

    def __post_init__(self) -> None:
        """Refuse what cannot be honoured."""
        if self.states not in _STATES:
            raise SettingsError(
                f"need states in {' or '.join(_STATES)}; got {self.states!r}"
            )
        if self.backend not in _BACKENDS:
            raise SettingsError(
                f"need a backend out of {', '.join(_BACKENDS)}; got {self.backend!r}"
            )
        if self.max_norm is not None:
            check_range("max_norm", self.max_norm, 0.0, math.inf)
        check_range("min_8bit_size", self.min_8bit_size, 0, math.inf)


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepOutcome:
    """What a step did."""

    stepped: bool
    """Whether anything was written."""

    norm: float | None = None
    """Global norm of the unscaled gradients before clipping; None: not asked for."""

    nonfinite: tuple[str, ...] = ()
    """Parameters whose gradients held an infinity or NaN."""

    def __str__(self) -> str:
        if self.stepped:
            return "stepped" if self.norm is None else f"stepped, norm {self.norm:.3g}"
        return (
            f"skipped: infinity or NaN in the gradient of {', '.join(self.nonfinite)}"
        )


class SweepOptimizer(Optimizer):
    """An optimizer that updates everything in one sweep; `AdamW`, `SGD` and `Lion`."""

    update: ClassVar[Callable[..., None]]

    # torch.amp.GradScaler leaves unscaling and skipping to an optimizer that says so.
    _step_supports_amp_scaling = True

    def __init__(
        self, params: Any, defaults: dict[str, Any], settings: SweepSettings
    ) -> None:
        self.settings = settings
        self.outcome = SweepOutcome(stepped=False)
        self.remainder_of: Callable[[torch.Tensor], torch.Tensor] | None = None
        self.known_finite: KnownFinite | None = None
        super().__init__(params, defaults)
        self._formats = StateFormats(self, check=self._check_states)

    @abstractmethod
    def codes(self, group: dict[str, Any]) -> dict[str, str]:
        """Return the states of a group by name, and the code of each in 8 bits."""

    @abstractmethod
    def numbers(self, group: dict[str, Any], step: int) -> tuple[float, ...]:
        """Return the seven numbers that the update needs at a step, from 1."""

    @property
    def parameter_wise(self) -> bool:
        """Whether no parameter's update depends on another's gradient."""
        return not self.settings.check_finite and self.settings.max_norm is None

    def backend_for(self, device: torch.device) -> Decision[str]:
        """Return how the sweep runs on a device, and why."""
        if self.settings.backend != "auto":
            return Decision(self.settings.backend, because="it was asked for")
        if device.type == "cpu":
            return Decision("machine", because="numba compiles for every CPU")
        if torch.utils._triton.has_triton():  # noqa: SLF001 -- no public question
            return Decision("compiled", because=f"triton compiles for {device.type}")
        return Decision("twin", because=f"nothing here compiles for {device.type}")

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and make its states, so that they exist from the start."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for parameter in group["params"]:
            _check_parameter(parameter, type(self).__name__)
            state = self.state[parameter]
            state["step"] = 0
            for name, code in self.codes(group).items():
                state.update(self._new_state(parameter, name, code))

    @torch.no_grad()
    def step(
        self, closure: Callable[[], Any] | None = None, *, scale: float | None = None
    ) -> Any:
        """Sweep over everything once, or over nothing: see `outcome`.

        Args:
            closure: Evaluates the loss and its gradients first (default: None).
            scale: Loss scale that the gradients are divided by (default: 1, or what
                `torch.amp.GradScaler` says).

        Returns:
            What the closure returns.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        told = getattr(self, "grad_scale", None)
        if scale is None:
            scale = 1.0 if told is None else float(told)
        sweepers = self._sweepers(self._swept())
        factor, self.outcome = self._judge(sweepers, 1.0 / scale)
        if self.outcome.stepped:
            self._advance(sweepers, factor)
        return loss

    def _new_state(
        self, parameter: torch.Tensor, name: str, code: str
    ) -> dict[str, torch.Tensor]:
        """Return a state of zeros in the format that its parameter's size calls for."""
        if not self._is_coded(parameter):
            return {name: torch.zeros_like(parameter, dtype=torch.float32)}
        part = local(parameter)
        scales = torch.zeros(num_blocks(part.numel()), device=part.device)
        codes = torch.zeros_like(parameter, dtype=CODES[code].dtype)
        whole = (num_blocks(parameter.numel()),)
        return {name: codes, f"{name}_{code}": sharded_like(parameter, scales, whole)}

    def _is_coded(self, parameter: torch.Tensor) -> bool:
        """Return whether the states of a parameter are in 8 bits.

        Those of a shard are only where its border is one of blocks: then any number of
        processes can load them.
        """
        large = parameter.numel() >= self.settings.min_8bit_size
        eight = self.settings.states == "8bit"
        return eight and large and not splits_blocks(parameter, BLOCK)

    def _swept(self) -> list[Swept]:
        """Return what is to be swept: every parameter that has a gradient."""
        swept = []
        place = 0
        for group in self.param_groups:
            names = group.get("param_names") or [None] * len(group["params"])
            for parameter, given in zip(group["params"], names, strict=True):
                place += 1
                if parameter.grad is not None:
                    name = given or f"parameter {place - 1}"
                    swept.append(self._swept_one(parameter, group, name))
        return swept

    def _swept_one(
        self, parameter: torch.Tensor, group: dict[str, Any], name: str
    ) -> Swept:
        state = self.state[parameter]
        codes = self.codes(group)
        scales = [
            None if state[key].dtype == torch.float32 else local(state[f"{key}_{code}"])
            for key, code in codes.items()
        ]
        remainder = None
        if parameter.dtype != torch.float32:
            remainder = self._remainder(parameter, name)
        return Swept(
            name=name,
            parameter=parameter,
            weight=local(parameter).detach(),
            remainder=remainder,
            gradient=_like(parameter, name),
            states=[local(state[key]) for key in codes],
            scales=scales,
            codes=list(codes.values()),
            group=group,
            state=state,
        )

    def _remainder(self, parameter: torch.Tensor, name: str) -> torch.Tensor:
        """Return the lower 16 bits of a split weight."""
        if parameter.dtype != torch.bfloat16 or self.remainder_of is None:
            raise WeightStorageError(
                f"{type(self).__name__} needs weights in fp32 or split; got "
                f"{parameter.dtype} in {name}; make the model in fp32 and call "
                'hold_weights(optimizer, "split")'
            )
        return self.remainder_of(parameter)

    def _judge(
        self, sweepers: list[Sweeper], inverse_scale: float
    ) -> tuple[float, SweepOutcome]:
        """Return the factor of the gradients, and whether there is to be a step."""
        found = getattr(self, "found_inf", None)
        if found is not None and bool(found):
            return 0.0, SweepOutcome(stepped=False, nonfinite=("some parameter",))
        if self.parameter_wise:
            return inverse_scale, SweepOutcome(stepped=True)
        swept = [each for sweeper in sweepers for each in sweeper.swept]
        whole = [each.parameter for each in swept]
        limit = self.settings.max_norm
        if limit is None and inverse_scale <= 1:  # unscaling overflows nothing
            if self.known_finite is not None and self.known_finite.holds_for(whole):
                return inverse_scale, SweepOutcome(stepped=True)
            found = [float(bad) for each in sweepers for bad in each.nonfinite()]
            bad = _names(swept, [count > 0 for count in add_up(whole, found)])
            return inverse_scale, SweepOutcome(stepped=not bad, nonfinite=bad)
        sums = [x for each in sweepers for x in each.square_sums(inverse_scale)]
        squares = add_up(whole, sums)
        bad = _names(swept, [not math.isfinite(square) for square in squares])
        if bad:
            return 0.0, SweepOutcome(stepped=False, norm=math.nan, nonfinite=bad)
        norm = math.sqrt(math.fsum(squares))
        clip = 1.0 if limit is None or norm <= limit else limit / norm
        return inverse_scale * clip, SweepOutcome(stepped=True, norm=norm)

    def _advance(self, sweepers: list[Sweeper], factor: float) -> None:
        """Count the step and sweep."""
        rows: dict[tuple[int, int], tuple[float, ...]] = {}
        for each in [each for sweeper in sweepers for each in sweeper.swept]:
            each.state["step"] += 1
            key = id(each.group), each.state["step"]
            if key not in rows:
                sign = -1.0 if each.group.get("maximize") else 1.0
                rows[key] = (
                    sign * factor,
                    *self.numbers(each.group, each.state["step"]),
                )
            each.numbers = rows[key]
        for sweeper in sweepers:
            sweeper.run(type(self).update)

    def _sweepers(self, swept: list[Swept]) -> list[Sweeper]:
        """Return who sweeps: parameters are sorted by what runs on their devices."""
        sorted_by: dict[str, list[Swept]] = {}
        chosen: dict[torch.device, str] = {}
        for each in swept:
            device = each.weight.device
            if device not in chosen:
                chosen[device] = self.backend_for(device).value
            sorted_by.setdefault(chosen[device], []).append(each)
        return [_sweeper(backend)(some) for backend, some in sorted_by.items()]

    def _check_states(self) -> None:
        """Refuse loaded states of another kind; take a step that torch counted."""
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                need = {"step"}
                for name, code in self.codes(group).items():
                    coded = self._is_coded(parameter)
                    need |= {name, f"{name}_{code}"} if coded else {name}
                if state.keys() != need:
                    raise WeightStorageError(
                        f"{type(self).__name__} with {self.settings.states} states "
                        f"needs the states {', '.join(sorted(need))}; got "
                        f"{', '.join(sorted(state))}; load states of the same kind"
                    )
                state["step"] = int(state["step"])


@contextmanager
def gradients_found_finite(optimizer: Optimizer) -> Iterator[None]:
    """Let an optimizer of ours step inside without reading its gradients once more.

    For who has just found all of them finite; `known_finite` says what is not believed.
    With any other optimizer, or one that somebody listens to, nothing happens.
    """
    if not isinstance(optimizer, SweepOptimizer) or has_step_hooks(optimizer):
        yield
        return
    groups = optimizer.param_groups
    parameters = itertools.chain.from_iterable(group["params"] for group in groups)
    optimizer.known_finite = KnownFinite(parameters)
    try:
        yield
    finally:
        optimizer.known_finite = None


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Refuse a setting outside of [low, high]."""
    if not low <= value <= high:
        raise SettingsError(f"need {name} from {low} to {high}; got {value}")


def _sweeper(backend: str) -> type[Sweeper]:
    """Return what sweeps under a name of `SweepSettings.backend`."""
    if backend == "machine":
        from castwise.optim.machine_table import MachineSweeper  # noqa: PLC0415 -- numba is imported by those who need it

        return MachineSweeper
    return CompiledSweeper if backend == "compiled" else TorchSweeper


def _names(swept: list[Swept], chosen: list[bool]) -> tuple[str, ...]:
    return tuple(s.name for s, choice in zip(swept, chosen, strict=True) if choice)


def _check_parameter(parameter: torch.Tensor, name: str) -> None:
    """Refuse what a sweep cannot run over."""
    real = parameter.is_floating_point() and parameter.element_size() <= 4
    if not real or parameter.layout != torch.strided:
        raise WeightStorageError(
            f"{name} needs dense parameters in fp32 or 16 bits; got "
            f"{parameter.dtype}, {parameter.layout}, {type(parameter).__name__}; take "
            "torch's optimizer for them"
        )


def _like(parameter: torch.Tensor, name: str) -> torch.Tensor:
    """Return the gradient, laid out in memory as its parameter."""
    assert parameter.grad is not None
    gradient, parameter = local(parameter.grad), local(parameter).detach()
    if gradient.layout != torch.strided:
        raise WeightStorageError(
            f"the sweep needs dense gradients; got {gradient.layout} in {name}; take "
            "torch.optim.SparseAdam for it"
        )
    if gradient.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        gradient = gradient.float()
    if gradient.stride() == parameter.stride():
        return gradient.detach()
    return torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
