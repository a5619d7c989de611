"""Cross-entropy of a large vocabulary without its logits: chunk by chunk of tokens.

The logits of a language model, tokens times vocabulary, are the largest tensor of its
step by far, and three of them live at once: the logits, their log-softmax, and its
gradient. Here a chunk of tokens is multiplied, measured and differentiated before the
next one is looked at; what stays is the gradient of the hidden states and of the head,
which the backward only scales.

    loss = -1/M sum_n log softmax(h_n W^T)[t_n]         over the M tokens that count
    dL/dlogits_n = (softmax(h_n W^T) - onehot(t_n)) / M

No product is computed twice: three per chunk, as without chunks. Logits stay in the
format in which the product left them; a few rows at a time are widened to fp32, reduced
and written back as the gradient, so that what is wide fits into a cache. Sums over
chunks are kept in fp32; in 16 bits the gradient of the head grows block by block, so
that its summands do too. The division by M comes last: fp16 products see numbers of
size 1, and a loss scale scales the gradient by exactly its factor. What autocast does
to a matrix product it does here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from castwise.errors import SettingsError

IGNORED = -100
"""A target that does not count."""

LEAST_CHUNK = 256
"""Tokens in fp32 below which reading the head outweighs multiplying by it."""

_WIDE_AT_ONCE = 1 << 19  # logits in fp32 at the same time on a CPU: 2 MiB
_ADDED_AT_ONCE = 1 << 21  # numbers of a 16-bit product that waits for its sum


def chunk_of(
    num_tokens: int, dim: int, vocab_size: int, dtype: torch.dtype = torch.float32
) -> int:
    """Return how many tokens a chunk takes.

    Its logits weigh as much as all hidden states in fp32; in 16 bits it is twice as
    long at the same bytes.
    """
    shorter = max(1, torch.float32.itemsize // dtype.itemsize)
    even = -(-num_tokens * dim * shorter // vocab_size)
    longest = 1 << (even - 1).bit_length() if even > 1 else 1
    return max(LEAST_CHUNK * shorter, longest)


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    chunk: int | None = None,
    ignored: int = IGNORED,
) -> Tensor:
    """Return the mean cross-entropy of `hidden @ weight.T` against targets.

    Once differentiable, in both floating arguments. Without a token that counts it is
    NaN, as that of torch.

    Args:
        hidden: `[..., D]`.
        weight: `[V, D]`, the head.
        targets: `[...]`, int64, below V, or `ignored`.
        chunk: tokens that are looked at together. Default: what keeps memory low.
        ignored: the target that does not count.

    Returns:
        A scalar: fp64 where an argument is, else fp32.

    Raises:
        SettingsError: The shapes do not fit.
    """
    if hidden.shape[:-1] != targets.shape or hidden.shape[-1] != weight.shape[-1]:
        raise SettingsError(
            "chunked_cross_entropy needs hidden [..., D], weight [V, D] and targets "
            f"[...]; got {tuple(hidden.shape)}, {tuple(weight.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if chunk is not None and chunk < 1:
        raise SettingsError(f"a chunk has at least 1 token, got {chunk}")
    rows = hidden.reshape(-1, hidden.shape[-1])
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets.reshape(-1), chunk, ignored, needed
    )
    return cast("Tensor", loss)


class _ChunkedLoss(torch.autograd.Function):
    """Both gradients are computed with the loss, and scaled in the backward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        chunk: int | None,
        ignored: int,
        needed: bool,
    ) -> Tensor:
        wide = torch.promote_types(
            torch.promote_types(hidden.dtype, weight.dtype), torch.float32
        )
        low = _format_of_products(hidden, weight)
        size = chunk or chunk_of(len(hidden), hidden.shape[1], len(weight), low)
        head = weight.to(low)  # once, and not in every chunk
        counted = targets != ignored
        num_counted = counted.sum()
        total = torch.zeros((), dtype=wide, device=hidden.device)
        by_hidden = by_weight = None
        if needed and ctx.needs_input_grad[0]:
            by_hidden = torch.empty_like(hidden, dtype=wide)
        if needed and ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight, dtype=wide)
        for part in _parts(len(hidden), size):
            total += _one_chunk(
                hidden[part].to(low),
                head,
                targets[part],
                counted[part],
                None if by_hidden is None else by_hidden[part],
                by_weight,
            )
        ctx.formats = (hidden.dtype, weight.dtype)
        ctx.save_for_backward(by_hidden, by_weight, num_counted)
        return total / num_counted

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        *sums, num_counted = ctx.saved_tensors
        factor = grad / num_counted
        by_both = [
            None if total is None else _scaled(total, factor).to(dtype)
            for total, dtype in zip(sums, ctx.formats, strict=True)
        ]
        return *by_both, None, None, None, None


def _scaled(total: Tensor, factor: Tensor) -> Tensor:
    """Scale a sum in its place, unless a later backward wants it as it is."""
    if (
        torch.compiler.is_compiling()
        or torch._C._autograd._get_current_graph_task_keep_graph()  # noqa: SLF001 -- no public name
    ):
        return total * factor
    try:
        return total.mul_(factor)
    except RuntimeError:  # of vmap: one sum has no room for a batch of factors
        return total * factor


def _format_of_products(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Return what a product comes out in here, as autocast and the policy say."""
    tiny = [each.new_zeros(1, 1) for each in (hidden, weight)]
    return torch.nn.functional.linear(*tiny).dtype


def _one_chunk(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    counted: Tensor,
    by_hidden: Tensor | None,
    by_weight: Tensor | None,
) -> Tensor:
    """Return the sum of the losses of a chunk; add its gradients."""
    logits = torch.nn.functional.linear(hidden, weight).to(hidden.dtype)
    place = targets.where(counted, 0).unsqueeze(1)
    needed = by_hidden is not None or by_weight is not None
    loss = torch.stack(
        [
            _rows_measured(logits[part], place[part], counted[part], needed)
            for part in _parts(len(hidden), _rows_at_once(logits))
        ]
    ).sum()
    if not needed:
        return loss
    # rows that do not count are left out where they are short
    if by_hidden is not None:
        by_hidden.copy_((logits @ weight).where(counted.unsqueeze(1), 0.0))
    if by_weight is not None:
        kept = hidden.where(counted.unsqueeze(1), 0.0)
        _add_product(by_weight, logits.T, kept)
    return loss


def _parts(num: int, at_once: int) -> list[slice]:
    return [slice(at, at + at_once) for at in range(0, num, at_once)]


def _rows_at_once(logits: Tensor) -> int:
    """Return how many rows are wide together: on a device, all, in one launch."""
    if logits.device.type != "cpu":
        return len(logits)
    return max(1, _WIDE_AT_ONCE // logits.shape[1])


def _rows_measured(
    logits: Tensor, place: Tensor, counted: Tensor, needed: bool
) -> Tensor:
    """Return the sum of the losses of rows; leave their gradient in their place.

    Args:
        logits: `[R, V]`.
        place: `[R, 1]`, which of them is right.
        counted: `[R]`, whether a row counts.
        needed: Whether there shall be a gradient.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32)).log_softmax(1)
    loss = -wide.gather(1, place).squeeze(1).where(counted, 0.0).sum()
    if needed:
        wide.exp_().scatter_add_(1, place, wide.new_full(place.shape, -1.0))
        logits.copy_(wide)
    return loss


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add a product to a sum that may be wider, a block of rows at a time."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
        return
    for part in _parts(len(total), max(1, _ADDED_AT_ONCE // total.shape[1])):
        total[part] += left[part] @ right
