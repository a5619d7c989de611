from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from castwise.autocast import autocast
from castwise.errors import IslandError
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.policy.precision import Precision
from castwise.policy.rules import Policy

BF16_MIXED = "p=fp32,c=bf16,o=bf16,r=fp32"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """A low layer, a solver and a low layer, odd in every dimension."""

    def __init__(self, solver: nn.Module, width: int = 7) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.solver = solver
        self.after = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Low, solver, low."""
        y: torch.Tensor = self.after(torch.tanh(self.solver(self.before(x))))
        return y


def solver(width: int = 7) -> nn.Sequential:
    """Two products with something delicate between them."""
    return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, width))


def policy(backward: str = "fp64", **rules: str) -> Policy:
    """The solver's backward in a format, after other rules by module."""
    found = Policy(name="test").with_default(BF16_MIXED)
    for module, precision in rules.items():
        found = found.with_rule(module=module.replace("__", "."), precision=precision)
    rule = {"module": "solver", "stage": "backward", "precision": backward}
    placed = found.with_rule(**rule)
    return Policy(
        name="test", default=placed.default, rules=(placed.rules[-1], *found.rules)
    )


def put(model: nn.Module, asked: Policy) -> AppliedPolicy:
    """Bind and apply."""
    return apply_policy(model, asked.bind(module_facts(model)), "cpu")


def run(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Forward in a bf16 region."""
    with autocast("cpu", "bf16"):
        out: torch.Tensor = model(*args, **kwargs)
    return out


def gradients_of(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Forward in the region, backward outside of it."""
    loss = run(model, x).float().pow(2).mean()
    return list(torch.autograd.grad(loss, [x, *model.parameters()]))


class Seen:
    """What the solver was handed, and the gradient that came back to it."""

    def __init__(self, module: nn.Module) -> None:
        self.inputs: list[torch.Tensor] = []
        self.gradients: list[torch.Tensor] = []
        self.outputs: list[torch.Tensor] = []
        module.register_forward_hook(self._note)

    def _note(self, _: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.inputs.append(args[0].detach())
        self.outputs.append(output.detach())
        if output.requires_grad:
            output.register_hook(self.gradients.append)


def in_fp64(
    module: nn.Module, x: torch.Tensor, gradient: torch.Tensor
) -> list[torch.Tensor]:
    """The backward of the module in fp64, at the same point: input, then weights."""
    twin = copy.deepcopy(module).double()
    x = x.double().requires_grad_()
    found = torch.autograd.grad(twin(x), [x, *twin.parameters()], gradient.double())
    return list(found)


def test_the_backward_runs_in_its_own_format_and_the_forward_stays_bit_for_bit() -> (
    None
):
    """Gradients are those of fp64, rounded once to the formats of the neighbours."""
    model = Model(solver())
    plain, reference = copy.deepcopy(model), copy.deepcopy(model.solver)
    x = torch.randn(5, 7, requires_grad=True)
    expected = run(plain, x)
    low = gradients_of(plain, x)
    put(model, policy("fp64"))
    seen = Seen(model.solver)
    assert torch.equal(run(model, x), expected)
    weights = dict(model.named_parameters())
    entered: list[torch.Tensor] = []

    def watch(_module: nn.Module, _given: Any, out: torch.Tensor) -> None:
        out.register_hook(entered.append)

    model.before.register_forward_hook(watch)
    found = gradients_of(model, x)
    exact = in_fp64(reference, seen.inputs[-1], seen.gradients[-1])
    assert seen.inputs[-1].dtype is entered[-1].dtype is torch.bfloat16
    assert torch.equal(entered[-1], exact[0].bfloat16())
    named = dict(zip(["x", *weights], found, strict=True))
    for name, want in zip(dict(reference.named_parameters()), exact[1:], strict=True):
        got = named[f"solver.{name}"]
        assert got.dtype is torch.float32
        assert torch.equal(got, want.float()), name
    worst = max(
        float((a.double() - b).norm() / b.norm())
        for a, b in zip(low[3:7], exact[1:], strict=True)
    )
    assert worst > 1e-3, "without the rule the gradients are those of bf16"


@pytest.mark.parametrize(
    ("backward", "near"), [("fp64", 1e-6), ("c=fp64", 1e-6), ("fp32", 1e-5)]
)
def test_a_wider_backward_is_as_near_to_fp64_as_its_format(
    backward: str, near: float
) -> None:
    """A bare format and `c=` mean the same: what the gradient is computed in."""
    model = Model(solver(33), 33)
    reference = copy.deepcopy(model.solver)
    put(model, policy(backward))
    seen = Seen(model.solver)
    found = gradients_of(model, torch.randn(5, 33, requires_grad=True))
    exact = in_fp64(reference, seen.inputs[-1], seen.gradients[-1])
    for got, want in zip(found[3:7], exact[1:], strict=True):
        assert float((got - want).norm() / want.norm()) < near


def test_a_narrower_backward_runs_in_the_low_format() -> None:
    """An fp32 island whose products of the backward are bf16, as a rule may ask."""
    model = Model(solver(33), 33)
    reference = copy.deepcopy(model.solver)
    put(model, policy("c=bf16", solver="p=fp32,c=fp32"))
    seen = Seen(model.solver)
    found = gradients_of(model, torch.randn(5, 33, requires_grad=True))
    exact = in_fp64(reference, seen.inputs[-1], seen.gradients[-1])
    errors = [
        float((got - want).norm() / want.norm())
        for got, want in zip(found[3:7], exact[1:], strict=True)
    ]
    assert 1e-3 < max(errors) < 2e-2


def test_dropout_and_noise_are_those_of_the_forward() -> None:
    """What was drawn once is used again, in whatever format it is asked for."""

    class Noisy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 7)
            self.masks: list[torch.Tensor] = []

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = nn.functional.dropout(self.linear(x), 0.4)
            noise = torch.randn_like(y)
            self.masks.append((y == 0).detach())
            self.masks.append(noise.detach())
            y = y * noise + torch.rand(7, dtype=y.dtype)
            return y.masked_fill(torch.bernoulli(torch.full((7,), 0.3)).bool(), 0.0)

    model = Model(Noisy())
    put(model, policy("fp64"))
    state = torch.get_rng_state()
    x = torch.randn(5, 7, requires_grad=True)
    loss = run(model, x).float().sum()
    after_forward = torch.get_rng_state()
    loss.backward()
    assert torch.equal(torch.get_rng_state(), after_forward)
    assert not torch.equal(state, after_forward)
    first, *others = zip(*[iter(model.solver.masks)] * 2, strict=True)
    assert len(others) == 2, "the rehearsal, and the run in fp64"
    for mask, noise in others:
        assert torch.equal(mask, first[0])
        assert torch.equal(noise.double(), first[1].double())
    assert others[-1][1].dtype is torch.float64
    zeros = (model.solver.linear.weight.grad == 0).all(1)
    dropped = first[0].all(0)
    assert torch.equal(zeros | ~dropped, torch.ones_like(zeros))


def test_a_draw_that_is_mixed_with_inputs_is_refused_by_name() -> None:
    """Its numbers cannot be had again in another format, so nothing is guessed."""

    class Mixed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.rrelu(x, training=True)

    model = Model(Mixed())
    put(model, policy("fp64"))
    loss = run(model, torch.randn(5, 7)).float().sum()
    with pytest.raises(IslandError, match="by rrelu_with_noise, which mixes them"):
        loss.backward()


def test_buffers_are_updated_once_and_read_as_the_forward_read_them() -> None:
    """BatchNorm counts one batch, and two forwards before a backward stay apart."""
    model = Model(nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7)))
    plain = copy.deepcopy(model)
    put(model, policy("fp64"))
    inputs = [torch.randn(5, 7) for _ in range(2)]
    for each in (plain, model):
        sum(run(each, x).float().pow(2).mean() for x in inputs).backward()
    norm, expected = model.solver[1], plain.solver[1]
    assert int(norm.num_batches_tracked) == 2
    assert torch.equal(norm.running_mean, expected.running_mean)
    assert torch.equal(norm.running_var, expected.running_var)
    assert norm.running_mean.dtype is torch.float32
    torch.testing.assert_close(
        model.solver[0].weight.grad, plain.solver[0].weight.grad, rtol=0.1, atol=1e-2
    )


def test_statistics_of_the_forward_are_used_in_evaluation_mode() -> None:
    """A training batch between forward and backward must not reach the gradient."""
    model = Model(nn.Sequential(nn.Linear(7, 7), nn.BatchNorm1d(7)))
    reference = copy.deepcopy(model.solver).eval()
    put(model, policy("fp64"))
    seen = Seen(model.solver)
    model.eval()
    loss = run(model, torch.randn(5, 7)).float().pow(2).mean()
    model.train()
    run(model, 3 + torch.randn(5, 7))
    statistics = model.solver[1].running_mean.clone()
    loss.backward()
    exact = in_fp64(reference, seen.inputs[0], seen.gradients[0])
    assert torch.equal(model.solver[0].weight.grad, exact[1].float())
    assert torch.equal(model.solver[1].running_mean, statistics)
    assert model.solver[1].training


class Nested(nn.Module):
    """Takes and returns containers; one output is an integer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)

    def forward(
        self, pair: tuple[torch.Tensor, torch.Tensor], *, scale: dict[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Use every part."""
        left, index = pair
        y = self.linear(left) * scale["by"]
        return {"y": [y, y[index]], "top": y.argmax(-1), "same": left, "note": "kept"}


def test_containers_and_keyword_arguments_cross_in_both_directions() -> None:
    """Gradients reach tensors wherever they stand; integers have none."""
    results = []
    for turned in (False, True):
        torch.manual_seed(1)
        model = nn.Sequential(OrderedDict(solver=Nested()))
        if turned:
            put(model, policy("fp64"))
        left = torch.randn(5, 7, requires_grad=True)
        by = torch.randn(7, requires_grad=True)
        index = torch.tensor([3, 1])
        with autocast("cpu", "bf16"):
            out = model.solver((left, index), scale={"by": by})
        assert out["note"] == "kept"
        assert not out["top"].requires_grad
        loss = sum(y.float().pow(2).sum() for y in out["y"]) + out["same"].sum()
        loss.backward()
        results.append((*out["y"], left.grad, by.grad, model.solver.linear.weight.grad))
    for got, want in zip(results[1][:2], results[0][:2], strict=True):
        assert torch.equal(got, want)
    for got, want in zip(results[1][2:], results[0][2:], strict=True):
        assert got.dtype is want.dtype
        torch.testing.assert_close(got, want, rtol=3e-2, atol=3e-2)


def test_islands_inside_take_part_by_their_own_backward_rules() -> None:
    """Run again in fp64, but the inner module in the format that its rule names."""
    model = Model(solver())
    asked = Policy(name="test").with_default(BF16_MIXED)
    asked = asked.with_rule(module="solver.2", precision="p=fp32,c=fp32")
    asked = asked.with_rule(module="solver", stage="backward", precision="fp64")
    applied = put(model, asked)
    dtypes: list[torch.dtype] = []
    for layer in (model.solver[0], model.solver[2]):
        layer.register_forward_pre_hook(lambda _m, a: dtypes.append(a[0].dtype))
        layer.register_forward_hook(lambda _m, _a, out: dtypes.append(out.dtype))
    loss = run(model, torch.randn(5, 7)).float().sum()
    loss.backward()
    low, high, wide = torch.bfloat16, torch.float32, torch.float64
    assert dtypes[:4] == [low, low, low, low]
    assert dtypes[4:6] == [wide, wide]
    assert dtypes[6:] == [wide, wide], "what its surroundings use"
    assert model.solver[2].weight.grad.dtype is high
    assert applied.coverage() == (
        "1 module in fp32 inside bf16: solver.2; backward of 1 module in fp64: solver"
    )


def test_two_forwards_then_one_backward_and_a_retained_graph() -> None:
    """Each call has its own point; going back twice gives the same twice."""
    model = Model(solver())
    put(model, policy("fp64"))
    inputs = [torch.randn(5, 7, requires_grad=True) for _ in range(2)]
    apart = [gradients_of(model, x)[3] for x in inputs]
    losses = [run(model, x).float().pow(2).mean() for x in inputs]
    weight = model.solver[0].weight
    for _ in range(2):
        (both,) = torch.autograd.grad(sum(losses), weight, retain_graph=True)
        torch.testing.assert_close(both, apart[0] + apart[1], rtol=1e-6, atol=1e-8)


class Recomputing(nn.Module):
    """Keeps no activation of its own."""

    def __init__(self, *, use_reentrant: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(7, 7)
        self.use_reentrant = use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Recompute what is inside."""
        y: torch.Tensor = checkpoint(self._inner, x, use_reentrant=self.use_reentrant)
        return y

    def _inner(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.dropout(torch.sin(self.linear(x)), 0.3)


def backward_of(model: nn.Module, *, outer: bool | None) -> list[torch.Tensor]:
    """Gradients of all weights; `outer` says which kind of checkpoint is around."""
    model.zero_grad()
    torch.manual_seed(3)
    x = torch.randn(5, 7, requires_grad=True)
    with autocast("cpu", "bf16"):
        y = model(x) if outer is None else checkpoint(model, x, use_reentrant=outer)
        loss = y.float().pow(2).mean()
    loss.backward()
    return [weight.grad.clone() for weight in model.parameters()]


@pytest.mark.parametrize("around", [True, False])
def test_recomputing_around_it_changes_nothing(around: bool) -> None:
    """Both kinds of checkpointing, with one more inside."""
    model = Model(Recomputing(use_reentrant=False))
    put(model, policy("fp64"))
    expected = backward_of(model, outer=None)
    for got, want in zip(backward_of(model, outer=around), expected, strict=True):
        assert torch.equal(got, want)


def test_both_kinds_of_recompute_work_inside_of_it() -> None:
    """What is recomputed inside is recomputed in the backward's format."""
    results = []
    for use_reentrant in (True, False):
        torch.manual_seed(0)
        model = Model(Recomputing(use_reentrant=use_reentrant))
        put(model, policy("fp64"))
        results.append(backward_of(model, outer=None))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_it_can_be_differentiated_twice() -> None:
    """The gradient of a gradient, for which the second run keeps its graph."""
    model = nn.Sequential(OrderedDict(solver=solver()))
    reference = copy.deepcopy(model).double()
    put(model, replace(policy("fp64"), default=Precision.parse("fp32")))

    def penalty(target: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
        x = x.requires_grad_()
        loss = target(x).pow(2).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        weights = list(target.parameters())
        return list(torch.autograd.grad(gradient.pow(2).sum(), [x, *weights]))

    x = torch.randn(3, 7)
    for got, want in zip(
        penalty(model, x.clone()), penalty(reference, x.double()), strict=True
    ):
        torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)


def test_a_foreign_weight_is_refused_rather_than_left_without_gradient() -> None:
    """A weight that the module borrows through a closure has no way back."""

    class Borrowing(nn.Module):
        def __init__(self, lender: list[nn.Module]) -> None:
            super().__init__()
            self.lender = lender

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ self.lender[0].weight.to(x.dtype)

    lender = nn.Linear(7, 7)
    model = Model(Borrowing([lender]))
    put(model, policy("fp64"))
    loss = run(model, torch.randn(5, 7)).float().sum()
    with pytest.raises(IslandError, match=r"weight of shape \(7, 7\) that is not its"):
        loss.backward()


def test_recurrent_layers_and_parametrized_weights_are_its_own() -> None:
    """Weights that a forward reads from elsewhere than its parameters."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cells = nn.LSTM(7, 7, num_layers=2, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.cells(x)[0]
            return y

    normalised = torch.nn.utils.parametrizations.weight_norm(nn.Linear(7, 7))
    for module in (Recurrent(), normalised):
        model = Model(module)
        reference = copy.deepcopy(module)
        put(model, policy("fp64"))
        seen = Seen(model.solver)
        run(model, torch.randn(2, 3, 7)).float().pow(2).mean().backward()
        exact = in_fp64(reference, seen.inputs[0], seen.gradients[0])
        for weight, want in zip(model.solver.parameters(), exact[1:], strict=True):
            torch.testing.assert_close(weight.grad, want.float(), rtol=1e-6, atol=1e-9)
        assert all(type(p) is nn.Parameter for p in model.solver.parameters())


def test_a_weight_that_a_hook_computes_is_its_own() -> None:
    """Pruning puts a masked weight into the module before each forward."""
    model = Model(nn.Linear(7, 7))
    dense = copy.deepcopy(model.solver)
    prune.l1_unstructured(model.solver, "weight", amount=9)
    mask = model.solver.weight_mask
    with torch.no_grad():
        dense.weight.mul_(mask)
    put(model, policy("fp64"))
    seen = Seen(model.solver)
    run(model, torch.randn(5, 7)).float().pow(2).mean().backward()
    exact = in_fp64(dense, seen.inputs[0], seen.gradients[0])[1]
    got = model.solver.weight_orig.grad
    torch.testing.assert_close(got, exact.float() * mask, rtol=1e-6, atol=1e-9)


def test_tied_weights_get_one_gradient() -> None:
    """A weight shared with the surroundings adds up what both send."""
    model = Model(nn.Linear(7, 7))
    model.solver.weight = model.before.weight
    plain = copy.deepcopy(model)
    put(model, policy("fp64"))
    x = torch.randn(5, 7)
    for each in (plain, model):
        run(each, x).float().pow(2).mean().backward()
    assert plain.solver.weight is plain.before.weight
    torch.testing.assert_close(
        model.before.weight.grad, plain.before.weight.grad, rtol=3e-2, atol=1e-2
    )


def test_frozen_weights_and_evaluation_run_the_forward_alone() -> None:
    """Where no gradient is asked for, there is nothing to run again."""
    model = Model(solver())
    put(model, policy("fp64"))
    calls: list[bool] = []
    model.solver[0].register_forward_hook(lambda *_: calls.append(True))
    model.requires_grad_(requires_grad=False)
    run(model, torch.randn(5, 7))
    with torch.no_grad():
        run(model, torch.randn(5, 7))
    assert len(calls) == 2
    model.solver[2].requires_grad_(requires_grad=True)
    run(model, torch.randn(5, 7)).float().sum().backward()
    assert model.solver[0].weight.grad is None
    assert model.solver[2].weight.grad is not None
    assert len(calls) == 4


def test_an_exception_in_the_second_run_leaves_the_module_as_it_was() -> None:
    """Weights, buffers, mode and switches come back, and the backward can be tried."""

    class Dies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 7)
            self.norm = nn.BatchNorm1d(7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(self.linear(x))
            if y.dtype is torch.float64:
                raise ZeroDivisionError
            return y

    model = Model(Dies())
    put(model, policy("fp64"))
    before = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    loss = run(model, torch.randn(5, 7)).float().sum()
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            loss.backward(retain_graph=True)
    assert {id(t) for t in (*model.parameters(), *model.buffers())} == before
    assert int(model.solver.norm.num_batches_tracked) == 1


def test_what_it_hands_out_may_be_changed_in_place() -> None:
    """Also where it is a view of something inside, as in the plain model."""

    class Viewing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).mT

    model = nn.Sequential(OrderedDict(solver=Viewing(), relu=nn.ReLU(inplace=True)))
    plain = copy.deepcopy(model)
    put(model, replace(policy("fp64"), default=Precision.parse("fp32")))
    x = torch.randn(5, 7)
    for each in (plain, model):
        each(x).pow(2).sum().backward()
    for got, want in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(got.grad, want.grad)


def test_weights_changed_between_forward_and_backward_are_an_error() -> None:
    """As everywhere in autograd: the gradient would be of another function."""
    model = Model(solver())
    put(model, policy("fp64"))
    loss = run(model, torch.randn(5, 7)).float().sum()
    with torch.no_grad():
        model.solver[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_functional_transforms_are_refused_by_name() -> None:
    """torch.func cannot pass; the error says so before anything is computed."""
    model = Model(solver())
    put(model, policy("fp64"))
    with pytest.raises(IslandError, match="'solver' has a backward of its own"):
        torch.func.grad(lambda x: model.solver(x).sum())(torch.randn(3, 7))


def test_copies_and_removal_keep_or_take_the_rule() -> None:
    """A deep copy has the rule and its own weights; removal leaves no trace."""
    model = Model(solver())
    plain = copy.deepcopy(model)
    applied = put(model, policy("fp64"))
    twin = copy.deepcopy(model)
    x = torch.randn(5, 7, requires_grad=True)
    for one, other in zip(gradients_of(model, x), gradients_of(twin, x), strict=True):
        assert torch.equal(one, other)
    applied.remove()
    assert type(model.solver) is nn.Sequential
    for one, other in zip(gradients_of(model, x), gradients_of(plain, x), strict=True):
        assert torch.equal(one, other)


def test_the_whole_model_may_have_a_backward_of_its_own() -> None:
    """A rule on the stage alone governs every module, and so the root."""
    model = Model(solver())
    asked = Policy(name="test").with_default(BF16_MIXED)
    reference = copy.deepcopy(model)
    applied = put(model, asked.with_rule(stage="backward", precision="fp64"))
    assert applied.coverage().endswith("backward of 1 module in fp64: the whole model")
    seen = Seen(model)
    found = gradients_of(model, torch.randn(5, 7, requires_grad=True))
    assert seen.outputs[0].dtype is torch.bfloat16
    exact = in_fp64(reference, seen.inputs[0], seen.gradients[0])
    for got, want in zip(found[1:], exact[1:], strict=True):
        assert torch.equal(got, want.float())


def test_a_rule_on_a_phase_and_a_stage_holds_in_that_phase() -> None:
    """The phase of the forward decides, even where it changed before the backward."""
    model = Model(solver())
    asked = Policy(name="test").with_default(BF16_MIXED)
    asked = asked.with_rule(
        module="solver", stage="backward", phase="correct", precision="fp64"
    )
    applied = put(model, asked)
    dtypes: list[torch.dtype] = []
    model.solver[0].register_forward_hook(lambda *given: dtypes.append(given[2].dtype))
    run(model, torch.randn(5, 7)).float().sum().backward()
    applied.phase = "correct"
    loss = run(model, torch.randn(5, 7)).float().sum()
    applied.phase = "full"
    loss.backward()
    assert applied.phase == "full"
    assert dtypes == [torch.bfloat16, torch.bfloat16, torch.float64]
