from __future__ import annotations

import runpy
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "plain_loop.py"


def test_the_plain_loop_example_runs_and_learns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What the documentation shows works as shown, in seconds, and says what it did."""
    example = runpy.run_path(str(EXAMPLE))
    error = example["main"]()
    said = capsys.readouterr().out
    assert error < 8.0, "a quarter of the variance of the target"
    assert "1 module in fp32 inside bf16: 2" in said
    assert "skipped" not in said
