from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from castwise.errors import PuzzleError
from castwise.recipes.kenken.alphabets import Mode
from castwise.recipes.kenken.dataset import generate_puzzle_set, reveal_mask
from castwise.recipes.kenken.puzzles import Cage, Hints, Puzzle, puzzle_at

Edit = Callable[[list[Cage]], list[Cage]]

# 1 2 3    a a b    the only 3x3 grid that the cages below allow is this one
# 2 3 1    c c b
# 3 1 2    d d e
CAGES = [
    Cage(cells=((0, 0), (0, 1)), op="+", target=3),
    Cage(cells=((0, 2), (1, 2)), op="-", target=2),
    Cage(cells=((1, 0), (1, 1)), op="x", target=6),
    Cage(cells=((2, 0), (2, 1)), op="/", target=3),
    Cage(cells=((2, 2),), op="=", target=2),
]


def build(
    cages: list[Cage] = CAGES, hints: Hints | None = None, mode: Mode = Mode.STANDARD
) -> Puzzle:
    """Make a puzzle of size 3."""
    return Puzzle(size=3, mode=mode, cages=tuple(cages), hints=hints)


def changed(number: int, cage: Cage) -> list[Cage]:
    """Replace one cage."""
    return [cage if k == number else held for k, held in enumerate(CAGES)]


def test_a_sound_puzzle_becomes_arrays() -> None:
    """Ranks, codes and targets are where the puzzle has them."""
    arrays = build(hints=((None, 2, None), (None,) * 3, (3, None, 2))).arrays()
    assert arrays.cage_id.tolist() == [[0, 0, 1], [2, 2, 1], [3, 3, 4]]
    assert arrays.cage_op.tolist() == [2, 3, 4, 5, 1]
    assert arrays.cage_target.tolist() == [3, 2, 6, 3, 2]
    assert arrays.hints.tolist() == [[-1, 1, -1], [-1, -1, -1], [2, -1, 1]]


@pytest.mark.parametrize("mode", Mode)
def test_rows_of_a_set_become_puzzles_and_arrays_again(mode: Mode) -> None:
    """What a set holds survives the way through `Puzzle`, hints included."""
    puzzles = generate_puzzle_set(5, mode, 20, 1, "train")
    masks = reveal_mask(0, 0, np.arange(20), 5, 0.4)
    for k in range(20):
        arrays = puzzle_at(puzzles, k, masks[k]).arrays()
        num = puzzles.num_cages[k]
        assert (arrays.cage_id == puzzles.cage_id[k]).all()
        assert (arrays.cage_op == puzzles.cage_op[k, :num]).all()
        assert (arrays.cage_target == puzzles.cage_target[k, :num]).all()
        assert (
            arrays.hints == np.where(masks[k], puzzles.solution[k].astype(int), -1)
        ).all()


@pytest.mark.parametrize(
    ("cages", "sentence"),
    [
        (
            changed(0, Cage(cells=(), op="+", target=3)),
            r"cage 1 \(3\+\) needs at least one cell",
        ),
        (
            changed(0, Cage(cells=((0, 0), (0, -1)), op="+", target=3)),
            "inside the 3x3 grid; got row 1, column 0",
        ),
        (
            changed(4, Cage(cells=((2, 2), (3, 2)), op="+", target=3)),
            "inside the 3x3 grid; got row 4, column 3",
        ),
        (
            changed(0, Cage(cells=((0, 0), (1, 1)), op="+", target=3)),
            "needs cells that touch along their sides; got pieces apart",
        ),
        (
            changed(0, Cage(cells=((0, 0), (0, 1)), op="^", target=3)),
            r"one of the operations = \+ - x /; got '\^'",
        ),
        (
            changed(0, Cage(cells=((0, 0), (0, 1)), op="=", target=3)),
            "the operation = needs one cell; got 2",
        ),
        (
            changed(4, Cage(cells=((2, 2),), op="+", target=2)),
            r"the operation \+ needs two cells or more; got 1",
        ),
        (
            changed(1, Cage(cells=((0, 2), (1, 2), (2, 2)), op="-", target=1)),
            "the operation - needs two cells; got 3",
        ),
        (
            changed(1, Cage(cells=((0, 2), (1, 2), (2, 2)), op="/", target=1)),
            "the operation / needs two cells; got 3",
        ),
        (
            changed(0, Cage(cells=((0, 0), (0, 1)), op="+", target=2**31)),
            "a target within",
        ),
        (
            changed(1, Cage(cells=((0, 2), (1, 2), (2, 2)), op="+", target=6)),
            "got row 3, column 3 a second time",
        ),
        (CAGES[:4], "must lie in a cage; got none at row 3, column 3"),
        (
            changed(0, Cage(cells=((0, 0), (0, 1)), op="+", target=2)),
            r"digits 1 2 3 must be able to make the clue 2\+",
        ),
        (
            changed(0, Cage(cells=((0, 0), (0, 1)), op="x", target=5)),
            "must be able to make the clue 5x",
        ),
        (
            changed(1, Cage(cells=((0, 2), (1, 2)), op="-", target=3)),
            "must be able to make the clue 3-",
        ),
        (
            changed(3, Cage(cells=((2, 0), (2, 1)), op="/", target=1)),
            "must be able to make the clue 1/",
        ),
        (
            changed(4, Cage(cells=((2, 2),), op="=", target=4)),
            "must be able to make the clue 4=",
        ),
    ],
)
def test_each_impossible_cage_has_its_sentence(
    cages: list[Cage], sentence: str
) -> None:
    """Shape, cover, operation and target are told apart and named."""
    with pytest.raises(PuzzleError, match=sentence):
        build(cages)


@pytest.mark.parametrize(
    ("hints", "sentence"),
    [
        (((1, 2, 3),), "3 rows of 3 entries; got 1 rows of 3"),
        (((1, 2), (None,) * 3, (None,) * 3), "rows of 2 or 3 entries"),
        (((4, None, None), (None,) * 3, (None,) * 3), "one of the digits 1 2 3; got 4"),
        (((1, None, 1), (None,) * 3, (None,) * 3), "the hint 1 twice in row 1"),
        (((1, None, None), (1, None, None), (None,) * 3), "1 twice in column 1"),
        (((3, None, None), (None,) * 3, (None,) * 3), r"agree with the clue 3\+"),
        (((1, None, None), (None, 1, None), (None,) * 3), "agree with the clue 6x"),
    ],
)
def test_hints_that_contradict_have_their_sentence(hints: Hints, sentence: str) -> None:
    """A hint outside the alphabet, the square or its clue is named with its cell."""
    with pytest.raises(PuzzleError, match=sentence):
        build(hints=hints)


def test_the_digits_of_the_mode_decide_what_is_possible() -> None:
    """Zero and negative digits make clues that standard digits cannot, and back."""
    pair = ((0, 0), (0, 1))
    rest = [Cage(cells=((0, 2), (1, 2), (1, 1), (1, 0)), op="x", target=0)]
    rest += [Cage(cells=((2, 0), (2, 1), (2, 2)), op="+", target=3)]
    zero = [Cage(cells=pair, op="/", target=0), *rest]
    assert build(zero, mode=Mode.ZERO_INCLUSIVE).cages[0].target == 0
    with pytest.raises(PuzzleError, match="clue 0/"):
        build(zero)
    negative = [
        Cage(cells=pair, op="x", target=-1),
        rest[0],
        Cage(cells=rest[1].cells, op="+", target=0),
    ]
    assert build(negative, mode=Mode.NEGATIVE).cages[0].target == -1
    with pytest.raises(PuzzleError, match="clue -1x"):
        build(negative, mode=Mode.ZERO_INCLUSIVE)


def test_large_cages_are_judged_by_sums_and_products() -> None:
    """One cage over a 16x16 grid answers at once, possible or not."""
    everywhere = tuple((r, c) for r in range(16) for c in range(16))
    for op, target, possible in (
        ("+", 136 * 16, True),
        ("+", 255, False),
        ("x", 2**30, True),
        ("x", 17, False),
        ("x", 0, False),
    ):
        cage = Cage(cells=everywhere, op=op, target=target)
        if possible:
            assert Puzzle(size=16, cages=(cage,)).cages == (cage,)
        else:
            with pytest.raises(PuzzleError, match="must be able to make"):
                Puzzle(size=16, cages=(cage,))


@pytest.mark.parametrize("size", [2, 17, -4])
def test_other_sizes_are_refused(size: int) -> None:
    """The message says which sizes there are."""
    with pytest.raises(PuzzleError, match=rf"size in 3\.\.16; got {size}"):
        Puzzle(size=size)
