"""The case of a diagnosis: a subject that can be run in every way that tells something.

Whatever is expensive is run once, when it is first asked for.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from castwise.dtypes import DTYPES, format_of
from castwise.errors import TargetError
from castwise.formats import FORMATS, Format
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.loss_scale import loss_scale_of
from castwise.numerics.diagnose.causes import EvidenceRow, largest
from castwise.numerics.diagnose.experiments import Emulated, Trail
from castwise.numerics.error import (
    NoiseRule,
    loss_drift,
    relative_error,
    share_nonfinite,
    tensors_of,
)
from castwise.numerics.replay import (
    SameDraws,
    first_line,
    line_of_user,
    seeded,
    wide_copy,
    wide_values,
)
from castwise.numerics.target import Batch, LossFn
from castwise.numerics.untouched import untouched
from castwise.numerics.validate.module_runs import (
    ModuleRun,
    measure_modules,
    run_model,
    run_scaled,
)
from castwise.numerics.validate.operators_on_trial import (
    OperatorError,
    OperatorsOnTrial,
    ReferenceOperators,
)
from castwise.numerics.validate.three_runs import WideRun
from castwise.numerics.validate.validation import narrowest_format, rule_for
from castwise.policy.rules import Policy
from castwise.region import Region

Subject = Callable[..., Any]
Figure = Callable[..., Any]
"""From an output and the inputs that it came from to a figure that should be small."""

SYMPTOM = 1e-3
"""A noise floor above this is itself a symptom, and excuses no more than this."""

_REAL = {"complex32": "fp16", "complex64": "fp32", "complex128": "fp64"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a diagnosis was asked."""

    reference: Subject | None = None
    """Another algorithm, or the model as it was before it was cast."""

    measure: Figure | None = None
    """A figure of merit."""

    limit: float | None = None
    """What the figure may be; without a measure, what the loss may be."""

    iterations: Mapping[int, Subject] = field(default_factory=dict)
    """The subject by its number of iterations."""

    optimizer: torch.optim.Optimizer | None = None
    """What updates the weights."""

    k: float = 1.5
    """How many times the noise floor an error may be."""

    tolerance: float | None = None
    """What is allowed on top; by default that of the narrowest format."""

    seed: int = 0
    """Of random draws."""

    phase: str = "full"
    """The phase that is diagnosed."""


class CannotHold(Exception):  # noqa: N818 -- it is a finding and no fault of ours
    """PyTorch refused a number that the format of a tensor does not hold."""


class Case:
    """A subject with its batches, under its policy while `in_force` is open."""

    def __init__(
        self,
        subject: Subject,
        batches: tuple[Batch, ...],
        loss_fn: LossFn | None,
        policy: Policy | None,
        settings: Settings,
    ) -> None:
        self.subject, self.batches = subject, batches
        self.loss_fn, self.policy, self.settings = loss_fn, policy, settings
        self.module = subject if isinstance(subject, nn.Module) else None
        self.device = next(
            (t.device for _, t in tensors_of([*self._weights().values(), *batches])),
            torch.device("cpu"),
        )
        self.evidence: list[EvidenceRow] = []
        self.applied: AppliedPolicy | None = None
        self._region: Region | None = None
        self.original: Subject = subject
        """The subject as it is without the policy."""
        if self.module is not None and policy is not None:
            self.original = wide_copy(self.module, "fp32")

    @property
    def name(self) -> str:
        """What is diagnosed, in words."""
        own = getattr(self.subject, "__name__", type(self.subject).__name__)
        return f"{own} under {self.policy.name}" if self.policy else f"{own} as it is"

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Put the policy on the model, and take it off again."""
        if self.module is None:
            if self.policy is not None:
                raise TargetError("a policy needs a module, and the subject is none")
            yield
            return
        with untouched(self.module, self.device):
            if self.policy is None:
                yield
                return
            phase = self.settings.phase
            bound = self.policy.bind(module_facts(self.module))
            self.applied = apply_policy(
                self.module, bound, self.device.type, phase=phase
            )
            self._region = Region.of(self.policy, phase, (self.applied,))
            try:
                yield
            finally:
                self.applied.remove()

    # What is allowed

    @functools.cached_property
    def format(self) -> str:
        """The narrowest format of the candidate."""
        if self.applied is not None:
            return narrowest_format(self.applied)
        tensors = [*self._weights().values(), *(t for _, t in tensors_of(self.batches))]
        names = [_format_of(each) for each in tensors]
        return max(names, key=lambda name: FORMATS[name].eps, default="fp32")

    @functools.cached_property
    def rule(self) -> NoiseRule:
        """What errors may be."""
        return rule_for(self.format, self.settings.k, self.settings.tolerance)[0]

    # The runs

    @functools.cached_property
    def right(self) -> WideRun:
        """What is right: the reference, or the subject itself, in float64."""
        return self._wide(self.settings.reference or self.original)

    def _wide(self, subject: Subject, fmt: str = "fp64") -> WideRun:
        return WideRun(subject, self.loss_fn, self.device, fmt)

    def wide_runs_of(self, subject: Subject) -> list[ModuleRun]:
        """Another subject in float64 on every batch."""
        wide = self._wide(subject)
        return [wide.run(each, self.settings.seed) for each in self.batches]

    def wide_of_reference(self) -> WideRun:
        """Another copy of what is right, to be changed."""
        return self._wide(self.settings.reference or self.original)

    @functools.cached_property
    def right_runs(self) -> list[ModuleRun]:
        """The reference on every batch."""
        return [self.right.run(each, self.settings.seed) for each in self.batches]

    @functools.cached_property
    def wide_trails(self) -> list[tuple[ModuleRun, Trail]]:
        """The subject itself in float64, with what was not finite, for every batch."""
        wide = self._wide(self.original) if self.settings.reference else self.right
        found = []
        for batch in self.batches:
            trail = Trail(wide.module)
            run = wide.run(batch, self.settings.seed, trail)
            found.append((run, trail))
        return found

    @functools.cached_property
    def fp32_runs(self) -> list[ModuleRun]:
        """The reference in fp32 on every batch; nothing where it does not run so."""
        try:
            wide = self._wide(self.settings.reference or self.original, "fp32")
            narrow = [_cut_to_fp32(each) for each in self.batches]
            return [wide.run(each, self.settings.seed) for each in narrow]
        except TargetError:
            return []

    @functools.cached_property
    def candidate_runs(self) -> list[ModuleRun]:
        """The candidate on every batch."""
        return [self.candidate(each)[0] for each in self.batches]

    def candidate(
        self,
        batch: Batch,
        *modes: contextlib.AbstractContextManager[Any],
        scale: float | None = None,
    ) -> tuple[ModuleRun, float]:
        """Run the candidate; return the run and its loss scale.

        Raises:
            CannotHold: A number does not fit into a tensor's format.
            TargetError: The user's code raised; the message names the line.
        """
        decided = self.policy.decide_loss_scale().value if self.policy else "none"
        given = loss_scale_of(decided).scale if scale is None else scale

        def once(scale: float) -> ModuleRun:
            region = self._region
            with contextlib.ExitStack() as stack:
                stack.enter_context(seeded(self.settings.seed, self.device))
                stack.enter_context(SameDraws())
                for mode in modes:
                    stack.enter_context(mode)
                return run_model(
                    self.subject,
                    batch,
                    self.loss_fn,
                    region=None
                    if region is None
                    else lambda: region.entered(self.device.type),
                    scale=scale,
                )

        try:
            if modes or scale is not None:
                return once(given), given
            return run_scaled(once, given)
        except TargetError:
            raise
        except Exception as error:
            said = f"{first_line(error)}{line_of_user(error)}"
            if "without overflow" in said:
                raise CannotHold(said) from error
            raise TargetError(f"{self.name} raised: {said}") from error

    def emulated(self, fmt: Format, scale: float = 1.0) -> list[ModuleRun]:
        """The reference with every operator's result rounded to a format."""
        mode = Emulated(fmt)
        wide = self._wide(self.settings.reference or self.original)
        if wide.module is not None:
            with torch.no_grad():
                for tensor in (*wide.module.parameters(), *wide.module.buffers()):
                    tensor.copy_(mode.rounded(tensor))
        return [
            wide.run(each, self.settings.seed, Emulated(fmt), scale=scale)
            for each in self.batches
        ]

    def operators(self) -> tuple[OperatorError, ...]:
        """Every operator of the candidate, tried alone, on every batch."""
        found: list[OperatorError] = []
        for batch in self.batches:
            recorder = ReferenceOperators(self.right.module)
            self.right.run(batch, self.settings.seed, recorder)
            trial = OperatorsOnTrial(self.module, recorder)
            self.candidate(batch, trial)
            found.extend(trial.errors())
        return tuple(found)

    # What the runs say

    def errors(self, runs: Sequence[ModuleRun]) -> dict[str, float]:
        """The errors of output, loss and gradients against the reference."""
        found: dict[str, list[float]] = {"output": [], "loss": [], "gradient": []}
        for got, right in zip(runs, self.right_runs, strict=True):
            found["output"].append(
                relative_error(got.outcome.output, right.outcome.output)
            )
            if self.loss_fn is not None:
                found["loss"].append(loss_drift(got.outcome.loss, right.outcome.loss))
            found["gradient"].append(self._gradient_error(got, right))
        return {name: largest(values) for name, values in found.items() if values}

    def worst_error(self, runs: Sequence[ModuleRun]) -> float:
        """The largest of the errors."""
        return largest(list(self.errors(runs).values()))

    def holds(self, runs: Sequence[ModuleRun]) -> bool:
        """Whether every error is allowed beside that of fp32."""
        floor = self.errors(self.fp32_runs) if self.fp32_runs else {}
        return all(
            self.rule.holds(error, min(floor.get(name, 0.0), SYMPTOM))
            for name, error in self.errors(runs).items()
        )

    def _gradient_error(self, got: ModuleRun, right: ModuleRun) -> float:
        names = (
            [] if self.module is None else [n for n, _ in self.module.named_modules()]
        )
        found = measure_modules(got, right, names, "fp32").values()
        weights = [m.weight_gradient for m in found if m.weight_gradient is not None]
        inputs = got.outcome.input_gradients, right.outcome.input_gradients
        if len(inputs[0]) == len(inputs[1]):
            weights.append(relative_error(*inputs))
        return largest(weights)

    def figure(self, run: ModuleRun, batch: Batch) -> float:
        """The figure of merit of a run: the user's, or the loss."""
        measure = self.settings.measure
        if measure is None:
            return run.outcome.loss
        output: Any = run.outcome.output
        if output.keys() == {""}:
            output = output[""]
        inputs = tuple(batch) if self.loss_fn is None else tuple(batch[:-1])
        return float(measure(output, *wide_values(inputs, "fp64")))

    def figures(self, runs: Sequence[ModuleRun]) -> float | None:
        """The largest figure of runs on all batches; none where none was asked for."""
        if self.settings.limit is None:
            return None
        return largest(
            [self.figure(*each) for each in zip(runs, self.batches, strict=True)]
        )

    def note(self, what: str, runs: Sequence[ModuleRun], note: str = "") -> None:
        """Note an experiment with its error and figure."""
        error, measure = self.worst_error(runs), self.figures(runs)
        self.evidence.append(
            EvidenceRow(what=what, error=error, measure=measure, note=note)
        )

    def note_formats(self) -> None:
        """Note the error by format: the candidate, fp32 and float64."""
        known = {each.what for each in self.evidence}
        name = self.policy.name if self.policy else f"as it is ({self.format})"
        for what in (name, "fp32", "fp64"):
            if what in known:
                continue
            if what == "fp64":
                self.note(what, self.right_runs)
            elif what == name:
                self.note(what, self.candidate_runs)
            elif self.fp32_runs:
                self.note(what, self.fp32_runs)

    def bad_inputs(self) -> list[str]:
        """Places in the batches that hold an infinity or NaN."""
        return [
            f"batches[{number}]{path}, {share_nonfinite(values):.2%} of it"
            for number, batch in enumerate(self.batches)
            for path, values in tensors_of(tuple(batch))
            if share_nonfinite(values)
        ]

    def bad_weights(self) -> list[str]:
        """Weights and buffers that hold an infinity or NaN."""
        return [n for n, w in self._weights().items() if share_nonfinite(w)]

    def _weights(self) -> dict[str, torch.Tensor]:
        if self.module is None:
            return {}
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return {n: w for n, w in named if w.is_floating_point() or w.is_complex()}


def is_bad(run: ModuleRun, *, with_loss: bool) -> bool:
    """Whether a result of a run is not finite."""
    results = run.outcome.output, run.outcome.gradients, run.outcome.input_gradients
    bad_loss = with_loss and not math.isfinite(run.outcome.loss)
    return bad_loss or bool(share_nonfinite(results))


def _format_of(values: torch.Tensor) -> str:
    name = str(values.dtype).removeprefix("torch.")
    if name in _REAL:
        return _REAL[name]
    return format_of(values.dtype) if values.dtype in DTYPES.values() else "fp32"


def _cut_to_fp32(values: Any) -> Any:
    """Inputs of float64 in fp32; whatever is narrower stays."""
    if isinstance(values, torch.Tensor):
        if values.dtype == torch.float64:
            return values.float()
        return (
            values.to(torch.complex64) if values.dtype == torch.complex128 else values
        )
    if isinstance(values, (list, tuple)):
        return type(values)(map(_cut_to_fp32, values))
    if isinstance(values, dict):
        return {key: _cut_to_fp32(value) for key, value in values.items()}
    return values
