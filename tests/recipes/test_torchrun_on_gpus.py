"""Recipes over NCCL: as many processes as there are GPUs, two at most."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from torchrun_runs import TORCHRUN, TRAIN, finished, journal_of, started

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

CONFIG = "text: {sequence_length: 24, batch_size: 4}\n"
SIZES = {
    "kenken": ("--preset", "tiny"),
    "resolvent_lm": ("--config", "small.yaml"),
    "soliton_lm": ("--config", "small.yaml"),
}
FIRST_LOSS = 1e-4
"""Relative, of the first line in fp32: kernels of a GPU add in orders of their own."""


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("recipe", SIZES)
def test_processes_on_gpus_reach_the_loss_of_one(
    tmp_path: Path, recipe: str, strategy: str
) -> None:
    """Weights and gradients go over NCCL, what all must agree on over gloo."""
    if recipe == "soliton_lm":
        pytest.importorskip("lightning")
    (tmp_path / "small.yaml").write_text(CONFIG)
    size = [word.replace("small", str(tmp_path / "small")) for word in SIZES[recipe]]
    words = [
        *(*TRAIN, recipe, *size, "--precision", "32-true", "--device", "cuda"),
        *("--steps", "10", "--evaluate-every", "10", "--checkpoint-every", "5"),
    ]
    num_ranks = min(2, torch.cuda.device_count())
    spread = [*words, "--out", str(tmp_path / "spread"), "--strategy", strategy]
    alone = started(*words, "--out", str(tmp_path / "one"), data=tmp_path, ranks=1)
    finished(alone)
    # one process of torchrun too, where there is one GPU
    torchrun = (*TORCHRUN, str(num_ranks))
    process = started(*torchrun, *spread, data=tmp_path, ranks=1)
    told = finished(process)
    assert told.count("report:") == 1
    one, many = (
        journal_of(tmp_path / run, "train")[0].values["loss"]
        for run in ("one", "spread")
    )
    assert many == pytest.approx(one, rel=FIRST_LOSS)
    assert len(list((tmp_path / "spread" / "checkpoints").glob("0*"))) == 2
