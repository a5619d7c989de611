"""What each phase holds in memory, and the peak, by which a run fits or does not.

    phase      holds
    full       weights, gradients, moments, predictor, saved activations
    predict    weights, moments, predictor, trial, activations of one forward
    correct    what full holds, and the trial

The *trial* is what can take a prediction back and learn from it: a copy of the weights,
a copy of the moments for a late rollback, and the proposal, where the predictor has no
memory for it. In correct a predictor that keeps the landing has the proposal, too.
Where optimizer states rest in predict (`predict_states`), neither they nor any copy are
held then; in correct they are back, and the copies still are elsewhere.

The format of a phase changes the activations alone, since weights and whatever
belongs to them stay in fp32. A low predict phase therefore never lowers the peak, which
is that of correct or full.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields

from castwise.errors import SettingsError
from castwise.formats import FORMATS
from castwise.hybrid.phases import Phase, parse_phase
from castwise.hybrid.settings import HybridSettings

_FP32 = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseMemory:
    """Bytes that one phase holds at its fullest."""

    weights: int
    """The fp32 weights."""

    gradients: int
    """Their gradients; none in predict."""

    moments: int
    """What the optimizer keeps."""

    predictor: int
    """What the predictor keeps between steps."""

    trial: int
    """What takes a prediction back."""

    activations: int
    """Saved for a backward, or passing through a forward."""

    @property
    def total(self) -> int:
        """All of it."""
        return sum(getattr(self, each.name) for each in fields(self))


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryEstimate:
    """Every phase of a run."""

    phases: Mapping[Phase, PhaseMemory]
    """Phase -> what it holds."""

    @property
    def peak(self) -> tuple[Phase, int]:
        """The phase that holds most, and how much."""
        most = max(self.phases, key=lambda phase: self.phases[phase].total)
        return most, self.phases[most].total

    def average(self, distribution: Mapping[str, float]) -> float:
        """Return the bytes held on average over steps, given each phase's share."""
        shares = {parse_phase(phase): share for phase, share in distribution.items()}
        total = math.fsum(shares.values())
        if not 0 < total < math.inf or min(shares.values()) < 0:
            raise SettingsError(
                f"the shares of the phases need to be 0 or more and not all 0, got "
                f"{dict(distribution)}"
            )
        held = (share * self.phases[phase].total for phase, share in shares.items())
        return math.fsum(held) / total


def estimate_memory(
    settings: HybridSettings,
    *,
    num_parameters: int,
    saved_activations: int = 0,
    forward_activations: int = 0,
    moments_per_parameter: float = 8.0,
) -> MemoryEstimate:
    """Estimate what each phase holds, before anything runs.

    Args:
        settings: Phases, formats and predictor.
        num_parameters: Numbers in all trained weights.
        saved_activations: Bytes that a backward needs, computing in fp32. Default: 0.
        forward_activations: Bytes that a forward alone holds at a time, in fp32.
        moments_per_parameter: 8 for Adam, 4 for SGD with momentum. Default: 8.
    """
    copy = _FP32 * num_parameters
    moments = round(moments_per_parameter * num_parameters)
    predictor = settings.make_predictor()
    rests = settings.predict_states != "stay"
    keeps_moments = settings.late_rollback and settings.correct_steps > 0 and not rests
    phases = {}
    for phase in Phase:
        config = settings.mixed_precision_config
        fmt = config.precision_for_phase(phase)
        bits = 32 if fmt == "tf32" else FORMATS[fmt].bits
        proposed = phase is Phase.PREDICT or not predictor.keeps_start
        trial = (not rests) * copy + keeps_moments * moments
        trial += proposed * round(
            predictor.proposal_bytes_per_parameter * num_parameters
        )
        on_trial = phase in {Phase.PREDICT, Phase.CORRECT}
        passing = saved_activations if phase.computes_backward else forward_activations
        phases[phase] = PhaseMemory(
            weights=copy,
            gradients=copy if phase.computes_backward else 0,
            moments=0 if rests and phase is Phase.PREDICT else moments,
            predictor=round(predictor.bytes_per_parameter * num_parameters),
            trial=on_trial * trial,
            activations=passing * bits // 32,
        )
    return MemoryEstimate(phases=phases)
