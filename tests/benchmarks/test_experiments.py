"""What `make accept` rests on: intervals, verdicts, the record, exact measures."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from experiments import kit, stages
from experiments.a1_formats import CONTROL as TINY_SCALE
from experiments.a1_formats import Formats
from experiments.a2_recompute import LiveBytes
from experiments.a4_states import CONTROL as LINEAR
from experiments.a4_states import EIGHT, FP32, States
from experiments.a5_mode_stages import (
    BLIND,
    DEFAULT,
    EXPOSURE,
    FROM_START,
    LATE,
    SEED,
    SQUARES,
    ModeStages,
)
from experiments.a6_fill_stages import FillStages
from experiments.contract import Check, Experiment, Results, frozen_thresholds
from experiments.record import RecordFile
from experiments.registry import EXPERIMENTS
from experiments.statistics import estimate, paired
from torch import Tensor, nn

from castwise.recipes.kenken import posterior
from castwise.recipes.kenken.alphabets import VOCABULARY_SIZE, Mode
from castwise.recipes.kenken.curricula import mixture_in_force
from castwise.recipes.kenken.evaluation import evaluation_batch
from castwise.recipes.kenken.puzzle_set import Split

LIMITS = frozen_thresholds()


def test_every_experiment_has_its_thresholds_and_its_controls() -> None:
    """A1 to A10, no other names, and seeds enough to estimate an interval."""
    assert list(EXPERIMENTS) == [f"A{number}" for number in range(1, 11)]
    assert list(LIMITS) == list(EXPERIMENTS)
    for name in ("A1", "A4", "A5", "A6"):
        assert EXPERIMENTS[name].num_seeds >= 3


def test_an_interval_is_students() -> None:
    """Three values with mean 2 and deviation 1: half width 4.303 / sqrt(3)."""
    found = estimate([1.0, 2.0, 3.0])
    half = 4.302653 / math.sqrt(3)
    assert found.value == 2.0
    assert found.interval == pytest.approx((2 - half, 2 + half), abs=1e-5)
    narrow = 2.919986 / math.sqrt(3)
    assert found.narrow == pytest.approx((2 - narrow, 2 + narrow), abs=1e-5)


@pytest.mark.parametrize("values", [[1.0], [1.0, math.inf], [math.nan, 2.0]])
def test_what_cannot_be_estimated_is_never_within_bounds(values: list[float]) -> None:
    """One value, or one that is not finite, has an interval without ends."""
    assert estimate(values).narrow == (-math.inf, math.inf)


def test_differences_are_paired_by_seed() -> None:
    """Only seeds that both arms have count, each with its own partner."""
    results = {"a": {0: {"x": 1.0}, 2: {"x": 5.0}}, "b": {2: {"x": 3.0}, 1: {"x": 9.0}}}
    found = paired(results, "a", "b", "x")
    assert (found.value, found.num) == (2.0, 1)
    assert paired(results, "a", "b", "x", share=0.5).value == 3.5


def test_seeds_that_were_looked_at_can_be_left_out() -> None:
    """Trials begin at the first seed, and fewer seeds begin there too."""
    fills = EXPERIMENTS["A6"]
    assert {trial.seed for trial in fills.trials()} == set(range(20, 30))
    assert {trial.seed for trial in fills.trials(1)} == {20}
    modes = EXPERIMENTS["A5"].trials()
    puzzles = {trial.seed for trial in modes if trial.arm == DEFAULT}
    squares = {trial.seed for trial in modes if trial.arm == BLIND}
    assert squares < puzzles


# --- verdicts: what is bad must be called bad


def around(mean: float, *, num: int = 8, spread: float = 0.004) -> list[float]:
    """Return values with this mean, the same ones every time."""
    return [mean + spread * (place - (num - 1) / 2) for place in range(num)]


def results_of(value: str, **means: float) -> dict[str, dict[int, dict[str, Any]]]:
    """Return results of several arms for one value."""
    return {
        arm: {seed: {value: each} for seed, each in enumerate(around(mean))}
        for arm, mean in means.items()
    }


def missed(checks: list[Check]) -> set[str]:
    """Name the checks that do not hold."""
    return {check.name for check in checks if not check.holds}


MODE_ARMS = {
    DEFAULT: 0.8,
    EXPOSURE: 0.5,
    FROM_START: 0.8,
    SEED: 0.6,
    f"{SQUARES}{DEFAULT}": 0.4,
    f"{SQUARES}{FROM_START}": 0.5,
    f"{SQUARES}{SEED}": 0.01,
    LATE: 0.1,
    BLIND: 0.1,
}


def judged_modes(**changes: float) -> set[str]:
    """Judge A5 on made-up results."""
    means = MODE_ARMS | changes
    results: Results = {
        arm: {
            seed: {"negative": valid, "nats": 0.1 - valid / 10}
            for seed, valid in enumerate(around(mean))
        }
        for arm, mean in means.items()
    }
    return missed(ModeStages().judge(results, LIMITS["A5"]))


def test_mode_stages_hold_where_they_should() -> None:
    """What the pilot saw holds."""
    assert judged_modes() == set()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({EXPOSURE: 0.75}, EXPOSURE),
        ({DEFAULT: 0.7}, FROM_START),
        ({LATE: 0.6}, "late decay"),
        ({f"{SQUARES}{DEFAULT}": 0.005}, f"{DEFAULT} minus {SEED}"),
        ({f"{SQUARES}{SEED}": 0.45}, "squares"),
        ({BLIND: 0.5}, BLIND),
    ],
)
def test_mode_stages_that_miss_are_told(changes: dict[str, float], word: str) -> None:
    """No gain, a loss, and controls that do not come out: each is named."""
    assert any(word in name for name in judged_modes(**changes))


def judged_fills(*, distinct: float = 0.43, **changes: float) -> set[str]:
    """Judge A6 on made-up results."""
    means = {"default": 0.8, "target only": 0.0, "uniform": 0.8} | changes
    results: Results = {
        arm: {
            seed: {
                "valid_made": valid,
                "distinct_made": distinct if arm == "default" else 0.43,
            }
            for seed, valid in enumerate(around(mean))
        }
        for arm, mean in {**means, "first description": 0.7}.items()
    }
    return missed(FillStages().judge(results, LIMITS["A6"]))


def test_fill_stages_hold_where_they_should_and_miss_by_name() -> None:
    """No gain, a loss, and squares that are all alike: each is told."""
    assert judged_fills() == set()
    assert any("target only" in name for name in judged_fills(default=0.25))
    assert any("minus uniform" in name for name in judged_fills(default=0.7))
    assert any("different" in name for name in judged_fills(distinct=0.37))


def formats(fp16: float, control: float) -> Results:
    """Make results of A1 in which fp16 and the control are off by so much."""
    plain = {
        "accuracy": 0.7,
        "masters_and_moments": ["torch.float32"],
        "loss_scale": "NoScale",
        "skips_overflow": False,
        "scale_after": 1.0,
    }
    scaled = {"loss_scale": "DynamicScale", "skips_overflow": True, "scale_after": 0.5}
    off = {"fp32": 0.0, "bf16": 0.0005, "fp16": fp16, TINY_SCALE: control}
    return {
        arm: {
            seed: plain
            | (scaled if arm == "fp16" else {})
            | {"excess": 0.1 + apart * (1 + seed / 100), "accuracy": 0.7 - apart}
            for seed in range(6)
        }
        for arm, apart in off.items()
    }


def test_formats_are_equivalent_only_within_the_limit() -> None:
    """0.0004 nats is the same, 0.02 is not; a control that is the same is told."""
    judge = Formats().judge
    assert missed(judge(formats(0.0004, 0.3), LIMITS["A1"])) == set()
    assert any(
        "fp16" in name for name in missed(judge(formats(0.02, 0.3), LIMITS["A1"]))
    )
    blind = missed(judge(formats(0.0004, 0.0001), LIMITS["A1"]))
    assert all(TINY_SCALE in name for name in blind)
    assert blind


@pytest.mark.parametrize(
    ("control", "holds"), [(80.0, True), (math.nan, True), (0.0, False)]
)
def test_a_linear_code_must_be_found_out(control: float, *, holds: bool) -> None:
    """Diverged or not a number is found out; as good as the others is not."""
    eight = {"finite": True, "state_bytes": 2.03, "resumed_apart": 0.0}
    results: Results = {
        arm: {seed: eight | {"excess": 0.02 + off} for seed in range(3)}
        for arm, off in ((FP32, 0.0), (EIGHT, 0.001), (LINEAR, control))
    }
    assert (missed(States().judge(results, LIMITS["A4"])) == set()) is holds


# --- the record


class Toy(Experiment):
    """An experiment that costs nothing."""

    name = "A1"
    question = "Does it count?"
    arms = ("one", "two")
    num_seeds = 2
    settings: ClassVar[Mapping[str, Any]] = {"by": 1}

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Count letters."""
        return {"count": len(arm) + seed}

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Judge nothing."""
        del results, limits
        return []


class OtherToy(Toy):
    """The same under another setting."""

    settings: ClassVar[Mapping[str, Any]] = {"by": 2}

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Count letters."""
        return {"count": len(arm) + seed}


def test_a_recorded_trial_is_skipped_by_the_next_process(tmp_path: Path) -> None:
    """It stands on disk after each trial, with the run that made it."""
    path, toy = tmp_path / "record.json", Toy()
    first, *others = toy.trials()
    RecordFile(path).add(toy, first, toy.run(first.arm, first.seed), 1.5)
    again = RecordFile(path)
    assert again.has(toy, first)
    assert not any(again.has(toy, other) for other in others)
    assert again.results(toy) == {"one": {0: {"count": 3}}, "two": {}}


def test_other_settings_drop_what_stands(tmp_path: Path) -> None:
    """Figures of other settings are never mixed with those of today."""
    path, toy, other = tmp_path / "record.json", Toy(), OtherToy()
    trial = toy.trials()[0]
    RecordFile(path).add(toy, trial, {"count": 3}, 1.0)
    again = RecordFile(path)
    assert not again.has(other, trial)
    again.add(other, other.trials()[1], {"count": 4}, 1.0)
    assert RecordFile(path).results(other) == {"one": {}, "two": {0: {"count": 4}}}


def test_runs_that_no_trial_names_are_forgotten(tmp_path: Path) -> None:
    """Two processes, each trial written twice: one run is left, and is named."""
    path, toy = tmp_path / "record.json", Toy()
    for _ in range(2):
        record = RecordFile(path)
        for trial in toy.trials():
            record.add(toy, trial, {"count": 1}, 1.0)
    tree = RecordFile(path)._tree
    assert len(tree["runs"]) == 1
    kept = tree["experiments"]["A1"]["trials"].values()
    assert {trial["run"] for trial in kept} == {0}


# --- the kit


def oracle(batch: Any) -> Tensor:
    """Return log-probabilities of tokens that are the exact posterior, [B, L, 35]."""
    chances = posterior.posterior(batch)
    told = torch.zeros(*batch.tokens.shape, VOCABULARY_SIZE, dtype=torch.float64)
    where = batch.alphabet[:, None].expand_as(chances)
    return told.scatter(2, where, chances).clamp(min=1e-300).log()


def test_only_the_exact_posterior_has_no_excess(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The oracle is at 0; one that spreads a tenth over other tokens pays -log 0.9."""
    batch = evaluation_batch(
        kit.squares(4, Mode.NEGATIVE, Split.VALIDATION), (0.2, 0.6), np.arange(40), 1
    )
    monkeypatch.setattr(kit, "_rated", lambda _, asked: oracle(asked))
    assert kit.tell_batch(None, batch).excess == pytest.approx(0.0, abs=1e-12)
    leak = math.log(0.9)
    monkeypatch.setattr(kit, "_rated", lambda _, asked: oracle(asked) + leak)
    assert kit.tell_batch(None, batch).excess == pytest.approx(-leak, abs=1e-12)


def test_a_training_learns_and_is_repeated_bit_by_bit() -> None:
    """The loss falls in 40 steps; the same seed gives the same weights."""
    settings = kit.KitSettings(
        width=16, num_layers=1, cells_per_step=256, num_steps=40, num_epochs=4
    )
    one, other = (kit.train(settings, 3) for _ in range(2))
    assert np.mean(one.losses[-5:]) < 0.6 * np.mean(one.losses[:5])
    for weight, again in zip(
        one.model.parameters(), other.model.parameters(), strict=True
    ):
        assert torch.equal(weight, again)


def test_stages_are_walked_within_the_training() -> None:
    """Half, three and two tenths: the first description's stages change on time."""
    settings = kit.KitSettings(num_steps=60)
    curriculum = stages.stages(stages.SEED_MODES, settings)
    seen = []
    for epoch in range(settings.num_epochs):
        seen.append(len(mixture_in_force(settings.mixture(), curriculum).modes))
        curriculum.observe(epoch, {})
    assert seen == [1] * 15 + [2] * 9 + [3] * 6


def test_the_cosine_ends_at_a_tenth_and_the_late_decay_at_nothing() -> None:
    """Both rise first; only the late one holds its peak until three quarters."""
    late = kit.KitSettings(num_steps=400)
    cosine = kit.KitSettings(num_steps=400, decay="cosine")
    assert late.rate(250) == late.learning_rate
    assert late.rate(399) < 0.02 * late.learning_rate
    assert cosine.rate(250) < 0.5 * late.learning_rate
    assert cosine.rate(400) == pytest.approx(0.1 * late.learning_rate)


def test_living_bytes_are_counted_once_and_given_back() -> None:
    """Views and in-place operators make nothing; what dies is taken off."""
    model = nn.Linear(4, 4)
    with LiveBytes(model) as held:
        first = torch.ones(1000)
        first[10:20].add_(1.0)
        assert held.now == 4000
        second = first * 2
        del first
        assert held.now == 4000
        model.weight.t()
        del second
    assert held.now == 0
    assert held.peak == 8000
