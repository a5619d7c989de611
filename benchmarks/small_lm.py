"""A small language model whose steps are weighed, and how: bytes, times, records.

`saves.py` and `recompute.py` ask what a step holds and how long it takes in one way or
another. What they have in common stands here: the model, with torch's own checkpoints
as a rival written into it; the bytes of a step, each storage counted; the time of a
step with a way over that of its neighbour without.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import platform
import time
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.memory.lifetimes import Ledger, Lifetimes

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable, Iterator

    Way = Callable[[], contextlib.AbstractContextManager[Any]]

VOCABULARY = 101


class Block(nn.Module):
    """Pre-norm attention and a multilayer perceptron."""

    def __init__(self, width: int, dropout: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        """Add attention, then the perceptron."""
        heads = self.into(self.norm1(x)).unflatten(-1, (3, 4, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4).unbind(0)
        heard = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + F.dropout(self.out(heard.transpose(1, 2).flatten(-2)), self.dropout)
        return x + F.dropout(self.down(F.gelu(self.up(self.norm2(x)))), self.dropout)


class LanguageModel(nn.Module):
    """Embedding, blocks, head."""

    def __init__(self, width: int, depth: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, width)
        self.blocks = nn.ModuleList(Block(width, dropout) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)
        self.checkpoints = False

    def forward(self, tokens: Tensor) -> Tensor:
        """Rate the next token everywhere."""
        x = self.table(tokens)
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.head(self.norm(x))


def draw_tokens(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Tokens, and those that follow them."""
    tokens = torch.randint(VOCABULARY, (batch, length + 1))
    return tokens[:, :-1], tokens[:, 1:]


def token_loss(logits: Tensor, wanted: Tensor) -> Tensor:
    """Cross-entropy over all places."""
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten())


@contextlib.contextmanager
def torch_checkpoints(model: LanguageModel) -> Iterator[None]:
    """The rival of recompute: written into the model."""
    model.checkpoints = True
    try:
        yield
    finally:
        model.checkpoints = False


def lifetimes_of(
    model: nn.Module, batch: Any, loss: Callable[[], Tensor]
) -> tuple[Lifetimes, int]:
    """Make a step; return all that it held, and what stood there before."""
    model.zero_grad(set_to_none=True)
    ledger = Ledger(model)
    for weight in model.parameters():
        ledger.name(weight, kind="weights")
    ledger.name_all(batch, kind="batch")
    with ledger:
        found = loss()
        ledger.begin("backward")
        found.backward()
    del found
    model.zero_grad(set_to_none=True)
    lifetimes = ledger.lifetimes()
    return lifetimes, lifetimes.curve()[0]


def time_ratio(step: Callable[[], Any], way: Way, turn: int) -> float:
    """CPU time of a step over that of its neighbour without, in alternating order."""
    times: dict[bool, float] = {}
    for with_way in (True, False)[:: 1 - turn % 2 * 2]:
        with way() if with_way else contextlib.nullcontext():
            step()  # warm caches of this way
            start = time.process_time()
            step()
            times[with_way] = time.process_time() - start
    return times[True] / times[False]


def head_of_record(args: argparse.Namespace) -> dict[str, Any]:
    """When, with what and how something was measured."""
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "torch": str(torch.__version__),
        "castwise": cw.__version__,
        "python": platform.python_version(),
        "settings": {
            name: value
            for name, value in vars(args).items()
            if isinstance(value, int | float)
        },
    }
