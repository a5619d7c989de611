"""The whole run of `castwise train resolvent_lm`, in reading order.

plan      settings, policy and device: from config and flags, or from a checkpoint
build     tokens, model, optimizer, run, and a census of the formats that run
fit       the trainer's plain loop
tell      report.html, and a sample of text
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from castwise.checkpoints import CheckpointShelf
from castwise.distributed.ranks import first_before_others
from castwise.errors import CheckpointError
from castwise.hybrid import HybridSettings
from castwise.layers.resolvent_health import ResolventProbe
from castwise.memory.monitor import MemoryMonitor
from castwise.numerics.census import observe
from castwise.recipes.average_choice import averages_of
from castwise.recipes.device_choice import choose_device
from castwise.recipes.hybrid_choice import HybridChoice, stored_settings
from castwise.recipes.hybrid_run import PreparedRun, prepare_run
from castwise.recipes.language import closing
from castwise.recipes.language.causal_lm import num_parameters
from castwise.recipes.language.compiling import compile_blocks, compile_decision
from castwise.recipes.language.evaluation import Batches
from castwise.recipes.language.health import NoProbe, Probe
from castwise.recipes.language.plan import (
    SIGNAL_CODES,
    Asked,
    Plan,
    changes_since,
    facts_of,
    plan_anew,
    plan_from,
)
from castwise.recipes.language.sampling import SamplingSettings, sample_text
from castwise.recipes.language.supply import TokenSupply, default_folder, open_supply
from castwise.recipes.language.task import SCORE, LanguageTask
from castwise.recipes.launch import Launch, open_launch
from castwise.recipes.optimizer_choice import build_optimizer, decay_groups
from castwise.recipes.resolvent_lm.model import RECIPE, build_model
from castwise.training.averages import Averages
from castwise.training.random_state import seed_everything
from castwise.training.run_folder import RunFolder
from castwise.training.schedule import WarmupStableDecay
from castwise.training.step import Run
from castwise.training.trainer import FitResult, Trainer, TrainerSettings

RUNS = Path("runs") / "resolvent_lm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run happens and what it may use there."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    out: Path | None = None
    """Folder of the run, or None for the next number below `RUNS`."""

    resume: bool = False
    """Whether to go on with the run that stands there."""

    keep_last: int = 3
    """Checkpoints that stay, besides the best."""

    num_threads: int | None = None
    """CPU threads of torch, or None for its own choice."""

    data: Path | None = None
    """Folder that keeps tokens, or None for the user's cache."""

    hybrid: HybridChoice = field(default_factory=HybridChoice)
    """Phases to train in, if the flag asks for them."""

    strategy: str | None = None
    """ddp or fsdp over the processes of torchrun, or None for one process."""

    compress: str = "reduce"
    """How ddp makes gradients smaller."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What a run consists of, ready to start."""

    trainer: Trainer
    """The loop."""

    made: PreparedRun
    """The prepared model."""

    model: nn.Module
    """The model."""

    averages: Averages
    """What is evaluated and saved beside the weights."""

    supply: TokenSupply
    """Its tokens."""

    facts: Mapping[str, Any]
    """What stands in checkpoints and in the report."""


def train(asked: Asked, place: Place) -> int:
    """Train, measure, report; return the exit code.

    Raises:
        CastwiseError: For every mistake in a flag, a file or a folder.
    """
    with open_launch(
        asked=place.strategy,
        device=choose_device(place.device),
        compress=place.compress,
    ) as launch:
        return _train(asked, place, launch)


def _train(asked: Asked, place: Place, launch: Launch) -> int:
    console = launch.console
    folder = launch.open_folder(out=place.out, parent=RUNS, resume=place.resume)
    shelf = CheckpointShelf(
        folder=folder.checkpoints, kind=RECIPE.kind, keep_last=place.keep_last
    )
    plan = _plan(asked, folder, shelf, launch)
    launch.agree(plan.settings.describe(), plan.policy.value)
    if place.num_threads is not None:
        torch.set_num_threads(place.num_threads)
    with ExitStack() as stack:
        built = _build(plan, place, launch, folder, shelf, stack)
        for line in closing.opening_lines(built.facts, folder):
            console.print(line, highlight=False, soft_wrap=True)
        if plan.tree is not None:
            for line in changes_since(plan.tree["facts"], built.facts):
                console.print(line, highlight=False, soft_wrap=True)
        result = built.trainer.fit()
    if result.stopped_by is not None:
        console.print(
            f"Stopped by {result.stopped_by} after step {result.num_steps}; go on with "
            f"`castwise train {RECIPE.name} --resume --out {folder.path}`.",
            soft_wrap=True,
        )
        return SIGNAL_CODES[result.stopped_by]
    if launch.strategy.takes_part:
        _tell(built, plan, result, folder, launch)
    return 0


def _plan(
    asked: Asked, folder: RunFolder, shelf: CheckpointShelf, launch: Launch
) -> Plan:
    if not folder.resuming:
        return plan_anew(RECIPE, asked)
    found = shelf.latest(launch.strategy.read)
    if found.value is None:
        raise CheckpointError(
            f"--resume needs a checkpoint, and {folder.checkpoints} holds none; start "
            "without --resume."
        )
    return plan_from(RECIPE, asked, found.value.tree, found.value.path)


def _build(
    plan: Plan,
    place: Place,
    launch: Launch,
    folder: RunFolder,
    shelf: CheckpointShelf,
    stack: ExitStack,
) -> Built:
    settings, training = plan.settings, plan.settings.training
    device, strategy = launch.device, launch.strategy
    launch.refuse_uneven(settings.text.batch_size, "text.batch_size")
    supply = first_before_others(
        launch.ranks,
        lambda: open_supply(
            settings.text, place.data or default_folder(), tokenizer=plan.tokenizer
        ),
    )
    batches = Batches(supply, settings.text, training)
    seed_everything(training.seed)
    model = build_model(
        settings.model, supply.tokenizer.vocab_size, settings.text.sequence_length
    ).to(device.value)
    hybrid = _phases(plan, place, folder)
    launch.refuse_phases(hybrid)
    probe: Probe = NoProbe()
    if settings.model.variant == "layer":
        probe = ResolventProbe(model)  # its hooks come before those that free weights
    strategy.shard(model, plan.policy.value, device.value, fallback=plan.fallback)
    monitor = MemoryMonitor(device.value)
    made = prepare_run(
        model,
        build_optimizer(
            "adamw",
            decay_groups(model, training.weight_decay),
            lr=training.learning_rate,
            betas=training.betas,
        ),
        plan.policy.value,
        hybrid=hybrid,
        clip_norm=training.clip_norm,
        device=device.value,
        fallback=plan.fallback,
        monitor=monitor,
        num_ranks=launch.ranks.num_ranks,
    )
    run = made.run
    task = LanguageTask(
        run=run,
        model=model,
        batches=batches,
        probe=probe,
        log_every=training.log_every,
        device=device.value,
        strategy=strategy,
    )
    measured = _measured(run, task, model)
    compiled = compile_decision(training.compile, device.value)
    if compiled.value:
        compile_blocks(model)
    stored = None if hybrid is None else hybrid.to_dict()
    facts = facts_of(
        RECIPE,
        plan,
        supply,
        device,
        {**measured, "compiled": str(compiled), "hybrid": stored, **launch.facts()},
    )
    averages = averages_of(training, model, run.held)
    trainer = _trainer(
        plan, made, task, averages, facts, folder, shelf, stack, monitor, launch
    )
    if plan.tree is not None:
        trainer.resume(plan.tree)
    return Built(
        trainer=trainer,
        made=made,
        model=model,
        averages=averages,
        supply=supply,
        facts=facts,
    )


def _phases(plan: Plan, place: Place, folder: RunFolder) -> HybridSettings | None:
    """Return the phases that the flag asks for, or those of the checkpoint."""
    num_steps = plan.settings.training.num_steps
    if plan.tree is not None:
        facts = plan.tree["facts"]
        place.hybrid.refuse_other(facts, num_steps=num_steps, where=folder.checkpoints)
        return stored_settings(facts)
    return place.hybrid.settings(
        num_steps=num_steps,
        base=plan.policy.value,
        base_is_given=plan.policy.because.startswith("--"),
    )


def _trainer(
    plan: Plan,
    made: PreparedRun,
    task: LanguageTask,
    averages: Averages,
    facts: Mapping[str, Any],
    folder: RunFolder,
    shelf: CheckpointShelf,
    stack: ExitStack,
    monitor: MemoryMonitor,
    launch: Launch,
) -> Trainer:
    training = plan.settings.training
    return Trainer(
        run=made.run,
        task=task,
        schedule=WarmupStableDecay(
            num_steps=training.num_steps,
            num_warmup=training.num_warmup,
            decay_share=training.decay_share,
        ),
        averages=averages,
        settings=TrainerSettings(
            num_steps=training.num_steps,
            evaluate_every=training.evaluate_every,
            checkpoint_every=training.checkpoint_every,
            log_every=training.log_every,
        ),
        shelf=shelf,
        journal=stack.enter_context(launch.open_journal(folder)),
        display=stack.enter_context(
            launch.open_display(training.num_steps, f"castwise train {RECIPE.name}")
        ),
        monitor=monitor,
        facts=facts,
        score=SCORE,
        stepping=made.stepping(task, averages),
        strategy=launch.strategy,
    )


def _measured(run: Run, task: LanguageTask, model: nn.Module) -> dict[str, Any]:
    """Count which operator really runs in which format, on the first batch."""
    batch = task.batch(0)

    def once() -> None:
        with run.region():
            loss = task.loss(batch).value
        loss.backward()  # type: ignore[no-untyped-call]

    census = observe(once)
    run.optimizer.zero_grad(set_to_none=True)
    return {
        "in_force": run.precision.summary(),
        "loss_scale": str(run.precision.loss_scale),
        "effective": census.record(),
        "num_parameters": num_parameters(model),
    }


def _tell(
    built: Built,
    plan: Plan,
    result: FitResult,
    folder: RunFolder,
    launch: Launch,
) -> None:
    with built.averages.in_place_of_weights(), built.made.run.inference():
        sample = sample_text(
            built.model,
            built.supply.tokenizer,
            "",
            length=plan.settings.text.sequence_length,
            settings=SamplingSettings(),
        )
    if not launch.ranks.is_first:
        return
    with launch.open_journal(folder) as journal:
        built.made.tell(journal, result.num_steps)
        journal.write("sample", result.num_steps, {"text": sample})
    closing.close(
        title="A language model that mixes tokens by resolvents",
        facts=built.facts,
        sample=sample,
        folder=folder,
        console=launch.console,
    )
