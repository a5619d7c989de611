"""`--average`: which weights a recipe evaluates and saves, and that they resume."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from castwise.checkpoints import CheckpointShelf
from castwise.cli import root
from castwise.errors import ContradictionError, SettingsError
from castwise.hybrid import HybridSettings
from castwise.recipes.average_choice import average_copies, averages_of
from castwise.recipes.kenken.settings import KenKenSettings, settings_of
from castwise.recipes.kenken.solver import KIND
from castwise.recipes.language.settings import TrainingSettings
from castwise.recipes.resolvent_lm.model import RECIPE
from castwise.training.averages import ExponentialAverage, LatestAverage, NoAverages

CONFIG = """
text: {sequence_length: 24, batch_size: 3, tokenizer: bytes}
model: {dim: 16, num_blocks: 2, num_chains: 5, hidden: 24, num_heads: 2}
training:
  num_steps: 14
  evaluate_every: 7
  num_validation: 6
  checkpoint_every: 5
  log_every: 2
"""
LAWA = ("--average", "lawa", "--average-every", "2", "--average-count", "3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small config, and phases that predict at once."""
    folder = tmp_path_factory.mktemp("lm")
    (folder / "small.yaml").write_text(CONFIG)
    phases = HybridSettings(
        warmup_steps=3, full_steps=3, correct_steps=2, confidence_threshold=0.01,
        verification="none",
    )  # fmt: skip
    (folder / "hybrid.yaml").write_text(phases.to_yaml())
    return folder


def train(place: Path, out: Path, *more: str) -> Any:
    """Run the command line in this process."""
    arguments = [
        *("train", "resolvent_lm", "--config", str(place / "small.yaml")),
        *("--out", str(out), "--data", str(place / "data"), "--threads", "1", *more),
    ]
    return root.main(arguments, standalone_mode=False)


def tree_of(out: Path, kind: str) -> Any:
    """What the newest checkpoint holds."""
    found = CheckpointShelf(folder=out / "checkpoints", kind=kind).latest().value
    assert found is not None
    return found.tree


def assert_same(one: Any, other: Any) -> None:
    """Every tensor has the same bits."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        one, other = list(one.values()), list(other.values())
    if isinstance(one, list):
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("flags", "phases"), [(LAWA, False), (("--average", "ema"), True)]
)
def test_averages_are_saved_and_resume_bit_by_bit(
    place: Path, tmp_path: Path, flags: tuple[str, ...], phases: bool
) -> None:
    """A run that stopped at step 5 ends as the one that never did."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    more = ("--hybrid", str(place / "hybrid.yaml")) if phases else ()
    assert train(place, whole, *flags, *more) == 0
    shutil.copytree(whole, halved)
    for later in sorted((halved / "checkpoints").iterdir()):
        if "5" not in later.name:
            shutil.rmtree(later) if later.is_dir() else later.unlink()
    assert tree_of(halved, RECIPE.kind)["position"]["step"] == 5
    assert train(place, halved, "--resume") == 0
    ours, theirs = tree_of(halved, RECIPE.kind), tree_of(whole, RECIPE.kind)
    assert ours["position"]["step"] == theirs["position"]["step"] == 14
    assert_same(ours["model"], theirs["model"])
    assert_same(ours["averages"], theirs["averages"])
    averaged = ours["averages"]["averages"]
    assert any(
        not torch.equal(average, ours["model"][name])
        for name, average in averaged.items()
    )
    if flags == LAWA:
        name = next(iter(averaged))
        latest = torch.stack([kept[name] for kept in ours["averages"]["latest"]])
        assert len(latest) == 3
        torch.testing.assert_close(averaged[name], latest.mean(0))


def test_a_resumed_run_keeps_its_average(place: Path, tmp_path: Path) -> None:
    """Another one is a contradiction that names both."""
    assert train(place, tmp_path / "run", "--steps", "3") == 0
    with pytest.raises(ContradictionError, match=r"average is 'none' there.*'ema'"):
        train(place, tmp_path / "run", "--resume", "--average", "ema")


@pytest.mark.slow
def test_the_solver_takes_the_average_that_the_flag_asked_for(tmp_path: Path) -> None:
    """KenKen with the mean of the latest weights instead of its exponential one."""
    out = tmp_path / "run"
    arguments = [
        *("train", "kenken", "--preset", "tiny", "--sizes", "4", "--steps", "8"),
        *("--modes", "standard", "--threads", "1", "--evaluate-every", "8", *LAWA),
        *("--out", str(out), "--data", str(tmp_path / "data")),
    ]
    assert root.main(arguments, standalone_mode=False) == 0
    averages = tree_of(out, KIND)["averages"]
    assert len(averages["latest"]) == 3
    assert averages["num_updates"] == 8


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"average": "lawn"}, r"none, ema, lawa.*'lawn'.*did you mean lawa"),
        ({"average_decay": 1.0}, r"average_decay must lie in \[0, 1\), got 1.0"),
        ({"average_every": 0}, "average_every must be at least 1, got 0"),
        ({"average_count": -1}, "average_count must be at least 1, got -1"),
    ],
)
def test_an_average_without_a_meaning_is_refused(
    changes: dict[str, Any], message: str
) -> None:
    """By both recipes, naming the setting."""
    with pytest.raises(SettingsError, match=message):
        replace(settings_of("tiny", {}), **changes)
    with pytest.raises(SettingsError, match=rf"training\..*{message}"):
        TrainingSettings(**changes)


def test_each_name_is_an_average() -> None:
    """Exponential, of the latest, or none; with the copies that it keeps."""
    model, settings = nn.Linear(3, 2), settings_of("tiny", {})
    kinds = {"ema": ExponentialAverage, "lawa": LatestAverage, "none": NoAverages}
    copies = {"ema": 1, "lawa": 5, "none": 0}
    for name, kind in kinds.items():
        asked = replace(settings, average=name, average_count=5)
        assert isinstance(averages_of(asked, model, None), kind)
        assert average_copies(asked) == copies[name]


def test_a_run_of_before_the_flag_had_its_exponential_average() -> None:
    """Its description lacks the new names."""
    described = settings_of("small", {}).describe()
    for name in ("average", "average_every", "average_count"):
        del described[name]
    assert KenKenSettings.from_description(described) == settings_of("small", {})
