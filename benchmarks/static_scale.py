"""A static loss scale that gradient flow suggests, tried: does fp16 train by it?

    suggested        the scale that `gradient_flow` reads off a short run in fp32
    too high         2^6 of it: above what nothing overflows at, so steps are skipped
    far too low      2^-14: gradients vanish in fp16, and less is learned
    dynamic          what torch.amp.GradScaler does: starts at 2^16 and searches
    fp32             what all of them are compared with

Two tasks, the same seeds and batches in every arm: Latin squares of four rows (the kit
of the experiments), and a language model on a noisy counting task. Blocks may begin as
the identity, behind zeros, so that a first batch alone would see no gradient in them:
the flow is read at several steps of the run in fp32, and the smallest suggestion is
taken. Judged is that the suggestion skips nothing and loses nothing against fp32, that
it was no accident (the one that is too high skips), and that a scale was needed at all
(the one that is far too low ends worse).

    python benchmarks/static_scale.py --json docs/accepted/static_scale.json --page
    python benchmarks/static_scale.py --steps 40 --seeds 1
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from experiments import kit
from page_tables import filled, markdown
from small_lm import VOCABULARY, LanguageModel, head_of_record, token_loss
from torch import Tensor, nn

import castwise as cw
from castwise.errors import LossScaleError
from castwise.graph import gradient_flow
from castwise.loss_scale import DynamicScale, LossScale, StaticScale
from castwise.recipes.kenken.batches import draw_batch

PAGE = Path(__file__).parents[1] / "docs" / "graph.md"
SUGGESTED, HIGH, LOW = "suggested", "too high", "far too low"
ARMS = (SUGGESTED, HIGH, LOW, "dynamic", "fp32")
ABOVE = 2.0**6
FAR_TOO_LOW = 2.0**-14
READ_AT = (0, 2, 5, 10, 20)
WITHIN = 0.02
"""Nats that the suggestion may lose against fp32; far too low must lose ten times."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Something to train on."""

    build: Callable[[], nn.Module]
    """The model, from the process's random state."""

    draw: Callable[[int, int], tuple[Any, ...]]
    """The inputs and the target of a seed and a step."""

    loss: Callable[[Tensor, Tensor], Tensor]
    """From the output and the target."""

    learning_rate: float
    """Peak of the linear rise."""


def square_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy of the hidden cells."""
    return F.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())


@cache
def kenken() -> Task:
    """The kit's squares: two blocks of width 32, 32 squares a step."""
    settings = kit.KitSettings(width=32, num_layers=2, cells_per_step=512)
    mixture = settings.mixture()

    def draw(seed: int, step: int) -> tuple[Any, ...]:
        sets = kit.training_sets(mixture)
        batch = draw_batch(sets, mixture, seed=seed, step=step)
        wanted = batch.answer_tokens.masked_fill(~batch.hidden, -100)
        return batch.tokens, batch.modes, batch.size, wanted

    return Task(
        build=lambda: kit.SquareModel(settings),
        draw=draw,
        loss=square_loss,
        learning_rate=settings.learning_rate,
    )


@cache
def language() -> Task:
    """Count upwards by a step that the first two tokens show; one in ten is noise."""

    def draw(seed: int, step: int) -> tuple[Any, ...]:
        lot = torch.Generator().manual_seed(1000 * seed + step)
        first = torch.randint(VOCABULARY, (16, 1), generator=lot)
        by = torch.randint(1, 4, (16, 1), generator=lot)
        tokens = (first + by * torch.arange(17)) % VOCABULARY
        noise = torch.randint(VOCABULARY, tokens.shape, generator=lot)
        noisy = torch.rand(tokens.shape, generator=lot) < 0.1
        tokens = tokens.where(~noisy, noise)
        return tokens[:, :-1], tokens[:, 1:]

    return Task(
        build=lambda: LanguageModel(32, 2),
        draw=draw,
        loss=lambda logits, wanted: token_loss(logits.float(), wanted),
        learning_rate=4e-3,
    )


TASKS: Mapping[str, Callable[[], Task]] = {"kenken": kenken, "language": language}


@dataclass(frozen=True, kw_only=True, slots=True)
class Trained:
    """How one arm came out."""

    loss: float
    """Mean of the last fifth, nats."""

    num_skipped: int
    """Steps that were skipped."""

    gave_up: bool = False
    """Whether the scale stopped the run, after too many skips in a row."""


def train(
    task: Task,
    seed: int,
    num_steps: int,
    *,
    policy: str,
    scale: LossScale | None = None,
    look: Callable[[nn.Module, int], None] = lambda _, __: None,
) -> Trained:
    """Train from the seed's weights; `look` sees the model before each step."""
    torch.manual_seed(seed)
    model = task.build()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.learning_rate)
    run = cw.prepare(
        model, optimizer, cw.preset(policy), clip_norm=1.0, loss_scale=scale
    )
    losses: list[float] = []
    for number in range(num_steps):
        look(model, number)
        for group in optimizer.param_groups:
            group["lr"] = task.learning_rate * min(1.0, (number + 1) / 20)
        *inputs, wanted = task.draw(seed, number)
        try:
            with run.step() as step:
                loss = task.loss(model(*inputs), wanted)
                step.backward(loss)
        except LossScaleError:
            return Trained(loss=losses[-1], num_skipped=run.num_skipped, gave_up=True)
        losses.append(float(loss.detach()))
    last = losses[-max(1, num_steps // 5) :]
    return Trained(loss=statistics.fmean(last), num_skipped=run.num_skipped)


def suggested_scale(task: Task, seed: int) -> float:
    """The smallest suggestion over some steps of a short run in fp32."""
    found: list[float] = []

    def look(model: nn.Module, number: int) -> None:
        if number in READ_AT:
            torch.compiler.reset()
            flow = gradient_flow(model, task.draw(seed, number), task.loss)
            found.append(flow.suggest_scale().value)

    train(task, seed, READ_AT[-1] + 1, policy="32-true", look=look)
    return min(found)


def measure(name: str, num_seeds: int, num_steps: int) -> dict[str, Any]:
    """Every arm of one task, seed by seed."""
    task = TASKS[name]()
    rows: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    exponents = []
    for seed in range(num_seeds):
        good = suggested_scale(task, seed)
        exponents.append(math.log2(good))
        scales: dict[str, LossScale | None] = {
            SUGGESTED: StaticScale(good),
            HIGH: StaticScale(good * ABOVE),
            LOW: StaticScale(FAR_TOO_LOW),
            "dynamic": DynamicScale(),
            "fp32": None,
        }
        for arm, scale in scales.items():
            policy = "32-true" if scale is None else "16-mixed"
            done = train(task, seed, num_steps, policy=policy, scale=scale)
            rows[arm].append(asdict(done))
            print(f"{name:9} seed {seed} {arm:12} {done}", flush=True)
    return {"exponents": exponents, "arms": rows}


def judge(found: Mapping[str, Any]) -> dict[str, bool]:
    """What has to hold of one task."""
    arms = found["arms"]
    apart = {
        arm: statistics.fmean(
            one["loss"] - other["loss"]
            for one, other in zip(arms[arm], arms["fp32"], strict=True)
        )
        for arm in (SUGGESTED, LOW)
    }
    return {
        "the suggestion skips nothing": not any(
            each["num_skipped"] for each in arms[SUGGESTED]
        ),
        "the suggestion loses nothing": abs(apart[SUGGESTED]) <= WITHIN,
        "too high skips": all(each["num_skipped"] for each in arms[HIGH]),
        "far too low ends worse": apart[LOW] >= 10 * WITHIN,
    }


COLUMNS = ("task", "scale", "steps skipped", "loss, nats")


def table(record: Mapping[str, Any]) -> str:
    """The table of the page."""
    rows = []
    for name, found in record["tasks"].items():
        powers = sorted({f"2^{exponent:.0f}" for exponent in found["exponents"]})
        for arm, seeds in found["arms"].items():
            losses = [each["loss"] for each in seeds if not each["gave_up"]]
            skipped = [str(each["num_skipped"]) for each in seeds]
            shown = f"suggested, {' or '.join(powers)}" if arm == SUGGESTED else arm
            mean = (
                f"{statistics.fmean(losses):.4f}"
                if losses
                else "gave up after 25 skips in a row"
            )
            rows.append((name, shown, ", ".join(skipped), mean))
    return markdown(COLUMNS, rows)


def main() -> int:
    """Train, judge, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tasks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="write docs/graph.md")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", "Dynamo detected a call to a `functools.lru_")
    tasks = {name: measure(name, args.seeds, args.steps) for name in args.tasks}
    record = {**head_of_record(args), "tasks": tasks}
    verdicts = {name: judge(found) for name, found in tasks.items()}
    for name, verdict in verdicts.items():
        for what, holds in verdict.items():
            print(f"{'holds ' if holds else 'MISSED'} {name}: {what}")
    if args.json is not None:
        args.json.write_text(json.dumps({**record, "holds": verdicts}, indent=1) + "\n")
    if args.page:
        PAGE.write_text(filled(PAGE.read_text(), {"static_scale": table(record)}))
    return 0 if all(all(verdict.values()) for verdict in verdicts.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
