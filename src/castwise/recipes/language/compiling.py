"""Whether a language model is compiled, and which parts of it."""

from __future__ import annotations

import torch
from torch import nn

from castwise.decision import Decision


def compile_decision(asked: str, device: torch.device) -> Decision[bool]:
    """Decide whether to compile.

    Args:
        asked: yes, no or auto.
        device: Where the model runs.
    """
    if asked != "auto":
        return Decision(asked == "yes", f"training.compile is {asked}")
    if device.type == "cuda":
        return Decision(True, "auto: a GPU waits for kernels that are launched singly")
    return Decision(False, "auto: on a CPU compiling takes longer than it saves")


def compile_blocks(model: nn.Module) -> None:
    """Compile every block where it stands: names and islands stay as they are."""
    for module in model.modules():
        if type(module).__name__.endswith("Block"):
            module.compile()
