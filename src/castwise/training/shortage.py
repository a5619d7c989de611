"""A step that ran out of memory: who held what, and the three cheapest ways out.

PyTorch tells how many bytes it asked for last, which is rarely where the memory went.
When a step dies of it, what stands between steps is counted to the byte (weights,
gradients, optimizer states, what stands beside weights in 16 bits); the rest is the
step's own: activations, casts and what operators work with. Remedies are those that are
not in force yet, by what they cost in time and, at the same cost, by what they save.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch.utils import _pytree as pytree

from castwise.errors import MemoryShortageError
from castwise.memory.recompute import is_recomputed
from castwise.memory.saves import is_stored

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from castwise.training.step import Run

_CPU_MESSAGE = "can't allocate memory: you tried to allocate"
_ASKED = re.compile(r"[Tt]ried to allocate (\d+(?:\.\d+)?) ?(bytes|[KMGT]iB)?")
_UNITS = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_NUM_REMEDIES = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Remedy:
    """One way out."""

    what: str
    """What to write, and what it does."""

    saves_bytes: int
    """About so much, of what is known to stand there."""

    saves_share: float
    """About this share of the step's own memory."""

    cost: float
    """About this share of a step's time."""


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an exception says that an allocator has nothing left."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _CPU_MESSAGE in str(error)


def shortage(error: BaseException, run: Run) -> MemoryShortageError:
    """Return the error that explains an allocator's error to a person."""
    standing = _standing(run)
    table = ", ".join(f"{name} {_shown(size)}" for name, size in standing.items())
    asked = _asked(error)
    held = ""
    if run.device.type == "cuda":
        own = torch.cuda.memory_allocated(run.device) - sum(standing.values())
        held = f", activations and casts of the step {_shown(max(0, own))}"
    remedies = "; ".join(
        f"({number}) {remedy.what}"
        for number, remedy in enumerate(_cheapest(run, standing), 1)
    )
    return MemoryShortageError(
        f"the step needs more memory than {run.device} has: it asked for "
        f"{asked} more beside {table}{held}; the cheapest remedies are {remedies}"
    )


def _standing(run: Run) -> dict[str, int]:
    """Bytes that stand there between steps, and the gradients at their end."""
    weights = list(run.model.parameters())
    trained = [weight for weight in weights if weight.requires_grad]
    states = _storage_bytes(run.optimizer.state.values())
    found = {
        "weights": _storage_bytes(weights),
        "buffers": _storage_bytes(run.model.buffers()),
        "gradients": sum(weight.nbytes for weight in trained),
        "optimizer states": states,
    }
    return {name: size for name, size in found.items() if size}


def _cheapest(run: Run, standing: Mapping[str, int]) -> list[Remedy]:
    remedies = [
        Remedy(
            what="call step.backward twice with half a batch each: half of the "
            "activations, about the same time, the same gradients",
            saves_bytes=0,
            saves_share=0.5,
            cost=0.02,
        )
    ]
    states = standing.get("optimizer states", 2 * standing.get("gradients", 0))
    wide = _wide_bytes(run.optimizer.state.values()) or states
    if wide > standing.get("weights", 0) / 2:
        remedies.append(
            Remedy(
                what="optimizer states in 8 bits, castwise.optim.AdamW with "
                f"SweepSettings(states='8bit'): {_shown(wide * 3 // 4)} less, about "
                "the same time",
                saves_bytes=wide * 3 // 4,
                saves_share=0.0,
                cost=0.03,
            )
        )
    if not any(is_stored(module) for module in run.model.modules()):
        remedies.append(
            Remedy(
                what="castwise.store_saves(model, 'fp16'): up to half of the "
                "activations in fp32, some 5 % of the time, gradients within 3e-4",
                saves_bytes=0,
                saves_share=0.3,
                cost=0.05,
            )
        )
    if not any(is_recomputed(module) for module in run.model.modules()):
        remedies.append(
            Remedy(
                what="castwise.recompute(model): the activations of one block at a "
                "time, up to a third more time, the same gradients bit by bit",
                saves_bytes=0,
                saves_share=0.7,
                cost=0.3,
            )
        )
    remedies.append(
        Remedy(
            what="castwise fit: the largest batch that a number of bytes holds",
            saves_bytes=0,
            saves_share=0.0,
            cost=0.5,
        )
    )
    remedies.sort(key=lambda remedy: (remedy.cost, -remedy.saves_bytes))
    return remedies[:_NUM_REMEDIES]


def _asked(error: BaseException) -> str:
    """What the allocator was asked for last."""
    found = _ASKED.search(str(error))
    if found is None:
        return "memory"
    size = float(found[1]) * _UNITS.get(found[2] or "", 1)
    return _shown(int(size))


def _storage_bytes(values: Iterable[object]) -> int:
    """Bytes of the storages of all tensors within some values, each once."""
    found = {}
    for leaf in pytree.tree_leaves(list(values)):
        if isinstance(leaf, torch.Tensor):
            local = getattr(leaf, "_local_tensor", leaf)
            storage = local.untyped_storage()
            found[storage._cdata] = storage.nbytes()  # noqa: SLF001 -- no public name
    return sum(found.values())


def _wide_bytes(values: Iterable[object]) -> int:
    """Those of tensors in fp32."""
    leaves = pytree.tree_leaves(list(values))
    return _storage_bytes(
        leaf
        for leaf in leaves
        if isinstance(leaf, torch.Tensor) and leaf.dtype is torch.float32
    )


def _shown(num_bytes: int) -> str:
    for unit, size in reversed(_UNITS.items()):
        if num_bytes >= size:
            return f"{num_bytes / size:,.1f} {unit}"
    return f"{num_bytes} bytes"
