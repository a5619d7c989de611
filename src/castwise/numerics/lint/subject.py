"""What a lint looks at: a model with its policy on it, and what trains it.

The policy has been applied, so the formats of weights and buffers are the real ones.
What the buffers were before stands beside them, because rounding cannot be undone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from castwise.dtypes import DTYPES
from castwise.formats import FORMATS, Format
from castwise.islands import AppliedPolicy
from castwise.islands.facts import join
from castwise.islands.swap import own_class

LOW = ("bf16", "fp16")
"""The formats that a lint warns of."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_CAPACITIES = (
    "max_position_embeddings",
    "max_seq_len_cached",
    "max_seq_len",
    "max_length",
    "n_positions",
    "block_size",
)
_USUAL_CAPACITY = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Subject:
    """Everything that the checks may ask."""

    model: nn.Module
    """The model, with the policy on it."""

    applied: AppliedPolicy
    """The policy."""

    before: Mapping[str, torch.Tensor]
    """Name of a buffer -> what it was before the policy came."""

    optimizer: torch.optim.Optimizer | None
    """What updates the weights."""

    gradients: Mapping[str, torch.Tensor]
    """Name of a parameter -> its gradient of one batch, where one was taken."""

    loss_fn: Callable[[Any, Any], torch.Tensor] | None
    """The loss, where it was given."""

    def compute_of(self, fqn: str) -> str:
        """The format that a module computes in."""
        place = f".{fqn}".partition(".parametrizations")[0].removeprefix(".")
        precision = self.applied.bound.precision_of(place, phase=self.applied.phase)
        assert precision.compute is not None
        return precision.compute

    @property
    def around(self) -> str:
        """The format in which operators outside of islands run."""
        policy = self.applied.bound.policy
        compute = policy.base_precision(phase=self.applied.phase).compute
        assert compute is not None
        return compute

    def modules(self) -> Iterator[tuple[str, nn.Module, type]]:
        """Yield each module once with its name and its own class."""
        for fqn, module in self.model.named_modules():
            yield fqn, module, own_class(module)

    def tables(self) -> Iterator[tuple[str, nn.Module, torch.Tensor, torch.Tensor]]:
        """Yield floating buffers and plain tensors of modules.

        Each with its name, its module, what it was and what it is now.
        """
        for fqn, module, _ in self.modules():
            held = dict(module._buffers)  # noqa: SLF001 -- its own, by name
            plain = {
                name: value
                for name, value in vars(module).items()
                if isinstance(value, torch.Tensor)
            }
            for name, value in (held | plain).items():
                if value is not None and value.is_floating_point():
                    place = join(fqn, name)
                    yield place, module, self.before.get(place, value), value

    def capacity(self, module: nn.Module) -> int:
        """How many positions a module is made for; 4096 where nothing says it."""
        root = self.model
        owners = (
            module,
            getattr(module, "config", None),
            getattr(root, "config", None),
        )
        for owner in owners:
            for name in _CAPACITIES:
                found = getattr(owner, name, None)
                if isinstance(found, int) and found > 0:
                    return found
        return _USUAL_CAPACITY

    def weights(self) -> Iterator[tuple[str, torch.Tensor, dict[str, Any]]]:
        """Yield the optimizer's parameters with their names and groups."""
        if self.optimizer is None:
            return
        names = {id(weight): name for name, weight in self.model.named_parameters()}
        for group in self.optimizer.param_groups:
            for at, weight in enumerate(group["params"]):
                yield names.get(id(weight), f"param_groups[...][{at}]"), weight, group

    def is_kept(self, weight: str) -> bool:
        """Whether the policy stores more of a weight than its 16 bits."""
        place = weight.rpartition(".")[0]
        place = f".{place}".partition(".parametrizations")[0].removeprefix(".")
        bound = self.applied.bound
        known = place in bound.governing
        return known and bound.storage_of(place).value not in {None, "plain"}

    @property
    def is_held(self) -> bool:
        """Whether a weight storage keeps what 16 bits cannot hold."""
        return hasattr(getattr(self.optimizer, "step", None), "held_by_castwise")


def low_format(tensor: torch.Tensor) -> Format | None:
    """The format of a tensor if it has 16 bits, else none."""
    name = _NAMES.get(tensor.dtype)
    return FORMATS[name] if name in LOW else None


def format_name(tensor: torch.Tensor) -> str:
    """How the format of a tensor is spelled."""
    return _NAMES.get(tensor.dtype, str(tensor.dtype).removeprefix("torch."))
