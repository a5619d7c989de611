import io
import math
import re

import pytest
from rich.console import Console

from castwise.errors import SettingsError
from castwise.training.display import (
    Display,
    LineDisplay,
    LiveDisplay,
    NullDisplay,
    open_display,
    spell,
)

VALUES: dict[str, str | float] = {
    "loss": 1.23456,
    "accuracy": 0.9531,
    "cells_per_s": 21_432.0,
    "step_ms": 41.66,
    "memory_mib": 512.25,
    "memory_peak_mib": 1830.0,
    "scale": 65536.0,
    "precision": "bf16-mixed",
    "a_name_that_is_far_too_long_for_a_narrow_terminal": math.nan,
}


class Clock:
    """Time that passes when told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        """Read it."""
        return self.now


def terminal(width: int, height: int = 24) -> Console:
    """A terminal that remembers what was written."""
    return Console(
        file=io.StringIO(),
        force_terminal=True,
        width=width,
        height=height,
        color_system="256",
    )


def written(console: Console) -> str:
    """What stands in it, control sequences removed."""
    assert isinstance(console.file, io.StringIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())


@pytest.mark.parametrize("width", [200, 80, 40, 21, 9, 1])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    """Whatever the width, nothing wraps and nothing fails."""
    console = terminal(width)
    with LiveDisplay(3000, "kenken small, bf16-mixed on a quiet CPU", console) as live:
        live.update(1234, VALUES)
    lines = [line.rstrip() for line in written(console).replace("\r", "\n").split("\n")]
    assert max(map(len, lines)) <= width
    if width >= 40:
        text = "\n".join(lines)
        for shown in ("1.235", "0.9531", "21.4k", "41.66 ms", "65536", "bf16-mixed"):
            assert shown in text
        assert "step 1234/3000 41%" in text


def test_a_low_terminal_is_not_flooded() -> None:
    """A hundred measures are cut to what can be watched."""
    console = terminal(40, height=16)
    with LiveDisplay(10, "t", console) as live:
        live.update(1, {f"measure_{i}": float(i) for i in range(100)})
    last_picture = written(console).rsplit("step 1/10", 1)[1]
    assert 9 <= len(last_picture.strip().splitlines()) <= 13


def test_notes_stay_above_the_picture_and_markup_is_no_markup() -> None:
    """A path in brackets is text, and a line break cannot break the picture."""
    console = terminal(80)
    with LiveDisplay(10, "run [bold]x[/nope]", console) as live:
        live.note("saved [/tmp/x]\nand more")
        live.update(3, {"why": "[red]because[/]"})
    text = written(console)
    assert "saved [/tmp/x] and more" in text
    assert "run [bold]x[/nope]" in text
    assert "[red]because[/]" in text


def test_a_piped_standard_output_stays_apart(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """`castwise ... > answers.txt` on a terminal keeps its answers in the file."""
    console = terminal(80)
    with LiveDisplay(10, "t", console):
        print("answer")  # noqa: T201 -- what a command would do
    assert capsys.readouterr().out == "answer\n"
    assert "answer" not in written(console)


def test_an_error_gives_the_cursor_back() -> None:
    """The terminal is left as it was, and the error passes."""
    console = terminal(80)
    with pytest.raises(KeyboardInterrupt), LiveDisplay(10, "t", console):
        raise KeyboardInterrupt
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().rstrip().endswith("\x1b[?25h")


def test_values_stay_until_they_are_updated() -> None:
    """An evaluation's measure is seen between two evaluations."""
    console = terminal(80)
    with LiveDisplay(10, "t", console) as live:
        live.update(1, {"solved": 0.5})
        live.update(2, {"loss": 2.0})
    last_picture = written(console).rsplit("step 2/10", 1)[1]
    assert "solved 0.5" in last_picture
    assert "loss 2" in last_picture


def test_lines_are_occasional_and_the_last_one_always_stands() -> None:
    """Every 15 seconds; first and last step in any case; no control characters."""
    clock, stream = Clock(), io.StringIO()
    display = LineDisplay(100, "kenken", stream, clock)
    for step in range(1, 101):
        display.update(step, {"loss": 1 / step})
        clock.now += 1
    display.note("done")
    lines = stream.getvalue().splitlines()
    assert lines[0] == "kenken"
    assert [line.split()[1] for line in lines[1:-1]] == [
        *("1/100", "16/100", "31/100", "46/100", "61/100", "76/100", "91/100"),
        "100/100",
    ]
    assert lines[3] == "step 31/100 31%  1:09 left  loss 0.03226"
    assert lines[-1] == "done"
    assert "\x1b" not in stream.getvalue()


def test_the_time_left_follows_the_recent_pace_of_a_resumed_run() -> None:
    """Steps made before the resume took no time here; a slower pace is noticed."""
    clock, stream = Clock(), io.StringIO()
    display = LineDisplay(1000, "t", stream, clock)
    for step in range(901, 951):
        display.update(step, {})
        clock.now += 1
    assert "left" not in stream.getvalue().splitlines()[1]
    assert "step 946/1000 95%  0:54 left" in stream.getvalue()
    for step in range(951, 991):
        display.update(step, {})
        clock.now += 10
    last = stream.getvalue().splitlines()[-1]
    assert last == "step 990/1000 99%  1:40 left"


def test_the_display_fits_where_the_output_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A pipe gets lines, a terminal the picture, a dumb one lines, quiet nothing."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    assert isinstance(open_display(5, "t", stream=Terminal()), LiveDisplay)
    assert isinstance(open_display(5, "t", stream=io.StringIO()), LineDisplay)
    assert isinstance(open_display(5, "t", quiet=True), NullDisplay)
    monkeypatch.setenv("TERM", "dumb")
    assert isinstance(open_display(5, "t", stream=Terminal()), LineDisplay)
    with pytest.raises(SettingsError, match="at least one step, got 0"):
        open_display(0, "t")


def test_the_null_display_is_a_display(capsys: pytest.CaptureFixture[str]) -> None:
    """Off is an object that does nothing, not a special case in the loop."""
    with NullDisplay() as display:
        assert isinstance(display, Display)
        display.update(1, VALUES)
        display.note("unseen")
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "value", "spelled"),
    [
        ("cells_per_s", 21_432.0, "cells/s 21.4k"),
        ("cells_per_s", 3.2e6, "cells/s 3.2M"),
        ("cells_per_s", 7.0, "cells/s 7"),
        ("step_ms", 0.1234567, "step 0.1235 ms"),
        ("memory_peak_mib", 1830.4, "memory peak 1830 MiB"),
        ("train_seconds", 4000.0, "train 1:06:40"),
        ("train_seconds", 59.9, "train 1:00"),
        ("wait_s", 0.25, "wait 0.2 s"),
        ("wait_s", math.inf, "wait inf"),
        ("loss", math.nan, "loss nan"),
        ("scale", 65536.0, "scale 65536"),
        ("learning_rate", 3e-4, "learning rate 0.0003"),
        ("rule", "a\tb", "rule a b"),
        ("loss", -12345.678, "loss -12346"),
        ("n", 10**12, "n 1e+12"),
    ],
)
def test_values_are_spelled_with_their_units(
    name: str, value: str | float, spelled: str
) -> None:
    """Units come from the name; four digits are enough to watch."""
    assert " ".join(spell(name, value)) == spelled
