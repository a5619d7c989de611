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
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import distributed

from castwise.distributed.ranks import ALONE, Ranks, from_first
from castwise.errors import SettingsError
from castwise.fitting import fit_to_device

if TYPE_CHECKING:
    from torch import nn

    from castwise.distributed.formats import Gather
    from castwise.policy import Policy
    from castwise.training.step import Run

StrategyName = Literal["one", "ddp", "fsdp"]
STRATEGIES: tuple[StrategyName, ...] = ("one", "ddp", "fsdp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Strategy:
    """How a run is spread over processes."""

    name: StrategyName = "one"
    """One process, whole weights on each (ddp), or a part on each (fsdp)."""

    ranks: Ranks = ALONE
    """The processes."""

    def __post_init__(self) -> None:
        """Refuse a word that is not known, and several processes without a strategy.

        Raises:
            SettingsError: Naming what there is.
        """
        if self.name not in STRATEGIES:
            raise SettingsError(
                f"a strategy needs to be {', '.join(STRATEGIES)}, got {self.name!r}"
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
        """Return what training has to call so that gradients are summed."""
        if self.name != "ddp":
            return model
        from castwise.distributed.replication import replicate  # noqa: PLC0415 -- as above

        ids = [self.ranks.local_rank] if run.device.type == "cuda" else None
        return replicate(model, run.precision.effective, device_ids=ids)

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
