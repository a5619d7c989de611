"""The arithmetic of a cage, stated once for the generator, the solver and the parser.

A cage is a set of cells with a clue: an operation and a target. It holds when

    =   its one cell shows the target
    +   its digits (two cells or more) sum to the target
    -   its two digits a, b differ by the target: |a - b| = target
    x   its digits (two cells or more) multiply to the target
    /   one of its two digits divided by the other is exactly the target: a = b * target
        with b not zero, or b = a * target with a not zero

and when digits in the same row or column differ, which is the rule of the square. The
digits are those of the mode: with -2 and 1 the clue `-` is 3 and `/` is -2; with 0 and
4 the clue `/` is 0, because 0 / 4 is exact and 4 / 0 is not a number.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from castwise.recipes.kenken.compiled import kernel

if TYPE_CHECKING:
    from numpy.typing import NDArray

OP_NONE, OP_GIVEN, OP_ADD, OP_SUB, OP_MUL, OP_DIV = range(6)
SYMBOLS = ("", "=", "+", "-", "x", "/")
"""How each operation is written; the place in the tuple is its code."""

_OFFSET = 32  # digits lie in -8..16; the rank table starts at -32
_BELONGS_NOWHERE = -1


@kernel
def rank_table(digits: NDArray[np.int64]) -> NDArray[np.int64]:
    """Tabulate the rank of each digit, int64 [64], -1 where there is none."""
    table = np.full(2 * _OFFSET, _BELONGS_NOWHERE, dtype=np.int64)
    for rank in range(digits.size):
        table[digits[rank] + _OFFSET] = rank
    return table


@kernel
def rank_bit(table: NDArray[np.int64], digit: int) -> int:
    """Return the bit of a digit's rank, 0 for what is no digit of the mode."""
    if digit < -_OFFSET or digit >= _OFFSET or table[digit + _OFFSET] < 0:
        return 0
    bit: int = 1 << table[digit + _OFFSET]
    return bit


@kernel
def fits_pair(op: int, a: int, b: int, target: int) -> bool:
    """Say whether two digits satisfy `-` or `/`."""
    if op == OP_SUB:
        return abs(a - b) == target
    return (b != 0 and a == b * target) or (a != 0 and b == a * target)


@kernel
def start_value(op: int) -> int:
    """Return what `extend` starts from."""
    return 1 if op == OP_MUL else 0


@kernel
def extend(op: int, value: int, digit: int, target: int) -> int:
    """Take one more digit into the running sum or product.

    A product is compared with zero alone when the target is zero, so it is kept
    as 0 or 1 there and cannot overflow.
    """
    if op == OP_MUL:
        if target == 0:
            return 0 if value == 0 or digit == 0 else 1
        return value * digit
    return value + digit


@kernel
def can_reach(op: int, value: int, target: int) -> bool:
    """Say whether a running product may still become the target."""
    if op != OP_MUL or target == 0:
        return True
    return value != 0 and target % value == 0


@kernel
def last_digits(
    op: int,
    value: int,
    target: int,
    digits: NDArray[np.int64],
    ranks: NDArray[np.int64],
) -> int:
    """Return the bits of the ranks that complete a cage.

    Args:
        op: Operation code.
        value: Running sum or product of the other digits; for `-` and `/` the
            other digit itself.
        target: Target of the clue.
        digits: int64 [n], digit of each rank.
        ranks: int64 [64], from `rank_table`.
    """
    if op == OP_GIVEN:
        return rank_bit(ranks, target)
    if op == OP_ADD:
        return rank_bit(ranks, target - value)
    if op == OP_MUL and target != 0:
        if value == 0 or target % value != 0:
            return 0
        return rank_bit(ranks, target // value)
    if op == OP_MUL:
        return (1 << digits.size) - 1 if value == 0 else rank_bit(ranks, 0)
    bits = 0
    for rank in range(digits.size):
        if fits_pair(op, value, digits[rank], target):
            bits |= 1 << rank
    return bits
