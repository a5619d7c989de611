"""Calls inside of a graph that run in a region of autocast, as they would in Python.

A function such as `multi_head_attention_forward` is one node to Dynamo and a dozen
operators to PyTorch. What goes in and out has the captured formats; in between, the
operator table holds.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from castwise.autocast import autocast
from castwise.autocast_kernels import LOW_DTYPES
from castwise.dtypes import format_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from castwise.policy.ops import OperatorTable


def in_region(
    function: Callable[..., Any], device_type: str, fmt: str, table: OperatorTable
) -> Callable[..., Any]:
    """The same function, under autocast; what it returns is as it was captured."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with autocast(device_type, fmt, table):
            result = function(*args, **kwargs)
        return widened(result)

    return run


def in_format_of_inputs(
    function: Callable[..., Any], device_type: str, table: OperatorTable
) -> Callable[..., Any]:
    """The same function; where its first tensor is low, in a region of that format."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        first = next(each for each in args if isinstance(each, torch.Tensor))
        if first.dtype not in LOW_DTYPES:
            return function(*args, **kwargs)
        fmt = format_of(first.dtype)
        return in_region(function, device_type, fmt, table)(*args, **kwargs)

    return run


def widened(value: Any) -> Any:
    """Low tensors as fp32, which the graphs around were captured with."""
    if isinstance(value, torch.Tensor):
        is_low = value.dtype in {torch.bfloat16, torch.float16}
        return value.float() if is_low else value
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*map(widened, value))
    if isinstance(value, (list, tuple)):
        return type(value)(map(widened, value))
    if isinstance(value, dict):
        return type(value)((key, widened(item)) for key, item in value.items())
    return value
