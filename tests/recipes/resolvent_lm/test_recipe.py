"""The run of `castwise train resolvent_lm`: model, rivals, resume, report, refusals."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from castwise.checkpoints import CheckpointShelf
from castwise.cli import root
from castwise.errors import CastwiseError, ContradictionError, SettingsError
from castwise.policy import preset
from castwise.recipes.language.causal_lm import num_parameters
from castwise.recipes.resolvent_lm.model import RECIPE, build_model
from castwise.recipes.resolvent_lm.settings import ResolventSettings
from castwise.training.journal import read_journal
from castwise.training.step import prepare
from language_runs import LanguageRuns

SMALL = """
text:
  sequence_length: 24
  batch_size: 3
model:
  dim: 16
  num_blocks: 2
  num_chains: 5
  hidden: 24
  num_heads: 2
training:
  num_steps: 12
  evaluate_every: 6
  num_validation: 6
  checkpoint_every: 3
  log_every: 2
"""


RUNS = LanguageRuns(recipe=RECIPE.name, kind=RECIPE.kind, config=SMALL)
command, run, tree_of = RUNS.command, RUNS.run, RUNS.tree_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small config, and a cache of tokens for all runs of this file."""
    return RUNS.prepare(tmp_path_factory.mktemp("lm"))


def settings(**changes: Any) -> ResolventSettings:
    """Return the size of the config above."""
    small = {"dim": 16, "num_blocks": 2, "num_chains": 5, "hidden": 24, "num_heads": 2}
    return ResolventSettings(**{**small, **changes})


@pytest.mark.parametrize("variant", ["identity", "transformer"])
def test_rivals_have_as_many_weights(variant: str) -> None:
    """Within the width of one channel of their feed-forward."""
    ours = build_model(settings(), 257, 24)
    theirs = build_model(settings(variant=variant), 257, 24)
    assert abs(num_parameters(theirs) - num_parameters(ours)) <= 2 * 3 * 16


@pytest.mark.parametrize("variant", ["layer", "transformer"])
def test_no_token_sees_what_comes_after_it(variant: str) -> None:
    """A language model that did would have nothing to predict."""
    torch.manual_seed(0)
    model = build_model(settings(variant=variant), 257, 24)
    tokens = torch.randint(257, (2, 24))
    changed = tokens.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 257
    one, two = model(tokens), model(changed)
    assert torch.equal(one[:, :13], two[:, :13])
    assert not torch.allclose(one[:, 13:], two[:, 13:])


def test_tokens_meet_in_the_layer_and_nowhere_else() -> None:
    """With the identity in its place, a token is predicted from the last one alone."""
    torch.manual_seed(0)
    tokens = torch.randint(257, (1, 24))
    changed = tokens.clone()
    changed[:, 3] = (changed[:, 3] + 1) % 257
    for variant, meets in (("layer", True), ("identity", False)):
        model = build_model(settings(variant=variant), 257, 24)
        same = torch.equal(model(tokens)[:, 4:], model(changed)[:, 4:])
        assert same is not meets


def test_every_weight_learns() -> None:
    """Couplings, energies and eta too."""
    torch.manual_seed(0)
    model = build_model(settings(), 257, 24)
    tokens = torch.randint(257, (2, 25))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_the_loss_is_that_of_the_logits() -> None:
    """Chunks change nothing."""
    torch.manual_seed(0)
    model = build_model(settings(), 257, 24)
    tokens = torch.randint(257, (2, 25))
    logits = model(tokens[:, :-1])
    right = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), tokens[:, 1:].flatten()
    )
    torch.testing.assert_close(model(tokens[:, :-1], tokens[:, 1:]), right)


@pytest.mark.parametrize("islands", [True, False])
def test_islands_keep_the_residual_and_bf16_alone_does_not(islands: bool) -> None:
    """The layer is unguarded: what protects it is the policy, by 1e3 and more."""
    from castwise.layers.resolvent_health import ResolventProbe
    from castwise.recipes.language.plan import protected

    torch.manual_seed(0)
    model = build_model(settings(), 257, 24)
    probe = ResolventProbe(model)
    policy = preset("bf16-mixed")
    policy = protected(policy, RECIPE) if islands else policy
    made = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    with made.region():
        model(torch.randint(257, (2, 24)))
    residuals = [one.residual for one in probe.read().values()]
    assert len(residuals) == 2
    assert all(one < 5e-5 if islands else one > 5e-3 for one in residuals)


def test_a_probe_that_cannot_measure_says_nan_and_why() -> None:
    """Never 0."""
    from castwise.layers.resolvent_health import ResolventProbe

    model = build_model(settings(), 257, 24)
    probe = ResolventProbe(model)
    with torch.no_grad():
        model.get_submodule("blocks.0.mixing").output.weight.fill_(torch.nan)
    model(torch.randint(257, (1, 24)))
    first = probe.read()["blocks.0.mixing"]
    assert first.residual != first.residual
    assert "not finite" in first.messages[0]
    assert probe.read() == {}


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
@pytest.mark.filterwarnings("ignore:fp16 products run on the cpu, slowly")
def test_a_run_ends_with_a_report(place: Path, dtype: str) -> None:
    """Loss, residual, memory and scale are in it, and nothing is NaN."""
    text = run(place, f"report-{dtype}", "--dtype", dtype)
    assert "validation loss" in text
    records = read_journal(place / f"report-{dtype}")
    train = [one.values for one in records if one.event == "train"]
    assert len(train) == 6
    for values in train:
        assert values["loss"] == values["loss"] < 6.0
        assert values["residual"] < 1e-4
    epochs = [one.values for one in records if one.event == "epoch"]
    assert [one.step for one in records if one.event == "epoch"] == [6, 12]
    assert epochs[-1]["validation_loss"] < epochs[0]["validation_loss"] < 6.0
    page = (place / f"report-{dtype}" / "report.html").read_text()
    for title in ("Loss", "Residual", "Memory", "Loss scale"):
        assert title in page


@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(place: Path) -> None:
    """SIGKILL, then --resume, in processes of their own."""
    run(place, "whole", "--dtype", "bf16", "--steps", "60")
    call = [
        *(sys.executable, "-m", "castwise"),
        *command(place, "killed", "--dtype", "bf16", "--steps", "60"),
    ]
    process = subprocess.Popen(call, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not list((place / "killed" / "checkpoints").glob("*-step-1*.safetensors")):
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(place, "killed", "--resume", "--steps", "60")
    one, two = tree_of(place, "whole"), tree_of(place, "killed")
    for part in ("model", "optimizer"):
        assert_same(one[part], two[part])
    curves = [
        [
            (one.event, one.step, one.values.get("loss"), one.values.get("residual"))
            for one in read_journal(place / out)
        ]
        for out in ("whole", "killed")
    ]
    assert curves[0] == curves[1]


def assert_same(left: Any, right: Any) -> None:
    """Compare two trees bit for bit."""
    assert type(left) is type(right)
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for name in left:
            assert_same(left[name], right[name])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, two in zip(left, right, strict=True):
            assert_same(one, two)
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
    else:
        assert left == right


def test_overfitting_learns_a_batch_by_heart(place: Path) -> None:
    """Far below what unseen text allows, and measured on that batch."""
    run(place, "overfit", "--dtype", "fp32", "--steps", "150", "--overfit-batches", "1")
    last = [one for one in read_journal(place / "overfit") if one.event == "epoch"][-1]
    assert last.values["validation_loss"] < 1.8


def test_without_islands_the_report_warns(place: Path) -> None:
    """What was left unprotected is told."""
    run(place, "bare", "--dtype", "bf16", "--no-islands")
    record = json.loads((place / "bare" / "report.json").read_text())
    assert "warning" in json.dumps(record)
    values = [
        one.values for one in read_journal(place / "bare") if one.event == "train"
    ]
    assert min(one["residual"] for one in values) > 1e-3


@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--resume", "--seed", "3"], ContradictionError, r"training\.seed is 0 there"),
        (["--resume", "--dtype", "fp32"], ContradictionError, "--dtype"),
        (["--resume", "--tokenizer", "bpe"], ContradictionError, r"text\.tokenizer"),
        (["--dtype", "bf16"], SettingsError, "holds a run already"),
        (["--dtype", "bf16", "--precision", "bf16-true"], SettingsError, "One flag"),
    ],
)
def test_what_contradicts_the_run_is_refused(
    place: Path, more: list[str], error: type[CastwiseError], message: str
) -> None:
    """By the name of the setting."""
    if not (place / "stands").exists():
        run(place, "stands", "--dtype", "bf16", "--steps", "3")
    with pytest.raises(error, match=re.compile(message)):
        CliRunner().invoke(
            root, command(place, "stands", *more), catch_exceptions=False
        )


def test_weights_in_bf16_are_resumed_with_every_digit(place: Path) -> None:
    """bf16-true, split storage: twelve steps at once are twelve in two parts."""
    run(place, "true", "--precision", "bf16-true")
    run(place, "part", "--precision", "bf16-true", "--steps", "12")
    newest = CheckpointShelf(folder=place / "part" / "checkpoints", kind=RECIPE.kind)
    newest.paths()[0].unlink()
    run(place, "part", "--resume")
    one, two = tree_of(place, "true"), tree_of(place, "part")
    assert_same(one["model"], two["model"])
    assert_same(one["optimizer"], two["optimizer"])
    assert {w.dtype for n, w in one["model"].items() if ".mixing." in n} == {
        torch.float32
    }
