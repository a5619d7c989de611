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
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary, ref

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from castwise.graph.classify import PARAMETER

if TYPE_CHECKING:
    from torch import fx

_Key = tuple[int, torch.dtype]


class KeptWeights:
    """The low copies of one model's weights."""

    def __init__(self) -> None:
        self._copies: WeakKeyDictionary[
            torch.Tensor, dict[torch.dtype, tuple[tuple[int, int, int], torch.Tensor]]
        ] = WeakKeyDictionary()
        self._num_updates = 0
        mine = ref(self)

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
        copies = self._copies.setdefault(weight, {})
        now = weight._version, weight.data_ptr(), self._num_updates  # noqa: SLF001 -- the version has no public name
        kept = copies.get(dtype)
        if kept is None or kept[0] != now:
            copy = weight.detach().to(dtype)
            copies[dtype] = kept = now, copy
            self.num_refreshed += 1
        lent: torch.Tensor = _Lent.apply(weight, kept[1])  # type: ignore[no-untyped-call]
        return lent

    def take_out(
        self, module: fx.GraphModule, inputs: list[Any]
    ) -> Callable[[Sequence[Any]], list[torch.Tensor]] | None:
        """Make inputs of a graph out of its casts of weights.

        Args:
            module: The planned graph; changed in place.
            inputs: Its example inputs; copies are added.

        Returns:
            From the graph's own inputs to those to be added; none if there are none.
        """
        graph = module.graph
        places = {
            node: at
            for at, node in enumerate(
                each for each in graph.nodes if each.op == "placeholder"
            )
        }
        taken: list[tuple[int, torch.dtype]] = []
        last = list(places)[-1] if places else None
        for node in list(graph.nodes):
            if not _is_cast_of_weight(node):
                continue
            at, dtype = places[node.args[0]], node.args[1]
            assert last is not None
            with graph.inserting_after(last):
                last = graph.placeholder(f"kept_{node.args[0].name}_{len(taken)}")
            last.meta.update(node.meta)
            node.replace_all_uses_with(last)
            graph.erase_node(node)
            taken.append((at, dtype))
            inputs.append(self.lend(inputs[at], dtype))
        if not taken:
            return None
        module.recompile()
        return lambda args: [self.lend(args[at], dtype) for at, dtype in taken]


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
