"""The page tells what was asked for, what is in force, and what really ran."""

from __future__ import annotations

import torch
from torch import nn

from castwise.numerics.census import observe
from castwise.recipes.precision_story import NUM_ROWS, precision_story
from castwise.report import DataTable, Fact, Facts


def test_what_ran_is_told_beside_what_was_asked_for() -> None:
    """A bf16 product under a request for fp32 is called bf16."""
    model, x = nn.Linear(3, 2), torch.randn(5, 3)

    def once() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x).sum()
        loss.backward()

    census = observe(once)
    facts = {
        "effective": census.record(),
        "asked_by": "fp32, asked for",
        "in_force": "1 module",
        "loss_scale": "NoScale",
        "device": "cpu",
        "device_because": "there is no other",
    }
    more = Fact(name="optimizer", value="lion")
    listed, table = precision_story(facts, more=(more,))
    assert isinstance(listed, Facts)
    names = [fact.name for fact in listed.facts]
    assert names[0] == "precision"
    assert names[-2:] == ["optimizer", "device"]
    assert listed.facts[0].value == "bf16"
    assert listed.facts[0].asked == "fp32, asked for"
    assert isinstance(table, DataTable)
    assert len(table.rows) == min(NUM_ROWS, len(census.counts))
    moved = [row[4] for row in table.rows]
    assert moved == sorted(moved, reverse=True)
