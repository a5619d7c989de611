from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from castwise.errors import SettingsError
from castwise.recipes.kenken.latin import BLOCK, latin_squares
from reference.kenken_brute_force import SQUARES

# A uniform generator fails each test for one seed in a hundred thousand.
SIGNIFICANCE = 1e-5


def counted(squares: NDArray[np.uint8]) -> dict[bytes, int]:
    """Count how often each square occurs."""
    _, first, counts = np.unique(
        squares.reshape(len(squares), -1), axis=0, return_index=True, return_counts=True
    )
    return {squares[i].tobytes(): int(n) for i, n in zip(first, counts, strict=True)}


@pytest.mark.parametrize("n", range(3, 17))
def test_every_square_is_latin(n: int) -> None:
    """Each rank stands once in every row and column, at every size."""
    squares = latin_squares(n, 40, seed=n)
    ranks = np.arange(n)
    assert squares.dtype == np.uint8
    assert (np.sort(squares, 1) == ranks[None, :, None]).all()
    assert (np.sort(squares, 2) == ranks[None, None, :]).all()


def test_all_12_squares_of_size_3_are_equally_likely() -> None:
    """Chi-square over 24,576 squares, 11 degrees of freedom."""
    counts = counted(latin_squares(3, 96 * BLOCK, seed=1))
    assert len(counts) == 12
    assert stats.chisquare(list(counts.values())).pvalue > SIGNIFICANCE


def test_all_576_squares_of_size_4_are_equally_likely() -> None:
    """Chi-square over 102,400 squares, 575 degrees of freedom."""
    counts = counted(latin_squares(4, 400 * BLOCK, seed=1))
    assert set(counts) == {np.array(s, np.uint8).tobytes() for s in SQUARES}
    assert stats.chisquare(list(counts.values())).pvalue > SIGNIFICANCE


def num_intercalates(squares: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Count the 2 by 2 Latin subsquares of each square."""
    n = squares.shape[1]
    total = np.zeros(len(squares), dtype=np.int64)
    for r, s in itertools.combinations(range(n), 2):
        for c, d in itertools.combinations(range(n), 2):
            crosswise = (squares[:, r, c] == squares[:, s, d]) & (
                squares[:, r, d] == squares[:, s, c]
            )
            total += crosswise
    return total


@pytest.mark.parametrize(
    ("n", "intercalates", "share"),
    [
        (4, 12, 1 / 4),  # the Klein class has 12 intercalates, the cyclic one 4
        (5, 0, 17280 / 161280),  # the cyclic class of size 5 has none
    ],
)
def test_classes_have_their_share(n: int, intercalates: int, share: float) -> None:
    """The Klein class at size 4 and the cyclic class at size 5, binomial test."""
    squares = latin_squares(n, 160 * BLOCK, seed=2)
    hits = int((num_intercalates(squares) == intercalates).sum())
    assert stats.binomtest(hits, len(squares), share).pvalue > SIGNIFICANCE


def test_squares_that_follow_each_other_are_unrelated() -> None:
    """Thinning suffices: neighbours in the sequence fall into classes independently."""
    klein = num_intercalates(latin_squares(4, 200 * BLOCK, seed=3)) == 12
    together = np.bincount(klein[:-1] * 2 + klein[1:], minlength=4).reshape(2, 2)
    assert stats.chi2_contingency(together).pvalue > SIGNIFICANCE
    lively = num_intercalates(latin_squares(7, 20 * BLOCK, seed=3))
    correlation = stats.pearsonr(lively[:-1], lively[1:])
    assert correlation.pvalue > SIGNIFICANCE


def test_any_stretch_of_the_sequence_can_be_made_alone() -> None:
    """Start, count and workers change nothing; the seed and the size do."""
    whole = latin_squares(5, 2 * BLOCK + 90, seed=4, workers=1)
    assert (whole == latin_squares(5, 2 * BLOCK + 90, seed=4, workers=3)).all()
    for start, count in ((0, 1), (255, 2), (256, 256), (300, 0), (511, 91)):
        part = latin_squares(5, count, seed=4, start=start)
        assert (part == whole[start : start + count]).all()
    assert (latin_squares(5, 50, seed=5) != whole[:50]).any()


def test_blocks_have_keys_of_their_own() -> None:
    """No square of size 9 comes twice among those of several blocks."""
    squares = latin_squares(9, 8 * BLOCK, seed=0)
    assert len(counted(squares)) == len(squares)


def test_negative_starts_and_counts_are_refused() -> None:
    """The message names both."""
    with pytest.raises(SettingsError, match="start=-3"):
        latin_squares(4, 1, seed=0, start=-3)
