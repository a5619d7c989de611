"""The model as Lightning sees it: batches by step, the loss, the optimizer.

Everything is a pure function of the global step, the learning rate and the batch too,
so that a resumed run goes on exactly where it was, in the middle of what Lightning
calls an epoch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from castwise.errors import SettingsError
from castwise.fitting import is_sharded
from castwise.optim import hold_weights
from castwise.policy import Policy
from castwise.recipes.language.evaluation import Batches
from castwise.recipes.language.settings import TrainingSettings
from castwise.recipes.language.token_file import TokenBatch
from castwise.recipes.optimizer_choice import build_optimizer, decay_groups
from castwise.training.schedule import WarmupStableDecay

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

_NARROW = {torch.bfloat16: "bf16", torch.float16: "fp16"}

Pair = tuple[Tensor, Tensor]
Measured = tuple[Tensor, Tensor, Tensor]


class SolitonModule(LightningModule):
    """A language model in Lightning's words.

    Args:
        model: From tokens and targets to the mean loss.
        batches: By step.
        training: Schedule, rates and seed.
        policy: How weights in 16 bits are stored.
        shard: Cuts the model over the processes of a mesh. Default: weights stay whole.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Batches,
        training: TrainingSettings,
        policy: Policy,
        *,
        shard: Callable[[nn.Module, DeviceMesh], object] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.measured: dict[str, float] = {}
        """What the last validation found."""
        self.last_loss = torch.tensor(float("nan"))
        """Of the last training batch."""
        self._batches, self._training, self._policy = batches, training, policy
        self._shard = shard
        self._losses: list[Tensor] = []
        self._sizes: list[int] = []
        self._rates: list[float] = []
        self._schedule = WarmupStableDecay(
            num_steps=training.num_steps,
            num_warmup=training.num_warmup,
            decay_share=training.decay_share,
        )

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """Return the mean loss of a batch."""
        del batch_idx
        loss: Tensor = self.model(*batch)
        self.last_loss = loss.detach()
        return loss

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the learning rate of the step."""
        del batch, batch_idx
        factor = self._schedule.factor(self.trainer.global_step)
        for group, rate in zip(self._groups(), self._rates, strict=True):
            group["lr"] = rate * factor

    def validation_step(self, batch: Measured, batch_idx: int) -> None:
        """Keep the loss of a batch, and how many tokens it counts for."""
        del batch_idx
        tokens, targets, num_tokens = batch
        self._losses.append(self.model(tokens, targets).detach())
        self._sizes.append(int(num_tokens))

    def on_validation_epoch_end(self) -> None:
        """Put the losses together, those of all processes."""
        losses, sizes = torch.stack(self._losses).float(), torch.tensor(self._sizes)
        gathered = self.all_gather((losses, sizes.to(losses.device)))
        self._losses, self._sizes = [], []
        self.measured = self._batches.measures(
            gathered[0].flatten().tolist(), gathered[1].flatten().tolist()
        )

    def configure_model(self) -> None:
        """Cut the weights over the processes, once, if the strategy wants that."""
        if self._shard is not None and not any(map(is_sharded, self.parameters())):
            assert self.device_mesh is not None, "only ModelParallelStrategy shards"
            self._shard(self.model, self.device_mesh["data_parallel"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build AdamW; what is held in 16 bits keeps its digits beside it."""
        optimizer = build_optimizer(
            "adamw",
            decay_groups(self.model, self._training.weight_decay),
            lr=self._training.learning_rate,
            betas=self._training.betas,
        )
        self._rates = [float(group["lr"]) for group in optimizer.param_groups]
        weights = list(self.model.parameters())
        narrow = {weight.dtype for weight in weights} & _NARROW.keys()
        if narrow and self._policy.storage not in {None, "plain"}:
            hold_weights(
                optimizer,
                str(self._policy.storage),
                fmt=_NARROW[narrow.pop()],
                keep=[weight for weight in weights if weight.dtype not in _NARROW],
            )
        return optimizer

    def train_dataloader(self) -> BatchesByStep:
        """Return the batches from the global step on."""
        return BatchesByStep(self, self._batches)

    def val_dataloader(self) -> ValidationBatches:
        """Return this process's share of the validation batches."""
        return ValidationBatches(
            [self._measured_of(batch) for batch in self._batches.validation]
        )

    def share_of(self, batch: TokenBatch) -> Pair:
        """Return the windows of a batch that this process sees."""
        rank, num = self.trainer.global_rank, self.trainer.world_size
        return batch.tokens[rank::num], batch.targets[rank::num]

    def _measured_of(self, batch: TokenBatch) -> Measured:
        """Return this process's windows of a batch that the model is measured on.

        Of the last batch there may be none for it; then it runs one with the others,
        who may hold a part of its weights, and counts no token.
        """
        tokens, targets = self.share_of(batch)
        num_tokens = torch.tensor(targets.numel())
        if not len(tokens):
            tokens, targets = batch.tokens[:1], batch.targets[:1]
        return tokens, targets, num_tokens

    def _groups(self) -> list[dict[str, Any]]:
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        groups: list[dict[str, Any]] = optimizer.param_groups
        return groups


class BatchesByStep:
    """An endless iterable that begins where the run stands."""

    def __init__(self, module: SolitonModule, batches: Batches) -> None:
        self._module, self._batches = module, batches

    def __iter__(self) -> Iterator[Pair]:
        """Yield the batch of the next update, and all after it."""
        step, num = self._module.trainer.global_step, self._module.trainer.world_size
        size = len(self._batches.train(step).tokens)
        if size % num:
            raise SettingsError(
                f"{num} processes need a batch that they can share evenly, got "
                f"text.batch_size {size}; take a number of devices that divides it"
            )
        while True:
            yield self._module.share_of(self._batches.train(step))
            step += 1


class ValidationBatches:
    """The batches that a model is measured on; Lightning takes a list for loaders."""

    def __init__(self, batches: list[Measured]) -> None:
        self._batches = batches

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._batches)

    def __iter__(self) -> Iterator[Measured]:
        """Yield them in order."""
        return iter(self._batches)
