"""The check on custom autograd functions: autocast ends where their backward begins.

Autograd runs the backward of a custom function without the autocast of its forward. A
product in it then meets a gradient in one format and what was saved in another, or runs
in a format that nobody chose. `torch.amp.custom_fwd` and `custom_bwd` carry the state
over; a function that does nothing but pointwise work does not need them.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import nn

from castwise.numerics.lint.findings import Finding
from castwise.numerics.lint.subject import LOW, Subject
from castwise.policy.ops import DEFAULT_TABLE

_GUARDS = {"decorate_fwd", "decorate_bwd"}
_DEPTH = 3  # calls from a forward to the function that applies a custom one


def bare_functions(
    subject: Subject, seen: tuple[type, ...] | None = None
) -> Iterator[Finding]:
    """Find custom functions that multiply without `custom_bwd`.

    Args:
        subject: What is looked at.
        seen: The functions that a forward really used; without a forward, those that
            the source of the modules names.
    """
    places = dict(_reachable(subject)) if seen is None else dict.fromkeys(seen, "")
    for function, place in places.items():
        if not _is_guarded(function) and (line := _product_line(function)):
            yield Finding(
                check="bare-custom-function",
                place=place or function.__qualname__,
                where=f"{function.__qualname__} at {line}",
                why="a custom function multiplies, and its backward runs outside of "
                "autocast",
                figure="neither custom_fwd nor custom_bwd is around it",
                remedy='put @torch.amp.custom_fwd(device_type="cpu") on forward and '
                '@torch.amp.custom_bwd(device_type="cpu") on backward, for the device '
                "in use",
            )


def functions_in(
    loss: torch.Tensor, multiplying: Container[CodeType]
) -> tuple[type, ...]:
    """The custom functions in the graph of a loss whose forwards multiplied low."""
    pending: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    found: dict[type, None] = {}
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        cls = getattr(type(node), "_forward_cls", None)
        if isinstance(cls, type) and _code_of(cls) in multiplying:
            found[cls] = None
        pending.extend(following for following, _ in node.next_functions)
    return tuple(found)


def _code_of(function: Any) -> CodeType | None:
    code: CodeType | None = getattr(inspect.unwrap(function.forward), "__code__", None)
    return code


def _reachable(subject: Subject) -> Iterator[tuple[type, str]]:
    """Custom functions that the forwards of low modules name, with the first module."""
    found: dict[type, str] = {}
    for fqn, _, cls in subject.modules():
        if subject.compute_of(fqn) in LOW and not cls.__module__.startswith("torch."):
            for function in _named_by(cls):
                found.setdefault(function, fqn)
    yield from found.items()


def _named_by(cls: type) -> Iterator[type]:
    own = [
        each
        for base in cls.__mro__
        if not base.__module__.startswith("torch.") and base is not object
        for each in vars(base).values()
        if isinstance(each, FunctionType)
    ]
    seen: set[FunctionType] = set()
    level: list[FunctionType] = own
    for _ in range(_DEPTH):
        named: list[FunctionType] = []
        for function in level:
            if function in seen or "autocast" in function.__code__.co_names:
                continue  # what decides about autocast itself is left alone
            seen.add(function)
            for name in function.__code__.co_names:
                value = function.__globals__.get(name)
                if isinstance(value, type) and issubclass(
                    value, torch.autograd.Function
                ):
                    yield value
                elif isinstance(value, FunctionType) and not _is_of_torch(value):
                    named.append(value)
        level = named


def _is_of_torch(function: FunctionType) -> bool:
    return function.__module__.partition(".")[0] == "torch"


def _is_guarded(function: type) -> bool:
    backward = getattr(function, "backward", None)
    code = getattr(backward, "__code__", None)
    return code is not None and code.co_name in _GUARDS


def _product_line(function: Any) -> str | None:
    """File and line of the first product of a function, unless autocast is off."""
    for method in (function.forward, function.backward):
        found = _product_in(method)
        if found is not None:
            return found
    return None


def _product_in(method: Callable[..., Any]) -> str | None:
    tree, first = _parsed(method)
    if tree is None:
        return None
    names = [_called(node) for node in ast.walk(tree)]
    if "autocast" in names:  # it decides for itself
        return None
    for node in ast.walk(tree):
        if _is_product(node):
            file = inspect.getsourcefile(inspect.unwrap(method)) or "unknown"
            return f"{Path(file).name}:{first + getattr(node, 'lineno', 1) - 1}"
    return None


def _is_product(node: ast.AST) -> bool:
    if isinstance(node, ast.BinOp):
        return isinstance(node.op, ast.MatMult)
    name = _called(node)
    return name is not None and DEFAULT_TABLE.category(name) == "low"


def _called(node: ast.AST) -> str | None:
    if not isinstance(node, ast.Call):
        return None
    if isinstance(node.func, ast.Attribute):
        return node.func.attr
    return node.func.id if isinstance(node.func, ast.Name) else None


def _parsed(method: Callable[..., Any]) -> tuple[ast.AST | None, int]:
    try:
        lines, first = inspect.getsourcelines(inspect.unwrap(method))
        return ast.parse(textwrap.dedent("".join(lines))), first
    except (OSError, TypeError, SyntaxError):  # built in, or typed at a prompt
        return None, 0


def masked_by_constants(subject: Subject) -> Iterator[tuple[str, str, float]]:
    """Find negative constants beyond fp16 in the forwards of modules in fp16.

    Yields the module, the line and the constant.
    """
    limit = torch.finfo(torch.float16).max
    for fqn, module, cls in subject.modules():
        if cls.__module__.startswith("torch.") or subject.compute_of(fqn) != "fp16":
            continue
        tree, first = _parsed(_forward_of(module, cls))
        for node in ast.walk(tree) if tree is not None else ():
            value = _negative(node)
            if value is not None and limit < -value < float("inf"):
                file = Path(inspect.getsourcefile(cls) or "unknown").name
                line = first + getattr(node, "lineno", 1) - 1
                yield fqn, f"{file}:{line}", value


def _forward_of(module: nn.Module, cls: Any) -> Callable[..., Any]:
    found: Callable[..., Any] = getattr(cls, "forward", module.forward)
    return found


def _negative(node: ast.AST) -> float | None:
    """The value of a literal such as -1e9, or none."""
    if (
        isinstance(node, ast.UnaryOp)
        and isinstance(node.op, ast.USub)
        and isinstance(node.operand, ast.Constant)
        and isinstance(node.operand.value, (int, float))
    ):
        return -float(node.operand.value)
    return None
