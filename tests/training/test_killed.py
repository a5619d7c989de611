from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("killed_run.py")
NUM_KILLS = 10


@pytest.mark.slow
def test_a_run_that_is_killed_at_any_instant_ends_with_the_same_bits(
    tmp_path: Path,
) -> None:
    """SIGKILL at random instants of a step: weights, moments, scale, skips, journal."""
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path), str(NUM_KILLS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == NUM_KILLS
    assert told["whole"]["num_skipped"] == 5
    assert told["killed"] == told["whole"]
