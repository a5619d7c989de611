"""Checkpoints of a sharded run, written while it goes on, and reported when they stand.

    saves = BackgroundSaves(shelf, group)        # on every rank
    saves.begin(step, tree, score)               # copies the tree, and returns
    for saved in saves.finished(): ...           # nothing, or what is on the disk now
    saves.wait()                                 # before the process may end

What `finished` or `wait` has returned survives a kill of any rank at any moment. A save
that is under way when a rank is killed leaves a folder whose name begins with a dot,
which nobody reads and the next save removes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import distributed

from castwise.checkpoints.parts import (
    begin_save,
    finish_save,
    remove_stale_folders,
)

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    from torch.distributed import ProcessGroup

    from castwise.checkpoints.shelf import CheckpointShelf


@dataclass(frozen=True, kw_only=True, slots=True)
class Saved:
    """A checkpoint that stands on the disk."""

    path: Path
    """Where."""

    step: int
    """The step after which it was taken."""


class BackgroundSaves:
    """Puts checkpoints in parts on a shelf; one instance on each rank.

    Args:
        shelf: That of the run.
        group: All ranks, over gloo, and used by nobody else.
    """

    def __init__(self, shelf: CheckpointShelf, group: ProcessGroup) -> None:
        self._shelf, self._group = shelf, group
        self._under_way: tuple[Saved, Future[Any]] | None = None

    def begin(self, step: int, tree: Any, score: float | None) -> list[Saved]:
        """Begin to save; a former save is finished first, and returned.

        Raises:
            CheckpointError: The tree holds what cannot be saved.
            StorageError: A rank could not write the former one.
        """
        before = self.wait()
        told: list[Any] = [None]
        if self._group.rank() == 0:
            remove_stale_folders(self._shelf.folder)
            told = [self._shelf.next_folder(step)]
        distributed.broadcast_object_list(told, src=0, group=self._group)
        saved = Saved(path=told[0], step=step)
        pending = begin_save(
            saved.path,
            tree,
            kind=self._shelf.kind,
            label={"step": step, "score": None if score is None else repr(score)},
            group=self._group,
        )
        self._under_way = (saved, pending)
        return before

    def finished(self) -> list[Saved]:
        """Return the save that was under way, if it stands by now; never wait.

        Ranks learn of it at different moments, so nothing that all must do together
        may depend on it.
        """
        done = self._under_way is not None and self._under_way[1].done()
        return self.wait() if done else []

    def wait(self) -> list[Saved]:
        """Wait for the save that is under way, if there is one, and return it.

        Raises:
            CastwiseError: A rank could not write it.
        """
        if self._under_way is None:
            return []
        (saved, pending), self._under_way = self._under_way, None
        finish_save(pending)
        if self._group.rank() == 0:
            self._shelf.prune()
        return [saved]
