"""Checkpoints in parts, saved by some ranks of four and loaded by others.

    torchrun --nproc-per-node 4 resharded_run.py FOLDER

Ranks 0 and 1 train a model in two parts and save it; four ranks load it, train it for a
step and save that; ranks 0 and 1 load this again, and one process reads it whole. What
comes back is compared bit by bit. Rank 0 prints "the same" when all is.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

import castwise as cw
from castwise.checkpoints import CheckpointShelf
from castwise.checkpoints.background import BackgroundSaves
from castwise.checkpoints.container import read_checkpoint
from castwise.checkpoints.parts import load_parts
from castwise.distributed.ranks import joined, launched
from castwise.distributed.sharding import shard
from castwise.optim.adamw import AdamW
from castwise.optim.sweep import SweepSettings
from castwise.training.resharding import laid_out

KIND = "resharded"
STRANGE = {
    "int16": torch.arange(-33, 30, dtype=torch.int16).reshape(7, 9),
    "bf16": torch.linspace(-3, 3, 15).reshape(5, 3).bfloat16(),
    "fp8": torch.linspace(-9, 9, 24).reshape(8, 3).to(torch.float8_e4m3fn),
    "codes": torch.arange(256, dtype=torch.uint8),
    "complex": torch.randn(6, 2, dtype=torch.complex64),
    "few rows": torch.tensor([[1.5], [float("nan")], [float("-inf")]]),
}
"""Formats and shapes that are easily lost; some ranks of four hold no row of some."""


def built(mesh: DeviceMesh) -> tuple[cw.Run, nn.Module]:
    """A model in 16 bits with remainders beside it, and moments in 8 bits."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(256, 64), nn.Tanh(), nn.Linear(64, 5))
    policy = cw.preset("bf16-true")
    shard(model, policy, mesh=mesh)
    optimizer = AdamW(
        model.parameters(),
        lr=1e-2,
        settings=SweepSettings(states="8bit", min_8bit_size=4096),
    )
    return cw.prepare(model, optimizer, policy), model


def trained(run: cw.Run, model: nn.Module, step: int) -> None:
    """One update by a batch that every rank sees."""
    x = torch.randn(11, 256, generator=torch.Generator().manual_seed(step))
    with run.step() as one:
        one.backward(model(x).float().pow(2).mean())


def tree_of(run: cw.Run, model: nn.Module, mesh: DeviceMesh) -> dict[str, Any]:
    """What a trainer saves of it, and tensors of strange formats."""
    strange = {name: cut(each, mesh) for name, each in STRANGE.items()}
    return {
        "model": model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "averages": {},
        "strange": strange,
        "plain": {"step": 7, "text": "x", "whole": torch.arange(3)},
    }


def cut(tensor: torch.Tensor, mesh: DeviceMesh) -> DTensor:
    """A tensor over a mesh by its rows, whatever its format."""
    at = mesh.get_local_rank()
    rows = tensor.chunk(mesh.size())
    own = rows[at] if at < len(rows) else tensor[:0]
    return DTensor.from_local(
        own,
        mesh,
        [Shard(0)],
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def whole(value: Any) -> Any:
    """Every sharded tensor gathered, as bytes."""
    if isinstance(value, dict):
        return {name: whole(each) for name, each in value.items()}
    if isinstance(value, list):
        return [whole(each) for each in value]
    if isinstance(value, DTensor):
        parts: list[Any] = [None] * value.device_mesh.size()
        group = value.device_mesh.get_group()
        distributed.all_gather_object(parts, whole(value.to_local()), group=group)
        return b"".join(parts)
    if isinstance(value, torch.Tensor):
        flat = value.detach().contiguous().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes() if len(flat) else b""
    return value


def main() -> None:
    """Save on two, load on four, save on four, load on two and on one."""
    torch.set_num_threads(1)
    torch.manual_seed(9)
    ranks = launched()
    assert ranks is not None
    shelf = CheckpointShelf(folder=Path(sys.argv[1]), kind=KIND)
    with joined(ranks, "cpu"):
        two, four = DeviceMesh("cpu", [0, 1]), DeviceMesh("cpu", [0, 1, 2, 3])
        own = distributed.new_group([0, 1], backend="gloo")
        others = distributed.new_group(backend="gloo")
        told: list[Any] = [None]
        if ranks.rank < 2:
            run, model = built(two)
            for step in range(3):
                trained(run, model, step)
            saves = BackgroundSaves(shelf, own)
            tree = tree_of(run, model, two)
            told = [whole(tree)]
            saves.begin(3, tree, score=0.5)
            trained(run, model, 99)  # what is under way must not see this
            assert whole(model.state_dict()) != told[0]["model"]
            assert [saved.step for saved in saves.wait()] == [3]
        distributed.broadcast_object_list(told, src=0)
        (path,) = shelf.paths()
        run, model = built(four)
        tree = laid_out(load_parts(path, kind=KIND, mesh=four), model, run.optimizer)
        run.model.load_state_dict(tree["model"])
        run.optimizer.load_state_dict(tree["optimizer"])
        assert whole(tree) == told[0]
        assert whole(model.state_dict()) == told[0]["model"]
        again = whole(run.optimizer.state_dict())
        assert again["state"] == told[0]["optimizer"]["state"]
        assert any("split.remainder" in each for each in again["state"].values())
        trained(run, model, 3)
        saves = BackgroundSaves(shelf, others)
        saves.begin(4, tree_of(run, model, four), score=0.25)
        saves.wait()
        after = whole(tree_of(run, model, four))
        latest = shelf.paths()[0]
        if ranks.rank < 2:
            assert whole(load_parts(latest, kind=KIND, mesh=two, group=own)) == after
        assert whole(read_checkpoint(latest)[1]) == after
        if ranks.is_first:
            assert "exp_avg_signed_quadratic" in after["optimizer"]["state"][0]
            print("the same")  # noqa: T201 -- read by the test


if __name__ == "__main__":
    main()
