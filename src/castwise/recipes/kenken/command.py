"""The commands of this recipe: `castwise train kenken`, `castwise kenken solve | make`.

This room imports no torch and no numba; a command fetches its room when it runs.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from castwise.recipes.average_choice import FIELDS, average_options
from castwise.recipes.kenken.settings import DIMENSIONS
from castwise.recipes.launch_options import launch_options

RUNS = Path("runs") / "kenken"

CHANGES = (
    "seed",
    "num_steps",
    "sizes",
    "modes",
    "evaluate_every",
    "checkpoint_every",
    "walked",
    "curriculum_text",
    *FIELDS,
)


@click.command("kenken")
@click.option(
    "--preset",
    type=click.Choice(["tiny", "small", "hour", "base"]),
    help="Seconds, minutes or an hour on two cores, or a GPU.  [default: small]",
)
@click.option(
    "--dtype",
    type=click.Choice(["fp32", "fp16", "bf16"]),
    help="Short for --precision 32-true, 16-mixed, bf16-mixed.",
)
@click.option("--precision", metavar="PRESET", help="A policy preset by its name.")
@click.option("--policy", type=click.Path(path_type=Path), help="A policy file.")
@click.option(
    "--fallback",
    metavar="FORMAT",
    help="Format to use instead of one that the device cannot do.",
)
@click.option(
    "--optimizer",
    metavar="NAME",
    help="adamw, adamw8bit, sgd, lion, ...; a wrong name lists all.  [default: torch]",
)
@click.option(
    "--optimizer-fallback",
    metavar="NAME",
    help="Optimizer to use instead of one whose package is missing.",
)
@click.option(
    "--storage",
    metavar="NAME",
    help="How weights in 16 bits are stored: split, master, ...  [default: the policy]",
)
@launch_options
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="Folder of the run.  [default: runs/kenken/NNN]",
)
@click.option("--resume", is_flag=True, help="Go on from the newest checkpoint.")
@click.option("--seed", type=int, help="Seed of data order, masks and weights.")
@click.option("--steps", "num_steps", type=int, help="Updates of the whole run.")
@click.option("--sizes", metavar="N,N", help="Sizes to train on, such as 4,5,6.")
@click.option("--modes", metavar="M,M", help="Alphabets: standard,zero,negative.")
@click.option("--size-curriculum", is_flag=True, help="Small puzzles first.")
@click.option("--mode-curriculum", is_flag=True, help="One alphabet first.")
@click.option("--fill-curriculum", is_flag=True, help="Well-filled grids first.")
@click.option(
    "--curriculum",
    type=click.Path(path_type=Path),
    help="Stages from a file; the three flags above then choose among them.",
)
@click.option("--evaluate-every", type=int, help="Steps of an epoch.")
@click.option("--checkpoint-every", type=int, help="Steps between two checkpoints.")
@click.option(
    "--keep-last",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="Checkpoints that stay, besides the best.",
)
@click.option(
    "--threads",
    type=click.IntRange(min=1),
    help="CPU threads of torch.  [default: its own choice]",
)
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder that caches puzzles.  [default: the user's cache]",
)
@click.option(
    "--watch",
    type=click.IntRange(min=1),
    metavar="STEPS",
    help="Count weights, gradients and outputs by exponent every so many steps.",
)
@click.option(
    "--grad-checkpoint",
    "recompute",
    is_flag=True,
    help="Recompute blocks in the backward pass instead of keeping their activations.",
)
@click.option(
    "--profile",
    is_flag=False,
    flag_value="10:3",
    metavar="[FIRST:COUNT]",
    help="Profile a window of steps: a trace and a table.  [bare: 10:3]",
)
@click.option(
    "--sentinel", is_flag=True, help="Take bad steps back, and promote modules."
)
@click.option(
    "--dry-run", is_flag=True, help="Show the memory that a step will hold; train not."
)
@average_options
@click.option(
    "--hybrid",
    is_flag=False,
    flag_value="default",
    metavar="[NAME|FILE]",
    help="Train in phases: default, conservative, aggressive, or a YAML file.",
)
def train(**flags: Any) -> int:
    """Train a KenKen solver on puzzles that are made on the spot."""
    from castwise.recipes.hybrid_choice import HybridChoice
    from castwise.recipes.kenken import recipe
    from castwise.recipes.optimizer_choice import OptimizerChoice
    from castwise.recipes.precision_choice import PrecisionChoice

    given = {name: value for name, value in flags.items() if value is not None}
    walked = tuple(name for name in DIMENSIONS if flags[f"{name}_curriculum"])
    if walked:
        given["walked"] = walked
    if flags["curriculum"] is not None:
        from castwise.recipes.kenken.curricula import read_curriculum_file

        given["curriculum_text"] = read_curriculum_file(flags["curriculum"])
    changes = {name: given[name] for name in CHANGES if name in given}
    choice = PrecisionChoice(
        dtype=flags["dtype"],
        precision=flags["precision"],
        policy_file=flags["policy"],
        fallback=flags["fallback"],
        storage=flags["storage"],
    )
    optimizer = OptimizerChoice(
        name=flags["optimizer"], fallback=flags["optimizer_fallback"]
    )
    if flags["dry_run"]:
        from castwise.recipes.kenken.dry_run import dry_run

        return dry_run(
            preset=flags["preset"],
            changes=changes,
            choice=choice,
            optimizer=optimizer,
            device=flags["device"],
            recomputed=flags["recompute"],
            in_phases=flags["hybrid"] is not None,
        )
    return recipe.train(
        preset=flags["preset"],
        changes=changes,
        choice=choice,
        optimizer=optimizer,
        hybrid=HybridChoice(asked=flags["hybrid"]),
        place=recipe.Place(
            device=flags["device"],
            out=flags["out"],
            runs=RUNS,
            resume=flags["resume"],
            keep_last=flags["keep_last"],
            num_threads=flags["threads"],
            data=flags["data"],
            watch_every=flags["watch"],
            sentinel=flags["sentinel"],
            recompute=flags["recompute"],
            profile=flags["profile"],
            strategy=flags["strategy"],
            compress=flags["compress"],
        ),
    )


@click.group("kenken")
def group() -> None:
    """Solve KenKen puzzles with a trained checkpoint, or make new ones."""


@group.command("solve")
@click.argument("puzzle", default="-")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A checkpoint.  [default: the newest run's best]",
)
@click.option(
    "--order",
    type=click.Choice(["most_certain_first", "row_major", "random"]),
    default="most_certain_first",
    show_default=True,
    help="In which order cells are committed to.",
)
@click.option(
    "--loops", type=click.IntRange(min=1), help="Loops of the model.  [as measured]"
)
def solve(puzzle: str, checkpoint: Path | None, order: str, loops: int | None) -> int:
    """Solve the puzzles of a file, or of standard input (-), and draw them.

    The exact solver checks every answer. Leaves with 0 when all are right and with 1
    when one is wrong.
    """
    from castwise.recipes.kenken import solving

    return solving.solve(
        source=puzzle, checkpoint=checkpoint, runs=RUNS, order=order, num_loops=loops
    )


@group.command("make")
@click.option(
    "--size",
    type=click.IntRange(3, 9),
    default=6,
    show_default=True,
    help="Rows of the puzzle.",
)
@click.option(
    "--mode",
    type=click.Choice(["standard", "zero", "negative"]),
    default="standard",
    show_default=True,
    help="The alphabet.",
)
@click.option(
    "--count",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many puzzles.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Another seed, other puzzles.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["text", "json"]),
    default="text",
    show_default=True,
    help="How they are written.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    help="A file to write.  [default: standard output]",
)
def make(
    size: int, mode: str, count: int, seed: int, form: str, out: Path | None
) -> int:
    """Write puzzles with one solution each, proved by the exact solver."""
    from castwise.recipes.kenken import making

    return making.make(size=size, mode=mode, count=count, seed=seed, form=form, out=out)


@group.command("eval")
@click.option(
    "--checkpoint",
    type=click.Path(path_type=Path),
    help="A checkpoint.  [default: the newest run's best]",
)
@click.option("--sizes", metavar="N,N", help="Sizes, 4 to 9.  [default: as trained]")
@click.option("--modes", metavar="M,M", help="Alphabets.  [default: all three]")
@click.option(
    "--count",
    type=int,
    default=1000,
    show_default=True,
    help="Puzzles of each set, its first ones.",
)
@click.option(
    "--order",
    type=click.Choice(["most_certain_first", "row_major", "random"]),
    default="most_certain_first",
    show_default=True,
    help="In which order cells are committed to.",
)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="A record.")
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    help="Folder that keeps the sets.  [default: the user's cache]",
)
def evaluate(
    checkpoint: Path | None,
    sizes: str | None,
    modes: str | None,
    count: int,
    order: str,
    json_path: Path | None,
    data: Path | None,
) -> int:
    """Measure a checkpoint on the frozen test sets, beside baselines without a model.

    The sets are made on the spot and must have the digests that castwise states.
    """
    from rich.console import Console

    from castwise.recipes.kenken import examining
    from castwise.recipes.kenken.settings import parse_sizes

    facts, rows = examining.evaluate_checkpoint(
        checkpoint=checkpoint,
        runs=RUNS,
        sizes=None if sizes is None else parse_sizes(sizes),
        modes=examining.ALL_MODES if modes is None else modes.split(","),
        num_puzzles=count,
        order=order,
        data=data,
    )
    examining.show(rows, Console())
    if json_path is not None:
        examining.write_record(facts, rows, json_path)
    return 0
