"""The weights of a run by name, in fp32, and copies that bring a run back bit by bit.

A prediction moves weights in fp32, whatever the phase computes in: rounded to bf16,
most of it would be lost. Where a weight storage holds 16-bit weights, the fp32 weight
is joined before and taken apart after.

A snapshot holds what a prediction could change (weights, buffers, random states), and
on demand what corrective steps change too (optimizer states, loss scale). It is plain
data, so that a checkpoint can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from castwise.errors import SettingsError
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

    def values(self) -> dict[str, Tensor]:
        """The weights in fp32 or wider; may alias the parameters, so only to read."""
        joined = {} if self._held is None else self._held.fp32_weights(self._run.model)
        return {
            name: wide(joined.get(name, weight).detach())
            for name, weight in self._weights.items()
        }

    @torch.no_grad()
    def write(self, values: Mapping[str, Tensor]) -> None:
        """Make these the weights, with every bit that the storage can hold."""
        if self._held is None:
            for name, weight in self._weights.items():
                weight.copy_(values[name])
            return
        names = {weight: name for name, weight in self._weights.items()}
        model = self._run.model
        tree = {
            place: values[names[tensor]] if tensor in names else tensor.detach()
            for place, tensor in model.state_dict(keep_vars=True).items()
        }
        self._held.load_fp32_weights(model, tree)

    def snapshot(self, *, moments: bool) -> Snapshot:
        """Copy what a rollback needs.

        Args:
            moments: Whether optimizer states and loss scale are copied too. A weight
                storage keeps part of each weight there, so then they always are.
        """
        model = self._run.model
        return {
            "weights": {name: w.detach().clone() for name, w in self._weights.items()},
            "buffers": {name: b.detach().clone() for name, b in model.named_buffers()},
            "random": capture_random_states(),
            "moments": self._moments() if moments or self._held is not None else None,
            "scale": self._run.loss_scale.state_dict() if moments else None,
        }

    def exact_start(self, snapshot: Snapshot) -> dict[str, Tensor]:
        """The weights of a snapshot that was just taken, in fp32; only to read."""
        if self._held is not None:
            return {name: value.clone() for name, value in self.values().items()}
        return {name: wide(weight) for name, weight in snapshot["weights"].items()}

    @torch.no_grad()
    def restore(self, snapshot: Snapshot) -> None:
        """Put everything back that the snapshot holds, bit by bit."""
        self._resting.wake()
        for name, weight in self._weights.items():
            weight.copy_(snapshot["weights"][name])
        for name, buffer in self._run.model.named_buffers():
            if name in snapshot["buffers"]:
                buffer.copy_(snapshot["buffers"][name])
        if snapshot["moments"] is not None:
            self._restore_moments(self._resting.filled(snapshot["moments"]))
        if snapshot["scale"] is not None:
            self._run.loss_scale.load_state_dict(snapshot["scale"])
        restore_random_states(snapshot["random"])

    def portable(self, snapshot: Snapshot) -> Snapshot:
        """Return a snapshot that holds all of its tensors itself, for a checkpoint."""
        return {**snapshot, "moments": self._resting.filled(snapshot["moments"])}

    def _moments(self) -> Any:
        """Copy what the optimizer keeps; its rates are the schedule's, not ours."""
        optimizer = self._run.optimizer
        if self._held is not None:
            return self._resting.marked(optimizer.state_dict()["state"])
        return {
            name: self._resting.marked(dict(optimizer.state[weight]))
            for name, weight in self._weights.items()
            if weight in optimizer.state
        }

    def _restore_moments(self, moments: Any) -> None:
        optimizer = self._run.optimizer
        if self._held is not None:
            groups = optimizer.state_dict()["param_groups"]
            state = {"state": _copied(moments), "param_groups": groups}
            optimizer.load_state_dict(state)
            return
        for name, weight in self._weights.items():
            if name in moments:
                _write_into(optimizer.state[weight], moments[name])
            else:
                optimizer.state.pop(weight, None)


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
