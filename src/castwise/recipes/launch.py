"""How a recipe's run was launched: alone, or by `torchrun` under a strategy.

    with open_launch(asked="ddp", device=choose_device("auto")) as launch:
        folder = launch.open_folder(out=out, parent=runs, resume=False)
        launch.console.print("said once, by rank 0")

Whoever torchrun starts again after a killed worker (`--max-restarts`) goes on with the
run that stands in `--out`, from its last checkpoint, or from the beginning where there
is none yet.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console

from castwise.decision import Decision
from castwise.distributed.ranks import Ranks, from_first, joined, launched
from castwise.distributed.roll_call import RollCall, versions
from castwise.errors import SettingsError
from castwise.hybrid import HybridSettings
from castwise.training.display import Display, open_display
from castwise.training.journal import Journal
from castwise.training.run_folder import RunFolder, open_run_folder
from castwise.training.strategy import Strategy

if TYPE_CHECKING:
    from castwise.policy import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Launch:
    """One process of a run, and what it may say and write."""

    strategy: Strategy
    """How the run is spread over processes."""

    device: Decision[torch.device]
    """Where this process computes, and why."""

    console: Console
    """Where a person reads; silent but on rank 0."""

    @property
    def ranks(self) -> Ranks:
        """The processes."""
        return self.strategy.ranks

    def open_folder(self, *, out: Path | None, parent: Path, resume: bool) -> RunFolder:
        """Let rank 0 open the folder of the run; arguments as for `open_run_folder`.

        Raises:
            SettingsError: Processes may be started anew and could not find the run.
            CastwiseError: As `open_run_folder`.
        """
        again = self.ranks.num_restarts > 0

        def opened() -> RunFolder:
            if out is None and may_restart():
                raise SettingsError(
                    "torchrun --max-restarts starts the same command again, which then "
                    "has to find its run; name its folder with --out"
                )
            found = open_run_folder(out=out, parent=parent, resume=resume, again=again)
            if again and not found.resuming:
                Journal(found.path).rewind(0)  # no checkpoint: all is made anew
            return found

        return from_first(self.ranks, opened)

    def open_journal(self, folder: RunFolder) -> Journal:
        """Return the journal of the run, which rank 0 alone writes."""
        return Journal(folder.path, writes=self.ranks.is_first)

    def open_display(self, num_steps: int, title: str) -> Display:
        """Return the one progress display of the run; none on other ranks."""
        return open_display(num_steps, title, quiet=not self.ranks.is_first)

    def agree(self, settings: Mapping[str, Any], policy: Policy) -> None:
        """Stop all processes unless all were started with the same settings.

        Versions, strategies, settings and policies are compared before anything is
        made; models, which `Strategy.forward_of` compares, do not exist yet.

        Args:
            settings: Of the run, as they describe themselves.
            policy: The precision that was asked for.

        Raises:
            RanksError: On every rank; rank 0 says what differs.
        """
        if self.ranks.num_ranks == 1:
            return
        lines = replace(policy, name="compared").to_yaml().splitlines()
        RollCall.in_group().agree(
            versions() | {"settings": [*_lines(settings)], "policy": lines}
        )

    def refuse_phases(self, hybrid: HybridSettings | None) -> None:
        """Refuse to train in phases where no process holds whole weights.

        Raises:
            SettingsError: On every rank.
        """
        if hybrid is not None and self.strategy.is_sharded:
            raise SettingsError(
                "--hybrid moves whole weights along their way, and --strategy fsdp "
                "leaves each process a part of them; take --strategy ddp, or leave out "
                "--hybrid"
            )

    def refuse_uneven(self, num_rows: int, setting: str) -> None:
        """Refuse a batch that the processes cannot share in equal parts.

        Raises:
            SettingsError: On every rank.
        """
        if num_rows % self.ranks.num_ranks:
            raise SettingsError(
                f"{self.ranks.num_ranks} processes need a batch that they can share "
                f"evenly, got {setting} {num_rows}; start a number of processes that "
                "divides it, or change it"
            )

    def facts(self) -> dict[str, int | str]:
        """Return what a checkpoint and the report say of it."""
        return {
            "strategy": self.strategy.name,
            "num_ranks": self.ranks.num_ranks,
            "compress": self.strategy.compress,
        }


def _lines(settings: Mapping[str, Any], section: str = "") -> Iterator[str]:
    """Yield settings one by one, those of sections by the names of both."""
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _lines(value, f"{section}{name}.")
        else:
            yield f"{section}{name} = {value}"


BEFORE: dict[str, int | str] = {
    "strategy": "one",
    "num_ranks": 1,
    "compress": "reduce",
}
"""What earlier runs, whose checkpoints do not tell, were launched as."""


@contextmanager
def open_launch(
    *,
    asked: str | None,
    device: Decision[torch.device],
    compress: str = "reduce",
) -> Iterator[Launch]:
    """Join the processes of the run for the length of a with-block.

    Args:
        asked: What `--strategy` says.
        device: What `--device` says; of several GPUs each rank takes its own.
        compress: What `--compress` says.

    Raises:
        SettingsError: There are several processes and no strategy, or the reverse.
    """
    ranks = launched()
    if asked is not None and ranks is None:
        raise SettingsError(
            f"--strategy {asked} needs processes that train together; start them by "
            "torchrun --nproc-per-node N -m castwise train ..."
        )
    name: Any = asked or "one"  # checked there
    strategy = Strategy(name=name, ranks=ranks or Ranks(), compress=compress)
    own = _own_device(device, strategy)
    console = Console(quiet=not strategy.ranks.is_first)
    launch = Launch(strategy=strategy, device=own, console=console)
    if strategy.name == "one":
        yield launch
        return
    with joined(strategy.ranks, own.value.type):
        if strategy.ranks.num_ranks > 1:
            flags = [f"--strategy {strategy.name}", f"--compress {strategy.compress}"]
            RollCall.in_group().agree(versions() | {"flags": flags})
        yield launch


def may_restart() -> bool:
    """Whether torchrun was asked to start killed processes again."""
    return os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in {"", "0"}


def _own_device(
    device: Decision[torch.device], strategy: Strategy
) -> Decision[torch.device]:
    if device.value.type != "cuda" or strategy.name == "one":
        return device
    ranks = strategy.ranks
    if ranks.local_rank >= torch.cuda.device_count():
        raise SettingsError(
            f"rank {ranks.rank} needs a GPU of its own, and this machine has "
            f"{torch.cuda.device_count()}; start at most as many processes on it"
        )
    return Decision(
        torch.device("cuda", ranks.local_rank),
        f"{device.because}; local rank {ranks.local_rank}",
    )
