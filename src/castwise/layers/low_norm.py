"""Layer and RMS norms of fp32 rows that come out in bf16: norm and cast in one.

    y = rms_norm(x, weight)                 # x fp32 [..., D] -> y bf16 [..., D]
    y = layer_norm(x, weight, bias)

Under mixed precision a norm runs in fp32, and what it gives is cast for the product
that reads it: two passes more over memory, and in the backward a cast of the gradient
and a reduction over rows besides. Here a row is read once and written in bf16
(`norm_kernel`), each way. Moments, and sums over rows, keep fp32 and more.

That is machine code for a CPU. For other devices and formats the same is done by
operators, so that a model may call this anywhere. `normed` is the original in float64.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from castwise import torch_threads

if TYPE_CHECKING:
    from collections.abc import Callable

_WORTH_A_THREAD = 1 << 18  # numbers; below, waking a thread costs more than it saves


def normed(
    x: Tensor, weight: Tensor, bias: Tensor | None, eps: float, *, centred: bool
) -> Tensor:
    """The original: a norm in float64, by its formula.

    Args:
        x: [..., D], real.
        weight: [D].
        bias: [D], or none.
        eps: What is added to a variance.
        centred: Whether the mean is taken off: a layer norm, or else an RMS norm.
    """
    x, weight = x.double(), weight.double()
    if centred:
        x = x - x.mean(-1, keepdim=True)
    found = x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight
    return found if bias is None else found + bias.double()


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """Divide rows by the root of their mean square, in bf16.

    Args:
        x: fp32 [..., D], real.
        weight: fp32 [D].
        eps: What is added to the mean square. Default: 1e-6.

    Returns:
        bf16 [..., D].
    """
    if _is_for_machine(x, weight):
        return cast("Tensor", _Norm.apply(x, weight, None, eps))  # type: ignore[no-untyped-call]
    found = functional.rms_norm(x, (x.shape[-1],), weight, eps)
    return found.to(torch.bfloat16)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """Take off the mean of rows and divide by their deviation, in bf16.

    Args:
        x: fp32 [..., D], real.
        weight: fp32 [D].
        bias: fp32 [D].
        eps: What is added to the variance. Default: 1e-5.

    Returns:
        bf16 [..., D].
    """
    if _is_for_machine(x, weight, bias):
        return cast("Tensor", _Norm.apply(x, weight, bias, eps))  # type: ignore[no-untyped-call]
    found = functional.layer_norm(x, (x.shape[-1],), weight, bias, eps)
    return found.to(torch.bfloat16)


def _is_for_machine(*tensors: Tensor) -> bool:
    """Whether machine code takes them: real numbers on a CPU, seen by nobody else."""
    if torch.compiler.is_compiling():
        return False
    return all(
        type(each) in {Tensor, torch.nn.Parameter}
        and each.dtype is torch.float32
        and each.device.type == "cpu"
        and each.numel() > 0
        for each in tensors
    )


class _Norm(torch.autograd.Function):
    """A layer norm, or without a bias an RMS norm."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> Tensor:
        from castwise.layers import norm_kernel  # noqa: PLC0415 -- numba is imported by those who need it

        x, weight = x.contiguous(), weight.contiguous()
        y = torch.empty_like(x, dtype=torch.bfloat16)
        moments = torch.empty(2, x.numel() // x.shape[-1])
        given, written = _rows(x), _rows(y)
        w, (means, inverses) = weight.numpy(), moments.numpy()
        b = np.zeros_like(w) if bias is None else bias.contiguous().numpy()
        small = np.float32(eps)

        def work(part: slice) -> None:
            moments_of_part = means[part], inverses[part]
            norm_kernel.forward(
                *(given[part], w, b, written[part], *moments_of_part),
                *(small, bias is not None),
            )

        _in_parts(given.shape, work)
        ctx.save_for_backward(x, weight, moments)
        ctx.centred = bias is not None
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        from castwise.layers import norm_kernel  # noqa: PLC0415 -- as above

        x, weight, moments = ctx.saved_tensors
        by_x = torch.empty_like(x)
        given, grads, written = _rows(x), _rows(grad.contiguous()), _rows(by_x)
        w, (means, inverses) = weight.numpy(), moments.numpy()
        found: dict[int, Any] = {}

        def work(part: slice) -> None:
            found[part.start] = sums = np.zeros((2, len(w)))
            norm_kernel.backward(
                *(given[part], w, grads[part], written[part]),
                *(means[part], inverses[part], ctx.centred, sums),
            )

        _in_parts(given.shape, work)
        total = sum(found[start] for start in sorted(found))
        by_weight, by_bias = torch.from_numpy(total).to(torch.float32)
        return by_x, by_weight, by_bias if ctx.centred else None, None


def _rows(tensor: Tensor) -> Any:
    """The memory of a tensor as rows; bf16 as its bits."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    return (rows.view(torch.int16) if rows.dtype is torch.bfloat16 else rows).numpy()


def _in_parts(shape: tuple[int, int], work: Callable[[slice], None]) -> None:
    """Run `work` over parts of the rows, in threads where that pays."""
    rows, dim = shape
    worth = 1 + rows * dim // _WORTH_A_THREAD
    torch_threads.in_parts(work, rows, min(torch.get_num_threads(), worth))
