"""Does prediction pay? Backward passes and processor time to a loss fixed beforehand.

    python benchmarks/hybrid.py softmax        deterministic, convex: it has to pay
    python benchmarks/hybrid.py curve          deterministic: fit a curve
    python benchmarks/hybrid.py minibatch      a perceptron in batches of 64
    python benchmarks/hybrid.py language       a char transformer: it must not pay
    python benchmarks/hybrid.py shut           what a gate that never opens costs

Every arm gets the best rate of one grid, by the worse of its times on the tuning
seeds; a best rate at the edge of the grid is marked *. Then it runs on other seeds.
Time is the processor time of the thread inside of steps: snapshots, verification and
rollback included, evaluation excluded for all alike. A difference counts only if the
ranges over seeds do not overlap; otherwise the verdict is `no gain`. Virtual steps
count for nothing.

Exit code 1 says that a control failed: the harness itself is then not to be trusted.
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import statistics
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from castwise.hybrid import HybridSettings, HybridTrainer, MixedPrecisionConfig
from castwise.policy import preset
from castwise.training.averages import ExponentialAverage
from castwise.training.step import prepare

Batch = tuple[Tensor, Tensor]


def cross_entropies(model: nn.Module, batch: Batch) -> Tensor:
    """One cross entropy for each sample."""
    logits = model(batch[0])
    losses = functional.cross_entropy(
        logits.flatten(0, -2), batch[1].flatten(), reduction="none"
    )
    return losses.reshape(len(batch[1]), -1).mean(1)


class Problem(ABC):
    """A model, its data, and a loss that has to be reached."""

    rates: Sequence[float]
    max_steps: int
    evaluate_every: int = 1
    average_decay: float = 0.95
    has_target: bool = True
    tuning_seeds: Sequence[int] = (100, 101)
    target: float
    model: nn.Module

    def __init__(self, seed: int) -> None:
        self.seed = seed
        torch.manual_seed(seed)
        self.prepare()

    @abstractmethod
    def prepare(self) -> None:
        """Make data, model and `self.target`, from the seed alone."""

    @abstractmethod
    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Return the plain optimizer."""

    @abstractmethod
    def batch(self, step: int) -> Batch:
        """Return the batch of a step."""

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one loss for each sample."""
        return cross_entropies(model, batch)

    @abstractmethod
    def evaluate(self) -> float:
        """Return the loss that is compared with the target."""


class Softmax(Problem):
    """Softmax regression on ill-conditioned features, all data in every batch."""

    rates = (4.0, 5.5, 7.0, 8.0, 9.0)
    tuning_seeds = range(5)  # some data sets are unstable where others are fastest
    max_steps = 900
    evaluate_every = 3
    decay = 1e-4
    minima: ClassVar[dict[int, float]] = {}

    def prepare(self) -> None:
        """Draw ten noisy classes whose features have a spectrum of 1 to 1/500."""
        num, features, classes = 1200, 64, 10
        centres = torch.randn(classes, features)
        labels = torch.randint(classes, (num,))
        inputs = centres[labels] + 1.5 * torch.randn(num, features)
        spectrum = torch.arange(1, features + 1).float() ** -1.5
        inputs = (inputs * spectrum) @ torch.linalg.qr(torch.randn(features, features))[
            0
        ]
        largest = torch.linalg.svdvals(inputs)[0] / num**0.5  # sets the largest rate
        self.data = (inputs / largest, labels)
        self.model = nn.Linear(features, classes)
        for parameter in self.model.parameters():
            nn.init.zeros_(parameter)
        if self.seed not in self.minima:
            self.minima[self.seed] = self.minimum()
        self.target = self.minima[self.seed] + 1e-4

    def minimum(self) -> float:
        """Solve the problem in fp64 by L-BFGS."""
        model, data = nn.Linear(64, 10).double(), (self.data[0].double(), self.data[1])
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        solver = torch.optim.LBFGS(
            model.parameters(),
            max_iter=2000,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            history_size=50,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            solver.zero_grad()
            loss = self.loss(model, data).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss.detach()

        solver.step(closure)  # type: ignore[no-untyped-call]
        with torch.no_grad():
            return float(self.loss(model, data).mean())

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Add the square of the weights to every sample."""
        square = torch.stack([(p * p).sum() for p in model.parameters()]).sum()
        return cross_entropies(model, (batch[0], batch[1][:, None])) + (
            self.decay / 2 * square
        )

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Return gradient descent with Nesterov's momentum."""
        return torch.optim.SGD(
            self.model.parameters(), lr=rate, momentum=0.9, nesterov=True
        )

    def batch(self, step: int) -> Batch:
        """Return all data."""
        del step
        return self.data

    def evaluate(self) -> float:
        """Return the loss of all data."""
        with torch.no_grad():
            return float(self.loss(self.model, self.data).mean())


class Curve(Problem):
    """A perceptron fits a curve at 128 points, all of them in every batch."""

    rates = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
    max_steps = 2000
    evaluate_every = 10
    target = 1e-4

    def prepare(self) -> None:
        """Draw a curve of four waves, and a student of two hidden layers."""
        places = torch.linspace(-1, 1, 128)[:, None]
        waves = 3.0 * torch.arange(1, 5) * places + 6.28 * torch.rand(4)
        self.data = (places, (waves.sin() / torch.arange(1, 5)).sum(1, keepdim=True))
        self.model = nn.Sequential(
            nn.Linear(1, 48), nn.Tanh(), nn.Linear(48, 48), nn.Tanh(), nn.Linear(48, 1)
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one square for each point."""
        squares: Tensor = (model(batch[0]) - batch[1]).square()
        return squares.squeeze(1)

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.99))

    def batch(self, step: int) -> Batch:
        """Return everything."""
        del step
        return self.data

    def evaluate(self) -> float:
        """Return the mean square."""
        with torch.no_grad():
            return float(self.loss(self.model, self.data).mean())


class Minibatch(Problem):
    """A perceptron on 1,000 samples of a teacher, in batches of 64."""

    rates = (2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)
    max_steps = 2000
    evaluate_every = 20
    target = 0.01
    num_samples, num_in_batch = 1000, 64

    def prepare(self) -> None:
        """Draw a teacher of one hidden layer, and a student of two."""
        inputs = torch.randn(self.num_samples, 32)
        teacher = torch.tanh(inputs @ torch.randn(32, 16)) @ torch.randn(16, 8)
        self.data = (inputs, teacher.argmax(1))
        self.model = nn.Sequential(
            nn.Linear(32, 96), nn.Tanh(), nn.Linear(96, 96), nn.Tanh(), nn.Linear(96, 8)
        )

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return one cross entropy for each sample."""
        return cross_entropies(model, (batch[0], batch[1][:, None]))

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.99))

    def batch(self, step: int) -> Batch:
        """Return samples drawn with replacement."""
        lot = torch.Generator().manual_seed(1_000_000 * self.seed + step)
        rows = torch.randint(self.num_samples, (self.num_in_batch,), generator=lot)
        return self.data[0][rows], self.data[1][rows]

    def evaluate(self) -> float:
        """Return the loss of all samples."""
        with torch.no_grad():
            return float(self.loss(self.model, self.data).mean())


class Language(Problem):
    """A transformer of one layer on the characters of Python's help texts."""

    rates = (2e-3, 4e-3, 8e-3, 1.6e-2)
    max_steps = 1500
    evaluate_every = 50
    tuning_seeds = (100,)
    has_target = False  # trained to the last step; the final loss is compared
    target = -1.0
    length, num_in_batch, width = 48, 12, 48

    def prepare(self) -> None:
        """Cut the text into a training and a validation part."""
        text = "".join(pydoc_data.topics.topics[name] for name in sorted(
            pydoc_data.topics.topics))  # fmt: skip
        alphabet = sorted(set(text))
        ids = torch.tensor([alphabet.index(each) for each in text[:200_000]])
        self.train, self.valid = ids[:180_000], ids[180_000:]
        self.model = CharTransformer(len(alphabet), self.width, self.length)

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Return AdamW."""
        return torch.optim.AdamW(self.model.parameters(), lr=rate, betas=(0.9, 0.99))

    def batch(self, step: int) -> Batch:
        """Return random windows of the text."""
        return self.windows(self.train, 1_000_000 * self.seed + step, self.num_in_batch)

    def windows(self, ids: Tensor, seed: int, num: int) -> Batch:
        """Return windows and what comes after each character."""
        lot = torch.Generator().manual_seed(seed)
        starts = torch.randint(len(ids) - self.length - 1, (num, 1), generator=lot)
        rows = ids[starts + torch.arange(self.length + 1)]
        return rows[:, :-1], rows[:, 1:]

    def evaluate(self) -> float:
        """Return the loss of fixed windows of the validation part."""
        with torch.no_grad():
            batch = self.windows(self.valid, 0, 128)
            return float(self.loss(self.model, batch).mean())


class CharTransformer(nn.Module):
    """One pre-norm block of causal attention and a perceptron."""

    def __init__(self, vocabulary: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.head = nn.Linear(width, vocabulary)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits of the next character at every place."""
        x = self.tokens(ids) + self.places[: ids.shape[1]]
        parts = self.into(self.norms[0](x)).unflatten(-1, (3, 4, -1))
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.out(y.transpose(1, 2).flatten(-2))
        x = x + self.down(functional.gelu(self.up(self.norms[1](x))))
        logits: Tensor = self.head(self.norms[2](x))
        return logits


QUIET = MixedPrecisionConfig.conservative()
HYBRID = HybridSettings(warmup_steps=20, mixed_precision_config=QUIET)
OUTER = replace(HYBRID, verification="none", correct_steps=0, max_consecutive=10**6)
ARMS: dict[str, HybridSettings | None] = {
    "plain": None,
    "bare": None,
    "window_line": replace(HYBRID, full_steps=10, max_predict_steps=160),
    "rna": replace(
        HYBRID,
        predictor="rna",
        predictor_options={"num_iterates": 10},
        correct_steps=0,
    ),
    "adam_hold": replace(HYBRID, predictor="adam_hold"),
    "lookahead": replace(
        OUTER,
        full_steps=10,
        predictor="outer_nesterov",
        predictor_options={"momentum": 0.0, "rate": 0.5},
    ),
    "snoo": replace(OUTER, predictor="outer_nesterov"),
    "null": replace(
        OUTER, predictor="null", mode="stepwise", max_predict_steps=20,
        min_predict_steps=20,
    ),
}  # fmt: skip
"""Every rival. `plain` is `run.step`, which checks every gradient as all arms do, and
`bare` the loop without castwise; `null` spends 20 steps in 40 on moving nothing."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """One run of one arm."""

    backwards: float
    seconds: float
    seconds_averaged: float
    final: float
    tries: int = 0
    accepts: int = 0

    @property
    def reached(self) -> bool:
        """Whether the raw weights came to the target."""
        return self.seconds < float("inf")


def run_arm(problem: Problem, arm: str, rate: float, *, whole: bool) -> Outcome:
    """Train until raw and averaged weights are at the target, or to the last step."""
    optimizer = problem.optimizer(rate)
    step_once, trainer = stepper(problem, optimizer, arm)
    average = ExponentialAverage(problem.model, decay=problem.average_decay)
    inf = float("inf")
    spent = averaging = 0.0
    backwards = seconds = seconds_averaged = inf
    loss = inf
    for step in range(problem.max_steps):
        batch = problem.batch(step)
        started = time.thread_time()
        step_once(batch)
        spent += time.thread_time() - started
        started = time.thread_time()
        average.update()
        averaging += time.thread_time() - started
        if (step + 1) % problem.evaluate_every:
            continue
        loss = problem.evaluate()
        if loss <= problem.target and seconds == inf:
            seconds = spent
            backwards = trainer.statistics.backwards if trainer else step + 1
        with average.in_place_of_weights():
            if problem.evaluate() <= problem.target:
                seconds_averaged = min(seconds_averaged, spent + averaging)
        done = seconds < inf and (seconds_averaged < inf or not whole)
        if done or loss != loss:  # noqa: PLR0124 -- NaN: it diverged
            break
    return Outcome(
        backwards=backwards,
        seconds=seconds if problem.has_target else spent,
        seconds_averaged=seconds_averaged,
        final=loss,
        tries=trainer.statistics.tries if trainer else 0,
        accepts=trainer.statistics.accepts if trainer else 0,
    )


def stepper(
    problem: Problem, optimizer: torch.optim.Optimizer, arm: str
) -> tuple[Callable[[Batch], Any], HybridTrainer | None]:
    """Return the step of an arm, and its trainer if it has one."""
    settings = ARMS[arm]
    if settings is not None:
        if problem.batch(0)[0] is problem.batch(1)[0]:  # a batch is all the data
            settings = replace(settings, verification_z=0.0)
        trainer = HybridTrainer(
            problem.model, optimizer, problem.loss, settings=settings
        )
        return trainer.step, trainer

    def bare(batch: Batch) -> None:
        problem.loss(problem.model, batch).mean().backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()

    if arm == "bare":
        return bare, None
    run = prepare(problem.model, optimizer, preset("32-true"))

    def plain(batch: Batch) -> None:
        with run.step() as step:
            step.backward(problem.loss(problem.model, batch).mean())

    return plain, None


def tuned_rate(kind: type[Problem], arm: str) -> tuple[float, bool]:
    """Return the best rate of the grid by its worse seed, and if it is at the edge."""
    scores = {}
    for rate in kind.rates:
        tried = [
            run_arm(kind(seed), arm, rate, whole=False) for seed in kind.tuning_seeds
        ]
        scores[rate] = max(
            each.seconds if kind.has_target else each.final for each in tried
        )
        if min(scores.values()) < scores[rate] == float("inf"):
            break  # past the edge of stability
    best = min(scores, key=lambda rate: scores[rate])
    return best, best in {kind.rates[0], kind.rates[-1]}


def compare(kind: type[Problem], arms: Sequence[str], seeds: int) -> dict[str, Any]:
    """Run every arm at its own rate on the same seeds, seeds outermost."""
    rates = {arm: tuned_rate(kind, arm) for arm in arms if arm != "bare"}
    rates["bare"] = rates["plain"]  # the same bits
    found: dict[str, list[Outcome]] = {arm: [] for arm in arms}
    for seed in range(seeds):
        for arm in arms:
            problem = kind(seed)
            outcome = run_arm(problem, arm, rates[arm][0], whole=True)
            found[arm].append(outcome)
    for arm in arms:
        print(line_of(arm, rates[arm], found[arm], found["plain"]), flush=True)
    return {
        arm: {"rate": rates[arm][0], "runs": [vars(each) for each in found[arm]]}
        for arm in arms
    }


def line_of(
    arm: str, rate: tuple[float, bool], runs: list[Outcome], plain: list[Outcome]
) -> str:
    """One row of the table."""
    edge = "*" if rate[1] else " "
    cells = [f"{arm:12s} {rate[0]:7.2g}{edge}"]
    for name in ("backwards", "seconds", "seconds_averaged", "final"):
        mine, theirs = ([getattr(r, name) for r in each] for each in (runs, plain))
        middle = statistics.median(mine)
        cells.append(f"{middle:8.4g} [{min(mine):.4g} {max(mine):.4g}]")
        if name != "final" and middle < float("inf"):
            cells.append(f"x{middle / statistics.median(theirs):.2f}")
    jumps = f"{sum(r.accepts for r in runs)}/{sum(r.tries for r in runs)}"
    return "  ".join([*cells, jumps, verdict(runs, plain)])


def verdict(runs: list[Outcome], plain: list[Outcome]) -> str:
    """Say `gain` or `loss` only if the ranges of time lie apart."""
    mine, theirs = ([each.seconds for each in group] for group in (runs, plain))
    if max(mine) < min(theirs):
        return f"gain {statistics.median(theirs) / statistics.median(mine):.2f} times"
    return "loss" if min(mine) > max(theirs) else "no gain"


def ratio(found: dict[str, Any], arm: str, name: str) -> float:
    """Median of an arm over median of the plain optimizer."""
    mine, theirs = (
        statistics.median(run[name] for run in found[each]["runs"])
        for each in (arm, "plain")
    )
    return float(mine / theirs)


def check(
    name: str, value: float, *, most: float | None = None, least: float = 0.0
) -> bool:
    """Print one control and whether it held."""
    holds = least <= value and (most is None or value <= most)
    wanted = f"at most {most:g}" if most is not None else f"at least {least:g}"
    print(f"control: {name} is {value:.3g}, {wanted}: {'holds' if holds else 'FAILS'}")
    return holds


def softmax(seeds: int) -> tuple[dict[str, Any], bool]:
    """Positive control: noise-free, so that a prediction has to pay."""
    found = compare(Softmax, list(ARMS), seeds)
    holds = [
        check("rna over plain, backward passes", ratio(found, "rna", "backwards"),
              most=0.65),
        check("window_line over plain, backward passes",
              ratio(found, "window_line", "backwards"), most=0.75),
        check("null over plain, time", ratio(found, "null", "seconds"), least=1.2),
    ]  # fmt: skip
    return found, all(holds)


def curve(seeds: int) -> tuple[dict[str, Any], bool]:
    """Look for a gain where nothing is random but the start."""
    return compare(Curve, [arm for arm in ARMS if arm != "null"], seeds), True


def minibatch(seeds: int) -> tuple[dict[str, Any], bool]:
    """Look for a gain under the noise of small batches, and the second control."""
    found = compare(Minibatch, list(ARMS), seeds)
    value = ratio(found, "null", "seconds")
    return found, check("null over plain, time", value, least=1.2)


def language(seeds: int) -> tuple[dict[str, Any], bool]:
    """Negative control: at the tuned rate hardly anything is accepted or lost."""
    gate = replace(HYBRID, confidence_threshold=0.4, warmup_steps=100)
    ARMS["gate 0.4"] = gate
    rate = tuned_rate(Language, "plain")
    found: dict[str, Any] = {}
    outcomes: dict[str, list[Outcome]] = {"plain": [], "gate 0.4": []}
    for seed in range(seeds):
        for arm, runs in outcomes.items():
            runs.append(run_arm(Language(seed), arm, rate[0], whole=False))
    for arm, runs in outcomes.items():
        print(line_of(arm, rate, runs, outcomes["plain"]), flush=True)
        found[arm] = {"rate": rate[0], "runs": [vars(each) for each in runs]}
    finals = [[run["final"] for run in found[arm]["runs"]] for arm in found]
    noise = statistics.stdev(finals[0])
    accepted = max(run["accepts"] for run in found["gate 0.4"]["runs"])
    difference = statistics.mean(finals[1]) - statistics.mean(finals[0])
    holds = [
        check("accepted jumps in 1,500 steps", accepted, most=5),
        check("rise of the final loss in deviations of plain", difference / noise,
              most=2.0, least=-float("inf")),
    ]  # fmt: skip
    return found, all(holds)


def shut(seeds: int) -> tuple[dict[str, Any], bool]:
    """What a gate that never opens costs over `run.step`, and over a bare loop."""
    ARMS["shut"] = replace(HYBRID, confidence_threshold=0.9999999)
    ratios = []
    for seed in range(seeds):
        calls = []
        for arm in ("bare", "plain", "shut"):
            problem = Language(seed)
            calls.append(stepper(problem, problem.optimizer(2e-3), arm)[0])
        blocks: list[list[float]] = [[], [], []]
        for first in range(0, 400, 20):  # one end of a window in each block
            for each, call in enumerate(calls):
                batches = [problem.batch(first + step) for step in range(20)]
                started = time.thread_time()
                for batch in batches:
                    call(batch)
                blocks[each].append(time.thread_time() - started)
        middle = [statistics.median(each[1:]) for each in blocks]
        ratios.append((middle[2] / middle[1], middle[2] / middle[0]))
        print(
            f"seed {seed}: over run.step x{ratios[-1][0]:.3f}, "
            f"over a bare loop x{ratios[-1][1]:.3f}"
        )
    value = statistics.median(each[0] for each in ratios)
    return {"ratios": ratios}, check("shut gate over run.step, time", value, most=1.05)


def main() -> None:
    """Run the problems that were named."""
    problems = {
        each.__name__: each for each in (softmax, curve, minibatch, language, shut)
    }
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("problems", nargs="+", choices=list(problems))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", help="write every run as JSON")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found, good = {}, True
    for name in given.problems:
        print(f"{name}: {problems[name].__doc__}")
        found[name], holds = problems[name](given.seeds)
        good = good and holds
    if given.out:
        with open(given.out, "w", encoding="utf-8") as file:  # noqa: PTH123 -- a path as given
            json.dump(found, file)
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
