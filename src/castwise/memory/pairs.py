"""Two saves of which one follows from the other: kept as one.

    normed = layer_norm(x)      layer_norm saves x; the next product saves normed
    hidden = gelu(up(x))        gelu saves its input; the next product saves hidden

Two tensors in 16 bits take as much memory as the first of them in fp32. So where the
second follows by one cheap operator, the first is kept as it is, at the same bytes: no
number is rounded, cast or widened, and the second costs what widening two would.

That one follows from the other is read off the graph that autograd builds. Nodes are
numbered as operators run. When a tensor is saved, the last number given out is that of
the operator that saves it; when the next one is saved, the number of the node that it
came from tells whether that is the same operator. `castwise.memory.derived` finds more,
by looking at every operator that runs, which costs time of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch.nn.functional import gelu, silu

from castwise.memory.save_formats import Kept

if TYPE_CHECKING:
    from collections.abc import Mapping

Made = tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]
"""What an operator read, and how its result is computed from that once more."""


def last_number() -> int:
    """Return the number of the node that autograd made last."""
    return torch._C._autograd._get_sequence_nr() - 1  # noqa: SLF001 -- no public name


def made_by(tensor: torch.Tensor, number: int) -> Made | None:
    """Return how a node made a tensor, if it did, and if it is cheap.

    Args:
        tensor: What is to be saved now.
        number: Of the node.

    Returns:
        None where it did not. Else what it read, as its hooks give it, and a function
        whose result lies in memory as the tensor's memory does.
    """
    whole = tensor if tensor._base is None else tensor._base  # noqa: SLF001 -- no public name
    node = whole.grad_fn
    if node is None or node._sequence_nr() != number:  # noqa: SLF001 -- as above
        return None
    again = _CHEAP.get(node.name())
    # one that was changed in place has another node, or another version
    if again is None or whole._version or not _fills_its_memory(whole):  # noqa: SLF001 -- as above
        return None
    made = again(node)
    return made if made is not None and _fits(made[0], whole) else None


def _fills_its_memory(tensor: torch.Tensor) -> bool:
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


def _fits(source: torch.Tensor, result: torch.Tensor) -> bool:
    return (
        source.dtype == result.dtype
        and source.shape == result.shape
        and source.is_contiguous()
    )


@final
class Follows(Kept):
    """What is kept of a tensor that follows from another: how.

    Args:
        source: Gives what it follows from.
        run: How.
    """

    num_bytes = 0

    def __init__(
        self,
        source: Callable[[], torch.Tensor],
        run: Callable[[torch.Tensor], torch.Tensor],
    ) -> None:
        self._source, self._run = source, run

    def get(self) -> torch.Tensor:
        """Compute it once more, without a graph."""
        with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 -- no public name
            return self._run(self._source()).view(-1)


def _gelu(node: Any) -> Made | None:
    """By the error function; that by tanh costs more than widening, on a CPU."""
    x, kind = node._saved_self, node._saved_approximate  # noqa: SLF001 -- how autograd names them
    if x.device.type == "cpu":
        return None if kind != "none" else (x, _gelu_again)
    return x, lambda x: gelu(x, approximate=kind)


def _gelu_again(x: torch.Tensor) -> torch.Tensor:
    from castwise.memory import pair_kernel  # noqa: PLC0415 -- numba is imported by those who need it

    done = pair_kernel.gelu(x)
    return gelu(x) if done is None else done


def _silu(node: Any) -> Made:
    return node._saved_self, silu  # noqa: SLF001 -- as above


def _layer_norm(node: Any) -> Made:
    """By the mean and the deviation that it saved itself."""
    known = node._saved_result1, node._saved_result2  # noqa: SLF001 -- as above
    affine = node._saved_weight, node._saved_bias  # noqa: SLF001 -- as above
    return node._saved_input, functools.partial(_norm_again, known, affine)  # noqa: SLF001 -- as above


def _norm_again(
    known: tuple[torch.Tensor, torch.Tensor],
    affine: tuple[torch.Tensor | None, torch.Tensor | None],
    x: torch.Tensor,
) -> torch.Tensor:
    mean, inverse = known
    weight, bias = affine
    if x.device.type == "cpu" and weight is not None and bias is not None:
        from castwise.memory import pair_kernel  # noqa: PLC0415 -- as above

        done = pair_kernel.normed(x, mean, inverse, weight, bias)
        if done is not None:
            return done
    y = (x - mean).mul_(inverse)
    if weight is not None:
        y = y.mul_(weight)
    return y if bias is None else y.add_(bias)


_CHEAP: Mapping[str, Callable[[Any], Made | None]] = {
    "GeluBackward0": _gelu,
    "NativeLayerNormBackward0": _layer_norm,
    "SiluBackward0": _silu,
}
"""Nodes of operators that are worth running twice."""
