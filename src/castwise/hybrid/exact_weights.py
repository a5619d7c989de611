"""The weights of a run by name, in fp32, and copies that bring a run back bit by bit.

A prediction moves weights in fp32, whatever the phase computes in: rounded to bf16,
most of it would be lost. Where a weight storage holds 16-bit weights, the fp32 weight
is joined before and taken apart after, one tensor at a time.

A snapshot holds what a prediction could change (weights with what stands beside them,
buffers, random states), and on demand what corrective steps change too (optimizer
states, loss scale). It is plain data, so that a checkpoint can hold it. Where optimizer
states rest elsewhere in predict, the copies of the weights lie there as well.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor, nn

from castwise.errors import PredictionError, SettingsError
from castwise.fitting import is_sharded
from castwise.hybrid.resting_states import RestingStates
from castwise.optim.holding import HeldWeights
from castwise.training.random_state import (
    capture_random_states,
    restore_random_states,
)
from castwise.training.step import Run

Deltas: TypeAlias = dict[str, Tensor]
"""Name of a parameter -> what is to be added to it, in fp32."""

Snapshot: TypeAlias = dict[str, Any]
"""What `ExactWeights.snapshot` returned."""


@final
class ExactWeights:
    """The trained weights of a run.

    Args:
        run: A prepared model and optimizer.
        held: The weight storage in force under the optimizer (default: the run's).
        resting: Where moments may be that a snapshot is to hold (default: they stay).

    Raises:
        SettingsError: The optimizer holds weights that the model does not name.
    """

    def __init__(
        self,
        run: Run,
        held: HeldWeights | None = None,
        resting: RestingStates | None = None,
    ) -> None:
        self._run, self._held = run, held or run.held
        self._resting = resting or RestingStates(run.optimizer, "stay")
        named: dict[Tensor, str] = {
            parameter: name for name, parameter in run.model.named_parameters()
        }
        self._weights: dict[str, Tensor] = {}
        for place, weight in run.parameters().items():
            if weight not in named:
                raise SettingsError(
                    f"the optimizer holds {place}, which is no parameter of the model; "
                    "only named parameters can be predicted"
                )
            if weight.requires_grad:
                self._weights[named[weight]] = weight

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that trains them."""
        return self._run.optimizer

    @property
    def num_elements(self) -> int:
        """Numbers in all weights together."""
        return sum(weight.numel() for weight in self._weights.values())

    def parameters(self) -> dict[str, Tensor]:
        """The parameters themselves, as the model and its optimizer know them."""
        return dict(self._weights)

    def values(self) -> Mapping[str, Tensor]:
        """The weights in fp32 or wider; may alias the parameters, so only to read.

        Each is joined when it is looked up, so that no two stand in memory together.
        """
        return _Looked(self._weights, self.value)

    def value(self, name: str) -> Tensor:
        """One weight in fp32 or wider; may alias the parameter, so only to read."""
        weight = self._weights[name]
        full = None if self._held is None else self._held.full_of(weight)
        return wide(weight.detach()) if full is None else full

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Make this the weight, with every bit that the storage can hold."""
        weight = self._weights[name]
        if self._holds(weight):
            self._held_weights.write_full(weight, value)
        else:
            weight.copy_(value)

    def snapshot(self, *, moments: bool) -> Snapshot:
        """Copy what a rollback needs.

        Args:
            moments: Whether optimizer states and loss scale are copied too.
        """
        run, marked = self._run, self._resting.marked
        return {
            "weights": marked(self._weights),
            "beside": marked(self._beside()),
            "buffers": marked(dict(run.model.named_buffers())),
            "random": capture_random_states(),
            "moments": self._moments() if moments else None,
            "scale": run.loss_scale.state_dict() if moments else None,
        }

    def store(self) -> None:
        """Copy moments and weights to where moments rest; a snapshot marks them."""
        pieces = [
            each for beside in self._beside().values() for each in beside.values()
        ]
        self._resting.store([*self._weights.values(), *pieces])

    def left(self, snapshot: Snapshot, name: str) -> Tensor:
        """One weight of a snapshot, in fp32 or wider; only to read."""
        weight, kept, beside = self._pieces(snapshot, name)
        if not self._holds(weight):
            return wide(kept)
        return self._held_weights.full_from(weight, kept, beside)

    @torch.no_grad()
    def put_back(self, snapshot: Snapshot, name: str) -> None:
        """Make one weight of a snapshot the weight again, bit by bit."""
        weight, kept, beside = self._pieces(snapshot, name)
        if self._holds(weight):
            self._held_weights.put_back(weight, kept, beside)
        else:
            weight.copy_(kept)

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back that the snapshot holds, bit by bit."""
        self._resting.wake()
        for name in self._weights:
            self.put_back(snapshot, name)
        for name, buffer in self._run.model.named_buffers():
            if name in snapshot["buffers"]:
                buffer.copy_(snapshot["buffers"][name])
        if snapshot["moments"] is not None:
            self._restore_moments(snapshot["moments"])
        if snapshot["scale"] is not None:
            self._run.loss_scale.load_state_dict(snapshot["scale"])
        restore_random_states(snapshot["random"])

    def portable(self, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot that holds all of its tensors itself, for a checkpoint."""
        filled: Snapshot = self._resting.filled(snapshot)
        return filled

    @property
    def _held_weights(self) -> HeldWeights:
        assert self._held is not None, "a held weight has a hold"
        return self._held

    def _holds(self, weight: Tensor) -> bool:
        return self._held is not None and self._held.storage_of(weight) is not None

    def _beside(self) -> dict[str, dict[str, Tensor]]:
        """What weight storages keep beside the weights, by name of the weight."""
        if self._held is None:
            return {}
        found = {name: self._held.beside(w) for name, w in self._weights.items()}
        return {name: beside for name, beside in found.items() if beside}

    def _pieces(
        self, snapshot: Snapshot, name: str
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """A parameter, and the copies of its weight and of what stood beside it."""
        weight = self._weights[name]
        kept = self._resting.filled(snapshot["weights"][name])
        beside = self._resting.filled(snapshot["beside"].get(name, {}))
        there = {key: value.to(weight.device) for key, value in beside.items()}
        return weight, kept.to(weight.device), there

    def _moments(self) -> Any:
        """Copy what the optimizer keeps; its rates are the schedule's, not ours."""
        optimizer = self._run.optimizer
        return {
            name: self._resting.marked(dict(optimizer.state[weight]))
            for name, weight in self._weights.items()
            if weight in optimizer.state
        }

    def _restore_moments(self, moments: Any) -> None:
        optimizer = self._run.optimizer
        for name, weight in self._weights.items():
            if name in moments:
                filled = self._resting.filled(moments[name])
                _write_into(optimizer.state[weight], filled)
            else:
                optimizer.state.pop(weight, None)


@final
class _Looked(Mapping[str, Tensor]):
    """A mapping whose values are made when they are looked up."""

    def __init__(self, names: Mapping[str, Any], look: Callable[[str], Tensor]) -> None:
        self._names, self._look = names, look

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._look(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def refuse_sharded(model: nn.Module) -> None:
    """Refuse weights of which each process holds a part (FSDP2).

    Raises:
        PredictionError: Naming the first one.
    """
    for name, weight in model.named_parameters():
        if is_sharded(weight):
            raise PredictionError(
                f"a hybrid run needs whole weights, and fully_shard has cut {name!r} "
                "over processes, so that no process can take it back alone; train in "
                "phases under DistributedDataParallel, or step sharded weights without "
                "phases by castwise.prepare"
            )


def _write_into(state: dict[str, Any], moments: Mapping[str, Any]) -> None:
    """Make a state what it was, in the tensors that it has."""
    for key in state.keys() - moments.keys():
        del state[key]
    for key, value in moments.items():
        if isinstance(value, Tensor) and isinstance(state.get(key), Tensor):
            state[key].copy_(value)
        else:
            state[key] = _copied(value)


def wide(value: Tensor) -> Tensor:
    """Widen 16-bit values to fp32; fp32, fp64 and complex stay as they are."""
    return value.float() if value.dtype in {torch.bfloat16, torch.float16} else value


def _copied(tree: Any) -> Any:
    """Copy a tree of plain data and tensors, so that nothing aliases."""
    if isinstance(tree, Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree
