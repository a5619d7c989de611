"""The command line as a person uses it, for tests: words in, code and texts out."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from castwise import cli

Run = Callable[..., tuple[int, str, str]]
"""Words of a command -> exit code, what it printed, and what it complained of."""


def runner(capsys: pytest.CaptureFixture[str]) -> Run:
    """Return a function that runs one command."""

    def run(*words: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main([str(each) for each in words])
        out, err = capsys.readouterr()
        return int(left.value.code or 0), out, err

    return run
