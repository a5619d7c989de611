"""Optimizer states saved and loaded in their own formats, bit by bit.

`torch.optim.Optimizer.load_state_dict` casts every floating state to the format of its
parameter (pytorch#43706): fp32 moments of a bf16 weight come back as bf16, 8-bit codes
as fractions. Here each state that was cast is put back as it was saved. Tensors that
belong to a parameter but not to the optimizer, such as the remainder of a split weight,
travel in the same state dict, so that any program that saves states saves them too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch.optim import Optimizer

from castwise.optim.storage import STORAGES

Extras: TypeAlias = dict[str, torch.Tensor]


class StateFormats:
    """Hooks on an optimizer's state dict; made by `hold_weights` and our optimizers."""

    def __init__(
        self,
        optimizer: Optimizer,
        extras_of: Callable[[torch.Tensor], Extras] | None = None,
        load_extras: Callable[[torch.Tensor, Extras], None] | None = None,
        check: Callable[[], None] | None = None,
    ) -> None:
        self._extras_of = extras_of
        self._load_extras = load_extras
        self._check = check
        self._loading: list[tuple[torch.Tensor, Mapping[str, Any], Extras]] = []
        self._hooks = (
            optimizer.register_state_dict_post_hook(self._save),
            optimizer.register_load_state_dict_pre_hook(self._before_load),
            optimizer.register_load_state_dict_post_hook(self._after_load),
        )

    def remove(self) -> None:
        """Take the hooks off."""
        for hook in self._hooks:
            hook.remove()

    def _save(self, optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
        """Add the extras of each parameter to its states."""
        if self._extras_of is None:
            return saved
        states = dict(saved["state"])
        for place, parameter in _places(optimizer, saved):
            extras = self._extras_of(parameter)
            if extras:
                states[place] = {**states.get(place, {}), **extras}
        return {**saved, "state": states}

    def _before_load(
        self, optimizer: Optimizer, saved: dict[str, Any]
    ) -> dict[str, Any]:
        """Take the extras out again and remember every state as it was saved."""
        states = dict(saved["state"])
        self._loading = []
        for place, parameter in _places(optimizer, saved):
            state = states.pop(place, {})
            ours = self._load_extras is not None
            extras = {k: v for k, v in state.items() if ours and _is_extra(k)}
            rest = {key: value for key, value in state.items() if key not in extras}
            if rest:
                states[place] = rest
            self._loading.append((parameter, rest, extras))
        return {**saved, "state": states}

    def _after_load(self, optimizer: Optimizer) -> None:
        """Put back what was cast, and hand out the extras."""
        for parameter, saved, extras in self._loading:
            state = optimizer.state.get(parameter, {})
            for key, value in saved.items():
                if key in state:
                    state[key] = _as_saved(state[key], value)
            if self._load_extras is not None and extras:
                self._load_extras(parameter, extras)
        self._loading = []
        if self._check is not None:
            self._check()


def _places(
    optimizer: Optimizer, saved: Mapping[str, Any]
) -> list[tuple[Any, torch.Tensor]]:
    """Pair the places of a state dict with the parameters of the optimizer."""
    names = [name for group in saved["param_groups"] for name in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    return list(zip(names, own, strict=False))  # torch itself refuses a misfit


def _is_extra(key: str) -> bool:
    return any(key.startswith(f"{name}.") for name in STORAGES)


def _as_saved(loaded: Any, saved: Any) -> Any:
    """Return a loaded state with the formats that it was saved in."""
    if isinstance(saved, torch.Tensor) and isinstance(loaded, torch.Tensor):
        if saved.dtype == loaded.dtype:
            return loaded
        return saved.to(loaded.device, copy=True)
    if isinstance(saved, Mapping) and isinstance(loaded, dict):
        return {key: _as_saved(loaded[key], value) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        both = zip(loaded, saved, strict=True)
        return type(saved)(_as_saved(mine, theirs) for mine, theirs in both)
    return loaded
