from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from castwise.recipes.kenken import compiled

MODULE = """
from castwise.recipes.kenken.compiled import kernel

@kernel
def double(x):
    return 2 * x
"""

PROGRAM = """
import room
print(room.double(21), sum(room.double.stats.cache_hits.values()))
"""


def run(folder: Path, **extra: str) -> list[str]:
    """Call the kernel of a module in a process of its own; return what it printed."""
    environment = os.environ | {"PYTHONPATH": str(folder)} | extra
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()


def test_the_second_run_finds_the_compiled_kernel(tmp_path: Path) -> None:
    """The first process compiles, the second loads; both compute."""
    (tmp_path / "room.py").write_text(MODULE)
    assert run(tmp_path) == ["42", "0"]
    assert run(tmp_path) == ["42", "1"]


def test_a_read_only_installation_keeps_kernels_in_the_users_cache(
    tmp_path: Path,
) -> None:
    """Where the source's folder cannot be written, the cache of the user is used."""
    install = tmp_path / "install"
    install.mkdir()
    (install / "room.py").write_text(MODULE)
    # a file where __pycache__ would go: not even root can write into it
    (install / "__pycache__").write_text("")
    home = {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path)}
    assert run(install, **home) == ["42", "0"]
    assert run(install, **home) == ["42", "1"]
    assert list((tmp_path / "cache").rglob("*.nbi"))


def test_a_kernel_runs_where_nothing_can_be_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """When no folder can be written, the function is compiled without a cache."""
    asked: list[bool] = []
    compile_ = compiled._compile

    def refuse_to_keep(function: object, *, keep: bool) -> object:
        asked.append(keep)
        if keep:
            raise RuntimeError("no locator available")
        return compile_(function, keep=False)

    monkeypatch.setattr(compiled, "_compile", refuse_to_keep)

    @compiled.kernel
    def triple(x: int) -> int:
        return 3 * x

    assert triple(7) == 21
    assert asked == [True, False]
