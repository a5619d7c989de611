from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from castwise.errors import SettingsError
from castwise.recipes.kenken.streams import (
    below,
    item_keys,
    next_word,
    permuted,
    shuffle,
    stream_key,
    uniforms,
    words,
)

# A correct generator fails each of these tests for one seed in a million; the seeds
# are fixed, so a failure is a change of the generator.
SIGNIFICANCE = 1e-6


def test_the_finaliser_is_splitmix64() -> None:
    """Key 0 gives the published first words of SplitMix64 for seed 0."""
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert words(np.zeros(1, np.uint64), 3)[0].tolist() == published


def test_kernels_and_arrays_draw_the_same_words() -> None:
    """What a kernel draws one by one equals what numpy reads at once, anywhere."""
    keys = item_keys(5, "test", 3, [0, 1, 2**40])
    for key, row in zip(keys, words(keys, 100), strict=True):
        state = np.array([key], dtype=np.uint64)
        assert [next_word(state) for _ in range(100)] == row.tolist()
    assert (words(keys, 10, start=90) == words(keys, 100)[:, 90:]).all()


def test_every_part_of_a_key_matters() -> None:
    """Seed, name, epoch and index each lead to other words; order does not matter."""
    base = item_keys(1, "a", 2, 3)[0]
    others = [
        item_keys(2, "a", 2, 3)[0],
        item_keys(1, "b", 2, 3)[0],
        item_keys(1, "a", 3, 3)[0],
        item_keys(1, "a", 2, 4)[0],
        item_keys(1, "a", 3, 2)[0],
    ]
    assert len({int(base), *map(int, others)}) == 6
    together = item_keys(1, "a", 2, np.arange(1000))
    assert together[700] == item_keys(1, "a", 2, 700)[0]
    assert len(set(together.tolist())) == 1000
    assert stream_key(1, "a") != stream_key(1, "a", 0)


def test_numbers_are_uniform_and_neighbours_are_independent() -> None:
    """Values, bits and pairs of neighbouring items pass chi-square tests."""
    draws = uniforms(item_keys(0, "uniform", 0, np.arange(20_000)), 10)
    counts = np.bincount((draws.ravel() * 64).astype(int), minlength=64)
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE
    coarse = (draws * 8).astype(int)
    for first, second in (
        (coarse[:-1, 0], coarse[1:, 0]),
        (coarse[:, 0], coarse[:, 1]),
    ):
        pairs = np.bincount(first * 8 + second, minlength=64)
        assert stats.chisquare(pairs).pvalue > SIGNIFICANCE
    bits = np.unpackbits(
        words(item_keys(0, "bits", 0, np.arange(5000)), 4).view(np.uint8).ravel()
    ).reshape(-1, 64)
    ones = bits.sum(0)
    deviation = np.abs(ones - len(bits) / 2) / np.sqrt(len(bits) / 4)
    assert deviation.max() < stats.norm.isf(SIGNIFICANCE / 64)


def test_below_and_shuffle_are_uniform() -> None:
    """Bounded integers and the 24 orders of four items come equally often."""
    state = np.array([stream_key(0, "below")], dtype=np.uint64)
    counts = np.bincount([below(state, 7) for _ in range(20_000)])
    assert len(counts) == 7
    assert stats.chisquare(counts).pvalue > SIGNIFICANCE
    orders: dict[tuple[int, ...], int] = {}
    for _ in range(12_000):
        items = np.arange(4)
        shuffle(state, items)
        order = tuple(items.tolist())
        orders[order] = orders.get(order, 0) + 1
    assert len(orders) == 24
    assert stats.chisquare(list(orders.values())).pvalue > SIGNIFICANCE


@pytest.mark.parametrize("length", [1, 2, 3, 7, 63, 64, 65, 1000])
def test_an_epoch_visits_every_item_once(length: int) -> None:
    """The permutation is a bijection for every length, and differs by key."""
    places = np.arange(length)
    orders = [
        permuted(item_keys(0, "epoch", epoch, 0), places, length) for epoch in (0, 1)
    ]
    for order in orders:
        assert sorted(order.tolist()) == places.tolist()
    assert length < 64 or (orders[0] != orders[1]).mean() > 0.9


def test_each_item_comes_to_each_place_equally_often() -> None:
    """Over many epochs of five items, the place-item table is flat."""
    keys = item_keys(3, "epoch", np.arange(4000), 0)
    counts = np.zeros((5, 5), dtype=int)
    for place in range(5):
        items = permuted(keys, np.full(4000, place), 5)
        counts[place] = np.bincount(items, minlength=5)
    # rows and columns sum to 4000, which leaves 16 degrees of freedom
    statistic = ((counts - 800) ** 2 / 800).sum() * 16 / 20
    assert stats.chi2.sf(statistic, 16) > SIGNIFICANCE


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_seeds_outside_the_range_are_refused(seed: int) -> None:
    """A seed that would wrap around is refused by name."""
    with pytest.raises(SettingsError, match=f"got {seed};"):
        stream_key(seed, "x")
