"""Operators whose backward computes in another format than their forward.

A stage rule asks for it: `stage: backward, precision: c=fp32` on a module that computes
in bf16, or the other way round. Autograd alone cannot give it, because its engine casts
each gradient to the format of the tensor that it belongs to, and what was gained in one
operator is rounded away before the next. So all values of such a module are held in
fp32 (fp64, where the backward computes in it), and each operator that the operator
table gives another format takes them, and hands its result out, as they are held:

    forward     y = op(x, w)                   in the forward's format
    backward    x', w' = d(op(x, w) . y')      in the backward's

The backward runs the operator again on its inputs as they are held, and differentiates
it there. Captured ahead of time, what of that run no gradient needs is never computed:
a product in its backward is two products, as ever. With `inner="eager"` it is three.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.utils._pytree import TreeSpec, tree_flatten, tree_unflatten

from castwise.graph.values import is_floating
from castwise.islands.passage import passing

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from castwise.graph.stages import Apart

_LOW = frozenset({torch.bfloat16, torch.float16})


def apart(
    function: Callable[..., Any],
    formats: Apart,
    *,
    kept: frozenset[int],
    written: frozenset[int],
) -> Callable[..., Any]:
    """The same function, each stage of it in a format of its own.

    Args:
        function: An operator that draws no random numbers, and writes to nothing.
        formats: What each stage computes in.
        kept: Which of its arguments, flattened, stay as they are beside low ones.
        written: Which of them live in memory that is written later, and are copied.
    """

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        leaves = [t.clone() if at in written else t for at, t in enumerate(leaves)]
        call = _Call(function, formats, kept, leaves, spec)
        made = _Apart.apply(call, *call.tensors)  # type: ignore[no-untyped-call]
        return tree_unflatten(list(made), call.results)

    run.__name__ = getattr(function, "__name__", "operator")
    return run


class _Call:
    """One call: the function, and its arguments with places instead of tensors."""

    def __init__(
        self,
        function: Callable[..., Any],
        formats: Apart,
        kept: frozenset[int],
        leaves: Sequence[Any],
        spec: TreeSpec,
    ) -> None:
        self._function, self.formats, self._spec = function, formats, spec
        self._places = [at for at, leaf in enumerate(leaves) if _is_tensor(leaf)]
        self._kept = kept
        self._others = [None if _is_tensor(leaf) else leaf for leaf in leaves]
        self.tensors: tuple[torch.Tensor, ...] = tuple(filter(_is_tensor, leaves))
        """The tensors among the arguments."""
        self.results: TreeSpec
        """How the results hang together."""

    def run(self, tensors: Sequence[Any], dtype: torch.dtype) -> list[Any]:
        """Call the function in a format; returns its results, flattened."""
        leaves = list(self._others)
        for at, tensor in zip(self._places, tensors, strict=True):
            is_kept = dtype in _LOW and at in self._kept
            leaves[at] = tensor if is_kept else _cast(tensor, dtype)
        args, kwargs = tree_unflatten(leaves, self._spec)
        results, self.results = tree_flatten(self._function(*args, **kwargs))
        return results


class _Apart(torch.autograd.Function):
    """One operator, differentiated in a format of its own."""

    @staticmethod
    def forward(ctx: Any, call: _Call, *tensors: torch.Tensor) -> tuple[Any, ...]:
        """Run in the forward's format, and keep the inputs as they are held."""
        with passing("forward"):
            results = call.run(tensors, call.formats.forward)
        call.tensors = ()  # autograd keeps them, or nobody
        ctx.call = call
        ctx.save_for_backward(*tensors)
        ctx.set_materialize_grads(False)
        exact = [t for t in results if _is_tensor(t) and not is_floating(t)]
        ctx.mark_non_differentiable(*exact)
        return tuple(_cast(each, call.formats.held) for each in results)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        """Run again in the backward's format, and differentiate that."""
        call, needed = ctx.call, ctx.needs_input_grad[1:]
        keeps_graph = torch.is_grad_enabled()  # these gradients get differentiated, too
        inputs = [
            _stand_in(tensor, keeps_graph=keeps_graph) if need else tensor
            for tensor, need in zip(ctx.saved_tensors, needed, strict=True)
        ]
        wanted = [each for each, need in zip(inputs, needed, strict=True) if need]
        with passing("again"), torch.enable_grad():
            results = call.run(inputs, call.formats.backward)
            pairs = [
                (result, gradient.to(result.dtype))
                for result, gradient in zip(results, gradients, strict=True)
                if gradient is not None and result.requires_grad
            ]
            with passing("gradient"):
                found = iter(_gradients(pairs, wanted, keeps_graph=keeps_graph))
        return None, *(next(found) if need else None for need in needed)


def _gradients(
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    inputs: Sequence[torch.Tensor],
    *,
    keeps_graph: bool,
) -> Sequence[torch.Tensor | None]:
    if not pairs:
        return [None] * len(inputs)
    outputs, arrived = zip(*pairs, strict=True)
    return torch.autograd.grad(
        outputs, inputs, arrived, allow_unused=True, create_graph=keeps_graph
    )


def _stand_in(tensor: torch.Tensor, *, keeps_graph: bool) -> torch.Tensor:
    """A tensor of its own for the second run, whose gradient is asked for."""
    return tensor.view_as(tensor) if keeps_graph else tensor.detach().requires_grad_()


def _cast(value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if _is_float(value) else value


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
