"""The strategy of a run: one process, DDP or FSDP2, with the same loop around each.

    strategy = Strategy(name="ddp", ranks=ranks)
    strategy.shard(model, policy, device)              # fsdp: before the optimizer
    run = prepare(model, optimizer, policy)
    forward = strategy.forward_of(model, run)          # ddp: what training calls

Every rank sees its own rows of one global batch, and its loss counts for its share of
it, so that the mean over ranks, which is what DDP and FSDP2 take of gradients, is the
gradient of the whole batch. N processes then learn what one would, but for the order in
which numbers are added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import distributed

from castwise.checkpoints.container import read_checkpoint
from castwise.distributed.compression import Compression
from castwise.distributed.ranks import ALONE, Ranks, from_first
from castwise.distributed.roll_call import RollCall, credentials
from castwise.errors import SettingsError
from castwise.fitting import fit_to_device

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

    from castwise.checkpoints import CheckpointFacts, CheckpointShelf
    from castwise.checkpoints.background import Saved
    from castwise.distributed.formats import Gather
    from castwise.distributed.low_rank import LowRank
    from castwise.policy import Policy
    from castwise.training.step import Run

StrategyName = Literal["one", "ddp", "fsdp"]
STRATEGIES: tuple[StrategyName, ...] = ("one", "ddp", "fsdp")


class Saves(Protocol):
    """Who puts the checkpoints of a run on its shelf."""

    def begin(self, step: int, tree: Any, score: float | None) -> list[Saved]:
        """Save a tree; return what is reported as saved from now on."""

    def finished(self) -> list[Saved]:
        """Return what has come to stand on the disk since; never wait."""

    def wait(self) -> list[Saved]:
        """Return it when nothing is under way."""


class PlainSaves:
    """Saves of a run whose weights are whole: one rank writes, and waits for the disk.

    Args:
        shelf: That of the run.
        writes: Whether this is that rank.
    """

    def __init__(self, shelf: CheckpointShelf, *, writes: bool) -> None:
        self._shelf, self._writes = shelf, writes

    def begin(self, step: int, tree: Any, score: float | None) -> list[Saved]:
        """Save a tree, if it is this rank's to do."""
        if self._writes:
            self._shelf.save(step, tree, score=score)
        return []

    def finished(self) -> list[Saved]:
        """Return nothing: what was begun is done."""
        return []

    def wait(self) -> list[Saved]:
        """Return nothing: what was begun is done."""
        return []


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How a run is spread over processes."""

    name: StrategyName = "one"
    """One process, whole weights on each (ddp), or a part on each (fsdp)."""

    ranks: Ranks = ALONE
    """The processes."""

    compress: str = "reduce"
    """How DDP makes gradients smaller, as `castwise.replicate` reads it."""

    def __post_init__(self) -> None:
        """Refuse words that are not known, and several processes without a strategy.

        Raises:
            SettingsError: Naming what there is.
        """
        if self.name not in STRATEGIES:
            raise SettingsError(
                f"a strategy needs to be {', '.join(STRATEGIES)}, got {self.name!r}"
            )
        if Compression.parse(self.compress) != Compression() and self.name != "ddp":
            raise SettingsError(
                f"--compress {self.compress} makes gradients smaller that DDP sends "
                "round; give it with --strategy ddp"
            )
        if self.name == "one" and self.ranks.num_ranks > 1:
            raise SettingsError(
                f"{self.ranks.num_ranks} processes were started and would each train "
                "the same; give them --strategy ddp or --strategy fsdp"
            )

    @property
    def is_sharded(self) -> bool:
        """Whether every forward needs all ranks, since each holds a part of weights."""
        return self.name == "fsdp"

    @property
    def takes_part(self) -> bool:
        """Whether this rank is needed where a finished model is measured and told."""
        return self.is_sharded or self.ranks.is_first

    def shard(
        self,
        model: nn.Module,
        policy: Policy,
        device: torch.device,
        *,
        fallback: str | None = None,
        gather: Gather = "low",
    ) -> None:
        """Cut weights over the ranks if the strategy does; before the optimizer.

        Args:
            model: On its device.
            policy: That the run will be prepared with.
            device: Where the model is.
            fallback: As in `prepare`.
            gather: As in `castwise.shard`.
        """
        if self.is_sharded:
            from castwise.distributed.sharding import shard  # noqa: PLC0415 -- FSDP2 takes a second to load

            fitted, _ = fit_to_device(policy, device, fallback)
            shard(model, fitted, gather=gather)

    def forward_of(self, model: nn.Module, run: Run) -> nn.Module:
        """Return what training has to call so that gradients are summed.

        Raises:
            RanksError: Another rank has another model, policy or version.
        """
        policy = run.precision.effective
        if self.ranks.num_ranks > 1:
            own = credentials(model, policy, settings={"compress": self.compress})
            RollCall.in_group().agree(own)
        if self.name != "ddp":
            return model
        from castwise.distributed.replication import replicate  # noqa: PLC0415 -- as above

        ids = [self.ranks.local_rank] if run.device.type == "cuda" else None
        return replicate(
            model,
            policy,
            compress=self.compress,
            loss_scale=run.loss_scale,
            device_ids=ids,
        )

    def not_sent(self, model: nn.Module) -> dict[str, Any]:
        """Return what compression has not sent so far, for a tree that rank 0 saves.

        It is empty where nothing is owed; every rank must call.
        """
        feedback = self._feedback(model)
        return {} if feedback is None else {"not_sent": feedback.whole_state_dict()}

    def take_not_sent(self, model: nn.Module, tree: Mapping[str, Any]) -> None:
        """Go on with what `not_sent` returned; it may have been saved by more ranks.

        Raises:
            CheckpointError: Gradients were compressed in another way.
        """
        feedback = self._feedback(model)
        if feedback is not None and "not_sent" in tree:
            feedback.load_state_dict(tree["not_sent"])

    def _feedback(self, model: nn.Module) -> LowRank | None:
        if Compression.parse(self.compress).method != "powersgd":
            return None
        from castwise.distributed.replication import (  # noqa: PLC0415 -- as above
            feedback_of,
        )

        return feedback_of(model)

    def saves(self, shelf: CheckpointShelf) -> Saves:
        """Return what puts this run's checkpoints on a shelf; every rank must call."""
        if not self.is_sharded:
            return PlainSaves(shelf, writes=self.ranks.is_first)
        from castwise.checkpoints.background import BackgroundSaves  # noqa: PLC0415 -- as above

        # A thread talks through it, so it must be no other's.
        return BackgroundSaves(shelf, distributed.new_group(backend="gloo"))

    def read(self, path: Path) -> tuple[CheckpointFacts, Any]:
        """Read a checkpoint; of one in parts a sharded run reads what it will hold."""
        if not self.is_sharded or not path.is_dir():
            return read_checkpoint(path)
        from torch.distributed.device_mesh import init_device_mesh  # noqa: PLC0415 -- as above

        from castwise.checkpoints.parts import read_parts  # noqa: PLC0415 -- as above

        mesh = init_device_mesh("cpu", (self.ranks.num_ranks,))
        return read_parts(path, mesh=mesh)

    def agreed(self, measures: Mapping[str, float]) -> dict[str, float]:
        """Return what rank 0 has measured, so that all draw the same conclusions."""
        return from_first(self.ranks, lambda: dict(measures))

    def means(self, values: Mapping[str, float]) -> dict[str, float]:
        """Return the mean of each number over all ranks; every rank must call."""
        if self.ranks.num_ranks == 1:
            return dict(values)
        sums = torch.tensor([*values.values()], dtype=torch.float64)
        distributed.all_reduce(sums)
        sums /= self.ranks.num_ranks
        return dict(zip(values, sums.tolist(), strict=True))

    def gathered(self, own: Any) -> list[Any]:
        """Return plain data of every rank, by rank; every rank must call."""
        if self.ranks.num_ranks == 1:
            return [own]
        found: list[Any] = [None] * self.ranks.num_ranks
        distributed.all_gather_object(found, own)
        return found
