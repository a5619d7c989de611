"""The whole run of `castwise train soliton_lm`, through Lightning, in reading order.

plan      settings, policy and device: from config and flags, or from a checkpoint
build     tokens, model, precision plugin, callbacks, and a census of what runs
fit       Lightning's Trainer
tell      report.html, and a sample of text
"""

from __future__ import annotations

import copy
import logging
import signal
import threading
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor, nn

from castwise.checkpoints import CheckpointShelf
from castwise.distributed.ranks import first_before_others
from castwise.errors import CheckpointError, SettingsError
from castwise.integrations.hosted import HostedPolicy
from castwise.integrations.lightning import CastwisePrecision
from castwise.layers.cayley_health import HealthProbe
from castwise.memory.monitor import MemoryMonitor
from castwise.numerics.census import observe
from castwise.recipes.device_choice import choose_device
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
from castwise.recipes.launch import Launch
from castwise.recipes.soliton_lm import spread
from castwise.recipes.soliton_lm.callbacks import RunCallback
from castwise.recipes.soliton_lm.model import RECIPE, build_model
from castwise.recipes.soliton_lm.module import SolitonModule
from castwise.recipes.soliton_lm.plain_files import ShelfFiles
from castwise.recipes.soliton_lm.sharded import (
    cutter,
    whole_weights,
)
from castwise.training.display import NullDisplay, open_display
from castwise.training.journal import Journal
from castwise.training.random_state import seed_everything
from castwise.training.run_folder import RunFolder

RUNS = Path("runs") / "soliton_lm"


@dataclass(frozen=True, kw_only=True, slots=True)
class Place:
    """Where a run happens and what it may use there."""

    devices: str | None = None
    """How many, or `auto`; None for one, or for all that torchrun started."""

    strategy: str = "auto"
    """auto, ddp, ddp_spawn, ..., as Lightning's Trainer takes it; fsdp for FSDP2."""

    compress: str = "reduce"
    """How ddp under torchrun makes gradients smaller."""

    device: str = "auto"
    """auto, cpu or cuda."""

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


@dataclass(frozen=True, kw_only=True, slots=True)
class Built:
    """What a run consists of, ready to start."""

    trainer: Trainer
    """Lightning's."""

    module: SolitonModule
    """The model in it."""

    callback: RunCallback
    """What keeps the evidence."""

    precision: CastwisePrecision
    """The policy in force."""

    supply: TokenSupply
    """Its tokens."""

    facts: Mapping[str, Any]
    """What stands in checkpoints and in the report."""


def train(asked: Asked, place: Place) -> int:
    """Train, measure, report; return the exit code.

    Raises:
        CastwiseError: For every mistake in a flag, a file or a folder.
    """
    with spread.open_spread(
        place.strategy, choose_device(place.device), place.compress
    ) as launch:
        return _train(asked, place, launch)


def _train(asked: Asked, place: Place, launch: Launch) -> int:
    console = launch.console
    shape = spread.shape_for_trainer(place.devices)
    folder = spread.open_folder(launch, out=place.out, parent=RUNS, resume=place.resume)
    shelf = CheckpointShelf(
        folder=folder.checkpoints, kind=RECIPE.kind, keep_last=place.keep_last
    )
    plan, start = _plan(asked, folder, shelf, launch)
    launch.agree(plan.settings.describe(), plan.policy.value)
    if place.num_threads is not None:
        torch.set_num_threads(place.num_threads)
    with ExitStack() as stack:
        stack.enter_context(_quiet_lightning())
        built = _build(plan, place, shape, launch, folder, shelf, stack)
        for line in closing.opening_lines(built.facts, folder):
            console.print(line, highlight=False, soft_wrap=True)
        if plan.tree is not None:
            for line in changes_since(plan.tree["facts"], built.facts):
                console.print(line, highlight=False, soft_wrap=True)
        stack.enter_context(_signals_kept())
        built.trainer.fit(built.module, ckpt_path=start)
        step, training = built.trainer.global_step, plan.settings.training
        finished = step >= training.num_steps
        if finished and step % training.evaluate_every:
            built.trainer.validate(built.module, verbose=False)
    stopped = built.callback.stopped_by
    if stopped is not None and not finished:
        console.print(
            f"Stopped by {stopped} after step {step}; go on with `castwise train "
            f"{RECIPE.name} --resume --out {folder.path}`.",
            soft_wrap=True,
        )
        return SIGNAL_CODES[stopped]
    weights = whole_weights(built.module.model)
    if spread.is_first():
        _tell(built, plan, weights, folder, launch)
    return 0


def _plan(
    asked: Asked, folder: RunFolder, shelf: CheckpointShelf, launch: Launch
) -> tuple[Plan, str | None]:
    if not folder.resuming:
        return plan_anew(RECIPE, asked), None
    found = shelf.latest(launch.strategy.read)
    if found.value is None:
        raise CheckpointError(
            f"--resume needs a checkpoint, and {folder.checkpoints} holds none; start "
            "without --resume."
        )
    plan = plan_from(RECIPE, asked, found.value.tree, found.value.path)
    if spread.is_first():
        with Journal(folder.path) as journal:
            journal.rewind(found.value.step)
    return plan, str(found.value.path)


def _build(
    plan: Plan,
    place: Place,
    shape: Mapping[str, Any],
    launch: Launch,
    folder: RunFolder,
    shelf: CheckpointShelf,
    stack: ExitStack,
) -> Built:
    settings, training = plan.settings, plan.settings.training
    device = launch.device
    launch.refuse_uneven(settings.text.batch_size, "text.batch_size")
    if training.average != "none":
        raise SettingsError(
            f"training.average of {RECIPE.name} needs none, got {training.average!r}: "
            "Lightning makes its steps; take castwise train resolvent_lm"
        )
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
    )
    compiled = compile_decision(training.compile, device.value)
    measured = {
        **_measured(plan, model, batches, device.value),
        "compiled": str(compiled),
        **launch.facts(),
    }
    facts = facts_of(RECIPE, plan, supply, device, measured)
    probe: Probe = NoProbe()
    if settings.model.variant == "layer":
        probe = HealthProbe(model)
        probe.paused = True
    if compiled.value:
        compile_blocks(model)
    precision = CastwisePrecision(
        plan.policy.value, device=device.value.type, fallback=plan.fallback
    )
    files = ShelfFiles(launch.strategy.saves(shelf), launch.strategy, facts)
    callback = RunCallback(
        training=training,
        num_tokens=settings.text.batch_size * settings.text.sequence_length,
        journal=stack.enter_context(Journal(folder.path)),
        display=stack.enter_context(
            open_display(training.num_steps, f"castwise train {RECIPE.name}")
            if spread.is_first()
            else NullDisplay()
        ),
        monitor=MemoryMonitor(device.value),
        probe=probe,
        precision=precision,
        files=files,
        tree=plan.tree,
        writes=spread.is_first(),
    )
    return Built(
        trainer=_trainer(plan, place, shape, launch, precision, files, callback),
        module=SolitonModule(
            model,
            batches,
            training,
            plan.policy.value,
            shard=cutter(plan.policy.value, device.value, plan.fallback)
            if launch.strategy.is_sharded
            else None,
        ),
        callback=callback,
        precision=precision,
        supply=supply,
        facts=facts,
    )


def _trainer(
    plan: Plan,
    place: Place,
    shape: Mapping[str, Any],
    launch: Launch,
    precision: CastwisePrecision,
    files: ShelfFiles,
    callback: RunCallback,
) -> Trainer:
    training = plan.settings.training
    ours = spread.strategy_for_trainer(launch, precision, plan.fallback)
    try:
        return Trainer(
            accelerator="gpu" if launch.device.value.type == "cuda" else "cpu",
            **shape,
            strategy=ours or place.strategy,
            plugins=[precision, files],
            callbacks=[callback],
            max_steps=training.num_steps,
            val_check_interval=training.evaluate_every,
            check_val_every_n_epoch=None,
            gradient_clip_val=training.clip_norm,
            num_sanity_val_steps=0,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
    except (ValueError, RuntimeError, TypeError, ImportError) as error:
        raise SettingsError(
            f"Lightning cannot make a Trainer with --devices {shape['devices']} and "
            f"--strategy {place.strategy}: {error}"
        ) from error


def _measured(
    plan: Plan, model: nn.Module, batches: Batches, device: torch.device
) -> dict[str, Any]:
    """Count which operator runs in which format, on a copy and the first batch."""
    copied = copy.deepcopy(model).to(device)
    hosted = HostedPolicy(plan.policy.value, fallback=plan.fallback)
    coverage, *_ = hosted.put_on(copied, device)
    batch = batches.train(0).to(device)

    def once() -> None:
        with hosted.region():
            loss = copied(batch.tokens, batch.targets)
        loss.backward()

    census = observe(once)
    effective = hosted.effective
    hosted.take_off()
    return {
        "in_force": coverage,
        "loss_scale": str(effective.decide_loss_scale()),
        "effective": census.record(),
        "num_parameters": num_parameters(model),
    }


@contextmanager
def _quiet_lightning() -> Iterator[None]:
    """Leave out what Lightning says about accelerators and data loaders."""
    loggers = [
        logging.getLogger(name)
        for name in ("lightning.pytorch", "lightning.fabric", "pytorch_lightning")
    ]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            # asked of a pytree in a way that torch 2.13 deprecates
            warnings.filterwarnings("ignore", message=".*treespec, LeafSpec.*")
            # batches are gathered from a mapped file: there is nothing to wait for
            warnings.filterwarnings("ignore", message=".*does not have many workers.*")
            # not in this recipe: its module gives the optimizer to hold_weights
            warnings.filterwarnings("ignore", message=".*hold 16-bit weights plain.*")
            # gathers by a function that torch 2.13 deprecates
            warnings.filterwarnings("ignore", message=".*functional.all_gather is depr")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


@contextmanager
def _signals_kept() -> Iterator[None]:
    """Put back who hears of SIGINT and SIGTERM; the callback does while it trains."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.getsignal(one) for one in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _tell(
    built: Built,
    plan: Plan,
    weights: Mapping[str, Tensor],
    folder: RunFolder,
    launch: Launch,
) -> None:
    text = plan.settings.text
    model = build_model(
        plan.settings.model, built.supply.tokenizer.vocab_size, text.sequence_length
    )
    model.load_state_dict({name: each.float() for name, each in weights.items()})
    sample = sample_text(
        model.eval(),
        built.supply.tokenizer,
        "",
        length=text.sequence_length,
        settings=SamplingSettings(),
    )
    with Journal(folder.path) as journal:
        journal.write("sample", built.trainer.global_step, {"text": sample})
    closing.close(
        title="A language model around Cayley propagators",
        facts=built.facts,
        sample=sample,
        folder=folder,
        console=launch.console,
    )
