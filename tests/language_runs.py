"""Small runs of a language recipe from the command line, for the tests of each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from click.testing import CliRunner

from castwise.checkpoints import CheckpointShelf
from castwise.cli import root


@dataclass(frozen=True, kw_only=True)
class LanguageRuns:
    """Runs of one recipe, all of them in folders of one place with one cache."""

    recipe: str
    """What `castwise train` calls it."""

    kind: str
    """Kind of its checkpoints."""

    config: str
    """The text of a small config."""

    def prepare(self, place: Path) -> Path:
        """Write the config into a folder, and return the folder."""
        (place / "small.yaml").write_text(self.config)
        return place

    def command(self, place: Path, out: str, *more: str) -> list[str]:
        """Return the arguments of a run."""
        return [
            *("train", self.recipe, "--config", str(place / "small.yaml")),
            *("--out", str(place / out), "--data", str(place / "data")),
            *("--threads", "1", *more),
        ]

    def run(self, place: Path, out: str, *more: str) -> str:
        """Run in this process; the run must end well."""
        result = CliRunner().invoke(
            root, self.command(place, out, *more), catch_exceptions=False
        )
        assert result.exit_code == 0, result.output
        return result.output

    def start(self, place: Path, out: str, *more: str) -> subprocess.Popen[str]:
        """Start a run in a process of its own."""
        return subprocess.Popen(
            [sys.executable, "-m", "castwise", *self.command(place, out, *more)],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def tree_of(self, place: Path, out: str) -> Any:
        """Return the newest checkpoint of a run."""
        shelf = CheckpointShelf(folder=place / out / "checkpoints", kind=self.kind)
        found = shelf.latest().value
        assert found is not None
        return found.tree
