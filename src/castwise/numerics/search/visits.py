"""Visits: a model runs, and somebody is told of every call of every module.

For each call a visitor learns what goes in, what comes out, and in the backward the
gradient of each output. Modules whose outputs carry no gradient, because everything
before them is frozen, get one: what leaves them is made the root of a graph, which
changes no number. Calls that a recompute repeats in the backward are not told again.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from castwise.numerics.operator_call import stage_now
from castwise.numerics.search.structure import EachTensor, floating_in


class Visitor:
    """Is told of calls; every method does nothing until it is overridden."""

    def enters(self, fqn: str, at: int, inputs: tuple[Any, ...]) -> None:
        """A module is called for the `at`-th time; inputs are (args, kwargs)."""

    def leaves(self, fqn: str, at: int, outputs: list[torch.Tensor]) -> None:
        """A module returns; its floating outputs in order."""

    def gradient(self, fqn: str, at: int, place: int, value: torch.Tensor) -> None:
        """The gradient of one output is known."""


class Visits:
    """Who is being called right now, and how often each was called.

    Args:
        model: What runs.
        visitor: Who is told.
    """

    def __init__(self, model: nn.Module, visitor: Visitor) -> None:
        self._model, self._visitor = model, visitor
        self.stack: list[str] = []
        """The modules that run, the innermost last."""
        self.num_calls: Counter[str] = Counter()
        """How often each module was called."""

    @property
    def innermost(self) -> str:
        """What runs right now, for messages."""
        return (self.stack[-1] if self.stack else "") or "the model itself"

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Tell the visitor of all calls until the block ends."""
        handles = []
        for fqn, module in self._model.named_modules():
            if "parametrizations" in fqn.split("."):
                continue
            before = partial(self._before, fqn)
            after = partial(self._after, fqn)
            handles += [
                module.register_forward_pre_hook(before, with_kwargs=True),
                module.register_forward_hook(after),
            ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _before(self, fqn: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        if stage_now() != "forward":
            return
        self.stack.append(fqn)
        self.num_calls[fqn] += 1
        self._visitor.enters(fqn, self.num_calls[fqn] - 1, (args, kwargs))

    def _after(self, fqn: str, _: nn.Module, _args: Any, outputs: Any) -> Any:
        if stage_now() != "forward":
            return None
        # a module that calls itself anew finds its own call by its place on the stack
        self.stack.pop()
        at = self.num_calls[fqn] - 1
        if torch.is_grad_enabled():
            outputs = EachTensor(_with_gradient).values(outputs)
        tensors = floating_in(outputs)
        self._visitor.leaves(fqn, at, tensors)
        for place, tensor in enumerate(tensors):
            if tensor.requires_grad:
                told = partial(self._visitor.gradient, fqn, at, place)
                tensor.register_hook(told)  # type: ignore[no-untyped-call]
        return outputs


class LastOperator(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Remembers the operator that was called last, for messages."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.name = "nothing"

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        self.name = str(func)
        return func(*args, **(kwargs or {}))


def _with_gradient(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.requires_grad:
        return tensor
    return tensor.detach().requires_grad_().clone()
