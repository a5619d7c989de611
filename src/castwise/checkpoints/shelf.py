"""The shelf of a run: its last k checkpoints and the best one.

There is no index file and no `latest` link that a kill could leave behind the truth:
the folder is the state. A name says the order of saving and the step,

    0007-step-1200.safetensors      or, of a sharded run, the folder
    0007-step-1200.sharded

and the header holds the score. Order of saving, not step, decides what is latest, so a
run that went back to an older checkpoint and continues is not overtaken by its own
abandoned future. One run writes to a shelf; any number may read.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from castwise.checkpoints.container import (
    CheckpointFacts,
    describe_checkpoint,
    read_checkpoint,
    save_checkpoint,
)
from castwise.checkpoints.durable import remove_stale_temporaries, storage_error
from castwise.decision import Decision
from castwise.errors import (
    CheckpointError,
    DamagedCheckpointError,
    ForeignCheckpointError,
    NewerCheckpointError,
    SettingsError,
    StorageError,
)

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_NAME = re.compile(r"(?P<order>\d{4,})-step-(?P<step>\d+)\.(safetensors|sharded)")


@dataclass(frozen=True, kw_only=True, slots=True)
class StoredCheckpoint:
    """One checkpoint of a shelf, read and found whole."""

    path: Path
    """Where it lies."""

    step: int
    """The step after which it was saved."""

    score: float | None
    """What it was judged by, if it was."""

    tree: Any
    """Its contents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointShelf:
    """Keeps the last few checkpoints of a run and the best one in a folder."""

    folder: Path
    """Created on the first save."""

    kind: str
    """Kind of every checkpoint on the shelf."""

    keep_last: int = 3
    """How many of the latest stay; at least two survive damage to one."""

    best_is: Literal["highest", "lowest"] = "highest"
    """Which score is best; the earlier one wins a tie. NaN is never best."""

    def __post_init__(self) -> None:
        if self.keep_last < 1:
            raise SettingsError(
                f"a shelf needs keep_last of at least 1, got {self.keep_last}; raise it"
            )
        if self.best_is not in {"highest", "lowest"}:
            raise SettingsError(
                f"best_is needs 'highest' or 'lowest', got {self.best_is!r}; choose one"
            )

    def save(self, step: int, tree: Any, score: float | None = None) -> Path:
        """Save a checkpoint durably, then let go of those that need not stay.

        Args:
            step: The step after which the tree was taken.
            tree: As for `save_checkpoint`.
            score: What to judge it by. Default: not judged, never best.

        Returns:
            The new file.

        Raises:
            StorageError: The disk is full or the folder cannot be written; what was on
                the shelf is still there.
        """
        path = self._next_name(step).with_suffix(".safetensors")
        label = {"step": step, "score": None if score is None else repr(float(score))}
        save_checkpoint(path, tree, kind=self.kind, label=label)
        self.prune()
        return path

    def next_folder(self, step: int) -> Path:
        """Return where the ranks of a sharded run shall put their next checkpoint.

        Raises:
            StorageError: The folder cannot be written.
        """
        return self._next_name(step).with_suffix(".sharded")

    def _next_name(self, step: int) -> Path:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise storage_error("create", self.folder, error) from error
        remove_stale_temporaries(self.folder)
        order = max((_order(path) for path in self.paths()), default=0) + 1
        return self.folder / f"{order:04d}-step-{step}"

    def paths(self) -> list[Path]:
        """List what stands on the shelf, the latest first, damaged ones included."""
        try:
            names = [p for p in self.folder.iterdir() if _NAME.fullmatch(p.name)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise storage_error("read", self.folder, error) from error
        return sorted(names, key=_order, reverse=True)

    def latest(
        self, read: Callable[[Path], tuple[CheckpointFacts, Any]] | None = None
    ) -> Decision[StoredCheckpoint | None]:
        """Read the latest checkpoint that is whole.

        Args:
            read: How. Default: with all tensors whole.

        Returns:
            The checkpoint and why it is this one, naming each damaged one that was
            passed over; None where nothing was ever saved.

        Raises:
            DamagedCheckpointError: There are checkpoints, but none is whole.
            ForeignCheckpointError: The shelf belongs to another kind of run.
            NewerCheckpointError: The latest was written by a later castwise.
        """
        return self._first_whole(self.paths(), "the latest", read or read_checkpoint)

    def best(self) -> Decision[StoredCheckpoint | None]:
        """Read the checkpoint with the best score that is whole.

        Returns:
            As `latest`; None where no checkpoint has a score.

        Raises:
            CheckpointError: As `latest`.
        """
        return self._first_whole(
            self._by_score(), f"the {self.best_is} score", read_checkpoint
        )

    def _first_whole(
        self,
        paths: list[Path],
        title: str,
        read: Callable[[Path], tuple[CheckpointFacts, Any]],
    ) -> Decision[StoredCheckpoint | None]:
        passed_over: list[str] = []
        for path in paths:
            try:
                facts, tree = read(path)
            except (DamagedCheckpointError, ForeignCheckpointError) as error:
                passed_over.append(str(error).split(";")[0])
                continue
            self._check_kind(facts)
            stored = StoredCheckpoint(
                path=path, step=_step(path), score=_score(facts), tree=tree
            )
            because = "; ".join([f"{title} whole checkpoint", *passed_over])
            return Decision(stored, because)
        if passed_over:
            raise DamagedCheckpointError(
                f"no checkpoint in {self.folder} is whole: {'; '.join(passed_over)}; "
                "start a new run in another folder"
            )
        return Decision(None, f"{self.folder} holds no checkpoint to choose from")

    def _check_kind(self, facts: CheckpointFacts) -> None:
        if facts.kind != self.kind:
            raise ForeignCheckpointError(
                f"{facts.path} holds a checkpoint of kind {facts.kind!r}, need "
                f"{self.kind!r}; choose the folder of another run"
            )

    def _by_score(self) -> list[Path]:
        """List the judged checkpoints, best first, as far as headers can be read."""
        judged: list[tuple[float, int, Path]] = []
        for path in self.paths():
            try:
                score = _score(describe_checkpoint(path))
            except NewerCheckpointError:
                raise
            except (CheckpointError, StorageError):
                continue
            if score is not None and not math.isnan(score):
                rank = -score if self.best_is == "highest" else score
                judged.append((rank, _order(path), path))
        return [path for _, _, path in sorted(judged)]

    def prune(self) -> None:
        """Let go of those that need not stay.

        Raises:
            StorageError: The system refused.
        """
        keep = {*self.paths()[: self.keep_last], *self._by_score()[:1]}
        for path in self.paths():
            if path in keep:
                continue
            if path.is_dir():
                from castwise.checkpoints.parts import remove_folder  # noqa: PLC0415 -- loads torch.distributed

                remove_folder(path)
                continue
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                raise storage_error("remove", path, error) from error


def _order(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is not on a shelf"
    return int(match["order"])


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    assert match is not None, f"{path} is not on a shelf"
    return int(match["step"])


def _score(facts: CheckpointFacts) -> float | None:
    score = facts.label.get("score")
    return None if score is None else float(score)
