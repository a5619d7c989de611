from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from castwise.autocast import autocast
from castwise.islands import apply_policy, module_facts
from castwise.policy import preset
from two_ranks import TwoRanks


def model() -> nn.Sequential:
    """The same on each rank."""
    torch.manual_seed(0)
    inner = nn.Sequential(nn.Linear(9, 9), nn.Tanh(), nn.Dropout(0.2), nn.Linear(9, 9))
    return nn.Sequential(
        OrderedDict(enter=nn.Linear(9, 9), solver=inner, leave=nn.Linear(9, 9))
    )


def put(target: nn.Module) -> None:
    """The solver's backward in fp64."""
    policy = preset("bf16-mixed").with_rule(
        module="solver", stage="backward", precision="fp64"
    )
    apply_policy(target, policy.bind(module_facts(target)), "cpu")


def gradients(target: nn.Module, seed: int) -> None:
    """Forward in the region, backward outside."""
    torch.manual_seed(seed)
    with autocast("cpu", "bf16"):
        loss = target(torch.randn(5, 9)).float().pow(2).mean()
    loss.backward()


def scene(rank: int, way: str) -> dict[str, Any]:
    """One step on each rank; returns whole gradients, and the formats of the solver."""
    target = model()
    dtypes: list[torch.dtype] = []
    target.solver[0].register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
    if way == "ddp":
        put(target)
        gradients(DistributedDataParallel(target), rank)
    else:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        fully_shard(target.solver, mesh=mesh)
        fully_shard(target, mesh=mesh)
        put(target)
        gradients(target, rank)
    found = {}
    for name, weight in target.named_parameters():
        gradient = weight.grad
        whole = gradient.full_tensor() if hasattr(gradient, "full_tensor") else gradient
        found[name] = whole.detach().clone()
    return {"gradients": found, "dtypes": [str(dtype) for dtype in dtypes]}


@pytest.mark.parametrize("way", ["ddp", "fsdp2"])
def test_gradients_of_an_own_backward_are_averaged_over_ranks(
    two_ranks: TwoRanks, way: str
) -> None:
    """Both ranks get the mean of what each of them alone would get."""
    zero, one = two_ranks(scene, way)
    alone = []
    for rank in (0, 1):
        target = model()
        put(target)
        gradients(target, rank)
        alone.append({name: w.grad for name, w in target.named_parameters()})
    for answer in (zero, one):
        assert answer["dtypes"] == ["torch.bfloat16"] * 2 + ["torch.float64"]
        for name, got in answer["gradients"].items():
            mean = (alone[0][name] + alone[1][name]) / 2
            torch.testing.assert_close(got, mean, rtol=1e-5, atol=1e-7)
