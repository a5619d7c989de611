"""A picture that looks the same wherever it is drawn: one set of axes in one SVG."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def picture(path: Path, x_label: str, y_label: str) -> Iterator[Any]:
    """Open axes to draw on, and write them to `path` as an SVG afterwards."""
    import matplotlib as mpl  # noqa: PLC0415 -- pictures alone need it
    from matplotlib import pyplot as plt  # noqa: PLC0415 -- as above

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "castwise"  # the same picture from the same record
    figure, axes = plt.subplots(figsize=(7, 4.2))
    yield axes
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
