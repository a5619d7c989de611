"""Which passage through a module this thread is in, where its backward has its own.

A module whose backward runs in another precision than its forward is passed through
twice: once to compute its outputs, and once more, later, to compute its gradients. The
borders inside of it, and whoever watches operators, ask here which of the two it is.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Iterator

Kind = Literal["forward", "again", "gradient"]
"""The forward itself; the forward run again for the backward; its differentiation."""

_numbers = itertools.count(1)


class _Now(threading.local):
    kind: Kind | None = None
    number: int = 0
    number_around: int = 0


_now = _Now()


def kind_now() -> Kind | None:
    """Where this thread is; none outside of modules with a backward of their own."""
    return _now.kind


def number_now() -> int:
    """The number of the second passage that this thread is in; 0 outside of all."""
    return _now.number


def number_around() -> int:
    """The number of the passage that the second one began in; 0 outside of all."""
    return _now.number_around


def is_second() -> bool:
    """Whether gradients are being computed in a precision of their own."""
    return _now.kind in ("again", "gradient")


@contextlib.contextmanager
def passing(kind: Kind) -> Iterator[None]:
    """Say where this thread is; every second passage gets a number of its own."""
    before = _now.kind, _now.number, _now.number_around
    if kind == "again":
        _now.number_around = _now.number
        _now.number = next(_numbers)
    elif kind == "forward":
        _now.number = 0
    _now.kind = kind
    try:
        yield
    finally:
        _now.kind, _now.number, _now.number_around = before
