"""A model that runs by a plan: `castwise.compile`.

    compiled = castwise.compile(model, castwise.preset("bf16-mixed"))
    loss = loss_fn(compiled(x), y)
    loss.backward()
    print(compiled.plan().summary())

Weights stay in fp32 and the model stays as it is: its parameters, its `state_dict`, its
hooks. Graphs are captured at the first call. An autocast region around the call changes
nothing: the plan holds.
"""

from __future__ import annotations

import contextlib
import warnings
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch._dynamo.config
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed

from castwise.autocast import DEVICE_TYPES
from castwise.dtypes import supports
from castwise.errors import (
    CastwiseError,
    PolicyError,
    SettingsError,
    UnsupportedFormatError,
)
from castwise.graph.capture import PlanningBackend
from castwise.graph.coverage import (
    CoverageWatch,
    Fallback,
    fall_back,
    install,
    num_graphs_run,
)
from castwise.graph.inner import Inner
from castwise.graph.kept_weights import KeptWeights
from castwise.graph.plan import Plan, Uncovered
from castwise.graph.settings import Surroundings
from castwise.memory.row_formats import ROW_FORMATS
from castwise.memory.saves import SavesBill, store_saves, total
from castwise.numerics.contract import Contract, prove
from castwise.policy.keys import PHASES
from castwise.policy.presets import preset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from castwise.islands import AppliedPolicy
    from castwise.policy.ops import OperatorTable
    from castwise.policy.rules import Policy


class CompiledModel(nn.Module):
    """A model whose graphs run by a plan; made by `compile`."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        *,
        inner: Inner,
        phase: str,
        dynamic: bool | None,
        keep_weights: bool,
        saves: str | None,
    ) -> None:
        super().__init__()
        self._orig_mod = model
        self._policy = policy
        self._inner = inner
        self._dynamic = dynamic
        self._kept = KeptWeights() if keep_weights else None
        self._saves = _checked_saves(saves)
        self._stored = (
            store_saves(self, saves) if saves is not None and inner == "eager" else None
        )
        self._variants: dict[str, _Variant] = {}
        self._device_type = _device_type(model)
        recurs = any(isinstance(each, nn.RNNBase) for each in model.modules())
        self._captures_all = (
            _captures_recurrent_layers if recurs else contextlib.nullcontext
        )
        self.phase = phase
        self._variant()  # refuses now what it would refuse at the first call

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the model by the plan of the phase."""
        variant, before = self._variant(), num_graphs_run()
        with _no_autocast(self._device_type), self._captures_all():
            try:
                if variant.is_watched:
                    result = variant.run(*args, **kwargs)
                else:
                    result = self._run_watched(variant, args, kwargs)
            except BackendCompilerFailed as error:
                if isinstance(error.inner_exception, CastwiseError):
                    raise error.inner_exception from None
                raise
        if num_graphs_run() == before:
            variant.tell_that_nothing_ran()
        return result

    def enter_phase(self, phase: str) -> None:
        """Run by the plan of another phase; each is compiled once.

        Raises:
            SettingsError: There is no such phase.
        """
        if phase not in PHASES:
            raise SettingsError(f"a phase is one of {', '.join(PHASES)}, got {phase!r}")
        self.phase = phase

    def plan(self, phase: str | None = None) -> Plan:
        """The plan of a phase, as far as graphs were captured; they are at a call."""
        variant = self._variant(phase)
        return Plan(
            policy=self._policy.name,
            phase=phase or self.phase,
            graphs=tuple(variant.backend.graphs),
            uncovered=variant.uncovered,
        )

    def saves(self, phase: str | None = None) -> SavesBill:
        """What the graphs of a phase keep for their backward, as far as it is stored.

        With `inner="eager"` it is the latest call's, whatever its phase.
        """
        if self._stored is not None:
            return self._stored.bill
        return total(self._variant(phase).backend.bills)

    def prove(
        self, run: Callable[[], object], *, brought: Iterable[str] = ()
    ) -> Contract:
        """Prove that what a callable runs keeps what the policy promises.

        Args:
            run: Runs forward and backward through this model, once or several times.
            brought: Formats of floating inputs that come from outside.

        Returns:
            The contract; kernels that Inductor generated are no operators to see, and
            it says so.
        """
        bound = self._variant().surroundings.bound
        promised = SimpleNamespace(bound=bound, phase=self.phase)
        # a plan puts no island on the model: what was promised is all there is
        return prove(run, self, cast("AppliedPolicy", promised), brought=brought)

    @property
    def operator_table(self) -> OperatorTable:
        """The operator table of the phase."""
        return self._variant().surroundings.table

    @property
    def low_formats(self) -> tuple[str, ...]:
        """The low formats that modules compute in."""
        return tuple(self._variant().surroundings.lows)

    def refresh_weights(self) -> None:
        """Cast kept weights again, after a write that nothing could notice."""
        if self._kept is not None:
            self._kept.refresh()

    @property
    def num_captured(self) -> int:
        """Graphs captured so far, in all phases; one more is a recompilation."""
        return sum(each.backend.num_graphs for each in self._variants.values())

    def _variant(self, phase: str | None = None) -> _Variant:
        phase = phase or self.phase
        if phase not in self._variants:
            surroundings = Surroundings.of(self._orig_mod, self._policy, phase)
            _check_device(surroundings, self._device_type)
            backend = PlanningBackend(
                surroundings, self._inner, kept=self._kept, saves=self._saves
            )
            self._variants[phase] = _Variant(
                self._orig_mod, surroundings, backend, dynamic=self._dynamic
            )
            self._leave_out_recurrent_layers(self._variants[phase])
        return self._variants[phase]

    def _leave_out_recurrent_layers(self, variant: _Variant) -> None:
        """AOTAutograd of torch 2.13 cannot differentiate them, in fp32 neither."""
        if self._inner == "eager":
            return
        for fqn, module in self._orig_mod.named_modules():
            if isinstance(module, nn.RNNBase):
                install(module, self._fallback(variant)(module, fqn))

    def _run_watched(self, variant: _Variant, args: Any, kwargs: dict[str, Any]) -> Any:
        """The first call: see what no graph has, and let it fall back."""
        watch = CoverageWatch(self._orig_mod)
        with watch:
            result = variant.run(*args, **kwargs)
        variant.is_watched = True
        variant.uncovered = fall_back(
            self._orig_mod, watch, variant.backend.captured, self._fallback(variant)
        )
        return result

    def _fallback(self, variant: _Variant) -> Callable[[nn.Module, str], Fallback]:
        surroundings = variant.surroundings

        def fallback_of(module: nn.Module, fqn: str) -> Fallback:
            compute = surroundings.compute(fqn)
            if surroundings.backward(fqn) != compute:
                raise PolicyError(
                    f"a plan gives a backward of its own to operators of captured "
                    f"graphs, but {fqn or 'the model itself'!r} ran operators that no "
                    "graph has; leave out the rule's stage there, or use "
                    "castwise.prepare"
                )
            return Fallback(module, self._device_type, compute, surroundings.table)

        return fallback_of


class _Variant:
    """A model compiled for one phase."""

    def __init__(
        self,
        model: nn.Module,
        surroundings: Surroundings,
        backend: PlanningBackend,
        *,
        dynamic: bool | None,
    ) -> None:
        self.surroundings = surroundings
        self.backend = backend
        self.run = torch.compile(model, backend=backend, dynamic=dynamic)
        self.is_watched = False
        self.uncovered: tuple[Uncovered, ...] = ()

    def tell_that_nothing_ran(self) -> None:
        """Say once that a call was made without any graph, and name it in the plan."""
        told = Uncovered(module="", ops=("every operator",), treatment="fp32")
        if told not in self.uncovered:
            self.uncovered = (*self.uncovered, told)
            warnings.warn(
                "no captured graph ran, so this call had no plan and computed in fp32: "
                "Dynamo stepped aside, for its limit of recompilations, a stance, or a "
                "dispatch mode around the call",
                stacklevel=4,
            )


def compile(  # noqa: A001 -- as in torch.compile
    model: nn.Module,
    policy: Policy | str = "bf16-mixed",
    *,
    inner: Inner = "inductor",
    phase: str = "full",
    dynamic: bool | None = None,
    keep_weights: bool = False,
    saves: str | None = None,
) -> CompiledModel:
    """Compile a model so that its graphs run by a plan of a policy.

    Args:
        model: Weights in fp32; it is not edited.
        policy: A policy, or the name of a preset.
        inner: What runs the planned graphs: `inductor`, `aot_eager` or `eager`.
        phase: The phase to begin in.
        dynamic: As in `torch.compile`: True plans for any batch size at once.
        keep_weights: Whether low copies of weights stay from call to call.
        saves: The format in which graphs keep activations for their backward: fp16,
            bf16 or int8 (`castwise.graph.saved_values`). Default: as they are.

    Raises:
        PolicyError: The policy asks for what a plan cannot give.
        SettingsError: The inner compiler, the device or the format of saves is unknown.
        UnsupportedFormatError: The device does not compute in a low format.
    """
    chosen = preset(policy) if isinstance(policy, str) else policy
    return CompiledModel(
        model,
        chosen,
        inner=inner,
        phase=phase,
        dynamic=dynamic,
        keep_weights=keep_weights,
        saves=saves,
    )


def _checked_saves(saves: str | None) -> str | None:
    if saves is not None and saves not in ROW_FORMATS:
        raise SettingsError(
            f"compiled graphs keep activations in {', '.join(ROW_FORMATS)}, got "
            f"{saves!r}; leave saves out to keep them as they are"
        )
    return saves


def _device_type(model: nn.Module) -> str:
    device = next((w.device for w in model.parameters()), torch.device("cpu"))
    if device.type not in DEVICE_TYPES:
        raise SettingsError(
            f"plans are made for {' and '.join(DEVICE_TYPES)}, got a model on "
            f"{device}; move it to one of them"
        )
    return device.type


def _check_device(surroundings: Surroundings, device_type: str) -> None:
    for low in surroundings.lows:
        decision = supports(device_type, low)
        if not decision.value:
            raise UnsupportedFormatError(f"{low}: {decision.because}")


@contextlib.contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    """A plan that was made under autocast would take its casts for the model's own."""
    if not torch.is_autocast_enabled(device_type):
        yield
        return
    with torch.autocast(device_type, enabled=False):
        yield


@contextlib.contextmanager
def _captures_recurrent_layers() -> Iterator[None]:
    """Dynamo skips frames with an LSTM whole unless told otherwise."""
    config = torch._dynamo.config  # noqa: SLF001 -- where the switch is
    before = config.allow_rnn
    config.allow_rnn = True
    try:
        yield
    finally:
        config.allow_rnn = before
