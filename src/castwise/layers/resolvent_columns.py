"""Rows into columns and back: chains lie row by row, a kernel wants site after site.

A square of eight rows by eight sites is loaded row by row, turned round by three
shuffles a row, and stored site by site; or the other way. Complex numbers lie in rows
as pairs, and in columns as real parts and imaginary parts. The shuffles are those that
processors have an instruction for: neighbours within 16 bytes, then quarters of a
register.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from castwise.layers.lanes import WIDTH, at, element, lanes_of, num_bytes

SQUARE = 8  # rows, and sites


def _shuffled(builder: Any, one: Any, other: Any, mask: list[int]) -> Any:
    kind = ir.VectorType(ir.IntType(32), len(mask))
    return builder.shuffle_vector(one, other, ir.Constant(kind, mask))


def _turned_pairs(builder: Any, rows: list[Any]) -> list[Any]:
    """Turn eight rows of eight numbers of 64 bits round."""
    low, high = [0, 8, 2, 10, 4, 12, 6, 14], [1, 9, 3, 11, 5, 13, 7, 15]
    columns: list[Any] = [None] * SQUARE
    for parity, mask in enumerate((low, high)):
        a, b, c, d = (
            _shuffled(builder, rows[i], rows[i + 1], mask) for i in range(0, SQUARE, 2)
        )
        first, last = [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]
        even, odd = [0, 1, 4, 5, 8, 9, 12, 13], [2, 3, 6, 7, 10, 11, 14, 15]
        for half, quarters in enumerate((first, last)):
            one = _shuffled(builder, a, b, quarters)
            other = _shuffled(builder, c, d, quarters)
            columns[4 * half + parity] = _shuffled(builder, one, other, even)
            columns[4 * half + parity + 2] = _shuffled(builder, one, other, odd)
    return columns


def _turned_singles(builder: Any, rows: list[Any]) -> list[Any]:
    """Turn eight rows of eight numbers of 32 bits round."""
    rows = list(rows)
    for step, low, high in (
        (1, [0, 8, 1, 9, 4, 12, 5, 13], [2, 10, 3, 11, 6, 14, 7, 15]),
        (2, [0, 1, 8, 9, 4, 5, 12, 13], [2, 3, 10, 11, 6, 7, 14, 15]),
        (4, [0, 1, 2, 3, 8, 9, 10, 11], [4, 5, 6, 7, 12, 13, 14, 15]),
    ):
        for i in range(SQUARE):
            if not i & step:
                one, other = rows[i], rows[i + step]
                rows[i] = _shuffled(builder, one, other, low)
                rows[i + step] = _shuffled(builder, one, other, high)
    return [rows[i] for i in (0, 2, 1, 3, 4, 6, 5, 7)]


def _turned(builder: Any, rows: list[Any]) -> list[Any]:
    wide = isinstance(rows[0].type.element, ir.DoubleType)
    return (_turned_pairs if wide else _turned_singles)(builder, rows)


def _split(builder: Any, pairs: Any) -> list[Any]:
    """Split eight pairs into real parts and imaginary parts."""
    return [
        _shuffled(builder, pairs, pairs, [2 * i + part for i in range(SQUARE)])
        for part in range(2)
    ]


def _joined(builder: Any, real: Any, imag: Any) -> Any:
    """Join eight real parts and imaginary parts to pairs."""
    mask = [part * SQUARE + i for i in range(SQUARE) for part in range(2)]
    return _shuffled(builder, real, imag, mask)


def _as_doubles(builder: Any, vector: Any) -> Any:
    return builder.bitcast(vector, ir.VectorType(ir.DoubleType(), SQUARE))


def _columns_of_pairs(builder: Any, rows: list[Any], scalar: Any) -> list[list[Any]]:
    """Turn eight rows of eight pairs into columns of real and of imaginary parts."""
    if scalar == types.float64:
        both = [_split(builder, row) for row in rows]
        real, imag = (
            _turned_pairs(builder, list(part)) for part in zip(*both, strict=True)
        )
        return [list(column) for column in zip(real, imag, strict=True)]
    columns = _turned_pairs(builder, [_as_doubles(builder, row) for row in rows])
    kind = ir.VectorType(element(scalar), 2 * SQUARE)
    return [_split(builder, builder.bitcast(each, kind)) for each in columns]


def _rows_of_pairs(builder: Any, columns: list[list[Any]], scalar: Any) -> list[Any]:
    """Turn columns of real and of imaginary parts into eight rows of eight pairs."""
    if scalar == types.float64:
        real, imag = (
            _turned_pairs(builder, list(part)) for part in zip(*columns, strict=True)
        )
        return [_joined(builder, *row) for row in zip(real, imag, strict=True)]
    joined = [_as_doubles(builder, _joined(builder, *each)) for each in columns]
    kind = ir.VectorType(element(scalar), 2 * SQUARE)
    return [builder.bitcast(row, kind) for row in _turned_pairs(builder, joined)]


Square = Callable[[Any, list[Any], list[Any], Any], None]


def _mover(move: Square) -> Any:
    """Make an intrinsic that moves eight sites of as many rows as fill a register.

    Args:
        move: Generates code for eight rows, from a builder, the addresses of eight
            lines, of both parts of eight columns, and the format that stands there.
    """

    def to_move(
        typing_context: Any,
        base: Any,
        rows: Any,
        stride: Any,
        column: Any,
        step: Any,
        stored: Any,
    ) -> Any:
        del typing_context
        size, count = num_bytes(stored), len(rows)

        def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
            del sig
            base, rows, stride, column, step, _ = values
            for start in range(0, count, SQUARE):
                lines, columns = [], []
                for i in range(SQUARE):
                    row = builder.extract_value(rows, start + i)
                    lines.append(builder.add(base, builder.mul(row, stride)))
                    here = builder.add(column, builder.mul(step, _integer(i)))
                    offsets = (size * (start + part * count) for part in range(2))
                    columns.append([builder.add(here, _integer(x)) for x in offsets])
                move(builder, lines, columns, stored)
            return context.get_dummy_value()

        return types.void(base, rows, stride, column, step, stored), generate

    return intrinsic(to_move)


def _integer(value: int) -> Any:
    return ir.IntType(64)(value)


def _number(value: int) -> Any:
    return ir.IntType(32)(value)


def _load(builder: Any, address: Any, scalar: Any, count: int = SQUARE) -> Any:
    kind = ir.VectorType(element(scalar), count)
    return builder.load(at(builder, address, kind), align=num_bytes(scalar))


def _store(builder: Any, value: Any, address: Any, scalar: Any) -> None:
    builder.store(value, at(builder, address, value.type), align=num_bytes(scalar))


def _store_past(builder: Any, value: Any, address: Any, scalar: Any) -> None:
    """Store whole lines, which do not stay in the caches."""
    pointer = at(builder, address, value.type)
    align = min(WIDTH, SQUARE * num_bytes(scalar))
    stored = builder.store(value, pointer, align=align)
    once = builder.module.add_metadata([_number(1)])
    stored.set_metadata("nontemporal", once)


def _bring(builder: Any, lines: list[Any], columns: list[Any], scalar: Any) -> None:
    rows = [_load(builder, line, scalar) for line in lines]
    for each, (to, _) in zip(_turned(builder, rows), columns, strict=True):
        _store(builder, each, to, scalar)


def _taker(store: Callable[[Any, Any, Any, Any], None]) -> Square:
    def take(builder: Any, lines: list[Any], columns: list[Any], scalar: Any) -> None:
        found = [_load(builder, column, scalar) for column, _ in columns]
        for each, to in zip(_turned(builder, found), lines, strict=True):
            store(builder, each, to, scalar)

    return take


def _bring_pairs(
    builder: Any, lines: list[Any], columns: list[Any], scalar: Any
) -> None:
    rows = [_load(builder, line, scalar, 2 * SQUARE) for line in lines]
    found = _columns_of_pairs(builder, rows, scalar)
    for both, addresses in zip(found, columns, strict=True):
        for each, to in zip(both, addresses, strict=True):
            _store(builder, each, to, scalar)


def _pairs_taker(store: Callable[[Any, Any, Any, Any], None]) -> Square:
    def take_pairs(
        builder: Any, lines: list[Any], columns: list[Any], scalar: Any
    ) -> None:
        found = [[_load(builder, x, scalar) for x in column] for column in columns]
        rows = _rows_of_pairs(builder, found, scalar)
        for each, to in zip(rows, lines, strict=True):
            store(builder, each, to, scalar)

    return take_pairs


bring: Any = _mover(_bring)
"""address of the first of eight sites in row 0, row numbers, bytes from row to row,
address of a column, bytes to the next one, number of the format there -> nothing."""

take: Any = _mover(_taker(_store))
"""Like `bring`, from columns into rows."""

take_past: Any = _mover(_taker(_store_past))
"""Like `take`, past the caches: rows must begin where a line of those does."""

bring_pairs: Any = _mover(_bring_pairs)
"""Like `bring` of complex numbers; in a column imaginary parts follow the real ones."""

take_pairs: Any = _mover(_pairs_taker(_store))
"""Like `take` of complex numbers."""

take_pairs_past: Any = _mover(_pairs_taker(_store_past))
"""Like `take_pairs`, past the caches: rows must begin where a line of those does."""


def _to_row_numbers(typing_context: Any, first: Any, last: Any, number: Any) -> Any:
    del typing_context
    count = lanes_of(number).count
    numbers = types.UniTuple(types.int64, count)  # type: ignore[no-untyped-call]

    def generate(context: Any, builder: Any, sig: Any, values: Any) -> Any:
        first, last, _ = values
        found = []
        for i in range(count):
            row = builder.add(first, _integer(i))
            past = builder.icmp_signed(">", row, last)
            found.append(builder.select(past, last, row))
        return context.make_tuple(builder, sig.return_type, found)

    return numbers(first, last, number), generate


row_numbers: Any = intrinsic(_to_row_numbers)
"""number of a row, of the last row, number of the format inside -> as many rows as fill
a register, the last one repeated where there are no more."""
