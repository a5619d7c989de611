"""Trains in phases: real steps, and now and then a prediction in place of them.

    trainer = HybridTrainer(model, optimizer, loss, settings=HybridSettings())
    for batch in loader:
        done = trainer.step(batch)
        done.phase, done.loss, done.transition

`loss(model, batch)` returns one number, or one for each sample, which lets verification
know its own noise. A step is what the phase makes of the batch: an update by a gradient
(warmup, full, correct) or a prediction. The policy's precision of the phase is in force
in it, and switched without touching the model.

A prediction is a proposal by the predictor, scaled by what corrective steps have taught
and verified on a batch that no step has seen. When it fails, weights, buffers, moments,
loss scale and random states are what they were, bit by bit. While the gate stays shut
the run is the plain optimizer's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import nn

from castwise.checkpoints.contradictions import refuse_contradictions
from castwise.errors import PredictionError, SettingsError
from castwise.hybrid.divergence import NORMAL, Alarm, DivergenceMonitor
from castwise.hybrid.exact_weights import ExactWeights
from castwise.hybrid.horizon import Horizon
from castwise.hybrid.pace import Pace
from castwise.hybrid.phase_statistics import PhaseCount, PhaseStatistics
from castwise.hybrid.phases import Evidence, Phase, PhaseMachine, Transition
from castwise.hybrid.predict_phase import PredictPhase
from castwise.hybrid.prediction import Prediction
from castwise.hybrid.predictor import Predictor, check_proposal
from castwise.hybrid.residuals import Residuals
from castwise.hybrid.settings import HybridSettings
from castwise.hybrid.verification import LossFunction, Verdict
from castwise.loss_scale import LossScale
from castwise.numerics.census import observe
from castwise.optim.holding import HeldWeights
from castwise.policy import Policy
from castwise.training.step import Run, Skipped, Stepped, prepare


@dataclass(frozen=True, kw_only=True, slots=True)
class HybridStep:
    """What one call of `step` did."""

    phase: str
    """The phase that the step belonged to."""

    loss: float
    """Loss of the batch: in training, or where the weights stand after a prediction."""

    outcome: Stepped | Skipped | None
    """What became of an update by a gradient; none in predict."""

    verdict: Verdict | None
    """What the paired forwards said; none if there were none."""

    transition: Transition | None
    """The change of phase after the step, if there was one."""

    confidence: float | None
    """The predictor's last back-test, if there was one."""


@final
class HybridTrainer:
    """A model, its optimizer, a loss, and the phases that they are trained in.

    Args:
        model: Any module tree.
        optimizer: Any optimizer of its parameters.
        loss: Called with the model and a batch.
        settings: When to predict, how far, and in which formats.
        policy: Used in place of the policy of `settings.mixed_precision_config`, for a
            model with islands; `config.policy(over=policy)` joins both.
        predictor: One of your own, in place of the one that the settings name.
        held: The weight storage under the optimizer, if there is one.
        clip_norm: Largest global norm of the gradients. Default: not clipped.
        loss_scale: Default: what the policy's formats need.
        device: Where the model is moved to. Default: where it is.
        fallback: The format to use instead of one that the device cannot do.

    Raises:
        UnsupportedFormatError: The device cannot do the format of a phase.
        SettingsError: The optimizer or the loss cannot be used so.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loss: LossFunction,
        *,
        settings: HybridSettings | None = None,
        policy: Policy | None = None,
        predictor: Predictor | None = None,
        held: HeldWeights | None = None,
        clip_norm: float | None = None,
        loss_scale: LossScale | None = None,
        device: str | torch.device | None = None,
        fallback: str | None = None,
    ) -> None:
        self.settings = settings or HybridSettings()
        asked = policy or self.settings.mixed_precision_config.policy()
        self.run: Run = prepare(
            model,
            optimizer,
            asked,
            clip_norm=clip_norm,
            loss_scale=loss_scale,
            device=device,
            phase=Phase.WARMUP.value,
            fallback=fallback,
        )
        self.statistics = PhaseStatistics()
        self.residuals = Residuals()
        self.predictor = predictor or self.settings.make_predictor()
        self.transitions: list[Transition] = []
        self._loss = loss
        self._weights = ExactWeights(self.run, held)
        self._machine = PhaseMachine(self.settings.phase_lengths())
        self._monitor = DivergenceMonitor(threshold=self.settings.divergence_threshold)
        self._pace = Pace(self.settings.full_steps)
        self._horizon = Horizon(
            least=self.settings.min_predict_steps,
            most=self.settings.max_predict_steps,
            full_steps=self.settings.full_steps,
        )
        self._predict_phase = PredictPhase(
            run=self.run,
            weights=self._weights,
            loss=loss,
            settings=self.settings,
            count=self.statistics.phases[Phase.PREDICT.value],
        )
        self._prediction: Prediction | None = None
        self._foreseen: float | None = None  # the back-test, as a forecast
        self.predictor.begin(self._weights)
        self._record_formats(asked)

    @property
    def phase(self) -> str:
        """The phase of the next step."""
        return self._machine.phase.value

    @property
    def num_steps(self) -> int:
        """Steps so far, predicted ones included."""
        return self._machine.num_steps

    @property
    def horizon(self) -> int:
        """How many steps the next proposal will be worth."""
        return self._horizon.length

    def step(self, *batches: Any) -> HybridStep:
        """Do what the phase does with a batch.

        Args:
            *batches: One batch, or several whose gradients are accumulated.

        Raises:
            PredictionError: The predictor proposed what does not fit the model.
            LossScaleError: Too many steps in a row were skipped.
        """
        if not batches:
            raise SettingsError("a step needs a batch; call step(batch)")
        count = self.statistics.phases[self.phase]
        started = time.perf_counter()
        self._switch_to(self.phase)
        if self._machine.phase is Phase.PREDICT:
            work: Callable[[Sequence[Any]], HybridStep] = self._predict
        else:
            work = self._train
        done = self._observed(work, batches, count)
        count.steps += 1
        count.seconds += time.perf_counter() - started
        if done.transition is not None:
            self.transitions.append(done.transition)
        return done

    def inference(self) -> Any:
        """Run forward without gradients in the precision of the phase."""
        return self.run.inference()

    def remove(self) -> None:
        """Take the policy off the model; the trainer cannot be used afterwards."""
        self.run.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside the model and the optimizer."""
        pending = self._prediction
        return {
            "settings": self.settings.to_dict() | {"predictor": self.predictor.name},
            "machine": self._machine.state_dict(),
            "predictor": self.predictor.state_dict(),
            "prediction": None if pending is None else pending.state_dict(),
            "horizon": self._horizon.state_dict(),
            "monitor": self._monitor.state_dict(),
            "pace": self._pace.state_dict(),
            "residuals": self.residuals.state_dict(),
            "statistics": self.statistics.to_dict(),
            "foreseen": self._foreseen,
            "run": self.run.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, in the middle of any phase.

        Load the model and the optimizer before.

        Raises:
            ContradictionError: It was taken under other settings; all are named.
            PredictionError: It is no state of a hybrid run.
        """
        missing = [name for name in self.state_dict() if name not in state]
        if missing:
            raise PredictionError(
                f"the state of a hybrid run lacks {', '.join(missing)}; give what "
                "state_dict() returned"
            )
        mine = self.settings.to_dict() | {"predictor": self.predictor.name}
        refuse_contradictions(mine, state["settings"], where="this state")
        self.run.load_state_dict(state["run"])
        self._machine.load_state_dict(state["machine"])
        self.predictor.load_state_dict(state["predictor"])
        pending = state["prediction"]
        self._prediction = None if pending is None else Prediction.from_state(pending)
        self._horizon.load_state_dict(state["horizon"])
        self._monitor.load_state_dict(state["monitor"])
        self._pace.load_state_dict(state["pace"])
        self.residuals.load_state_dict(state["residuals"])
        self.statistics = PhaseStatistics.from_dict(state["statistics"])
        self._predict_phase.count = self.statistics.phases[Phase.PREDICT.value]
        self._foreseen = state["foreseen"]

    # Real steps: warmup, full, correct.

    def _train(self, batches: Sequence[Any]) -> HybridStep:
        phase = self._machine.phase
        with self.run.step() as step:
            for batch in batches:
                loss = self._loss(self.run.model, batch)
                loss = loss.mean() if loss.dim() else loss
                step.backward(loss / len(batches) if len(batches) > 1 else loss)
        outcome = step.outcome
        count = self.statistics.phases[phase.value]
        count.forwards += len(batches)
        count.backwards += len(batches)
        alarm = self._after_update(outcome, count)
        transition = self._ask(alarm)
        return HybridStep(
            phase=phase.value,
            loss=outcome.loss,
            outcome=outcome,
            verdict=None,
            transition=transition,
            confidence=self._foreseen,
        )

    def _after_update(self, outcome: Stepped | Skipped, count: PhaseCount) -> Alarm:
        """Let everybody who watches real steps see this one."""
        self._horizon.count_real_step()
        if isinstance(outcome, Skipped):
            count.skips += 1
            return NORMAL  # the weights stand still, and the loss scale sees to it
        self.predictor.observe()
        self._pace.observe(outcome.loss)
        alarm = self._monitor.observe(outcome.loss, outcome.gradient_norm)
        if alarm.level == "caution":
            self._horizon.shorten()
        if self._prediction is not None:
            self._prediction.num_corrected += 1
        return alarm

    def _ask(self, alarm: Alarm) -> Transition | None:
        """Ask the table what follows a real step, and settle what ends with it."""
        ended = self.predictor.window_ended
        if ended:
            self._calibrate(self.predictor.confidence())
        transition = self._machine.advance(
            Evidence(
                window_ended=ended,
                confidence=self._foreseen,
                cooling=self._horizon.cooling,
                alarm=alarm.level == "warning",
                because=alarm.because,
            )
        )
        if transition is not None and transition.source == Phase.CORRECT:
            self._end_trial(take_back=alarm.level == "warning")
        to_predict = transition is not None and transition.target == Phase.PREDICT
        if ended and not to_predict and self.predictor.window_ended:
            self.predictor.settle("not_asked")
        return transition

    def _calibrate(self, cosine: float | None) -> None:
        """Compare the last window's forecast with what came, and forecast again."""
        if self._foreseen is not None and cosine is not None:
            self.statistics.calibration_count += 1
            self.statistics.calibration_sum += abs(self._foreseen - cosine)
        self._foreseen = cosine

    def _end_trial(self, *, take_back: bool) -> None:
        """Learn from the corrective steps, or go back to before the jump."""
        prediction, self._prediction = self._prediction, None
        if prediction is None:
            return
        if prediction.num_corrected:
            self.residuals.learn(
                prediction.promised_update(), prediction.real_update(self._weights)
            )
        if take_back and self.settings.late_rollback:
            self._take_back(prediction)
            self.statistics.late_rollbacks += 1
            self.predictor.settle("moved")
            self._foreseen = None
            self._pace.reset()

    # Predictions.

    def _predict(self, batches: Sequence[Any]) -> HybridStep:
        prediction = self._prediction or self._propose()
        self._prediction = prediction
        try:
            finding = self._predict_phase.carry_on(
                prediction, batches, ceiling=self._monitor.ceiling
            )
        except BaseException:
            self._weights.restore(prediction.snapshot)
            self._prediction = None  # the next step proposes again
            raise
        if finding.evidence.prediction == "refused":
            self._take_back(prediction)
            self.statistics.refusals += 1
            self.predictor.settle("refused")
        elif finding.evidence.prediction == "accepted":
            self._land(prediction, finding.verdict)
        return HybridStep(
            phase=Phase.PREDICT.value,
            loss=finding.loss,
            outcome=None,
            verdict=finding.verdict,
            transition=self._machine.advance(finding.evidence),
            confidence=prediction.confidence,
        )

    def _propose(self) -> Prediction:
        """Ask the predictor, and keep what brings the run back."""
        horizon = self._horizon.length
        proposal = self.predictor.propose(horizon)
        parameters = self._weights.parameters()
        check_proposal(proposal, parameters, predictor=self.predictor.name)
        self.statistics.tries += 1
        trial = self.settings.correct_steps > 0 and self.settings.late_rollback
        snapshot = self._weights.snapshot(moments=trial)
        return Prediction(
            horizon=horizon,
            start=self._weights.exact_start(snapshot),
            promise=proposal,
            delta=self.residuals.scaled(proposal),
            snapshot=snapshot,
            confidence=self._foreseen,
        )

    def _land(self, prediction: Prediction, verdict: Verdict | None) -> None:
        """Stay, and put the landing on trial while corrective steps run."""
        self._horizon.accepted()
        self.statistics.accepts += 1
        self.statistics.virtual_steps += prediction.horizon
        if verdict is not None:
            worth = self._pace.worth(verdict.before - verdict.after)
            self.statistics.credited_steps += worth
        self.predictor.settle("landed")
        self._foreseen = None
        self._pace.reset()
        if self.settings.correct_steps == 0:
            self._prediction = None

    def _take_back(self, prediction: Prediction) -> None:
        """Return to before the prediction, bit by bit."""
        self._weights.restore(prediction.snapshot)
        self._prediction = None
        self._horizon.refused()

    # Precision by phase.

    def _switch_to(self, phase: str) -> None:
        """Put the precision of a phase into force, and count it if it was another."""
        if self.run.phase == phase:
            return
        count = self.statistics.phases[phase]
        started = time.perf_counter()
        self.run.phase = phase
        count.switch_seconds += time.perf_counter() - started
        count.switches += 1

    def _record_formats(self, asked: Policy) -> None:
        """Note the format of every phase, asked for and in force."""
        effective = self.run.precision.effective
        for phase, count in self.statistics.phases.items():
            count.asked = asked.base_precision(phase=phase).compute or ""
            count.effective = effective.base_precision(phase=phase).compute or ""

    def _observed(
        self,
        work: Callable[[Sequence[Any]], HybridStep],
        batches: Sequence[Any],
        count: PhaseCount,
    ) -> HybridStep:
        """Run a step, watched if it is the first of its phase and that is asked for."""
        if not self.settings.observe_formats or count.steps:
            return work(batches)
        done: list[HybridStep] = []
        census = observe(lambda: done.append(work(batches)))
        count.product_formats = census.product_shares()
        return done[0]
