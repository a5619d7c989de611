"""A watch in the journal of a run, and from there in its report."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import castwise as cw
from castwise.recipes.watch_story import journaled_watch, watch_story
from castwise.training.journal import Journal, read_journal


def train(folder: Path, first: int, last: int) -> None:
    """Steps of a small model, watched every fourth step."""
    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    optimizer = torch.optim.AdamW(model.parameters())
    run = cw.prepare(model, optimizer, cw.preset("bf16-mixed"))
    with (
        Journal(folder, tensorboard=False) as journal,
        journaled_watch(run, journal, every=4, first_step=first),
    ):
        for _ in range(first, last):
            with run.step() as step:
                step.backward(model(torch.randn(7, 5)).square().mean())


def test_windows_stand_in_the_journal_and_go_on_after_a_resume(tmp_path: Path) -> None:
    """A line holds the measures as numbers, and the whole window for the report."""
    train(tmp_path, 0, 6)
    train(tmp_path, 6, 11)
    records = read_journal(tmp_path / "metrics.jsonl")
    assert [record.step for record in records] == [1, 5, 9]
    assert {record.event for record in records} == {"watch"}
    assert 0 <= records[0].values["gradient_underflow_fp16"] < 1
    assert records[0].values["lost_updates"] == 0
    sections = watch_story(records)
    assert [section.title for section in sections] == [
        "Numbers by exponent",
        "Over time",
        "Every tensor",
    ]
    assert watch_story([]) == ()
