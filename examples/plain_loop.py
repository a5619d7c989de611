"""Mixed precision in a training loop of one's own, with an island in fp32.

    python examples/plain_loop.py

A small network learns to add up numbers of very different sizes. It runs in bf16; the
module that sums must not, so a rule holds it in fp32. The model's code knows nothing of
either. Runs in a few seconds on a CPU.
"""

from __future__ import annotations

import torch
from torch import nn

import castwise as cw

POLICY = """
castwise: 1
name: sums in fp32
default: p=fp32,c=bf16,o=bf16,r=fp32
rules:
  - type: RunningSum
    precision: p=fp32,c=fp32
    because: bf16 adds nothing to a sum that is 256 times larger
"""


class RunningSum(nn.Module):
    """Sums with learned weights, one number after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the sum of the last dimension."""
        total = torch.zeros_like(x[..., :1])
        for term in (x * self.weight).unbind(-1):
            total = total + term[..., None]
        return total


def main(num_steps: int = 60) -> float:
    """Train; return the last loss."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 65), nn.GELU(), RunningSum(65))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    run = cw.prepare(model, optimizer, cw.Policy.parse(POLICY), clip_norm=1.0)
    print(run.precision.summary())

    for step_number in range(num_steps):
        x = torch.randn(256, 33)
        y = x.sum(dim=1, keepdim=True)
        with run.step() as step:
            for half_x, half_y in zip(x.chunk(2), y.chunk(2), strict=True):
                loss = nn.functional.mse_loss(model(half_x), half_y) / 2
                step.backward(loss)  # gradients of both halves add up
        if isinstance(step.outcome, cw.Skipped):
            print(f"step {step_number} skipped: {step.outcome.because}")
        elif step_number % 20 == 0:
            print(
                f"step {step_number:3d}  loss {step.outcome.loss:8.4f}  "
                f"gradient norm {step.outcome.gradient_norm:7.3f}"
            )

    with run.inference():
        x = torch.randn(1024, 33)
        error = nn.functional.mse_loss(model(x).float(), x.sum(dim=1, keepdim=True))
    print(f"held-out mean squared error {error:.4f}, of a variance of 33")
    run.remove()  # the model is plain again
    return error.item()


if __name__ == "__main__":
    main()
