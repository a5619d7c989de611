from __future__ import annotations

import importlib
import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from castwise.errors import MissingExtraError, SettingsError
from castwise.policy import preset
from castwise.recipes.optimizer_choice import (
    OPTIMIZERS,
    OptimizerChoice,
    build_optimizer,
    decay_groups,
    refuse_missing,
)
from castwise.training.step import prepare

OURS = [name for name, entry in OPTIMIZERS.items() if entry.package is None]
OTHERS = [name for name in OPTIMIZERS if name not in OURS]


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Python without the optional packages, whatever is installed here."""
    real = importlib.import_module
    roots = {OPTIMIZERS[name].module.partition(".")[0] for name in OTHERS}

    def without(name: str, package: str | None = None) -> ModuleType:
        root = name.partition(".")[0]
        if root in roots:
            raise ModuleNotFoundError(f"No module named {root!r}", name=root)
        return real(name, package)

    monkeypatch.setattr(importlib, "import_module", without)


def model() -> torch.nn.Sequential:
    """An embedding, a matrix large enough for 8 bits, a norm."""
    torch.manual_seed(0)
    return torch.nn.Sequential(
        torch.nn.Embedding(11, 64), torch.nn.Linear(64, 67), torch.nn.LayerNorm(67)
    )


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
@pytest.mark.usefixtures("bare")
def test_our_optimizers_always_run(name: str, precision: str) -> None:
    """Nothing need be installed, and the loss falls, with split weights too."""
    assert OptimizerChoice(name=name).decide(otherwise="torch").value == name
    net = model()
    groups = decay_groups(net, 0.01)
    run = prepare(
        net,
        build_optimizer(name, groups, lr=3e-3, betas=(0.9, 0.95)),
        preset(precision),
        clip_norm=1.0,
    )
    words, answers = torch.arange(11), torch.arange(11) * 3
    losses = []
    for _ in range(12):
        with run.step() as step:
            logits = net(words).float()
            step.backward(torch.nn.functional.cross_entropy(logits, answers))
        losses.append(step.outcome.loss)
    assert losses[-1] < 0.95 * losses[0]


def test_the_default_is_torchs_own_fused_adamw() -> None:
    """Runs of the first version go on as they began."""
    net = model()
    optimizer = build_optimizer(
        "torch", decay_groups(net, 0.01), lr=1e-3, betas=(0.9, 0.95)
    )
    assert type(optimizer) is torch.optim.AdamW
    assert optimizer.defaults["fused"] is True
    decays = {
        group["weight_decay"]: group["params"] for group in optimizer.param_groups
    }
    assert [tuple(p.shape) for p in decays[0.01]] == [(67, 64)]
    assert len(decays[0.0]) == 4
    assert OptimizerChoice().decide(otherwise="torch").because == (
        "the recipe's own choice"
    )


@pytest.mark.parametrize("name", ["lion", "sgd", "sgd8bit", "lion8bit"])
def test_rates_are_given_as_for_adamw(name: str) -> None:
    """What decays by rate times decay shall decay as fast under every optimizer."""
    net = model()
    optimizer = build_optimizer(
        name, decay_groups(net, 0.5), lr=1e-3, betas=(0.9, 0.95)
    )
    group = optimizer.param_groups[0]
    assert group["lr"] == 1e-3 * OPTIMIZERS[name].rate
    assert group["lr"] * group["weight_decay"] == pytest.approx(1e-3 * 0.5)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.usefixtures("bare")
def test_a_missing_package_is_one_sentence_or_a_recorded_fallback(name: str) -> None:
    """Never a silent exchange: the message has the remedy, the record both names."""
    package = OPTIMIZERS[name].package
    with pytest.raises(MissingExtraError) as caught:
        OptimizerChoice(name=name).decide(otherwise="torch")
    text = str(caught.value)
    assert f"--optimizer {name} needs the package {package}, which is not" in text
    assert f"pip install {package}" in text
    assert "--optimizer-fallback" in text
    decision = OptimizerChoice(name=name, fallback="adamw8bit").decide(
        otherwise="torch"
    )
    assert decision.value == "adamw8bit"
    assert decision.because == (
        f"--optimizer-fallback instead of {name}, which needs the package {package}, "
        "which is not installed"
    )
    with pytest.raises(MissingExtraError, match=f"{name} needs.*fallback {OTHERS[0]}"):
        OptimizerChoice(name=name, fallback=OTHERS[0]).decide(otherwise="torch")


@pytest.mark.usefixtures("bare")
def test_a_run_whose_package_is_gone_cannot_go_on() -> None:
    """Its states are those of that optimizer; nothing may take their place."""
    for name in OURS:
        refuse_missing(name)
    with pytest.raises(MissingExtraError, match="stepped by bnb8bit, which needs the"):
        refuse_missing("bnb8bit")


def test_a_package_that_does_not_load_is_missing_too(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A broken build is told with its own words, as one sentence."""

    def broken(name: str) -> ModuleType:
        raise OSError(f"{name}: libcudart.so.13:\n cannot open")

    monkeypatch.setattr(importlib, "import_module", broken)
    with pytest.raises(MissingExtraError, match=r"does not load \(torchao.optim: lib"):
        OptimizerChoice(name="torchao8bit").decide(otherwise="torch")


def test_a_fallback_is_idle_where_the_package_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The optimizer that was asked for is the one that steps."""
    made: dict[str, Any] = {}
    module = ModuleType("optimi")

    def adamw(groups: Any, **keywords: Any) -> torch.optim.Optimizer:
        made.update(keywords)
        return torch.optim.AdamW(groups, **keywords)

    module.AdamW = adamw  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "optimi", module)
    choice = OptimizerChoice(name="optimi", fallback="adamw")
    assert choice.decide(otherwise="torch").value == "optimi"
    assert choice.decide(otherwise="torch").because == "--optimizer optimi"
    build_optimizer("optimi", decay_groups(model(), 0.1), lr=0.1, betas=(0.8, 0.9))
    assert made == {"lr": 0.1, "betas": (0.8, 0.9)}


def test_a_wrong_name_lists_the_table() -> None:
    """Flags are named, and the nearest name is offered."""
    with pytest.raises(SettingsError, match=r"--optimizer needs one of torch, adamw"):
        OptimizerChoice(name="adamw8bits")
    with pytest.raises(
        SettingsError, match=r"--optimizer-fallback .*did you mean lion"
    ):
        OptimizerChoice(name="lion", fallback="loin")


def test_asking_for_the_flags_imports_no_torch() -> None:
    """The command line answers at once."""
    code = (
        "import sys, castwise.recipes.optimizer_choice\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
