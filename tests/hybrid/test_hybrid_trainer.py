"""Whole runs in phases: identity, rollback, precision, accumulation, bad input."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from castwise.errors import (
    PredictionError,
    SettingsError,
    UnsupportedFormatError,
)
from castwise.hybrid import HybridSettings, HybridTrainer, MixedPrecisionConfig
from castwise.hybrid.exact_weights import Deltas
from castwise.memory.monitor import MemoryMonitor
from castwise.numerics.census import observe
from castwise.optim import hold_weights
from castwise.policy import PHASES, preset
from castwise.training.averages import ExponentialAverage, LatestAverage
from castwise.training.step import Skipped
from planted import Planted, away, far_away
from small_task import (
    SmallTask,
    assert_same_bits,
    bits_of,
    classification_loss,
)


def settings(**changes: Any) -> HybridSettings:
    """Short phases, and a gate that opens early."""
    given = {"warmup_steps": 8, "full_steps": 4, "confidence_threshold": 0.2}
    return HybridSettings(**{**given, **changes})


def to_nan(values: dict[str, Tensor], horizon: int) -> Deltas:
    """To no place at all."""
    del horizon
    return {name: torch.full_like(value, math.nan) for name, value in values.items()}


def run_to_predict(trainer: HybridTrainer, task: SmallTask) -> int:
    """Train until the next step is a prediction; return its number."""
    step = 0
    while trainer.phase != "predict":
        trainer.step(task.batch(step))
        step += 1
    return step


@pytest.mark.parametrize("predictor", ["window_line", "adam_hold", "rna"])
def test_with_the_gate_shut_the_run_is_the_plain_optimizer(predictor: str) -> None:
    """200 steps of AdamW with dropout and a batch norm, bit by bit."""
    hybrid, plain = SmallTask(), SmallTask()
    options = {"num_iterates": 2} if predictor == "rna" else {}
    quiet = settings(
        confidence_threshold=0.9999999, predictor=predictor, predictor_options=options
    )
    optimizer = hybrid.adamw()
    trainer = hybrid.trainer(quiet, optimizer=optimizer)
    torch.manual_seed(1)
    for step in range(200):
        trainer.step(hybrid.batch(step))
    other = plain.adamw()
    torch.manual_seed(1)
    for step in range(200):
        classification_loss(plain.model, plain.batch(step)).mean().backward()
        other.step()
        other.zero_grad()
    assert trainer.statistics.tries == 0
    assert_same_bits(bits_of(hybrid.model, optimizer), bits_of(plain.model, other))


def test_an_accepted_jump_moves_every_tensor_by_its_delta() -> None:
    """Weights go to start + delta in fp32; moments, buffers and random stay."""
    task = SmallTask()
    optimizer = task.adamw()
    trainer = task.trainer(settings(verification_z=0.0), optimizer=optimizer)
    step = run_to_predict(trainer, task)
    before = bits_of(task.model, optimizer)
    proposal = copy.deepcopy(trainer.predictor.propose(trainer.horizon))
    done = trainer.step(task.batch(step))
    assert done.transition is not None
    assert done.transition.target == "correct"
    after = bits_of(task.model, optimizer)
    for name, parameter in task.model.named_parameters():
        assert parameter.dtype is torch.float32
        assert not torch.equal(after[name], before[name]), name
        assert torch.equal(after[name], before[name] + proposal[name]), name
    named = dict(task.model.named_parameters())
    for name in before.keys() - named.keys():
        assert torch.equal(after[name], before[name]), name
    assert done.verdict is not None
    assert done.verdict.after < done.verdict.before
    assert trainer.statistics.virtual_steps > 0


def test_a_delta_that_bf16_would_lose_survives_a_bf16_phase() -> None:
    """Predict computes in bf16; its arithmetic on weights does not."""
    task = SmallTask()

    def tiny(values: dict[str, Tensor], horizon: int) -> Deltas:
        del horizon
        return {name: value * 1e-5 for name, value in values.items()}

    trainer = task.trainer(settings(verification="none"), predictor=Planted(tiny))
    step = run_to_predict(trainer, task)
    weight = task.model.get_parameter("0.weight")
    before = weight.detach().clone()
    trainer.step(task.batch(step))
    assert torch.equal(weight, before + before * 1e-5)
    assert not torch.equal(weight, before)


@pytest.mark.parametrize("mode", ["jump", "stepwise"])
@pytest.mark.parametrize("propose", [away, to_nan])
def test_a_failed_prediction_leaves_no_trace(
    mode: str, propose: Callable[..., Deltas]
) -> None:
    """Weights, buffers, moments, scale and random states are the same bits."""
    task = SmallTask()
    optimizer = task.adamw()
    planted = Planted(propose)
    trainer = task.trainer(settings(mode=mode), optimizer=optimizer, predictor=planted)
    step = run_to_predict(trainer, task)
    before = bits_of(task.model, optimizer)
    scale = trainer.run.loss_scale.state_dict()
    while trainer.phase == "predict":
        done = trainer.step(task.batch(step))
        step += 1
    assert trainer.phase == "full"
    assert done.transition is not None
    assert done.transition.because
    assert_same_bits(bits_of(task.model, optimizer), before)
    assert trainer.run.loss_scale.state_dict() == scale
    assert planted.settled == ["refused"]
    assert trainer.statistics.refusals == 1
    assert all(module.training for module in task.model.modules())


def test_a_rollback_is_exact_under_split_weights() -> None:
    """bf16 weights and their remainders come back; the run goes on as if untried."""
    ends = []
    for with_prediction in (True, False):
        task = SmallTask()
        optimizer = task.adamw()
        keep = [task.model.get_parameter(f"1.{name}") for name in ("weight", "bias")]
        held = hold_weights(optimizer, "split", keep=keep)
        policy = preset("bf16-true").with_rule(module="1", precision="p=fp32")
        trainer = task.trainer(
            settings(), optimizer=optimizer, predictor=Planted(away), policy=policy,
            held=held,
        )  # fmt: skip
        step = run_to_predict(trainer, task)
        torch.manual_seed(5)
        if with_prediction:
            before = bits_of(task.model, optimizer)
            trainer.step(task.batch(step))
            assert_same_bits(bits_of(task.model, optimizer), before)
            assert trainer.phase == "full"
        for later in range(step + 1, step + 4):
            with trainer.run.step() as open_step:
                loss = classification_loss(task.model, task.batch(later)).mean()
                open_step.backward(loss)
        ends.append(bits_of(task.model, optimizer))
    assert_same_bits(*ends)


def test_a_jump_keeps_all_bits_of_split_weights() -> None:
    """The delta reaches the fp32 weight of which the model sees bf16."""
    task = SmallTask()
    optimizer = task.adamw()
    keep = [task.model.get_parameter(f"1.{name}") for name in ("weight", "bias")]
    held = hold_weights(optimizer, "split", keep=keep)
    policy = preset("bf16-true").with_rule(module="1", precision="p=fp32")

    def small(values: dict[str, Tensor], horizon: int) -> Deltas:
        del horizon
        return {name: value * 1e-5 for name, value in values.items()}

    trainer = task.trainer(
        settings(verification="none"), optimizer=optimizer, policy=policy, held=held,
        predictor=Planted(small),
    )  # fmt: skip
    step = run_to_predict(trainer, task)
    before = held.fp32_weights(task.model)["0.weight"].clone()
    trainer.step(task.batch(step))
    after = held.fp32_weights(task.model)["0.weight"]
    assert torch.equal(after, before + before * 1e-5)
    assert task.model.get_parameter("0.weight").dtype is torch.bfloat16


def test_a_landing_is_taken_back_when_the_loss_leaves_its_course() -> None:
    """Corrective steps find the loss far above its course: moments go back too."""
    task = SmallTask()
    optimizer = task.adamw()
    trainer = task.trainer(
        settings(verification="none", correct_steps=6, warmup_steps=24),
        optimizer=optimizer,
        predictor=Planted(far_away),
    )
    step = run_to_predict(trainer, task)
    before = bits_of(task.model, optimizer)
    trainer.step(task.batch(step))
    assert trainer.phase == "correct"
    while trainer.phase == "correct":
        step += 1
        done = trainer.step(task.batch(step))
    assert done.transition is not None
    assert "the loss rose" in done.transition.because
    assert trainer.statistics.late_rollbacks == 1
    assert_same_bits(bits_of(task.model, optimizer), before)


def test_a_schedule_is_not_rolled_back() -> None:
    """Learning rates belong to whoever sets them."""
    task = SmallTask()
    optimizer = task.adamw()
    trainer = task.trainer(settings(), optimizer=optimizer, predictor=Planted(away))
    step = run_to_predict(trainer, task)
    optimizer.param_groups[0]["lr"] = 1.25e-4
    trainer.step(task.batch(step))
    assert trainer.statistics.refusals == 1
    assert optimizer.param_groups[0]["lr"] == 1.25e-4


@pytest.mark.parametrize(
    ("config", "formats"),
    [
        (MixedPrecisionConfig.default(), ["fp32", "fp32", "bf16", "fp32"]),
        (MixedPrecisionConfig.conservative(), ["fp32"] * 4),
        (MixedPrecisionConfig.aggressive(), ["bf16"] * 4),
        (
            MixedPrecisionConfig.default()
            .with_phase_precision("full", "bf16")
            .with_phase_precision("predict", "fp16"),
            ["fp32", "bf16", "fp16", "fp32"],
        ),
    ],
)
def test_each_phase_multiplies_in_its_format(
    config: MixedPrecisionConfig, formats: list[str]
) -> None:
    """What every matrix product of each phase really ran in, forward and backward."""
    task = SmallTask()
    trainer = task.trainer(settings(mixed_precision_config=config, verification_z=0.0))
    seen: dict[str, tuple[str, ...]] = {}
    for step in range(40):
        phase = trainer.phase
        census = observe(lambda step=step: trainer.step(task.batch(step)))  # type: ignore[misc]
        if phase not in seen:
            seen[phase] = tuple(census.product_shares())
            backward = census.product_shares("backward")
            assert bool(backward) == (phase != "predict")
            assert tuple(backward) in {(), seen[phase]}
    assert [seen[phase] for phase in PHASES] == [(fmt,) for fmt in formats]
    for parameter in task.model.parameters():
        assert parameter.dtype is torch.float32


def test_statistics_say_what_each_phase_did() -> None:
    """Steps, passes, formats asked and observed, tries and what became of them."""
    task = SmallTask()
    trainer = task.trainer(settings(observe_formats=True, verification_z=0.0))
    for step in range(60):
        trainer.step(task.batch(step))
    found = trainer.statistics
    counts = found.phases
    assert sum(count.steps for count in counts.values()) == 60
    assert found.backwards == 60 - counts["predict"].steps
    assert counts["predict"].backwards == 0
    assert counts["predict"].forwards >= 2 * counts["predict"].steps
    assert counts["predict"].asked == counts["predict"].effective == "bf16"
    assert counts["predict"].product_formats == {"bf16": 1.0}
    assert counts["full"].product_formats == {"fp32": 1.0}
    assert counts["predict"].switches == found.tries > 0
    assert counts["warmup"].switches == counts["warmup"].switch_seconds == 0
    for phase in ("full", "predict"):
        assert 0 < counts[phase].switch_seconds < counts[phase].seconds
    assert found.tries == found.accepts + found.refusals
    assert found.accepts > found.late_rollbacks >= 0
    assert found.virtual_steps >= found.accepts
    assert all(count.skips == 0 for count in counts.values())
    assert all(count.seconds > 0 for count in counts.values())
    assert sum(found.shares().values()) == pytest.approx(1.0)
    used = MixedPrecisionConfig.default().estimate_memory_savings(found.shares())
    assert used == pytest.approx(1 - 0.5 * counts["predict"].steps / 60)


def test_a_confidence_is_held_against_what_came_true() -> None:
    """Back-test of one window, cosine of the next: their difference is the error."""
    task = SmallTask()
    trainer = task.trainer(settings(confidence_threshold=0.9999999))
    seen = []
    for step in range(60):
        before = trainer.confidence
        trainer.step(task.batch(step))
        if before is not None and trainer.confidence != before:
            assert trainer.confidence is not None
            seen.append(abs(trainer.confidence - before))
    found = trainer.statistics
    assert found.calibration_count == len(seen) >= 2
    assert found.confidence_error == pytest.approx(sum(seen) / len(seen))


@pytest.mark.parametrize("mode", ["jump", "stepwise"])
def test_a_batch_with_a_nan_ends_a_prediction_without_a_trace(mode: str) -> None:
    """The proposal may be good: nobody can know, so the run is back and in full."""
    task = SmallTask()
    optimizer = task.adamw()
    trainer = task.trainer(settings(mode=mode), optimizer=optimizer)
    step = run_to_predict(trainer, task)
    before = bits_of(task.model, optimizer)
    inputs, classes = task.batch(step)
    done = trainer.step((torch.full_like(inputs, math.nan), classes))
    assert (done.phase, trainer.phase) == ("predict", "full")
    assert done.transition is not None
    assert "nan" in done.transition.because
    assert trainer.statistics.refusals == 1
    assert_same_bits(bits_of(task.model, optimizer), before)


def test_fp16_gradients_that_overflow_are_skipped_and_not_observed() -> None:
    """The scale halves, the weights stand, the predictor learns nothing."""
    task = SmallTask()
    config = MixedPrecisionConfig.conservative()
    config.enabled = True
    for phase in ("warmup", "full", "correct"):
        config.set_phase_precision(phase, "fp16")
    planted = Planted(away)
    trainer = task.trainer(
        settings(mixed_precision_config=config, warmup_steps=50), predictor=planted
    )
    inputs, classes = task.batch(0)
    before = trainer.run.loss_scale.scale
    done = trainer.step((inputs * 1e6, classes))
    assert isinstance(done.outcome, Skipped)
    assert trainer.run.loss_scale.scale == before / 2
    assert planted.num_observed == 0
    assert trainer.statistics.phases["warmup"].skips == 1


def test_gradients_of_several_batches_accumulate() -> None:
    """`step(a, b)` is one update by the mean loss of both."""
    one, other = SmallTask(), SmallTask()
    for task in (one, other):
        task.model[3].p = 0.0  # type: ignore[index]
        task.model[1].eval()  # type: ignore[index]
    trainer = one.trainer(settings())
    trainer.step(one.batch(0), one.batch(1))
    optimizer = other.adamw()
    for step in range(2):
        (classification_loss(other.model, other.batch(step)).mean() / 2).backward()
    optimizer.step()
    for mine, theirs in zip(
        one.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert trainer.statistics.phases["warmup"].backwards == 2


def test_an_exception_in_a_prediction_leaves_no_trace() -> None:
    """A loss that fails at the landing point costs nothing; the run goes on."""
    task = SmallTask()
    optimizer = task.adamw()
    failing = {"now": False}

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        if failing["now"]:
            raise RuntimeError
        return classification_loss(model, batch)

    trainer = HybridTrainer(
        task.model, optimizer, loss, settings=settings(), predictor=Planted(away)
    )
    step = run_to_predict(trainer, task)
    before = bits_of(task.model, optimizer)
    failing["now"] = True
    with pytest.raises(RuntimeError):
        trainer.step(task.batch(step))
    assert_same_bits(bits_of(task.model, optimizer), before)
    failing["now"] = False
    assert trainer.step(task.batch(step)).phase == "predict"


def test_a_name_that_the_model_lacks_is_an_error() -> None:
    """The delta of a misspelt name is not dropped in silence."""
    task = SmallTask()

    def misspelt(values: dict[str, Tensor], horizon: int) -> Deltas:
        deltas = away(values, horizon)
        deltas["0.wieght"] = deltas.pop("0.weight")
        return deltas

    trainer = task.trainer(settings(), predictor=Planted(misspelt))
    step = run_to_predict(trainer, task)
    with pytest.raises(PredictionError, match=r"'0\.wieght'.*did you mean 0\.weight"):
        trainer.step(task.batch(step))


def test_a_name_or_shape_that_does_not_fit_is_an_error() -> None:
    """Every trained parameter has a delta of its shape."""
    for spoil, message in (
        (lambda deltas: deltas.pop("4.bias"), r"nothing for '4\.bias'"),
        (
            lambda deltas: deltas.update({"4.bias": torch.zeros(1)}),
            r"shape \(1,\) for '4\.bias'",
        ),
    ):
        task = SmallTask()

        def spoilt(
            values: dict[str, Tensor], horizon: int, spoil: Any = spoil
        ) -> Deltas:
            deltas = away(values, horizon)
            spoil(deltas)
            return deltas

        trainer = task.trainer(settings(), predictor=Planted(spoilt))
        step = run_to_predict(trainer, task)
        with pytest.raises(PredictionError, match=message):
            trainer.step(task.batch(step))


def test_a_format_that_the_device_lacks_is_refused_at_construction() -> None:
    """Or exchanged, with a record, if that was allowed."""
    config = MixedPrecisionConfig.default().with_phase_precision("predict", "tf32")
    task = SmallTask()
    with pytest.raises(UnsupportedFormatError, match="tf32"):
        task.trainer(settings(mixed_precision_config=config))
    trainer = task.trainer(settings(mixed_precision_config=config), fallback="fp32")
    assert trainer.statistics.phases["predict"].asked == "tf32"
    assert trainer.statistics.phases["predict"].effective == "fp32"
    assert trainer.run.precision.fallbacks


def test_a_step_needs_a_batch() -> None:
    """And says so."""
    with pytest.raises(SettingsError, match="needs a batch"):
        SmallTask().trainer(settings()).step()


def test_weights_that_the_model_does_not_name_are_refused() -> None:
    """Only named parameters can be predicted."""
    model, stray = nn.Linear(3, 2), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([*model.parameters(), stray], lr=0.1)
    with pytest.raises(SettingsError, match="no parameter of the model"):
        HybridTrainer(model, optimizer, classification_loss)


def test_stepwise_goes_a_part_of_the_way_with_each_batch() -> None:
    """After k of H batches the weights stand at start + k/H delta."""
    task = SmallTask()
    trainer = task.trainer(
        settings(mode="stepwise", verification_z=0.0, max_predict_steps=5)
    )
    step = run_to_predict(trainer, task)
    delta = trainer.predictor.propose(trainer.horizon)["0.weight"]
    start = task.model.get_parameter("0.weight").detach().clone()
    horizon = trainer.horizon
    for k in range(1, horizon):
        done = trainer.step(task.batch(step + k))
        assert (done.phase, done.outcome) == ("predict", None)
        assert math.isfinite(done.loss)
        here = task.model.get_parameter("0.weight")
        torch.testing.assert_close(here.detach(), start + k / horizon * delta)
    assert trainer.phase == "predict"
    trainer.step(task.batch(step))
    assert trainer.phase in {"correct", "full"}


def test_a_tensor_that_is_overpredicted_learns_its_gain() -> None:
    """Promised twice what comes, a tensor's gain falls to a half; others stay at 1."""

    class Drift(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.over = nn.Parameter(torch.zeros(7))
            self.right = nn.Parameter(torch.zeros(5))

    def loss(model: Any, batch: Tensor) -> Tensor:
        return (model.over.sum() + model.right.sum()) * batch

    def doubled(values: dict[str, Tensor], horizon: int) -> Deltas:
        steps = {"over": 2.0, "right": 1.0}
        return {
            name: torch.full_like(value, -0.1 * horizon * steps[name])
            for name, value in values.items()
        }

    model = Drift()
    trainer = HybridTrainer(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1),
        loss,
        settings=settings(late_rollback=False),
        predictor=Planted(doubled),
    )
    while trainer.statistics.accepts < 10:
        trainer.step(torch.tensor(1.0))
    assert trainer.residuals.gain("over") == pytest.approx(0.5, abs=0.1)
    assert trainer.residuals.gain("right") == pytest.approx(1.0, abs=0.02)
    assert trainer.residuals.last["over"].cosine == pytest.approx(1.0, abs=1e-4)


def test_compiled_code_is_kept_when_phases_change() -> None:
    """One graph for real steps and one for predictions, however often they change."""
    torch.compiler.reset()
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        del inputs
        graphs.append(graph)
        return graph.forward

    task = SmallTask()
    trainer = HybridTrainer(
        task.model,
        task.adamw(),
        torch.compile(classification_loss, backend=count),
        settings=settings(verification_z=0.0),
    )
    for step in range(60):
        trainer.step(task.batch(step))
    assert trainer.statistics.tries > 2
    assert len(graphs) == 2
    torch.compiler.reset()


def test_averages_take_in_what_stands() -> None:
    """A landing that is taken back has left no trace in them."""
    task = SmallTask()
    optimizer = task.adamw()
    trainer = task.trainer(
        settings(verification="none", correct_steps=6, warmup_steps=24),
        optimizer=optimizer,
        predictor=Planted(far_away),
    )
    trainer.averages = ExponentialAverage(task.model, decay=0.9)
    step = run_to_predict(trainer, task)
    before = copy.deepcopy(trainer.averages.state_dict())
    assert before["num_updates"] == step
    while trainer.phase != "full":
        trainer.step(task.batch(step))
        step += 1
    assert trainer.statistics.late_rollbacks == 1
    after = trainer.averages.state_dict()
    assert after["num_updates"] == before["num_updates"]
    for name, value in before["averages"].items():
        assert torch.equal(after["averages"][name], value), name


def test_a_landing_that_stands_enters_the_averages_once() -> None:
    """When its corrective steps are over."""
    task = SmallTask()
    trainer = task.trainer(settings(verification_z=0.0, correct_steps=3))
    trainer.averages = ExponentialAverage(task.model, decay=0.9)
    step = run_to_predict(trainer, task)
    before = trainer.averages.state_dict()["num_updates"]
    trainer.step(task.batch(step))
    for later in range(3):
        assert trainer.averages.state_dict()["num_updates"] == before
        assert trainer.phase == "correct"
        trainer.step(task.batch(step + 1 + later))
    assert trainer.averages.state_dict()["num_updates"] == before + 1


def test_evaluation_holds_averages_in_the_precision_of_full() -> None:
    """In eval mode, whatever phase it is; afterwards everything is as it was."""
    task = SmallTask()
    config = MixedPrecisionConfig.default().with_phase_precision("warmup", "bf16")
    trainer = task.trainer(settings(mixed_precision_config=config))
    trainer.averages = LatestAverage(task.model, every=1, count=2)
    for step in range(3):
        trainer.step(task.batch(step))
    weight = task.model.get_parameter("0.weight")
    before = weight.detach().clone()

    def evaluate() -> None:
        with trainer.evaluation():
            assert not torch.equal(weight, before)
            assert not any(module.training for module in task.model.modules())
            task.model(task.inputs)

    census = observe(evaluate)
    assert tuple(census.product_shares()) == ("fp32",)
    assert torch.equal(weight, before)
    assert all(module.training for module in task.model.modules())
    assert trainer.run.phase == trainer.phase == "warmup"


def test_memory_is_measured_by_phase() -> None:
    """Every phase that ran has a peak, and none that did not."""
    task = SmallTask()
    monitor = MemoryMonitor("cpu")
    trainer = task.trainer(settings(verification_z=0.0), monitor=monitor)
    for step in range(30):
        trainer.step(task.batch(step))
    assert trainer.meter.take_peak() > 0
    for phase, count in trainer.statistics.phases.items():
        assert (count.peak_bytes > 0) == (count.steps > 0), phase
        assert count.held_bytes <= count.peak_bytes


@pytest.mark.parametrize("correct_steps", [3, 9])
@pytest.mark.parametrize("predictor", ["rna", "outer_nesterov"])
def test_a_landing_that_the_predictor_keeps_teaches_the_same_gains(
    predictor: str, correct_steps: int
) -> None:
    """Promise and landing, kept by the trial or told by the predictor's window.

    With 9 corrective steps the predictor is at its next window before they are over.
    """
    gains = []
    for told in (True, False):
        task = SmallTask()
        options = {"num_iterates": 2} if predictor == "rna" else {}
        trainer = task.trainer(
            settings(
                predictor=predictor,
                predictor_options=options,
                correct_steps=correct_steps,
                verification="none",
                confidence_threshold=0.01,
            )
        )
        trainer.predictor.keeps_start = told  # type: ignore[misc]
        torch.manual_seed(1)
        for step in range(60):
            trainer.step(task.batch(step))
        assert trainer.statistics.accepts > 1
        gains.append([each.gain for each in trainer.residuals.last.values()])
    assert len(gains[0]) == 6
    assert gains[0] == pytest.approx(gains[1], rel=1e-2)
