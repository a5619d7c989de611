"""The search on tiny models: what it finds and refuses, and that it can be trusted.

The model is a small transformer with one planted module that bf16 ruins: a linear layer
whose outputs have a large mean, so that a LayerNorm behind it subtracts nearly all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.errors import (
    BudgetError,
    ContradictionError,
    FormatError,
    SettingsError,
    StorageError,
    TargetError,
)
from castwise.numerics.search import Budget, Found, Measure, SearchSettings, search
from castwise.numerics.search.budget import parse_budget
from castwise.numerics.search.candidates import parse_candidates

WIDTH, LENGTH, TOKENS = 15, 7, 11
QUICK = SearchSettings(num_probes=4, max_trials=5)


class Planted(nn.Module):
    """A layer of large mean, and the norm that takes the mean off again."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.LayerNorm(WIDTH)
        nn.init.constant_(self.lift.bias, 300.0)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Lift and normalise."""
        return self.norm(self.lift(x))


class Attention(nn.Module):
    """One head."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        """Attend, written out."""
        q, k, v = self.query(x), self.key(x), self.value(x)
        weights = (q @ k.mT * scale / WIDTH**0.5).softmax(-1)
        return self.out(weights @ v)


class Model(nn.Module):
    """Two blocks, with the planted module between them."""

    def __init__(self, *, planted: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(TOKENS, WIDTH)
        self.attention = Attention()
        self.planted = Planted() if planted else nn.Identity()
        self.blocks = nn.Sequential(
            nn.Linear(WIDTH, 2 * WIDTH), nn.GELU(), nn.Linear(2 * WIDTH, WIDTH)
        )
        self.unused = nn.Linear(WIDTH, 3)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Predict a token at each place."""
        x = self.embed(tokens)
        x = x + self.attention(x, scale=0.5)
        x = x + self.planted(x)
        return self.head(x + self.blocks(x))


def cross_entropy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean over all places."""
    return functional.cross_entropy(output.flatten(0, 1), target.flatten())


def build(
    *, planted: bool = True, num_batches: int = 2
) -> tuple[Model, list[tuple[torch.Tensor, ...]]]:
    """Return a model and its batches, always the same."""
    torch.manual_seed(3)
    model = Model(planted=planted)
    batches = [
        (torch.randint(TOKENS, (3, LENGTH)), torch.randint(TOKENS, (3, LENGTH)))
        for _ in range(num_batches)
    ]
    return model, batches


@pytest.fixture(scope="module")
def found() -> Found:
    """A search within one percent of the gradient."""
    model, batches = build()
    return search(model, batches, cross_entropy, Budget(gradient=1e-2), settings=QUICK)


def chosen(found: Found) -> dict[str, str]:
    """Unit -> candidate."""
    return {unit.fqn: unit.chosen for unit in found.units}


def test_planted_module_is_held_high_and_the_rest_runs_low(found: Found) -> None:
    """What bf16 ruins must be found, and nothing that bf16 does not."""
    high = {fqn for fqn, name in chosen(found).items() if name == "fp32"}
    assert high == {"planted.lift"}


def test_policy_keeps_the_budget_when_it_is_measured_again(found: Found) -> None:
    """The error that the search reports is the error that the policy has."""
    from castwise.numerics.search.bench import Bench

    model, batches = build()
    bench = Bench(model, batches, cross_entropy, reference="fp64", seed=0)
    for at, reported in enumerate(found.best.errors):
        again = bench.errors(found.policy, found.budget, scale=1.0, at=at)
        assert again["gradient"] == pytest.approx(reported["gradient"], rel=1e-3)
        assert again["gradient"] <= 0.9 * 1e-2


def test_all_low_breaks_the_budget_so_that_the_search_decided_something(
    found: Found,
) -> None:
    """A budget that every policy keeps would prove nothing."""
    from castwise.numerics.search.bench import Bench

    model, batches = build()
    bench = Bench(model, batches, cross_entropy, reference="fp64", seed=0)
    low = cw.Policy.parse("castwise: 1\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n")
    errors = bench.errors(low, found.budget, scale=1.0, at=0)
    assert errors["gradient"] > 10 * 1e-2


def test_policy_is_written_read_and_proved(found: Found, tmp_path: Path) -> None:
    """The policy of a search is a policy like any other: file, contract, reasons."""
    path = tmp_path / "policy.yaml"
    found.policy.save(path)
    policy = cw.Policy.load(path)
    assert policy == found.policy
    assert all("of budget 0.01" in rule.because for rule in policy.rules)
    model, batches = build()
    cw.contract(model, batches, cross_entropy, policy).check()


def test_model_is_untouched_by_a_search() -> None:
    """Weights, gradients, random state and modes are bit for bit what they were."""
    model, batches = build()
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    search(model, batches, cross_entropy, Budget(gradient=1e-1), settings=QUICK)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[n], v) for n, v in model.state_dict().items())
    assert all(v.dtype is torch.float32 for v in model.state_dict().values())
    assert all(weight.grad is None for weight in model.parameters())
    assert not model.training
    assert not any(m._forward_hooks for m in model.modules())


def test_same_seed_gives_the_same_policy_and_scores(found: Found) -> None:
    """Two searches with one seed agree to the last bit."""
    model, batches = build()
    again = search(model, batches, cross_entropy, Budget(gradient=1e-2), settings=QUICK)
    assert again.policy == found.policy
    assert again.scores == found.scores
    assert again.trials == found.trials


def test_scoring_takes_as_many_steps_for_any_number_of_modules() -> None:
    """The steps of scoring count formats and probes, never modules."""
    counts = {}
    for planted in (False, True):
        model, batches = build(planted=planted)
        result = search(
            model, batches, cross_entropy, Budget(gradient=5e-2), settings=QUICK
        )
        counts[len(result.units)] = result.scoring_steps
    assert len(counts) == 2
    assert set(counts.values()) == {2 + 2 + QUICK.num_probes}


def test_record_resumes_without_scoring_again(tmp_path: Path) -> None:
    """Scores, and trials of the same policies, are taken from the record."""
    model, batches = build()
    record = tmp_path / "search.json"

    def run(budget: float) -> Found:
        return search(
            model,
            batches,
            cross_entropy,
            Budget(gradient=budget),
            record=record,
            settings=QUICK,
        )

    first = run(1e-2)
    assert first.scoring_steps > 0
    second = run(1e-2)
    assert (second.scoring_steps, second.trial_steps) == (0, 0)
    assert second.policy == first.policy
    assert second.scores == first.scores
    assert run(5e-3).scoring_steps == 0


def test_killed_search_goes_on_with_the_next_probe(tmp_path: Path) -> None:
    """Probes that were done before a kill are not run again, and nothing changes."""
    model, batches = build()
    record = tmp_path / "search.json"
    budget = Budget(gradient=1e-2)

    def die(what: str, done: int, _: int) -> None:
        if (what, done) == ("probes", 3):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(
            model,
            batches,
            cross_entropy,
            budget,
            record=record,
            settings=QUICK,
            on_progress=die,
        )
    assert len(json.loads(record.read_text())["probes"]) == 3
    whole = search(model, batches, cross_entropy, budget, settings=QUICK)
    resumed = search(
        model, batches, cross_entropy, budget, record=record, settings=QUICK
    )
    assert resumed.policy == whole.policy
    assert resumed.scores.values == whole.scores.values
    assert resumed.scoring_steps == whole.scoring_steps - 3


@pytest.mark.parametrize("change", ["weights", "batches", "formats", "seed"])
def test_record_of_something_else_is_refused(tmp_path: Path, change: str) -> None:
    """A record is never mixed with another model, other data or other settings."""
    model, batches = build()
    record = tmp_path / "search.json"
    keywords: dict[str, Any] = {"record": record, "settings": QUICK}
    search(model, batches, cross_entropy, Budget(gradient=0.1), **keywords)
    if change == "weights":
        with torch.no_grad():
            model.head.weight[0, 0] += 1
    elif change == "batches":
        batches[1] = batches[0]
    elif change == "formats":
        keywords["formats"] = ("bf16", "fp32", "fp64")
    else:
        keywords["settings"] = SearchSettings(num_probes=4, seed=1)
    with pytest.raises(ContradictionError, match="another search"):
        search(model, batches, cross_entropy, Budget(gradient=0.1), **keywords)


def test_file_that_is_no_record_is_refused(tmp_path: Path) -> None:
    """A wrong file name destroys nothing."""
    path = tmp_path / "notes.json"
    path.write_text('{"mine": 1}')
    model, batches = build()
    with pytest.raises(StorageError, match="no record"):
        search(model, batches, cross_entropy, Budget(gradient=0.1), record=path)
    assert path.read_text() == '{"mine": 1}'


def test_other_budgets_are_solved_from_the_scores_alone(found: Found) -> None:
    """A looser budget needs no more rules, a tighter one no fewer, and nothing runs."""
    loose = found.policy_for(Budget(gradient=1e3))
    tight = found.policy_for(Budget(gradient=2e-3))
    assert not loose.rules
    assert len(tight.rules) > len(found.policy.rules)
    with pytest.raises(BudgetError, match="search again"):
        found.policy_for(Budget(output=1e-2))


def test_pareto_curve_falls(found: Found) -> None:
    """The more error is allowed, the less it costs; both ends are there."""
    usages = [point.usage for point in found.pareto]
    costs = [point.cost for point in found.pareto]
    assert usages == sorted(usages)
    assert costs == sorted(costs, reverse=True)
    assert costs[0] == pytest.approx(found.cost_highest)
    assert costs[-1] == pytest.approx(found.cost_lowest)


def test_points_of_the_pareto_curve_are_run_where_that_is_asked_for(
    found: Found,
) -> None:
    """What was measured stands beside what was predicted, for points that were run."""
    from castwise.numerics.search.bench import Bench

    settings = SearchSettings(num_probes=4, max_trials=5, num_points=4)
    model, batches = build()
    result = search(
        model, batches, cross_entropy, Budget(gradient=1e-2), settings=settings
    )
    before, after = (
        [point for point in each.pareto if point.measured is not None]
        for each in (found, result)
    )
    assert len(after) == len(before) + 4
    assert result.trials == found.trials
    assert result.trial_steps == found.trial_steps + 4 * len(batches)
    bench = Bench(model, batches, cross_entropy, reference="fp64", seed=0)
    point = max(after, key=lambda each: each.num_high)
    policy = result.policy_at(point)
    errors = [bench.errors(policy, result.budget, scale=1.0, at=at) for at in range(2)]
    worst = max(each["gradient"] for each in errors) / 1e-2
    assert point.measured == pytest.approx(worst, rel=1e-3)


def test_budget_that_nothing_meets_says_by_how_much_and_where() -> None:
    """The error of fp32 itself, its multiple of the budget, the worst module."""
    model, batches = build()
    with pytest.raises(BudgetError, match=r"times the budget.*planted.*wider format"):
        search(model, batches, cross_entropy, Budget(gradient=1e-7), settings=QUICK)


def test_budget_below_fp32_goes_to_fp64_where_that_is_allowed() -> None:
    """The same budget is met with fp64 among the formats, and not everywhere."""
    model, batches = build()
    wide = search(
        model,
        batches,
        cross_entropy,
        Budget(gradient=1e-5),
        formats=("bf16", "fp32", "fp64"),
        settings=SearchSettings(num_probes=4, max_trials=8),
    )
    assert wide.floor["gradient"] > 1e-5
    formats = chosen(wide)
    assert formats["planted.lift"] == "fp64"
    assert "fp32" in formats.values()
    assert max(each["gradient"] for each in wide.best.errors) <= 0.9e-5


class Loud(nn.Linear):
    """A product that ends beyond fp16's 65504, and comes back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by large weights."""
        return functional.linear(x, self.weight * 1e6, self.bias) / 1e6


def test_range_trouble_forces_fp16_out() -> None:
    """A module that overflows in fp16 is never given it, whatever the budget."""
    model, batches = build(planted=False)
    model.planted = Loud(WIDTH, WIDTH)
    result = search(
        model,
        batches,
        cross_entropy,
        Budget(gradient=0.5),
        formats=("fp16", "fp32"),
        settings=QUICK,
    )
    formats = chosen(result)
    assert formats["planted"] == "fp32"
    assert formats["blocks.0"] == "fp16"
    reasons = {unit.fqn: unit.because for unit in result.units}
    assert reasons["planted"] == "not finite in fp16"
    assert result.policy.loss_scale == "dynamic"


def test_query_key_and_value_move_together_unless_told_otherwise() -> None:
    """Modules that are given the same tensor share one decision."""
    model, batches = build()

    def groups(how: Any) -> list[set[str]]:
        result = search(
            model,
            batches,
            cross_entropy,
            Budget(gradient=0.1),
            groups=how,
            settings=QUICK,
        )
        names = [unit.fqn for unit in result.units]
        return [{names[at] for at in group} for group in result.scores.groups]

    together = {"attention.query", "attention.key", "attention.value"}
    assert together in groups("same_input")
    assert all(len(group) == 1 for group in groups("none"))
    mine = {"blocks.0", "blocks.1", "blocks.2", "head"}
    assert mine in groups([["blocks.*", "head"], ["embed"]])
    with pytest.raises(SettingsError, match="names no module"):
        groups([["absent.*"]])


def test_frozen_modules_are_scored_by_what_they_do_to_the_others() -> None:
    """A frozen planted module still ruins the gradients of trained ones."""
    model, batches = build()
    for name in ("embed", "attention", "planted"):
        model.get_submodule(name).requires_grad_(False)
    result = search(
        model, batches, cross_entropy, Budget(gradient=1e-2), settings=QUICK
    )
    assert chosen(result)["planted.lift"] == "fp32"


def test_module_without_any_gradient_is_held_high() -> None:
    """Where nothing can be measured, nothing is risked."""

    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            with torch.no_grad():
                return self.inner(x)

    model, batches = build(planted=False)
    model.planted = Hidden()
    result = search(model, batches, cross_entropy, Budget(gradient=0.5), settings=QUICK)
    unit = next(unit for unit in result.units if unit.fqn == "planted.inner")
    assert (unit.chosen, "no gradient" in unit.because) == ("fp32", True)


def test_module_called_twice_and_under_two_names_gets_one_format() -> None:
    """Shared modules are one unit, and the policy names them everywhere."""

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Planted()
            self.second = self.first

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(self.first(x))

    model, batches = build(planted=False)
    model.planted = Twice()
    result = search(
        model, batches, cross_entropy, Budget(gradient=2e-2), settings=QUICK
    )
    unit = next(u for u in result.scores.units if u.fqn == "planted.first.lift")
    assert (unit.num_calls, len(unit.names)) == (2, 2)
    assert chosen(result)["planted.first.lift"] == "fp32"
    cw.contract(model, batches, cross_entropy, result.policy).check()


def test_tied_weights_do_not_confuse_the_scores() -> None:
    """A head that borrows the weight of the embedding is no sensitive embedding."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(TOKENS, WIDTH)
            self.inner = nn.Linear(WIDTH, WIDTH)

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            x = self.embed(tokens)
            x = x + self.inner(x)
            return x @ self.embed.weight.T

    torch.manual_seed(0)
    _, batches = build()
    result = search(
        Tied(), batches, cross_entropy, Budget(gradient=3e-2), settings=QUICK
    )
    assert set(chosen(result).values()) == {"bf16"}


def test_modules_never_called_are_named_and_take_the_default(found: Found) -> None:
    """No evidence is no reason to be called safe."""
    assert found.scores.never_called == ("unused",)
    assert "unused" not in chosen(found)


class Router(nn.Module):
    """Sends each token to the better of two experts, which nearly tie."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, 2, bias=False)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(2))
        with torch.no_grad():
            self.gate.weight[1] = self.gate.weight[0] + 1e-5 * torch.randn(WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Take the better expert."""
        share, index = self.gate(x).softmax(-1).topk(1, dim=-1)
        both = torch.stack([expert(x) for expert in self.experts], -1)
        picked = both.gather(-1, index.unsqueeze(-2).expand(*x.shape, 1)).squeeze(-1)
        return share * picked


def test_router_that_nearly_ties_is_reported_and_held_high() -> None:
    """A decision that rounding turns over is told apart, with what decides it."""
    model, batches = build(planted=False, num_batches=3)
    model.planted = Router()
    result = search(
        model, batches, cross_entropy, Budget(gradient=10.0), settings=QUICK
    )
    assert result.unstable == {"planted": "topk", "planted.gate": "topk"}
    assert len(result.best.errors) == 3  # tried on every batch, not the first alone
    formats = chosen(result)
    assert formats["planted.gate"] == formats["planted"] == "fp32"
    assert formats["planted.experts.0"] == "bf16"


def test_outputs_and_loss_can_be_limited_too() -> None:
    """Every kind of error decides, and is measured on the policy that is returned."""
    model, batches = build()
    budget = Budget(output=3e-3, loss=3e-3)
    result = search(model, batches, cross_entropy, budget, settings=QUICK)
    assert chosen(result)["planted.lift"] == "fp32"
    for errors in result.best.errors:
        assert errors["output"] <= 0.9 * 3e-3
        assert errors["loss"] <= 0.9 * 3e-3


def test_measure_of_ones_own_decides() -> None:
    """The search keeps whatever number the user's function gives below its limit."""

    def flips(got: torch.Tensor, wanted: torch.Tensor) -> float:
        return float((got.double() - wanted.double()).abs().max())

    model, batches = build()
    budget = Budget(measure=Measure(name="largest change", of=flips, limit=0.05))
    result = search(model, batches, cross_entropy, budget, settings=QUICK)
    assert max(each["measure"] for each in result.best.errors) <= 0.9 * 0.05
    assert chosen(result)["planted.lift"] == "fp32"


def test_cost_by_measured_time_prefers_what_is_fast_here() -> None:
    """A module that is slow in bf16 stays in fp32, though the budget allows bf16."""
    import time

    class SlowInBf16(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if torch.is_autocast_enabled("cpu"):
                time.sleep(0.01)
            return super().forward(x)

    model, batches = build(planted=False)
    model.planted = SlowInBf16(WIDTH, WIDTH)
    keywords: dict[str, Any] = {"settings": QUICK}
    budget = Budget(gradient=1.0)
    by_flops = search(model, batches, cross_entropy, budget, **keywords)
    by_time = search(model, batches, cross_entropy, budget, cost="time", **keywords)
    assert chosen(by_flops)["planted"] == "bf16"
    assert chosen(by_time)["planted"] == "fp32"


def test_cost_of_ones_own_decides() -> None:
    """A user's cost may make fp32 cheaper in one place."""
    model, batches = build(planted=False)
    result = search(
        model,
        batches,
        cross_entropy,
        Budget(gradient=1.0),
        cost=lambda unit, name: float((unit.fqn == "head") != (name == "fp32")),
        settings=QUICK,
    )
    high = {fqn for fqn, name in chosen(result).items() if name == "fp32"}
    assert high == {"head"}


def test_high_parent_with_low_children_keeps_its_promise() -> None:
    """Attention in fp32 around projections in bf16 computes in fp32, and is proved."""
    model, batches = build(planted=False)
    result = search(
        model,
        batches,
        cross_entropy,
        Budget(gradient=1.0),
        cost=lambda unit, name: float((unit.type == "Attention") != (name == "fp32")),
        settings=QUICK,
    )
    assert chosen(result)["attention"] == "fp32"
    assert chosen(result)["attention.query"] == "bf16"
    proof = cw.contract(model, batches, cross_entropy, result.policy).check()
    products = [run for run in proof.select(module="attention") if run.num_flops]
    own = {run.actual for run in products if run.module == "attention"}
    assert own == {"fp32"}
    assert {r.actual for r in products if r.module == "attention.query"} == {"bf16"}


def test_dropout_drops_the_same_in_every_format() -> None:
    """With dropout the error is that of rounding, not of another draw."""
    model, batches = build(planted=False)
    model.planted = nn.Dropout(0.3)
    result = search(
        model, batches, cross_entropy, Budget(gradient=3e-2), settings=QUICK
    )
    assert result.floor["gradient"] < 1e-5
    assert set(chosen(result).values()) == {"bf16"}


def test_model_that_refuses_fp64_is_told_with_the_operator() -> None:
    """The module and the operator are named, and so is the way out."""

    class Narrow(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ torch.eye(WIDTH)

    model, batches = build(planted=False)
    model.planted = Narrow()
    with pytest.raises(TargetError, match=r"in planted.*reference='fp32'"):
        search(model, batches, cross_entropy, Budget(gradient=0.1), settings=QUICK)
    settings = SearchSettings(num_probes=4, max_trials=5, reference="fp32")
    model.planted = nn.Identity()
    result = search(
        model, batches, cross_entropy, Budget(gradient=0.1), settings=settings
    )
    assert result.floor["gradient"] == 0


def test_fp8_is_taken_where_the_budget_allows_it() -> None:
    """Products in emulated fp8 are a candidate like any other, tried for real."""
    model, batches = build(planted=False)
    result = search(
        model,
        batches,
        cross_entropy,
        Budget(gradient=2e-2),
        formats=("fp8_e4m3", "bf16", "fp32"),
        settings=QUICK,
    )
    formats = set(chosen(result).values())
    assert {"fp8_e4m3", "bf16"} <= formats
    assert max(each["gradient"] for each in result.best.errors) <= 0.9 * 2e-2


class Cached(nn.Module):
    """Appends to a cache that it is handed, as attention does when it generates."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Sum over all that was cached so far."""
        cache = cache or Cache()
        cache.kept.append(self.inner(x))
        return torch.stack(cache.kept).sum(0)


class Cache:
    """Tensors of earlier calls."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []


class Caching(nn.Module):
    """Hands one cache to two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Cached(), Cached()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Call both."""
        cache = Cache()
        return self.second(self.first(x, cache), cache=cache)


def test_replays_do_not_grow_a_cache_that_a_module_appends_to() -> None:
    """A module is replayed on the cache as it stood when it was called."""
    model, batches = build(planted=False)
    model.planted = Caching()
    result = search(
        model, batches, cross_entropy, Budget(gradient=5e-2), settings=QUICK
    )
    assert set(chosen(result).values()) == {"bf16"}
    used = {unit.fqn: unit.errors["bf16"] for unit in result.units}
    assert 0 < used["planted.second"] < 1


def test_module_that_cannot_be_replayed_alone_is_held_high() -> None:
    """What depends on more than its inputs is not scored, and the reason is told."""

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(WIDTH, WIDTH)
            self.is_armed = False

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if not self.is_armed:
                raise RuntimeError("called out of order")
            self.is_armed = False
            return self.inner(x) * 1.5

    class Arms(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.counted = Counted()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.counted.is_armed = True
            return self.counted(x)

    model, batches = build(planted=False)
    model.planted = Arms()
    result = search(model, batches, cross_entropy, Budget(gradient=0.5), settings=QUICK)
    unit = next(unit for unit in result.units if unit.fqn == "planted.counted")
    assert unit.chosen == "fp32"
    assert unit.because == "cannot be replayed alone: called out of order"


def test_compiled_model_is_searched_as_the_model_that_it_compiles() -> None:
    """Names in the policy are those of the user's model; nothing is compiled."""
    model, batches = build(planted=False)
    compiled = torch.compile(model, backend="eager")
    result = search(
        compiled, batches, cross_entropy, Budget(gradient=0.1), settings=QUICK
    )
    assert "attention.query" in chosen(result)


@pytest.mark.parametrize("text", ["gradient", "weights=1", "gradient=x", "loss=-1", ""])
def test_bad_budgets_are_refused(text: str) -> None:
    """Each with a sentence."""
    with pytest.raises(BudgetError):
        parse_budget(text)


def test_bad_formats_are_refused() -> None:
    """Nothing twice, nothing unknown, nothing that cannot run."""
    for formats in ([], ["bf16", "bf16"], ["p=bf16,c=bf16"]):
        with pytest.raises(SettingsError):
            parse_candidates(formats)
    with pytest.raises(FormatError):
        parse_candidates(["float32"])
