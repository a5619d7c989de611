from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from castwise import fitting
from castwise.decision import Decision
from castwise.errors import (
    LossScaleError,
    RuleError,
    SettingsError,
    StepError,
    UnmatchedRuleError,
    UnsupportedFormatError,
)
from castwise.loss_scale import DynamicScale, NoScale, StaticScale
from castwise.optim import AdamW
from castwise.optim.clipping import ByGroup, ByRow
from castwise.policy import Policy, preset
from castwise.training.step import Run, Skipped, Stepped, prepare

PRESETS = ("32-true", "64-true", "bf16-mixed", "bf16-true", "16-mixed", "16-true")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_model() -> nn.Sequential:
    """Embedding, norm, product, head: small and odd."""
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))


def make_run(name: str = "bf16-mixed", **settings: Any) -> Run:
    """A run of the small model with SGD, built before the policy is applied."""
    model = make_model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    return prepare(model, optimizer, preset(name), **settings)


def loss_of(run: Run, factor: float = 1.0) -> torch.Tensor:
    """A loss of the run's model on fixed data."""
    x = torch.linspace(-1, 1, 55).reshape(11, 5)
    loss: torch.Tensor = factor * run.model(x).pow(2).mean()
    return loss


def weights_of(run: Run) -> list[torch.Tensor]:
    """Copies of all weights."""
    return [weight.detach().clone() for weight in run.model.parameters()]


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_trains_with_an_optimizer_built_before(name: str) -> None:
    """Parameters keep their identity when their format changes, so SGD moves them."""
    run = make_run(name)
    held = [w for group in run.optimizer.param_groups for w in group["params"]]
    assert all(a is b for a, b in zip(held, run.model.parameters(), strict=True))
    losses = []
    for _ in range(12):
        with run.step() as step:
            step.backward(loss_of(run))
        assert isinstance(step.outcome, Stepped)
        losses.append(step.outcome.loss)
    assert losses[-1] < 0.5 * losses[0]
    assert all(w.grad is None for w in run.model.parameters())
    assert run.num_stepped == 12


@pytest.mark.parametrize(
    ("name", "held", "compute", "scale"),
    [
        ("32-true", {"fp32": 80}, "fp32", "none"),
        ("bf16-mixed", {"fp32": 80}, "bf16", "none"),
        ("bf16-true", {"bf16": 80}, "bf16", "none"),
        ("16-mixed", {"fp32": 80}, "fp16", "dynamic"),
        ("16-true", {"fp16": 80}, "fp16", "dynamic"),
        ("64-true", {"fp64": 80}, "fp64", "none"),
    ],
)
def test_what_is_in_force_is_read_from_the_model(
    name: str, held: dict[str, int], compute: str, scale: str
) -> None:
    """The record says what the weights are held in, not what was asked for."""
    record = make_run(name).precision
    assert record.parameters == held
    assert record.compute == compute
    assert record.loss_scale.value == scale
    assert record.asked == record.effective == preset(name)
    assert record.loss_scale.because in record.summary()


def test_fp32_steps_are_those_of_a_loop_written_by_hand() -> None:
    """Without a rule nothing changes, to the last bit, clipping included."""
    run = make_run("32-true", clip_norm=0.05)
    by_hand = make_model()
    by_hand.load_state_dict(run.model.state_dict())
    optimizer = torch.optim.SGD(by_hand.parameters(), lr=0.1, momentum=0.9)
    x = torch.linspace(-1, 1, 55).reshape(11, 5)
    for _ in range(5):
        by_hand(x).pow(2).mean().backward()
        norm = nn.utils.clip_grad_norm_(by_hand.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
        with run.step() as step:
            step.backward(loss_of(run))
        assert step.outcome.gradient_norm == pytest.approx(norm.item(), rel=1e-6)
        assert step.outcome.clipped
    for ours, theirs in zip(run.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_gradients_are_clipped_by_group_and_by_row_under_any_scale() -> None:
    """What is clipped is unscaled already; the outcome says that it happened."""
    x = torch.linspace(-1, 1, 55).reshape(11, 5)
    for how in (ByGroup(max_norm=1e-3), ByRow(ratio=1e-3)):
        moved = []
        for scale in (NoScale(), StaticScale(1024.0)):
            torch.manual_seed(0)
            model = make_model()
            groups = [
                {"params": model[0].parameters(), "max_norm": 1e-2},
                {"params": [*model[1].parameters(), *model[3].parameters()]},
            ]
            optimizer = torch.optim.SGD(groups, lr=1.0)
            policy = preset("32-true")
            run = prepare(model, optimizer, policy, clip_norm=how, loss_scale=scale)
            before = weights_of(run)
            with run.step() as step:
                step.backward(run.model(x).pow(2).mean())
            assert isinstance(step.outcome, Stepped)
            assert step.outcome.clipped
            assert step.outcome.gradient_norm > 0.1
            after = weights_of(run)
            moved.append([a - b for a, b in zip(after, before, strict=True)])
        for one, other in zip(*moved, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)
        first = torch.cat([each.flatten() for each in moved[0][:2]]).norm()
        if isinstance(how, ByGroup):
            assert first.item() == pytest.approx(1e-2, rel=1e-3)


def test_fp16_steps_are_those_of_grad_scaler() -> None:
    """Same scale and same weights as autocast with torch's scaler, skips included."""
    run = make_run("16-mixed", loss_scale=DynamicScale(initial=2.0**24, interval=3))
    optimizer_free = make_run("16-mixed")
    by_hand = optimizer_free.model
    optimizer = optimizer_free.optimizer
    by_hand.load_state_dict(run.model.state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=3)
    outcomes = []
    for _ in range(20):
        with optimizer_free.region():
            loss = loss_of(optimizer_free)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        with run.step() as step:
            step.backward(loss_of(run))
        outcomes.append(type(step.outcome))
        assert run.loss_scale.scale == scaler.get_scale()
    assert {Stepped, Skipped} == set(outcomes)
    for ours, theirs in zip(run.model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_several_backwards_add_up() -> None:
    """Two halves of a loss step as the whole does, under a loss scale too."""
    for name in ("32-true", "16-mixed"):
        one, two = make_run(name), make_run(name)
        two.model.load_state_dict(one.model.state_dict())
        with one.step() as step:
            step.backward(loss_of(one))
        with two.step() as halves:
            halves.backward(loss_of(two, 0.5))
            halves.backward(loss_of(two, 0.5))
        assert halves.outcome.loss == pytest.approx(step.outcome.loss, rel=1e-3)
        for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_gradient_that_is_not_finite_never_reaches_the_weights(
    name: str, value: float
) -> None:
    """Under every format: weights and moments stay, and the parameter is named."""
    run = make_run(name)
    with run.step() as step:
        step.backward(loss_of(run))
    before, moments = weights_of(run), copy.deepcopy(run.optimizer.state_dict())
    with run.step() as step:
        step.backward(loss_of(run))
        run.model[3].weight.grad[1, 2] = value
        run.model[3].bias.grad[0] = value
    assert isinstance(step.outcome, Skipped)
    assert step.outcome.parameter == "3.weight"
    assert ("NaN" if math.isnan(value) else "inf") in step.outcome.because
    assert "'3.weight'" in step.outcome.because
    assert math.isfinite(step.outcome.loss)
    for now, then in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    after = run.optimizer.state_dict()["state"]
    for at, state in moments["state"].items():
        assert torch.equal(after[at]["momentum_buffer"], state["momentum_buffer"])
    assert (run.num_stepped, run.num_skipped) == (1, 1)
    with run.step() as step:
        step.backward(loss_of(run))
    assert isinstance(step.outcome, Stepped), "training goes on"


def test_a_skip_names_the_operator_that_wrote_the_gradient() -> None:
    """It is read off the graph, through the casts that autocast put in between."""
    run = make_run("bf16-mixed")
    with run.step() as step:
        loss = loss_of(run) + (run.model[1].weight * math.inf).mean()
        step.backward(torch.nan_to_num(loss.detach()) + loss - loss.detach())
    assert isinstance(step.outcome, Skipped)
    run = make_run("bf16-mixed")
    with run.step() as step:
        step.backward(loss_of(run))
        run.model[0].weight.grad.fill_(math.inf)
    assert step.outcome.op == "Addmm"


def test_a_loss_that_is_not_finite_is_said_to_be_the_cause() -> None:
    """Then an operator of the forward is blamed, here one of the loss."""
    run = make_run()
    with run.step() as step:
        step.backward(loss_of(run) * math.nan)
    assert isinstance(step.outcome, Skipped)
    assert step.outcome.because.startswith("the loss is NaN, so the forward went wrong")
    assert (step.outcome.op, step.outcome.module) == ("mul", None)
    assert step.outcome.stage == "forward"
    assert step.outcome.parameter == "0.weight"


def test_an_exception_leaves_everything_as_it_was() -> None:
    """Weights, gradients, scale and autocast are untouched, and the run goes on."""
    run = make_run("16-mixed")
    before, scale = weights_of(run), run.loss_scale.state_dict()
    with pytest.raises(ZeroDivisionError), run.step() as step:
        step.backward(loss_of(run))
        1 / 0  # noqa: B018 -- the exception is what is tested
    assert all(w.grad is None for w in run.model.parameters())
    assert run.loss_scale.state_dict() == scale
    assert not torch.is_autocast_enabled("cpu")
    assert (run.num_stepped, run.num_skipped) == (0, 0)
    for now, then in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    with pytest.raises(StepError, match="outcome of a step is known"):
        _ = step.outcome
    with run.step() as step:
        step.backward(loss_of(run))
    assert isinstance(step.outcome, Stepped)


def test_wrong_order_is_refused_with_the_remedy() -> None:
    """No backward, nested steps, use after the end, a second use."""
    run = make_run()
    with pytest.raises(StepError, match=r"not loss\.backward\(\)"), run.step():
        loss_of(run).backward()
    with pytest.raises(StepError, match="steps do not nest"), run.step(), run.step():
        pass
    with run.step() as step:
        step.backward(loss_of(run))
    with pytest.raises(StepError, match="backward needs an open step"):
        step.backward(loss_of(run))
    with pytest.raises(StepError, match="used once"), step:
        pass
    with pytest.raises(StepError, match="needs an open step"):
        run.step().backward(loss_of(run))
    assert run.num_stepped == 1


def test_losses_that_have_no_gradient_are_refused() -> None:
    """Numbers, vectors and detached losses: each with its remedy."""
    run = make_run()
    for loss, need in (
        (1.0, "as a tensor, got float"),
        (torch.ones(3, requires_grad=True), r"got shape \(3,\)"),
        (torch.ones(()), "was detached"),
    ):
        with pytest.raises(StepError, match=need), run.step() as step:
            step.backward(loss)


def test_gradients_of_elsewhere_are_refused() -> None:
    """A gradient that was not scaled here would be mixed with ones that were."""
    run = make_run()
    loss_of(run).backward()
    with pytest.raises(StepError, match=r"'0.weight' already holds a gradient"):
        run.step().__enter__()
    run.optimizer.zero_grad()
    with run.step() as step:
        step.backward(loss_of(run))


def test_inference_has_the_precision_and_no_gradients() -> None:
    """Between steps and inside of one, and training goes on unharmed."""
    run, alone = make_run(), make_run()
    alone.model.load_state_dict(run.model.state_dict())
    x = torch.randn(2, 5)
    with run.inference():
        out = run.model(x)
    assert not out.requires_grad
    assert out.dtype is torch.bfloat16
    with run.step() as step:
        with run.inference():
            run.model(x)
        step.backward(loss_of(run))
    with alone.step() as step:
        step.backward(loss_of(alone))
    for a, b in zip(run.model.parameters(), alone.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_state_resumes_bit_by_bit() -> None:
    """Loss scale, counts and phase come back; the future is the same."""
    run = make_run("16-mixed", loss_scale=DynamicScale(initial=2.0**24, interval=3))
    for _ in range(9):
        with run.step() as step:
            step.backward(loss_of(run))
    fresh = make_run("16-mixed")
    fresh.model.load_state_dict(run.model.state_dict())
    fresh.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    fresh.load_state_dict(run.state_dict())
    assert fresh.state_dict() == run.state_dict()
    for each in (run, fresh):
        for _ in range(5):
            with each.step() as step:
                step.backward(loss_of(each))
    assert fresh.state_dict() == run.state_dict()
    for a, b in zip(run.model.parameters(), fresh.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_foreign_states_are_refused() -> None:
    """A state of another kind of run does not load silently."""
    with pytest.raises(LossScaleError, match="of kind 'dynamic'"):
        make_run().load_state_dict(make_run("16-mixed").state_dict())
    with pytest.raises(StepError, match="lacks loss_scale, phase"):
        make_run().load_state_dict({})


def test_removal_ends_the_run() -> None:
    """The model is plain again; the run says so."""
    run = make_run("bf16-true")
    run.remove()
    assert {w.dtype for w in run.model.parameters()} == {torch.float32}
    assert type(run.model) is nn.Sequential
    with pytest.raises(StepError, match="removed from its model"):
        run.step().__enter__()


def test_a_format_that_the_device_cannot_do_is_an_error_or_a_recorded_fallback(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Never a silent exchange: the error has the remedy, the record both formats."""

    def supports(_: object, fmt: str) -> Decision[bool]:
        return Decision(fmt != "bf16", f"no {fmt} here")

    monkeypatch.setattr(fitting, "supports", supports)
    with pytest.raises(UnsupportedFormatError, match=r"needs bf16 on cpu.*fallback="):
        make_run("bf16-mixed")
    with pytest.raises(UnsupportedFormatError, match="the fallback bf16 cannot"):
        make_run("bf16-mixed", fallback="bf16")
    record = make_run("bf16-mixed", fallback="fp32").precision
    assert record.asked == preset("bf16-mixed")
    assert record.compute == "fp32"
    assert [str(each) for each in record.fallbacks] == [
        "fp32 (instead of bf16: no bf16 here)"
    ]
    assert "fallback: fp32" in record.summary()


def test_tf32_is_refused_on_a_cpu() -> None:
    """The device itself is asked, not a list."""
    model = make_model()
    asked = Policy(name="tf32").with_default("p=fp32,c=tf32,o=fp32,r=fp32")
    with pytest.raises(UnsupportedFormatError, match="tf32"):
        prepare(model, torch.optim.SGD(model.parameters()), asked)


def test_settings_that_make_no_run_are_refused() -> None:
    """Each mistake has its sentence, and the model stays as it was."""
    model = make_model()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(SettingsError, match="clip_norm needs to be above 0; got -1"):
        prepare(model, sgd, preset("bf16-true"), clip_norm=-1)
    with pytest.raises(SettingsError, match="LBFGS needs a closure"):
        prepare(model, torch.optim.LBFGS(model.parameters()), preset("bf16-true"))
    with pytest.raises(SettingsError, match="none of the model's parameters"):
        prepare(make_model(), sgd, preset("bf16-true"))
    rule = preset("bf16-true").with_rule(module="solver", precision="fp32")
    with pytest.raises(UnmatchedRuleError):
        prepare(model, sgd, rule)
    assert {w.dtype for w in model.parameters()} == {torch.float32}


def test_moments_in_another_format_are_refused() -> None:
    """A policy that changes the weights under a used optimizer changes nothing."""
    model = make_model()
    adam = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 5)).sum().backward()
    adam.step()
    adam.zero_grad()
    with pytest.raises(StepError, match="call prepare before the first step"):
        prepare(model, adam, preset("64-true"))
    assert {w.dtype for w in model.parameters()} == {torch.float32}
    prepare(model, adam, preset("bf16-mixed")).remove()
    prepare(model, adam, preset("bf16-true"))  # split weights are fp32 in every step


def test_islands_step_beside_low_modules() -> None:
    """The rule's module computes and steps in fp32 inside bf16-true."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    asked = preset("bf16-true").with_rule(type="LayerNorm", precision="p=fp32,c=fp32")
    run = prepare(model, optimizer, asked)
    assert run.precision.islands == "1 module in fp32 inside bf16: 1"
    assert run.precision.parameters == {"bf16": 66, "fp32": 14}
    for _ in range(4):
        with run.step() as step:
            step.backward(loss_of(run))
    assert isinstance(step.outcome, Stepped)
    assert optimizer.state[model[1].weight]["exp_avg"].dtype is torch.float32


def test_a_low_island_in_an_fp32_model_obeys_the_operator_table() -> None:
    """Its product is bf16, and its softmax is fp32 as the table says."""

    class Gate(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            """Note the formats of a product and of a softmax."""
            product = super().forward(x)
            self.seen = product.dtype, product.softmax(-1).dtype
            return product

    model = nn.Sequential(nn.Linear(5, 5), Gate(5, 3))
    asked = preset("32-true").with_rule(module="1", precision="c=bf16")
    run = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), asked)
    outside = []
    model[0].register_forward_hook(lambda *given: outside.append(given[2].dtype))
    with run.step() as step:
        step.backward(loss_of(run))
    assert model[1].seen == (torch.bfloat16, torch.float32)
    assert outside == [torch.float32]


def test_phases_switch_between_steps_only() -> None:
    """The precision follows the phase; a step that is open keeps its own."""
    model = make_model()
    asked = preset("bf16-mixed").with_phase_precision("correct", "c=fp32,o=fp32")
    run = prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), asked)
    seen = []
    model[0].register_forward_hook(lambda *given: seen.append(given[2].dtype))
    for phase in ("full", "correct", "full"):
        run.phase = phase
        with run.step() as step:
            step.backward(loss_of(run))
        assert run.precision.phase == phase
    assert seen == [torch.bfloat16, torch.float32, torch.bfloat16]
    with pytest.raises(StepError, match="while a step is open"), run.step():
        run.phase = "correct"


def test_an_explicit_loss_scale_wins() -> None:
    """And the record says that it was given."""
    run = make_run("bf16-mixed", loss_scale=StaticScale(8.0))
    assert run.precision.loss_scale.because == "it was given to prepare"
    with run.step() as step:
        step.backward(loss_of(run))
    assert step.outcome.scale == 8.0
    assert isinstance(make_run().loss_scale, NoScale)


def test_at_the_floor_the_run_stops_after_telling_the_outcome() -> None:
    """LossScaleError leaves the block; weights are safe and the cause is readable."""
    run = make_run("16-mixed", loss_scale=DynamicScale(initial=1.0))
    before = weights_of(run)
    step = run.step()
    with pytest.raises(LossScaleError, match=r"'0\.weight' holds NaN"), step:
        step.backward(loss_of(run) * math.nan)
    assert isinstance(step.outcome, Skipped)
    for now, then in zip(run.model.parameters(), before, strict=True):
        torch.testing.assert_close(now, then, rtol=0, atol=0)
    assert all(w.grad is None for w in run.model.parameters())


def test_an_unknown_operator_is_refused_before_the_first_step() -> None:
    """By the line of its rule, with the nearest names; the model stays as it was."""
    model = nn.Linear(3, 3)
    text = "castwise: 1\ndefault: p=fp32,c=bf16\nrules:\n  - op: softmx\n"
    policy = Policy.parse(f"{text}    precision: c=fp32\n", where="mine.yaml")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(RuleError, match=r"mine.yaml:4.*did you mean softmax"):
        prepare(model, optimizer, policy)
    assert type(model) is nn.Linear
    right = policy.to_yaml().replace("softmx", "softmax")
    prepare(model, optimizer, Policy.parse(right)).remove()


def test_a_step_clears_gradients_that_no_optimizer_holds() -> None:
    """Of frozen groups, of a module used twice, and of one that was added later."""
    model = make_model()
    model.append(model[0])
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    run = prepare(model, optimizer, preset("32-true"))
    model.register_parameter("late", nn.Parameter(torch.ones(3)))
    for _ in range(2):
        with run.step() as step:
            hidden = nn.Sequential(*model[:4])(torch.ones(2, 5))
            step.backward((hidden * model.get_parameter("late")).sum())
    assert all(weight.grad is None for weight in model.parameters())


def test_a_weight_that_joins_the_optimizer_is_named_at_once() -> None:
    """The names are looked up again when the groups change."""
    model = make_model()
    optimizer = torch.optim.SGD(model[3].parameters(), lr=0.1)
    run = prepare(model, optimizer, preset("32-true"))
    stranger = nn.Parameter(torch.ones(2))
    assert list(run.parameters()) == ["3.weight", "3.bias"]
    optimizer.add_param_group({"params": [model[0].weight, stranger]})
    assert list(run.parameters())[2:] == ["0.weight", "param_groups[1]['params'][1]"]


def test_a_step_reads_its_gradients_once_for_norm_and_check(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A finite norm proves what the sweep would check; a fault is skipped as ever."""
    from castwise.optim.machine_table import MachineSweeper  # imports numba

    def refuse(_: MachineSweeper) -> list[bool]:
        raise AssertionError("the gradients were read again")

    monkeypatch.setattr(MachineSweeper, "nonfinite", refuse)
    model = make_model()
    run = prepare(model, AdamW(model.parameters(), lr=0.1), preset("bf16-true"))
    for factor, kind in ((1.0, Stepped), (math.inf, Skipped), (1.0, Stepped)):
        before = [weight.detach().clone() for weight in model.parameters()]
        with run.step() as step:
            step.backward(model(torch.ones(4, 5)).square().sum() * factor)
        assert isinstance(step.outcome, kind)
        same = [
            torch.equal(*each) for each in zip(before, model.parameters(), strict=True)
        ]
        assert all(same) == (kind is Skipped)
