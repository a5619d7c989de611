"""Relations: what each clue says alone, against brute force over tuples of digits."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
import torch

from castwise.recipes.kenken.alphabets import Mode, digits
from castwise.recipes.kenken.clues import (
    OP_ADD,
    OP_DIV,
    OP_GIVEN,
    OP_MUL,
    OP_NONE,
    OP_SUB,
)
from castwise.recipes.kenken.relations import NUM_LEVELS, read_clue, relate

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
def test_a_clue_is_read_as_all_digits_that_satisfy_it(
    mode: Mode, clue: tuple[int, int, int, int]
) -> None:
    """Ways are the multisets, and support the frequencies, of all satisfying tuples."""
    size = 5
    operation, num_cells, target, repeats = clue
    alphabet = digits(size, mode)
    single, total = np.zeros(size), 0
    multisets = set()
    for ranks in product(range(size), repeat=num_cells):
        counts = np.bincount(ranks, minlength=size)
        if counts.max() > repeats:
            continue
        if holds(operation, tuple(int(alphabet[r]) for r in ranks), target):
            total += 1
            single[ranks[0]] += 1
            multisets.add(tuple(np.minimum(counts, NUM_LEVELS).tolist()))
    read = read_clue(size, mode, operation, target, num_cells, repeats)
    np.testing.assert_allclose(read.support, single / max(total, 1), rtol=1e-6)
    levels = read.ways.reshape(-1, size, NUM_LEVELS) @ np.arange(1, NUM_LEVELS + 1)
    assert {tuple(way) for way in levels.astype(int).tolist()} == multisets
    assert read.ways.reshape(-1, size, NUM_LEVELS).sum(axis=2).max(initial=0) <= 1


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
    assert relations.members[0].tolist() == (ids[0] == np.arange(3)[:, None]).tolist()
    # 1+1+3 and 1+2+2; 1+2+3 alone; nothing
    cages = relations.by_cage()
    assert cages.is_way[0].sum(dim=1).tolist() == [2, 1, 0]
    assert not cages.ways[0, 2].any()
    none = relate(np.array([2]), ids * 0, np.zeros((1, 1), int), np.zeros((1, 1), int))
    assert none.support.flatten().tolist() == pytest.approx([1 / 3] * 27)
    assert not none.mates.any()
    assert not none.members.any()
    assert not none.by_cage().is_way.any()
    assert not none.operations.any()


def test_a_cage_too_large_to_list_passes_for_one_without_a_clue() -> None:
    """25 cells of size 16 have more multisets than are worth listing."""
    read = read_clue(16, Mode.STANDARD, OP_ADD, 200, 25, 5)
    assert read.support.tolist() == pytest.approx([1 / 16] * 16)
    assert not len(read.ways)
    assert read_clue(16, Mode.STANDARD, OP_NONE, 0, 256, 16).support.sum() == 1


def test_clues_that_are_alike_share_their_ways_and_no_two_others_do() -> None:
    """Operation, target, alphabet, cells and repeats all tell clues apart."""
    # 0 0 1 2
    # 3 3 1 2
    # 4 4 5 6      cage 5 stands around a corner, with room for a repeat
    # 7 5 5 6
    ids = np.array([[0, 0, 1, 2, 3, 3, 1, 2, 4, 4, 5, 6, 7, 5, 5, 6]] * 3)
    ops = np.array([[OP_ADD, OP_ADD, OP_SUB, OP_MUL, OP_MUL, OP_ADD, OP_DIV, OP_GIVEN]])
    targets = np.array([[3, 3, 3, 2, -2, 3, 2, 1]])
    relations = relate(
        np.arange(3), ids, np.repeat(ops, 3, axis=0), np.repeat(targets, 3, axis=0)
    )
    assert relations.clues[0, 0] == relations.clues[0, 1]
    assert len(relations.ways) == relations.clues.unique().numel() == 3 * 7
    cages = relations.by_cage()
    for mode, puzzle in product(range(3), range(8)):
        read = read_clue(
            4,
            list(Mode)[mode],
            *(int(array[0, puzzle]) for array in (ops, targets)),
            *{5: (3, 2), 7: (1, 1)}.get(puzzle, (2, 1)),
        )
        found = cages.ways[mode, puzzle][cages.is_way[mode, puzzle]]
        assert found.tolist() == read.ways.tolist()
    chosen = relations.select(torch.tensor([2])).by_cage()
    assert torch.equal(chosen.ways, cages.ways[2:])
