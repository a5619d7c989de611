"""The largest size that fits is found with few questions, and confirmed."""

from __future__ import annotations

import pytest
import torch

from castwise.errors import BudgetError, SettingsError
from castwise.memory.fit import confirmed, largest, resized, size_of


@pytest.mark.parametrize("budget", [1_000, 1_049, 1_050, 7_777, 123_456, 999_999])
@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_largest_size_is_found_exactly(budget: int, power: float) -> None:
    """For peaks that grow in proportion and with the square, to the very size."""
    asked: list[int] = []

    def peak_of(size: int) -> int:
        asked.append(size)
        return 950 + int(50 * size**power)

    found = largest(peak_of, budget=budget, most=1 << 20)
    assert peak_of(found.size) <= budget < peak_of(found.size + 1)
    assert len(set(asked)) - 1 <= 32
    assert found.peak_bytes == peak_of(found.size)
    assert not found.is_most


def test_a_linear_peak_takes_few_questions() -> None:
    """The line between two sizes leads there at once."""
    asked: list[int] = []

    def peak_of(size: int) -> int:
        asked.append(size)
        return 10**6 + 1234 * size

    largest(peak_of, budget=3 * 10**6, most=1 << 20)
    assert len(asked) <= 20


def test_the_search_ends_at_the_largest_size_of_use() -> None:
    """And says so."""
    found = largest(lambda size: size, budget=1000, most=37)
    assert found.size == 37
    assert found.is_most


def test_a_budget_that_holds_nothing_says_by_how_much() -> None:
    """The smallest step, the budget, and the difference."""
    with pytest.raises(BudgetError, match=r"needs 3\.0 MiB .* 1\.0 MiB, 2\.0 MiB too"):
        largest(lambda size: (size + 2) << 20, budget=1 << 20, most=8)
    with pytest.raises(SettingsError, match="sizes from 1 on"):
        largest(lambda size: size, budget=1, most=0)


def test_a_size_whose_real_step_is_larger_shrinks() -> None:
    """An estimate that is a tenth too low costs a tenth of the size, no crash."""
    found = largest(lambda size: 100 * size, budget=10_000, most=1000)
    measured: list[int] = []

    def measure(size: int) -> int:
        measured.append(size)
        return 110 * size

    sure = confirmed(found, lambda size: 100 * size, measure)
    assert found.size == 100
    assert sure.size == 90
    assert sure.measured_bytes == 9900
    assert measured == [100, 90]


def test_steps_that_never_fit_end_in_an_error() -> None:
    """The measured and the estimated figure are named."""
    found = largest(lambda size: size, budget=10, most=1000)
    with pytest.raises(BudgetError, match="were estimated for size 10"):
        confirmed(found, lambda size: size, lambda _: 1 << 30)


def test_a_batch_is_resized_with_its_masks_and_its_target() -> None:
    """Whatever is as long as the batch follows it; the rest stays."""
    x, mask, y = torch.arange(6).view(3, 2), torch.ones(2, 2), torch.arange(3)
    inputs, found_mask, target = resized((x, mask, y), 5)
    assert inputs.tolist() == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3]]
    assert found_mask is mask
    assert target.tolist() == [0, 1, 2, 0, 1]
    tokens = torch.zeros(2, 7, dtype=torch.long)
    longer = resized((tokens, tokens), 9, dim=1)
    assert [each.shape for each in longer] == [(2, 9), (2, 9)]
    assert size_of((tokens, tokens), dim=1) == 7
    with pytest.raises(SettingsError, match="choose another dimension"):
        size_of((torch.zeros(3), torch.zeros(3)), dim=1)
