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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn

from castwise.checkpoints.contradictions import refuse_contradictions
from castwise.errors import PredictionError, SettingsError
from castwise.hybrid.agreement import Agreement, agreement_of
from castwise.hybrid.arms import Arms
from castwise.hybrid.divergence import NORMAL, Alarm, DivergenceMonitor
from castwise.hybrid.exact_weights import ExactWeights, refuse_sharded
from castwise.hybrid.horizon import Horizon
from castwise.hybrid.pace import Pace
from castwise.hybrid.phase_length import PhaseLength
from castwise.hybrid.phase_meter import PhaseMeter
from castwise.hybrid.phase_statistics import PhaseCount, PhaseStatistics
from castwise.hybrid.phases import Evidence, Phase, PhaseMachine, Transition
from castwise.hybrid.predict_phase import PredictPhase
from castwise.hybrid.prediction import Prediction
from castwise.hybrid.predictor import Predictor, check_proposal
from castwise.hybrid.residuals import Residuals
from castwise.hybrid.resting_states import RestingStates
from castwise.hybrid.settings import HybridSettings
from castwise.hybrid.verification import LossFunction, Verdict, evaluation_mode
from castwise.loss_scale import LossScale
from castwise.memory.monitor import MemoryMonitor
from castwise.optim.holding import HeldWeights
from castwise.policy import Policy
from castwise.training.averages import Averages, NoAverages
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
        monitor: Measures the memory of each phase. Default: it is not measured.
        agreement: Other processes that train the same weights on rows of their own.
            Default: those of a model in DDP, else none.

    Raises:
        UnsupportedFormatError: The device cannot do the format of a phase.
        SettingsError: The optimizer or the loss cannot be used so.
        PredictionError: The weights are sharded (FSDP2).
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
        monitor: MemoryMonitor | None = None,
        agreement: Agreement | None = None,
    ) -> None:
        refuse_sharded(model)  # before anything is put on the model
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
        self.residuals = Residuals()
        self.predictor = predictor or self.settings.make_predictor()
        self.transitions: list[Transition] = []
        self.averages: Averages = NoAverages()
        """Takes in the weights after each real step that stands; put yours here."""
        self.meter = PhaseMeter(
            self.run,
            asked,
            observe_formats=self.settings.observe_formats,
            monitor=monitor,
        )
        self._loss = loss
        self._agreement = agreement or agreement_of(model)
        self._resting = RestingStates(optimizer, self.settings.predict_states)
        self._weights = ExactWeights(self.run, held, self._resting)
        self._machine = PhaseMachine(self.settings.phase_lengths())
        self._monitor = DivergenceMonitor(threshold=self.settings.divergence_threshold)
        self._pace = Pace(self.settings.full_steps)
        self._lengths = _phase_length(self.settings)
        self._predict_phase = PredictPhase(
            run=self.run,
            weights=self._weights,
            loss=loss,
            settings=self.settings,
            count=self.statistics.phases[Phase.PREDICT.value],
            agreement=self._agreement,
        )
        self._prediction: Prediction | None = None
        self.confidence: float | None = None
        """The last back-test, which is a forecast of the next; none before there is."""
        self.predictor.begin(self._weights)

    @property
    def statistics(self) -> PhaseStatistics:
        """What every phase has cost, and what became of the predictions."""
        return self.meter.statistics

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
        return self._lengths.length

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
        self.meter.enter(self.phase)
        predicts = self._machine.phase is Phase.PREDICT
        work = self._predict if predicts else self._train
        with self.meter.counted() as count:
            done = self.meter.watched(lambda: work(batches, count), count)
        if done.transition is not None:
            self.transitions.append(done.transition)
            self.meter.enter(self.phase)
        return done

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Hold the averages in the model, in eval mode and the precision of full."""
        phase, self.run.phase = self.run.phase, Phase.FULL.value
        model = self.run.model
        try:
            with (
                self.averages.in_place_of_weights(),
                evaluation_mode(model),
                self.run.inference(),
            ):
                yield
        finally:
            self.run.phase = phase

    def inference(self) -> Any:
        """Run forward without gradients in the precision of the phase."""
        return self.run.inference()

    def remove(self) -> None:
        """Take the policy off the model; the trainer cannot be used afterwards."""
        self.run.remove()

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside model, optimizer and averages."""
        pending = self._prediction
        return {
            "settings": self.settings.to_dict() | {"predictor": self.predictor.name},
            "machine": self._machine.state_dict(),
            "predictor": self.predictor.state_dict(),
            "prediction": None
            if pending is None
            else pending.state_dict(self._weights),
            "lengths": self._lengths.state_dict(),
            "monitor": self._monitor.state_dict(),
            "pace": self._pace.state_dict(),
            "residuals": self.residuals.state_dict(),
            "statistics": self.statistics.to_dict(),
            "confidence": self.confidence,
            "run": self.run.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken, in the middle of any phase.

        Load model, optimizer and averages before.

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
        self._lengths.load_state_dict(state["lengths"])
        self._monitor.load_state_dict(state["monitor"])
        self._pace.load_state_dict(state["pace"])
        self.residuals.load_state_dict(state["residuals"])
        self.meter.statistics = PhaseStatistics.from_dict(state["statistics"])
        self.meter.note_formats()
        self._predict_phase.count = self.statistics.phases[Phase.PREDICT.value]
        self.confidence = state["confidence"]

    # Real steps: warmup, full, correct.

    def _train(self, batches: Sequence[Any], count: PhaseCount) -> HybridStep:
        """Update by the mean gradient of the batches."""
        phase = self._machine.phase.value
        alone = getattr(self._loss, "alone", self._loss)  # no word to other processes
        with self.run.step(
            again=lambda: (
                self._share_of_loss(alone, each, batches) for each in batches
            )
        ) as step:
            for batch in batches:
                step.backward(self._share_of_loss(self._loss, batch, batches))
        outcome = step.outcome
        count.forwards += len(batches)
        count.backwards += len(batches)
        count.scale = self.run.loss_scale.scale
        alarm = self._after_update(outcome, count)
        transition = self._ask(alarm)
        return HybridStep(
            phase=phase,
            loss=outcome.loss,
            outcome=outcome,
            verdict=None,
            transition=transition,
            confidence=self.confidence,
        )

    def _share_of_loss(
        self, loss_of: LossFunction, batch: Any, batches: Sequence[Any]
    ) -> Tensor:
        """Return what one of the batches adds to the loss of a step."""
        loss = loss_of(self.run.model, batch)
        loss = loss.mean() if loss.dim() else loss
        return loss / len(batches) if len(batches) > 1 else loss

    def _after_update(self, outcome: Stepped | Skipped, count: PhaseCount) -> Alarm:
        """Let everybody who watches real steps see this one."""
        self._lengths.count_real_step()
        if isinstance(outcome, Skipped):
            count.skips += 1
            return NORMAL  # the weights stand still, and the loss scale sees to it
        self.predictor.observe()
        loss = self._agreement.mean(outcome.loss)
        self._pace.observe(loss)
        alarm = self._monitor.observe(loss, outcome.gradient_norm)
        if alarm.level == "caution":
            self._lengths.shorten()
        if self._prediction is None:
            self.averages.update()
        else:  # on trial; the averages take in what stands
            self._prediction.num_corrected += 1
        return alarm

    def _ask(self, alarm: Alarm) -> Transition | None:
        """Ask the table what follows a real step, and settle what ends with it."""
        ended = self.predictor.window_ended
        if ended:
            self._calibrate(self.predictor.confidence())
        evidence = Evidence(
            window_ended=ended,
            confidence=self.confidence,
            cooling=self._lengths.cooling,
            alarm=alarm.level == "warning",
            because=alarm.because,
        )
        if self._machine.would_predict(evidence):
            evidence = replace(evidence, declined=self._lengths.decline())
            self.statistics.declined += bool(evidence.declined)
        transition = self._machine.advance(evidence)
        if transition is not None and transition.source == Phase.CORRECT:
            self._end_trial(take_back=alarm.level == "warning")
        to_predict = transition is not None and transition.target == Phase.PREDICT
        if ended and not to_predict and self.predictor.window_ended:
            if self._prediction is not None:
                self._prediction.keep_landing(self._told())
            self.predictor.settle("not_asked")
        return transition

    def _calibrate(self, cosine: float | None) -> None:
        """Compare the last window's forecast with what came, and forecast again."""
        if cosine is not None:
            cosine = self._agreement.mean(cosine)
        if self.confidence is not None and cosine is not None:
            self.statistics.calibration_count += 1
            self.statistics.calibration_sum += abs(self.confidence - cosine)
        self.confidence = cosine

    def _end_trial(self, *, take_back: bool) -> None:
        """Learn from the corrective steps, or go back to before the jump."""
        prediction, self._prediction = self._prediction, None
        if prediction is None:
            return
        if prediction.num_corrected:
            told = self._told()
            for name in self._weights.parameters():  # one at a time in fp32
                promised, real = prediction.steps(self._weights, name, told)
                self.residuals.learn({name: promised}, {name: real})
        if take_back and self.settings.late_rollback:
            self._take_back(prediction, lost=prediction.num_corrected)
            self.statistics.late_rollbacks += 1
            self.predictor.settle("moved")
            self.confidence = None
            self._pace.reset()
        elif prediction.num_corrected:
            self.averages.update()
        self._resting.forget()

    def _told(self) -> Mapping[str, Tensor]:
        """The start of the predictor's window, if it keeps one; only to read."""
        return self.predictor.start_of_window() if self.predictor.keeps_start else {}

    # Predictions.

    def _predict(self, batches: Sequence[Any], count: PhaseCount) -> HybridStep:
        del count  # the phase counts its forwards itself
        prediction = self._prediction or self._propose()
        self._prediction = prediction
        self._rest()
        try:
            finding = self._predict_phase.carry_on(
                prediction, batches, ceiling=self._monitor.ceiling
            )
        except BaseException:
            self._weights.restore(prediction.snapshot)
            prediction.begin_again()  # with the next step
            raise
        if finding.evidence.prediction == "refused":
            self._take_back(prediction, lost=0)
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
        horizon = self._lengths.length
        proposal = self.predictor.propose(horizon)
        parameters = self._weights.parameters()
        check_proposal(proposal, parameters, predictor=self.predictor.name)
        self.statistics.tries += 1
        trial = self.settings.correct_steps > 0 and self.settings.late_rollback
        if self._resting.is_on:
            self._timed_rest(self._weights.store)
        return Prediction(
            horizon=horizon,
            promise=proposal,
            gains={name: self.residuals.gain(name) for name in proposal},
            snapshot=self._weights.snapshot(moments=trial),
            confidence=self.confidence,
        )

    def _rest(self) -> None:
        """Free the moments, unless a checkpoint woke them in the middle of a phase."""
        if self._resting.is_on and not self._resting.num_bytes:
            self._timed_rest(self._resting.release)
            self.statistics.resting_bytes = self._resting.num_bytes

    def _timed_rest(self, work: Callable[[], None]) -> None:
        started = time.perf_counter()
        work()
        self.statistics.resting_seconds += time.perf_counter() - started

    def _land(self, prediction: Prediction, verdict: Verdict | None) -> None:
        """Stay, and put the landing on trial while corrective steps run."""
        self.meter.end_phase()
        self._timed_rest(self._resting.wake)
        self.statistics.accepts += 1
        self.statistics.virtual_steps += prediction.horizon
        worth = 0.0
        if verdict is not None:
            worth = self._pace.worth(verdict.before - verdict.after)
            self.statistics.credited_steps += worth
        self._lengths.accepted(credited=worth, paid=prediction.paid)
        self.predictor.settle("landed")
        prediction.land(told=self.predictor.keeps_start)
        self.confidence = None
        self._pace.reset()
        if self.settings.correct_steps == 0:
            self._prediction = None
            self._resting.forget()

    def _take_back(self, prediction: Prediction, *, lost: int) -> None:
        """Return to before the prediction, bit by bit."""
        self.meter.end_phase()
        self._weights.restore(prediction.snapshot)
        self._prediction = None
        self._lengths.refused(paid=prediction.paid + lost)
        self._resting.forget()


def _phase_length(settings: HybridSettings) -> PhaseLength:
    """Return what decides how far to predict."""
    kind = Arms if settings.phase_length == "arms" else Horizon
    return kind(
        least=settings.min_predict_steps,
        most=settings.max_predict_steps,
        full_steps=settings.full_steps,
    )
