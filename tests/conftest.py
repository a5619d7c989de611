from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from two_ranks import TwoRanks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """Two processes that talk over gloo; started at the first scene."""
    ranks = TwoRanks()
    yield ranks
    ranks.stop()


def switches() -> tuple[bool, ...]:
    """What a test must leave as it was: all of it holds for the whole process."""
    return (
        torch.is_autocast_cache_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


PLACES = ("MASTER_ADDR", "MASTER_PORT", "RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE")
"""Where a process stands among others: Lightning writes it into the environment."""


@pytest.fixture(autouse=True)
def places_stay() -> Iterator[None]:
    """No test leaves a port to the processes that a later one starts: it is taken."""
    before = {name: os.environ.get(name) for name in PLACES}
    yield
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value


@pytest.fixture(autouse=True)
def switches_stay() -> Iterator[None]:
    """No test, and nothing that it tries, leaves a switch of torch thrown."""
    # frozen for good by whatever imports torch's own test helpers
    vars(torch.backends)["__allow_nonbracketed_mutation_flag"] = True
    before = switches()
    yield
    after = switches()
    torch.set_autocast_cache_enabled(before[0])
    assert after == before, "autocast's cache, autocast, gradients, determinism"
