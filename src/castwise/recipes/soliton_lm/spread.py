"""How a run through Lightning is spread over processes: Lightning's own, or torchrun's.

    castwise train soliton_lm --devices 2 --strategy ddp      # Lightning starts them
    torchrun --nproc-per-node 2 -m castwise train soliton_lm --strategy fsdp

Under torchrun the processes are there, and Lightning only has to be told how many;
castwise joins them before it, so that they agree on folder, tokens and policy first,
and Lightning takes the process group that it finds.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from castwise.decision import Decision
from castwise.distributed.ranks import ALONE, launched
from castwise.errors import SettingsError
from castwise.recipes.launch import Launch, open_launch
from castwise.recipes.soliton_lm.replicated import ReplicatedStrategy
from castwise.recipes.soliton_lm.sharded import ShardedStrategy
from castwise.training.run_folder import RunFolder, open_run_folder
from castwise.training.strategy import Strategy

if TYPE_CHECKING:
    from lightning.pytorch.strategies import ParallelStrategy

    from castwise.integrations.lightning import CastwisePrecision

_FOLDER = "CASTWISE_RUN_FOLDER"  # how processes that Lightning starts learn of it
_UNDER_TORCHRUN = {"auto": "ddp", "ddp": "ddp", "fsdp": "fsdp"}


def is_under_torchrun() -> bool:
    """Whether torchrun started this process; Lightning looks at the same variable."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def is_first() -> bool:
    """Whether this is the first of all processes, the one that writes."""
    return all(int(os.environ.get(name, "0")) == 0 for name in ("RANK", "LOCAL_RANK"))


@contextmanager
def open_spread(
    strategy: str, device: Decision[torch.device], compress: str = "reduce"
) -> Iterator[Launch]:
    """Join the processes of torchrun for the length of a with-block, if there are any.

    Args:
        strategy: What `--strategy` says.
        device: What `--device` says; of several GPUs each rank takes its own.
        compress: What `--compress` says.

    Raises:
        SettingsError: It starts processes of its own under torchrun, or needs torchrun.
    """
    if not is_under_torchrun():
        if strategy == "fsdp":
            raise SettingsError(
                "--strategy fsdp needs processes that train together; start them by "
                "torchrun --nproc-per-node N -m castwise train ..."
            )
        if compress != "reduce":
            raise SettingsError(
                f"--compress {compress} needs the processes of torchrun; start them by "
                "torchrun --nproc-per-node N -m castwise train ..."
            )
        console = Console(quiet=not is_first())
        yield Launch(strategy=Strategy(), device=device, console=console)
        return
    if strategy not in _UNDER_TORCHRUN:
        raise SettingsError(
            f"under torchrun --strategy needs to be {', '.join(_UNDER_TORCHRUN)}, got "
            f"{strategy!r}; start castwise alone for other strategies of Lightning"
        )
    ours = _UNDER_TORCHRUN[strategy]
    with open_launch(asked=ours, device=device, compress=compress) as launch:
        yield launch


def open_folder(
    launch: Launch, *, out: Path | None, parent: Path, resume: bool
) -> RunFolder:
    """Let the first process open the folder of the run, and the others know of it.

    Args:
        launch: The processes of torchrun, if there are any.
        out: As for `open_run_folder`.
        parent: As there.
        resume: As there.

    Raises:
        SettingsError: Nobody tells this process where the run is.
        CastwiseError: As `open_run_folder`.
    """
    if is_under_torchrun():
        return launch.open_folder(out=out, parent=parent, resume=resume)
    if is_first():
        folder = open_run_folder(out=out, parent=parent, resume=resume)
        os.environ[_FOLDER] = str(folder.path.resolve())
        return folder
    path = os.environ.get(_FOLDER) or out
    if path is None:
        raise SettingsError(
            "processes that another program starts cannot agree on the next free "
            "folder; name one for all of them with --out."
        )
    return RunFolder(path=Path(path), resuming=resume)


def strategy_for_trainer(
    launch: Launch, precision: CastwisePrecision, fallback: str | None
) -> ParallelStrategy | None:
    """Return the strategy that Lightning's Trainer is to be given; none: its own.

    Args:
        launch: The processes of torchrun, if there are any.
        precision: The policy of the run.
        fallback: The format to use instead of one that the device cannot do.
    """
    if launch.strategy.name == "ddp":
        return ReplicatedStrategy(precision, fallback, launch.strategy.compress)
    if launch.strategy.is_sharded:
        return ShardedStrategy(launch.ranks.num_ranks)
    return None


def shape_for_trainer(devices: str | None) -> dict[str, Any]:
    """Return how many devices and machines Lightning's Trainer is to be told of.

    Args:
        devices: What `--devices` says; one by default, all of torchrun's under it.

    Raises:
        SettingsError: It contradicts torchrun.
    """
    if not is_under_torchrun():
        asked = devices or "1"
        return {"devices": asked if asked == "auto" else int(asked)}
    here = int(os.environ["LOCAL_WORLD_SIZE"])
    if devices not in {None, "auto", str(here)}:
        raise SettingsError(
            f"torchrun has started {here} processes on this machine, and --devices "
            f"{devices} asks for others; leave it out, or change --nproc-per-node"
        )
    ranks = launched() or ALONE
    return {"devices": here, "num_nodes": ranks.num_ranks // here}
