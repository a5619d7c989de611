"""A strategy refuses what it cannot do."""

from __future__ import annotations

import pytest

from castwise.distributed.ranks import Ranks
from castwise.errors import SettingsError
from castwise.training.strategy import Strategy


@pytest.mark.parametrize("name", ["one", "fsdp"])
def test_gradients_are_made_smaller_under_ddp_alone(name: str) -> None:
    """FSDP2 has no hook, one process sends nothing, and a wrong word is told."""
    ranks = Ranks(rank=0, num_ranks=1 if name == "one" else 2)
    with pytest.raises(SettingsError, match="give it with --strategy ddp"):
        Strategy(name=name, ranks=ranks, compress="bf16")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="did you mean powersgd"):
        Strategy(name="ddp", ranks=ranks, compress="powersdg")
    assert Strategy(name="ddp", ranks=ranks, compress="powersgd:rank=2").name == "ddp"
    assert Strategy(ranks=Ranks(), compress="reduce").name == "one"
