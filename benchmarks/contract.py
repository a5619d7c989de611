"""What a contract run costs beside the training step that it proves.

    python benchmarks/contract.py

A 4-layer transformer of width 256, forward and backward in a bf16 region, with and
without the witness, in turns in one process; ratios of medians of CPU time.
"""

from __future__ import annotations

import statistics
import time

import torch
from torch import nn

from castwise.islands import apply_policy, module_facts
from castwise.numerics.contract import contract, prove
from castwise.policy import preset
from castwise.region import Region

NUM_TURNS = 15


def transformer() -> nn.Module:
    """Four layers of width 256."""
    layer = nn.TransformerEncoderLayer(256, 4, 1024, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 4, enable_nested_tensor=False)


def loss_fn(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean square."""
    return nn.functional.mse_loss(output, target)


def seconds(call: object) -> float:
    """CPU time of one call."""
    start = time.process_time()
    assert callable(call)
    call()
    return time.process_time() - start


def main() -> None:
    """Print one row for each shape."""
    policy = preset("bf16-mixed")
    for num_rows, length in ((4, 256), (1, 64)):
        model = transformer()
        x = torch.randn(num_rows, length, 256)
        y = torch.randn(num_rows, length, 256)
        applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
        region = Region.of(policy, "full", (applied,))

        def step(
            model: nn.Module = model,
            region: Region = region,
            x: torch.Tensor = x,
            y: torch.Tensor = y,
        ) -> None:
            with region.entered("cpu"):
                loss = loss_fn(model(x), y)
            loss.backward()  # type: ignore[no-untyped-call]

        proof = prove(step, model, applied).check()
        plain, proved = [], []
        for _ in range(NUM_TURNS):
            plain.append(seconds(step))
            proved.append(
                seconds(lambda: prove(step, model, applied))  # noqa: B023 -- called at once
            )
        applied.remove()
        model.zero_grad()
        whole = min(
            seconds(lambda: contract(model, [(x, y)], loss_fn, policy))  # noqa: B023 -- called at once
            for _ in range(3)
        )
        count = sum(run.num_calls for run in proof.operators)
        unproved, under_proof = map(statistics.median, (plain, proved))
        print(
            f"B{num_rows} T{length}: step {1e3 * unproved:.1f} ms, proved "
            f"{1e3 * under_proof:.1f} ms, ratio {under_proof / unproved:.2f}, "
            f"{count} operators, {1e6 * (under_proof - unproved) / count:.0f} us each; "
            f"contract() as a whole {1e3 * whole:.1f} ms"
        )


if __name__ == "__main__":
    main()
