"""`--hybrid --strategy ddp`: two processes predict, refuse and land as one run."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from castwise.cli import root
from castwise.decision import Decision
from castwise.distributed.ranks import Ranks
from castwise.errors import SettingsError
from castwise.recipes.launch import Launch
from castwise.training.journal import read_journal
from castwise.training.strategy import Strategy
from every_phase import every_phase
from two_ranks import TwoRanks

STEPS = 36
WORDS = {
    "kenken": (
        *("--preset", "tiny", "--sizes", "4", "--modes", "standard"),
        *("--evaluate-every", "36"),
    ),
    "resolvent_lm": ("--evaluate-every", "36", "--config"),
}
CONFIG = """
text: {sequence_length: 24, batch_size: 4}
model: {dim: 16, num_blocks: 2, num_chains: 5, hidden: 24, num_heads: 2}
training: {num_validation: 6, checkpoint_every: 36, log_every: 2}
"""
LAST_BITS = 2e-6
"""Of a loss in fp32 after a few steps; measured: 2e-7."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Settings under which every phase occurs within a few steps, and a cache."""
    place = tmp_path_factory.mktemp("place")
    settings = every_phase()
    (place / "hybrid.yaml").write_text(settings.to_yaml())
    (place / "small.yaml").write_text(CONFIG)
    return place


def words_of(recipe: str, place: Path, out: str) -> list[str]:
    """A run as a user starts it."""
    config = [str(place / "small.yaml")] if recipe == "resolvent_lm" else []
    return [
        *("train", recipe, *WORDS[recipe], *config, "--steps", str(STEPS)),
        *("--threads", "1", "--data", str(place / "data")),
        *("--hybrid", str(place / "hybrid.yaml"), "--out", str(place / out)),
    ]


def played(rank: int, recipe: str, words: list[str]) -> dict[str, Any]:
    """Run a command as one of two ranks; what it decided, and its weights."""
    room = importlib.import_module(f"castwise.recipes.{recipe}.recipe")
    build, launch, kept = room._build, room.open_launch, []

    @contextmanager
    def among_two(*, asked: Any, device: Decision[Any], **_: Any) -> Iterator[Launch]:
        ranks = Ranks(rank=rank, num_ranks=2, local_rank=rank)
        strategy = Strategy(name=asked, ranks=ranks)
        console = Console(quiet=True)
        yield Launch(strategy=strategy, device=device, console=console)

    def watched(*args: Any, **kwargs: Any) -> Any:
        kept.append(build(*args, **kwargs))
        return kept[-1]

    room.open_launch, room._build = among_two, watched
    try:
        assert root.main(words, standalone_mode=False) == 0
    finally:
        room.open_launch, room._build = launch, build
    hybrid = kept[0].made.hybrid
    model = hybrid.run.model
    return {
        "transitions": [str(each) for each in hybrid.transitions],
        "counts": (hybrid.statistics.tries, hybrid.statistics.accepts),
        "weights": {n: w.detach().clone() for n, w in model.named_parameters()},
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", WORDS)
def test_both_processes_predict_and_land_together(
    two_ranks: TwoRanks, place: Path, recipe: str
) -> None:
    """Transitions and every bit of the weights; it begins as one process does."""
    alone, both = (f"{recipe}-{each}" for each in ("alone", "both"))
    assert root.main(words_of(recipe, place, alone), standalone_mode=False) == 0
    words = [*words_of(recipe, place, both), "--strategy", "ddp"]
    zero, one = two_ranks(played, recipe, words)
    assert zero["transitions"] == one["transitions"]
    assert zero["counts"] == one["counts"]
    assert min(zero["counts"]) > 0  # tried and accepted, or the test shows nothing
    for name, weight in zero["weights"].items():
        assert torch.equal(weight, one["weights"][name]), name
    runs = [
        [each for each in read_journal(place / out) if each.event == "train"]
        for out in (alone, both)
    ]
    for mine, theirs in zip(*(lines[:2] for lines in runs), strict=True):
        assert theirs.values["loss"] == pytest.approx(
            mine.values["loss"], rel=LAST_BITS
        )


def test_sharded_weights_are_refused_by_name(two_ranks: TwoRanks, place: Path) -> None:
    """Before there is a model."""
    words = [*words_of("kenken", place, "sharded"), "--strategy", "fsdp"]
    for found in two_ranks(refused, words):
        assert "--hybrid moves whole weights" in found
        assert "take --strategy ddp" in found


def refused(rank: int, words: list[str]) -> str:
    """Return why a rank does not run."""
    with pytest.raises(SettingsError) as caught:
        played(rank, "kenken", words)
    return str(caught.value)
