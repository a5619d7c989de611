"""Low copies of weights that stay from call to call, refreshed once per update.

A plan casts each weight once per forward. Under gradient accumulation, and in
inference, a weight is the same for many forwards; its copy then needs a refresh only
after an update. A refresh is due when

    the version of the weight moved        every in-place operator moves it
    the weight stands in other memory      `weight.data = ...`
    any optimizer of PyTorch has stepped   whatever it wrote with

A write through `weight.data.copy_()` outside of an optimizer moves nothing that could
be seen, and needs `refresh()`. That is why copies are kept only where they are asked
for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from weakref import ref

import torch
from torch import fx
from torch._guards import detect_fake_mode
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from castwise.graph.classify import PARAMETER
from castwise.optim.step_hooks import only_looks

_Copies = dict[torch.dtype, tuple[tuple[int, int, int], torch.Tensor]]
"""Format -> when a copy was made, and the copy."""


class KeptWeights:
    """The low copies of one model's weights."""

    def __init__(self) -> None:
        self._copies = WeakTensorKeyDictionary()  # by identity: == compares numbers
        self._num_updates = 0
        mine = ref(self)

        @only_looks
        def updated(*_: object) -> None:
            kept = mine()
            if kept is not None:
                kept.refresh()

        self._hook = register_optimizer_step_post_hook(updated)
        self.num_refreshed = 0
        """How many copies were made or made again."""

    def refresh(self) -> None:
        """Make every copy again at its next use."""
        self._num_updates += 1

    def close(self) -> None:
        """Let go of the copies, and stop listening to optimizers."""
        self._hook.remove()
        self._copies.clear()

    def lend(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The copy of a weight; its gradient goes to the weight."""
        copy = self._copy(weight, dtype)
        if not (torch.is_grad_enabled() and weight.requires_grad):
            return copy
        lent: torch.Tensor = _Lent.apply(weight, copy)  # type: ignore[no-untyped-call]
        return lent

    def _copy(self, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        copies: _Copies | None = self._copies.get(weight)  # type: ignore[no-untyped-call]
        if copies is None:
            copies = self._copies[weight] = {}
        now = weight._version, weight.data_ptr(), self._num_updates  # noqa: SLF001 -- no public name
        kept = copies.get(dtype)
        if kept is None or kept[0] != now:
            copies[dtype] = kept = now, weight.detach().to(dtype)
            self.num_refreshed += 1
        return kept[1]

    def take_out(
        self, module: fx.GraphModule, inputs: list[Any]
    ) -> tuple[fx.GraphModule, Callable[[Sequence[Any]], list[torch.Tensor]]]:
        """Make inputs of a graph out of its casts of weights.

        Args:
            module: The planned graph; Dynamo still reads it, so it stays as it is.
            inputs: Its example inputs; copies are added.

        Returns:
            The new graph, and a way from its first inputs to those that were added.
        """
        graph = _copied(module)
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        places = {node: at for at, node in enumerate(placeholders)}
        taken: list[tuple[int, torch.dtype]] = []
        for node in filter(_is_cast_of_weight, list(graph.nodes)):
            weight, dtype = node.args
            with graph.inserting_after(placeholders[-1]):
                lent = graph.placeholder(f"kept_{weight.name}_{len(taken)}")
            placeholders.append(lent)
            node.replace_all_uses_with(lent)
            graph.erase_node(node)
            taken.append((places[weight], dtype))
            inputs.append(_as_example(self.lend(inputs[places[weight]], dtype)))
        made = fx.GraphModule(module, graph)
        return made, lambda args: [self.lend(args[at], dtype) for at, dtype in taken]


def _as_example(lent: torch.Tensor) -> torch.Tensor:
    """What a compiler is shown: a fake of this very size, not an input of Dynamo's.

    Of a real tensor it would make a fake itself, with a symbol for each size that may
    change, and Dynamo knows no place in the model to read such a symbol from.
    """
    mode = detect_fake_mode()
    if mode is None:
        return lent
    with torch.enable_grad():
        return mode.from_tensor(lent, static_shapes=True)


def _copied(module: fx.GraphModule) -> fx.Graph:
    """The same graph, with what AOTAutograd asks of its inputs."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(module.graph, copies))
    for old, new in copies.items():
        if hasattr(old, "_dynamo_source"):
            new._dynamo_source = old._dynamo_source  # noqa: SLF001 -- where Dynamo keeps it
    return graph


class _Lent(torch.autograd.Function):
    """A copy in another format, whose gradient goes to the original."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, copy: torch.Tensor) -> torch.Tensor:
        """Hand out the copy."""
        ctx.dtype = weight.dtype
        return copy.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Hand the gradient to the weight, in its format."""
        return gradients[0].to(ctx.dtype), None


def _is_cast_of_weight(node: fx.Node) -> bool:
    if (
        node.op != "call_method"
        or node.target != "to"
        or "castwise_cast" not in node.meta
    ):
        return False
    source = node.args[0]
    return bool(getattr(source, "meta", {}).get(PARAMETER))
