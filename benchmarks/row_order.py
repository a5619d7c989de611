"""How fast a last bit grows in training: the same rows in another order, step by step.

    python benchmarks/row_order.py

Two runs of resolvent_lm (the default model, AdamW, 8 windows of 64 bytes of the README)
differ in the order of their rows alone, so their sums differ in the last bit. What
grows in fp32 and in fp64 alike, from 1e-7 here and from 1e-16 there, is the model's
own; what grew in fp32 alone would be a loss of digits somewhere.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

import torch
from torch import Tensor, nn

from castwise.recipes.resolvent_lm.model import build_model
from castwise.recipes.resolvent_lm.settings import ResolventSettings

README = Path(__file__).parents[1] / "README.md"
ROWS, LENGTH = 8, 64


def batch(text: Tensor, step: int, *, turned: bool) -> tuple[Tensor, Tensor]:
    """Windows of the text and what follows, in one order or the other."""
    drawn = torch.Generator().manual_seed(step)
    starts = torch.randint(len(text) - LENGTH - 1, (ROWS,), generator=drawn)
    if turned:
        starts = starts.roll(3).flip(0)
    windows = torch.stack([text[start : start + LENGTH + 1] for start in starts])
    return windows[:, :-1], windows[:, 1:]


def train(
    base: nn.Module, text: Tensor, steps: int, *, turned: bool
) -> list[tuple[float, Tensor]]:
    """Loss and gradient of each step."""
    model = copy.deepcopy(base)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    found = []
    for step in range(steps):
        x, y = batch(text, step, turned=turned)
        loss = nn.functional.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        gradient = torch.cat([w.grad.flatten().double() for w in model.parameters()])
        found.append((loss.item(), gradient))
    return found


def main() -> None:
    """Print by format how far losses and gradients are apart after each step."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    text = torch.tensor(list(README.read_bytes()))
    torch.manual_seed(0)
    base = build_model(ResolventSettings(), 256, LENGTH)
    print("| step | " + " | ".join(f"{f}: loss, gradient" for f in ("fp32", "fp64")))
    columns = []
    for dtype in (torch.float32, torch.float64):
        one, other = (
            train(copy.deepcopy(base).to(dtype), text, asked.steps, turned=turned)
            for turned in (False, True)
        )
        columns.append(
            [
                f"{abs(a - b):.1e}, {((g - h).norm() / g.norm()).item():.1e}"
                for (a, g), (b, h) in zip(one, other, strict=True)
            ]
        )
    for step, cells in enumerate(zip(*columns, strict=True), start=1):
        print(f"| {step} | " + " | ".join(cells))


if __name__ == "__main__":
    main()
