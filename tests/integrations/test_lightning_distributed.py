"""The plugin under strategies of several processes, inside processes that are there."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import castwise as cw
from castwise.distributed.sharding import shard
from shared_net import ROWS, Net, assert_close, loss_of, net, policy_of, train, whole
from two_ranks import TwoRanks

lightning = pytest.importorskip("lightning")

NUM_STEPS = 3
CLIP = 0.05


def micro_batches(rows: torch.Tensor) -> list[torch.Tensor]:
    """Two for each step, each of them one row less than it could have."""
    return [rows[:2], rows[1:]]


def module_of(name: str, strategy: str) -> Any:
    """A LightningModule around the model that one process trains elsewhere."""

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.inner: Net = net()

        def configure_model(self) -> None:
            if strategy == "fsdp":
                mesh = self.device_mesh["data_parallel"]
                shard(self.inner, policy_of(name), mesh=mesh)

        def training_step(self, batch: Any, _index: int) -> torch.Tensor:
            return loss_of(self.inner(batch[0]))

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    return Module()


def lightning_run(rank: int, name: str, strategy: str) -> dict[str, Any]:
    """Fit on this rank's batches; what came out."""
    from castwise.integrations.lightning import CastwisePrecision

    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": "castwise",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": "1",  # nobody listens: the processes are connected already
    }
    from lightning.pytorch.strategies import ModelParallelStrategy

    strategies: dict[str, Any] = {
        "ddp": "ddp",
        "fsdp": ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
    }
    plugin = CastwisePrecision(_inside(policy_of(name)))
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategies[strategy],
        plugins=[plugin],
        max_epochs=NUM_STEPS,
        accumulate_grad_batches=2,
        gradient_clip_val=CLIP,
        use_distributed_sampler=False,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = module_of(name, strategy)
    rows = torch.cat(micro_batches(ROWS[rank]))
    formats: dict[str, str] = {}

    class Look(lightning.Callback):  # type: ignore[misc]
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            del trainer
            found = pl_module.inner.named_parameters()
            formats.update({each: str(weight.dtype) for each, weight in found})

    trainer.callbacks.append(Look())
    trainer.fit(module, DataLoader(TensorDataset(rows), batch_size=2))
    inner = module.inner
    return {
        "weights": {n: whole(w).detach().clone() for n, w in inner.named_parameters()},
        "formats": formats,
        "num_skipped": plugin.num_skipped,
        "coverage": plugin.coverage(),
    }


def _inside(policy: cw.Policy) -> cw.Policy:
    """The same policy for a model that stands one level deeper."""
    text = policy.to_yaml().replace("module: delicate", "module: inner.delicate")
    return cw.Policy.parse(text)


def expected_of(name: str) -> dict[str, Any]:
    """One process that sees all batches."""
    model, policy = net(), policy_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy, clip_norm=CLIP)
    batches = [each for rows in ROWS for each in micro_batches(rows)]
    return train(model, run, lambda: [loss_of(model(x)) for x in batches], NUM_STEPS)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_accumulated_and_clipped_steps_are_those_of_one_process(
    two_ranks: TwoRanks, strategy: str
) -> None:
    """DDP and ModelParallelStrategy, two micro-batches a step, clipped in each."""
    name = "bf16-mixed fp32"
    expected = expected_of(name)
    assert min(expected["norms"]) > CLIP
    for found in two_ranks(lightning_run, name, strategy):
        assert found["num_skipped"] == 0
        assert found["formats"] == expected["formats"]
        kept = {"weights": found["weights"], "gradients": {}, "buffers": {}}
        assert_close(kept, expected | {"gradients": {}, "buffers": {}}, 2.0**-8)


def test_weights_in_16_bits_are_sharded_in_their_format(two_ranks: TwoRanks) -> None:
    """`shard` in configure_model narrows them first, and leaves the island wide."""
    for found in two_ranks(lightning_run, "bf16-true fp32", "fsdp"):
        wide = {n for n, fmt in found["formats"].items() if fmt == "torch.float32"}
        assert wide == {"delicate.weight", "delicate.bias"}
        assert all(each.isfinite().all() for each in found["weights"].values())
        assert found["num_skipped"] == 0
