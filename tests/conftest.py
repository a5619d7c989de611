from __future__ import annotations

from collections.abc import Iterator

import pytest

from two_ranks import TwoRanks


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    """Two processes that talk over gloo; started at the first scene."""
    ranks = TwoRanks()
    yield ranks
    ranks.stop()
