"""Operators that carry weights and gradients between processes, and compute nothing.

FSDP2 gathers weights and sums gradients from its hooks, often those of another module
than the one that the rows belong to, and earlier than they are needed. The formats that
they travel in are settled when the model is sharded; a contract is about operators that
the model runs, so it passes over these. Casts of inputs and outputs by FSDP2 are no
transport, and are judged.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from types import FrameType

_FSDP = Path(torch.__file__).parent / "distributed" / "fsdp" / "_fully_shard"
_CARRIERS = {
    *(
        str(_FSDP / f"_fsdp_{name}.py")
        for name in ("collectives", "param", "param_group")
    ),
    *(
        str(Path(__file__).parents[2] / "distributed" / f"{name}.py")
        for name in ("replication", "low_rank")
    ),
}


def is_transport() -> bool:
    """Whether the running operator was called to carry weights or gradients."""
    if "torch.distributed.fsdp" not in sys.modules:
        return False
    frame: FrameType | None
    frame = sys._getframe(1)  # noqa: SLF001 -- the public way is slower by a hundred times
    while frame is not None:
        if frame.f_code.co_filename in _CARRIERS:
            return True
        frame = frame.f_back
    return False
