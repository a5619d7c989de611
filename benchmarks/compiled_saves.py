"""Saves of generated kernels: bytes, gradient error and time of each way, side by side.

A transformer language model (width 256, 2 layers by default) makes a forward and a
backward in turns, every way compiled by Inductor in one process:

    torch.compile               alone, or within torch.autocast: what is compared with
    again                       the same once more, which shows what differences mean
    plan                        castwise.compile, saves as they are
    fp16, bf16, int8            castwise.compile(saves=...)
    torch fp16, torch fp8_e5m2  torch's own pass for saved activations (an option of
                                Inductor), a scale for each row: the rival

`held` is what autograd holds between forward and backward, weights and tokens left out;
`peak` is the most that the CPU allocator handed out within a step, by the profiler.
Errors are against the same model in float64. Times are CPU seconds of the process:
ratios of medians, with the quartiles of the paired ratios.

    OMP_NUM_THREADS=1 python benchmarks/compiled_saves.py --page \
        --json docs/accepted/compiled_saves.json
    python benchmarks/compiled_saves.py --turns 2 --width 64
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch._dynamo.config as dynamo_config
import torch._functorch.config as functorch_config
import torch._inductor.config as inductor_config
from allocator import most_allocated
from autocast import keep_blocks
from page_tables import filled
from saves import table_of_saves
from small_lm import LanguageModel, draw_tokens, head_of_record, token_loss
from torch import Tensor, nn

import castwise as cw

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

PAGE = Path(__file__).parents[1] / "docs" / "memory.md"
RIVALS_OPTION = "activation_quantization_aten_pass"
OPTIONS = {"torch fp16": "torch.float16", "torch fp8_e5m2": "torch.float8_e5m2"}
WAYS = ("again", "plan", "fp16", "bf16", "int8", *OPTIONS)


class Way:
    """A model compiled in one way, and its steps."""

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, low: bool) -> None:
        self.model, self.x, self.y, self.low = model, x, y, low
        self.run: Callable[[Tensor], Tensor] = model
        self.seconds: list[float] = []

    def compiled(self, name: str) -> Way:
        """Compile it; kernels are generated at the first step."""
        if name in {"plan", "fp16", "bf16", "int8"}:
            policy = "bf16-mixed" if self.low else "32-true"
            saves = None if name == "plan" else name
            self.run = cw.compile(self.model, policy, saves=saves)
        else:
            self.run = torch.compile(self.model, backend=inductor(OPTIONS.get(name)))
        self.step()
        return self

    def loss(self) -> Tensor:
        """One forward."""
        with torch.autocast("cpu", torch.bfloat16, enabled=self.low):
            return token_loss(self.run(self.x), self.y)

    def step(self) -> None:
        """One forward and backward."""
        self.loss().backward()
        self.model.zero_grad(set_to_none=True)

    def timed_step(self) -> None:
        """One more of them, with its CPU seconds."""
        start = time.process_time()
        self.step()
        self.seconds.append(time.process_time() - start)

    def gradient(self) -> Tensor:
        """All gradients of one step, as one vector."""
        self.loss().backward()
        found = [weight.grad.flatten() for weight in self.model.parameters()]
        self.model.zero_grad(set_to_none=True)
        return torch.cat(found).double()

    def held_bytes(self) -> int:
        """What autograd holds for the backward of the model."""
        standing = {
            tensor.untyped_storage()._cdata  # noqa: SLF001 -- no public name
            for tensor in (*self.model.parameters(), self.x)
        }
        found: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in standing:  # noqa: SLF001 -- as above
                found[storage._cdata] = storage.nbytes()  # noqa: SLF001 -- as above
            return tensor

        with (
            torch.autocast("cpu", torch.bfloat16, enabled=self.low),
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        ):
            self.run(self.x)
        return sum(found.values())


def inductor(fmt: str | None) -> Callable[..., Any]:
    """Inductor as a backend of its own, whose code no other way takes for its own."""
    from torch._inductor.compile_fx import compile_fx  # noqa: PLC0415 -- loads a lot

    options = {
        "quant_type": fmt,
        "allowed_dtypes": "torch.float32;torch.bfloat16",
        "size_in_mb": 0.004,
        "use_scaling": True,
        "exclude_primals": True,
    }
    stored = {"post_grad_fusion_options": {RIVALS_OPTION: options}}
    uncached = {"fx_graph_cache": False}  # the pass takes no part in the cache's key

    def compile_(module: Any, inputs: list[Any]) -> Any:
        with (
            inductor_config.patch(stored | uncached if fmt else {}),
            functorch_config.patch(enable_autograd_cache=fmt is None),
        ):
            return compile_fx(module, inputs)

    return compile_


def measure(args: argparse.Namespace, *, low: bool) -> dict[str, dict[str, Any]]:
    """Every way beside torch.compile."""
    torch.manual_seed(0)
    model = LanguageModel(args.width, args.depth)
    x, y = draw_tokens(args.batch, args.length)
    exact = Way(copy.deepcopy(model).double(), x, y, low=False).gradient()
    base = "torch.autocast" if low else "fp32"
    ways, failed = {}, {}
    for name in (base, *WAYS):
        way = Way(copy.deepcopy(model), x, y, low=low)
        try:
            ways[name] = way.compiled(name)
        except Exception as error:
            if not name.startswith("torch "):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
    for turn in range(args.turns + 2):
        for name in list(ways)[:: 1 - turn % 2 * 2]:
            ways[name].timed_step()
        gc.collect()
    return {
        **{name: row(name, way, ways[base], exact) for name, way in ways.items()},
        **{name: {"failed": why} for name, why in failed.items()},
    }


def row(name: str, way: Way, base: Way, exact: Tensor) -> dict[str, Any]:
    """What one way came to."""
    seconds, others = way.seconds[2:], base.seconds[2:]
    found: dict[str, Any] = {
        "held_mb": way.held_bytes() / 1e6,
        "peak_mb": most_allocated(way.step) / 1e6,
        "error": float((way.gradient() - exact).norm() / exact.norm()),
        "milliseconds": 1e3 * statistics.median(seconds),
    }
    if way is not base:
        ratios = [a / b for a, b in zip(seconds, others, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found |= {
            "time_ratio": statistics.median(seconds) / statistics.median(others),
            "lower_quartile": low,
            "upper_quartile": high,
        }
    print(name, {key: f"{value:.4g}" for key, value in found.items()}, flush=True)
    return found


def table(record: Mapping[str, Any]) -> str:
    """The table of the page."""
    base = "as torch.compile"
    names = {"fp32": base, "torch.autocast": base, "plan": "as the plan"}
    return table_of_saves(record, names)


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", action="store_true", help="write docs/memory.md")
    args = parser.parse_args()
    keep_blocks()
    dynamo_config.recompile_limit = 64  # each way compiles the same functions
    torch.set_num_threads(args.threads)
    record: dict[str, Any] = head_of_record(args)
    for low, name in ((False, "fp32"), (True, "bf16")):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Inductor warns of formats that it mixes
            record[name] = measure(args, low=low)
    print(table(record))
    if args.json is not None:
        args.json.write_text(json.dumps(record, indent=1) + "\n")
    if args.page:
        PAGE.write_text(filled(PAGE.read_text(), {"compiled_saves": table(record)}))


if __name__ == "__main__":
    main()
