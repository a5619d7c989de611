"""Optimizer states as the rest of the world keeps them: fp32, under torch's names.

    torch.save(plain_state_dict(optimizer), path)       # stock torch loads it
    load_plain_state_dict(optimizer, torch.load(path))  # and back

What stands beside held weights is left out (it is in the fp32 weights: see
`HeldWeights.fp32_weights`), states in 8 bits are decoded, and counts of steps are the
fp32 tensors that torch makes. On the way back, states are coded again where the
optimizer keeps them in 8 bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

from castwise.errors import WeightStorageError
from castwise.optim.shards import is_sharded, local, sharded_like
from castwise.optim.states import CODES, num_blocks
from castwise.optim.storage import STORAGES
from castwise.optim.sweep import SweepOptimizer


def plain_state_dict(optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer's state dict without anything that is castwise's own.

    Args:
        optimizer: Any; held or not, ours or torch's.
    """
    saved = optimizer.state_dict()
    return {
        "state": {place: _plain(state) for place, state in saved["state"].items()},
        "param_groups": [dict(group) for group in saved["param_groups"]],
    }


def load_plain_state_dict(optimizer: Optimizer, saved: Mapping[str, Any]) -> None:
    """Load what `plain_state_dict` or a stock torch optimizer returned.

    Held weights stay what they are; load them with `HeldWeights.load_fp32_weights`.

    Raises:
        WeightStorageError: A state is missing that the optimizer needs.
    """
    names = [name for group in saved["param_groups"] for name in group["params"]]
    own = [p for group in optimizer.param_groups for p in group["params"]]
    groups = [group for group in optimizer.param_groups for _ in group["params"]]
    states = {}
    for name, parameter, group in zip(names, own, groups, strict=False):
        state = dict(saved["state"].get(name, {}))
        if isinstance(optimizer, SweepOptimizer):
            state = _coded(optimizer, parameter, group, state)
        states[name] = state
    kept = {key: value for key, value in states.items() if value}
    optimizer.load_state_dict({**saved, "state": kept})


def _plain(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return one parameter's states in fp32."""
    plain: dict[str, Any] = {}
    for key, value in state.items():
        code = next((code for code in CODES if key.endswith(f"_{code}")), None)
        if code is not None or any(key.startswith(f"{name}.") for name in STORAGES):
            continue
        plain[key] = value
        for code in CODES:
            if f"{key}_{code}" in state:
                plain[key] = _decoded(code, value, state[f"{key}_{code}"])
    if isinstance(plain.get("step"), int):
        plain["step"] = torch.tensor(float(plain["step"]))
    return plain


def _decoded(code: str, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    part = local(codes)
    values = CODES[code].decode(part.flatten(), local(scales)).view(part.shape)
    return sharded_like(codes, values)


def _coded(
    optimizer: SweepOptimizer,
    parameter: torch.Tensor,
    group: Mapping[str, Any],
    state: dict[str, Any],
) -> dict[str, Any]:
    """Return one parameter's states in the formats that the optimizer keeps."""
    if not state:
        return {"step": 0} | {
            key: optimizer.state[parameter][key]
            for key in optimizer.state[parameter]
            if key != "step"
        }
    # torch's SGD counts no steps; with momentum it is past the first, which is special.
    coded: dict[str, Any] = {"step": int(state.get("step", 1))}
    for name, code in optimizer.codes(dict(group)).items():
        if name not in state:
            raise WeightStorageError(
                f"{type(optimizer).__name__} needs the state {name}; got "
                f"{', '.join(state)}; load the states of the same kind of optimizer"
            )
        key = f"{name}_{code}"
        if key not in optimizer.state[parameter]:
            coded[name] = state[name].float()
            continue
        part = local(state[name]).float().flatten()
        codes = torch.empty_like(part, dtype=CODES[code].dtype)
        scales = torch.zeros(num_blocks(len(part)), device=part.device)
        CODES[code].encode(part, codes, scales)
        like = optimizer.state[parameter][key]
        coded[name] = sharded_like(parameter, codes.view(local(parameter).shape))
        whole = tuple(like.shape) if is_sharded(like) else None
        coded[key] = sharded_like(parameter, scales, whole)
    return coded
