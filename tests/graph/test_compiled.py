from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import castwise as cw
from castwise.autocast import autocast
from castwise.graph.compiled import CompiledModel
from castwise.graph.inner import Inner
from castwise.numerics.error import relative_error
from graph_cases import CASES, Case, step
from tolerances import TOLERANCES


def errors(
    case: Case, compile_it: Callable[[nn.Module], Callable[[Any], Tensor]]
) -> tuple[float, float, float]:
    """Relative errors of outputs, gradients and buffers, over two calls."""
    torch.manual_seed(0)
    model = case.build()
    reference = copy.deepcopy(model).double()
    run = compile_it(model)
    worst = [0.0, 0.0, 0.0]
    for seed in (1, 2):
        right = step(reference, reference, case.inputs(torch.float64, seed))
        got = step(model, run, case.inputs(torch.float32, seed))
        floats = [
            [b.double() for b in each.buffers() if b.is_floating_point()]
            for each in (model, reference)
        ]
        found = [*map(relative_error, got, right), relative_error(*floats)]
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
    return worst[0], worst[1], worst[2]


def under_autocast(model: nn.Module) -> Callable[[Any], Tensor]:
    """The rival: the same operator table, put into force operator by operator."""

    def run(x: Any) -> Tensor:
        with autocast("cpu", "bf16"):
            return model(x)

    return run


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo itself
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by Dynamo itself
@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_outputs_gradients_and_buffers_are_right(case: Case, inner: Inner) -> None:
    """Whatever a model does, a plan is as near to float64 as autocast is."""
    torch.compiler.reset()
    compiled: list[CompiledModel] = []

    def compile_it(model: nn.Module) -> Callable[[Any], Tensor]:
        compiled.append(cw.compile(model, "bf16-mixed", inner=inner))
        return compiled[0]

    found, usual = errors(case, compile_it), 3 * (4 * TOLERANCES["bf16"].unit,)
    if case.has_rival:
        usual = errors(case, under_autocast)
    for error, rival in zip(found, usual, strict=True):
        assert error <= 1.5 * rival + 2 * TOLERANCES["bf16"].unit
    plan = compiled[0].plan()
    # torch 2.13 cannot differentiate an LSTM ahead of time, in fp32 neither
    left_out = ["rnn"] if case.name == "recurrent" and inner != "eager" else []
    assert [each.module for each in plan.uncovered] == left_out, plan.summary()
    assert {each.treatment for each in plan.uncovered} <= {"autocast"}
    assert plan.num_casts or case.name == "own regions", plan.summary()


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo itself
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by Dynamo itself
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_inference_is_right(case: Case) -> None:
    """Without gradients, and in inference mode, a plan is as near to float64."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = case.build().eval()
    exact, usual = copy.deepcopy(model).double(), under_autocast(copy.deepcopy(model))
    compiled = cw.compile(model, "bf16-mixed", inner="eager")
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            right = exact(case.inputs(torch.float64))
            got = compiled(case.inputs())
            rival = usual(case.inputs()) if case.has_rival else got
        error, limit = relative_error(got, right), relative_error(rival, right)
        assert got.dtype == torch.float32
        assert error <= 1.5 * min(limit, 0.03) + 2 * TOLERANCES["bf16"].unit


OF_ANY_SIZE = [case for case in CASES if case.name != "indexed"]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # Dynamo itself
@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by Dynamo itself
@pytest.mark.parametrize("case", OF_ANY_SIZE, ids=lambda case: case.name)
def test_batches_of_any_size_run_by_one_plan(case: Case) -> None:
    """A plan asks nothing of sizes that the model did not: no graph is made again."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = case.build()
    exact = copy.deepcopy(model).double()
    usual = copy.deepcopy(model)
    compiled = cw.compile(model, "bf16-mixed", inner="eager", dynamic=True)
    captured = []
    for more in (0, 3):
        larger = replace(case, shape=(case.shape[0] + more, *case.shape[1:]))
        right = step(exact, exact, larger.inputs(torch.float64))
        got = step(model, compiled, larger.inputs())
        captured.append(compiled.num_captured)
        rival = got
        if case.has_rival:
            rival = step(usual, under_autocast(usual), larger.inputs())
        for ours, theirs, exactly in zip(got, rival, right, strict=True):
            limit = min(relative_error(theirs, exactly), 0.1)
            error = relative_error(ours, exactly)
            assert error <= 1.5 * limit + 2 * TOLERANCES["bf16"].unit
    assert captured[0] == captured[1]


@pytest.mark.skipif(
    torch.__version__ < (2, 12), reason="fakes of torch 2.11 end at such an LSTM"
)
def test_what_refuses_a_plan_is_named_and_its_users_are_not_blamed() -> None:
    """An LSTM of symbolic sizes stays in fp32, and the layer behind it does not."""
    torch.compiler.reset()
    case = next(case for case in CASES if case.name == "recurrent")
    compiled = cw.compile(case.build(), "bf16-mixed", inner="eager", dynamic=True)
    compiled(case.inputs())
    plan = compiled.plan()
    assert plan.unknown_ops == ("lstm",)
    assert "as captured: lstm" in plan.summary()
    assert "linear: low" in plan.explain("out")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # Inductor warns of what this machine lacks
def test_generated_kernels_are_right() -> None:
    """Inductor keeps what the plan promises, aliases and writes included."""
    torch.compiler.reset()
    case = next(case for case in CASES if case.name == "written")
    found = errors(case, lambda model: cw.compile(model, "bf16-mixed"))
    assert max(found) < 8 * TOLERANCES["bf16"].unit
