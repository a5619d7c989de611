from __future__ import annotations

from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise import autocast_kernels
from castwise.fp8_products import FP8 as EIGHT
from castwise.islands.border import LOW, Border, Island
from castwise.islands.crossing import Rounding
from castwise.numerics.contract import Contract, contract
from castwise.policy import Policy

WIDE = torch.float32
VISION = """\
castwise: 1
name: vision
default: p=fp32,c=bf16,o=bf16,r=fp32
rules:
  - module: "*.propagator"
    precision: fp32
    because: residual 1e-7 in fp32, 5e-4 in bf16
  - op: softmax
    precision: c=fp32
  - module: "solver.*"
    stage: backward
    precision: fp64
  - phase: predict
    precision: c=bf16
"""


class Attention(nn.Module):
    """Attention with a softmax, and a propagator at its end."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, 3 * width)
        self.propagator = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, then propagate."""
        q, k, v = self.into(x).chunk(3, -1)
        y: torch.Tensor = self.propagator((q @ k.mT).softmax(-1) @ v)
        return y


class Scan(nn.Module):
    """A recurrence with a residual: the delicate part of the solver."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.step = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Three steps, dropped out."""
        for _ in range(3):
            x = x + functional.dropout(torch.sin(self.step(self.norm(x))), 0.2)
        return x


class Model(nn.Module):
    """Whatever the example of the README names."""

    def __init__(self, width: int = 15, *, reentrant: bool | None = None) -> None:
        super().__init__()
        self.attention = Attention(width)
        self.solver = nn.Sequential(
            OrderedDict(scan=Scan(width), out=nn.Linear(width, width))
        )
        self.head = nn.Linear(width, 5)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, solve, predict."""
        x = self.attention(x)
        if self.reentrant is None:
            x = self.solver(x)
        else:
            x = checkpoint(self.solver, x, use_reentrant=self.reentrant)
        y: torch.Tensor = self.head(x)
        return y


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch, odd in every dimension."""
    torch.manual_seed(0)
    return [(torch.randn(3, 7, 15), torch.randn(3, 7, 5))]


def proof_of(model: nn.Module, policy: Policy | None = None, **more: Any) -> Contract:
    """The contract of a policy, by default that of the README."""
    policy = policy or Policy.parse(VISION, where="policy.yaml")
    return contract(model, batches(), functional.mse_loss, policy, **more)


def formats_of(proof: Contract, module: str, stage: str) -> set[str]:
    """What the operators of a module ran in, casts aside."""
    runs = proof.select(module=module, stage=stage)
    return {run.actual for run in runs if run.op != "cast"}


def test_the_policy_of_the_readme_is_prepared_and_proved() -> None:
    """Every promise of the example holds: island, softmax, fp64 backward, predict."""
    torch.manual_seed(0)
    model = Model()
    policy = Policy.parse(VISION, where="policy.yaml")
    proof = proof_of(model, policy).check()
    assert formats_of(proof, "solver", "backward") == {"fp64"}
    assert formats_of(proof, "solver.out", "forward") == {"bf16"}
    products = [run for run in proof.operators if run.num_flops]
    assert {run.actual for run in products if run.module == "attention.propagator"} == {
        "fp32"
    }
    assert {r.actual for r in proof.operators if r.op == "softmax"} == {"fp32"}
    assert proof_of(model, policy, phase="predict").holds
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, policy)
    assert run.precision.islands == (
        "1 module in fp32 inside bf16: attention.propagator; "
        "backward of 2 modules in fp64: solver.scan, solver.out"
    )
    x, y = batches()[0]
    losses = []
    for _ in range(5):
        with run.step() as step:
            step.backward(functional.mse_loss(model(x), y))
        losses.append(step.outcome.loss)
    assert losses[-1] < losses[0]
    run.phase = "predict"
    with run.inference():
        model(x)


@pytest.mark.parametrize("reentrant", [True, False])
def test_it_holds_where_the_solver_is_recomputed(reentrant: bool) -> None:
    """The recompute runs as the forward did, and the second run in fp64."""
    proof = proof_of(Model(reentrant=reentrant)).check()
    assert formats_of(proof, "solver", "backward") == {"fp64"}
    assert {"bf16", "fp64"} <= formats_of(proof, "solver.out", "recompute")


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by Dynamo itself
def test_it_holds_in_a_compiled_model_around_the_solver() -> None:
    """Graphs break at the solver, and it runs there as it does in eager mode."""
    torch.compiler.reset()
    model = torch.compile(Model(), backend="aot_eager")
    proof = proof_of(model).check()
    assert formats_of(proof, "solver", "backward") == {"fp64"}
    assert any(run.in_graph for run in proof.operators)
    torch.compiler.reset()


@pytest.mark.parametrize("backward", ["fp32", "c=bf16"])
def test_any_format_of_the_backward_can_be_proved(backward: str) -> None:
    """Wider and narrower than the forward."""
    policy = Policy.parse("castwise: 1\nname: plain\ndefault: fp32\n")
    if backward == "fp32":
        policy = policy.with_default("p=fp32,c=bf16,o=bf16,r=fp32")
    policy = policy.with_rule(module="solver", stage="backward", precision=backward)
    proof = proof_of(Model(), policy).check()
    runs = proof.select(module="solver", stage="backward")
    expected = backward.removeprefix("c=")
    assert {run.actual for run in runs if run.num_flops} == {expected}


def test_a_backward_within_a_backward_keeps_its_own_format() -> None:
    """The inner rule decides for the inner module, in the second run as well."""
    policy = Policy.parse("castwise: 1\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n")
    policy = policy.with_rule(
        module="solver.scan.step", stage="backward", precision="c=fp32"
    ).with_rule(module="solver", stage="backward", precision="fp64")
    proof = proof_of(Model(), policy).check()
    assert formats_of(proof, "solver.scan.step", "backward") == {"fp32"}
    assert formats_of(proof, "solver.out", "backward") == {"fp64"}
    assert formats_of(proof, "solver", "forward") <= {"bf16", "fp32"}


def test_the_backward_of_the_whole_model_can_be_proved() -> None:
    """A rule on the stage alone; the loss, which is no module, follows its forward."""
    policy = Policy.parse("castwise: 1\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n")
    proof = proof_of(Model(), policy.with_rule(stage="backward", precision="fp64"))
    inside = [run for run in proof.check().operators if run.module is not None]
    backward = {run.actual for run in inside if run.stage == "backward"}
    assert {actual for actual in backward if "->" not in actual} == {"fp64"}


def test_a_backward_in_the_forwards_format_is_a_breach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Without the second run autograd differentiates what the forward kept."""
    monkeypatch.setattr(Island, "is_run_again", property(lambda _: False))
    proof = proof_of(Model())
    faults = {b.module for b in proof.breaches if b.kind == "format"}
    assert {"solver.scan.step", "solver.out"} <= faults
    assert "promised fp64 by policy.yaml:10: rule [module solver.*" in str(
        proof.breaches[0]
    )


def test_a_second_run_in_another_format_is_a_breach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Run again, but in fp32: what was promised is compared with what ran."""
    monkeypatch.setattr(
        Border,
        "dtype_inside",
        property(lambda border: torch.bfloat16 if border.compute in LOW else WIDE),
    )
    proof = proof_of(Model())
    assert any("promised fp64" in breach.because for breach in proof.breaches)


FP8 = Policy.parse(
    "castwise: 1\nname: eight\ndefault: p=fp32,c=fp8_e4m3,o=bf16,r=fp32\n"
)


def test_emulated_fp8_is_proved_by_its_numbers() -> None:
    """Operands are numbers of fp8 with one scale; gradients meet them in e5m2."""
    proof = proof_of(Model(), FP8).check()
    products = [run for run in proof.operators if run.num_flops]
    forward = {run.actual for run in products if run.stage == "forward"}
    assert forward == {"fp8_e4m3"}
    backward = {run.actual for run in products if run.stage == "backward"}
    assert "fp8_e5m2+fp8_e4m3" in backward
    assert {fmt for each in backward for fmt in each.split("+")} <= set(EIGHT)
    assert "emulated in bf16" in proof.summary()
    assert {r.actual for r in proof.operators if r.op == "softmax"} == {"fp32"}
    assert Contract.from_record(proof.record()) == proof


def test_an_operand_that_was_not_rounded_is_a_breach(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A bf16 product where fp8 was promised is found, though both are bf16 tensors."""
    monkeypatch.setattr(
        autocast_kernels, "round_operands", lambda args, kwargs, *_: (args, kwargs)
    )
    proof = proof_of(Model(), FP8)
    assert not proof.holds
    assert "promised fp8_e4m3" in proof.breaches[0].because
    assert "but ran in bf16" in proof.breaches[0].because


def test_an_output_promised_in_fp8_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Its numbers are compared, since bf16 holds them."""
    policy = Policy.parse("castwise: 1\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n")
    policy = policy.with_rule(module="solver", precision="o=fp8_e5m2")
    proof_of(Model(), policy).check()
    monkeypatch.setattr(Rounding, "_leaf", lambda _self, value: value)
    kinds = {breach.kind for breach in proof_of(Model(), policy).breaches}
    assert kinds == {"output"}
