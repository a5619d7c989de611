"""Cross-entropy of a large vocabulary without its logits: chunk by chunk of tokens.

The logits of a language model, tokens times vocabulary, are the largest tensor of its
step by far, and three of them live at once: the logits, their log-softmax, and its
gradient. Here a chunk of tokens is multiplied, measured and differentiated before the
next one is looked at; what stays is the gradient of the hidden states and of the head,
which the backward only scales.

    loss = -1/M sum_n log softmax(h_n W^T)[t_n]         over the M tokens that count
    dL/dlogits_n = (softmax(h_n W^T) - onehot(t_n)) / M

No product is computed twice: three per chunk, as without chunks. Logits are reduced in
fp32 whatever they were computed in, sums over chunks are kept in fp32, and the division
by M comes last, so that fp16 products see numbers of size 1 and a loss scale scales the
gradient by exactly its factor. What autocast does to a matrix product it does here.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from castwise.errors import SettingsError

IGNORED = -100
"""A target that does not count."""

LEAST_CHUNK = 256
"""Tokens below which reading the head outweighs multiplying by it."""


def chunk_of(num_tokens: int, dim: int, vocab_size: int) -> int:
    """Return how many tokens a chunk takes: its logits weigh as much as all hiddens."""
    even = -(-num_tokens * dim // vocab_size)
    return max(LEAST_CHUNK, 1 << (even - 1).bit_length() if even > 1 else 1)


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
    size = chunk or chunk_of(len(rows), rows.shape[1], len(weight))
    needed = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    loss = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        rows, weight, targets.reshape(-1), size, ignored, needed
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
        size: int,
        ignored: int,
        needed: bool,
    ) -> Tensor:
        wide = torch.promote_types(
            torch.promote_types(hidden.dtype, weight.dtype), torch.float32
        )
        low = _format_of_products(hidden, weight)
        head = weight.to(low)  # once, and not in every chunk
        counted = targets != ignored
        num_counted = counted.sum()
        total = torch.zeros((), dtype=wide, device=hidden.device)
        by_hidden = by_weight = None
        if needed and ctx.needs_input_grad[0]:
            by_hidden = torch.empty_like(hidden, dtype=wide)
        if needed and ctx.needs_input_grad[1]:
            by_weight = torch.zeros_like(weight, dtype=wide)
        for at in range(0, len(hidden), size):
            part = slice(at, at + size)
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
        by_hidden, by_weight, num_counted = ctx.saved_tensors
        if by_hidden is not None:
            by_hidden = (by_hidden * (grad / num_counted)).to(ctx.formats[0])
        if by_weight is not None:
            by_weight = (by_weight * (grad / num_counted)).to(ctx.formats[1])
        return by_hidden, by_weight, None, None, None, None


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
    logits = torch.nn.functional.linear(hidden, weight)
    logits = logits.to(torch.promote_types(hidden.dtype, torch.float32))
    place = targets.where(counted, 0).unsqueeze(1)
    logits = logits.log_softmax(1)
    loss = -logits.gather(1, place).squeeze(1).where(counted, 0.0).sum()
    if by_hidden is None and by_weight is None:
        return loss
    # from here on `logits` is the gradient by the logits, in their place
    logits.exp_().scatter_add_(1, place, -torch.ones_like(place, dtype=logits.dtype))
    error = logits.to(hidden.dtype)
    del logits  # in 16 bits the products need this room more
    # rows that do not count are left out where they are short
    if by_hidden is not None:
        by_hidden.copy_((error @ weight).where(counted.unsqueeze(1), 0.0))
    if by_weight is not None:
        kept = hidden.where(counted.unsqueeze(1), 0.0)
        if error.dtype == by_weight.dtype:
            by_weight.addmm_(error.T, kept)
        else:
            by_weight.add_(error.T @ kept)
    return loss
