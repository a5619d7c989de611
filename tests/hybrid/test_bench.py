from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from castwise.hybrid.bench.controls import (
    BENCHES,
    NOISY,
    PROBLEMS,
    WANTED_GAIN,
    Control,
    conclusion,
    header_of,
)
from castwise.hybrid.bench.notes import Notes
from castwise.hybrid.bench.problems import Curve, Minibatch, Problem, WholeBatch
from castwise.hybrid.bench.race import compare, run_one, table_of, tuned, verdict
from castwise.hybrid.bench.regimes import Physics
from castwise.hybrid.bench.rivals import RIVALS, Point
from castwise.hybrid.bench.schedule_free import ScheduleFree


class Bowl(WholeBatch):
    """Least squares of a few numbers: every method is there within a moment."""

    kind = "sgd"
    rates = (0.05, 0.2, 50.0)
    max_steps = 200
    target = 1e-4
    tuning_seeds = (100,)

    def prepare(self) -> None:
        """Draw a matrix of odd sizes."""
        inputs = torch.randn(37, 5)
        self.data = (inputs, inputs @ torch.randn(5, 1))
        self.model = nn.Linear(5, 1)

    def loss(self, model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Return one square for each row."""
        squares: Tensor = (model(batch[0]) - batch[1]).square()
        return squares.squeeze(1)


@pytest.mark.parametrize("method", RIVALS)
def test_every_method_runs_and_counts_its_passes(method: str) -> None:
    """Each takes steps; only `null` and the outer ones may need long for a bowl."""
    outcome = run_one(Bowl(0), method, Point(rate=0.2), whole=False)
    assert math.isfinite(outcome.final)
    if method != "null":
        assert 0 < outcome.backwards <= 200
        assert outcome.seconds > 0


def test_a_rate_that_diverges_is_never_chosen() -> None:
    """The best point of the grid is one that reaches the target."""
    point, edge = tuned(Bowl, "plain")
    assert point.rate < 50.0
    assert edge == (point.rate == 0.05)


def test_plain_and_bare_take_the_same_number_of_passes() -> None:
    """Their steps have the same bits."""
    found = compare(Bowl, ["plain", "bare"], 2)
    passes = [[run["backwards"] for run in found[m]["runs"]] for m in found]
    assert passes[0] == passes[1]
    assert "bare" in table_of(found)


def runs(*seconds: float | None) -> dict[str, Any]:
    """What `compare` keeps of one method."""
    return {"runs": [{"seconds": each} for each in seconds]}


def test_a_gain_is_called_so_only_if_no_two_seeds_overlap() -> None:
    """Medians that differ are not enough."""
    found = {"plain": runs(1.0, 1.2, 1.4), "a": runs(0.5, 0.6, 0.7)}
    assert verdict(found, "a") == "gain 2.00 times"
    found["a"] = runs(0.5, 0.6, 1.1)
    assert verdict(found, "a") == "no gain"
    found["a"] = runs(1.5, 1.6, math.inf)
    assert verdict(found, "a") == "loss"


def test_a_control_says_what_it_wanted() -> None:
    """And NaN holds nothing."""
    assert "holds" in str(Control(name="ratio", value=0.5, most=0.65))
    assert "FAILS" in str(Control(name="ratio", value=0.7, most=0.65))
    assert not Control(name="ratio", value=math.nan, least=1.2).holds


def test_the_schedule_falls_to_a_twentieth() -> None:
    """Linearly, and stays there."""
    point = Point(rate=1.0, decay=100)
    factors = [point.factor(step) for step in (0, 50, 100, 900)]
    assert factors == pytest.approx([1.0, 0.525, 0.05, 0.05])
    assert Point(rate=1.0).factor(900) == 1.0


def test_schedule_free_follows_its_three_sequences() -> None:
    """Against y, z and x written out in float64, for SGD."""
    weight = nn.Parameter(torch.tensor([3.0, -2.0]).double())
    optimizer = ScheduleFree([weight], lr=0.1, beta=0.8, second=None, num_warmup=3)
    z = x = weight.detach().clone()
    total = 0.0
    for step in range(1, 12):
        y = 0.2 * z + 0.8 * x
        torch.testing.assert_close(weight.detach(), y)
        (weight**2).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        rate = 0.1 * min(1.0, step / 3)
        total += rate * rate
        z = z - rate * 2 * y
        x = (1 - rate * rate / total) * x + rate * rate / total * z
    with optimizer.at_average():
        torch.testing.assert_close(weight.detach(), x)
    torch.testing.assert_close(weight.detach(), 0.2 * z + 0.8 * x)


def test_the_physics_residual_is_that_of_autograd() -> None:
    """The second derivative, run forward, against two backward passes."""
    problem = Physics(3)
    places, forces = problem.data
    x = places.clone().requires_grad_()
    value = problem.model(x)
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    ends = (value[[0, -1], 0] - problem.ends).square().sum()
    expected = (second[:, 0] - forces).square() + 100.0 * ends
    torch.testing.assert_close(
        problem.loss(problem.model, problem.data), expected.detach(), rtol=1e-3,
        atol=1e-2, check_dtype=False,
    )  # fmt: skip


@pytest.mark.parametrize("kind", [Curve, Minibatch, Physics])
def test_a_problem_is_a_function_of_its_seed(kind: type[Problem]) -> None:
    """Data, model and batches."""
    one, other, third = kind(5), kind(5), kind(6)
    assert one.evaluate() == other.evaluate() != third.evaluate()
    for left, right in zip(one.batch(3), other.batch(3), strict=True):
        assert torch.equal(left, right)


def test_every_bench_says_what_it_is() -> None:
    """The listing of the command shows one sentence each."""
    assert all(bench.__doc__ for bench in BENCHES.values())


FROZEN = {
    "softmax": ("1e-4 above the minimum", 5, 1, 1, 900),
    "minibatch": (0.01, 5, 1, 2, 2000),
    "language": ("none: the loss after the last step", 4, 1, 1, 1500),
    "curve": (1e-4, 5, 1, 2, 2000),
    "full_batch": ("1e-4 above the minimum", 5, 3, 1, 600),
    "physics": (1e-2, 4, 1, 2, 1500),
    "large_batch": (0.02, 4, 1, 2, 600),
    "fine_tuning": (0.002, 5, 1, 2, 400),
    "late_training": ("half of the loss at the beginning", 5, 1, 2, 500),
}
"""Bench -> target, rates, momenta, schedules, and the last step."""


def test_targets_and_grids_are_fixed_before_a_bench_runs() -> None:
    """To move one is to change this table; the record of a bench holds them all."""
    assert WANTED_GAIN == 1.3
    assert FROZEN.keys() == PROBLEMS.keys()
    for name, wanted in FROZEN.items():
        header = header_of(name, 5)
        grid = (len(header[each]) for each in ("rates", "momenta", "decays"))
        assert (header["target"], *grid, header["max_steps"]) == wanted, name
        assert list(header["rates"]) == sorted(header["rates"])


def test_every_race_has_its_rivals() -> None:
    """The plain optimizer, outer ones, schedule-free and the control, in each."""
    wanted = {"plain", "bare", "lookahead", "snoo", "schedule_free", "null"}
    assert wanted <= set(NOISY) <= set(RIVALS)


def test_a_race_goes_on_where_it_was(tmp_path: Path) -> None:
    """Tuning and runs are read; the record is the same."""
    out = tmp_path / "found.json"
    first = compare(Bowl, ["plain", "bare", "null"], 2, Notes(out, "bowl"))
    again = compare(Bowl, ["plain", "bare", "null"], 2, Notes(out, "bowl"))
    assert first == again
    assert first["null"]["point"] == first["bare"]["point"] == first["plain"]["point"]
    run = first["plain"]["runs"][0]
    assert 0 < run["seconds"] <= run["spent"]
    assert run["clock_seconds"] > 0


def test_a_run_that_takes_too_long_is_given_up() -> None:
    """It cannot win any more, and is no sign of instability."""
    point = Point(rate=0.05)
    outcome = run_one(Bowl(0), "plain", point, whole=False, most=1e-9)
    assert outcome.seconds == math.inf
    assert 0 < outcome.spent < math.inf


def test_the_conclusion_compares_with_the_best_loop() -> None:
    """A prediction that beats plain and not the bare loop has gained nothing."""
    found = {"plain": runs(1.0, 1.1), "bare": runs(0.5, 0.6), "rna": runs(0.4, 0.45)}
    assert conclusion(found).startswith("no gain of 1.3 times: rna is 1.29 times")
    found["rna"] = runs(0.3, 0.31)
    assert conclusion(found).startswith("a gain of 1.3 times")
    assert conclusion(found).endswith("the fastest of all is rna")
    found["rna"] = runs(0.3, None)
    assert conclusion(found).endswith("no prediction reached the target in time")
