"""`castwise search` on the command line: what it writes, and what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from castwise.numerics.contract import contract
from castwise.numerics.target import load_target
from castwise.policy import Policy
from castwise.report import read_report
from command_line import Run

TARGET = """
import torch
from torch import nn
from torch.nn import functional


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(9, 15)
        self.lift = nn.Linear(15, 15)
        self.norm = nn.LayerNorm(15)
        self.last = nn.Linear(15, 3)
        self.spare = nn.Linear(2, 2)
        nn.init.constant_(self.lift.bias, 300.0)

    def forward(self, x):
        hidden = self.first(x).relu()
        return self.last(self.norm(self.lift(hidden)))


def build():
    torch.manual_seed(0)
    batches = [(torch.randn(7, 9), torch.randint(3, (7,))) for _ in range(2)]
    return Model(), batches, functional.cross_entropy
"""


@pytest.fixture
def target(tmp_path: Path) -> str:
    """A model with one layer that bf16 ruins."""
    path = tmp_path / "mine.py"
    path.write_text(TARGET)
    return f"{path}:build"


def test_policy_report_and_record_are_written(
    target: str, tmp_path: Path, run: Run
) -> None:
    """The policy holds its contract; report and JSON tell the same story."""
    policy, page, record = (tmp_path / n for n in ("p.yaml", "r.html", "found.json"))
    code, out, err = run(
        "search",
        target,
        "--budget",
        "gradient=5e-2",
        "--out",
        str(policy),
        "--report",
        str(page),
        "--json",
        str(record),
        "--probes",
        "4",
    )
    assert (code, err) == (0, "")
    assert "gradient error" in out
    assert "never called, so nothing is known of: spare" in out.replace("\n", " ")
    subject = load_target(target)
    written = Policy.load(policy)
    assert [rule.module for rule in written.rules] == ["lift"]
    contract(subject.model, subject.batches, subject.loss_fn, written).check()
    found = json.loads(record.read_text())
    assert found["policy"] == written.to_yaml()
    assert found["best"]["holds"] is True
    report = read_report(page.with_suffix(".json"))
    titles = [section.title for section in report.sections]
    assert titles == ["Policy", "Pareto curve", "Modules", "Evidence"]
    assert "lift" in page.read_text()


def test_search_resumes_from_its_record(target: str, tmp_path: Path, run: Run) -> None:
    """The second run takes no step at all, and writes the same policy."""
    record = tmp_path / "search.json"

    def once(name: str) -> str:
        arguments = ("search", target, "--budget", "gradient=5e-2", "--probes", "4")
        more = ("--resume", str(record), "--out", str(tmp_path / name))
        code, out, _ = run(*arguments, *more)
        assert code == 0
        return out.replace("\n", " ")

    assert "0 steps for scores" not in once("one.yaml")
    assert "; 0 steps for scores, 0 for" in once("two.yaml")
    assert (tmp_path / "one.yaml").read_text() == (tmp_path / "two.yaml").read_text()


def test_stages_and_operators_are_written_and_told(
    target: str, tmp_path: Path, run: Run
) -> None:
    """A backward of its own and a norm that bears it reach policy, page and record."""
    policy, page, record = (tmp_path / n for n in ("p.yaml", "r.html", "found.json"))
    code, _, err = run(
        *("search", target, "--budget", "gradient=5e-1", "--probes", "4"),
        *("--formats", "bf16,fp32,fp32/bf16", "--operators"),
        *("--out", str(policy), "--report", str(page), "--json", str(record)),
    )
    assert (code, err) == (0, "")
    units = {unit["fqn"]: unit for unit in json.loads(record.read_text())["units"]}
    assert units["operator layer_norm"]["is_operator"]
    assert units["lift"]["chosen"] == "fp32/bf16"
    assert "backward" in {rule.stage for rule in Policy.load(policy).rules}
    assert "operator layer_norm" in page.read_text()


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (["--budget", "gradient=1e-9"], "times the budget"),
        (["--budget", "weights=1"], "a budget is written gradient="),
        (["--budget", "gradient=1e-2", "--formats", "float32"], "write fp32"),
        (["--budget", "gradient=1e-2", "--probes", "0"], "num_probes is at least 1"),
    ],
)
def test_mistakes_are_one_sentence(
    target: str,
    tmp_path: Path,
    run: Run,
    flags: list[str],
    sentence: str,
) -> None:
    """Exit code 2, nothing written, and the remedy."""
    out = tmp_path / "p.yaml"
    code, _, err = run("search", target, "--out", str(out), *flags)
    assert code == 2
    assert sentence in err
    assert err.count("\n") == 1
    assert not out.exists()
    assert torch.is_grad_enabled()
