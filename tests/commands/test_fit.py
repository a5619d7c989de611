"""`castwise fit`: the largest batch within a budget, told with both its peaks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from castwise.commands.fit import parse_bytes
from castwise.errors import SettingsError
from command_line import Run

TARGET = """
import torch
from torch import nn
from torch.nn import functional


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(31, 48)
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Linear(48, 192), nn.GELU(), nn.Linear(192, 48))
              for _ in range(4))
        )
        self.head = nn.Linear(48, 31)

    def forward(self, tokens):
        return self.head(self.blocks(self.table(tokens)))


def loss_fn(logits, wanted):
    return functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())


def build():
    torch.manual_seed(0)
    model = Net()
    tokens = torch.randint(31, (2, 16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, [(tokens, tokens)], loss_fn, optimizer
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A small model with an optimizer."""
    path = tmp_path / "net.py"
    path.write_text(TARGET)
    return f"{path}:build"


@pytest.mark.parametrize("dim", ["batch", "sequence"])
def test_what_fits_is_confirmed_by_a_step(
    run: Run, target: str, tmp_path: Path, dim: str
) -> None:
    """The measured peak is within the budget, and one more would not be."""
    record = tmp_path / "fit.json"
    out = run("fit", target, "--budget", "8MiB", "--dim", dim, "--json", str(record))
    assert out[0] == 0
    found = json.loads(record.read_text())
    assert found["size"] > 20
    assert found["measured_bytes"] <= found["budget_bytes"] == 8 << 20
    asked = {int(size): peak for size, peak in found["asked"].items()}
    assert asked[found["size"] + 1] > 8 << 20
    assert abs(found["measured_bytes"] / found["peak_bytes"] - 1) < 0.03
    assert f"within 8.0 MiB: {found['size']}" in out[1]


def test_recompute_makes_room(run: Run, target: str, tmp_path: Path) -> None:
    """With blocks recomputed a larger batch fits."""
    sizes = []
    for flags in ([], ["--recompute"]):
        record = tmp_path / "fit.json"
        out = run(
            "fit", target, "--budget", "8M", "--preset", "32-true", "--no-step",
            "--json", str(record), *flags,
        )  # fmt: skip
        assert out[0] == 0
        sizes.append(json.loads(record.read_text())["size"])
    assert sizes[1] > 1.5 * sizes[0]


def test_a_budget_that_holds_not_even_one_is_told(run: Run, target: str) -> None:
    """By how much, with exit code 2 and without a traceback."""
    out = run("fit", target, "--budget", "100K")
    assert out[0] == 2
    assert "a step of size 1 needs" in out[2]
    assert "too little" in out[2]


def test_more_than_the_machine_has_is_refused_before_a_step(
    run: Run, target: str
) -> None:
    """A real step that could not be made is not tried."""
    out = run("fit", target, "--budget", "900TiB")
    assert out[0] == 2
    assert "are free" in out[2]


def test_bytes_are_read_as_people_write_them() -> None:
    """Units are powers of 1024; anything else is refused with an example."""
    assert parse_bytes("2GiB") == parse_bytes("2 G") == parse_bytes("2gb") == 2 << 30
    assert parse_bytes("1.5M") == 3 << 19
    assert parse_bytes("4096") == 4096
    for text in ("", "much", "-1G", "2 GiBs"):
        with pytest.raises(SettingsError, match="2GiB"):
            parse_bytes(text)
