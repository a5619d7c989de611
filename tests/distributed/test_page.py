from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import torch

from shared_net import ROWS, net, policy_of
from two_ranks import TwoRanks

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"


def played(rank: int, folder: str) -> list[Any]:
    """Run the blocks of the page, each with a model of its own."""
    os.chdir(folder)
    found = []
    for code in re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL):
        model = net()
        names: dict[str, Any] = {
            "torch": torch,
            "model": model,
            "policy": policy_of("bf16-mixed fp32"),
            "optimizer": torch.optim.AdamW(model.parameters()),
            "loss_fn": torch.nn.functional.mse_loss,
            "loader": [(ROWS[rank], torch.zeros(3, 3))] * 2,
        }
        exec("import castwise as cw\n" + code, names)  # noqa: S102 -- our own page
        found.append(names["run"].num_stepped)
    return found


def test_the_code_of_the_page_runs(two_ranks: TwoRanks, tmp_path: Path) -> None:
    """On two processes, as a reader would paste it."""
    policy_of("bf16-mixed fp32").save(tmp_path / "policy.yaml")
    assert two_ranks(played, str(tmp_path)) == ([2, 2, 2], [2, 2, 2])
