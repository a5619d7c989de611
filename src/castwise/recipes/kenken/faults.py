"""What can be wrong with a puzzle, each fault in one sentence.

The checks stop short of solving: they find what no reading of the puzzle can mend, such
as a cage in two pieces or a target that no digits make. A fault also names the cage or
the hint to blame, so that whoever read the puzzle from a file can point at the line.
"""

from __future__ import annotations

from collections import Counter
from math import prod
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from castwise.recipes.kenken.alphabets import MAX_SIZE, MIN_SIZE, digits
from castwise.recipes.kenken.clues import SYMBOLS

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from castwise.recipes.kenken.alphabets import Mode
    from castwise.recipes.kenken.puzzles import Cage, Cell, Hints

_LARGEST_TARGET = 2**31 - 1
_OPERATIONS = SYMBOLS[1:]
_NUM_CELLS = {"=": "one cell", "-": "two cells", "/": "two cells"}
_LISTED_CELLS = 4  # larger cages are checked without the row and column rule


class Fault(NamedTuple):
    """What is wrong with a puzzle, and with which part of it."""

    sentence: str
    """Need, got and remedy."""

    cage: int | None = None
    """The cage to blame."""

    hint: Cell | None = None
    """The hint to blame."""


def name_cell(cell: Cell) -> str:
    """Name a cell as people count."""
    return f"row {cell[0] + 1}, column {cell[1] + 1}"


def find_faults(
    size: int, mode: Mode, cages: Sequence[Cage], hints: Hints | None
) -> Iterator[Fault]:
    """Find what is wrong, the most basic first.

    Later checks rely on earlier ones, so whoever meets a fault stops there.

    Args:
        size: Rows, columns and symbols.
        mode: The alphabet.
        cages: The cages.
        hints: The digit of each revealed cell, None in hidden ones, or no hints.

    Yields:
        The faults.
    """
    if not MIN_SIZE <= size <= MAX_SIZE:
        yield Fault(
            f"a puzzle needs a size in {MIN_SIZE}..{MAX_SIZE}; got {size}; give one of "
            "these."
        )
        return
    alphabet = digits(size, mode).tolist()
    yield from _shape_faults(size, cages)
    yield from _cover_faults(size, cages)
    yield from _clue_faults(alphabet, cages)
    if hints is not None:
        yield from _hint_faults(alphabet, cages, hints)


def _shape_faults(n: int, cages: Sequence[Cage]) -> Iterator[Fault]:
    """Each cage: some cells, inside, once, connected, as many as the operation wants.

    Yields:
        One fault for each cage that is no cage.
    """
    for number, cage in enumerate(cages):
        outside = [cell for cell in cage.cells if not _inside(cell, n)]
        if not cage.cells:
            yield Fault(
                f"cage {number + 1} ({cage}) needs at least one cell; got none; give "
                "it cells or remove it.",
                cage=number,
            )
        elif outside:
            yield Fault(
                f"the cage {cage} needs cells inside the {n}x{n} grid; got "
                f"{name_cell(outside[0])}; correct the cell or the size.",
                cage=number,
            )
        elif not _connected(cage.cells):
            yield Fault(
                f"the cage {cage} at {name_cell(min(cage.cells))} needs cells that "
                "touch along their sides; got pieces apart; join them or make them "
                "cages of their own.",
                cage=number,
            )
        else:
            yield from _operation_faults(number, cage)


def _operation_faults(number: int, cage: Cage) -> Iterator[Fault]:
    size = len(cage.cells)
    place = name_cell(min(cage.cells))
    if cage.op not in _OPERATIONS:
        yield Fault(
            f"the cage at {place} needs one of the operations "
            f"{' '.join(_OPERATIONS)}; got {cage.op!r}; use one of these.",
            cage=number,
        )
        return
    fits = {"=": size == 1, "-": size == 2, "/": size == 2}.get(cage.op, size >= 2)
    if not fits:
        yield Fault(
            f"the operation {cage.op} needs "
            f"{_NUM_CELLS.get(cage.op, 'two cells or more')}; got {size} in the cage "
            f"{cage} at {place}; use another operation or other cells.",
            cage=number,
        )
    if abs(cage.target) > _LARGEST_TARGET:
        yield Fault(
            f"the cage at {place} needs a target within +-{_LARGEST_TARGET}; got "
            f"{cage.target}; correct it.",
            cage=number,
        )


def _cover_faults(n: int, cages: Sequence[Cage]) -> Iterator[Fault]:
    """Cages cover every cell once, or there are none.

    Yields:
        A fault for a cell in two cages, and one for a cell in none.
    """
    if not cages:
        return
    held: set[Cell] = set()
    for number, cage in enumerate(cages):
        for cell in cage.cells:
            if cell in held:
                yield Fault(
                    f"each cell must lie in one cage; got {name_cell(cell)} a second "
                    f"time in the cage {cage}; remove it from one of them.",
                    cage=number,
                )
            held.add(cell)
    for cell in np.ndindex(n, n):
        if cell not in held:
            yield Fault(
                f"each cell must lie in a cage; got none at {name_cell(cell)}; add it "
                "to one, or remove all cages for a plain Latin square."
            )
            return


def _clue_faults(alphabet: list[int], cages: Sequence[Cage]) -> Iterator[Fault]:
    """Each clue can be met by digits of the mode.

    Yields:
        A fault for each clue that cannot.
    """
    for number, cage in enumerate(cages):
        if not _can_be_met(cage, [alphabet] * len(cage.cells)):
            yield Fault(
                f"digits {_listed(alphabet)} must be able to make the clue {cage} of "
                f"the cage at {name_cell(min(cage.cells))} ({len(cage.cells)} cells), "
                "but none do; correct the target, the operation or the mode.",
                cage=number,
            )


def _hint_faults(
    alphabet: list[int], cages: Sequence[Cage], hints: Hints
) -> Iterator[Fault]:
    """Hints are digits of the mode, once in a row and column, and keep the clues.

    Yields:
        A fault for each hint that is impossible.
    """
    n = len(alphabet)
    if len(hints) != n or any(len(row) != n for row in hints):
        shape = sorted({len(row) for row in hints})
        yield Fault(
            f"hints need {n} rows of {n} entries; got {len(hints)} rows of "
            f"{' or '.join(map(str, shape)) or 'no'} entries; give one for each cell."
        )
        return
    known = {
        (r, c): digit
        for r, row in enumerate(hints)
        for c, digit in enumerate(row)
        if digit is not None
    }
    yield from _lone_hint_faults(alphabet, known)
    for number, cage in enumerate(cages):
        hinted = [cell for cell in cage.cells if cell in known]
        allowed = [[known[cell]] if cell in known else alphabet for cell in cage.cells]
        if hinted and not _can_be_met(cage, allowed):
            yield Fault(
                f"the hint {known[hinted[0]]} at {name_cell(hinted[0])} must agree "
                f"with the clue {cage} of its cage, but no digits complete it; correct "
                "the hint or the clue.",
                cage=number,
                hint=hinted[0],
            )


def _lone_hint_faults(alphabet: list[int], known: dict[Cell, int]) -> Iterator[Fault]:
    seen: set[tuple[str, int, int]] = set()
    for cell, digit in known.items():
        if digit not in alphabet:
            yield Fault(
                f"a hint must be one of the digits {_listed(alphabet)}; got {digit} at "
                f"{name_cell(cell)}; correct it or the mode.",
                hint=cell,
            )
        for line, place in (("row", cell[0]), ("column", cell[1])):
            if (line, place, digit) in seen:
                yield Fault(
                    f"a digit may stand once in each {line}; got the hint {digit} "
                    f"twice in {line} {place + 1}; correct one of them.",
                    hint=cell,
                )
            seen.add((line, place, digit))


def _listed(alphabet: list[int]) -> str:
    return " ".join(map(str, alphabet))


def _inside(cell: Cell, n: int) -> bool:
    return 0 <= cell[0] < n and 0 <= cell[1] < n


def _connected(cells: Sequence[Cell]) -> bool:
    """Say whether one can walk through all cells from side to side."""
    unseen = set(cells)
    waiting = [unseen.pop()]
    while waiting:
        r, c = waiting.pop()
        for cell in ((r, c + 1), (r + 1, c), (r, c - 1), (r - 1, c)):
            if cell in unseen:
                unseen.remove(cell)
                waiting.append(cell)
    return not unseen


def _can_be_met(cage: Cage, allowed: Sequence[Sequence[int]]) -> bool:
    """Say whether digits, chosen for each cell from `allowed`, can make the clue.

    Small cages are searched, with the rule that digits of a row or column differ;
    large ones are judged by which sums or products occur at all.
    """
    if cage.op == "+":
        low, high = (sum(map(f, allowed)) for f in (min, max))
        if not low <= cage.target <= high:
            return False
    if cage.op == "x" and not _product_occurs(cage.target, allowed):
        return False
    if len(cage.cells) > _LISTED_CELLS:
        return True
    return _fill(cage, allowed, [])


def _product_occurs(target: int, allowed: Sequence[Sequence[int]]) -> bool:
    """Say whether one digit from each list can multiply to the target."""
    if target == 0:
        return any(0 in choices for choices in allowed)
    reached = {1}
    for choices, times in Counter(map(tuple, allowed)).items():
        for _ in range(times):
            further = {
                value * digit
                for value in reached
                for digit in choices
                if digit and target % (value * digit) == 0
            }
            if further == reached:
                break
            reached = further
    return target in reached


def _fill(cage: Cage, allowed: Sequence[Sequence[int]], chosen: list[int]) -> bool:
    """Try digits for the next cell of a cage of at most four."""
    place = len(chosen)
    if place == len(cage.cells):
        return clue_holds(cage.op, cage.target, chosen)
    r, c = cage.cells[place]
    barred = {
        digit
        for digit, (y, x) in zip(chosen, cage.cells, strict=False)
        if y == r or x == c
    }
    choices = allowed[place]
    if place == len(cage.cells) - 1:
        choices = _completing(cage, chosen, choices)
    return any(
        _fill(cage, allowed, [*chosen, digit])
        for digit in choices
        if digit not in barred
    )


def _completing(
    cage: Cage, chosen: Sequence[int], choices: Sequence[int]
) -> Sequence[int]:
    """Narrow the digits of the last cell by arithmetic where that is quick."""
    if cage.op == "+":
        need = cage.target - sum(chosen)
        return [need] if need in choices else []
    if cage.op == "x" and (others := prod(chosen)):
        need, rest = divmod(cage.target, others)
        return [need] if rest == 0 and need in choices else []
    return choices


def clue_holds(op: str, target: int, values: Sequence[int]) -> bool:
    """Say whether the digits of a full cage satisfy its clue."""
    if op == "+":
        return sum(values) == target
    if op == "x":
        return prod(values) == target
    if op == "=":
        return values[0] == target
    a, b = values
    if op == "-":
        return abs(a - b) == target
    return (b != 0 and a == b * target) or (a != 0 and b == a * target)
