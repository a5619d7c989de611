"""Matrix products in true fp32, whatever the process-wide switches say.

`set_float32_matmul_precision` and `fp32_precision` let a GPU multiply fp32 matrices in
TF32 and a CPU in bf16: "fp32" then has 8 to 11 bits. The switches are read when a
product starts, in the forward and again in the backward, so a layer that needs its
digits opens this region in both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_backends: Any = torch.backends  # its settings carry no types


@contextmanager
def ieee_products(device_type: str) -> Iterator[None]:
    """Leave autocast and hold the product switches at IEEE; restore them at the end."""
    switches = (_backends.cuda.matmul, _backends.mkldnn.matmul)
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "ieee"
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value
