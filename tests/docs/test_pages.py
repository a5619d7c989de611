"""What the pages on the operator table and on contracts show is what happens."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.autocast import autocast, uninstall

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = {
    page: (DOCS / page).read_text() for page in ("contract.md", "operator_table.md")
}


def blocks(page: str, language: str) -> list[str]:
    """The fenced blocks of a page, in order."""
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


@pytest.fixture(autouse=True)
def _no_table_left() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    uninstall()


def space() -> dict[str, Any]:
    """What a page that trains something stands after."""
    model = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
    x, y = torch.randn(3, 5), torch.randn(3, 5)
    return {
        "model": model,
        "x": x,
        "y": y,
        "batch": (x, y),
        "loss_fn": nn.functional.mse_loss,
        "training_step": lambda batch: model(batch[0]).sum().backward(),
    }


@pytest.mark.parametrize("page", PAGES)
def test_the_code_of_a_page_runs_and_gives_what_it_shows(page: str) -> None:
    """A value in a comment below an expression is the value of that expression."""
    names = space()
    shown = 0
    for code in blocks(page, "python"):
        if "def build():" in code:
            continue  # a file, for the command line below
        exec(code, names)  # noqa: S102 -- our own page
        for expression, value in re.findall(r"^(\S.*)\n# ('.*')$", code, re.MULTILINE):
            assert repr(eval(expression, names)) == value  # noqa: S307 -- our own page
            shown += 1
    assert shown == 1


def test_the_commands_of_the_page_print_what_it_shows(tmp_path: Path) -> None:
    """Real output, of the files that the page shows."""
    (target,) = [c for c in blocks("contract.md", "python") if "def build():" in c]
    (tmp_path / "solver.py").write_text(target)
    (tmp_path / "solver.yaml").write_text(blocks("contract.md", "yaml")[0])
    environment = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", "TERM": "dumb"}
    sessions = blocks("contract.md", "console")
    assert len(sessions) == 2
    for session, leaves_with in zip(sessions, (1, 0), strict=True):
        command, _, expected = session.removeprefix("$ castwise ").partition("\n")
        done = subprocess.run(
            [sys.executable, "-m", "castwise", *shlex.split(command)],
            cwd=tmp_path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.stdout == expected
        assert done.returncode == leaves_with


def test_the_phases_of_the_page_run_and_explain_themselves(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The text below the code is what it prints, line numbers included."""
    page = (DOCS / "phases.md").read_text()
    code, text = re.findall(r"```(?:python|text)\n(.*?)```", page, re.DOTALL)
    names = space()
    model = nn.Sequential()
    model.add_module("into", nn.Linear(5, 5))
    model.add_module("solver", nn.Linear(5, 5))
    names["model"] = model
    names["optimizer"] = torch.optim.SGD(model.parameters(), lr=0.1)
    exec(compile(code, str(tmp_path / "policy.py"), "exec"), names)  # noqa: S102 -- our own page
    assert capsys.readouterr().out == text
    assert names["run"].num_stepped == 4
    names["run"].remove()


def test_a_table_is_changed_from_yaml_and_holds() -> None:
    """The page's policy, put on a model: no C++, and the reason is kept."""
    (text,) = blocks("operator_table.md", "yaml")
    policy = cw.Policy.parse(text)
    x = torch.randn(3, 5)
    assert "the last layer saturates" in policy.explain_op("tanh")
    with autocast("cpu", "bf16"):
        assert (x @ x.mT).tanh().dtype == torch.bfloat16

    class Net(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.seen = [super().forward(x).tanh().dtype, (x @ x.mT).softmax(-1).dtype]
            return super().forward(x)

    model = Net(5, 5)
    run = cw.prepare(model, torch.optim.SGD(model.parameters()), policy)
    found = {}
    for phase in ("full", "predict"):
        run.phase = phase
        with run.inference():
            model(x)
        found[phase] = model.seen
    run.remove()
    assert found["full"] == [torch.float32, torch.float32]
    assert found["predict"] == [torch.float32, torch.bfloat16]
