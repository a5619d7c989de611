from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from castwise.islands import apply_policy, module_facts
from castwise.numerics.contract import prove
from castwise.policy import Policy
from castwise.region import Region

POLICY = Policy.parse(
    "castwise: 1\\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\\n"
    "rules: [{module: '1', precision: 'p=fp32,c=fp32,o=bf16'}]"
)


def proof(kind):
    model = nn.Sequential(nn.Linear(15, 7), nn.Linear(7, 7), nn.Linear(7, 5))
    applied = apply_policy(model, POLICY.bind(module_facts(model)), "cpu")
    wrapped = model
    if kind == "ddp":
        wrapped = DistributedDataParallel(model)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        for part in (*model, model):
            fully_shard(part, mesh=mesh)
    region = Region.of(POLICY, "full", (applied,))

    def run():
        with region.entered("cpu"):
            loss = wrapped(torch.randn(3, 15)).square().mean()
        loss.backward()

    return prove(run, model, applied)


def work(rank, store):
    warnings.simplefilter("ignore")
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2
    )
    for kind in ("ddp", "fsdp"):
        found = proof(kind)
        breaches = list(map(str, found.breaches))
        inside = found.share_of("1")
        line = f"{kind} {rank} {breaches} {inside.flops_low} {inside.flops_high}"
        Path(f"{store}.{kind}.{rank}").write_text(line)
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1],), nprocs=2)
"""


@pytest.mark.slow
def test_each_rank_proves_its_own_contract(tmp_path: Path) -> None:
    """Under DDP and FSDP2 every rank sees its operators, and its island runs high."""
    script = tmp_path / "ranks.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    flops = 3 * 2 * 3 * 7 * 7  # forward, and both products of the backward
    expected = {f"{k} {r} [] 0 {flops}" for k in ("ddp", "fsdp") for r in (0, 1)}
    assert {path.read_text() for path in tmp_path.glob("store.*")} == expected
