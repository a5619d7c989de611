"""The processes that `torchrun` started, as one of them knows itself.

    with joined(launched(), "cpu") as ranks:       # the process group, for this long
        folder = from_first(ranks, make_folder)    # one makes it, all know it
        rows = batch[ranks.part(len(batch))]       # each its own, none left over

Whoever was started alone is `ALONE`: rank 0 of one, without a process group. What is
written, printed or asked of a person is done by rank 0.
"""

from __future__ import annotations

import hashlib
import os
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError, DistStoreError

from castwise.distributed.roll_call import TIMEOUT, RollCall
from castwise.errors import CastwiseError, RanksError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_T = TypeVar("_T")
_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_PATIENCE = "CASTWISE_MEET_SECONDS"
USER_ERROR = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """One process among those of a run."""

    rank: int = 0
    """Which of them this is."""

    num_ranks: int = 1
    """How many there are."""

    local_rank: int = 0
    """Which of those on this machine; it chooses the GPU."""

    num_restarts: int = 0
    """How often `torchrun` has started all of them anew."""

    def __post_init__(self) -> None:
        """Refuse a rank that is none.

        Raises:
            SettingsError: If it lies outside 0..num_ranks-1.
        """
        if not 0 <= self.rank < self.num_ranks:
            raise SettingsError(
                f"a rank of {self.num_ranks} processes needs to lie in "
                f"0..{self.num_ranks - 1}, got {self.rank}; leave the environment "
                "variables RANK and WORLD_SIZE to torchrun"
            )

    @property
    def is_first(self) -> bool:
        """Whether this process speaks for all."""
        return self.rank == 0

    def part(self, num_rows: int) -> slice:
        """Return this process's rows of a batch.

        The parts follow one another, cover the batch and do not overlap; sizes differ
        by one row at most, the larger ones first.
        """
        size, rest = divmod(num_rows, self.num_ranks)
        begin = self.rank * size + min(self.rank, rest)
        return slice(begin, begin + size + (self.rank < rest))


ALONE = Ranks()
"""A process without others."""


def launched() -> Ranks | None:
    """Read from the environment what `torchrun` says; None if nobody says anything.

    Raises:
        SettingsError: A part of it is missing, or is no number.
    """
    found = {name: os.environ.get(name) for name in _NAMES}
    if found["RANK"] is None and found["WORLD_SIZE"] is None:
        return None
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise SettingsError(
            f"processes of one run need {', '.join(missing)} in their environment; "
            "start them by torchrun --nproc-per-node N"
        )
    try:
        return Ranks(
            rank=int(found["RANK"] or 0),
            num_ranks=int(found["WORLD_SIZE"] or 1),
            local_rank=int(found["LOCAL_RANK"] or 0),
            num_restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    except ValueError as error:
        raise SettingsError(
            f"RANK, WORLD_SIZE and LOCAL_RANK need whole numbers, got {found}; leave "
            "them to torchrun"
        ) from error


@contextmanager
def joined(ranks: Ranks, device_type: str) -> Iterator[Ranks]:
    """Hold the process group of a run for the length of a with-block.

    On a GPU there is a backend for each kind of device, so that what all must agree on
    goes round in host memory, and nobody waits for the GPU because of it.

    Args:
        ranks: What `launched` found.
        device_type: Where weights and gradients are.

    Raises:
        RanksError: A rank is missing, or nobody answers where they meet.
    """
    if device_type == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
    store = _store(ranks)
    RollCall(
        store=PrefixStore("meet", store),
        rank=ranks.rank,
        num_ranks=ranks.num_ranks,
        timeout=_seconds(),
    ).meet()
    distributed.init_process_group(
        backend,
        store=store,
        rank=ranks.rank,
        world_size=ranks.num_ranks,
    )
    try:
        yield ranks
    finally:
        distributed.destroy_process_group()


def _store(ranks: Ranks) -> Store:
    """Return where the processes find each other, apart from those of former starts.

    A torchrun that starts killed processes again lets them meet in the store of those
    killed (torch 2.13), where the addresses of these still stand: whoever reads one too
    early waits for a process that is gone.
    """
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        store = TCPStore(
            host,
            port,
            is_master=ranks.is_first and not is_agents,
            timeout=timedelta(seconds=_seconds()),
            wait_for_workers=False,  # it would not say who is missing
        )
    except (DistNetworkError, DistStoreError) as error:
        raise RanksError(
            f"rank {ranks.rank} of {ranks.num_ranks} needs somebody to answer at "
            f"{host}:{port} within {_seconds():g} s, and nobody does; see why rank 0 "
            "is not there"
        ) from error
    store.set_timeout(timedelta(seconds=TIMEOUT))
    return PrefixStore(f"castwise/{ranks.num_restarts}", store)


def _seconds() -> float:
    """How long the ranks wait for each other before they begin."""
    asked = os.environ.get(_PATIENCE, "")
    try:
        return float(asked) if asked else TIMEOUT
    except ValueError as error:
        raise SettingsError(
            f"{_PATIENCE} needs a number of seconds, got {asked!r}"
        ) from error


def from_first(ranks: Ranks, make: Callable[[], _T]) -> _T:
    """Let rank 0 make something, and return it on every rank.

    Where rank 0 refuses, it raises its error and says why; the others end without
    another word, with the same exit code.

    Args:
        ranks: The processes; all must call.
        make: Returns plain data.

    Raises:
        CastwiseError: What `make` raised, on rank 0.
        SystemExit: On the others, if it did.
    """
    if ranks.num_ranks == 1:
        return make()
    told: list[Any] = [None]
    refusal: CastwiseError | None = None
    if ranks.is_first:
        try:
            told = [("made", make())]
        except CastwiseError as error:
            refusal, told = error, [("refused", None)]
    distributed.broadcast_object_list(told, src=0)
    if refusal is not None:
        raise refusal
    what, made = told[0]
    if what == "refused":
        raise SystemExit(USER_ERROR)
    found: _T = made
    return found


def somebody_said(sentence: str) -> bool:
    """Whether another process of this run has said a sentence before.

    What every process refuses alike shall be read once, and what only one refuses shall
    be read too. They ask the store of torchrun, which outlives each of them; where it
    does not answer at once, nobody is known to have said anything.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return False
    digest = hashlib.sha256(sentence.encode()).hexdigest()
    restart = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    try:
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            timeout=timedelta(seconds=5),
        )
        return store.add(f"castwise/said/{restart}/{digest}", 1) > 1
    except (
        KeyError,
        ValueError,
        RuntimeError,
    ):  # the errors of stores are RuntimeErrors
        return False


def first_before_others(ranks: Ranks, make: Callable[[], _T]) -> _T:
    """Let rank 0 make something that it caches on disk, then the others find it there.

    Raises:
        CastwiseError: What `make` raised.
        SystemExit: On the other ranks, if it raised on rank 0.
    """
    if ranks.num_ranks == 1:
        return make()
    made: list[_T] = []
    from_first(ranks, lambda: made.append(make()))
    return made[0] if made else make()
