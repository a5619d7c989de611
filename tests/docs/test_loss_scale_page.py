"""What the page on the loss scale quotes is what its example prints."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "loss_scale.md").read_text()


def without_figures(text: str) -> str:
    """Another machine may round another way; words, names and lines stay."""
    return re.sub(r"-?\d+(\.\d+)?(e[+-]?\d+)?", "#", text)


def test_the_page_quotes_what_the_example_prints() -> None:
    """Operators, modules, stages, formats and kinds, sentence by sentence."""
    done = subprocess.run(
        [sys.executable, "examples/skip_forensics.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    (quoted,) = re.findall(r"```text\n(.*?)```", PAGE, re.DOTALL)
    assert without_figures(done.stdout) == without_figures(quoted)
    lines = re.findall(r"examples/skip_forensics\.py:\d+", done.stdout)
    assert lines == re.findall(r"examples/skip_forensics\.py:\d+", quoted)


def test_the_page_lists_every_field_of_a_skipped_step() -> None:
    """A new field is documented, or this fails."""
    from castwise.training.outcome import Skipped

    (listed,) = re.findall(r"`Skipped\(([^)]*)\)`", PAGE)
    assert sorted(listed.split(", ")) == sorted(Skipped.__dataclass_fields__)
