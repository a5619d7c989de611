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

import contextlib
import functools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, final

import torch
from torch.nn.functional import gelu, silu

from castwise.memory.save_formats import Kept

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from types import ModuleType

Again = Callable[[torch.Tensor], torch.Tensor]
"""Computes a result once more from what its operator read."""


@final
class Source:
    """A tensor that was just saved: which, by what operator, and how to get it back.

    Args:
        tensor: It, contiguous.
        get: Gives it in the backward.
    """

    __slots__ = ("_made_by", "_number", "_shape", "get")

    def __init__(self, tensor: torch.Tensor, get: Callable[[], torch.Tensor]) -> None:
        self.get = get
        self._shape = tensor.shape
        self._made_by = tensor.grad_fn
        self._number = torch._C._autograd._get_sequence_nr() - 1  # noqa: SLF001 -- no public name

    def leads_to(self, tensor: torch.Tensor) -> Again | None:
        """Return how the same operator made a tensor, if it did, and if it is cheap.

        Args:
            tensor: What is to be saved now.

        Returns:
            None where it did not. Else what computes all of the tensor's memory.
        """
        whole = tensor if tensor._base is None else tensor._base  # noqa: SLF001 -- no public name
        node = whole.grad_fn
        if node is None or node._sequence_nr() != self._number:  # noqa: SLF001 -- as above
            return None
        again = _CHEAP.get(node.name())
        if (
            again is None
            or node.next_functions[0][0] is not self._made_by  # numbers are of a thread
            or whole._version  # noqa: SLF001 -- or it was written where no graph saw it
            or whole.shape != self._shape
            or not fills_its_memory(whole)
        ):
            return None
        return again(node, whole)


def fills_its_memory(tensor: torch.Tensor) -> bool:
    """Whether a tensor is all that lies in its memory, row by row."""
    return tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.nbytes


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
        run: Again,
    ) -> None:
        self._source, self._run = source, run

    def get(self) -> torch.Tensor:
        """Compute it once more."""
        return self._run(self._source()).view(-1)


@functools.cache
def _kernels() -> ModuleType:
    from castwise.memory import pair_kernel  # noqa: PLC0415 -- numba is imported by those who need it

    return pair_kernel


@contextlib.contextmanager
def _as_then() -> Iterator[None]:
    """Without a graph, and in the formats of the arguments."""
    with torch.no_grad(), torch._C._DisableAutocast():  # noqa: SLF001 -- no public name
        yield


def _gelu(node: Any, result: torch.Tensor) -> Again | None:
    """By the error function; that by tanh costs more than widening, on a CPU."""
    kind = node._saved_approximate  # noqa: SLF001 -- how autograd names it
    if kind != "none" and result.device.type == "cpu":
        return None
    return functools.partial(_gelu_again, kind)


def _gelu_again(kind: str, x: torch.Tensor) -> torch.Tensor:
    done: torch.Tensor | None = _kernels().gelu(x) if kind == "none" else None
    if done is not None:
        return done
    with _as_then():
        return gelu(x, approximate=kind)


def _silu(node: Any, result: torch.Tensor) -> Again:
    del node, result
    return _silu_again


def _silu_again(x: torch.Tensor) -> torch.Tensor:
    with _as_then():
        return silu(x)


def _layer_norm(node: Any, result: torch.Tensor) -> Again | None:
    """By the mean and the deviation that it saved itself."""
    del result
    mean = node._saved_result1  # noqa: SLF001 -- as above
    if mean.numel() == 1:  # its weight has the shape of its rows, then: which is which?
        return None
    others = (
        node._saved_result2,  # noqa: SLF001 -- as above
        node._saved_weight,  # noqa: SLF001 -- as above
        node._saved_bias,  # noqa: SLF001 -- as above
    )
    return functools.partial(_norm_again, mean, *others)


def _norm_again(
    mean: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    x: torch.Tensor,
) -> torch.Tensor:
    if weight is not None and bias is not None:
        done: torch.Tensor | None = _kernels().normed(x, mean, inverse, weight, bias)
        if done is not None:
            return done
    with _as_then():
        y = (x - mean).mul_(inverse)
        if weight is not None:
            y = y.mul_(weight)
        return y if bias is None else y.add_(bias)


_CHEAP: Mapping[str, Callable[[Any, torch.Tensor], Again | None]] = {
    "GeluBackward0": _gelu,
    "NativeLayerNormBackward0": _layer_norm,
    "SiluBackward0": _silu,
}
"""Nodes of operators that are worth running twice."""
