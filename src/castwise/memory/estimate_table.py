"""An estimate for the eye: a table by kind, one by module, and the peak in words."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from castwise.memory.estimate_records import Estimate, Peak
from castwise.memory.lifetimes import KINDS

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
_OUTSIDE = "(outside)"


def shown_bytes(num_bytes: float) -> str:
    """Return bytes as people read them, such as `12.3 MiB`."""
    size, unit = float(num_bytes), _UNITS[0]
    for unit in _UNITS:
        if abs(size) < 1024 or unit == _UNITS[-1]:
            break
        size /= 1024
    return f"{size:,.0f} {unit}" if unit == "B" else f"{size:,.1f} {unit}"


def shown_peak(peak: Peak) -> str:
    """Return where in the step an instant is, in words."""
    if not peak.op:
        return f"{peak.stage}, at its beginning"
    return f"{peak.stage}, {peak.op} of {peak.module or 'the loss or the optimizer'}"


def show_estimate(
    estimate: Estimate, console: Console, *, depth: int = 2, largest: int = 5
) -> None:
    """Print an estimate.

    Args:
        estimate: What is shown.
        console: Where.
        depth: How many parts of a module's fqn are told apart. Default: 2.
        largest: How many single allocations of the peak are listed. Default: 5.
    """
    console.print(kind_table(estimate))
    if depth:
        console.print(module_table(estimate, depth))
    for line in peak_lines(estimate, largest):
        console.print(line, highlight=False, soft_wrap=True, markup=False)


def kind_table(estimate: Estimate) -> Table:
    """Return the bytes by kind, with their formats, and at the peak."""
    title = (
        f"{estimate.num_parameters:,} parameters, {estimate.policy}, optimizer "
        f"{estimate.optimizer}, on {estimate.device}"
    )
    table = Table(title=title, show_footer=True)
    table.add_column("kind", footer="peak")
    table.add_column("held", justify="right")
    table.add_column(
        "at the peak", justify="right", footer=shown_bytes(estimate.peak_bytes)
    )
    table.add_column("formats")
    for kind, num_bytes in estimate.by_kind().items():
        formats = sorted(estimate.by_format(kind).items(), key=lambda each: -each[1])
        table.add_row(
            kind,
            shown_bytes(num_bytes),
            shown_bytes(estimate.at_peak(kind)),
            ", ".join(
                f"{fmt} {shown_bytes(size)}" for fmt, size in formats if fmt and size
            ),
        )
    return table


def module_table(estimate: Estimate, depth: int) -> Table:
    """Return the bytes by module, for the kinds that most is held of."""
    kinds = [
        kind
        for kind in ("weights", "states", "gradients", "casts", "saved")
        if estimate.num_bytes(kind)
    ]
    table = Table(title="held, by module")
    table.add_column("module")
    for kind in kinds:
        table.add_column(kind, justify="right")
    columns = {kind: estimate.by_module(kind, depth=depth) for kind in kinds}
    modules = dict.fromkeys(fqn for column in columns.values() for fqn in column)
    for fqn in modules:
        sizes = [columns[kind].get(fqn, 0) for kind in kinds]
        if any(sizes):
            cells = (shown_bytes(size) if size else "" for size in sizes)
            table.add_row(fqn or _OUTSIDE, *cells)
    return table


def peak_lines(estimate: Estimate, largest: int) -> Iterable[str]:
    """Yield sentences on the peak, its largest parts, and what is not counted."""
    yield f"peak: {shown_bytes(estimate.peak_bytes)} in {shown_peak(estimate.peak)}"
    for peak in estimate.stages:
        yield f"  {shown_bytes(peak.num_bytes):>12}  {shown_peak(peak)}"
    if largest:
        yield "largest at the peak:"
    for each in estimate.largest[:largest]:
        what = KINDS.get(each.kind, each.kind)
        where = f" of {each.module}" if each.module else ""
        made = f", made by {each.op}" if each.op else ""
        yield f"  {shown_bytes(each.num_bytes):>12}  {each.format}{where}: {what}{made}"
    yield from estimate.notes
