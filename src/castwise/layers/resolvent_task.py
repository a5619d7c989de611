"""What a call of the resolvent's machine code is about, as one table of integers.

A C function takes one address, so that any thread can be sent with it. Behind it stands
a `Task`; what is a type instead is a `Kind`, and each kind is compiled by itself.
"""

from __future__ import annotations

from typing import NamedTuple

from castwise.layers.lanes import itemsize, load_one, num_lanes, part
from castwise.layers.resolvent_arms import Job, Number


class Task(NamedTuple):
    """What a call is about, as it stands in its table; all arrays are contiguous."""

    taken: int
    """Parts of the batch that are taken: 0 at first."""
    threads: int
    """Threads that have come: 0 at first."""
    broken: int
    """Becomes 1 where a row broke."""
    d: int
    """Address of the diagonal `[B, N]`."""
    k: int
    """Address of the couplings `[1 or B, N-1]`."""
    k_stride: int
    """Bytes from row to row; 0 where all rows share one."""
    z: int
    """Address of the shifts `[B]`, complex128."""
    z_stride: int
    """Bytes from row to row; 0 where all rows share one."""
    num_rows: int
    """B."""
    num_sites: int
    """N."""
    tile: int
    """Sites of an arm that are remembered at once."""
    side: int
    """0 for the causal form, else 1."""
    past: int
    """1 where G goes past the caches: rows of whole lines, too many to stay there."""
    memory: int
    """Address of the scratch of all threads."""
    held: int
    """Bytes of the scratch of one."""
    bad: int
    """Address of int64 `[B]`, written: which rows broke."""
    out: int
    """Address of what is written: G `[B, N]`, or Re dL/da `[B, N]`, analytic."""
    grad: int
    """Address of the upstream gradient `[B, N]`; 0 in a forward."""
    bond: int
    """Address of dL/dk `[B, N-1]`, written; 0 where nobody wants it."""
    point: int
    """Address of dL/dz `[B]`, written in fp64; 0 in a forward."""


(
    AT_TAKEN,
    AT_THREADS,
    AT_BROKEN,
    AT_D,
    AT_K,
    AT_K_STRIDE,
    AT_Z,
    AT_Z_STRIDE,
    AT_NUM_ROWS,
    AT_NUM_SITES,
    AT_TILE,
    AT_SIDE,
    AT_PAST,
    AT_MEMORY,
    AT_HELD,
    AT_BAD,
    AT_OUT,
    AT_GRAD,
    AT_BOND,
    AT_POINT,
) = range(len(Task._fields))


class Kind(NamedTuple):
    """What is compiled apart."""

    wide_io: bool
    """Whether numbers outside are fp64."""
    wide: bool
    """Whether those inside are."""
    shared: bool
    """Whether all rows share their couplings."""
    grad: bool
    """Whether it is a backward."""
    bond: bool
    """Whether dL/dk is wanted."""


@part
def entry(table: int, field: int) -> int:
    """Return a field of a task."""
    return load_one(table + 8 * field, 0, 0)  # type: ignore[no-any-return]


@part
def job_of(table: int, shared: int | None, record: int, io: Number, one: Number) -> Job:
    """Return what the arms want to know of a task."""
    size = itemsize(io)
    return Job(
        entry(table, AT_D),
        entry(table, AT_K),
        entry(table, AT_K_STRIDE),
        shared,
        entry(table, AT_Z),
        entry(table, AT_Z_STRIDE),
        entry(table, AT_NUM_ROWS),
        entry(table, AT_NUM_SITES),
        entry(table, AT_TILE),
        size,
        size * num_lanes(one),
        record,
        entry(table, AT_PAST) != 0,
        one if entry(table, AT_SIDE) else one - one,
        io,
        one,
    )
