"""The run of `castwise train soliton_lm`, through Lightning: model, islands, resume."""

from __future__ import annotations

import importlib.util
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from castwise.checkpoints import CheckpointShelf
from castwise.cli import root
from castwise.errors import (
    CastwiseError,
    ContradictionError,
    MissingExtraError,
    SettingsError,
)
from castwise.layers.cayley_health import HealthProbe
from castwise.policy import preset
from castwise.recipes.language.causal_lm import num_parameters
from castwise.recipes.language.plan import protected
from castwise.recipes.soliton_lm import command as command_room
from castwise.recipes.soliton_lm.model import (
    RECIPE,
    ComplexAttention,
    ComplexLinear,
    ComplexNorm,
    build_model,
)
from castwise.recipes.soliton_lm.settings import SolitonSettings
from castwise.training.journal import Record, read_journal
from castwise.training.step import prepare
from language_runs import LanguageRuns

needs_lightning = pytest.mark.skipif(
    importlib.util.find_spec("lightning") is None, reason="lightning is missing"
)

SMALL = """
text:
  sequence_length: 24
  batch_size: 4
model:
  dim: 16
  num_blocks: 2
  num_heads: 2
  hidden: 12
  num_propagators: 2
training:
  num_steps: 12
  evaluate_every: 6
  num_validation: 6
  checkpoint_every: 3
  log_every: 2
"""


RUNS = LanguageRuns(recipe=RECIPE.name, kind=RECIPE.kind, config=SMALL)
command, run, start, tree_of = RUNS.command, RUNS.run, RUNS.start, RUNS.tree_of


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a small config, and a cache of tokens for all runs of this file."""
    return RUNS.prepare(tmp_path_factory.mktemp("lm"))


def lines(place: Path, out: str, event: str) -> list[Record]:
    """Return the journal's lines of one event."""
    return [one for one in read_journal(place / out) if one.event == event]


def settings(**changes: Any) -> SolitonSettings:
    """Return the size of the config above."""
    small = {"dim": 16, "num_blocks": 2, "num_heads": 2, "hidden": 12}
    return SolitonSettings(**{**small, **changes})


def as_complex(planes: torch.Tensor) -> torch.Tensor:
    """Join planes that stand side by side."""
    return torch.complex(*planes.chunk(2, -1))


def test_complex_maps_are_those_of_complex_numbers() -> None:
    """Planes side by side hide nothing."""
    torch.manual_seed(0)
    layer = ComplexLinear(5, 3).double()
    x = torch.randn(7, 10, dtype=torch.float64)
    right = as_complex(x) @ torch.complex(layer.re, layer.im).T
    torch.testing.assert_close(as_complex(layer(x)), right)


def test_a_norm_and_attention_commute_with_a_phase() -> None:
    """A phase on all channels of all tokens comes out as the same phase."""
    torch.manual_seed(0)
    x = torch.randn(2, 9, 16, dtype=torch.float64)
    phase = torch.exp(torch.tensor(0.7j, dtype=torch.complex128))
    turned = as_complex(x) * phase
    planes = torch.cat((turned.real, turned.imag), dim=-1)
    layers = (ComplexNorm(8), ComplexAttention(8, 2, 9, share=1.0))
    for layer in (one.double() for one in layers):
        torch.testing.assert_close(
            as_complex(layer(planes)), as_complex(layer(x)) * phase
        )


def test_attention_weighs_by_distance() -> None:
    """Positions enter as phases, so that only differences of them matter."""
    torch.manual_seed(0)
    layer = ComplexAttention(8, 2, 20, share=1.0).double()
    x = torch.randn(1, 6, 16, dtype=torch.float64)
    whole = layer.turns
    before = layer(x)
    layer.turns = whole[11:] - 0.0
    torch.testing.assert_close(layer(x), before)
    layer.turns = 2 * whole
    assert not torch.allclose(layer(x), before)


@pytest.mark.parametrize("variant", ["identity", "transformer"])
def test_rivals_have_as_many_weights(variant: str) -> None:
    """Within the width of one channel of their feed-forward."""
    ours = build_model(settings(), 257, 24)
    theirs = build_model(settings(variant=variant), 257, 24)
    assert abs(num_parameters(theirs) - num_parameters(ours)) <= 2 * 6 * 16


@pytest.mark.parametrize("variant", ["layer", "identity", "transformer"])
def test_no_token_sees_what_comes_after_it(variant: str) -> None:
    """A language model that did would have nothing to predict."""
    torch.manual_seed(0)
    model = build_model(settings(variant=variant), 257, 24)
    tokens = torch.randint(257, (2, 24))
    changed = tokens.clone()
    changed[:, 13:] = (changed[:, 13:] + 1) % 257
    one, two = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :13], two[:, :13], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(one[:, 13:], two[:, 13:])


def test_every_weight_learns() -> None:
    """Edges and envelopes of the propagators too."""
    torch.manual_seed(0)
    model = build_model(settings(), 257, 24)
    tokens = torch.randint(257, (2, 25))
    model(tokens[:, :-1], tokens[:, 1:]).backward()
    for name, weight in model.named_parameters():
        assert weight.grad is not None, name
        assert weight.grad.abs().sum() > 0, name


def test_propagators_keep_the_norm_of_every_token() -> None:
    """Whatever the dt."""
    torch.manual_seed(0)
    layer = build_model(settings(dt=1.5), 257, 24).get_submodule("propagation")
    x = torch.randn(3, 24, 32)
    torch.testing.assert_close(layer(x).norm(dim=-1), x.norm(dim=-1))


def residuals(*, islands: bool) -> list[tuple[float, float]]:
    """Return residual and unitarity of each propagator in a step under bf16-mixed."""
    torch.manual_seed(0)
    model = build_model(settings(), 257, 24)
    probe = HealthProbe(model)
    policy = preset("bf16-mixed")
    policy = protected(policy, RECIPE) if islands else policy
    made = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    with made.region():
        model(torch.randint(257, (2, 24)))
    return [(one.residual, one.unitarity) for one in probe.read().values()]


def test_islands_keep_the_residual_and_bf16_alone_does_not() -> None:
    """By 1e3 and more: the propagators are unguarded, and the policy protects them."""
    kept, lost = residuals(islands=True), residuals(islands=False)
    assert len(kept) == len(lost) == 2
    for (small, unitary), (large, broken) in zip(kept, lost, strict=True):
        assert small < 1e-6
        assert unitary < 1e-6
        assert large > 1e3 * small
        assert broken > 1e3 * unitary


PRECISIONS = ["32-true", "bf16-mixed", "16-mixed", "bf16-true"]


@needs_lightning
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.filterwarnings("ignore:fp16 products run on the cpu, slowly")
@pytest.mark.filterwarnings("ignore:.*modules hold 16-bit weights plain")
def test_a_run_ends_with_a_report(place: Path, precision: str) -> None:
    """Loss, unitarity, residual, memory and scale are in it, and nothing is NaN."""
    text = run(place, f"report-{precision}", "--precision", precision, "--no-compile")
    assert "validation loss" in text
    train = lines(place, f"report-{precision}", "train")
    assert [one.step for one in train] == [2, 4, 6, 8, 10, 12]
    for one in train:
        assert 0.0 < one.values["loss"] < 6.5
        assert one.values["residual"] < 1e-5
        assert one.values["unitarity"] < 1e-5
    epochs = lines(place, f"report-{precision}", "epoch")
    assert [one.step for one in epochs] == [6, 12]
    first, last = (one.values["validation_loss"] for one in epochs)
    assert last < first < 6.0
    page = (place / f"report-{precision}" / "report.html").read_text()
    for title in ("Loss", "Unitarity", "Residual", "Memory", "Loss scale"):
        assert title in page


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Compare two trees bit for bit."""
    assert type(left) is type(right), path
    if isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for name in left:
            assert_same(left[name], right[name], f"{path}/{name}")
    elif isinstance(left, list | tuple):
        assert len(left) == len(right), path
        for at, (one, two) in enumerate(zip(left, right, strict=True)):
            assert_same(one, two, f"{path}/{at}")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    else:
        assert left == right, path


def assert_same_end(place: Path, one: str, two: str) -> None:
    """Compare weights, optimizer and curves of two runs."""
    left, right = (tree_of(place, out)["lightning"] for out in (one, two))
    for part in ("state_dict", "optimizer_states", "global_step"):
        assert_same(left[part], right[part], part)
    names = ("loss", "residual", "validation_loss", "learning_rate", "scale")
    curves = [
        [
            (each.event, each.step, *(each.values.get(name) for name in names))
            for each in read_journal(place / out)
        ]
        for out in (one, two)
    ]
    assert curves[0] == curves[1]


@needs_lightning
@pytest.mark.slow
def test_a_killed_run_ends_with_the_same_bits(place: Path) -> None:
    """SIGKILL, then --resume, in processes of their own."""
    more = ("--precision", "bf16-mixed", "--steps", "40")
    run(place, "whole", *more)
    process = start(place, "killed", *more)
    deadline = time.monotonic() + 240
    while not list((place / "killed" / "checkpoints").glob("*-step-1*.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run(place, "killed", "--resume", "--steps", "40")
    assert_same_end(place, "whole", "killed")


@needs_lightning
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["16-mixed", "bf16-true"])
@pytest.mark.filterwarnings("ignore:fp16 products run on the cpu, slowly")
@pytest.mark.filterwarnings("ignore:.*modules hold 16-bit weights plain")
def test_a_run_goes_on_from_any_checkpoint(place: Path, precision: str) -> None:
    """On a step with a validation (6) and on one without (9)."""
    whole = f"all-{precision}"
    run(place, whole, "--precision", precision)
    for step in (9, 6):
        out = f"part-{precision}-{step}"
        run(place, out, "--precision", precision)
        shelf = CheckpointShelf(folder=place / out / "checkpoints", kind=RECIPE.kind)
        for path in shelf.paths():
            if int(path.stem.rsplit("-", 1)[1]) > step:
                path.unlink()
        run(place, out, "--resume")
        assert_same_end(place, whole, out)


@needs_lightning
@pytest.mark.slow
def test_a_signal_ends_the_run_after_its_step_and_leaves_a_checkpoint(
    place: Path,
) -> None:
    """Exit code 143, and --resume goes on."""
    process = start(place, "stopped", "--precision", "32-true", "--steps", "3000")
    deadline = time.monotonic() + 240
    while not list((place / "stopped" / "checkpoints").glob("*.safetensors")):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 143, text
    assert "go on with" in text
    step = tree_of(place, "stopped")["lightning"]["global_step"]
    assert 3 <= step < 3000
    names = [one.name for one in (place / "stopped" / "checkpoints").iterdir()]
    assert sum(name.endswith(f"-step-{step}.safetensors") for name in names) == 1
    assert all(one.step % 6 == 0 for one in lines(place, "stopped", "epoch"))


@needs_lightning
@pytest.mark.slow
def test_two_processes_train_one_model(place: Path) -> None:
    """DDP over gloo: each sees half of the windows, and one writes."""
    process = start(
        place, "ddp", "--precision", "bf16-mixed", "--devices", "2", "--strategy", "ddp"
    )
    text, _ = process.communicate(timeout=280)
    assert process.returncode == 0, text
    train = lines(place, "ddp", "train")
    assert [one.step for one in train] == [2, 4, 6, 8, 10, 12]
    assert all(one.values["residual"] < 1e-6 for one in train)
    run(place, "alone", "--precision", "bf16-mixed")
    both = [lines(place, out, "epoch")[-1].values for out in ("ddp", "alone")]
    losses = [one["validation_loss"] for one in both]
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)


@needs_lightning
@pytest.mark.slow
def test_compiled_blocks_train_as_eager_ones(place: Path) -> None:
    """By Inductor, with the propagators between two graphs; --no-compile wins."""
    compiled = SMALL + "  compile: yes\n"
    (place / "compiled.yaml").write_text(compiled)
    config = ("--config", str(place / "compiled.yaml"))
    losses = {}
    for out, more in (("inductor", ()), ("eager", ("--no-compile",))):
        process = start(place, out, "--precision", "bf16-mixed", *config, *more)
        text, _ = process.communicate(timeout=280)
        assert process.returncode == 0, text
        facts = tree_of(place, out)["facts"]
        assert facts["compiled"].startswith("True" if out == "inductor" else "False")
        losses[out] = lines(place, out, "epoch")[-1].values["validation_loss"]
    assert losses["inductor"] == pytest.approx(losses["eager"], rel=1e-2)


@needs_lightning
def test_overfitting_learns_a_batch_by_heart(place: Path) -> None:
    """Far below what unseen text allows, and measured on that batch."""
    more = ("--steps", "150", "--overfit-batches", "1", "--evaluate-every", "75")
    run(place, "overfit", "--precision", "32-true", *more)
    last = lines(place, "overfit", "epoch")[-1]
    assert last.values["validation_loss"] < 1.5


@needs_lightning
def test_processes_of_another_launcher_need_a_folder_by_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Else each would take the next free one for itself."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("CASTWISE_RUN_FOLDER", raising=False)
    with pytest.raises(SettingsError, match="--out"):
        CliRunner().invoke(root, ["train", "soliton_lm"], catch_exceptions=False)


def test_a_missing_lightning_is_told(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With what to install."""
    monkeypatch.setattr(command_room.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"castwise\[lightning\]"):
        CliRunner().invoke(root, command(place, "none"), catch_exceptions=False)


@needs_lightning
@pytest.mark.parametrize(
    ("more", "error", "message"),
    [
        (["--resume", "--seed", "3"], ContradictionError, r"training\.seed is 0 there"),
        (["--resume", "--precision", "32-true"], ContradictionError, "--precision"),
        (["--precision", "bf16-mixed"], SettingsError, "holds a run already"),
        (["--devices", "none"], SettingsError, "a number or auto"),
        (["--out", "{fresh}", "--strategy", "luck"], SettingsError, "--strategy luck"),
    ],
)
def test_what_cannot_be_is_refused(
    place: Path, more: list[str], error: type[CastwiseError], message: str
) -> None:
    """By the name of the flag or setting."""
    if not (place / "stands").exists():
        run(place, "stands", "--precision", "bf16-mixed", "--steps", "3")
    more = [one.replace("{fresh}", str(place / "fresh")) for one in more]
    with pytest.raises(error, match=re.compile(message)):
        CliRunner().invoke(
            root, command(place, "stands", *more), catch_exceptions=False
        )
