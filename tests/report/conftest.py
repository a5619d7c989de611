"""A report as a real run would write it: every record, awkward values included."""

import math
import random

import pytest

from castwise.report import (
    Band,
    Bars,
    Column,
    DataTable,
    Drawing,
    Fact,
    Facts,
    HeatTable,
    Histogram,
    Lines,
    Marker,
    Measured,
    Note,
    Report,
    Section,
    Series,
    Tile,
    Verdict,
)

PUZZLE = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 204 204" width="204" '
    'height="204"><rect x="2" y="2" width="200" height="200" fill="none" '
    'stroke="currentColor" stroke-width="3"/>'
    + "".join(
        f'<path d="M{52 + 50 * i} 2v200M2 {52 + 50 * i}h200" stroke="currentColor" '
        'stroke-opacity="0.3"/>'
        for i in range(3)
    )
    + '<path d="M102 2v100h100M2 102h100v100" fill="none" stroke="currentColor" '
    'stroke-width="3"/>'
    + "".join(
        f'<text x="{27 + 50 * c}" y="{38 + 50 * r}" text-anchor="middle" '
        f'font-size="22" fill="currentColor">{(r * 2 + c + r // 2) % 4 + 1}</text>'
        for r in range(4)
        for c in range(4)
    )
    + '<text x="7" y="16" font-size="11" fill="currentColor">7+</text></svg>'
)


def _loss() -> Lines:
    chance = random.Random(4)
    steps = tuple(float(i) for i in range(10, 3001, 10))
    curve = [0.12 + 1.6 * math.exp(-s / 420) for s in steps]
    train = [v * math.exp(chance.gauss(0, 0.07)) for v in curve]
    train[61] = math.nan
    held_out = tuple(float(i) for i in range(250, 3001, 250))
    return Lines(
        title="Loss",
        series=(
            Series(name="training", xs=steps, ys=tuple(train)),
            Series(
                name="validation",
                xs=held_out,
                ys=tuple(0.14 + 1.6 * math.exp(-s / 420) for s in held_out),
            ),
        ),
        y_label="nats per hidden cell",
        log_y=True,
        bands=(
            Band(name="STANDARD", begin=0, end=900),
            Band(name="with ZERO_INCLUSIVE", begin=900, end=1500),
            Band(name="all modes", begin=1500, end=3000),
        ),
        markers=(
            Marker(name="step skipped: overflow in head.weight", x=620),
            Marker(name="resumed after SIGKILL", x=1830),
        ),
        caption="A cross marks a value that is not a number.",
    )


def _memory() -> Lines:
    epochs = tuple(float(i) for i in range(1, 13))
    return Lines(
        title="Memory by epoch",
        series=(
            Series(
                name="peak while training",
                xs=epochs,
                ys=tuple(2**20 * (734 + 20 * (e == 4)) for e in epochs),
            ),
            Series(
                name="peak while evaluating",
                xs=epochs,
                ys=tuple(2**20 * (690 + 3 * e) for e in epochs),
            ),
            Series(name="held", xs=epochs, ys=tuple(2**20 * 512.0 for _ in epochs)),
        ),
        x_label="epoch",
        y_label="resident set",
        y_spelling="bytes",
    )


def _solved() -> DataTable:
    chance = random.Random(1)
    rows = []
    for size in (4, 5, 6):
        for mode in ("STANDARD", "ZERO_INCLUSIVE", "NEGATIVE"):
            rate = 0.992 - 0.03 * (size - 4) - chance.random() / 60
            half = 1.96 * math.sqrt(rate * (1 - rate) / 1000)
            mark = "good" if rate > 0.95 else "bad" if rate < 0.925 else "none"
            measured = Measured(
                value=rate, low=rate - half, high=rate + half, count=1000, mark=mark
            )
            rows.append(
                (size, mode, measured, rate + 0.006, chance.randint(3, 90), None)
            )
    return DataTable(
        title="Solved without search",
        columns=(
            Column(name="size", spelling="number"),
            Column(name="mode", spelling="text"),
            Column(name="solved", spelling="percent", digits=1),
            Column(name="cells right", spelling="percent", digits=1),
            Column(name="nodes", unit="exact solver"),
            Column(name="ceiling"),
        ),
        rows=tuple(rows),
        caption="Unique KenKen puzzles, most certain cell first, 95 % intervals.",
    )


@pytest.fixture
def sample() -> Report:
    """Every record, every field off its default somewhere."""
    return build_sample()


def build_sample() -> Report:
    """Build it; also used to look at the page in a browser."""
    return Report(
        title="KenKen solver, small",
        subtitle="3,000 steps in 2 min 41 s on 2 cores, 14 May 2026",
        verdict=Verdict(
            text="Solves 97.9 % of unique 4x4 and 95.4 % of unique 5x5 puzzles "
            "without search.",
            mark="good",
            because="Goal: at least 95 % on both. 2,000 puzzles, none seen before.",
        ),
        tiles=(
            Tile(
                name="Solved, 4x4",
                value="97.9 %",
                detail="97.0-98.6, n=1000",
                mark="good",
            ),
            Tile(
                name="Solved, 5x5",
                value="95.4 %",
                detail="93.9-96.5, n=1000",
                mark="good",
            ),
            Tile(name="Solved, 6x6", value="88.1 %", detail="n=1000", mark="warning"),
            Tile(name="Step", value="41.7 ms", detail="median; 21,400 cells/s"),
        ),
        sections=(
            Section(
                title="Precision",
                blocks=(
                    Facts(
                        facts=(
                            Fact(
                                name="Policy",
                                asked="bf16-mixed",
                                value="p=fp32,c=bf16,o=bf16,r=fp32",
                                because="this CPU multiplies in bf16",
                                mark="good",
                            ),
                            Fact(
                                name="Softmax",
                                asked="bf16",
                                value="fp32",
                                because="operator table: exponentials overflow below",
                            ),
                            Fact(
                                name="Loss scale", value=None, because="bf16 needs none"
                            ),
                            Fact(name="Learning rate", value=3e-4),
                        ),
                        title="Asked and effective",
                    ),
                    Note(
                        text="One step was skipped: the gradient of head.weight "
                        "overflowed at scale 65536.",
                        mark="warning",
                    ),
                ),
            ),
            Section(title="Training", blocks=(_loss(), _memory())),
            Section(
                title="Solving",
                blocks=(
                    _solved(),
                    HeatTable(
                        title="Hidden cells right, by size and revealed share",
                        row_names=("3x3", "4x4", "5x5", "6x6"),
                        column_names=("0", "0.1", "0.3", "0.5", "0.7"),
                        values=(
                            (0.33, 0.61, 0.86, 0.97, 0.999),
                            (0.25, 0.44, 0.71, 0.93, 0.99),
                            (0.2, 0.38, 0.66, 0.91, 0.98),
                            (0.17, 0.31, 0.6, None, math.nan),
                        ),
                        low=0.15,
                        high=0.95,
                        spelling="number",
                        caption="Shaded from 0.15 to 0.95.",
                    ),
                    Bars(
                        title="Against baselines, 5x5",
                        names=(
                            "castwise small",
                            "most constrained first",
                            "random filling",
                        ),
                        values=(
                            Measured(value=0.954, low=0.939, high=0.965, mark="good"),
                            Measured(value=0.71, low=0.68, high=0.74, count=1000),
                            Measured(value=0.022, low=0.014, high=0.033, mark="bad"),
                        ),
                        spelling="percent",
                        caption="Share solved, 95 % intervals.",
                    ),
                    Histogram(
                        title="Difficulty of the test set",
                        edges=tuple(float(2**i) for i in range(9)),
                        counts=(120.0, 260.0, 210.0, 160.0, 110.0, 80.0, 40.0, 20.0),
                        x_label="nodes of the exact solver",
                        caption="Nodes are a label of difficulty.",
                    ),
                    Drawing(
                        title="One puzzle of the test set, solved",
                        svg=PUZZLE,
                        alt="A solved 4x4 puzzle",
                        caption="Seed 3, index 17.",
                    ),
                ),
            ),
            Section(
                title="The run",
                blocks=(
                    Note(text="A plain paragraph.\n\nAnd a second one."),
                    Note(text="Training and validation share no puzzle.", mark="good"),
                    DataTable(
                        title="Every setting",
                        columns=(
                            Column(name="name", spelling="text"),
                            Column(name="value", spelling="text"),
                        ),
                        rows=(("seed", "3"), ("batch", "256"), ("dim", "64")),
                        folded=True,
                    ),
                ),
            ),
        ),
        footer="castwise train kenken --preset small --dtype bf16 --seed 3",
    )
