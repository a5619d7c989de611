"""Which device a run uses, and why."""

from __future__ import annotations

import torch

from castwise.decision import Decision
from castwise.errors import SettingsError


def choose_device(asked: str) -> Decision[torch.device]:
    """Return the device that a flag names.

    Args:
        asked: `auto`, `cpu`, `cuda` or `cuda:N`.

    Raises:
        SettingsError: If the text names no device, or one that is not there.
    """
    if asked == "auto":
        if torch.cuda.is_available():
            name = torch.cuda.get_device_name()
            return Decision(torch.device("cuda"), f"auto: {name} is there")
        return Decision(torch.device("cpu"), "auto: no CUDA device is there")
    try:
        device = torch.device(asked)
    except RuntimeError as error:
        raise SettingsError(
            f"--device needs auto, cpu, cuda or cuda:N, got {asked!r}; use one of "
            "these."
        ) from error
    if device.type == "cpu":
        return Decision(device, f"--device {asked}")
    if device.type != "cuda":
        raise SettingsError(
            f"--device knows cpu and cuda, got {asked!r}; use one of these."
        )
    if (
        not torch.cuda.is_available()
        or (device.index or 0) >= torch.cuda.device_count()
    ):
        raise SettingsError(
            f"--device {asked} needs a CUDA device, and "
            f"{torch.cuda.device_count()} are there; use --device cpu."
        )
    return Decision(device, f"--device {asked}")
