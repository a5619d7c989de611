"""What a predict phase does with its batches: move, look, compare, decide.

In `jump` mode one batch decides. In `stepwise` mode each batch goes one horizon-th
further, with a forward whose loss must stay below a ceiling, and the last one decides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from castwise.hybrid.agreement import Agreement
from castwise.hybrid.exact_weights import ExactWeights
from castwise.hybrid.phase_statistics import PhaseCount
from castwise.hybrid.phases import Evidence, Phase
from castwise.hybrid.prediction import Prediction
from castwise.hybrid.settings import HybridSettings
from castwise.hybrid.verification import LossFunction, Verdict, judge, losses_of
from castwise.training.random_state import (
    capture_random_states,
    restore_random_states,
)
from castwise.training.step import Run

FORWARD_SHARE = 1 / 3
"""Of a step by a gradient: a backward costs two forwards."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """What became of a prediction with one batch."""

    evidence: Evidence
    """For the table of transitions."""

    loss: float
    """Loss of the batch where the weights stand; NaN where nothing was run forward."""

    verdict: Verdict | None
    """What paired forwards said, if there were any."""


@final
class PredictPhase:
    """Carries predictions on, batch by batch.

    Args:
        run: The prepared model; its phase is `predict` while a batch is looked at.
        weights: What is moved.
        loss: Called with the model and a batch.
        settings: Mode and verification.
        count: Where forward passes are counted.
        agreement: Other processes of the run, which have to decide the same.
    """

    def __init__(
        self,
        *,
        run: Run,
        weights: ExactWeights,
        loss: LossFunction,
        settings: HybridSettings,
        count: PhaseCount,
        agreement: Agreement,
    ) -> None:
        self._run, self._weights, self._loss = run, weights, loss
        self._settings, self.count, self._agreement = settings, count, agreement

    def carry_on(
        self, prediction: Prediction, batches: Sequence[Any], *, ceiling: float
    ) -> Finding:
        """Do one batch's part; the caller settles what was accepted or refused."""
        forwards = self.count.forwards
        try:
            return self._carried_on(prediction, batches, ceiling=ceiling)
        finally:
            done = (self.count.forwards - forwards) / len(batches)
            prediction.paid += done * FORWARD_SHARE

    def _carried_on(
        self, prediction: Prediction, batches: Sequence[Any], *, ceiling: float
    ) -> Finding:
        prediction.num_done += 1
        if self._settings.mode == "stepwise":
            prediction.move(self._weights, prediction.num_done / prediction.horizon)
            loss = self._loss_here(batches)
            if not loss <= ceiling:
                because = f"the loss {loss:.4g} passed {ceiling:.4g} on the way"
                return _refused(because, loss)
            if prediction.num_done < prediction.horizon:
                evidence = Evidence(prediction="running")
                return Finding(evidence=evidence, loss=loss, verdict=None)
        if self._settings.verification == "none":
            prediction.move(self._weights, 1.0)
            evidence = Evidence(prediction="accepted", because="nothing is verified")
            return Finding(evidence=evidence, loss=math.nan, verdict=None)
        verdict = self._verify(prediction, batches)
        if not verdict.accepted:
            return _refused(verdict.because, verdict.before, verdict)
        evidence = Evidence(prediction="accepted", because=verdict.because)
        return Finding(evidence=evidence, loss=verdict.after, verdict=verdict)

    def _verify(self, prediction: Prediction, batches: Sequence[Any]) -> Verdict:
        """Compare both ends of the way; the weights are left at its end."""
        verdict = self._compare(prediction, batches)
        if verdict.is_within_rounding() and verdict.format in {"bf16", "fp16"}:
            self._run.phase = Phase.FULL.value
            try:
                verdict = self._compare(prediction, batches)
            finally:
                self._run.phase = Phase.PREDICT.value
        return verdict

    def _compare(self, prediction: Prediction, batches: Sequence[Any]) -> Verdict:
        """Run both forwards, from the same random states."""
        random = capture_random_states()
        try:
            prediction.move(self._weights, 0.0)
            before = self._losses(batches)
            restore_random_states(random)
            prediction.move(self._weights, 1.0)
            after = self._losses(batches)
        finally:
            restore_random_states(random)
        fmt = self._run.precision.compute
        return judge(
            before,
            after,
            z=self._settings.verification_z,
            fmt=fmt,
            agreement=self._agreement,
        )

    def _loss_here(self, batches: Sequence[Any]) -> float:
        random = capture_random_states()
        try:
            losses = self._losses(batches)
            total, num = self._agreement.sums([float(losses.sum()), losses.numel()])
            return total / num
        finally:
            restore_random_states(random)

    def _losses(self, batches: Sequence[Any]) -> Tensor:
        self.count.forwards += len(batches)
        with self._run.inference():
            return losses_of(self._loss, self._run.model, batches)


def _refused(because: str, loss: float, verdict: Verdict | None = None) -> Finding:
    evidence = Evidence(prediction="refused", because=because)
    return Finding(evidence=evidence, loss=loss, verdict=verdict)
