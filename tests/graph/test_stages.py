from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn

import castwise as cw
from castwise.errors import PolicyError
from castwise.graph.inner import Inner
from castwise.numerics.error import relative_error
from castwise.policy import Policy, preset
from graph_cases import CASES, WIDTH, Attention, OwnProduct
from tolerances import TOLERANCES

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # asked for by Dynamo
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # Dynamo itself
]

LOW_FORWARD = preset("bf16-mixed").with_rule(
    module="solver", stage="backward", precision="c=fp32", because="a test wants it"
)
LOW_BACKWARD = (
    preset("bf16-mixed")
    .with_rule(module="solver", stage="backward", precision="c=bf16")
    .with_rule(module="solver", precision="c=fp32")
)


class Solved(nn.Module):
    """A layer, then a solver of two layers with attention-like products."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(WIDTH, WIDTH)
        self.solver = nn.Sequential(
            nn.Linear(WIDTH, WIDTH), nn.Softmax(-1), nn.Linear(WIDTH, WIDTH, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        """One after the other."""
        return self.solver(self.first(x).tanh())


def batch() -> Tensor:
    """Seven rows."""
    return torch.randn(7, WIDTH, generator=torch.Generator().manual_seed(1))


def gradients(model: nn.Module, run: Any, x: Tensor) -> tuple[Tensor, list[Tensor]]:
    """Outputs, and the gradients of a sum of squares."""
    model.zero_grad()
    out = run(x)
    out.square().sum().backward()
    return out.detach(), [p.grad for p in model.parameters() if p.grad is not None]


def compiled_of(
    policy: Policy, inner: Inner = "eager", model: nn.Module | None = None
) -> Any:
    """A model under a policy; the same weights each time."""
    torch.compiler.reset()
    torch.manual_seed(0)
    return cw.compile(model or Solved(), policy, inner=inner)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("policy", "forward", "backward"),
    [(LOW_FORWARD, "bf16", "fp32"), (LOW_BACKWARD, "fp32", "bf16")],
    ids=["low forward", "low backward"],
)
def test_each_stage_of_a_module_runs_in_its_own_format(
    policy: Policy, forward: str, backward: str, inner: Inner
) -> None:
    """Every product is seen in the format of its stage, and the contract holds."""
    compiled = compiled_of(policy, inner)
    compiled(batch()).sum().backward()
    proof = compiled.prove(lambda: compiled(batch()).square().sum().backward()).check()
    seen: dict[tuple[bool, bool], set[str]] = defaultdict(set)
    for run in proof.operators:
        if run.num_flops and run.module is not None:
            is_forward = run.stage == "forward"
            seen[run.module.startswith("solver"), is_forward].add(run.actual)
    assert seen[True, True] == {forward}
    assert seen[True, False] == {backward}
    assert seen[False, True] == seen[False, False] == {"bf16"}


def test_gradients_through_a_low_forward_are_exact_where_the_backward_is() -> None:
    """Of one product, the gradient at its inputs as they are held has fp32 digits."""
    rows, weights = batch(), torch.linspace(0.5, 1.5, 7 * WIDTH).view(7, WIDTH)
    errors = {}
    for name, policy in {
        "low": preset("bf16-mixed"),
        "own": preset("bf16-mixed").with_rule(stage="backward", precision="c=fp32"),
    }.items():
        layer = nn.Linear(WIDTH, WIDTH)
        compiled = compiled_of(policy, model=layer)
        out = compiled(rows)
        (out * weights).sum().backward()
        exact = weights.double().mT @ rows.double()
        errors[name] = relative_error(layer.weight.grad, exact)
        assert 1e-4 < relative_error(out.detach(), layer.double()(rows.double())) < 1e-2
    assert errors["low"] > 1e-4
    assert errors["own"] < 4 * TOLERANCES["fp32"].unit


def test_a_low_backward_leaves_the_forward_exact() -> None:
    """Outputs have fp32 digits, gradients those of bf16."""
    policy = Policy(default=cw.Precision.parse("p=fp32,c=fp32,o=fp32,r=fp32"))
    policy = policy.with_rule(stage="backward", precision="c=bf16")
    torch.manual_seed(0)
    model = Solved()
    exact = copy.deepcopy(model).double()
    compiled = compiled_of(policy, model=model)
    out, grads = gradients(model, compiled, batch())
    right, right_grads = gradients(exact, exact, batch().double())
    assert relative_error(out, right) < 8 * TOLERANCES["fp32"].unit
    assert 1e-4 < relative_error(grads, right_grads) < 4 * TOLERANCES["bf16"].unit


@pytest.mark.parametrize("forward", ["fp32", "bf16"])
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_backward_in_fp64_runs_in_it_throughout(forward: str, inner: Inner) -> None:
    """Values are held in fp64, so no gradient is rounded to fp32 on its way."""
    policy = (
        preset("bf16-mixed")
        .with_rule(module="solver", stage="backward", precision="c=fp64")
        .with_rule(module="solver", precision=f"c={forward}")
    )
    compiled = compiled_of(policy, inner)
    compiled(batch()).sum().backward()
    proof = compiled.prove(lambda: compiled(batch()).square().sum().backward()).check()
    found = {
        run.actual
        for run in proof.operators
        if run.num_flops and run.stage == "backward" and "solver" in (run.module or "")
    }
    assert found == {"fp64"}


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("formats", [("bf16", "fp32"), ("fp32", "bf16")])
@pytest.mark.parametrize(
    "name", ["written", "recomputed", "branching", "float mask", "encoder"]
)
def test_every_kind_of_model_takes_a_backward_of_its_own(
    name: str, formats: tuple[str, str], inner: Inner
) -> None:
    """Writes, recomputes, branches, breaks and composites: as near as bf16 is."""
    forward, backward = formats
    policy = Policy(default=cw.Precision.parse(f"p=fp32,c={forward},o=fp32,r=fp32"))
    policy = policy.with_rule(stage="backward", precision=f"c={backward}")
    case = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    model = case.build()
    exact = copy.deepcopy(model).double()
    compiled = compiled_of(policy, inner, model)
    out, grads = gradients(model, compiled, case.inputs())
    right, right_grads = gradients(exact, exact, case.inputs(torch.float64))
    limit = 8 * TOLERANCES["bf16"].unit
    assert relative_error(grads, right_grads) < limit
    limit = limit if forward == "bf16" else 64 * TOLERANCES["fp32"].unit
    assert relative_error(out, right) < limit


def test_gradients_of_gradients_pass() -> None:
    """A penalty on gradients is differentiated through both stages."""
    model = Solved()
    compiled = compiled_of(LOW_FORWARD, model=model)
    x = batch().requires_grad_()
    (first,) = torch.autograd.grad(compiled(x).square().sum(), x, create_graph=True)
    first.square().sum().backward()
    exact = copy.deepcopy(model).double()
    exact.zero_grad()
    y = batch().double().requires_grad_()
    (right,) = torch.autograd.grad(exact(y).square().sum(), y, create_graph=True)
    right.square().sum().backward()
    weights = zip(model.parameters(), exact.parameters(), strict=True)
    for ours, theirs in weights:
        assert ours.grad is not None
        assert theirs.grad is not None
        assert relative_error(ours.grad, theirs.grad) < 16 * TOLERANCES["bf16"].unit


def test_a_plan_says_what_both_stages_run_in() -> None:
    """Operators taken apart are named with both formats and both rules."""
    compiled = compiled_of(LOW_FORWARD)
    compiled(batch()).sum().backward()
    plan = compiled.plan()
    told = plan.explain("solver.0")
    assert "runs in bf16, its backward in fp32" in told
    assert "a test wants it" in told
    apart = [n for n in plan.graphs[0].nodes if n.role == "apart"]
    assert {(n.module, n.format, n.forward, n.backward) for n in apart} == {
        ("solver.0", "fp32", "bf16", "fp32"),
        ("solver.2", "fp32", "bf16", "fp32"),
    }
    assert cw.Plan.from_record(plan.record()) == plan
    other = compiled_of(preset("bf16-mixed"))
    other(batch())
    assert other.plan().digest() != plan.digest()
    assert any("bf16 fp32" in line for line in plan.diff(other.plan()))


def test_a_stage_rule_costs_no_second_compile() -> None:
    """Scale, phase and batch size change, and nothing is captured again."""
    policy = preset("bf16-mixed").with_rule(
        module="solver", stage="backward", phase="full", precision="c=fp32"
    )
    torch.compiler.reset()
    compiled = cw.compile(Solved(), policy, inner="aot_eager", dynamic=True)
    for phase in ("warmup", "full"):
        compiled.enter_phase(phase)
        compiled(batch()).sum().backward()
    before = compiled.num_captured
    for turn in range(1, 5):
        compiled.enter_phase(("warmup", "full")[turn % 2])
        loss = compiled(batch()[: 2 + turn]).sum()
        loss.backward(gradient=torch.tensor(2.0**turn))
    assert compiled.num_captured == before


class Dropping(Attention):
    """Attention that drops at random."""

    def __init__(self) -> None:
        super().__init__("boolean")

    def forward(self, x: Tensor) -> Tensor:
        """One head."""
        q, k, v = self.into(x).chunk(3, -1)
        return self.out(F.scaled_dot_product_attention(q, k, v, dropout_p=0.5))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Dropping(), "draws random numbers"),
        (nn.LSTM(WIDTH, WIDTH), "is a recurrent layer"),
    ],
    ids=["dropping", "recurrent"],
)
def test_what_cannot_be_run_again_is_refused(model: nn.Module, message: str) -> None:
    """A second draw of random numbers would give a wrong gradient, silently."""
    policy = preset("bf16-mixed").with_rule(stage="backward", precision="c=fp32")
    compiled = compiled_of(policy, model=model)
    with pytest.raises(PolicyError, match=message):
        compiled(torch.randn(2, 7, WIDTH))


def test_what_no_graph_has_takes_no_backward_of_its_own() -> None:
    """A layer that falls back to autocast would break the rule in silence."""
    policy = preset("bf16-mixed").with_rule(stage="backward", precision="c=fp32")
    with pytest.raises(PolicyError, match="no graph has"):
        compiled_of(policy, "aot_eager", nn.Sequential(nn.LSTM(WIDTH, WIDTH)))


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("backward", ["bf16", "fp32"])
def test_a_custom_function_is_planned_inside(backward: str, inner: Inner) -> None:
    """Its forward and its backward run as the module that calls it does."""
    policy = preset("bf16-mixed").with_rule(
        module="inner", stage="backward", precision=f"c={backward}"
    )
    torch.manual_seed(0)
    compiled = compiled_of(policy, inner, OwnProduct())
    compiled(batch()).sum().backward()
    proof = compiled.prove(lambda: compiled(batch()).square().sum().backward()).check()
    seen = {
        (run.stage, run.actual)
        for run in proof.operators
        if run.module == "inner" and run.num_flops
    }
    assert seen == {("forward", "bf16"), ("backward", backward)}
    assert not compiled.plan().unknown_ops


class KeepsDigits(torch.autograd.Function):
    """A product whose author wants fp32 under autocast."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """A product."""
        ctx.save_for_backward(x, weight)
        return x @ weight.t()

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Two products."""
        x, weight = ctx.saved_tensors
        return gradients[0] @ weight, gradients[0].t() @ x


def test_a_custom_function_that_sets_its_formats_keeps_them() -> None:
    """`custom_fwd` is its author's word, and the plan names what it left."""

    class Keeping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return KeepsDigits.apply(x, self.layer.weight)

    torch.manual_seed(0)
    model = Keeping()
    compiled = compiled_of(preset("bf16-mixed"), model=model)
    out, grads = gradients(model, compiled, batch())
    exact = copy.deepcopy(model).double()
    right, right_grads = gradients(exact, exact, batch().double())
    assert relative_error(out, right) < 8 * TOLERANCES["fp32"].unit
    assert relative_error(grads, right_grads) < 8 * TOLERANCES["fp32"].unit
    plan = compiled.plan()
    assert plan.unknown_ops == ("autograd_function_apply",)
    assert "custom_fwd" in plan.explain("autograd_function_apply")
    assert "as captured: autograd_function_apply" in plan.summary()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor warns of what this machine lacks
@pytest.mark.parametrize("policy", [LOW_FORWARD, LOW_BACKWARD])
def test_generated_kernels_keep_both_stages(policy: Policy) -> None:
    """Inductor computes what the operators compute."""
    grads = {}
    for inner in ("aot_eager", "inductor"):
        model = Solved()
        compiled = compiled_of(policy, inner, model)
        torch.manual_seed(0)
        for weight in model.parameters():
            nn.init.normal_(weight, std=WIDTH**-0.5)
        grads[inner] = gradients(model, compiled, batch())[1]
    limit = 2 * TOLERANCES["bf16"].unit
    assert relative_error(grads["inductor"], grads["aot_eager"]) < limit
