"""What a search may choose from: stages, operators, every format, residual streams."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.errors import SettingsError
from castwise.numerics.search import Budget, Found, SearchSettings, search
from castwise.numerics.search.bench import Bench
from castwise.numerics.search.candidates import default_of, parse_candidates

WIDTH, LENGTH = 15, 7
QUICK = SearchSettings(num_probes=4, max_trials=6)


class LargeMean(nn.Module):
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
    """One head, written out."""

    def __init__(self) -> None:
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend."""
        weights = (self.query(x) @ self.key(x).mT / WIDTH**0.5).softmax(-1)
        return self.out(weights @ x)


class Block(nn.Module):
    """Attention and a layer on a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.layer = Attention(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add both to the stream."""
        x = x + self.attention(x)
        return x + self.layer(x).tanh()


class Model(nn.Module):
    """A stream of two blocks with something planted in between.

    Args:
        planted: What stands between the blocks.
        into: What begins the stream: a layer hands out bf16 in a bf16 region, so the
            whole stream is bf16; nothing leaves it in the inputs' fp32.
    """

    def __init__(
        self, planted: nn.Module | None = None, into: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.into = into or nn.Identity()
        self.first, self.second = Block(), Block()
        self.planted = planted
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Predict."""
        x = self.first(self.into(x))
        x = x if self.planted is None else x + self.planted(x)
        return self.head(self.second(x))


def batches(count: int = 2) -> list[tuple[torch.Tensor, ...]]:
    """Random batches, always the same."""
    draw = torch.Generator().manual_seed(5)
    return [
        (
            torch.randn(3, LENGTH, WIDTH, generator=draw),
            torch.randn(3, LENGTH, 3, generator=draw),
        )
        for _ in range(count)
    ]


def searched(model: nn.Module, budget: Budget, **keywords: Any) -> Found:
    """Search on two batches."""
    keywords = {"settings": QUICK, **keywords}
    return search(model, batches(), functional.mse_loss, budget, **keywords)


def chosen(found: Found) -> dict[str, str]:
    """Unit -> candidate."""
    return {unit.fqn: unit.chosen for unit in found.units}


def made(
    planted: Callable[[], nn.Module] | None = None,
    into: Callable[[], nn.Module] | None = None,
) -> Model:
    """A model, always the same but for what is planted and what begins it."""
    torch.manual_seed(2)
    parts = [None if make is None else make() for make in (planted, into)]
    torch.manual_seed(2)
    return Model(*parts)


@pytest.fixture(scope="module")
def staged() -> Found:
    """A search that may hold the forward alone in fp32."""
    formats = ("bf16", "fp32", "fp32/bf16")
    return searched(made(LargeMean), Budget(gradient=2e-2), formats=formats)


def test_module_ruined_by_its_forward_alone_keeps_a_cheap_backward(
    staged: Found,
) -> None:
    """A layer of large mean needs digits in what it hands out, not in its gradient."""
    assert chosen(staged)["planted.lift"] == "fp32/bf16"
    whole = searched(made(LargeMean), Budget(gradient=2e-2))
    assert chosen(whole)["planted.lift"] == "fp32"
    assert staged.cost < whole.cost


def test_staged_policy_is_measured_written_and_proved(staged: Found) -> None:
    """It says `stage: backward`, keeps the budget again, and holds its contract."""
    policy = cw.Policy.parse(staged.policy.to_yaml())
    assert policy == staged.policy
    stages = {rule.stage: rule for rule in policy.rules if rule.module}
    assert stages["backward"].module == "planted.lift"
    assert stages["backward"].precision.compute == "bf16"
    model = made(LargeMean)
    bench = Bench(model, batches(), functional.mse_loss, reference="fp64", seed=0)
    for at in range(2):
        errors = bench.errors(policy, staged.budget, scale=1.0, at=at)
        assert errors["gradient"] <= 0.9 * 2e-2
    cw.contract(made(LargeMean), batches(), functional.mse_loss, policy).check()


def test_module_that_holds_others_gets_no_backward_of_its_own(staged: Found) -> None:
    """All modules in it would be run again, which no score of its own tells."""
    score = staged.scores.values["first.attention"]["fp32/bf16"]
    assert "holds other modules" in score.forced
    assert not staged.scores.values["first.layer"]["fp32/bf16"].forced


class _Reconstructed(torch.autograd.Function):
    """Passes on; its backward adds a large number and takes it off again."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Pass on."""
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Lose digits, as a state that is reconstructed in the backward does."""
        del ctx
        return (gradient + 1.0) - 1.0


class Reconstructed(nn.Linear):
    """A layer whose gradient alone is sensitive."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; the backward is the trouble."""
        found: torch.Tensor = _Reconstructed.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return found


def test_module_ruined_by_its_backward_alone_keeps_a_cheap_forward() -> None:
    """Where a user's cost counts forwards, fp32 is spent on the backward only."""
    price = {"bf16": 1.0, "bf16/fp32": 1.2, "fp32": 2.0}
    found = searched(
        made(partial(Reconstructed, WIDTH, WIDTH)),
        Budget(gradient=2e-2),
        formats=("bf16", "bf16/fp32", "fp32"),
        cost=lambda unit, name: (unit.num_flops + unit.num_elements) * price[name],
    )
    formats = chosen(found)
    assert formats.pop("planted") == "bf16/fp32"
    assert set(formats.values()) == {"bf16"}


def test_backward_is_free_where_only_the_output_is_limited() -> None:
    """A budget of the output never pays for digits in a backward."""
    found = searched(
        made(LargeMean),
        Budget(output=3e-3),
        formats=("bf16", "fp32", "fp32/bf16"),
    )
    leaves = {u.fqn for u in found.units if u.type in {"Linear", "LayerNorm"}}
    high = {f: name for f, name in chosen(found).items() if name != "bf16"}
    assert high["planted.lift"] == "fp32/bf16"
    assert all(name == "fp32/bf16" for f, name in high.items() if f in leaves)


class _SlowInBf16(torch.autograd.Function):
    """Passes on; its backward takes long in bf16, as fused attention does on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        """Pass on."""
        del ctx
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        """Pass on, after a while."""
        del ctx
        if gradient.dtype is torch.bfloat16:
            time.sleep(0.03)
        return gradient


class SlowBackward(nn.Linear):
    """A layer whose gradient alone is slow in bf16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply; the backward takes the time."""
        found: torch.Tensor = _SlowInBf16.apply(super().forward(x))  # type: ignore[no-untyped-call]
        return found


def test_measured_time_finds_a_backward_that_is_slow_in_bf16() -> None:
    """It stays in fp32 though flops say bf16; a backward of its own is no way out."""
    keywords: dict[str, Any] = {"formats": ("bf16", "fp32", "fp32/bf16")}
    model = made(partial(SlowBackward, WIDTH, WIDTH))
    budget = Budget(gradient=1.0)
    assert chosen(searched(model, budget, **keywords))["planted"] == "bf16"
    by_time = searched(model, budget, cost="time", **keywords)
    assert chosen(by_time)["planted"] == "fp32"


def test_time_of_a_class_is_what_whole_steps_save() -> None:
    """All layers of a class in fp32 cost what a step costs more, and no more."""
    found = searched(
        made(partial(SlowBackward, WIDTH, WIDTH)), Budget(gradient=1.0), cost="time"
    )
    (slow,) = (unit for unit in found.units if unit.fqn == "planted")
    assert 0.02 < slow.costs["bf16"] - slow.costs["fp32"] < 0.3
    assert all(cost >= 0 for unit in found.units for cost in unit.costs.values())


@pytest.mark.parametrize(
    ("formats", "message"),
    [
        (["bf16/bf16", "fp32"], "another format than the forward"),
        (["fp32/bf16"], "forward and backward alike"),
        (["fp32/", "fp32"], "need one of the formats"),
    ],
)
def test_staged_formats_that_say_nothing_are_refused(
    formats: list[str], message: str
) -> None:
    """Each with a sentence."""
    with pytest.raises(cw.CastwiseError, match=message):
        parse_candidates(formats)


def test_default_is_never_staged() -> None:
    """The first low format of both stages is what the model is laid out in."""
    candidates = parse_candidates(["fp32/bf16", "bf16/fp32", "fp16", "bf16"])
    assert default_of(candidates).name == "fp16"
    assert [each.work for each in candidates] == [2.5, 3.5, 1.5, 1.5]


@pytest.fixture(scope="module")
def by_operator() -> Found:
    """A search that may put norms and softmax low."""
    settings = SearchSettings(num_probes=4, max_trials=6, operators=True)
    return searched(made(LargeMean), Budget(gradient=2e-2), settings=settings)


def test_operator_that_bears_it_runs_low_in_the_whole_model(
    by_operator: Found,
) -> None:
    """Softmax over seven places may; a norm behind a large mean may not."""
    operators = {u.fqn: u.chosen for u in by_operator.units if u.is_operator}
    assert operators == {"operator layer_norm": "fp32", "operator softmax": "bf16"}
    rules = {rule.op: rule for rule in by_operator.policy.rules if rule.op}
    assert rules.keys() == {"softmax"}
    assert "of budget" in rules["softmax"].because


def test_policy_with_operators_is_measured_written_and_proved(
    by_operator: Found,
) -> None:
    """The softmax really ran in bf16, and the budget is kept."""
    policy = cw.Policy.parse(by_operator.policy.to_yaml())
    proof = cw.contract(made(LargeMean), batches(), functional.mse_loss, policy)
    forward = proof.check().select(stage="forward")
    assert {run.actual for run in forward if run.op == "softmax"} == {"bf16"}
    assert by_operator.best.usage <= 0.9
    assert "of 16 units" in by_operator.summary()


class Norms(nn.Module):
    """Two norms that bear bf16, and one behind a large mean that does not."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.mean = LargeMean()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise three times."""
        return self.mean(self.second(self.first(x).tanh()))


def test_operator_runs_low_while_the_one_that_does_not_bear_it_is_held_high() -> None:
    """Two norms in bf16 save more than one in an island costs."""
    found = searched(
        made(Norms),
        Budget(gradient=2e-2),
        settings=SearchSettings(num_probes=4, max_trials=10, operators=True),
    )
    formats = chosen(found)
    assert formats["operator layer_norm"] == "bf16"
    assert formats["planted.mean.norm"] == "fp32"
    assert formats["planted.first"] == formats["planted.second"] == "bf16"
    assert found.best.usage <= 0.9


def test_scores_of_operators_survive_their_record(by_operator: Found) -> None:
    """What was read solves as what was written."""
    from castwise.numerics.search.scores import Scores

    text = json.dumps(by_operator.scores.record())
    assert Scores.from_record(json.loads(text)) == by_operator.scores


def test_operators_are_left_to_the_table_unless_asked_for() -> None:
    """Without the setting there are modules only, and no step is spent."""
    found = searched(made(), Budget(gradient=5e-2))
    assert not any(unit.is_operator for unit in found.units)
    assert found.scoring_steps == 2 + 2 + QUICK.num_probes


class Loud(nn.Linear):
    """A product that ends beyond fp16's 65504, and comes back."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by large weights."""
        return functional.linear(x, self.weight * 1e6, self.bias) / 1e6


def test_fp16_serves_where_digits_count_and_bf16_where_range_does() -> None:
    """Three formats, each where it is the cheapest that holds."""
    found = searched(
        made(partial(Loud, WIDTH, WIDTH)),
        Budget(gradient=3e-3),
        formats=("bf16", "fp16", "fp32"),
        settings=SearchSettings(num_probes=4, max_trials=10),
    )
    formats = chosen(found)
    assert formats["planted"] in {"bf16", "fp32"}
    assert list(formats.values()).count("fp16") >= 5
    reasons = found.scores.values["planted"]["fp16"].forced
    assert reasons == "not finite in fp16"
    assert found.policy.loss_scale == "dynamic"
    assert max(each["gradient"] for each in found.best.errors) <= 0.9 * 3e-3


@pytest.mark.parametrize("low", ["fp8_e4m3", "fp8_e5m2"])
def test_both_kinds_of_fp8_are_scored_and_tried(low: str) -> None:
    """A loose budget lets products run in it; a tight one takes all of them back."""
    formats = (low, "bf16", "fp32")
    loose = searched(made(), Budget(gradient=0.15), formats=formats)
    assert low in chosen(loose).values()
    tight = searched(made(), Budget(gradient=6e-3), formats=formats)
    assert low not in chosen(tight).values()


def test_fp64_is_taken_for_what_fp32_ruins_and_for_little_else() -> None:
    """A large mean of 300,000 takes six digits; what is handed over needs them, too."""
    wide = "c=fp64,o=fp64"
    model = made(LargeMean)
    nn.init.constant_(model.get_submodule("planted.lift").bias, 3e5)
    found = searched(
        model,
        Budget(gradient=1e-4),
        formats=("fp32", wide),
        settings=SearchSettings(num_probes=4, max_trials=10),
    )
    formats = chosen(found)
    assert found.floor["gradient"] > 1e-3
    assert formats["planted.lift"] == formats["planted.norm"] == wide
    assert list(formats.values()).count(wide) <= 4


def test_tf32_is_a_candidate_like_any_other() -> None:
    """A device without tf32 computes it in fp32, so its error is that of fp32."""
    found = searched(made(), Budget(gradient=1e-3), formats=("bf16", "tf32"))
    assert "tf32" in chosen(found).values()


def test_residual_stream_in_bf16_is_scored_as_it_really_runs() -> None:
    """What the stream rounds is blamed on the blocks that add to it."""
    model = made(LargeMean, into=partial(nn.Linear, WIDTH, WIDTH))
    found = searched(model, Budget(gradient=5e-3))
    used = {unit.fqn: unit.errors["bf16"] for unit in found.units}
    assert used["second"] > 0.1
    assert "planted.lift" in {f for f, name in chosen(found).items() if name == "fp32"}
    held = searched(made(LargeMean), Budget(gradient=5e-3))
    in_fp32 = {unit.fqn: unit.errors["bf16"] for unit in held.units}
    assert in_fp32["first"] < 0.5 * used["first"]


def test_prediction_is_right_for_a_residual_stream_in_bf16() -> None:
    """All low, predicted and measured, agree within a factor of two."""
    model = made(into=partial(nn.Linear, WIDTH, WIDTH))
    settings = SearchSettings(num_probes=16, max_trials=1)
    found = searched(model, Budget(gradient=1.0), settings=settings)
    assert not found.policy.rules
    assert 0.5 < found.best.usage / found.best.predicted < 2.0


def test_stream_may_be_put_into_bf16_by_what_begins_it() -> None:
    """`c=fp32,o=bf16` computes in fp32 and hands out bf16, where that is cheaper."""
    handed = "c=fp32,o=bf16"
    model = made(into=partial(nn.LayerNorm, WIDTH))
    found = searched(
        model,
        Budget(gradient=5e-2),
        formats=("bf16", handed, "fp32"),
        cost=lambda unit, name: float(
            name != (handed if unit.fqn == "into" else "bf16")
        ),
    )
    assert chosen(found)["into"] == handed
    bench = Bench(model, batches(), functional.mse_loss, reference="fp64", seed=0)
    with bench.under(found.policy) as region, region.entered("cpu"):
        assert model.into(batches()[0][0]).dtype is torch.bfloat16


def test_search_that_was_killed_while_trying_goes_on_with_the_next_trial(
    tmp_path: Any,
) -> None:
    """Trials that were done before a kill are not run again, and nothing changes."""
    record = tmp_path / "search.json"
    budget = Budget(gradient=6e-3)

    def die(what: str, done: int, _: int) -> None:
        if (what, done) == ("trials", 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        searched(made(LargeMean), budget, record=record, on_progress=die)
    whole = searched(made(LargeMean), budget)
    resumed = searched(made(LargeMean), budget, record=record)
    assert len(whole.trials) > 2
    assert resumed.scoring_steps == 0
    assert 0 < resumed.trial_steps < whole.trial_steps
    assert (resumed.policy, resumed.trials) == (whole.policy, whole.trials)


def test_record_without_operators_is_not_taken_for_one_with_them(
    tmp_path: Any,
) -> None:
    """Scores of modules alone say nothing about operators."""
    record = tmp_path / "search.json"
    searched(made(), Budget(gradient=5e-2), record=record)
    settings = SearchSettings(num_probes=4, max_trials=6, operators=True)
    with pytest.raises(cw.CastwiseError, match="another search"):
        searched(made(), Budget(gradient=5e-2), record=record, settings=settings)


def test_settings_without_any_probe_are_refused() -> None:
    """There is nothing to solve from."""
    with pytest.raises(SettingsError):
        SearchSettings(num_probes=0)
