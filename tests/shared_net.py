"""One small model, trained by one process that sees two batches, or by two.

What two processes find is compared with what one finds, so both use these functions.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.distributed.replication import replicate
from castwise.distributed.sharding import shard
from castwise.islands import apply_policy, module_facts
from castwise.numerics.contract import Contract, prove
from castwise.policy import Policy
from castwise.region import Region
from tolerances import TOLERANCES

ROWS = torch.linspace(-1, 1, 2 * 3 * 5).reshape(2, 3, 5).sin()
"""A batch of three rows for each process."""

LAST_BITS = 4 * TOLERANCES["fp32"].unit
"""Norms sum their gradients in an order that depends on where tensors lie in memory."""


class Block(nn.Module):
    """A norm and a product, and a table in a buffer."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(7)
        self.product = nn.Linear(7, 7)
        self.register_buffer("table", torch.linspace(0, 1, 7) ** 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Stay near the input."""
        y: torch.Tensor = x + self.product(self.norm(x)).tanh() * self.table
        return y


class Net(nn.Module):
    """Two blocks and a delicate product between two others."""

    def __init__(self, recomputed: str = "") -> None:
        super().__init__()
        self.recomputed = recomputed
        self.enter = nn.Linear(5, 7)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.delicate = nn.Linear(7, 7)
        self.leave = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run, with blocks recomputed or not."""
        x = self.enter(x)
        for block in self.blocks:
            if self.recomputed:
                reentrant = self.recomputed == "reentrant"
                x = checkpoint(block, x, use_reentrant=reentrant)
            else:
                x = block(x)
        y: torch.Tensor = self.leave(self.delicate(x))
        return y


def policy_of(name: str) -> Policy:
    """A preset, or `bf16-sums` with r=bf16, with an island or another backward."""
    preset, _, island = name.partition(" ")
    precision = {"fp32": "p=fp32,c=fp32", "fp64": "p=fp64,c=fp64,o=fp32"}
    if preset == "bf16-sums":
        policy = cw.preset("bf16-mixed").with_default("p=fp32,c=bf16,o=bf16,r=bf16")
    else:
        policy = cw.preset(preset)
    if island == "backward":
        return policy.with_rule(module="blocks.1", stage="backward", precision="c=fp32")
    if island in precision:
        return policy.with_rule(module="delicate", precision=precision[island])
    return policy.with_rule(module="delicate", precision=island) if island else policy


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A loss in fp32."""
    return out.float().square().mean()


def net(recomputed: str = "") -> Net:
    """The same weights on every process, which bf16 holds exactly."""
    torch.manual_seed(0)
    model = Net(recomputed)
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()
    return model


def whole(tensor: Any) -> torch.Tensor:
    """All rows of a sharded tensor."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    model: nn.Module,
    run: cw.Run,
    losses: Callable[[], list[torch.Tensor]],
    num_steps: int = 3,
) -> dict[str, Any]:
    """Steps of all the losses; what came out."""
    gradients: dict[str, torch.Tensor] = {}
    outcomes = []
    for _ in range(num_steps):
        with run.step() as step:
            batches = losses()
            for loss in batches:
                step.backward(loss)
            for weight in model.parameters():
                assert weight.grad is not None
                weight.grad.div_(len(batches))  # as the mean over processes is taken
            gradients = {
                name: whole(weight.grad).clone()
                for name, weight in model.named_parameters()
            }
        outcomes.append(step.outcome)
    return {
        "gradients": gradients,
        "weights": {n: whole(w).detach().clone() for n, w in model.named_parameters()},
        "buffers": {n: b.clone() for n, b in model.named_buffers()},
        "formats": {name: str(w.dtype) for name, w in model.named_parameters()},
        "norms": [outcome.gradient_norm for outcome in outcomes],
    }


def whole_run(name: str, clip_norm: float | None = None) -> dict[str, Any]:
    """What one process finds that sees both batches."""
    model, policy = net(), policy_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    run = cw.prepare(model, optimizer, policy, clip_norm=clip_norm)
    return train(model, run, lambda: [loss_of(model(x)) for x in ROWS])


def proof_on(
    rank: int, kind: str, name: str, rows: torch.Tensor = ROWS, recomputed: str = ""
) -> Contract:
    """Prove a forward and backward of the model on this rank, sharded or replicated."""
    model, policy = net(recomputed), policy_of(name)
    if kind == "fsdp":
        shard(model, policy)
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    wrapped = replicate(model, policy) if kind == "ddp" else model
    region = Region.of(policy, "full", (applied,))

    def run() -> None:
        with region.entered("cpu"):
            loss = wrapped(rows[rank]).square().mean()
        loss.backward()

    return prove(run, model, applied, brought=["fp32"])


def assert_close(found: dict[str, Any], expected: dict[str, Any], share: float) -> None:
    """Compare with the largest number of the whole model, not with tiny ones."""
    for kind in ("gradients", "weights", "buffers"):
        largest = max((each.abs().max() for each in expected[kind].values()), default=0)
        assert found[kind].keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            error = (found[kind][name].double() - value.double()).abs().max()
            assert error <= share * largest, (kind, name, error, largest)


class Messages(TorchDispatchMode):
    """Notes the format of what processes send to one another."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[tuple[str, str, int]] = []

    def __torch_dispatch__(
        self, func: Any, _: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Note a collective, and run it."""
        name = func.name()
        if name.startswith("c10d::") and "barrier" not in name:
            tensor = next(each for each in _tensors(args))
            self.sent.append(
                (name.partition("::")[2], str(tensor.dtype), tensor.numel())
            )
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)
