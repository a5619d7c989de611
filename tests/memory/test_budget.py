"""Recompute by a budget: the step fits, at the least time, or says by how much not."""

from __future__ import annotations

import itertools

import pytest
import torch

import castwise as cw
from castwise.errors import BudgetError
from castwise.memory.budget import BlockCost, best_choices, plan_for_budget
from castwise.memory.lifetimes import Ledger
from castwise.memory.recompute import recompute
from memory_models import Gpt, gpt_batch, gradients_of, same_bits, token_loss


def cost(number: int, saved: int, seconds: float) -> BlockCost:
    """A block that holds a quarter when stored, a tenth when recomputed."""
    return BlockCost(
        fqn=f"blocks.{number}",
        saved_bytes=saved,
        stored_bytes=saved // 2,
        recomputed_bytes=saved // 10,
        forward_seconds=seconds,
        store_seconds=seconds / 3,
    )


@pytest.mark.parametrize("stores", [False, True])
def test_the_curve_is_that_of_all_combinations(stores: bool) -> None:
    """Against every combination of choices of six unlike blocks."""
    costs = [
        cost(number, saved, seconds)
        for number, (saved, seconds) in enumerate(
            [(100, 1.0), (50, 0.2), (210, 3.0), (90, 0.9), (33, 0.5), (70, 0.1)]
        )
    ]
    options = [each.options(stores=stores) for each in costs]
    every = [
        (sum(o[1] for o in chosen), sum(o[2] for o in chosen))
        for chosen in itertools.product(*options)
    ]
    front = best_choices(costs, stores=stores)
    for saved, _ in every:
        least = min(seconds for other, seconds in every if other >= saved)
        found = next(p for p in front if p.bytes_saved >= saved)
        assert found.extra_seconds == pytest.approx(least)
    assert front[0].choices == ("keep",) * 6
    assert [p.bytes_saved for p in front] == sorted({p.bytes_saved for p in front})


def test_of_equal_blocks_the_first_are_recomputed() -> None:
    """What the last ones held is free before the backward fills the first ones up."""
    front = best_choices([cost(n, 100, 1.0) for n in range(5)], stores=False)
    assert [point.choices.index("keep") for point in front[:-1]] == [0, 1, 2, 3, 4]
    assert [point.choices.count("recompute") for point in front] == [0, 1, 2, 3, 4, 5]


def test_hundred_unlike_blocks_are_planned_at_once() -> None:
    """The front is kept short."""
    costs = [cost(n, 1000 + 37 * n**2, 1 + 0.01 * n**1.5) for n in range(100)]
    front = best_choices(costs, stores=True)
    assert front[-1].choices == ("recompute",) * 100
    assert len(front) <= 512


@pytest.mark.parametrize("store", [None, "fp16"])
@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_step_within_the_budget_is_measured_within_it(
    share: float, store: str | None
) -> None:
    """A real step, every allocation counted, holds what was asked for."""
    torch.manual_seed(3)
    model, batch = Gpt(width=32, depth=4), gpt_batch(4, 64)
    wanted = gradients_of(model, batch)
    full = cw.estimate(model, batch, token_loss).peak_bytes
    every = cw.estimate(model, batch, token_loss, recompute=recompute).peak_bytes
    budget = int(every + share * (full - every))
    plan = plan_for_budget(model, batch, token_loss, budget=budget, store=store)
    assert every <= plan.peak_bytes <= budget
    placed = plan.put(model)
    ledger = Ledger(model)
    for weight in model.parameters():
        ledger.name(weight, kind="weights")
    with ledger:
        token_loss(model(batch[0]), batch[1]).backward()
    assert ledger.lifetimes().peak()[1] <= 1.001 * budget
    exact = not plan.modules("store")
    assert same_bits(gradients_of(model, batch), wanted) == exact
    placed.remove()
    assert same_bits(gradients_of(model, batch), wanted)


def test_blocks_are_recomputed_only_as_far_as_needed() -> None:
    """A budget that holds everything costs nothing; a smaller one costs more."""
    torch.manual_seed(3)
    model, batch = Gpt(width=32, depth=4), gpt_batch(4, 64)
    free = plan_for_budget(model, batch, token_loss, budget=1 << 40)
    assert free.extra_seconds == 0
    assert set(free.choices.values()) == {"keep"}
    some = plan_for_budget(
        model, batch, token_loss, budget=int(0.9 * free.unplanned_bytes)
    )
    assert 1 <= len(some.modules("recompute")) < 4
    assert 0 < some.extra_seconds < some.forward_seconds


def test_a_budget_that_cannot_be_met_says_by_how_much() -> None:
    """And what would help."""
    model, batch = Gpt(depth=2), gpt_batch()
    with pytest.raises(BudgetError, match=r"misses it by .* MiB.*halve the batch"):
        plan_for_budget(model, batch, token_loss, budget=1000)
