"""What each tool of peer_tools.py costs: step times, casts, crashes, and a proof.

Step times are CPU seconds of the process. In every turn each tool steps once, in an
order that rotates, and its time is divided by that of `torch.autocast` in the same
turn, so that what else runs on the machine slows both.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from autocast import VOCABULARY, transformer
from peer_tools import TOOLS, Ready

from castwise.autocast import uninstall
from castwise.numerics.census import FormatCensus, observe
from castwise.numerics.contract import prove

SHAPES = ((4, 256), (1, 64))
ATTENTIONS = ("fused", "written out")
REFERENCE = "torch.autocast"
WHOLE_STEP = "castwise, run.step()"
HERE = Path(__file__).parent


class PeerStep:
    """A training step of a transformer as one tool sets it up."""

    def __init__(
        self, name: str, shape: tuple[int, int], attention: str, *, compiled: bool
    ) -> None:
        torch.manual_seed(0)
        self.whole = name == WHOLE_STEP
        model = transformer(attention)
        self.ready: Ready = TOOLS[name.partition(",")[0]]().ready(model)
        self.model = torch.compile(self.ready.model) if compiled else self.ready.model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if self.ready.run is not None:
            self.ready.run.optimizer = self.optimizer
        self.tokens = torch.randint(VOCABULARY, shape)

    def loss(self) -> torch.Tensor:
        """Predict every token from all of them."""
        logits = self.model(self.tokens)
        return F.cross_entropy(logits.flatten(0, 1), self.tokens.flatten())

    def __call__(self) -> None:
        """Forward, backward, update."""
        if self.whole:
            assert self.ready.run is not None
            with self.ready.run.step() as step:
                step.backward(self.loss())
            return
        with self.ready.region():
            loss = self.loss()
        self.ready.backward(loss)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def seconds(self) -> float:
        """CPU time of one step."""
        start = time.process_time()
        self()
        return time.process_time() - start


def step_times(num_turns: int, *, compiled: bool) -> list[dict[str, Any]]:
    """Every tool and kind of attention; compiled, the larger shape alone."""
    rows = []
    for shape in SHAPES[:1] if compiled else SHAPES:
        for attention in ATTENTIONS:
            torch.compiler.reset()
            names = [*TOOLS, WHOLE_STEP]
            steps = {
                name: PeerStep(name, shape, attention, compiled=compiled)
                for name in names
            }
            times = _in_turns({n: s.seconds for n, s in steps.items()}, num_turns)
            rows += [
                {
                    "shape": f"B{shape[0]} T{shape[1]}",
                    "attention": attention,
                    "compiled": compiled,
                    "tool": name,
                    **_against(times[name], times[REFERENCE]),
                }
                for name in names
            ]
    return rows


def _in_turns(
    calls: dict[str, Callable[[], float]], num_turns: int
) -> dict[str, list[float]]:
    names = list(calls)
    for _ in range(4):
        for name in names:
            calls[name]()
    times: dict[str, list[float]] = {name: [] for name in names}
    for turn in range(num_turns):
        at = turn % len(names)
        for name in names[at:] + names[:at]:
            times[name].append(calls[name]())
    return times


def _against(mine: list[float], reference: list[float]) -> dict[str, float]:
    ratios = [a / b for a, b in zip(mine, reference, strict=True)]
    low, _, high = statistics.quantiles(ratios, n=4)
    return {
        "ratio": round(statistics.median(mine) / statistics.median(reference), 3),
        "ratio_of_minima": round(min(mine) / min(reference), 3),
        "lower_quartile": round(low, 3),
        "upper_quartile": round(high, 3),
        "milliseconds": round(1e3 * statistics.median(mine), 2),
    }


def compiled_step_times(num_turns: int) -> list[dict[str, Any]]:
    """The same under torch.compile."""
    return step_times(num_turns, compiled=True)


def eager_step_times(num_turns: int) -> list[dict[str, Any]]:
    """The same without."""
    return step_times(num_turns, compiled=False)


def casts(_: int) -> list[dict[str, Any]]:
    """Number and bytes of casts of one eager step, counted below autograd."""
    rows = []
    for attention in ATTENTIONS:
        for name in TOOLS:
            uninstall()
            step = PeerStep(name, SHAPES[0], attention, compiled=False)
            step()
            census = observe(step)
            counts = census.select(op="cast")
            rows.append(
                {
                    "shape": f"B{SHAPES[0][0]} T{SHAPES[0][1]}",
                    "attention": attention,
                    "tool": name,
                    "casts": census.num_casts,
                    "megabytes": round(sum(c.num_bytes for c in counts) / 1e6, 1),
                    "low_share": round(_low_share(census), 4),
                    "softmax": ", ".join(census.formats_of("softmax")),
                }
            )
    return rows


def _low_share(census: FormatCensus) -> float:
    """Of the flops of products; fused attention keeps its sums in fp32."""
    shares = census.product_shares()
    return sum(share for formats, share in shares.items() if "bf16" in formats)


def crashes(_: int) -> list[dict[str, Any]]:
    """The operator sweep, in both low formats."""
    rows = []
    for fmt in ("bf16", "fp16"):
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "sweep.json"
            command = [sys.executable, str(HERE / "opinfo_sweep.py")]
            subprocess.run([*command, "--fmt", fmt, "--json", str(file)], check=True)
            found = json.loads(file.read_text())["cases"]
        for case, regions in found.items():
            for region, tally in regions.items():
                rows.append(
                    {
                        "format": fmt,
                        "inputs": case,
                        "tool": region,
                        "forward": len(tally["forward"]),
                        "forward_of": tally["num_forward"],
                        "backward": len(tally["backward"]),
                        "backward_of": tally["num_backward"],
                    }
                )
    return rows


def contract(num_turns: int) -> list[dict[str, Any]]:
    """A forward and backward under proof against one without, in turns."""
    rows = []
    for shape in SHAPES:
        step = PeerStep("castwise", shape, "fused", compiled=False)
        run = step.ready.run
        assert run is not None

        def plain(step: PeerStep = step) -> None:
            with step.ready.region():
                loss = step.loss()
            loss.backward()  # type: ignore[no-untyped-call]

        def proved(step: PeerStep = step, plain: Any = plain, run: Any = run) -> None:
            assert isinstance(step.ready.model, torch.nn.Module)
            prove(plain, step.ready.model, run.applied).check()

        times = _in_turns(
            {"plain": _timed(plain), "proved": _timed(proved)}, num_turns // 3
        )
        rows.append(
            {
                "shape": f"B{shape[0]} T{shape[1]}",
                **_against(times["proved"], times["plain"]),
            }
        )
    return rows


def _timed(call: Callable[[], None]) -> Callable[[], float]:
    def seconds() -> float:
        start = time.process_time()
        call()
        return time.process_time() - start

    return seconds


PARTS: dict[str, Callable[[int], list[dict[str, Any]]]] = {
    "crashes": crashes,
    "casts": casts,
    "eager": eager_step_times,
    "compiled": compiled_step_times,
    "contract": contract,
}
"""What can be measured, by its name in the record."""
