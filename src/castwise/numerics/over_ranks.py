"""Measurements that several processes share: each takes its own, and all know them all.

    found = all_say(lambda: errors(batch), together=True)     # one answer of each rank
    scores = first_says(lambda: score(model), together=True)  # rank 0 works, all know

A validation or a search on one rank sees the rows of that rank. Together they see those
of all, and since every rank knows the same answers, every rank draws the same
conclusion and goes on to the same next step. With `together=False` nothing is sent.

Where one rank cannot answer, all stop: it raises its own error, and the others say
which rank that was, instead of waiting for ever.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import distributed

from castwise.errors import CastwiseError, RanksError, SettingsError

_T = TypeVar("_T")


def all_say(answer: Callable[[], _T], *, together: bool) -> list[_T]:
    """Return the answers of all ranks, in their order; every rank must call.

    Args:
        answer: Gives plain data; may raise a `CastwiseError`.
        together: Whether there are others.

    Raises:
        CastwiseError: What `answer` raised on this rank.
        RanksError: It raised on another one.
    """
    if not together:
        return [answer()]
    own: tuple[bool, Any]
    failure: CastwiseError | None = None
    try:
        own = True, answer()
    except CastwiseError as error:
        own, failure = (False, str(error)), error
    told: list[Any] = [None] * distributed.get_world_size()
    distributed.all_gather_object(told, own)
    if failure is not None:
        raise failure
    for rank, (fine, said) in enumerate(told):
        if not fine:
            raise RanksError(f"rank {rank} could not go on: {said}")
    return [said for _, said in told]


def first_says(answer: Callable[[], _T], *, together: bool) -> _T:
    """Return what rank 0 answers; every rank must call, and only rank 0 works.

    Raises:
        CastwiseError: What `answer` raised, on rank 0.
        RanksError: The same, on the others.
    """
    if not together:
        return answer()
    is_first = distributed.get_rank() == 0
    told = all_say(lambda: answer() if is_first else None, together=True)
    found: Any = told[0]
    return found  # type: ignore[no-any-return]  # that of rank 0 is none of the Nones


def refuse_nobody(what: str, *, together: bool) -> None:
    """Refuse to measure together without a process group.

    Raises:
        SettingsError: There is none.
    """
    if together and not distributed.is_initialized():
        raise SettingsError(
            f"{what} over ranks needs processes that take part; call "
            "torch.distributed.init_process_group first, or leave over_ranks out"
        )
