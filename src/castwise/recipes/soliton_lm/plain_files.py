"""Lightning's checkpoints as castwise's: safetensors files that run no code when read.

Lightning pickles; whoever reads such a file runs what is in it. Its checkpoint is plain
data all the same: weights, optimizer states, counters of loops. So it goes to the shelf
of the run as a tree, beside the facts of the run and the states of random generators,
and comes back bit for bit. Under DDP one rank writes; under FSDP2 all do, their parts,
while the run goes on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

from lightning.pytorch.plugins.io import CheckpointIO

from castwise.training.random_state import capture_random_states
from castwise.training.strategy import Saves, Strategy

if TYPE_CHECKING:
    from castwise.checkpoints.background import Saved


@final
class ShelfFiles(CheckpointIO):
    """Saves to the shelf of a run, which names the files and lets go of old ones.

    Args:
        saves: Puts checkpoints on the shelf.
        strategy: How the run is spread over processes.
        facts: What every checkpoint says about the run.
    """

    def __init__(
        self, saves: Saves, strategy: Strategy, facts: Mapping[str, Any]
    ) -> None:
        self._saves, self._facts = saves, dict(facts)
        self.strategy = strategy
        """How the run is spread over processes."""
        self._stand: list[Saved] = []
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
            "random": self._random_states(),
            **self.extras,
        }
        step = int(checkpoint["global_step"])
        self._stand += self._saves.begin(step, tree, self.score)

    def reported(self, *, wait: bool = False) -> Sequence[Saved]:
        """Return checkpoints that stand since this was last asked.

        Args:
            wait: Whether for the one that is under way (default: False).
        """
        found = self._saves.wait() if wait else self._saves.finished()
        stand, self._stand = [*self._stand, *found], []
        return stand

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: Any = None
    ) -> dict[str, Any]:
        """Return Lightning's part of a checkpoint."""
        del map_location, weights_only
        _, tree = self.strategy.read(Path(path))
        found: dict[str, Any] = tree["lightning"]
        return found

    def remove_checkpoint(self, path: Any) -> None:
        """Leave files to the shelf."""
        del path

    def _random_states(self) -> Any:
        """Return those of this process, or of all ranks where all of them save."""
        own = capture_random_states()
        return self.strategy.gathered(own) if self.strategy.is_sharded else own


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
