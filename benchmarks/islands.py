"""What islands, backwards of their own and emulated fp8 cost, in one process.

A training step (forward and backward) of four linear layers in bf16, of which the two
in the middle are held otherwise, in turns. The rivals are the same model without a
rule, and the middle in fp64 altogether, the plain way to gradients in fp64. Times are
CPU seconds of one thread; printed is the fastest of several turns, and its ratio to
that of the model without a rule.

    python benchmarks/islands.py
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

from castwise.islands import apply_policy, module_facts
from castwise.policy import Policy, preset
from castwise.region import Region

MIXED = preset("bf16-mixed")
POLICIES: dict[str, Policy] = {
    "no rule": MIXED,
    "fp32 island": MIXED.with_rule(module="1", precision="p=fp32,c=fp32"),
    "fp64 island over fp32 weights": MIXED.with_rule(module="1", precision="c=fp64"),
    "backward in fp32": MIXED.with_rule(module="1", stage="backward", precision="fp32"),
    "backward in fp64": MIXED.with_rule(module="1", stage="backward", precision="fp64"),
    "fp8, emulated": MIXED.with_rule(module="1", precision="c=fp8_e4m3"),
}
NUM_TURNS = 9


def build(policy: Policy, width: int, rows: int) -> Callable[[], None]:
    """A model with its policy, as one training step."""
    torch.manual_seed(0)
    middle = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))
    model = nn.Sequential(nn.Linear(width, width), middle, nn.Linear(width, width))
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    region = Region.of(policy, "full", (applied,))
    x = torch.randn(rows, width)

    def step() -> None:
        with region.entered("cpu"):
            loss = model(x).float().sum()
        loss.backward()

    return step


def main() -> None:
    """Measure in turns, and print a table."""
    torch.set_num_threads(1)
    for width, rows, num_steps in ((8, 4, 100), (256, 1024, 3)):
        steps = {name: build(each, width, rows) for name, each in POLICIES.items()}
        best = dict.fromkeys(steps, float("inf"))
        for _ in range(NUM_TURNS):
            for name, step in steps.items():
                start = time.process_time()
                for _ in range(num_steps):
                    step()
                elapsed = (time.process_time() - start) / num_steps
                best[name] = min(best[name], elapsed)
        print(f"width {width}, {rows} rows")
        for name, seconds in best.items():
            ratio = seconds / best["no rule"]
            print(f"  {name:<32}{1e3 * seconds:8.2f} ms  x{ratio:.2f}")


if __name__ == "__main__":
    main()
