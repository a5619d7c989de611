"""Lightning#4831: a block in full precision inside a model in mixed precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import castwise as cw
from upstream import note_unless

lightning = pytest.importorskip("lightning")

pytestmark = [
    pytest.mark.filterwarnings(
        "ignore:`isinstance\\(treespec, LeafSpec\\):FutureWarning"
    ),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]

ROWS = torch.linspace(-1, 1, 6 * 5).reshape(6, 5).sin()


class Block(nn.Module):
    """A product, with a note of the formats of its forward and its backward."""

    def __init__(self, num_in: int, num_out: int) -> None:
        super().__init__()
        self.product = nn.Linear(num_in, num_out)
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run, and listen to the gradient."""
        y: torch.Tensor = self.product(x)
        self.seen.append(y.dtype)
        if y.requires_grad:
            y.register_hook(lambda gradient: self.seen.append(gradient.dtype))
        return y


class Net(lightning.LightningModule):  # type: ignore[misc]
    """Three blocks; the one in the middle is delicate."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter, self.delicate = Block(5, 7), Block(7, 7)
        self.leave = Block(7, 3)

    def training_step(self, batch: Any, _index: int) -> torch.Tensor:
        """A loss."""
        x = self.delicate(self.enter(batch[0]).float())
        loss: torch.Tensor = self.leave(x).float().square().mean()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain steps."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fitted(**settings: Any) -> Net:
    """Train for two steps."""
    net = Net()
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **settings,
    )
    trainer.fit(net, DataLoader(TensorDataset(ROWS), batch_size=3))
    return net


def test_one_rule_keeps_a_block_in_full_precision() -> None:
    """Without it, an input in fp32 is rounded before the first product."""
    from castwise.integrations.lightning import CastwisePrecision

    stock = fitted(precision="bf16-mixed")
    note_unless(torch.bfloat16 in stock.delicate.seen, "Lightning#4831")

    policy = cw.preset("bf16-mixed").with_rule(
        module="delicate", precision="fp32", because="its residual must stay small"
    )
    net = fitted(plugins=[CastwisePrecision(policy)])
    assert set(net.delicate.seen) == {torch.float32}
    assert len(net.delicate.seen) == 4
    assert set(net.enter.seen) == set(net.leave.seen) == {torch.bfloat16}
