"""Steps that are skipped, and what the run says about each of them.

    python examples/skip_forensics.py

A small network in fp16 makes four different mistakes, one after the other. The loop is
that of any user; nothing in it asks for an explanation.
"""

from __future__ import annotations

import torch
from torch import nn

import castwise as cw


class Energy(nn.Module):
    """Weighs its inputs by a Boltzmann factor."""

    def __init__(self) -> None:
        super().__init__()
        self.sharpness = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x, weighed."""
        weight = torch.exp(self.sharpness * x.square())
        return x * weight / (1 + weight)


MISTAKES = (
    "a loss scale that is too high",
    "a range that is too wide",
    "a logarithm of 0",
    "a root of 0",
)


def make(mistake: str) -> cw.Run:
    """Prepare a run that is going to make a mistake."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), Energy(), nn.Linear(65, 1))
    model[1].sharpness = 90.0 if mistake == MISTAKES[1] else 1.0
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    scale = cw.DynamicScale(initial=2.0**24 if mistake == MISTAKES[0] else 2.0**10)
    return cw.prepare(model, optimizer, cw.preset("16-mixed"), loss_scale=scale)


def one_step(run: cw.Run, mistake: str) -> cw.Stepped | cw.Skipped:
    """Make one step, as any loop makes it."""
    x = torch.randn(64, 33)
    y = x.sum(dim=1, keepdim=True)
    with run.step() as step:
        error = run.model(x).float() - y
        loss = error.square().mean()
        if mistake == MISTAKES[2]:
            loss = loss + torch.log(error.detach() * 0).mean() * error.mean()
        if mistake == MISTAKES[3]:
            loss = loss + (0 * error).square().sum().sqrt()
        step.backward(loss)
    return step.outcome


def main() -> None:
    """Make each mistake once; then let the first run find its scale."""
    for mistake in MISTAKES:
        outcome = one_step(make(mistake), mistake)
        assert isinstance(outcome, cw.Skipped)
        print(f"{mistake}:\n  {outcome.because}")

    run = make(MISTAKES[0])
    while isinstance(one_step(run, MISTAKES[0]), cw.Skipped):
        pass
    print(f"\nfinite at loss scale {run.loss_scale.scale:g}; skipped before:")
    for cause, count in run.history.causes.items():
        print(f"  {count} x {cause}")


if __name__ == "__main__":
    main()
