from __future__ import annotations

import pytest

from command_line import Run, runner


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command as a person does; returns code, output and error."""
    return runner(capsys)
