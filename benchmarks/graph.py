"""Plans against torch.autocast: casts, bytes cast, saved bytes, errors, times.

Models and recipes train one step each under `torch.autocast`, under castwise's operator
table, and by a plan, all in one process:

    lm      pre-norm transformer with fused attention, an embedding and a head
    llama   RMS norms by hand, rotary positions, gated layers
    vit     patches by a convolution, learned positions, a class token
    conv    convolutions, batch norms, squeeze and excitation
    kenken, resolvent, soliton    the recipes, in the size that they train in

Counted below autograd, forward and backward: casts between formats and the bytes they
read and write; the bytes that autograd keeps for the backward, by storage, weights left
out. Errors are relative, of outputs and of all gradients together, against float64.
Times are CPU seconds of the process on one thread, taken in turns by `--times`, which
belongs on a quiet machine.

    python benchmarks/graph.py                      counts, bytes, errors: busy or quiet
    python benchmarks/graph.py --times eager --turns 21
    python benchmarks/graph.py --times inductor --turns 21
    python benchmarks/graph.py --inference          with and without kept weights
    python benchmarks/graph.py --planning           seconds to plan 32 layers
    python benchmarks/graph.py --recompilations     graphs captured when things change
    python benchmarks/graph.py --ahead              casts left ahead of time, by stage
    python benchmarks/graph.py --gradients          loss scales, and what counting costs
    python benchmarks/graph.py --random 2000        random programs against float64
    python benchmarks/graph.py --seed 137           one random program and its error

`--json docs/accepted/graph.json --page` keeps the figures, and writes the page.
"""

from __future__ import annotations

import argparse
import copy
import datetime as dt
import gc
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import graph_casts
import graph_page
import graph_random
import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn
from torch.utils._pytree import tree_map

import castwise as cw
from castwise.graph import gradient_flow, measure
from castwise.graph.capture import PlanningBackend
from castwise.graph.gradients import GradientCounter
from castwise.graph.regions import widened
from castwise.graph.settings import Surroundings
from castwise.recipes.kenken.dry_run import largest_batches
from castwise.recipes.kenken.model import (
    KenKenModel,
    completion_loss,
    model_settings,
)
from castwise.recipes.kenken.settings import settings_of
from castwise.recipes.resolvent_lm.model import build_model as resolvent_lm
from castwise.recipes.resolvent_lm.settings import ResolventSettings
from castwise.recipes.soliton_lm.model import build_model as soliton_lm
from castwise.recipes.soliton_lm.settings import SolitonSettings

Run = Callable[..., Any]


class Block(nn.Module):
    """Pre-norm attention and a multilayer perceptron."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([nn.LayerNorm(width) for _ in range(2)])
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in "qkv")
        self.out = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:  # (batch, length, width)
        """Add attention, then the perceptron."""
        h = self.norms[0](x)
        q, k, v = (
            part(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norms[1](x))))


class LanguageModel(nn.Module):
    """An embedding, positions, blocks, a head."""

    def __init__(self, vocabulary: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.place = nn.Embedding(512, width)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor) -> Tensor:  # (batch, length)
        """The loss of predicting each token from those before it."""
        places = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.embed(tokens) + self.place(places)
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class RootNorm(nn.Module):
    """Division by the root of the mean square, by hand."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """As most models have it."""
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class LlamaBlock(nn.Module):
    """Attention with rotary positions, and a gated perceptron."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norms = nn.ModuleList([RootNorm(width) for _ in range(2)])
        self.q, self.k, self.v, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.gate, self.up = (nn.Linear(width, 3 * width, bias=False) for _ in "gu")
        self.down = nn.Linear(3 * width, width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Add attention, then the gated perceptron."""
        h = self.norms[0](x)
        q, k, v = (
            part(h).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.q, self.k, self.v)
        )
        q, k = (t * cos + turned(t) * sin for t in (q, k))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.norms[1](x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


def turned(t: Tensor) -> Tensor:
    """The pairs of a rotary embedding, turned by a right angle."""
    a, b = t.chunk(2, -1)
    return torch.cat((-b, a), -1)


class Llama(nn.Module):
    """An embedding, blocks, a head without bias."""

    cos: Tensor
    sin: Tensor

    def __init__(self, vocabulary: int, width: int, num_layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.blocks = nn.ModuleList(LlamaBlock(width, 4) for _ in range(num_layers))
        self.norm = RootNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        size = width // 4
        inverse = 1e4 ** (-torch.arange(0, size, 2, dtype=torch.float64) / size)
        angles = torch.arange(512, dtype=torch.float64)[:, None] * inverse
        angles = torch.cat((angles, angles), -1)
        self.register_buffer("cos", angles.cos().float())
        self.register_buffer("sin", angles.sin().float())

    def forward(self, tokens: Tensor) -> Tensor:
        """The loss of predicting each token from those before it."""
        length = tokens.shape[1]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos[:length], self.sin[:length])
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())


class ImageTransformer(nn.Module):
    """Patches, a class token, blocks, a head."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.token = nn.Parameter(torch.randn(1, 1, width) / 8)
        self.places = nn.Parameter(torch.randn(1, 65, width) / 8)
        self.blocks = nn.ModuleList(Block(width, 4) for _ in range(num_layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 32, 32)
        """The loss of ten classes, by the batch's own order."""
        h = self.patches(x).flatten(2).mT
        h = torch.cat((self.token.expand(len(h), -1, -1), h), 1) + self.places
        for block in self.blocks:
            h = block(h)
        classes = torch.arange(len(h), device=h.device) % 10
        return F.cross_entropy(self.head(self.norm(h[:, 0])), classes)


class Residual(nn.Module):
    """Two convolutions with batch norms, squeeze and excitation, a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(2)
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(2))
        self.squeeze = nn.Linear(width, width // 4)
        self.excite = nn.Linear(width // 4, width)

    def forward(self, x: Tensor) -> Tensor:
        """Add what was squeezed and excited."""
        h = F.relu(self.norms[0](self.convs[0](x)), inplace=True)
        h = self.norms[1](self.convs[1](h))
        gate = torch.sigmoid(self.excite(F.relu(self.squeeze(h.mean((2, 3))))))
        return F.relu(x + h * gate[:, :, None, None])


class ConvNet(nn.Module):
    """A stem, residual blocks, pooling, a head."""

    def __init__(self, width: int, num_layers: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )
        self.blocks = nn.Sequential(*(Residual(width) for _ in range(num_layers)))
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:  # (batch, 3, 32, 32)
        """The loss of ten classes, by the batch's own order."""
        h = self.blocks(self.stem(x))
        logits = self.head(F.adaptive_avg_pool2d(h, 1).flatten(1))
        return F.cross_entropy(logits, torch.arange(len(x), device=x.device) % 10)


def build(name: str, num_layers: int = 2, width: int = 256) -> nn.Module:
    """One of the models, with the same weights each time; two of them of any width."""
    torch.manual_seed(0)
    makers: dict[str, Callable[[], nn.Module]] = {
        "lm": lambda: LanguageModel(101, width, num_layers),
        "llama": lambda: Llama(101, width, num_layers),
        "vit": lambda: ImageTransformer(192, num_layers),
        "conv": lambda: ConvNet(32, num_layers),
        "kenken": lambda: KenKenModel(model_settings("small")),
        "resolvent": lambda: resolvent_lm(ResolventSettings(), 101, 128),
        "soliton": lambda: soliton_lm(SolitonSettings(), 101, 128),
    }
    return makers[name]()


MODELS = ("lm", "llama", "vit", "conv")
RECIPES = ("kenken", "resolvent", "soliton")


def batch_of(name: str, size: int = 8, length: int = 128) -> tuple[Any, ...]:
    """A batch for a model: its inputs and, last, the target."""
    draws = torch.Generator().manual_seed(1)
    if name == "kenken":
        drawn = largest_batches(settings_of("small", {}))
        batch = drawn[max(drawn)]
        return batch.tokens, batch.alphabet, batch.relations, batch
    if name in {"lm", "llama"}:
        return torch.randint(101, (size, length), generator=draws), None
    if name in RECIPES:
        tokens = torch.randint(101, (size, length + 1), generator=draws)
        return tokens[:, :-1], tokens[:, 1:], None
    return torch.randn(size, 3, 32, 32, generator=draws), None


def loss_of(name: str) -> Callable[[Any, Any], Tensor]:
    """From the output of a model and the target to a loss; most return one."""
    return completion_loss if name == "kenken" else lambda loss, _: loss


def moved(batch: tuple[Any, ...], device: str) -> tuple[Any, ...]:
    """A batch on a device."""
    return tree_map(lambda t: t.to(device) if hasattr(t, "to") else t, batch)


def torch_run(model: nn.Module) -> Run:
    """What plans are compared with."""

    def run(*inputs: Any) -> Tensor:
        with torch.autocast(inputs[0].device.type, torch.bfloat16):
            return widened(model(*inputs))

    return run


def count(name: str, device: str) -> dict[str, Any]:
    """Casts, bytes and errors of one model under each way to run it."""
    torch.compiler.reset()
    model, batch = build(name).to(device), moved(batch_of(name), device)
    found = measure(model, batch, loss_of(name))
    rival = found.torch_autocast
    assert rival is not None
    ways = {
        "torch.autocast": rival,
        "operator table": found.autocast,
        "plan": found.planned,
    }
    return {
        **{way: asdict(cost) for way, cost in ways.items()},
        "bytes cast, against torch.autocast": found.planned.bytes_cast
        / rival.bytes_cast
        - 1,
        "bytes saved, against torch.autocast": found.planned.bytes_saved
        / rival.bytes_saved
        - 1,
    }


def times(name: str, inner: str, num_turns: int, device: str) -> dict[str, float]:
    """Step times in turns: torch.autocast, compiled or not, against the plan."""
    num_layers = 2 if inner == "inductor" else 4  # what takes long is to compile
    model = build(name, num_layers).to(device)
    batch, loss_fn = moved(batch_of(name, 4), device), loss_of(name)
    steps = {}
    for way in ("torch.autocast", "torch.autocast again", "plan"):
        fresh = copy.deepcopy(model)
        if way == "plan":
            run: Run = cw.compile(fresh, "bf16-mixed", inner=inner)
        else:
            run = torch_run(fresh if inner == "eager" else torch.compile(fresh))
        steps[way] = (run, torch.optim.SGD(fresh.parameters(), lr=1e-3))

    def step(way: str) -> None:
        run, optimizer = steps[way]
        loss_fn(run(*batch[:-1]), batch[-1]).backward()
        optimizer.step()
        optimizer.zero_grad()

    return in_turns({way: partial(step, way) for way in steps}, num_turns)


def inference(name: str, num_turns: int, device: str) -> dict[str, Any]:
    """Times of 16 tokens without gradients, compiled, with and without kept weights."""
    model = build(name, 4, 512).eval().to(device)
    (tokens, *_) = moved(batch_of(name, 1, 16), device)
    runs: dict[str, Run] = {}
    for way in ("torch.autocast", "torch.autocast again", "plan", "plan, kept weights"):
        fresh = copy.deepcopy(model)
        if way.startswith("plan"):
            kept = way != "plan"
            runs[way] = cw.compile(fresh, "bf16-mixed", keep_weights=kept)
        else:
            runs[way] = torch_run(torch.compile(fresh))
    with torch.no_grad():
        return in_turns(
            {way: partial(run, tokens) for way, run in runs.items()}, num_turns
        )


def in_turns(ways: dict[str, Callable[[], Any]], num_turns: int) -> dict[str, Any]:
    """CPU time of each way over that of the first; each begins as many turns."""
    taken: dict[str, list[float]] = {way: [] for way in ways}
    for turn in range(num_turns + 3):
        start = turn % len(ways)  # who begins finds the caches full of other things
        for way in (*list(ways)[start:], *list(ways)[:start]):
            begun = time.process_time()
            ways[way]()
            if turn >= 3:
                taken[way].append(time.process_time() - begun)
        gc.collect()
    first, *others = ways
    base = taken[first]
    return {
        f"{first}, ms": 1e3 * statistics.median(base),
        **{
            f"{way}, ratio": statistics.median(taken[way]) / statistics.median(base)
            for way in others
        },
        **{
            f"{way}, quartiles of ratios": statistics.quantiles(
                [a / b for a, b in zip(taken[way], base, strict=True)], n=4
            )[::2]
            for way in others
        },
    }


def planning(name: str, num_layers: int) -> dict[str, float]:
    """Seconds to capture a deep model, and to plan it."""
    model, x = build(name, num_layers), batch_of(name, 1, 16)[0]
    torch.compiler.reset()
    spent = {"planning": 0.0}
    backend = PlanningBackend(
        Surroundings.of(model, cw.preset("bf16-mixed")), "eager", kept=None
    )

    def timed(module: Any, examples: Any) -> Any:
        start = time.process_time()
        run = backend(module, examples)
        spent["planning"] += time.process_time() - start
        return run

    start = time.process_time()
    torch.compile(model, backend=timed)(x)
    spent["capture, planning and one forward"] = time.process_time() - start
    return {**spent, "nodes": sum(len(graph.nodes) for graph in backend.graphs)}


def recompilations() -> dict[str, int]:
    """Graphs captured beyond the first when scale, phase or batch size changes."""
    found = {}
    for what in ("loss scale", "phase there and back", "batch size", "weights"):
        torch.compiler.reset()
        model = build("llama")
        compiled = cw.compile(model, "bf16-mixed", inner="eager", dynamic=True)
        compiled(batch_of("llama")[0]).backward()
        if what.startswith("phase"):
            compiled.enter_phase("warmup")
            compiled(batch_of("llama")[0]).backward()
        before = compiled.num_captured
        for turn in range(1, 5):
            if what.startswith("phase"):
                compiled.enter_phase(("full", "warmup")[turn % 2])
            size = 8 - turn if what == "batch size" else 8
            loss = compiled(batch_of("llama", size)[0])
            if what == "loss scale":
                loss.backward(gradient=torch.tensor(2.0**turn))
            else:
                loss.backward()
            if what == "weights":
                with torch.no_grad():
                    for weight in model.parameters():
                        weight.mul_(0.999)
        found[what] = compiled.num_captured - before
    return found


def gradient_flows(name: str, num_turns: int) -> dict[str, Any]:
    """The gradients of one batch, and what counting them costs beside a plain step."""
    model, x = build(name), batch_of(name)[0]
    torch.compiler.reset()
    flow = gradient_flow(model, (x, None), lambda loss, _: loss, sample=None)
    runs = {"sampled": 4096, "counted whole": None}
    counters = {
        way: GradientCounter(model, cw.preset("16-mixed"), n) for way, n in runs.items()
    }
    steps: dict[str, Run] = {"plain": model, "plain again": model}
    for way, counter in counters.items():
        torch.compiler.reset()
        steps[way] = torch.compile(copy.deepcopy(model), backend=counter)
        steps[way](x)
    taken: dict[str, list[float]] = {way: [] for way in steps}
    for turn in range(num_turns + 2):
        for way in list(steps)[:: 1 - turn % 2 * 2]:
            start = time.process_time()
            steps[way](x).backward()
            if turn >= 2:
                taken[way].append(time.process_time() - start)
    slower = {
        way: statistics.quantiles(
            [a / b for a, b in zip(times, taken["plain"], strict=True)], n=4
        )
        for way, times in taken.items()
    }
    return {
        "summary": flow.summary(),
        "largest gradient": flow.highest,
        "largest scale": math.log2(flow.largest_scale()),
        "suggested scale": math.log2(flow.suggest_scale().value),
        "lost at scale 1, at 2^10": [flow.underflow(1.0), flow.underflow(2.0**10)],
        "plain, ms": 1e3 * statistics.median(taken["plain"]),
        **{f"slow-down, {way}": slower[way][1] for way in list(steps)[1:]},
        **{f"slow-down, {way}, quartiles": slower[way][::2] for way in list(steps)[1:]},
    }


def main() -> int:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    every = (*MODELS, *RECIPES)
    parser.add_argument("--models", nargs="*", default=list(every), choices=every)
    parser.add_argument("--times", choices=("eager", "aot_eager", "inductor"))
    parser.add_argument("--turns", type=int, default=21)
    parser.add_argument("--inference", action="store_true")
    parser.add_argument("--planning", action="store_true")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--recompilations", action="store_true")
    parser.add_argument("--ahead", action="store_true")
    parser.add_argument("--gradients", action="store_true")
    parser.add_argument("--random", type=int, metavar="NUMBER")
    parser.add_argument("--first", type=int, default=0, help="first seed of --random")
    parser.add_argument("--shard", default="0/1", help="which of how many, as in 0/2")
    parser.add_argument("--seed", type=int, help="run one random program, and show it")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="add the figures to this file")
    parser.add_argument("--page", action="store_true", help="write docs/graph.md")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.random or settings.seed is not None:
        return random_programs(settings)
    kind, found = measured(settings)
    record = {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "torch": torch.__version__,
        "device": settings.device,
        **found,
    }
    print(json.dumps({kind: record}, indent=1))
    if settings.json:
        file: Path = settings.json
        kept = json.loads(file.read_text()) if file.exists() else {}
        kept = {**kept, kind: record}
        file.write_text(json.dumps(kept, indent=1) + "\n")
        if settings.page:
            graph_page.write_page(kept)
    return 0


def random_programs(settings: argparse.Namespace) -> int:
    """Random programs against float64; their record is a file of their own."""
    if settings.seed is not None:
        print(json.dumps(graph_random.show(settings.seed), indent=1))
        return 0
    found = graph_random.run_shard(
        settings.random, settings.first, settings.shard, settings.json
    )
    print(json.dumps(found, indent=1))
    return int(bool(found["wrong"]))


def measured(settings: argparse.Namespace) -> tuple[str, dict[str, Any]]:
    """What was asked for, under the name that the record keeps it by."""
    if settings.recompilations:
        return "recompilations", recompilations()
    if settings.ahead:
        return "casts, ahead of time", {
            name: graph_casts.casts_ahead(build(name), batch_of(name), loss_of(name))
            for name in settings.models
            if name in MODELS
        }
    if settings.gradients:
        plain = [name for name in settings.models if name in MODELS]
        flows = {name: gradient_flows(name, settings.turns) for name in plain}
        return "gradient flow", flows
    if settings.planning or settings.inference:
        names, turns = ("lm", "llama"), settings.turns
        if settings.inference:
            rows = {name: inference(name, turns, settings.device) for name in names}
        else:
            rows = {name: planning(name, settings.layers) for name in names}
        return "inference" if settings.inference else "planning", rows
    if settings.times:
        names = settings.models
        if settings.times == "inductor":  # the recipes take minutes each to compile
            names = [name for name in names if name in MODELS]
        rows = {
            name: times(name, settings.times, settings.turns, settings.device)
            for name in names
        }
        return f"times, {settings.times}", rows
    return "counts", {name: count(name, settings.device) for name in settings.models}


if __name__ == "__main__":
    sys.exit(main())
