from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from castwise.errors import LossScaleError
from castwise.loss_scale import DynamicScale, LossScale, NoScale, StaticScale
from castwise.optim import SGD, AdamW, Lion, SweepSettings, hold_weights
from castwise.policy import Policy, preset
from castwise.training.step import Run, Skipped, Stepped, prepare

STORAGES = ("master", "split", "split8", "kahan", "stochastic")
BAD = (math.inf, -math.inf, math.nan)
PLACES = ("gradient", "loss", "input", "activation")

Build = Callable[[list[nn.Parameter]], torch.optim.Optimizer]

OPTIMIZERS: Mapping[str, Build] = {
    "torch.AdamW": lambda weights: torch.optim.AdamW(weights, lr=1e-2),
    "torch.SGD": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9),
    "torch.RMSprop": lambda weights: torch.optim.RMSprop(weights, lr=1e-3),
    "AdamW": lambda weights: AdamW(weights, lr=1e-2),
    "AdamW 8 bits": lambda weights: AdamW(
        weights, lr=1e-2, settings=SweepSettings(states="8bit", min_8bit_size=256)
    ),
    "SGD": lambda weights: SGD(weights, lr=1e-2, momentum=0.9),
    "Lion": lambda weights: Lion(weights, lr=1e-3),
}


@dataclass(frozen=True)
class Fault:
    """One number that is not finite, put somewhere in one step."""

    step: int
    place: str
    value: float
    index: int


class Poisoned(nn.Module):
    """Hands on what it is given, but for the element that a fault replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.fault: Fault | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the input, with the fault in it if there is one."""
        if self.fault is None:
            return x
        poison = torch.zeros_like(x)
        poison.view(-1)[self.fault.index % x.numel()] = self.fault.value
        return x + poison


def make_model() -> nn.Sequential:
    """Buffers, a place for faults, odd sizes, and enough numbers for 8-bit states."""
    return nn.Sequential(
        nn.Linear(5, 37), nn.LayerNorm(37), nn.Tanh(), Poisoned(), nn.Linear(37, 3)
    )


def make_run(optimizer: str, storage: str | None, scale: LossScale) -> Run:
    """A run in bf16 with a storage, or in fp32 with none."""
    torch.manual_seed(0)
    model = make_model()
    built = OPTIMIZERS[optimizer](list(model.parameters()))
    if storage is None:
        return prepare(model, built, preset("32-true"), loss_scale=scale)
    hold_weights(built, storage)
    low = Policy(name="low").with_default("bf16")
    return prepare(model, built, low, loss_scale=scale)


def everything(run: Run) -> dict[str, Any]:
    """All that a wrong update could have touched, copied."""
    return {
        "model": copy.deepcopy(run.model.state_dict()),
        "optimizer": copy.deepcopy(run.optimizer.state_dict()),
    }


def assert_same(left: Any, right: Any, path: str = "") -> None:
    """Compare nested values bit by bit."""
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype, path
        same = torch.equal(left.nan_to_num(1e9), right.nan_to_num(1e9))
        assert same or left.numel() == 0, path
    elif isinstance(left, Mapping):
        assert left.keys() == right.keys(), path
        for name, value in left.items():
            assert_same(value, right[name], f"{path}.{name}")
    elif isinstance(left, (list, tuple)):
        for place, (one, other) in enumerate(zip(left, right, strict=True)):
            assert_same(one, other, f"{path}[{place}]")
    else:
        assert left == right, path


def assert_finite(value: Any, path: str = "") -> None:
    """No weight, moment or buffer may hold an infinity or NaN."""
    if isinstance(value, torch.Tensor) and value.is_floating_point():
        assert bool(value.isfinite().all()), path
    elif isinstance(value, Mapping):
        for name, each in value.items():
            assert_finite(each, f"{path}.{name}")
    elif isinstance(value, (list, tuple)):
        for place, each in enumerate(value):
            assert_finite(each, f"{path}[{place}]")


def one_step(run: Run, number: int, fault: Fault | None) -> Stepped | Skipped:
    """A step on data of its number, with or without a fault in it."""
    lot = torch.Generator().manual_seed(number)
    x = torch.randn(11, 5, generator=lot)
    place = None if fault is None else fault.place
    if fault is not None and place == "input":
        x.view(-1)[fault.index % x.numel()] = fault.value
    run.model[3].fault = fault if place == "activation" else None
    with run.step() as step:
        loss = run.model(x.to(run.model[0].weight.dtype)).float().pow(2).mean()
        if fault is not None and place == "loss":
            loss = loss * fault.value
        step.backward(loss)
        if fault is not None and place == "gradient":
            weights = list(run.model.parameters())
            weight = weights[fault.index % len(weights)]
            assert weight.grad is not None
            weight.grad.view(-1)[fault.index % weight.numel()] = fault.value
    return step.outcome


def storm(
    optimizer: str, storage: str | None, scale: LossScale, faults: list[Fault], num: int
) -> int:
    """Train through faults; every step either is right or never happened.

    The twin runs the good steps only, so that a moment that a fault touched shows in
    every later weight.
    """
    run = make_run(optimizer, storage, scale)
    twin = make_run(optimizer, storage, NoScale(patience=10**6))
    by_step = {fault.step: fault for fault in faults}
    num_skipped = 0
    for number in range(num):
        fault = by_step.get(number)
        before = everything(run) if fault else None
        outcome = one_step(run, number, fault)
        if fault is None:
            assert isinstance(outcome, Stepped), outcome.because
            one_step(twin, number, None)
        else:
            assert isinstance(outcome, Skipped), (fault, outcome)
            assert outcome.because
            assert_same(everything(run), before)
            num_skipped += 1
    after = everything(run)
    assert_finite(after)
    if isinstance(scale, NoScale):
        assert_same(after, everything(twin))
    assert run.num_skipped == num_skipped == len(by_step)
    return num_skipped


def faults_of(
    num_steps: int, max_size: int, min_size: int = 1
) -> st.SearchStrategy[list[Fault]]:
    """Faults at different steps."""
    fault = st.builds(
        Fault,
        step=st.integers(0, num_steps - 1),
        place=st.sampled_from(PLACES),
        value=st.sampled_from(BAD),
        index=st.integers(0, 10**4),
    )
    return st.lists(
        fault, min_size=min_size, max_size=max_size, unique_by=lambda each: each.step
    )


@pytest.mark.parametrize("storage", STORAGES)
def test_no_fault_lands_in_any_storage(storage: str) -> None:
    """One of each kind at each place, in eight steps, under our AdamW and torch's."""
    faults = [
        Fault(1, "gradient", math.inf, 77),
        Fault(3, "loss", math.nan, 0),
        Fault(4, "input", -math.inf, 5),
        Fault(6, "activation", math.nan, 123),
    ]
    for optimizer in ("torch.AdamW", "AdamW"):
        assert storm(optimizer, storage, NoScale(), faults, 8) == 4


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@settings(max_examples=3, deadline=None, derandomize=True)
@given(faults=faults_of(7, 3))
def test_storms_leave_every_optimizer_as_if_they_had_not_been(
    optimizer: str, faults: list[Fault]
) -> None:
    """Weights and moments are those of a run that never saw the bad steps."""
    storm(optimizer, "split", NoScale(), faults, 7)


# Every optimizer in fp32 and on split weights; torch's AdamW and ours on every storage.
STORMS = [(name, storage) for name in OPTIMIZERS for storage in (None, "split")] + [
    (name, storage)
    for name in ("torch.AdamW", "AdamW")
    for storage in STORAGES
    if storage != "split"
]


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "storage"), STORMS)
@settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(faults=faults_of(30, 15, min_size=8))
def test_a_hundred_storms(
    optimizer: str, storage: str | None, faults: list[Fault]
) -> None:
    """At least 350 faults altogether."""
    storm(optimizer, storage, NoScale(), faults, 30)


@pytest.mark.parametrize("scale", ["dynamic", "static"])
def test_a_storm_under_a_scale_moves_the_scale_and_nothing_else(scale: str) -> None:
    """The scale backs off by each fault and grows again; weights are not touched."""
    faults = [Fault(n, PLACES[n % 4], BAD[n % 3], 31 * n) for n in (1, 2, 5, 9, 10)]
    if scale == "static":
        storm("torch.AdamW", "split", StaticScale(64.0), faults, 12)
        return
    dynamic = DynamicScale(initial=256.0, interval=2)
    storm("torch.AdamW", "split", dynamic, faults, 12)
    assert dynamic.scale < 256.0


@pytest.mark.parametrize("what", ["weight", "moment"])
@pytest.mark.parametrize("storage", [None, "split"])
def test_poison_in_what_is_kept_stops_the_run_with_its_cause(
    what: str, storage: str | None
) -> None:
    """At once and with everything untouched: no later step could mend it."""
    run = make_run("torch.AdamW", storage, NoScale(patience=4))
    for number in range(3):
        one_step(run, number, None)
    with torch.no_grad():
        if what == "weight":
            run.model[4].weight[1, 2] = math.nan
        else:
            state = run.optimizer.state[run.model[4].weight]
            state["exp_avg"][1, 2] = math.inf
    before = everything(run)
    named = r"4\.weight'? itself holds NaN|exp_avg of 4\.weight holds inf"
    with pytest.raises(LossScaleError, match=named):
        one_step(run, 3, None)
    assert_same(everything(run), before)
