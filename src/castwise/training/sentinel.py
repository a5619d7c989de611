"""The sentinel: takes a bad step back, and gives the module to blame more precision.

    guard = Sentinel(run)
    for x, y in loader:
        outcome = guard.step(lambda: loss_fn(model(x), y))
    run.changes    step 120: head to c=fp32,o=fp32: exp overflows fp16: it made inf ...

A step is bad when a value of the forward leaves the range of its format, or when the
update made a weight that is not finite. Everything is then what it was before, bit by
bit; the module whose operator is to blame is promoted, and the same step is tried once
more. An overflow of gradients that a lower loss scale cures is the scale's business.

Now and then the modules that run low are measured: each computes its output once more,
from the same inputs, in the higher precision. One whose error crosses the line is
promoted; a promoted one whose low output stays calm for some probes comes back.

Where several processes train together, what one of them sees is decided for all: the
step is taken back everywhere, and the same module is promoted.

The loss must be a function of its batch: it is computed again after a rollback.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any, final

import torch

from castwise.errors import (
    LossScaleError,
    PolicyError,
    SettingsError,
    StepError,
)
from castwise.fitting import is_sharded
from castwise.loss_scale import first_non_finite
from castwise.policy import Precision
from castwise.training.open_step import Step
from castwise.training.outcome import Skipped, Stepped
from castwise.training.overrides import in_force
from castwise.training.probe import measure_modules
from castwise.training.rollback import Rollback
from castwise.training.step import Run
from castwise.training.unison import first_proposal, largest

Compute = Callable[[], torch.Tensor]


@dataclass(frozen=True, kw_only=True, slots=True)
class SentinelSettings:
    """Where the lines are."""

    nonfinite_limit: int = 1
    """Bad steps for which a module is to blame before it is promoted."""

    error_limit: float = 0.1
    """Relative error of a module's output beyond which it is promoted. The outputs of
    healthy modules in bf16 are off by 0.002 to 0.01."""

    probe_every: int = 200
    """Steps between two measurements; 0 for none, and then nothing comes back."""

    calm_probes: int = 3
    """Measurements in a row that a promoted module must pass to come back."""

    calm_share: float = 0.5
    """A measurement is passed below this share of `error_limit`: what lies between is
    neither promoted nor brought back."""

    tries: int = 4
    """How often one step is tried, each time with one module more promoted."""

    precision: str = "c=fp32,o=fp32"
    """What a module is promoted to."""

    def __post_init__(self) -> None:
        """Refuse lines that make no sense.

        Raises:
            SettingsError: A number is out of its range.
            PrecisionTextError: The precision does not parse.
        """
        Precision.parse(self.precision)
        if min(self.nonfinite_limit, self.calm_probes, self.tries) < 1:
            raise SettingsError(
                "a sentinel needs nonfinite_limit, calm_probes and tries of at least "
                f"1, got {self.nonfinite_limit}, {self.calm_probes}, {self.tries}"
            )
        if not (self.error_limit > 0 and 0 < self.calm_share <= 1):
            raise SettingsError(
                "a sentinel needs error_limit above 0 and calm_share in (0, 1], got "
                f"{self.error_limit} and {self.calm_share}"
            )
        if self.probe_every < 0:
            raise SettingsError(
                f"a sentinel needs probe_every of 0 or more, got {self.probe_every}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RolledBack:
    """The step was taken back, and nothing could be promoted to cure it."""

    because: str
    """One sentence."""

    loss: float
    """What the loss was."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Cure:
    """A module to promote, and why."""

    module: str
    because: str


@final
class Sentinel:
    """Guards the steps of a run.

    Processes that train together guard their steps together: each has a sentinel with
    the same settings, and calls it for every step.

    Args:
        run: What `prepare` returned.
        settings: Where the lines are.

    Raises:
        SettingsError: The weights are sharded.
    """

    def __init__(self, run: Run, settings: SentinelSettings | None = None) -> None:
        if any(map(is_sharded, run.parameters().values())):
            raise SettingsError(
                "a sentinel needs whole weights, to copy them and to compute modules "
                "once more, and these are sharded; train with DDP, or without it"
            )
        self._run = run
        self._settings = settings or SentinelSettings()
        self._rollback = Rollback(run)
        self._blamed: dict[str, int] = {}
        self._calm: dict[str, int] = {}
        self._num_steps = 0
        self.num_rollbacks = 0
        """Steps that were taken back."""
        self.errors: dict[str, float] = {}
        """Module -> relative error of its output in low precision, as last measured."""

    def step(self, compute: Compute) -> Stepped | Skipped | RolledBack:
        """Make one step; take it back and try again if it goes wrong.

        Args:
            compute: Computes the loss; is called again after a rollback, and once more
                when modules are measured.

        Raises:
            LossScaleError: Steps are skipped and no promotion can help.
        """
        every = self._settings.probe_every
        if every and self._num_steps % every == 0:
            self._probe(compute)
        self._num_steps += 1
        self._rollback.keep()
        for trial in range(self._settings.tries):
            outcome, failure = self._try(compute)
            said = first_proposal(self._proposal(outcome))
            if isinstance(said, RolledBack):
                self._take_back()
                return replace(said, loss=outcome.loss)
            more = trial + 1 < self._settings.tries
            if said is None or not (more and self._is_cured(said)):
                if failure is not None:
                    raise failure
                return outcome
        raise AssertionError("the last trial returns")

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside the run, which holds the promotions."""
        return {
            "blamed": dict(self._blamed),
            "calm": dict(self._calm),
            "num_steps": self._num_steps,
            "num_rollbacks": self.num_rollbacks,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken."""
        self._blamed = {name: int(count) for name, count in state["blamed"].items()}
        self._calm = {name: int(count) for name, count in state["calm"].items()}
        self._num_steps = int(state["num_steps"])
        self.num_rollbacks = int(state["num_rollbacks"])

    def _try(self, compute: Compute) -> tuple[Stepped | Skipped, LossScaleError | None]:
        step: Step = self._run.step()
        try:
            with step:
                step.backward(compute())
        except LossScaleError as error:
            with contextlib.suppress(StepError):
                return step.outcome, error  # told before the scale gave up
            raise
        return step.outcome, None

    def _proposal(self, outcome: Stepped | Skipped) -> _Cure | RolledBack | None:
        """What this process would do about an outcome."""
        if isinstance(outcome, Stepped):
            found = first_non_finite(self._run.parameters())
            if found is None:
                return None
            because = f"the update made {found.parameter!r} hold {found.kind}"
            return RolledBack(because=because, loss=outcome.loss)
        if not outcome.module or outcome.found is None or not outcome.found.is_range:
            return None
        if outcome.gone_at is not None:  # a lower loss scale cures it
            return None
        return _Cure(module=outcome.module, because=f"{outcome.found}")

    def _is_cured(self, cure: _Cure) -> bool:
        """Promote what is to blame for a skipped step, if that is left to do."""
        module = cure.module
        count = self._blamed[module] = self._blamed.get(module, 0) + 1
        if count < self._settings.nonfinite_limit:
            return False
        if module in in_force(self._run.changes):
            return False
        return self._promote(module, cure.because, back=True)

    def _promote(self, module: str, because: str, *, back: bool = False) -> bool:
        if back:
            self._take_back()
        try:
            self._run.override(module, self._settings.precision, because=because)
        except PolicyError:  # the module cannot be an island
            return False
        self._calm[module] = 0
        return True

    def _take_back(self) -> None:
        self._rollback.restore()
        self.num_rollbacks += 1

    def _probe(self, compute: Compute) -> None:
        """Measure the modules that run low, and those that would if they came back."""
        run, limit = self._run, self._settings.error_limit
        promoted = in_force(run.changes)
        with self._undisturbed():
            own = measure_modules(run, compute, frozenset(promoted))
        self.errors = largest(own)
        for module, error in self.errors.items():
            if module not in promoted:
                if error > limit:
                    off = f"off by {error:.3g}, the line is {limit:g}"
                    how = off if error < math.inf else "not finite, and finite in fp32"
                    self._promote(module, f"its output is {how}")
                continue
            is_calm = error < limit * self._settings.calm_share
            self._calm[module] = self._calm.get(module, 0) + 1 if is_calm else 0
            if self._calm[module] >= self._settings.calm_probes:
                run.override(
                    module,
                    None,
                    because=f"calm in {self._calm.pop(module)} probes, off by "
                    f"{error:.3g}",
                )
                self._blamed.pop(module, None)

    @contextlib.contextmanager
    def _undisturbed(self) -> Iterator[None]:
        """Leave buffers, counters and random states as they are."""
        self._rollback.keep()
        try:
            yield
        finally:
            self._rollback.restore()
