"""`castwise bench`: benchmarks that can say no, on this machine."""

from __future__ import annotations

from pathlib import Path

import click

from castwise.commands.options import FAILURE, SUCCESS


@click.group("bench")
def command() -> None:
    """Run a benchmark against its rivals, on this machine."""


@command.command("hybrid")
@click.argument("names", nargs=-1, metavar="NAME...")
@click.option(
    "--seeds",
    type=click.IntRange(min=2),
    default=5,
    show_default=True,
    help="Seeds of each comparison.",
)
@click.option("--out", type=click.Path(path_type=Path), help="Every run, as JSON.")
def hybrid(names: tuple[str, ...], seeds: int, out: Path | None) -> int:
    """Measure where prediction pays: time and passes to a loss fixed beforehand.

    Names of benches follow; without one they are listed. Leaves with 0 when every
    control came out and with 1 when one did not: the figures mean nothing then.
    """
    from castwise.errors import SettingsError
    from castwise.hybrid.bench import BENCHES, run_benches
    from castwise.wording import did_you_mean

    for name in names:
        if name not in BENCHES:
            raise SettingsError(
                f"bench hybrid knows {', '.join(BENCHES)}; got {name!r}"
                f"{did_you_mean(name, BENCHES)}."
            )
    if not names:
        for name, bench in BENCHES.items():
            click.echo(f"{name:14s} {bench.__doc__}")
        return SUCCESS
    good = run_benches(names, seeds=seeds, out=out, tell=click.echo)
    return SUCCESS if good else FAILURE
