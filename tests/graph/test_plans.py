from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import torch
import torch.nn.functional as F  # noqa: N812 -- its name everywhere
from torch import Tensor, nn

import castwise as cw
from castwise.errors import PolicyError, SettingsError
from castwise.graph import measure
from castwise.graph.compiled import CompiledModel
from castwise.graph.drawing import draw
from castwise.graph.inner import INNER, Inner
from castwise.numerics.census import observe
from castwise.numerics.error import relative_error
from castwise.policy import Policy, preset
from graph_cases import CASES, WIDTH
from tolerances import TOLERANCES

pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # asked for by Dynamo
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # Dynamo itself
]


class Branches(nn.Module):
    """One value that three products take, and a residual stream."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.parts = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.solver = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh())

    def forward(self, x: Tensor) -> Tensor:
        """A sum of products of one norm, then a module of its own."""
        h = self.norm(x)
        a, b, c = (part(h) for part in self.parts)
        return x + self.solver(a * F.gelu(b) + c)


def compiled_of(policy: Policy | str = "bf16-mixed", **settings: Any) -> CompiledModel:
    """A small model, captured by one step."""
    torch.compiler.reset()
    torch.manual_seed(0)
    compiled = cw.compile(Branches(), policy, **{"inner": "eager", **settings})
    compiled(batch()).sum().backward()
    return compiled


def batch() -> Tensor:
    """Six rows."""
    return torch.randn(6, WIDTH, generator=torch.Generator().manual_seed(1))


def formats_of(compiled: CompiledModel, module: str) -> set[str | None]:
    """The formats of the values that a module makes."""
    nodes = (node for graph in compiled.plan().graphs for node in graph.nodes)
    made = {"low", "fp32", "follows", "wide", "opaque"}
    return {n.format for n in nodes if n.module == module and n.role in made}


def test_a_value_that_many_products_take_is_cast_once() -> None:
    """Three projections of one norm share a cast; autocast makes three."""
    plan = compiled_of().plan()
    shared = [
        cast for graph in plan.graphs for cast in graph.casts if len(cast.users) > 1
    ]
    assert [len(cast.users) for cast in shared] == [3]
    assert plan.compare().saved > 0.05


def test_the_bill_is_what_runs() -> None:
    """Casts and bytes of the plan are those that the dispatcher sees in a forward."""
    compiled = compiled_of()
    census = observe(lambda: compiled(batch()))
    casts = [cast for graph in compiled.plan().graphs for cast in graph.casts]
    assert census.num_casts == len(casts) == compiled.plan().num_casts
    seen = sum(count.num_bytes for count in census.select(op="cast"))
    assert seen == sum(cast.num_bytes for cast in casts)


def test_the_bill_of_a_backward_is_what_runs() -> None:
    """Bytes cast for gradients are foretold too, those of promotion among them."""
    compiled = compiled_of()
    census = observe(lambda: compiled(batch()).sum().backward())
    seen = sum(count.num_bytes for count in census.select(op="cast"))
    assert seen == pytest.approx(compiled.plan().num_bytes_cast, rel=0.02)


def test_products_are_low_and_the_residual_stream_is_not() -> None:
    """Low where it pays, exact where everything adds up."""
    compiled = compiled_of()
    assert formats_of(compiled, "parts.0") == {"bf16"}
    assert formats_of(compiled, "norm") == {"fp32"}
    assert compiled(batch()).dtype == torch.float32
    assert "residual" not in compiled.plan().explain("parts.0")
    assert "matrix products" in compiled.plan().explain("parts.0")


@pytest.mark.parametrize("fmt", ["fp32", "fp64"])
def test_a_rule_makes_an_island(fmt: str) -> None:
    """What a rule holds in fp32 or fp64 runs there, and hands out what it should."""
    policy = preset("bf16-mixed").with_rule(
        module="solver", precision=f"c={fmt}", because="a test wants it"
    )
    compiled = compiled_of(policy)
    assert formats_of(compiled, "solver.0") == {fmt}
    assert "a test wants it" in compiled.plan().explain("solver.0")
    census = observe(lambda: compiled(batch()))
    assert {"bf16", fmt} == set(census.formats_of("addmm"))
    assert compiled(batch()).dtype == torch.float32


def test_an_operator_rule_holds() -> None:
    """The operator table of the policy is the one that is planned by."""
    policy = preset("bf16-mixed").with_rule(
        op="gelu", category="fp32", because="a test wants it"
    )
    assert "a test wants it" in compiled_of(policy).plan().explain("gelu")


def test_a_plan_is_saved_and_read_and_keeps_its_digest(tmp_path: Path) -> None:
    """The JSON of a plan says all of it; reasons do not move the digest."""
    plan = compiled_of().plan()
    plan.save(tmp_path / "plan.json")
    again = cw.Plan.load(tmp_path / "plan.json")
    assert again == plan
    assert again.digest() == plan.digest() == compiled_of().plan().digest()
    record = json.loads((tmp_path / "plan.json").read_text())
    with pytest.raises(PolicyError, match="need a plan of version 1, got 7"):
        cw.Plan.from_record({**record, "castwise_plan": 7})


def test_two_plans_are_told_apart() -> None:
    """A difference names each node and both formats."""
    policy = preset("bf16-mixed").with_rule(module="solver", precision="c=fp32")
    one, other = compiled_of().plan(), compiled_of(policy).plan()
    assert one.diff(one) == ()
    assert one.digest() != other.digest()
    assert any("bf16 -> fp32" in line for line in one.diff(other))


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    """Asking for what is not there is a mistake that its message explains."""
    with pytest.raises(PolicyError, match=r"got 'part\.0'.*parts\.0"):
        compiled_of().plan().explain("part.0")


class Skipped(nn.Module):
    """A module that Dynamo may not look into, beside one that it may."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.seen = Hidden(), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        """Both in a row."""
        return self.seen(self.hidden(x))


class Hidden(nn.Module):
    """Left out of graphs by its author."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    @torch.compiler.disable
    def forward(self, x: Tensor) -> Tensor:
        """One product."""
        return torch.tanh(x @ self.inner.weight)


def test_what_no_graph_has_is_named_and_falls_back_to_autocast() -> None:
    """A frame that Dynamo skips never runs in fp32 in silence."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Skipped()
    right = model(batch()).detach()
    compiled = cw.compile(model, "bf16-mixed", inner="eager")
    compiled(batch())
    (told,) = compiled.plan().uncovered
    assert (told.module, told.treatment) == ("hidden", "autocast")
    assert "mm" in told.ops
    assert "outside of graphs" in compiled.plan().explain("hidden")
    census = observe(lambda: compiled(batch()).sum().backward())
    assert set(census.formats_of("mm")) | set(census.formats_of("addmm")) == {"bf16"}
    limit = 8 * TOLERANCES["bf16"].unit
    assert relative_error(compiled(batch()).detach(), right) < limit


def test_a_call_that_no_graph_served_is_told() -> None:
    """Where Dynamo steps aside there is no plan, and the caller hears of it."""
    compiled = compiled_of()
    with (
        torch.compiler.set_stance("force_eager"),
        pytest.warns(UserWarning, match="no captured graph ran"),
    ):
        compiled(batch())
    assert "every operator" in compiled.plan().summary()


def test_an_autocast_region_around_the_call_changes_nothing() -> None:
    """The plan holds wherever the model is called from, and is not made again."""
    compiled = compiled_of()
    before, plain = compiled.num_captured, compiled(batch()).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(compiled(batch()).detach(), plain)
    assert compiled.num_captured == before


def test_scale_phase_and_batch_size_capture_nothing_again() -> None:
    """A change of the loss scale, of the phase, or of the batch costs no compile."""
    policy = preset("bf16-mixed").with_phase_precision("warmup", "fp32")
    compiled = compiled_of(policy, dynamic=True)
    compiled.enter_phase("warmup")
    compiled(batch()).sum().backward()
    before = compiled.num_captured
    for turn in range(3):
        compiled.enter_phase(("warmup", "full")[turn % 2])
        loss = compiled(batch()[: 3 + turn]).sum()
        loss.backward(gradient=torch.tensor(2.0**turn))
    assert compiled.num_captured == before
    assert compiled.plan("warmup").num_casts == 0
    with pytest.raises(SettingsError, match="a phase is one of"):
        compiled.enter_phase("cooldown")


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("inner", INNER)
def test_kept_weights_are_cast_once_per_update(inner: Inner, dynamic: bool) -> None:
    """Copies stay from call to call, and follow every update."""
    settings = {"inner": inner, "dynamic": dynamic}
    compiled = compiled_of(keep_weights=True, **settings)
    model = compiled._orig_mod
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    plain = compiled_of(**settings)
    plain._orig_mod.load_state_dict(model.state_dict())
    others = torch.optim.SGD(plain._orig_mod.parameters(), lr=0.5)
    for _ in range(3):
        for run, update in ((compiled, optimizer), (plain, others)):
            update.zero_grad()
            for _ in range(2):
                run(batch()).square().sum().backward()
            update.step()
    assert torch.equal(compiled(batch()), plain(batch()))
    kept = compiled._kept
    assert kept is not None
    before = kept.num_refreshed
    compiled(batch())
    assert kept.num_refreshed == before
    with torch.no_grad():
        model.parts[0].weight.data = torch.zeros(WIDTH, WIDTH)
        plain._orig_mod.parts[0].weight.zero_()
    assert torch.equal(compiled(batch()), plain(batch()))
    model.parts[1].weight.data.mul_(2.0)  # nothing can notice this
    plain._orig_mod.parts[1].weight.data.mul_(2.0)
    compiled.refresh_weights()
    assert torch.equal(compiled(batch()), plain(batch()))


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ("bf16-true", "a plan needs weights in fp32, got p=bf16"),
        (
            Policy(default=cw.Precision.parse("p=fp32,c=fp8_e4m3,o=bf16,r=fp32")),
            "got c=fp8_e4m3 for the whole model",
        ),
        (
            preset("bf16-mixed")
            .with_rule(module="solver", stage="backward", precision="c=fp32")
            .with_rule(module="solver", precision="c=fp64"),
            "c=fp64 forward and c=fp32 backward for 'solver'",
        ),
        (
            preset("bf16-mixed").with_rule(
                module="solver", stage="backward", precision="c=fp8_e5m2"
            ),
            "got c=fp8_e5m2 for 'solver'",
        ),
    ],
)
def test_what_a_plan_cannot_give_is_refused(policy: Any, message: str) -> None:
    """A policy is planned as it stands, or not at all."""
    with pytest.raises(PolicyError, match=message):
        cw.compile(Branches(), policy, inner="eager")


def test_every_case_is_planned_without_a_second_trial() -> None:
    """The lists of operators are right: no operator refuses what was planned."""
    for case in CASES:
        torch.compiler.reset()
        compiled = cw.compile(case.build(), "bf16-mixed", inner="eager")
        compiled(case.inputs())
        for graph in compiled.plan().graphs:
            refused = [str(n) for n in graph.nodes if "refuses" in n.because]
            assert not refused


@pytest.mark.parametrize("precision", ["c=bf16", "c=fp32", "c=fp64"])
def test_the_contract_holds_under_a_plan(precision: str) -> None:
    """Every operator of forward and backward runs in the format that was promised."""
    policy = preset("bf16-mixed").with_rule(module="solver", precision=precision)
    compiled = compiled_of(policy)
    proof = compiled.prove(lambda: compiled(batch()).sum().backward())
    assert proof.check().holds
    assert any(run.stage == "backward" for run in proof.operators)
    assert any(run.in_graph for run in proof.operators)


def test_a_plan_is_measured_beside_autocast_and_float64() -> None:
    """Fewer bytes cast, no more saved, and as near to float64."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Branches()
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    measured = measure(model, (batch(), batch()), F.mse_loss).check()
    assert measured.torch_autocast is not None
    for rival in (measured.autocast, measured.torch_autocast):
        assert measured.planned.num_casts < rival.num_casts
        assert measured.planned.bytes_cast < rival.bytes_cast
        assert measured.planned.bytes_saved <= rival.bytes_saved
    assert measured.planned.gradient_error > 1e-6  # it did compute low
    assert all(torch.equal(kept[n], v) for n, v in model.state_dict().items())
    assert "gradient error" in str(measured)


def test_a_plan_is_drawn_with_its_casts() -> None:
    """Every value of a module is a box in the picture, and every cast is marked."""
    plan = compiled_of().plan()
    picture = draw(plan.graphs[0])
    ET.fromstring(picture)  # noqa: S314 -- our own text
    assert picture.count("<title>") == sum(
        node.role not in {"input", "output", "reads"} for node in plan.graphs[0].nodes
    )
    assert "#ffcc80" in picture
    assert picture.count('stroke="#d32f2f"') == 3
    assert draw(plan.graphs[0], "solver").count("<title>") == 2
    with pytest.raises(PolicyError, match="need a module with values in graph 0"):
        draw(plan.graphs[0], "nowhere")
