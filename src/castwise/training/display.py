"""What a person sees while a run goes on: live on a terminal, plain lines elsewhere.

    with open_display(3000, "kenken small, bf16-mixed") as display:
        for step in ...:
            display.update(step, {"loss": 1.31, "cells_per_s": 21_400.0})
        display.note("the loss scale fell to 32768")

The display knows no recipe. It shows the values that it is given, in their order, and
takes units from their names: `_per_s`, `_ms`, `_s` and `_seconds`, `_mib`. Progress
goes to standard error, so that what a command prints stays clean.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Mapping
from typing import IO, Self, final

from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from castwise.errors import SettingsError

Value = str | float

_REFRESH_PER_SECOND = 4
_LINE_SECONDS = 15.0  # between two plain lines; the first and the last always stand
_WINDOW_SECONDS = 30.0  # how far back the estimate of the time left looks
_CELL_WIDTH = 26  # of one name with its value, when there is room for several
_MAX_ROWS = 12  # of values; fewer where the terminal is lower
_WIDE = 64  # columns from which bar and counts share a line


def open_display(
    total_steps: int,
    title: str,
    *,
    quiet: bool = False,
    stream: IO[str] | None = None,
) -> Display:
    """Choose the display that fits where the output goes.

    Args:
        total_steps: Steps of the whole run.
        title: What runs, on one line.
        quiet: Show nothing at all. Default: False.
        stream: Where to write. Default: standard error.

    Returns:
        A live picture on a terminal, occasional lines elsewhere; a context manager.

    Raises:
        SettingsError: There is no step to display.
    """
    if total_steps < 1:
        raise SettingsError(
            f"a display needs at least one step, got {total_steps}; raise the number"
        )
    if quiet:
        return NullDisplay()
    console = Console(file=stream if stream is not None else sys.stderr)
    if console.is_terminal and not console.is_dumb_terminal:
        return LiveDisplay(total_steps, title, console)
    return LineDisplay(total_steps, title, console.file)


class Display(ABC):
    """The seam between a training loop and whoever watches it."""

    def __enter__(self) -> Self:
        """Begin."""
        return self

    def __exit__(self, *_: object) -> None:  # noqa: B027 -- most displays hold nothing
        """End; leave the terminal as it was."""

    @abstractmethod
    def update(self, step: int, values: Mapping[str, Value]) -> None:
        """Show that a step is done; values that are not named stay as they were."""

    @abstractmethod
    def note(self, text: str) -> None:
        """Say something once, on a line of its own."""


@final
class NullDisplay(Display):
    """Shows nothing."""

    def update(self, step: int, values: Mapping[str, Value]) -> None:
        """Show nothing."""

    def note(self, text: str) -> None:
        """Show nothing."""


@final
class LineDisplay(Display):
    """Writes a plain line now and then: for logs, pipes and dumb terminals.

    Args:
        total_steps: Steps of the whole run.
        title: The first line.
        stream: Where to write.
        clock: Seconds. Default: the monotonic clock.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        stream: IO[str],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pace = _Pace(total_steps, clock)
        self._stream = stream
        self._clock = clock
        self._values: dict[str, Value] = {}
        self._title: str | None = title
        self._last_line = -math.inf

    def update(self, step: int, values: Mapping[str, Value]) -> None:
        """Write a line if the last one is old enough, or the run is complete."""
        self._pace.update(step)
        self._values.update(values)
        now = self._clock()
        if now - self._last_line < _LINE_SECONDS and not self._pace.complete:
            return
        self._last_line = now
        shown = (" ".join(spell(*item)) for item in self._values.items())
        self._write("  ".join([self._pace.text(), *shown]))

    def note(self, text: str) -> None:
        """Write the text at once."""
        self._write(text)

    def _write(self, line: str) -> None:
        if self._title is not None:
            print(_one_line(self._title), file=self._stream)
            self._title = None
        print(_one_line(line), file=self._stream, flush=True)


@final
class LiveDisplay(Display):
    """Redraws a few lines at the bottom of a terminal; notes scroll by above them.

    Args:
        total_steps: Steps of the whole run.
        title: The line on top.
        console: The terminal.
        clock: Seconds. Default: the monotonic clock.
    """

    def __init__(
        self,
        total_steps: int,
        title: str,
        console: Console,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._title = title
        self._console = console
        self._pace = _Pace(total_steps, clock)
        self._values: dict[str, Value] = {}
        self._live = Live(
            get_renderable=self._picture,
            console=console,
            refresh_per_second=_REFRESH_PER_SECOND,
            # What is printed meanwhile scrolls by above, unless it goes to a file.
            redirect_stdout=sys.stdout.isatty(),
        )

    def __enter__(self) -> Self:
        """Begin to redraw."""
        self._live.start(refresh=True)
        return self

    def __exit__(self, *_: object) -> None:
        """Leave the last picture standing and give the cursor back."""
        self._live.stop()

    def update(self, step: int, values: Mapping[str, Value]) -> None:
        """Keep the values for the next redraw; costs microseconds."""
        self._pace.update(step)
        self._values = {**self._values, **values}  # the redrawing thread reads it

    def note(self, text: str) -> None:
        """Print above the picture, where it stays."""
        self._console.print(Text(_one_line(text)), soft_wrap=False)

    def _picture(self) -> RenderableType:
        pace = self._pace
        bar = ProgressBar(
            total=pace.total_steps,
            completed=pace.step,
            complete_style="cyan",
            finished_style="green",
        )
        title = Text(_one_line(self._title), style="bold", no_wrap=True)
        title.truncate(self._console.width, overflow="ellipsis")
        progress = Text(pace.text(), style="cyan", no_wrap=True)
        head = Table.grid(padding=(0, 1), expand=True)
        if self._console.width >= _WIDE:
            head.add_column(ratio=1)
            head.add_column(justify="right", no_wrap=True)
            head.add_row(bar, progress)
        else:
            head.add_row(bar)
            head.add_row(progress)
        return Group(title, head, _Grid(self._values))


class _Grid:
    """Names and values in as many columns as fit."""

    def __init__(self, values: Mapping[str, Value]) -> None:
        self._cells = [spell(*item) for item in values.items()]

    def __rich_measure__(self, _: Console, options: ConsoleOptions) -> Measurement:
        return Measurement(1, options.max_width)

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> RenderResult:
        num_columns = max(1, options.max_width // _CELL_WIDTH)
        width = options.max_width // num_columns
        table = Table.grid(padding=0, expand=False)
        for _column in range(num_columns):
            table.add_column(width=width, no_wrap=True)
        num_rows = max(1, min(_MAX_ROWS, console.height - 4))
        shown = self._cells[: num_columns * num_rows]
        for i in range(0, len(shown), num_columns):
            row = shown[i : i + num_columns]
            table.add_row(*(_cell(name, text, width - 2) for name, text in row))
        yield table


class _Pace:
    """Counts steps and says how long the rest will take."""

    def __init__(self, total_steps: int, clock: Callable[[], float]) -> None:
        self.total_steps = total_steps
        self.step = 0
        self._clock = clock
        self._seen: deque[tuple[float, int]] = deque()

    @property
    def complete(self) -> bool:
        """Whether the last step is done."""
        return self.step >= self.total_steps

    def update(self, step: int) -> None:
        """Note when a step was reached; a resumed run may begin anywhere."""
        self.step = step
        now = self._clock()
        self._seen.append((now, step))
        while len(self._seen) > 2 and now - self._seen[1][0] > _WINDOW_SECONDS:
            self._seen.popleft()

    def seconds_left(self) -> float | None:
        """Estimate from the recent pace; None as long as there is none."""
        if len(self._seen) < 2:
            return None
        (then, first), (now, last) = self._seen[0], self._seen[-1]
        if last <= first or now <= then:
            return None
        return (self.total_steps - last) * (now - then) / (last - first)

    def text(self) -> str:
        """Say where the run is, on one line."""
        text = f"step {self.step}/{self.total_steps} {self.step / self.total_steps:.0%}"
        left = self.seconds_left()
        if self.complete or left is None:
            return text
        return f"{text}  {_duration(left)} left"


def spell(name: str, value: Value) -> tuple[str, str]:
    """Turn a named value into the words that a person reads.

    Args:
        name: With its unit as suffix, for example `cells_per_s` or `memory_mib`.
        value: A number, or a text that is shown as it is.

    Returns:
        Label and text, for example ("cells/s", "21.4k").
    """
    if isinstance(value, str):
        return name.replace("_", " "), _one_line(value)
    if name.endswith("_per_s"):
        return f"{name.removesuffix('_per_s').replace('_', ' ')}/s", _thousands(value)
    for suffix, unit in (("_ms", "ms"), ("_mib", "MiB")):
        if name.endswith(suffix):
            label = name.removesuffix(suffix).replace("_", " ")
            return label, f"{_short(value)} {unit}"
    for suffix in ("_seconds", "_s"):
        if name.endswith(suffix):
            label = name.removesuffix(suffix).replace("_", " ")
            return label, _duration(value)
    return name.replace("_", " "), _short(value)


def _cell(name: str, text: str, width: int) -> Text:
    """Set label and value apart; the value is the part that must survive."""
    room = max(1, width - len(text) - 1)
    label = name if len(name) <= room else f"{name[: room - 1]}~"
    cell = Text.assemble((label, "dim"), " ", (text, "bold"), no_wrap=True)
    cell.truncate(max(1, width), overflow="ellipsis")
    return cell


def _short(value: float) -> str:
    """Four digits are enough to watch; whole numbers keep all of theirs."""
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{value:.0f}"
    if 1000 <= abs(value) < 1e9:
        return f"{value:.0f}"
    return f"{value:.4g}"


def _thousands(value: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.3g}{letter}"
    return f"{value:.3g}"


def _duration(seconds: float) -> str:
    if not math.isfinite(seconds):
        return str(seconds)
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _one_line(text: str) -> str:
    """Keep control characters and line breaks out of the picture."""
    return "".join(c if c.isprintable() else " " for c in text)
