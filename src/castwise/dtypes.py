"""The border between format names and torch dtypes, and what a device can do.

`supports` asks the device itself, by a product small enough to cost nothing, instead of
believing a list. It changes no global switch of torch, and remembers its answers.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch

from castwise.decision import Decision
from castwise.errors import FormatError, UnsupportedFormatError
from castwise.formats import FORMATS, parse_format

if TYPE_CHECKING:
    from castwise.formats import Format

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}
"""Every storable format and its dtype; tf32 has none."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def dtype_of(fmt: str | Format) -> torch.dtype:
    """Return the dtype that holds a format.

    Raises:
        UnsupportedFormatError: No tensor can be held in it.
    """
    name = parse_format(fmt).name
    if name not in DTYPES:
        raise UnsupportedFormatError(
            f"no tensor is held in {name}, which exists only inside matrix units; hold "
            f"fp32 and compute in {name}"
        )
    return DTYPES[name]


def format_of(dtype: torch.dtype) -> str:
    """Return the name of the format that a dtype holds.

    Raises:
        FormatError: The dtype holds none of the formats.
    """
    if dtype not in _NAMES:
        raise FormatError(
            f"need a dtype of one of the formats {', '.join(DTYPES)}; got {dtype}"
        )
    return _NAMES[dtype]


def supports(device: str | torch.device, fmt: str | Format) -> Decision[bool]:
    """Say whether a device computes in a format, and why or what to do instead."""
    name = parse_format(fmt).name
    try:
        return _supports(str(torch.device(device)), name)
    except RuntimeError as error:
        return Decision(False, f"torch knows no device {device}: {_first_line(error)}")


@cache
def _supports(device: str, name: str) -> Decision[bool]:
    if name == "tf32":
        return _supports_tf32(torch.device(device))
    if FORMATS[name].bits <= 8:
        return Decision(
            False,
            f"products in {name} are emulated by rounding, in bf16 or fp32; store in "
            f"{name}, and compute in bf16",
        )
    failure = _failure_of_product(torch.device(device), DTYPES[name])
    if failure is not None:
        return Decision(False, f"a product in {name} on {device} fails: {failure}")
    if name == "fp16" and device == "cpu":
        return Decision(
            True,
            "fp16 products run on the cpu, slowly; bf16 has the range of fp32 and is "
            "faster there",
        )
    if name == "bf16" and device.startswith("cuda") and _capability(device) < (8, 0):
        return Decision(
            True,
            f"bf16 products run on {device}, emulated and slowly: matrix units for "
            "bf16 begin with compute capability 8.0",
        )
    return Decision(True, f"a product in {name} on {device} ran and was right")


def _supports_tf32(device: torch.device) -> Decision[bool]:
    """Ask for the kind of device: a product would need a global switch of torch."""
    if device.type != "cuda":
        return Decision(
            False,
            f"tf32 exists only in the matrix units of CUDA devices, not on {device}; "
            "compute in fp32",
        )
    failure = _failure_of_product(device, torch.float32)
    if failure is not None:
        return Decision(False, f"a product in fp32 on {device} fails: {failure}")
    capability = _capability(device)
    if capability < (8, 0):
        return Decision(
            False,
            f"tf32 needs compute capability 8.0, and {device} has "
            f"{capability[0]}.{capability[1]}; compute in fp32",
        )
    return Decision(
        True, f"{device} has compute capability {capability[0]}.{capability[1]}"
    )


def _capability(device: torch.device | str) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _failure_of_product(device: torch.device, dtype: torch.dtype) -> str | None:
    """Run [[1, 2], [3, 4]] squared; return what went wrong, if anything."""
    try:
        with torch.no_grad():
            left = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=dtype, device=device)
            with torch.autocast(device.type, enabled=False):
                product = left @ left
        got = product.double().cpu().tolist()
    except (RuntimeError, AssertionError, TypeError) as error:
        return _first_line(error)  # AssertionError: a torch built without CUDA
    expected = [[7.0, 10.0], [15.0, 22.0]]
    return None if got == expected else f"it gave {got} for {expected}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
