"""Validation and search on two processes: what one finds that sees all batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.functional import mse_loss

import castwise as cw
from castwise.errors import CastwiseError, SettingsError
from castwise.numerics.over_ranks import all_say, first_says
from two_ranks import TwoRanks

POLICY = cw.preset("bf16-mixed")


class Net(nn.Module):
    """Two products, of which the second one subtracts what is nearly equal."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.delicate = nn.Linear(6, 9), nn.Linear(9, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """How much of the output depends on the last digits grows with the input."""
        y = self.delicate(self.first(x).tanh() + 30)
        out: torch.Tensor = y - y.mean()
        return out


def net() -> Net:
    """The same weights on every process."""
    torch.manual_seed(0)
    return Net()


def batches_of(*ranks: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Two batches of rank 0; three of rank 1, wilder ones."""
    found = []
    for rank in ranks:
        for number in range(2 + rank):
            draws = torch.Generator().manual_seed(10 * rank + number)
            x = torch.randn(5, 6, generator=draws) * (1 + 2 * rank)
            found.append((x, torch.zeros(5, 4)))
    return found


def plain(report: cw.Validation) -> dict[str, Any]:
    """A record without names of operators, whose lines differ by process."""
    return {**report.record(), "operators": len(report.operators)}


def validated(rank: int) -> dict[str, Any]:
    """What this rank is told, together and alone."""
    both = cw.validate(net(), batches_of(rank), mse_loss, POLICY, over_ranks=True)
    alone = cw.validate(net(), batches_of(rank), mse_loss, POLICY)
    return {"both": plain(both), "alone": plain(alone)}


def test_the_worst_of_all_ranks_is_judged(two_ranks: TwoRanks) -> None:
    """Every rank holds the report of one process that saw all batches."""
    whole = plain(cw.validate(net(), batches_of(0, 1), mse_loss, POLICY))
    zero, one = two_ranks(validated)
    assert zero["both"] == one["both"]
    assert zero["alone"]["results"] != one["alone"]["results"]
    assert zero["both"]["num_batches"] == 5
    for key in ("results", "modules", "loss_drift", "loss_floor", "holds", "lifted"):
        assert zero["both"][key] == whole[key], key


def searched(rank: int, over_ranks: bool) -> dict[str, Any]:
    """What this rank finds."""
    settings = cw.SearchSettings(over_ranks=over_ranks, num_probes=2)
    found = cw.search(
        net(), batches_of(rank), mse_loss, cw.Budget(gradient=0.01), settings=settings
    )
    return {
        "policy": found.policy.to_yaml(),
        "errors": [trial.errors for trial in found.trials],
        "usage": found.best.usage,
        "num_batches": found.num_batches,
    }


def test_all_ranks_find_the_policy_that_holds_on_all(two_ranks: TwoRanks) -> None:
    """Trials know the batches of both, also where one rank has more of them."""
    zero, one = two_ranks(searched, True)
    assert zero == one
    assert zero["num_batches"] == 5
    assert max(len(errors) for errors in zero["errors"]) == 5
    alone = [each["errors"] for each in two_ranks(searched, False)]
    assert alone[0] != alone[1]
    settings = cw.SearchSettings(num_probes=2)
    budget = cw.Budget(gradient=0.01)
    whole = cw.search(net(), batches_of(0, 1), mse_loss, budget, settings=settings)
    assert zero["policy"] == whole.policy.to_yaml()
    assert zero["usage"] == pytest.approx(whole.best.usage, rel=1e-6)


def failing(rank: int) -> list[str]:
    """Rank 1 has a batch that does not fit, or cannot answer at all."""
    batches = batches_of(rank)
    if rank:
        batches[1] = (torch.zeros(5, 7), torch.zeros(5, 4))
    said = []
    for attempt in (
        lambda: cw.validate(net(), batches, mse_loss, POLICY, over_ranks=True),
        lambda: first_says(lambda: _refuse(rank), together=True),
    ):
        try:
            attempt()
        except CastwiseError as error:
            said.append(str(error))
    said.append(str(all_say(lambda: rank * 3, together=True)))
    return said


def _refuse(rank: int) -> None:
    raise SettingsError(f"nothing on rank {rank}")


def test_a_rank_that_cannot_go_on_stops_all(two_ranks: TwoRanks) -> None:
    """With its own error there, and its number elsewhere; nobody waits."""
    zero, one = two_ranks(failing)
    assert zero[0].startswith("rank 1 could not go on: ")
    assert one[0] in zero[0]
    assert "test_over_ranks.py" in one[0]
    assert zero[1] == "nothing on rank 0"
    assert one[1] == "rank 0 could not go on: nothing on rank 0"
    assert zero[2] == one[2] == "[0, 3]"


def test_without_processes_nothing_is_asked_together() -> None:
    """The remedy is named; alone, answers are one's own."""
    with pytest.raises(SettingsError, match="init_process_group"):
        cw.validate(net(), batches_of(0), mse_loss, POLICY, over_ranks=True)
    settings = cw.SearchSettings(over_ranks=True)
    with pytest.raises(SettingsError, match="a search over ranks"):
        budget = cw.Budget(gradient=0.1)
        cw.search(net(), batches_of(0), mse_loss, budget, settings=settings)
    assert all_say(lambda: 7, together=False) == [7]
    assert first_says(lambda: 7, together=False) == 7
