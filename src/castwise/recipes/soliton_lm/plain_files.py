"""Lightning's checkpoints as castwise's: safetensors files that run no code when read.

Lightning pickles; whoever reads such a file runs what is in it. Its checkpoint is plain
data all the same: weights, optimizer states, counters of loops. So it goes to the shelf
of the run as a tree, beside the facts of the run and the states of random generators,
and comes back bit for bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

from lightning.pytorch.plugins.io import CheckpointIO

from castwise.checkpoints import CheckpointShelf, load_checkpoint
from castwise.training.random_state import capture_random_states


@final
class ShelfFiles(CheckpointIO):
    """Saves to a shelf, which names the files and lets go of old ones.

    Args:
        shelf: Of the run.
        facts: What every checkpoint says about the run.
    """

    def __init__(self, shelf: CheckpointShelf, facts: Mapping[str, Any]) -> None:
        self._shelf, self._facts = shelf, dict(facts)
        self.score: float | None = None
        """What the next checkpoint is judged by."""
        self.extras: dict[str, Any] = {}
        """What else the next checkpoint holds."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Put a checkpoint on the shelf; the path is the shelf's business."""
        del path, storage_options
        tree = {
            "lightning": _plain(checkpoint),
            "facts": self._facts,
            "random": capture_random_states(),
            **self.extras,
        }
        self._shelf.save(int(checkpoint["global_step"]), tree, score=self.score)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Return Lightning's part of a checkpoint."""
        del map_location, weights_only
        tree = load_checkpoint(Path(path), kind=self._shelf.kind)
        found: dict[str, Any] = tree["lightning"]
        return found

    def remove_checkpoint(self, path: Any) -> None:
        """Leave files to the shelf."""
        del path


def _plain(value: Any) -> Any:
    """Turn subclasses of plain containers and numbers into what they hold."""
    if isinstance(value, Mapping):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, tuple):
        return tuple(_plain(one) for one in value)
    if isinstance(value, list):
        return [_plain(one) for one in value]
    for kind in (bool, int, float, str):
        if isinstance(value, kind) and type(value) is not kind:
            return kind(value)
    return value
