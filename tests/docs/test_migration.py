"""Every snippet of the migration page runs, and moving over loses nothing."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.autocast import uninstall

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "migration.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NEEDS = re.compile(r"^(?:from|import) (\w+)", re.MULTILINE)


def title(block: str) -> str:
    """The comment that every block opens with, and the frameworks it needs."""
    return block.partition("\n")[0].removeprefix("# ") + " " + "+".join(needs(block))


def needs(block: str) -> list[str]:
    """The packages that a block imports."""
    return sorted(set(NEEDS.findall(block)) - {"castwise"})


def net() -> nn.Module:
    """A model with the modules that the page names."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 4)
    )


def names(folder: Path) -> dict[str, Any]:
    """What the page says that each block stands after."""
    model = net()
    generator = torch.Generator().manual_seed(1)
    pairs = [
        (
            torch.randn(8, 16, generator=generator),
            torch.randn(8, 4, generator=generator),
        )
        for _ in range(3)
    ]
    return {
        "torch": torch,
        "cw": cw,
        "model": model,
        "optimizer": torch.optim.SGD(model.parameters(), lr=0.1),
        "loader": pairs,
        "loss_fn": nn.functional.mse_loss,
        "folder": str(folder),
    }


def for_lightning() -> dict[str, Any]:
    """A module and the settings that keep a Trainer quiet."""
    from lightning import LightningModule
    from torch.utils.data import DataLoader, TensorDataset

    class Module(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.body = net()

        def training_step(self, batch: Any, _: int) -> torch.Tensor:
            x, y = batch
            return nn.functional.mse_loss(self.body(x), y)

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    rows = TensorDataset(torch.randn(12, 16), torch.randn(12, 4))
    flags = ("logger", "enable_checkpointing", "enable_progress_bar")
    return {
        "lightning_module": Module(),
        "loader": DataLoader(rows, batch_size=4),
        "quiet": {
            "max_epochs": 1,
            "accelerator": "cpu",
            "enable_model_summary": False,
            **dict.fromkeys(flags, False),
        },
    }


def for_transformers() -> dict[str, Any]:
    """A tiny language model with random weights; nothing is downloaded."""
    from transformers import GPT2Config, GPT2LMHeadModel

    ends = {"bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(
        n_layer=1, n_head=1, n_embd=6, vocab_size=11, n_positions=8, **ends
    )
    config.loss_type = "ForCausalLM"
    row = torch.arange(7)
    quiet = {
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_strategy": "no",
        "max_steps": 2,
        "dataloader_pin_memory": False,
    }
    return {
        "language_model": GPT2LMHeadModel(config),
        "rows": [{"input_ids": row, "labels": row}] * 4,
        "quiet_arguments": quiet,
    }


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """Accelerate keeps its precision in the process, the table its kernels."""
    yield
    uninstall()
    if importlib.util.find_spec("accelerate"):
        from accelerate.state import AcceleratorState, GradientState, PartialState

        for state in (AcceleratorState, GradientState, PartialState):
            state._reset_state()


@pytest.mark.parametrize("block", BLOCKS, ids=title)
# Lightning 2.6 asks a pytree in a way that torch 2.13 deprecates
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\):FutureWarning")
# advice on data loading, of no matter to twelve rows
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
def test_a_snippet_runs(block: str, tmp_path: Path) -> None:
    """Before and after: a reader may paste either."""
    for package in needs(block):
        pytest.importorskip(package, reason=f"{package} is not installed")
    space = names(tmp_path)
    if "lightning" in needs(block):
        space |= for_lightning()
    if "transformers" in needs(block):
        space |= for_transformers()
    exec(block, space)  # noqa: S102 -- our own page


def test_every_pair_is_whole() -> None:
    """Whoever a section is for, what they have is followed by what takes its place."""
    titles = [block.partition("\n")[0].removeprefix("# ") for block in BLOCKS]
    for was in ("apex, level O2", "Lightning", "Accelerate", "jmp", "paddle"):
        assert titles[titles.index(was) + 1] == "castwise"
    assert titles[:2] == ["torch.amp", "castwise"]
    policy = re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)
    assert policy is not None
    assert cw.Policy.parse(policy[1]).rules[0].module == "*.propagator"


def run_block(start: str, space: dict[str, Any]) -> None:
    """Run the block of the page that opens with a comment."""
    block = next(block for block in BLOCKS if block.startswith(f"# {start}\n"))
    exec(block, space)  # noqa: S102 -- our own page


def test_torch_amp_and_castwise_end_with_the_same_weights(tmp_path: Path) -> None:
    """In a model whose operators are in both lists alike, fp16 with its scale."""
    ours, theirs = names(tmp_path), names(tmp_path)
    run_block("torch.amp", theirs)
    run_block("castwise", ours)
    for mine, other in zip(
        ours["model"].parameters(), theirs["model"].parameters(), strict=True
    ):
        torch.testing.assert_close(mine, other, rtol=2e-3, atol=1e-5)
    assert ours["run"].loss_scale.scale == theirs["scaler"].get_scale()


def test_going_back_leaves_no_trace_and_keeps_the_scale(tmp_path: Path) -> None:
    """GradScaler reads our state, and the model is of its own classes again."""
    space = names(tmp_path)
    run_block("castwise, then torch.amp again", space)
    scaler = space["scaler"].state_dict()
    assert scaler["scale"] == 2.0**16
    assert scaler["_growth_tracker"] == 6, "three steps before, three after"
    assert [type(module) for module in space["model"]] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Linear,
    ]
    assert space["model"].state_dict().keys() == net().state_dict().keys()


def test_a_state_of_grad_scaler_is_continued_to_the_same_numbers() -> None:
    """A run that moves over in the middle grows and backs off where it would have."""
    theirs = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3)
    weight = nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.0)

    def step(loss: torch.Tensor) -> None:
        theirs.scale(loss).backward()
        theirs.step(optimizer)
        theirs.update()
        optimizer.zero_grad()

    for factor in (1.0, torch.inf, 1.0):
        step((weight * factor).sum())
    ours = cw.DynamicScale()
    ours.load_state_dict(theirs.state_dict())
    for factor in (1.0, 1.0, 1.0, torch.inf, 1.0):
        step((weight * factor).sum())
        gradient = torch.full((1,), ours.scale * factor)
        ours.adjust(ours.unscale({"w": gradient}))
        assert ours.scale == theirs.get_scale()
