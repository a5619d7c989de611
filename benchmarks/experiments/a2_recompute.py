"""A2: recompute makes the peak of a step smaller, and changes no gradient.

Bytes are counted where they are made: a dispatch mode hears every storage that an
operator returns and when it dies, on any device and without an allocator's rounding.
Times are CPU seconds of one thread, arms in turns. Dropout is on: a block that drew
other random numbers when it ran again would have other gradients, which the control,
a recompute that does not restore the random state, shows.
"""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar, Self, final

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from castwise.memory.recompute import recompute
from experiments.contract import Check, Experiment, Results
from experiments.statistics import bootstrap_median, estimate

WIDTH, NUM_LAYERS, LENGTH, BATCH, NUM_TURNS = 128, 8, 64, 16, 9
EVERY = (1, 2, 4)


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of living storages that operators made; keeps the highest."""

    def __init__(self, known: nn.Module) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._living: dict[int, weakref.ref[Any]] = {}
        self._known = {p.untyped_storage()._cdata for p in known.parameters()}  # noqa: SLF001 -- the only name of a storage that views share

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run the operator and look at what it returned."""
        out = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._see(leaf.untyped_storage())
        return out

    def _see(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()  # noqa: SLF001 -- see above
        if key in self._living or key in self._known:
            return
        self.now += size
        self.peak = max(self.peak, self.now)
        self._living[key] = weakref.ref(storage, self._forget(key, size))

    def _forget(self, key: int, size: int) -> Callable[[Any], None]:
        def gone(_: Any) -> None:
            self._living.pop(key, None)
            self.now -= size

        return gone

    def __enter__(self) -> Self:
        """Begin to count."""
        super().__enter__()
        return self


class Layer(nn.Module):
    """A pre-norm transformer block with dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, WIDTH]."""
        b, t, _ = x.shape
        parts = self.qkv(self.norm(x)).view(b, t, 3, 8, WIDTH // 8)
        q, k, v = parts.permute(2, 0, 3, 1, 4)
        shares = self.drop((q @ k.transpose(-1, -2) * 0.25).softmax(dim=-1))
        x = x + self.drop(self.out((shares @ v).transpose(1, 2).reshape(b, t, WIDTH)))
        hidden = nn.functional.gelu(self.up(self.other_norm(x)))
        return x + self.drop(self.down(hidden))


class Stack(nn.Module):
    """Layers one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(NUM_LAYERS))
        self.forgets_draws = False

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, T, WIDTH]."""
        for layer in self.layers:
            if self.forgets_draws:
                x = checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False)
            else:
                x = layer(x)
        return x


@final
class Recompute(Experiment):
    """All blocks, every second and every fourth, beside none."""

    name = "A2"
    question = "How much smaller is the peak of a step under recompute, at what price?"
    arms = ("turns",)
    num_seeds = 3
    settings: ClassVar[Mapping[str, Any]] = {
        "shape": [WIDTH, NUM_LAYERS, LENGTH, BATCH],
        "turns": NUM_TURNS,
        "every": list(EVERY),
    }

    def run(self, arm: str, seed: int) -> dict[str, Any]:
        """Measure every arm on the same model and batch, in turns."""
        del arm
        torch.manual_seed(seed)
        model, batch = Stack(), torch.randn(BATCH, LENGTH, WIDTH)
        kept = _gradients(model, batch, seed)
        ways: dict[str, Callable[[], AbstractContextManager[Any]]] = {
            "kept": nullcontext
        }
        for every in EVERY:
            ways[f"every {every}"] = lambda every=every: recompute(model, every=every)
        measured: dict[str, Any] = {}
        for name, way in ways.items():
            with way(), LiveBytes(model) as bytes_of:
                found = _gradients(model, batch, seed)
            measured[name] = {"peak": bytes_of.peak, "apart": _apart(found, kept)}
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(NUM_TURNS):
            for name, way in ways.items():
                with way():
                    began = time.process_time()
                    _gradients(model, batch, seed)
                    times[name].append(time.process_time() - began)
        for name, seconds in times.items():
            ratios = [s / k for s, k in zip(seconds, times["kept"], strict=True)]
            measured[name] |= {"seconds": statistics.median(seconds), "ratios": ratios}
        model.forgets_draws = True
        measured["control"] = {"apart": _apart(_gradients(model, batch, seed), kept)}
        return measured

    def judge(self, results: Results, limits: Mapping[str, float]) -> list[Check]:
        """Compare peaks, gradients and times with keeping everything."""
        runs = list(results["turns"].values())
        checks = []
        for every in EVERY:
            name = f"every {every}"
            saved = estimate([1 - r[name]["peak"] / r["kept"]["peak"] for r in runs])
            checks.append(
                Check(
                    name=f"share of the peak that recompute of {name} saves",
                    value=saved.value,
                    interval=saved.interval,
                    num=saved.num,
                    need=f">= {limits['saved']:g}" if every == 1 else "shown",
                    holds=every != 1 or saved.interval[0] >= limits["saved"],
                )
            )
        peaks = [[r[f"every {every}"]["peak"] for every in EVERY] for r in runs]
        apart = max(r[f"every {every}"]["apart"] for r in runs for every in EVERY)
        ratios = [ratio for r in runs for ratio in r["every 1"]["ratios"]]
        median, interval = bootstrap_median(ratios)
        control = min(r["control"]["apart"] for r in runs)
        return [
            *checks,
            Check(
                name="runs whose peak rises as fewer blocks are recomputed",
                value=float(sum(sorted(each) == each for each in peaks)),
                num=len(peaks),
                need="all",
                holds=all(sorted(each) == each for each in peaks),
            ),
            Check(
                name="largest difference of any gradient, dropout on",
                value=apart,
                num=len(runs) * len(EVERY),
                need="0",
                holds=apart == 0,
            ),
            Check(
                name="CPU time of a step over keeping everything, all blocks",
                value=median,
                interval=interval,
                num=len(ratios),
                need=f"interval below {limits['slowdown']:g}",
                holds=interval[1] < limits["slowdown"],
            ),
            Check(
                name="largest difference of a gradient without the random state",
                value=control,
                num=len(runs),
                need="above 0",
                holds=control > 0,
                control=True,
            ),
        ]


def _gradients(model: nn.Module, batch: Tensor, seed: int) -> list[Tensor]:
    """Run forward and backward with the same draws every time."""
    model.zero_grad(set_to_none=True)
    torch.manual_seed(seed + 1)
    model(batch).square().mean().backward()
    return [p.grad.detach().clone() for p in model.parameters() if p.grad is not None]


def _apart(found: list[Tensor], kept: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(found, kept, strict=True))
