"""Relations: what each clue says alone, against brute force over tuples of digits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.clues import (
    OP_ADD,
    OP_DIV,
    OP_GIVEN,
    OP_MUL,
    OP_NONE,
    OP_SUB,
)
from castwise.recipes.kenken.relations import read_clue, relate

CLUES = [
    (OP_GIVEN, 1, 1, 1),
    (OP_ADD, 2, 3, 2),
    (OP_ADD, 3, 4, 1),
    (OP_ADD, 3, 2, 2),
    (OP_SUB, 2, 1, 1),
    (OP_MUL, 3, 0, 2),
    (OP_MUL, 2, 2, 1),
    (OP_MUL, 3, 6, 2),
    (OP_MUL, 4, -2, 3),
    (OP_DIV, 2, 2, 1),
    (OP_DIV, 2, 0, 1),
    (OP_DIV, 2, -1, 1),
]


def holds(operation: int, values: tuple[int, ...], target: int) -> bool:
    """Say what a clue means, in plain words of its own."""
    if operation == OP_SUB:
        return abs(values[0] - values[1]) == target
    if operation == OP_DIV:
        pairs = [(values[0], values[1]), (values[1], values[0])]
        return any(b != 0 and a == b * target for a, b in pairs)
    if operation == OP_MUL:
        return int(np.prod(values)) == target
    return sum(values) == target


@pytest.mark.parametrize("mode", list(Mode))
@pytest.mark.parametrize("clue", CLUES)
def test_a_clue_is_read_as_all_tuples_that_satisfy_it(
    mode: Mode, clue: tuple[int, int, int, int]
) -> None:
    """Support and partner are frequencies among all orderings of all solutions."""
    size = 5
    operation, num_cells, target, repeats = clue
    alphabet = digits(size, mode)
    single, both = np.zeros(size), np.zeros((size, size))
    required = np.ones((size, size), bool)
    total = 0
    for ranks in product(range(size), repeat=num_cells):
        if np.bincount(ranks).max() > repeats:
            continue
        if holds(operation, tuple(int(alphabet[r]) for r in ranks), target):
            total += 1
            single[ranks[0]] += 1
            required[ranks[0]] &= np.isin(np.arange(size), ranks[1:])
            if num_cells > 1:
                both[ranks[0], ranks[1]] += 1
    read = read_clue(size, mode, operation, target, num_cells, repeats)
    np.testing.assert_allclose(read.support, single / max(total, 1), rtol=1e-6)
    wanted = both / np.maximum(single, 1)[:, None]
    np.testing.assert_allclose(read.partner, wanted, rtol=1e-6, atol=1e-7)
    np.testing.assert_array_equal(read.required, required & (single > 0)[:, None])


@pytest.mark.parametrize("mode", list(Mode))
def test_terms_of_a_sum_or_product_say_what_is_left_to_the_mates(mode: Mode) -> None:
    """Given + left is the target; signs multiply to the target's; pairs have none."""
    values = digits(6, mode)
    total = read_clue(6, mode, OP_ADD, 7, 3, 2).terms
    np.testing.assert_allclose(6 * total[:, 0], values, rtol=1e-6)
    np.testing.assert_allclose(6 * (total[:, 0] + total[:, 1]), 7, rtol=1e-6)
    product = read_clue(6, mode, OP_MUL, -12, 3, 2).terms
    np.testing.assert_allclose(
        2 * (product[:, 0] + product[:, 1]), np.log(12), rtol=1e-6
    )
    assert product[:, 2].tolist() == (values < 0).tolist()
    assert ((product[:, 2] + product[:, 3]) % 2 == 1).all()
    for operation in (OP_NONE, OP_SUB, OP_DIV):
        assert not read_clue(6, mode, operation, 2, 2, 1).terms.any()


def test_the_shape_of_a_cage_limits_repeats_and_cells_without_cage_know_nothing() -> (
    None
):
    """A cage in one row repeats nothing; an L of three cells may; op 0 is uniform."""
    # 0 0 1      one straight cage, one L, both of three cells: "x 1" of STANDARD
    # 2 0 1      digits needs 1, 1, 1 and is impossible in either
    # 2 2 1
    ids = np.array([[0, 0, 1, 2, 0, 1, 2, 2, 1]])
    ops = np.array([[OP_ADD, OP_ADD, OP_MUL]])
    relations = relate(np.array([0]), ids, ops, np.array([[5, 6, 1]]))
    bent, straight, impossible = (relations.support[0, cell] for cell in (0, 2, 3))
    assert straight.tolist() == pytest.approx([1 / 3] * 3)
    # 5 = 1+1+3 (three orderings) or 1+2+2 (three): ranks 0 0 2 and 0 1 1
    assert bent.tolist() == pytest.approx([1 / 2, 1 / 3, 1 / 6])
    assert impossible.tolist() == [0, 0, 0]
    assert relations.num_mates[0].tolist() == [2] * 9
    assert relations.mates[0, 0].nonzero().flatten().tolist() == [1, 4]
    none = relate(np.array([2]), ids * 0, np.zeros((1, 1), int), np.zeros((1, 1), int))
    assert none.support.flatten().tolist() == pytest.approx([1 / 3] * 27)
    assert not none.mates.any()
    assert not none.partner.any()
    assert not none.operations.any()


def test_a_cage_too_large_to_list_passes_for_one_without_a_clue() -> None:
    """25 cells of size 16 have more multisets than are worth listing."""
    read = read_clue(16, Mode.STANDARD, OP_ADD, 200, 25, 5)
    assert read.support.tolist() == pytest.approx([1 / 16] * 16)
    assert not read.partner.any()
    assert not read.required.any()
    assert read_clue(16, Mode.STANDARD, OP_NONE, 0, 256, 16).support.sum() == 1
