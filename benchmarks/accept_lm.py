"""Train both language models and hold them against thresholds frozen before.

    python benchmarks/accept_lm.py --json docs/accepted/lm.json --page

Every run is a process of its own with one thread; two run at once. Per recipe, and for
three seeds: fp32, bf16-mixed with islands, and two rivals of the same size and steps in
bf16-mixed (nothing in the layer's place, and a plain transformer); for one seed
bf16-mixed without islands.

Then, on the trained bf16 model of seed 0: what the sensitive layers do
under `validate` with islands and without, what `search` holds high when nobody tells it
where the sensitive layers are, and how many bytes a step keeps for its backward.

Who predicts better is reported and has no threshold. Exits with 1 when a threshold is
missed. `--steps` and `--seeds` make it small, for a look at whether it runs. With
`--keep`, what was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from page_tables import filled, markdown
from torch import Tensor, nn

import castwise as cw
from castwise.policy import Policy, preset
from castwise.recipes.language.causal_lm import example_loss
from castwise.recipes.language.evaluation import Batches
from castwise.recipes.language.plan import protected, stored_settings
from castwise.recipes.language.supply import open_supply
from castwise.recipes.language_models import load_model
from castwise.recipes.resolvent_lm.model import RECIPE as RESOLVENT
from castwise.recipes.soliton_lm.model import RECIPE as SOLITON
from castwise.training.journal import read_journal

ROOT = Path(__file__).parents[1]
PAGES = {name: ROOT / "docs" / f"{name}.md" for name in ("resolvent_lm", "soliton_lm")}
RECIPES = {recipe.name: recipe for recipe in (RESOLVENT, SOLITON)}
LAYERS = {"resolvent_lm": "blocks.0.mixing", "soliton_lm": "propagation"}
ARMS = {
    "fp32": ["--precision", "32-true"],
    "bf16": ["--precision", "bf16-mixed"],
    "bare": ["--precision", "bf16-mixed", "--no-islands"],
    "identity": ["--precision", "bf16-mixed", "--variant", "identity"],
    "transformer": ["--precision", "bf16-mixed", "--variant", "transformer"],
}
ONCE = {"bare"}
"""Arms of one seed: what they show does not depend on it."""

COLUMNS = ("arm", "seeds", "validation loss", "of seeds", "residual", "weights")

STEPS = {"resolvent_lm": 600, "soliton_lm": 400}
"""Updates of every run of a recipe: a minute or so on one core."""

RESIDUAL_GOAL = 1e-4
THRESHOLDS = {
    "not_finite": 0,
    "residual": RESIDUAL_GOAL,
    "unitarity": 1e-6,
    "bare_over_islands": 1e3,
    "bf16_minus_fp32": "at most the range of the fp32 seeds",
    "saved_bytes_bf16_over_fp32": 0.95,
}
SEARCH_BUDGETS = (0.1, 0.05, 0.03, 0.02, 0.014, 0.01, 0.007, 0.005)
"""Of the gradient, loose ones first, down to the one that needs a sensitive layer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Run:
    """What one run came to."""

    validation_loss: float
    """At its end, nats per token."""

    bits_per_byte: float
    """At its end."""

    not_finite: int
    """Numbers in the journal that are none."""

    residual: float | None
    """The largest at any time."""

    residual_median: float | None
    """Over the lines of the journal."""

    unitarity: float | None
    """The largest at any time."""

    skipped: int
    """Steps without an update."""

    step_ms: float
    """Median."""

    peak_mib: float
    """Of the process, in training."""

    num_weights: int
    """Of the model."""


def train(recipe: str, arm: str, seed: int, folder: Path, steps: int) -> Run:
    """Train in a process of its own; return what its journal says."""
    out = folder / f"{recipe}-{arm}-{seed}"
    command = [sys.executable, "-m", "castwise", "train", recipe, *ARMS[arm]]
    command += ["--config", str(ROOT / "configs" / f"{recipe}.yaml")]
    command += ["--seed", str(seed), "--out", str(out), "--threads", "1"]
    command += ["--data", str(folder / "data"), "--keep-last", "1"]
    command += ["--steps", str(steps)]
    if not (out / "report.json").exists():  # written last
        _run([*command, "--resume"] if (out / "checkpoints").exists() else command)
    records = read_journal(out)
    lines = [one.values for one in records if one.event == "train"]
    epochs = [one.values for one in records if one.event == "epoch"]
    numbers = [
        value
        for values in (*lines, *epochs)
        for value in values.values()
        if isinstance(value, float)
    ]
    loss = f"{epochs[-1]['validation_loss']:.4f}"
    print(f"{recipe} {arm} seed {seed}: validation loss {loss}", flush=True)
    return Run(
        validation_loss=epochs[-1]["validation_loss"],
        bits_per_byte=epochs[-1]["validation_bits_per_byte"],
        not_finite=sum(not math.isfinite(number) for number in numbers),
        residual=_worst(lines, "residual", max),
        residual_median=_worst(lines, "residual", statistics.median),
        unitarity=_worst(lines, "unitarity", max),
        skipped=int(lines[-1]["skipped"]),
        step_ms=statistics.median(values["step_ms"] for values in lines),
        peak_mib=max(values["train_peak_mib"] for values in epochs),
        num_weights=int(_facts(out)["num_parameters"]),
    )


def _run(command: list[str]) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")


def _worst(lines: list[Any], name: str, of: Any) -> float | None:
    found = [float(values[name]) for values in lines if name in values]
    return float(of(found)) if found else None


def _facts(out: Path) -> Any:
    return load_model(out).facts


class Alone(nn.Module):
    """A sensitive layer by itself, under the name that it has in its model."""

    def __init__(self, fqn: str, layer: nn.Module) -> None:
        super().__init__()
        inner: nn.Module = layer
        for name in reversed(fqn.split(".")[1:]):
            holder = nn.Module()
            holder.add_module(name, inner)
            inner = holder
        self.add_module(fqn.split(".", maxsplit=1)[0], inner)
        self._fqn = fqn

    def forward(self, x: Tensor) -> Any:
        """Return what the layer returns."""
        return self.get_submodule(self._fqn)(x)


def evidence(recipe: str, out: Path, data: Path) -> dict[str, Any]:
    """Ask `validate` and `search` about the trained model."""
    torch.manual_seed(0)
    loaded = load_model(out)
    model, facts = loaded.model, loaded.facts
    settings = stored_settings(RECIPES[recipe], facts)
    supply = open_supply(settings.text, data, tokenizer=loaded.tokenizer)
    batches = [
        (batch.tokens[:2, :128].contiguous(), batch.targets[:2, :128].contiguous())
        for batch in Batches(supply, settings.text, settings.training).validation[:4]
    ]
    bare = preset("bf16-mixed")
    policies = {"islands": protected(bare, RECIPES[recipe]), "bare": bare}
    found: dict[str, Any] = {
        "validate": {
            name: _validate_layer(recipe, model, batches, policy)
            for name, policy in policies.items()
        },
        "saved_bytes": {
            "fp32": _saved_bytes(model, batches[0], preset("32-true")),
            **{
                name: _saved_bytes(model, batches[0], policy)
                for name, policy in policies.items()
            },
        },
    }
    found["search"] = _search(recipe, model, batches)
    return found


def _validate_layer(
    recipe: str, model: nn.Module, batches: list[Any], policy: Policy
) -> dict[str, Any]:
    """Validate one sensitive layer on what it meets in the trained model."""
    fqn = LAYERS[recipe]
    layer = model.get_submodule(fqn)
    met: list[Tensor] = []
    handle = layer.register_forward_hook(lambda *args: met.append(args[1][0].detach()))
    with torch.no_grad():
        for tokens, _ in batches:
            model(tokens)
    handle.remove()
    generator = torch.Generator().manual_seed(1)
    inputs = [(x, torch.randn(x.shape, generator=generator)) for x in met]

    def loss(output: Tensor, weights: Tensor) -> Tensor:
        return (output * weights).mean()

    target = Alone(fqn, layer)
    report = cw.validate(target, inputs, loss, policy, tolerance=RESIDUAL_GOAL)
    output = report.results[0].measures.relative
    return {"holds": report.holds, "output": output, "says": report.summary()}


def _saved_bytes(model: nn.Module, batch: Any, policy: Policy) -> int:
    """Count the bytes that a step keeps for its backward, each storage once."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    owned = {one.untyped_storage().data_ptr() for one in model.parameters()}
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.0), policy)
    with run.region(), torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        model(*batch)
    run.remove()
    return sum(
        one.untyped_storage().nbytes() for at, one in kept.items() if at not in owned
    )


def _search(recipe: str, model: nn.Module, batches: list[Any]) -> dict[str, Any]:
    """Tighten the budget until the search holds a sensitive layer high."""
    pattern = RECIPES[recipe].island
    steps: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for limit in SEARCH_BUDGETS:
            budget = cw.Budget(gradient=limit)
            try:
                found = cw.search(
                    model, batches, example_loss, budget, record=f"{folder}/scores.json"
                )
            except cw.CastwiseError as error:
                steps.append({"budget": limit, "refused": str(error)})
                break
            units = [one for one in found.units if not one.is_operator]
            high = [one.fqn for one in units if one.chosen == "fp32"]
            sensitive = [one for one in high if _is_within(one, pattern)]
            steps.append(
                {
                    "budget": limit,
                    "num_high": len(high),
                    "num_units": len(units),
                    "sensitive_high": sensitive,
                    "high": high,
                    "says": found.summary(),
                }
            )
            if sensitive:
                return {
                    "finds": True,
                    "budgets": steps,
                    "policy": found.policy.to_yaml(),
                }
    return {"finds": False, "budgets": steps}


def _is_within(fqn: str, pattern: str) -> bool:
    """Whether a module is one that the pattern names, or lies in it."""
    return fnmatchcase(fqn, pattern) or fnmatchcase(fqn, f"{pattern}.*")


def judge(recipe: str, runs: dict[str, list[Run]], proof: dict[str, Any]) -> Any:
    """Put the thresholds beside what was measured; name what is missed."""
    losses = {arm: [run.validation_loss for run in of] for arm, of in runs.items()}
    mean = {arm: statistics.fmean(each) for arm, each in losses.items()}
    noise = max(losses["fp32"]) - min(losses["fp32"])
    layer = [*runs["fp32"], *runs["bf16"]]
    every = [run for of in runs.values() for run in of]
    figures = {
        "not_finite": sum(run.not_finite for run in every),
        "residual": max(run.residual or 0.0 for run in layer),
        "bare_over_islands": (runs["bare"][0].residual_median or 0.0)
        / (runs["bf16"][0].residual_median or math.inf),
        "bf16_minus_fp32": mean["bf16"] - mean["fp32"],
        "noise_of_fp32_seeds": noise,
        "saved_bytes_bf16_over_fp32": proof["saved_bytes"]["islands"]
        / proof["saved_bytes"]["fp32"],
    }
    held = {
        "not_finite": figures["not_finite"] == 0,
        "residual": figures["residual"] < RESIDUAL_GOAL,
        "bare_over_islands": figures["bare_over_islands"] >= 1e3,
        "bf16_minus_fp32": abs(figures["bf16_minus_fp32"]) <= noise,
        "saved_bytes_bf16_over_fp32": figures["saved_bytes_bf16_over_fp32"] < 0.95,
        "validate_holds_with_islands": proof["validate"]["islands"]["holds"],
        "validate_refuses_without": not proof["validate"]["bare"]["holds"],
        "search_finds_the_layer": proof["search"]["finds"],
    }
    if recipe == "soliton_lm":
        figures["unitarity"] = max(run.unitarity or 0.0 for run in layer)
        held["unitarity"] = figures["unitarity"] < 1e-6
    order = sorted(("bf16", "identity", "transformer"), key=lambda arm: mean[arm])
    return {
        "figures": figures,
        "held": held,
        "mean_validation_loss": mean,
        "best_first": order,
        "layer_beats_identity_on_seeds": sum(
            one < two
            for one, two in zip(losses["bf16"], losses["identity"], strict=True)
        ),
        "layer_beats_transformer_on_seeds": sum(
            one < two
            for one, two in zip(losses["bf16"], losses["transformer"], strict=True)
        ),
    }


def table(found: dict[str, Any]) -> str:
    """What a recipe's runs came to, as rows of its page."""
    rows = []
    for arm, runs in found["runs"].items():
        losses = [run["validation_loss"] for run in runs]
        residuals = [run["residual"] for run in runs if run["residual"] is not None]
        rows.append(
            [
                arm,
                str(len(runs)),
                f"{statistics.fmean(losses):.4f}",
                f"{min(losses):.4f} to {max(losses):.4f}",
                f"{max(residuals):.0e}" if residuals else "",
                f"{runs[0]['num_weights']:,}",
            ]
        )
    return markdown(COLUMNS, rows)


def main() -> int:
    """Train, ask, judge, record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--steps", type=int, help="at least 10, the first line")
    parser.add_argument("--only", choices=sorted(RECIPES))
    parser.add_argument(
        "--keep", type=Path, help="a folder that keeps the runs, and goes on"
    )
    parser.add_argument("--page", action="store_true", help="fill the tables there")
    flags = parser.parse_args()
    names = [flags.only] if flags.only else list(RECIPES)
    record: dict[str, Any] = {
        "date": datetime.now(UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "machine": f"{platform.machine()}, {flags.jobs} runs at once, 1 thread each",
        "thresholds": THRESHOLDS,
        "steps": {name: flags.steps or STEPS[name] for name in names},
    }
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = flags.keep or Path(scratch)
        # made once, before processes would make it twice
        for name in names:
            sections = RECIPES[name].sections()
            open_supply(sections["text"](), folder / "data")
        for name in names:
            record[name] = _one_recipe(name, folder, flags)
            if flags.json is not None:  # what is done stays, whatever comes next
                flags.json.parent.mkdir(parents=True, exist_ok=True)
                flags.json.write_text(json.dumps(record, indent=1) + "\n")
            if flags.page:
                page = PAGES[name].read_text()
                PAGES[name].write_text(filled(page, {"lm": table(record[name])}))
    missed = [
        f"{name}: {what}"
        for name in names
        for what, holds in record[name]["held"].items()
        if not holds
    ]
    for name in names:
        print(name, json.dumps(record[name]["figures"]))
        print(name, json.dumps(record[name]["mean_validation_loss"]))
        print(name, "best first:", ", ".join(record[name]["best_first"]))
    print("missed: " + "; ".join(missed) if missed else "every threshold holds")
    return 1 if missed else 0


def _one_recipe(name: str, folder: Path, flags: argparse.Namespace) -> dict[str, Any]:
    tasks = [
        (arm, seed)
        for seed in range(flags.seeds)
        for arm in ARMS
        if arm not in ONCE or seed == 0
    ]
    with ThreadPoolExecutor(flags.jobs) as pool:
        done = list(
            pool.map(
                lambda task: train(
                    name, task[0], task[1], folder, flags.steps or STEPS[name]
                ),
                tasks,
            )
        )
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    for (arm, _), run in zip(tasks, done, strict=True):
        runs[arm].append(run)
    proof = evidence(name, folder / f"{name}-bf16-0", folder / "data")
    return {
        **judge(name, runs, proof),
        "runs": {arm: [asdict(run) for run in of] for arm, of in runs.items()},
        "evidence": proof,
    }


if __name__ == "__main__":
    sys.exit(main())
