"""Targets on the command line: what is accepted, and what is said of mistakes."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

from castwise.errors import TargetError
from castwise.numerics.target import load_target
from command_line import Run

GOOD = """
import torch
from torch import nn
from torch.nn import functional


class Half(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(5, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.last(hidden)


def build():
    torch.manual_seed(0)
    batch = torch.randn(4, 5), torch.randint(3, (4,))
    return Half(), [batch], functional.cross_entropy


def made():
    from castwise.numerics.target import Target

    model, batches, loss_fn = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Target(
        model=model, batches=batches, loss_fn=loss_fn, optimizer=optimizer, name="mine"
    )


def raises():
    raise ValueError("no such data")


def not_a_model():
    return 3, [], None


def without_batches():
    return Half(), [], functional.cross_entropy


def three():
    return 3
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file with good and bad targets."""
    found = tmp_path / "mine.py"
    found.write_text(GOOD)
    return found


def test_a_target_gives_model_batches_and_loss(path: Path) -> None:
    """The function is run once and what it returns is kept."""
    target = load_target(f"{path}:build")
    assert isinstance(target.model, torch.nn.Module)
    assert len(target.batches) == 1
    assert target.optimizer is None
    assert target.name == f"{path}:build"


def test_a_function_may_return_a_target(path: Path) -> None:
    """What is built in Python serves on the command line, checked as anything else."""
    target = load_target(f"{path}:made")
    assert isinstance(target.optimizer, torch.optim.SGD)
    assert len(target.batches) == 1
    assert target.name == f"{path}:made"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("mine.py", "a target is written file.py:function"),
        ("gone.py:build", "no file gone.py"),
        ("{path}:nothing", "has no function 'nothing'"),
        ("{path}:raises", r"mine.py:\d+, raises\(\): ValueError: no such data"),
        ("{path}:not_a_model", "must return a torch.nn.Module first, got int"),
        ("{path}:without_batches", "needs at least 1 batches, got 0"),
        ("{path}:three", r"must return \(model, batches, loss_fn\)"),
    ],
)
def test_a_bad_target_is_one_sentence_with_its_place(
    path: Path, text: str, says: str
) -> None:
    """What is wrong in the user's file is told with file, line and what is needed."""
    with pytest.raises(TargetError, match=says):
        load_target(text.format(path=path))


def test_a_file_that_does_not_parse_names_its_line(tmp_path: Path) -> None:
    """A syntax error is the user's, and is told as one."""
    path = tmp_path / "broken.py"
    path.write_text("x = 1\ndef build(:\n    pass\n")
    with pytest.raises(TargetError, match=r"broken.py:2, importing it: SyntaxError"):
        load_target(f"{path}:build")


def test_a_contract_that_holds_leaves_with_0_and_a_record(
    path: Path, tmp_path: Path, run: Run
) -> None:
    """The command prints one line and writes what it saw."""
    record = tmp_path / "contract.json"
    code, out, _ = run("contract", f"{path}:build", "--modules", "--json", str(record))
    assert code == 0
    assert "contract of bf16-mixed holds" in out
    assert re.search(r"first .*bf16", out)
    assert json.loads(record.read_text())["policy"] == "bf16-mixed"


def test_a_contract_that_is_broken_leaves_with_1_and_names_the_breach(
    path: Path, run: Run
) -> None:
    """A product that the model's own code forces to fp32 under autocast off."""
    text = path.read_text().replace(
        "self.first(x).relu()",
        "torch.autocast('cpu', enabled=False)(self.first)(x).relu()",
    )
    path.write_text(text)
    code, out, _ = run("contract", f"{path}:build")
    assert code == 1
    assert "broken" in out
    assert "first" in out


def test_two_policies_at_once_are_refused(path: Path, run: Run) -> None:
    """One flag decides."""
    arguments = ["--policy", "p.yaml", "--preset", "32-true"]
    code, _, err = run("contract", f"{path}:build", *arguments)
    assert code == 2
    assert "One flag decides the policy" in err


def test_init_writes_an_example_that_the_commands_take(
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The example runs as it is, and is never overwritten."""
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("init")
    assert code == 0
    assert "castwise contract my_model.py:build" in out
    assert load_target("my_model.py:build").optimizer is not None
    assert run("contract", "my_model.py:build")[0] == 0
    code, _, err = run("init")
    assert code == 2
    assert "exists already" in err
