"""A roll call before training: is every rank there, and do all mean the same run?

    call = RollCall.by_environment(timeout=60)     # torchrun's variables
    call.meet()                                    # or: rank 2 of 4 is missing
    distributed.init_process_group("gloo", store=call.store, rank=call.rank, ...)
    ...
    call.agree(credentials(model, policy, settings={"batch_size": 64}))

Ranks that differ do not fail: they hang, since one waits for a message that another
never sends, or they train to the end with one half of them in another precision. So
everything that decides what is computed goes round once, through the key-value store
that process groups are built from, which needs no message of tensors and no luck:
versions, the policy line by line, the names, shapes and formats of weights and buffers,
and whatever else is given.

All ranks stop together. Rank 0 says why, or the first rank that is there; the others
say where to look. No wait is longer than the timeout.
"""

from __future__ import annotations

import itertools
import json
import os
import platform
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import distributed
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore
from torch.distributed import DistNetworkError, DistStoreError, distributed_c10d

from castwise.errors import RanksError, SettingsError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import nn

    from castwise.policy.rules import Policy

TIMEOUT = 300.0
"""Seconds; as long as a machine may need to load a model that others have loaded."""

_CALLS = itertools.count()  # each call in a group has keys of its own
_FAREWELL = 10.0  # seconds at most that the host of the store waits for the others

_Credentials = dict[str, list[str]]


@dataclass(frozen=True, kw_only=True, slots=True)
class RollCall:
    """The place where ranks meet before they can talk."""

    store: Store
    """Keys and values that all ranks see."""

    rank: int
    """Which of them this is."""

    num_ranks: int
    """How many there must be."""

    timeout: float = TIMEOUT
    """Seconds that the others are waited for."""

    _turns: Iterator[int] = field(
        default_factory=itertools.count, init=False, repr=False, compare=False
    )
    """Each exchange has keys of its own."""

    def __post_init__(self) -> None:
        """Refuse ranks and times that cannot be."""
        if not 0 <= self.rank < self.num_ranks:
            raise SettingsError(
                f"a roll call needs 0 <= rank < num_ranks; got rank {self.rank} of "
                f"{self.num_ranks}"
            )
        if not self.timeout > 0:
            raise SettingsError(f"a roll call needs a timeout > 0; got {self.timeout}")

    @classmethod
    def by_environment(cls, *, timeout: float = TIMEOUT) -> Self:
        """Meet where RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say.

        Raises:
            RanksError: Nobody answers there.
            SettingsError: One of them is not set.
        """
        names = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        missing = [name for name in names if not os.environ.get(name)]
        if missing:
            raise SettingsError(
                f"ranks meet where {', '.join(names)} say, and {', '.join(missing)} is "
                "not set; start the run by torchrun"
            )
        rank, num_ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = TCPStore(
                host,
                port,
                is_master=rank == 0 and not hosted,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,  # it would not say who is missing
                multi_tenant=True,
            )
        except (DistNetworkError, DistStoreError) as error:
            raise RanksError(
                f"rank {rank} of {num_ranks} needs somebody to answer at {host}:{port} "
                f"within {timeout:g} s, and nobody does; see why rank 0 is not there"
            ) from error
        return cls(store=store, rank=rank, num_ranks=num_ranks, timeout=timeout)

    @classmethod
    def in_group(cls, *, timeout: float = TIMEOUT) -> Self:
        """Meet where the ranks of the process group have met already."""
        store = distributed_c10d._get_default_store()  # noqa: SLF001 -- nobody else keeps it
        return cls(
            store=PrefixStore(f"roll_call/{next(_CALLS)}", store),
            rank=distributed.get_rank(),
            num_ranks=distributed.get_world_size(),
            timeout=timeout,
        )

    def meet(self) -> None:
        """Wait until every rank is there.

        Raises:
            RanksError: One is missing when the time is over.
        """
        self._exchange("here")

    def agree(self, own: Mapping[str, Sequence[str]]) -> None:
        """Stop all ranks unless all give the same credentials.

        Raises:
            RanksError: A rank differs, or is missing.
        """
        told = self._exchange(json.dumps({key: list(own[key]) for key in own}))
        difference = first_difference([json.loads(each) for each in told])
        if difference is not None:
            raise RanksError(self._said_once(difference))

    def _exchange(self, own: str) -> list[str]:
        """Say something, and hear what every rank said."""
        turn = next(self._turns)
        keys = [f"castwise/{turn}/{rank}" for rank in range(self.num_ranks)]
        deadline = time.monotonic() + self.timeout
        self.store.set(keys[self.rank], own)
        missing = [
            rank for rank, key in enumerate(keys) if not self._has(key, deadline)
        ]
        if missing:
            self._leave(turn, self.num_ranks - len(missing))
            raise RanksError(self._told_missing(missing))
        told = [self.store.get(key).decode() for key in keys]
        self._leave(turn, self.num_ranks)
        return told

    def _has(self, key: str, deadline: float) -> bool:
        """Whether somebody says it in time; asked for at least a moment."""
        left = max(0.05, deadline - time.monotonic())
        try:
            self.store.wait([key], timedelta(seconds=left))
        except DistStoreError:
            return False
        except DistNetworkError as error:
            raise RanksError(
                "the process that hosted the roll call is gone, which is mostly rank "
                "0; see why it ended"
            ) from error
        return True

    def _leave(self, turn: int, num_present: int) -> None:
        """Let the host of the store go last, so that everybody has read."""
        key = f"castwise/{turn}/read"
        count = self.store.add(key, 1)
        until = time.monotonic() + _FAREWELL
        while self.rank == 0 and count < num_present and time.monotonic() < until:
            time.sleep(0.005)
            count = self.store.add(key, 0)

    def _told_missing(self, missing: Sequence[int]) -> str:
        speaker = min({*range(self.num_ranks)} - {*missing})
        if self.rank != speaker:
            return f"rank {speaker} says which ranks are missing; this rank stops too"
        who = ", ".join(map(str, missing))
        ranks = f"rank {who} is" if len(missing) == 1 else f"ranks {who} are"
        return (
            f"{self.num_ranks} ranks must be there within {self.timeout:g} s and "
            f"{ranks} missing; see how they ended, or start fewer"
        )

    def _said_once(self, what: str) -> str:
        if self.rank == 0:
            return what
        return "rank 0 says in what the ranks differ; this rank stops too"


def credentials(
    model: nn.Module, policy: Policy, *, settings: Mapping[str, Any] | None = None
) -> _Credentials:
    """Return everything that all ranks must have alike, as lines of text.

    Args:
        model: Whole or sharded; what is compared are names, whole shapes and formats.
        policy: What runs in which format; its name does not count.
        settings: More that must be the same, such as the size of the global batch.
    """
    return {
        **versions(),
        "policy": replace(policy, name="compared").to_yaml().splitlines(),
        "settings": [f"{key} = {value}" for key, value in (settings or {}).items()],
        "weights": [_line(*each) for each in model.named_parameters()],
        "buffers": [_line(*each) for each in model.named_buffers()],
    }


def versions() -> _Credentials:
    """Return what can be compared before there is a model or a policy."""
    from castwise import __version__  # noqa: PLC0415 -- the package itself, not a room

    return {
        "versions": [
            f"castwise {__version__}",
            f"torch {torch.__version__}",
            f"python {platform.python_version()}",
        ]
    }


def first_difference(told: Sequence[_Credentials]) -> str | None:
    """Say which rank differs from most others, and in which line; None if none does.

    Where no more ranks have one thing than another, those that have what the lowest
    rank has are right.
    """
    for key in told[0]:
        said = [tuple(each.get(key, ())) for each in told]
        if len(set(said)) == 1:
            continue
        usual = Counter(said).most_common(1)[0][0]  # of equals, the first rank's
        rank = next(at for at, each in enumerate(said) if each != usual)
        other = said.index(usual)
        pairs = itertools.zip_longest(said[rank], usual, fillvalue="nothing")
        mine, theirs = next(pair for pair in pairs if pair[0] != pair[1])
        others = sum(each != usual for each in said) - 1
        more = f" ({others} more differ)" if others else ""
        return (
            f"rank {rank} and rank {other} must have the same {key}: rank {rank} has "
            f"{mine.strip()!r} where rank {other} has {theirs.strip()!r}{more}; start "
            "all ranks from the same files with the same flags"
        )
    return None


def _line(name: str, tensor: torch.Tensor) -> str:
    return f"{name} {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
