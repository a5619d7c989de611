"""The whole run of `castwise train kenken`, from data to report, in reading order.

plan      settings, policy and device: from the flags, or from a checkpoint
build     puzzles, model, optimizer, run, and a census of the formats that run
fit       the trainer's plain loop
tell      the table by size, mode and fill; report.html; one solved puzzle
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numba
import numpy as np
import torch
from rich.console import Console

import castwise
from castwise.checkpoints import CheckpointShelf, refuse_contradictions
from castwise.decision import Decision
from castwise.distributed.ranks import first_before_others
from castwise.errors import CheckpointError, SettingsError
from castwise.hybrid import HybridSettings
from castwise.memory.monitor import MemoryMonitor
from castwise.memory.recompute import recompute
from castwise.numerics.census import FormatCensus, observe
from castwise.policy import Policy
from castwise.recipes.average_choice import averages_of
from castwise.recipes.device_choice import choose_device
from castwise.recipes.hybrid_choice import HybridChoice, stored_settings
from castwise.recipes.hybrid_run import PreparedRun, prepare_run
from castwise.recipes.kenken import closing
from castwise.recipes.kenken.batches import PuzzleBatch
from castwise.recipes.kenken.curricula import curriculum_of
from castwise.recipes.kenken.model import KenKenModel, model_settings
from castwise.recipes.kenken.settings import KenKenSettings, settings_of
from castwise.recipes.kenken.solver import KIND
from castwise.recipes.kenken.supply import Supply, default_folder, open_supply
from castwise.recipes.kenken.task import SCORE, KenKenTask
from castwise.recipes.launch import BEFORE, Launch, open_launch
from castwise.recipes.optimizer_choice import (
    OptimizerChoice,
    build_optimizer,
    decay_groups,
    refuse_missing,
)
from castwise.recipes.precision_choice import PrecisionChoice
from castwise.recipes.profile_story import journaled_profile
from castwise.recipes.watch_story import journaled_watch
from castwise.training.averages import Averages
from castwise.training.journal import Journal
from castwise.training.profile import StepWindow
from castwise.training.random_state import seed_everything
from castwise.training.run_folder import RunFolder
from castwise.training.schedule import WarmupStableDecay
from castwise.training.sentinel import Sentinel
from castwise.training.step import Run
from castwise.training.trainer import Trainer, TrainerSettings

DEFAULT_PRECISION = "bf16-mixed"
HYBRID_PRECISION = "32-true"
DEFAULT_OPTIMIZER = "torch"
SIGNAL_CODES = {"SIGINT": 130, "SIGTERM": 143}


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run happens and what it may use there."""

    device: str
    """auto, cpu, cuda or cuda:N."""

    out: Path | None
    """Folder of the run, or None for the next number below `runs`."""

    runs: Path
    """Where numbered runs stand."""

    resume: bool
    """Whether to go on with the run that stands there."""

    keep_last: int
    """Checkpoints that stay, besides the best."""

    num_threads: int | None
    """CPU threads of torch, or None for its own choice."""

    data: Path | None
    """Folder that caches puzzles, or None for the user's cache."""

    watch_every: int | None = None
    """Steps between two looks at the numbers, or None for no look."""

    sentinel: bool = False
    """Whether bad steps are taken back and modules promoted."""

    recompute: bool = False
    """Whether blocks run again in the backward pass; no bit depends on it."""

    strategy: str | None = None
    """ddp or fsdp over the processes of torchrun, or None for one process."""

    compress: str = "reduce"
    """How ddp makes gradients smaller."""

    profile: str | None = None
    """Which steps are profiled, `FIRST:COUNT`, or None for none."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Plan:
    """What will be trained, in which precision, on what."""

    settings: KenKenSettings
    """Everything but precision and place."""

    policy: Decision[Policy]
    """The precision asked for, and by which flag."""

    optimizer: Decision[str]
    """The optimizer that steps, and why it is this one."""

    device: Decision[torch.device]
    """Where it runs, and why."""

    asked_optimizer: str
    """The optimizer that was asked for; another than that in force is a fallback."""

    hybrid: HybridSettings | None
    """Phases to train in, or None for plain steps."""

    fallback: str | None
    """Format to use instead of one that the device cannot do."""

    tree: Mapping[str, Any] | None
    """The checkpoint to go on from, if any."""


def train(
    *,
    preset: str | None,
    changes: Mapping[str, Any],
    choice: PrecisionChoice,
    optimizer: OptimizerChoice,
    hybrid: HybridChoice,
    place: Place,
) -> int:
    """Train, measure, report; return the exit code.

    Args:
        preset: Name of the settings to start from; None for `small`.
        changes: Settings given on the command line, by name.
        choice: The precision flags.
        optimizer: The optimizer flags.
        hybrid: The hybrid flag.
        place: Where it happens.

    Raises:
        CastwiseError: For every mistake in a flag, a file or a folder.
    """
    with open_launch(
        asked=place.strategy,
        device=choose_device(place.device),
        compress=place.compress,
    ) as launch:
        return _train(preset, changes, choice, optimizer, hybrid, place, launch)


def _train(
    preset: str | None,
    changes: Mapping[str, Any],
    choice: PrecisionChoice,
    optimizer: OptimizerChoice,
    hybrid: HybridChoice,
    place: Place,
    launch: Launch,
) -> int:
    console = launch.console
    window = None if place.profile is None else StepWindow.parse(place.profile)
    folder = launch.open_folder(out=place.out, parent=place.runs, resume=place.resume)
    shelf = CheckpointShelf(
        folder=folder.checkpoints,
        kind=KIND,
        keep_last=place.keep_last,
    )
    plan = _plan(preset, changes, choice, optimizer, hybrid, launch, folder, shelf)
    launch.agree(plan.settings.describe(), plan.policy.value)
    launch.refuse_phases(plan.hybrid)
    if plan.hybrid is not None and place.sentinel:
        raise SettingsError(
            "--sentinel repeats steps and --hybrid takes landings back by itself; keep "
            "one of them."
        )
    if place.num_threads is not None:
        torch.set_num_threads(place.num_threads)
    with ExitStack() as stack:
        supply = first_before_others(
            launch.ranks, lambda: _open_supply(plan, place, console)
        )
        built = _build(
            plan, supply, folder, shelf, stack, launch, guarded=place.sentinel
        )
        if place.recompute and not built.task.model.settings.recompute:
            console.print(recompute(built.task.model).summary(), highlight=False)
        first_step = 0 if plan.tree is None else plan.tree["position"]["step"]
        if place.watch_every is not None:
            stack.enter_context(
                journaled_watch(
                    built.run,
                    built.journal,
                    every=place.watch_every,
                    first_step=first_step,
                )
            )
        profile = None
        if window is not None and launch.ranks.is_first:
            profile = stack.enter_context(
                journaled_profile(
                    built.run,
                    built.journal,
                    folder.path,
                    window,
                    first_step=first_step,
                )
            )
        for line in closing.opening_lines(built.facts, folder):
            console.print(line, highlight=False, soft_wrap=True)
        result = built.trainer.fit()
        if profile is not None and profile.table is not None:
            console.print(profile.table.text(), highlight=False, markup=False)
            console.print(f"Profile: {folder.path / 'profile'}", soft_wrap=True)
    if result.stopped_by is not None:
        console.print(
            f"Stopped by {result.stopped_by} after step {result.num_steps}; go on with "
            f"`castwise train kenken --resume --out {folder.path}`.",
            soft_wrap=True,
        )
        return SIGNAL_CODES[result.stopped_by]
    if not launch.strategy.takes_part:
        return 0
    with (
        built.averages.in_place_of_weights(),
        launch.open_journal(folder) as journal,
    ):
        built.made.tell(journal, result.num_steps)
        closing.close(
            task=built.task,
            supply=supply,
            settings=plan.settings,
            facts=built.facts,
            result=result,
            folder=folder,
            journal=journal,
            console=console,
            writes=launch.ranks.is_first,
        )
    return 0


def _plan(
    preset: str | None,
    changes: Mapping[str, Any],
    choice: PrecisionChoice,
    optimizer: OptimizerChoice,
    hybrid: HybridChoice,
    launch: Launch,
    folder: RunFolder,
    shelf: CheckpointShelf,
) -> Plan:
    """Take settings and policy from the flags, or from the checkpoint to resume."""
    device = launch.device
    if not folder.resuming:
        settings = settings_of(preset or "small", changes)
        curriculum_of(settings)  # refused before anything is made
        policy = choice.policy(
            otherwise=HYBRID_PRECISION if hybrid.is_given else DEFAULT_PRECISION
        )
        return Plan(
            settings=settings,
            policy=policy,
            hybrid=hybrid.settings(
                num_steps=settings.num_steps,
                base=policy.value,
                base_is_given=choice.is_given,
            ),
            optimizer=optimizer.decide(otherwise=DEFAULT_OPTIMIZER),
            asked_optimizer=optimizer.name or DEFAULT_OPTIMIZER,
            device=device,
            fallback=choice.fallback,
            tree=None,
        )
    found = shelf.latest(launch.strategy.read)
    if found.value is None:
        raise CheckpointError(
            f"--resume needs a checkpoint, and {folder.checkpoints} holds none; start "
            "without --resume."
        )
    tree = found.value.tree
    facts = tree["facts"]
    settings = KenKenSettings.from_description(facts["settings"])
    where = found.value.path
    _refuse_other_flags(preset, changes, choice, optimizer, settings, facts, where)
    hybrid.refuse_other(facts, num_steps=settings.num_steps, where=where)
    return Plan(
        settings=settings,
        hybrid=stored_settings(facts),
        policy=Decision(
            Policy.parse(facts["policy"], where=str(where)),
            facts["asked_by"],
        ),
        optimizer=_stored_optimizer(facts),
        asked_optimizer=_asked_optimizer(facts),
        device=device,
        fallback=facts["fallback"],
        tree=tree,
    )


def _refuse_other_flags(
    preset: str | None,
    changes: Mapping[str, Any],
    choice: PrecisionChoice,
    optimizer: OptimizerChoice,
    settings: KenKenSettings,
    facts: Mapping[str, Any],
    where: Path,
) -> None:
    """Compare only what was said on the command line with what is stored."""
    changed = settings.with_changes(changes).describe()
    named = {
        "num_steps": "--steps",
        "walked": "--size-, --mode- or --fill-curriculum",
        "curriculum_text": "--curriculum",
    }
    asked = {named.get(n, f"--{n.replace('_', '-')}"): changed[n] for n in changes}
    stored = {
        named.get(n, f"--{n.replace('_', '-')}"): settings.describe()[n]
        for n in changes
    }
    if preset is not None:
        asked["--preset"], stored["--preset"] = preset, settings.preset
    if optimizer.name is not None:
        asked["--optimizer"] = optimizer.name
        stored["--optimizer"] = _asked_optimizer(facts)
    before = Policy.parse(facts["policy"], where=str(where))
    if choice.storage is not None:
        asked["--storage"], stored["--storage"] = choice.storage, before.storage
    if choice.is_given:
        policy = choice.policy(otherwise=DEFAULT_PRECISION)
        flag = policy.because.split()[0]
        asked[flag], stored[flag] = policy.value.name, before.name
        if policy.value.name == before.name and policy.value != before:
            asked[flag], stored[flag] = policy.value.to_yaml(), before.to_yaml()
    refuse_contradictions(asked, stored, where=where)


def _stored_optimizer(facts: Mapping[str, Any]) -> Decision[str]:
    """Return the optimizer that stepped the stored run, whatever was asked for."""
    stored = facts.get("optimizer")
    if stored is None:  # the first version of this recipe knew no other
        return Decision(DEFAULT_OPTIMIZER, "the recipe's own choice")
    refuse_missing(stored["in_force"])
    return Decision(stored["in_force"], stored["because"])


def _asked_optimizer(facts: Mapping[str, Any]) -> str:
    """Return what the stored run asked for."""
    stored = facts.get("optimizer")
    return DEFAULT_OPTIMIZER if stored is None else str(stored["asked"])


def _open_supply(plan: Plan, place: Place, console: Console) -> Supply:
    folder = place.data if place.data is not None else default_folder()
    with console.status("puzzles") as status:

        def progress(name: str, index: int, total: int) -> None:
            status.update(f"puzzles {index + 1}/{total}: {name}")

        return open_supply(plan.settings, folder, progress=progress)


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What a run consists of, ready to start."""

    trainer: Trainer
    """The loop."""

    task: KenKenTask
    """The recipe's work."""

    averages: Averages
    """What is evaluated and saved beside the weights."""

    facts: Mapping[str, Any]
    """What stands in checkpoints and in the report."""

    run: Run
    """The prepared model."""

    journal: Journal
    """Where every line of evidence goes."""

    made: PreparedRun
    """The same, with what makes the steps of a run in phases."""


def _build(
    plan: Plan,
    supply: Supply,
    folder: RunFolder,
    shelf: CheckpointShelf,
    stack: ExitStack,
    launch: Launch,
    *,
    guarded: bool,
) -> Built:
    settings, device, strategy = plan.settings, plan.device.value, launch.strategy
    seed_everything(settings.seed)
    model = KenKenModel(model_settings(settings.model)).to(device)
    # Blocks run many times in one forward: gradients of weights that travel in 16 bits
    # would be added up in 16 bits.
    strategy.shard(
        model, plan.policy.value, device, fallback=plan.fallback, gather="stored"
    )
    optimizer = build_optimizer(
        plan.optimizer.value,
        decay_groups(model, settings.weight_decay),
        lr=settings.learning_rate,
        betas=settings.betas,
    )
    monitor = MemoryMonitor(device)
    made = prepare_run(
        model,
        optimizer,
        plan.policy.value,
        hybrid=plan.hybrid,
        clip_norm=settings.clip_norm,
        device=device,
        fallback=plan.fallback,
        monitor=monitor,
        num_ranks=launch.ranks.num_ranks,
    )
    run = made.run
    averages = averages_of(settings, model, run.held)
    task = KenKenTask(
        run=run,
        model=model,
        supply=supply,
        settings=settings,
        device=device,
        curriculum=curriculum_of(settings),
        strategy=strategy,
    )
    census = _census(run, task)
    facts = {**_facts(plan, supply, run, census), **launch.facts()}
    journal = stack.enter_context(launch.open_journal(folder))
    display = stack.enter_context(
        launch.open_display(settings.num_steps, "castwise train kenken")
    )
    trainer = Trainer(
        run=run,
        task=task,
        schedule=WarmupStableDecay(
            num_steps=settings.num_steps,
            num_warmup=settings.num_warmup,
            decay_share=settings.decay_share,
        ),
        averages=averages,
        settings=TrainerSettings(
            num_steps=settings.num_steps,
            evaluate_every=settings.evaluate_every,
            checkpoint_every=settings.checkpoint_every,
        ),
        shelf=shelf,
        journal=journal,
        display=display,
        monitor=monitor,
        facts=facts,
        score=SCORE,
        sentinel=Sentinel(run) if guarded else None,
        stepping=made.stepping(task, averages),
        strategy=strategy,
    )
    if plan.tree is not None:
        _tell_changes(plan.tree["facts"], facts, launch.console)
        trainer.resume(plan.tree)
    return Built(
        trainer=trainer,
        task=task,
        averages=averages,
        facts=facts,
        run=run,
        journal=journal,
        made=made,
    )


def _census(run: Run, task: KenKenTask) -> FormatCensus:
    """Count which operator really runs in which format, on the first batch."""
    batch: PuzzleBatch = task.batch(0)

    def once() -> None:
        with run.region():
            loss = task.loss(batch).value
        loss.backward()  # type: ignore[no-untyped-call]

    census = observe(once)
    run.optimizer.zero_grad(set_to_none=True)
    return census


def _facts(
    plan: Plan, supply: Supply, run: Run, census: FormatCensus
) -> dict[str, Any]:
    """Collect what a checkpoint and the report must hold about this run."""
    return {
        "recipe": "kenken",
        "settings": plan.settings.describe(),
        "policy": plan.policy.value.to_yaml(),
        "asked_by": plan.policy.because,
        "fallback": plan.fallback,
        "hybrid": None if plan.hybrid is None else plan.hybrid.to_dict(),
        "optimizer": {
            "asked": plan.asked_optimizer,
            "in_force": plan.optimizer.value,
            "because": plan.optimizer.because,
        },
        "in_force": run.precision.summary(),
        "loss_scale": str(run.precision.loss_scale),
        "effective": census.record(),
        "device": str(plan.device.value),
        "device_because": plan.device.because,
        "num_threads": torch.get_num_threads(),
        "data": supply.digests,
        "versions": {
            "castwise": castwise.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "numba": numba.__version__,
            "python": platform.python_version(),
        },
    }


def _tell_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], console: Console
) -> None:
    """Name what differs and may change the last bits, though it is allowed."""
    before = {**BEFORE, **before}
    names = ("versions", "num_threads", "device", "data", "effective")
    for name in (*names, *BEFORE):
        if before[name] != now[name]:
            shown = "" if name in {"data", "effective"} else f": {before[name]} before"
            console.print(
                f"Note: {name} differs from the checkpoint{shown}; the run goes on, "
                "but not bit for bit as it would have."
            )
