"""A copy of everything that a step changes, and the way back to it, bit by bit.

    weights and buffers     copied into memory that is made once
    moments                 every tensor and number that the optimizer keeps
    scale, counters         the state of the run
    random states           of Python, numpy and torch

A step whose end is bad is as if it had never begun, and may be tried again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch

from castwise.training.random_state import (
    capture_random_states,
    restore_random_states,
)
from castwise.training.step import Run


@final
class Rollback:
    """The state of a run before a step.

    Args:
        run: What is copied.
    """

    def __init__(self, run: Run) -> None:
        self._run = run
        self._copies: dict[str, torch.Tensor] = {}
        self._moments: Any = None
        self._groups: list[dict[str, Any]] = []
        self._state: dict[str, Any] = {}
        self._random: dict[str, Any] = {}

    @torch.no_grad()
    def keep(self) -> None:
        """Copy the state as it is now."""
        run = self._run
        for name, tensor in self._tensors():
            held = self._copies.get(name)
            if held is None or held.dtype is not tensor.dtype:
                self._copies[name] = tensor.detach().clone()
            else:
                held.copy_(tensor)
        if run.held is None:
            self._moments = {
                weight: _updated(self._kept(weight), run.optimizer.state[weight])
                for weight in self._weights()
                if weight in run.optimizer.state
            }
        else:  # a part of each weight stands in the state
            self._moments = _copied(run.optimizer.state_dict()["state"])
        self._groups = [
            {name: value for name, value in group.items() if name != "params"}
            for group in run.optimizer.param_groups
        ]
        self._state = run.state_dict()
        self._random = capture_random_states()

    @torch.no_grad()
    def restore(self) -> None:
        """Make everything what it was when it was kept."""
        run = self._run
        for name, tensor in self._tensors():
            if name in self._copies:
                tensor.copy_(self._copies[name])
        self._restore_moments()
        for group, values in zip(run.optimizer.param_groups, self._groups, strict=True):
            group.update(values)
        changes = run.state_dict()["changes"]  # no step makes them
        run.load_state_dict({**self._state, "changes": changes})
        restore_random_states(self._random)

    def _tensors(self) -> Iterable[tuple[str, torch.Tensor]]:
        yield from self._run.parameters().items()
        model = self._run.model
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            yield f"model.{name}", tensor

    def _weights(self) -> Iterable[torch.Tensor]:
        return self._run.parameters().values()

    def _kept(self, weight: torch.Tensor) -> dict[str, Any]:
        return dict(self._moments.get(weight, {})) if self._moments else {}

    def _restore_moments(self) -> None:
        optimizer = self._run.optimizer
        if self._run.held is not None:
            groups = optimizer.state_dict()["param_groups"]
            state = {"state": _copied(self._moments), "param_groups": groups}
            optimizer.load_state_dict(state)
            return
        for weight in self._weights():
            if weight in self._moments:
                state = _updated(optimizer.state[weight], self._moments[weight])
                optimizer.state[weight] = state
            else:
                optimizer.state.pop(weight, None)


def _updated(target: dict[str, Any], source: Mapping[str, Any]) -> dict[str, Any]:
    """Make one state equal to another, in the tensors that it has."""
    for key in target.keys() - source.keys():
        del target[key]
    for key, value in source.items():
        own = target.get(key)
        if (
            isinstance(value, torch.Tensor)
            and isinstance(own, torch.Tensor)
            and own.shape == value.shape
            and own.dtype is value.dtype
        ):
            own.copy_(value)
        else:
            target[key] = _copied(value)
    return target


def _copied(tree: Any) -> Any:
    """Copy a tree of plain data and tensors, so that nothing aliases."""
    if isinstance(tree, torch.Tensor):
        return tree.detach().clone()
    if isinstance(tree, dict):
        return {key: _copied(value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(_copied(value) for value in tree)
    return tree
