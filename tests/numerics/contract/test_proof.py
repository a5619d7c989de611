from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from castwise.autocast import _SWITCHBOARD, install
from castwise.errors import ContractError, IslandError, TargetError
from castwise.islands import apply_policy, module_facts
from castwise.islands.border import Border
from castwise.islands.crossing import Crossing
from castwise.islands.products import ProductsHold
from castwise.numerics.contract import Contract, contract, prove
from castwise.numerics.contract.breaches import Breach
from castwise.policy import Policy, preset
from castwise.region import Region

BF16 = Policy.parse("castwise: 1\nname: plain\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n")
ISLAND = BF16.with_rule(
    module="blocks.1.attention",
    precision="p=fp32,c=fp32,o=bf16",
    because="it diverged in bf16",
)


class Attention(nn.Module):
    """Three heads of odd width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, written out."""
        q, k, v = self.into(x).chunk(3, -1)
        weights = (q @ k.mT).softmax(-1)
        return self.out(weights @ v)


class Block(nn.Module):
    """A transformer's block."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Both halves, with their residuals."""
        x = x + self.attention(self.norm(x))
        return x + self.mlp(x)


class Model(nn.Module):
    """Two blocks and batch norm, some of it recomputed if asked for."""

    def __init__(self, width: int = 15, *, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(width, 5)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Forward, recomputed block by block or not."""
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return self.head(self.norm(x))


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    """One batch of odd sizes; the input needs a gradient for reentrant recomputes."""
    return torch.randn(3, 7, 15, requires_grad=True), torch.randint(0, 5, (3, 7))


def loss_fn(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The usual one."""
    return functional.cross_entropy(logits.flatten(0, 1), target.flatten())


def line_of(function: Callable[..., Any], text: str) -> int:
    """The line of this file on which a function has the text."""
    lines, first = inspect.getsourcelines(function)
    (at,) = [first + n for n, line in enumerate(lines) if text in line]
    return at


def only(breaches: tuple[Breach, ...], **wanted: str) -> list[Breach]:
    """The breaches whose fields are as wanted."""
    return [
        breach
        for breach in breaches
        if all(getattr(breach, name) == value for name, value in wanted.items())
    ]


@pytest.mark.parametrize("reentrant", [None, False, True])
@pytest.mark.parametrize(
    "policy", [BF16, ISLAND, preset("16-mixed")], ids=["bf16", "island", "fp16"]
)
def test_an_honest_model_holds(policy: Policy, *, reentrant: bool | None) -> None:
    """Every operator keeps its promise, recomputed or not, with an island or not."""
    proof = contract(Model(reentrant=reentrant), [batch()], loss_fn, policy).check()
    assert proof.holds
    assert len(proof.select(stage="forward")) > 10
    assert len(proof.select(stage="backward")) > 10
    assert bool(proof.select(stage="recompute")) == (reentrant is not None)


@pytest.mark.parametrize("name", ["32-true", "64-true", "bf16-true", "16-true"])
def test_pure_precisions_hold(name: str) -> None:
    """Weights held in one format and computed in it."""
    x, y = batch()
    proof = contract(Model(), [(x, y)], loss_fn, preset(name)).check()
    wide = {
        "32-true": "fp32",
        "64-true": "fp64",
        "bf16-true": "bf16",
        "16-true": "fp16",
    }
    assert {r.actual for r in proof.operators if r.num_flops} == {wide[name]}


def test_every_operator_knows_its_module_stage_and_line() -> None:
    """An operator of a block is told by module, and by the user's line."""
    proof = contract(Model(), [batch()], loss_fn, ISLAND)
    softmax = proof.select(module="blocks.0.attention")
    line = line_of(Attention.forward, "softmax")
    forward, backward = [run for run in softmax if "softmax" in run.op]
    for run in (forward, backward):
        assert run.module == "blocks.0.attention"
        assert run.where.endswith(f"test_proof.py:{line}")
        assert (run.promised, run.actual, run.fault) == ("fp32", "fp32", None)
    assert (forward.stage, backward.stage) == ("forward", "backward")
    into = [r for r in proof.operators if r.module == "blocks.0.attention.into"]
    assert {(r.stage, r.promised, r.actual) for r in into if r.num_flops} == {
        ("forward", "bf16", "bf16"),
        ("backward", "bf16", "bf16"),
    }


def test_the_island_ran_high_and_its_surroundings_low() -> None:
    """How much an exclusion costs: operators, flops and bytes, low and high."""
    proof = contract(Model(), [batch()], loss_fn, ISLAND)
    inside, outside = map(proof.share_of, ("blocks.1.attention", "blocks.0.attention"))
    assert (inside.compute, outside.compute) == ("fp32", "bf16")
    assert inside.num_low == inside.flops_low == inside.bytes_low == 0
    assert inside.flops_high == outside.flops_low > 0
    assert outside.flops_high == 0
    assert outside.num_casts > inside.num_casts > 0
    own = [share for share in proof.shares() if share.module == "blocks.1.attention"]
    assert own[0].flops_high < inside.flops_high
    total = sum(run.num_flops for run in proof.operators)
    assert sum(s.flops_low + s.flops_high for s in proof.shares()) == total


class Rebel(nn.Module):
    """A model in which somebody works around the policy."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.first = nn.Linear(15, 15)
        self.second = nn.Linear(15, 5)
        self.how = how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Between the two layers."""
        h = self.first(x)
        if self.how == "float":
            h = h.float()
        elif self.how == "half":
            h = h.half()
        elif self.how == "to":
            h = h.to(torch.float32)
        elif self.how == "type_as":
            h = h.type_as(x)
        elif self.how == "disabled":
            with torch.autocast("cpu", enabled=False):
                return self.second(x)
        return self.second(h)


@pytest.mark.parametrize("how", ["float", "half", "to", "type_as"])
def test_a_cast_by_hand_is_a_breach(how: str) -> None:
    """It is named with module and line, and so is the remedy."""
    proof = contract(nn.Sequential(Rebel(how)), [batch()], loss_fn, BF16)
    (breach,) = proof.breaches
    assert breach.kind == "cast"
    assert breach.module == "0"
    line = line_of(Rebel.forward, f"h.{how}(")
    assert breach.where.endswith(f"test_proof.py:{line}")
    assert f".{how}() casts by hand" in breach.because
    assert "op: to" in breach.because


def test_a_rule_allows_casts_by_hand() -> None:
    """What a rule decides is decided."""
    policy = BF16.with_rule(op="to", category="as_is", because="written by a person")
    contract(Rebel("float"), [batch()], loss_fn, policy).check()


def test_autocast_switched_off_inside_is_a_breach() -> None:
    """Forward and backward of the layer run in fp32, where bf16 was promised."""
    proof = contract(Rebel("disabled"), [batch()], loss_fn, BF16)
    assert {(b.kind, b.module) for b in proof.breaches} == {("format", "second")}
    line = line_of(Rebel.forward, "self.second(x)")
    assert all(b.where.endswith(f":{line}") for b in proof.breaches)
    assert {b.what for b in proof.breaches} == {"addmm in forward", "mm in backward"}
    assert all("but ran in fp32" in b.because for b in proof.breaches)
    with pytest.raises(
        ContractError, match=r"second: addmm in forward at .*promised bf16"
    ):
        proof.check()


def test_an_entry_missing_from_the_table_in_force_is_a_breach() -> None:
    """The kernel of softmax no longer follows the table that the policy promises."""
    install("cpu")
    names = "aten::softmax.int", "aten::_softmax"
    kernels = [_SWITCHBOARD._kernels["cpu", name] for name in names]
    for kernel in kernels:
        kernel.follow("as_is")
    try:
        proof = contract(Model(), [batch()], loss_fn, BF16)
    finally:
        for kernel in kernels:
            kernel.follow("fp32")
    forward = [b for b in proof.breaches if b.what == "softmax in forward"]
    assert {b.module for b in forward} == {"blocks.0.attention", "blocks.1.attention"}
    line = line_of(Attention.forward, "softmax")
    assert all(b.where.endswith(f":{line}") for b in forward)
    assert all("promised fp32 by softmax: fp32 (" in b.because for b in forward)
    assert all("but ran in bf16" in b.because for b in forward)
    contract(Model(), [batch()], loss_fn, BF16).check()


def test_an_island_that_lets_its_inputs_in_uncast_is_a_breach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A border that does not cast is found by what runs behind it."""
    monkeypatch.setattr(Crossing, "_leaf", lambda _self, tensor: tensor)
    model = nn.Sequential(nn.Linear(15, 15), nn.GELU(), nn.Linear(15, 5))
    policy = BF16.with_rule(module="1", precision="p=fp32,c=fp32,o=bf16")
    proof = contract(model, [batch()], loss_fn, policy)
    gelu = only(proof.breaches, kind="format", module="1")
    assert {b.what for b in gelu} == {"gelu in forward", "gelu_backward in backward"}
    assert all(
        "promised fp32 by" in b.because and "module 1" in b.because for b in gelu
    )


def test_an_island_that_hands_out_another_format_is_a_breach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What leaves the island is part of the promise."""
    honest = Border.run

    def hand_out_as_computed(self: Border, *args: Any) -> Any:
        return honest(dataclasses.replace(self, output=self.compute), *args)

    monkeypatch.setattr(Border, "run", hand_out_as_computed)
    proof = contract(Model(), [batch()], loss_fn, ISLAND)
    (breach,) = proof.breaches
    assert (breach.kind, breach.module) == ("output", "blocks.1.attention")
    assert "promised in bf16, but handed out in fp32" in breach.because


def test_a_weight_in_another_format_is_a_breach() -> None:
    """A weight that somebody narrowed after the policy was applied."""
    model, (x, y) = Model(), batch()
    applied = apply_policy(model, BF16.bind(module_facts(model)), "cpu")
    model.head.weight.data = model.head.weight.data.bfloat16()

    def run() -> None:
        with Region.of(BF16, "full", (applied,)).entered("cpu"):
            loss = loss_fn(model(x), y)
        loss.backward()

    proof = prove(run, model, applied)
    assert [b.what for b in only(proof.breaches, kind="weight")] == [
        "weight 'head.weight'"
    ]


class Doubled(torch.autograd.Function):
    """A product whose author multiplies in fp32 on the way back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """As ordinary."""
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """In fp32, unasked."""
        x, weight = ctx.saved_tensors
        return grad.float() @ weight.mT, x.mT @ grad.float()


def test_a_custom_function_is_judged_forward_and_backward() -> None:
    """Its backward's own lines are named."""

    class Custom(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(15, 5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return Doubled.apply(x, self.weight)

    x, y = torch.randn(7, 15, requires_grad=True), torch.randint(0, 5, (7,))
    proof = contract(nn.Sequential(Custom()), [(x, y)], functional.cross_entropy, BF16)
    (product,) = only(proof.breaches, kind="format")
    assert (product.module, product.what) == ("0", "mm in backward")
    line = line_of(Doubled.backward, "grad.float()")
    assert product.where.endswith(f"test_proof.py:{line}")


@torch.library.custom_op("castwise_contract_test::scan", mutates_args=())
def scan(x: torch.Tensor) -> torch.Tensor:
    """An operator that the table has never heard of."""
    return x * 2


scan.register_autograd(lambda _ctx, grad: grad * 2)


def test_a_custom_operator_needs_an_entry() -> None:
    """Nobody decided its format, until a rule does."""

    class Scanning(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(15, 5)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return scan(self.layer(x))

    proof = contract(Scanning(), [batch()], loss_fn, BF16)
    (breach,) = proof.breaches
    assert breach.kind == "undecided"
    assert breach.module == ""
    assert "op: castwise_contract_test::scan" in breach.because
    decided = BF16.with_rule(
        op="castwise_contract_test::scan", category="as_is", because="tested in bf16"
    )
    contract(Scanning(), [batch()], loss_fn, decided).check()


def test_products_that_a_global_switch_rounds_are_a_breach() -> None:
    """fp32 was promised, and the process rounds fp32 products to tf32."""
    with ProductsHold("cpu", "tf32"):
        proof = contract(Model(), [batch()], loss_fn, preset("32-true"))
    assert {b.kind for b in proof.breaches} == {"format"}
    assert all("but ran in tf32" in b.because for b in proof.breaches)


def test_a_model_that_never_ran_has_no_coverage() -> None:
    """Nothing seen is nothing proved."""
    empty = contract(Model(), [], loss_fn, BF16)
    assert not empty.holds
    assert {b.kind for b in empty.breaches} == {"coverage"}
    assert "0 operators" in empty.summary()
    other = nn.Parameter(torch.randn(15, 5))

    def bypass(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_fn(x @ other, y)

    class Idle(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    bypassed = contract(Idle(), [batch()], bypass, BF16)
    assert [b.kind for b in bypassed.breaches] == ["coverage"]


def test_a_weight_that_hidden_code_used_has_no_coverage() -> None:
    """A gradient without an operator that read the weight is not proved."""
    model, (x, y), policy = Model(), batch(), preset("32-true")
    model.spare = nn.Linear(3, 3)
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")

    def run() -> None:
        loss_fn(model(x), y).backward()
        model.spare.weight.grad = torch.ones(3, 3)

    (breach,) = prove(run, model, applied).breaches
    assert (breach.kind, breach.module) == ("coverage", "spare")
    assert breach.what == "weight 'spare.weight'"


def test_the_model_is_afterwards_what_it_was() -> None:
    """Class, weights, buffers, gradients and random numbers, bit for bit."""
    model = Model()
    loss_fn(model(batch()[0]), batch()[1]).backward()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    addresses = [p.data_ptr() for p in model.parameters()]
    gradients = [p.grad for p in model.parameters()]
    values = [g.clone() for g in gradients if g is not None]
    classes = [type(module) for module in model.modules()]
    data, random = batch(), torch.get_rng_state()
    contract(model, [data], loss_fn, preset("bf16-true"))
    assert all(torch.equal(state[n], v) for n, v in model.state_dict().items())
    assert all(v.dtype == state[n].dtype for n, v in model.state_dict().items())
    assert addresses == [p.data_ptr() for p in model.parameters()]
    assert all(a is p.grad for a, p in zip(gradients, model.parameters(), strict=True))
    kept = [p.grad for p in model.parameters() if p.grad is not None]
    assert all(torch.equal(a, b) for a, b in zip(values, kept, strict=True))
    assert classes == [type(module) for module in model.modules()]
    assert not any(module._forward_hooks for module in model.modules())
    assert torch.equal(random, torch.get_rng_state())


def test_an_exception_leaves_no_trace() -> None:
    """A model that fails is given back as well."""
    model = Model()
    with pytest.raises(RuntimeError):
        contract(model, [(torch.randn(3, 7, 14), batch()[1])], loss_fn, ISLAND)
    assert type(model.blocks[1].attention) is Attention
    contract(model, [batch()], loss_fn, ISLAND).check()


def test_bad_input_says_what_to_do() -> None:
    """Batches, losses and models that already have a policy."""
    x, y = batch()
    with pytest.raises(TargetError, match=r"batches of \(inputs\.\.\., target\)"):
        contract(Model(), (x, y), loss_fn, BF16)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="a loss of one number"):
        contract(Model(), [(x, y)], lambda logits, _: logits, BF16)
    model = Model()
    apply_policy(model, ISLAND.bind(module_facts(model)), "cpu")
    with pytest.raises(IslandError, match="already has a policy"):
        contract(model, [(x, y)], loss_fn, BF16)


def test_a_contract_survives_json() -> None:
    """Records go into reports and to other ranks, with every field."""
    for policy, model in ((ISLAND, Model()), (BF16, Rebel("half"))):
        proof = contract(model, [batch()], loss_fn, policy)
        again = Contract.from_record(json.loads(json.dumps(proof.record())))
        assert again == proof
        assert again.summary() == proof.summary()
        assert again.shares() == proof.shares()


def test_the_summary_is_one_line() -> None:
    """It says whether the contract holds, what was seen, and in which formats."""
    line = contract(Model(), [batch()], loss_fn, ISLAND).summary()
    assert line.startswith("contract of plain holds: ")
    assert "products bf16 " in line
    assert "\n" not in line
    broken = contract(Rebel("half"), [batch()], loss_fn, BF16).summary()
    assert broken.startswith("contract of plain broken: 1 cast; ")


def compiled(model: nn.Module) -> Any:
    """A model whose captured graphs run as operators."""
    torch._dynamo.reset()
    return torch.compile(model, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize("reentrant", [None, False])
def test_captured_graphs_are_proved_node_by_node(*, reentrant: bool | None) -> None:
    """Compiled and recomputed: modules, lines, islands and formats as in eager code."""
    model, data = Model(reentrant=reentrant), batch()
    eager = contract(model, [data], loss_fn, ISLAND).check()
    proof = contract(compiled(model), [data], loss_fn, ISLAND).check()
    assert "in captured graphs" in proof.summary()
    for module in ("blocks.0.attention.into", "blocks.1.attention", "head"):
        seen = {
            (r.op, r.promised, r.actual, r.where)
            for r in proof.select(module=module, stage="forward")
            if r.num_flops and r.in_graph
        }
        assert seen == {
            (r.op, r.promised, r.actual, r.where)
            for r in eager.select(module=module, stage="forward")
            if r.num_flops
        }
    forward = [
        sum(run.num_flops for run in each.select(module="blocks", stage="forward"))
        for each in (proof, eager)
    ]
    assert forward[0] == forward[1]


class Residual(nn.Module):
    """A tensor in bf16 that an fp32 island and a residual both read."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(7, 7)
        self.lift = nn.Linear(7, 7)
        self.last = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Around the island, and through it."""
        hidden = self.into(x)
        out: torch.Tensor = self.last(hidden + self.lift(hidden))
        return out


def test_gradients_that_autograd_adds_up_are_nobodys_breach() -> None:
    """The sum for a bf16 tensor runs in bf16, also where an island gave a part."""
    policy = preset("bf16-mixed").with_rule(module="lift", precision="fp32")
    batch = torch.randn(5, 7), torch.randint(3, (5,))
    proof = contract(Residual(), [batch], nn.functional.cross_entropy, policy).check()
    sums = [run for run in proof.select(stage="backward") if run.op == "add"]
    assert "bf16" in {run.actual for run in sums}


def test_regional_compilation_tells_instances_apart() -> None:
    """Blocks share one captured graph; each operator belongs to the block that ran."""
    model = Model()
    torch._dynamo.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    proof = contract(model, [batch()], loss_fn, BF16).check()
    inside = {run.module for run in proof.operators if run.in_graph}
    assert {"blocks.0.mlp.0", "blocks.1.mlp.0"} <= inside


@pytest.mark.parametrize(
    ("how", "module", "text"),
    [("half", "", "h.half("), ("disabled", "second", "return self.second(x)")],
)
def test_breaches_inside_compiled_code_are_named(
    how: str, module: str, text: str
) -> None:
    """A cast by hand, and autocast switched off, in a captured graph."""
    torch._dynamo.reset()
    model = torch.compile(Rebel(how), backend="aot_eager")
    proof = contract(model, [batch()], loss_fn, BF16)
    assert not only(proof.breaches, kind="coverage")
    assert {breach.module for breach in proof.breaches} == {module}
    line = line_of(Rebel.forward, text)
    assert {b.where.rpartition(":")[2] for b in proof.breaches} == {str(line)}


@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace")
def test_a_frame_that_dynamo_skipped_has_no_coverage() -> None:
    """A recurrent layer makes Dynamo skip the frame without an error."""

    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scan = nn.LSTM(15, 5, batch_first=True)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.scan(x)[0]

    contract(Recurrent(), [batch()], loss_fn, BF16).check()
    torch._dynamo.reset()
    skipped = torch.compile(Recurrent(), backend="aot_eager")
    (breach,) = contract(skipped, [batch()], loss_fn, BF16).breaches
    assert breach.kind == "coverage"
    assert "Dynamo skipped it" in breach.because


def test_a_contract_does_not_recompile_nor_keep_dynamo_away() -> None:
    """Code compiled before is what is proved, and is still used afterwards."""
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        backend = torch._dynamo.lookup_backend("aot_eager")
        return backend(graph, inputs)

    torch._dynamo.reset()
    model, data = torch.compile(Model(), backend=counting, fullgraph=True), batch()
    contract(model, [data], loss_fn, BF16).check()
    contract(model, [data], loss_fn, BF16).check()
    assert len(graphs) == 1


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_generated_kernels_have_no_coverage() -> None:
    """What Inductor generates is no operator, and the contract says so."""
    torch._dynamo.reset()
    model = torch.compile(nn.Sequential(nn.Linear(15, 5), nn.GELU()))
    proof = contract(model, [batch()], loss_fn, BF16)
    found = only(proof.breaches, kind="coverage")
    assert "its backend generates kernels" in found[0].because
