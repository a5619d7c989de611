from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import castwise.training.open_step as open_step_room
from castwise.errors import LossScaleError
from castwise.loss_scale import DynamicScale, LossScale
from castwise.policy import preset
from castwise.training.replay import Explanation
from castwise.training.step import Run, Skipped, Stepped, prepare


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Grower(nn.Module):
    """Multiplies by a number that can be turned up."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = 1.0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the product."""
        return x * self.factor


def make_model() -> nn.Sequential:
    """Norm with buffers, dropout that draws, and a place to go wrong."""
    return nn.Sequential(
        nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.2), Grower(), nn.Linear(7, 3)
    )


def make_run(name: str = "32-true", scale: LossScale | None = None) -> Run:
    """A run of that model under AdamW."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    return prepare(model, optimizer, preset(name), loss_scale=scale)


def skip_of(run: Run, loss_fn: Callable[[torch.Tensor], torch.Tensor]) -> Skipped:
    """One plain step, written as a user writes it, that has to be skipped."""
    x = torch.randn(11, 5)
    with run.step() as step:
        out = run.model(x)
        loss = loss_fn(out)
        step.backward(loss)
    assert isinstance(step.outcome, Skipped)
    return step.outcome


def test_an_overflow_in_the_forward_names_module_and_line() -> None:
    """Without an edit of the loop: the model's own line, in fp16."""
    run = make_run("16-mixed")
    run.model[3].factor = 1e5
    outcome = skip_of(run, lambda out: out.float().pow(2).mean())
    assert (outcome.op, outcome.module, outcome.stage) == ("mul", "3", "forward")
    assert outcome.kind == "overflow"
    assert outcome.where is not None
    assert "test_replay.py:" in outcome.where
    assert outcome.found is not None
    assert outcome.found.format == "fp16"
    assert outcome.gone_at is None, "a lower loss scale does not help a forward"
    assert "overflows fp16" in outcome.because


def test_an_operator_of_the_loss_is_named_with_the_users_line() -> None:
    """The logarithm of 0 outside of the model, with the values before it finite."""
    run = make_run("bf16-mixed")

    def loss_fn(out: torch.Tensor) -> torch.Tensor:
        zero = out.float() * 0.0
        return torch.log(zero).mean()

    outcome = skip_of(run, loss_fn)
    assert (outcome.op, outcome.module, outcome.stage) == ("log", None, "forward")
    assert outcome.kind == "nan"
    line = loss_fn.__code__.co_firstlineno + 2
    assert outcome.where is not None
    assert outcome.where.endswith(f"test_replay.py:{line}")
    assert outcome.because.startswith("the loss is inf, so the forward went wrong")


def test_a_nan_of_the_backward_is_told_from_the_finite_forward() -> None:
    """Sqrt of 0 is 0; its derivative is what fails."""
    run = make_run()
    outcome = skip_of(run, lambda out: (out * 0).abs().sqrt().mean())
    assert math.isfinite(outcome.loss)
    assert (outcome.stage, outcome.kind) == ("backward", "nan")
    assert outcome.found is not None
    assert outcome.found.node == "sqrt"
    assert outcome.gone_at is None


def test_a_scale_that_is_too_high_is_told_with_the_one_that_is_not() -> None:
    """Range: the same step is finite at a lower loss scale, and at no higher one."""
    model = nn.Sequential(nn.Linear(5, 7), Grower(), nn.Linear(7, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    scale = DynamicScale(initial=2.0**24)
    run = prepare(model, optimizer, preset("16-mixed"), loss_scale=scale)
    x = torch.randn(11, 5)
    outcome: Any = None
    promised = []
    while not isinstance(outcome, Stepped):
        with run.step() as step:
            step.backward(run.model(x).float().pow(2).mean())
        outcome = step.outcome
        if isinstance(outcome, Skipped):
            assert (outcome.stage, outcome.kind) == ("backward", "overflow")
            assert "it is gone at loss scale" in outcome.because
            promised.append(outcome.gone_at)
    assert set(promised) == {outcome.scale}, "every replay foretold where it would end"


def test_the_computation_may_be_given_instead() -> None:
    """For compiled models and loops that hide the loss; here several, one by one."""
    run = make_run("bf16-mixed")
    xs = torch.randn(3, 11, 5)

    def losses() -> Iterator[torch.Tensor]:
        for place, x in enumerate(xs):
            yield run.model(x).float().mean() / (0.0 if place == 1 else 1.0)

    with run.step(again=losses) as step:
        for loss in losses():
            step.backward(loss)
    assert isinstance(step.outcome, Skipped)
    assert (step.outcome.op, step.outcome.kind) == ("div", "nan")


def test_a_compiled_model_is_replayed_as_it_was_written() -> None:
    """The kernel that was compiled has no lines; the model's code has."""
    run = make_run("32-true")
    run.model[3].factor = math.inf
    compiled = torch.compile(run.model, backend="eager")
    x = torch.randn(11, 5)

    def loss() -> torch.Tensor:
        found: torch.Tensor = compiled(x).pow(2).mean()
        return found

    with run.step(again=loss) as step:
        step.backward(loss())
    assert isinstance(step.outcome, Skipped)
    assert (step.outcome.op, step.outcome.module) == ("mul", "3")
    with run.step() as step:
        step.backward(loss())
    assert isinstance(step.outcome, Skipped)
    assert step.outcome.op is None
    assert "give it to the step: run.step(again=" in step.outcome.because


def test_a_compiled_model_is_one_graph_and_compiled_once() -> None:
    """Hooks that listen leave no trace in compiled code, nor does the loss scale."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = make_run("16-mixed", DynamicScale(initial=2.0**10, interval=2))
    run.model[2].p = 0.0

    @torch.compile(backend=backend, fullgraph=True)
    def forward(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(run.model(x).float(), y)

    x, y = torch.randn(11, 5), torch.randn(11, 3)
    scales = set()
    for _ in range(9):
        with run.step() as step:
            step.backward(forward(x, y))
        scales.add(step.outcome.scale)
    assert len(scales) > 3, "the scale changed, and nothing was compiled again"
    assert len(graphs) == 1


def test_forward_and_backward_are_compiled_once_for_all_scales() -> None:
    """The scale reaches compiled code as a tensor, the tangent of its backward."""
    from torch._dynamo.backends.common import aot_autograd

    compiled = {"forward": 0, "backward": 0}

    def compiler(which: str) -> Callable[[Any, Any], Any]:
        def compile_graph(graph: Any, _: Any) -> Any:
            compiled[which] += 1
            return make_boxed_func(graph.forward)

        return compile_graph

    torch._dynamo.reset()
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    scale = DynamicScale(initial=2.0**10, interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = prepare(model, optimizer, preset("16-mixed"), loss_scale=scale)
    backend = aot_autograd(
        fw_compiler=compiler("forward"), bw_compiler=compiler("backward")
    )
    forward = torch.compile(lambda x: run.model(x).float().mean(), backend=backend)
    x = torch.randn(11, 5)
    for _ in range(6):
        with run.step() as step:
            step.backward(forward(x))
        assert isinstance(step.outcome, Stepped)
    assert run.loss_scale.scale == 2.0**16
    assert compiled == {"forward": 1, "backward": 1}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_compiled_loss_after_an_eager_model_is_compiled_once() -> None:
    """The tape is listening then, and must not be compiled into it."""
    graphs = []

    def backend(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    run = make_run("32-true")
    loss_fn = torch.compile(functional.mse_loss, backend=backend)
    x, y = torch.randn(11, 5), torch.randn(11, 3)
    for _ in range(3):
        with run.step() as step:
            step.backward(loss_fn(run.model(x), y))
        assert isinstance(step.outcome, Stepped)
    assert len(graphs) == 1


def _trained(*, explains: bool, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, ...]:
    """Train with skips thrown in; return everything that a replay could change."""
    if not explains:
        monkeypatch.setattr(open_step_room, "explain", lambda *_, **__: Explanation())
    torch.manual_seed(3)
    run = make_run("16-mixed", DynamicScale(initial=2.0**20, interval=3))
    outcomes = []
    for number in range(30):
        run.model[3].factor = 1e6 if number % 7 == 5 else 1.0
        with run.step() as step:
            for _ in range(2):
                out = run.model(torch.randn(11, 5)).float()
                loss = functional.dropout(out, 0.1).pow(2).mean()
                step.backward(loss)
        outcomes.append(type(step.outcome).__name__)
    state = copy.deepcopy(run.model.state_dict())
    moments = copy.deepcopy(run.optimizer.state_dict()["state"])
    return outcomes, state, moments, torch.get_rng_state(), run.loss_scale.state_dict()


def test_a_replay_never_changes_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, moments, buffers and random states: bit by bit as without it."""
    with_it = _trained(explains=True, monkeypatch=monkeypatch)
    without = _trained(explains=False, monkeypatch=monkeypatch)
    assert with_it[0] == without[0]
    assert 4 < with_it[0].count("Skipped") < 20
    for name, value in with_it[1].items():
        assert torch.equal(value, without[1][name]), name
    for at, state in with_it[2].items():
        for name, value in state.items():
            assert torch.equal(value, without[2][at][name]), name
    assert torch.equal(with_it[3], without[3])
    assert with_it[4] == without[4]


def test_side_effects_of_the_loop_are_not_repeated() -> None:
    """A running total and a counter stand in the block; the loss needs neither."""
    run = make_run("32-true")
    total, drawn = torch.zeros(()), []
    with run.step() as step:
        drawn.append(1)
        out = run.model(torch.randn(11, 5))
        loss = torch.log(out * 0).sum()
        total += 1.0
        total.add_(out.detach().abs().sum() * 0)
        step.backward(loss)
    assert isinstance(step.outcome, Skipped)
    assert step.outcome.op == "log"
    assert total.item() == 1.0
    assert drawn == [1]


def test_the_second_of_several_losses_is_found() -> None:
    """Each call of the model has its own inputs and random state."""
    run = make_run("32-true")
    with run.step() as step:
        for bad in (False, True, False):
            out = run.model(torch.randn(11, 5))
            step.backward(out.mean() / (0.0 if bad else 1.0))
    assert isinstance(step.outcome, Skipped)
    assert (step.outcome.op, step.outcome.kind) == ("div", "nan")


def test_losses_that_overflow_only_together_are_said_to() -> None:
    """No operator is to blame for a sum of gradients that is too large."""
    model = nn.Linear(1, 1, bias=False).half()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    run = prepare(model, optimizer, preset("16-true"), loss_scale=DynamicScale())
    run.loss_scale.load_state_dict({**run.loss_scale.state_dict(), "scale": 40_000.0})
    with run.step() as step:
        for _ in range(2):
            step.backward(run.model(torch.ones(1, 1).half()).sum())
    assert isinstance(step.outcome, Skipped)
    assert step.outcome.op is not None
    assert "overflow where they are added up" in step.outcome.because


def test_models_that_return_more_than_a_tensor_are_followed() -> None:
    """Dicts, and objects of one's own with the loss inside."""

    class Out:
        def __init__(self, loss: torch.Tensor) -> None:
            self.loss = loss

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, *, x: torch.Tensor) -> Out:
            return Out((self.inner(x) * 0).log().mean())

    model = Model()
    run = prepare(model, torch.optim.SGD(model.parameters()), preset("32-true"))
    with run.step() as step:
        step.backward(model(x=torch.randn(2, 3)).loss)
    assert isinstance(step.outcome, Skipped)
    assert (step.outcome.op, step.outcome.module) == ("log", "")


def test_recomputed_blocks_are_replayed() -> None:
    """Activation checkpointing runs its forward twice and is explained once."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = checkpoint(self.block, x, use_reentrant=False)
            return (y * 0).log()

    model = Model()
    run = prepare(model, torch.optim.SGD(model.parameters()), preset("32-true"))
    with run.step() as step:
        step.backward(model(torch.randn(2, 3)).mean())
    assert isinstance(step.outcome, Skipped)
    assert (step.outcome.op, step.outcome.module) == ("log", "")


def test_a_gradient_that_was_tampered_with_is_not_blamed_on_an_operator() -> None:
    """The replay is finite, and says so."""
    run = make_run("32-true")
    with run.step() as step:
        step.backward(run.model(torch.randn(11, 5)).mean())
        run.model[4].bias.grad.fill_(math.nan)
    assert isinstance(step.outcome, Skipped)
    assert step.outcome.stage is None
    assert step.outcome.kind == "nan"
    assert "replayed, the gradients are finite" in step.outcome.because


def test_a_loss_that_comes_out_otherwise_proves_nothing() -> None:
    """What the loss reads may have changed since; then nobody is blamed."""
    run = make_run("32-true")
    values = iter((math.nan, 1.0))
    x = torch.randn(11, 5)
    with run.step(again=lambda: run.model(x).mean() * next(values)) as step:
        step.backward(run.model(x).mean() * next(values))
    assert isinstance(step.outcome, Skipped)
    assert step.outcome.op is None
    assert "instead of nan" in step.outcome.because


def test_a_poisoned_weight_stops_the_run_and_is_named_as_the_source() -> None:
    """No later step can mend it; what was fed to the operator is the fault."""
    run = make_run("32-true")
    with torch.no_grad():
        run.model[0].weight[2, 1] = math.inf
    step = run.step()
    with (
        pytest.raises(LossScaleError, match=r"weight '0\.weight' itself holds inf"),
        step,
    ):
        step.backward(run.model(torch.randn(11, 5)).mean())
    assert isinstance(step.outcome, Skipped)
    assert "what the weight 0.weight held" in step.outcome.because


def test_a_gradient_whose_square_overflows_is_not_stepped_by() -> None:
    """It is finite, but AdamW's second moment would be infinite for ever after."""
    run = make_run("32-true")
    with run.step() as step:
        step.backward(run.model(torch.randn(11, 5)).sum() * 1e25)
    assert isinstance(step.outcome, Skipped)
    assert "whose square fp32 does not hold" in step.outcome.because
    run.clip_norm = 1.0
    with run.step() as step:
        step.backward(run.model(torch.randn(11, 5)).sum() * 1e25)
    assert isinstance(step.outcome, Stepped), "clipped, its square is small"
    with run.step() as step:
        step.backward(run.model(torch.randn(11, 5)).sum())
    assert isinstance(step.outcome, Stepped)


def test_at_the_floor_the_run_stops_with_the_operator() -> None:
    """bf16, fp32 and fp16 alike: the last sentence names operator, module and line."""
    for name, scale in (
        ("16-mixed", DynamicScale(initial=1.0)),
        ("bf16-mixed", None),
        ("32-true", None),
    ):
        run = make_run(name, scale)
        run.model[3].factor = math.nan
        with pytest.raises(
            LossScaleError, match=r"mul \(3, forward, .*test_replay\.py:.*mend that"
        ):
            for _ in range(30):
                with run.step() as step:
                    step.backward(run.model(torch.randn(11, 5)).float().mean())
        assert run.num_stepped == 0


def test_history_is_bounded_plain_data_that_a_checkpoint_keeps() -> None:
    """Changes of the scale, skips and counted causes come back with the run."""
    run = make_run("16-mixed", DynamicScale(initial=2.0**10, interval=2))
    for number in range(9):
        run.model[3].factor = 1e6 if number in {3, 4} else 1.0
        with run.step() as step:
            step.backward(run.model(torch.randn(11, 5)).float().mean())
    history = run.history
    assert [each.step for each in history.skips] == [4, 5]
    assert [(c.step, c.scale) for c in history.changes] == [
        (0, 1024.0),
        (2, 2048.0),
        (4, 1024.0),
        (5, 512.0),
        (7, 1024.0),
        (9, 2048.0),
    ]
    ((cause, count),) = history.causes.items()
    assert count == 2
    assert cause.startswith("overflow: mul (3, forward, ")
    fresh = make_run("16-mixed")
    fresh.load_state_dict(run.state_dict())
    assert fresh.history.state_dict() == history.state_dict()
    assert fresh.state_dict() == run.state_dict()
    earlier = {
        name: each for name, each in run.state_dict().items() if name != "history"
    }
    make_run("16-mixed").load_state_dict(earlier)


def test_a_model_with_a_run_on_it_is_copied_and_pickled_without_it() -> None:
    """Averages copy a model in the middle of a run; a copy has no step to listen to."""
    run = make_run("32-true")
    for copied in (copy.deepcopy(run.model), pickle.loads(pickle.dumps(run.model))):  # noqa: S301 -- our own bytes
        with run.step() as step:
            copied(torch.randn(11, 5))
            step.backward(run.model(torch.randn(11, 5)).mean())
        assert isinstance(step.outcome, Stepped)
    run.remove()
    assert not run.model._forward_hooks
    assert not run.model._forward_pre_hooks


def test_nothing_is_held_after_a_step() -> None:
    """Inputs live as long as the loop holds them, and no longer."""
    import weakref

    run = make_run("32-true")
    x = torch.randn(11, 5)
    alive = weakref.ref(x)
    with run.step() as step:
        step.backward(run.model(x).mean())
    del x
    assert alive() is None


def test_what_a_loss_costs_is_bounded_by_the_length_of_the_tape() -> None:
    """A loss of a thousand calls is not explained, and not held up by much."""
    run = make_run("32-true")

    def loss_fn(out: torch.Tensor) -> torch.Tensor:
        for _ in range(1000):
            out = out + 1e-3
        return out.mean() / 0.0

    outcome = skip_of(run, loss_fn)
    assert outcome.stage is None
    assert "run.step(again=" in outcome.because
    assert len(run._tape._entries) == 0


def test_a_model_that_returns_a_circle_of_objects_is_no_trap() -> None:
    """Looking for tensors in a result has to end."""

    class Node:
        def __init__(self, value: torch.Tensor) -> None:
            self.itself = self
            self.value = value

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> Node:
            return Node(self.inner(x))

    model = Model()
    run = prepare(model, torch.optim.SGD(model.parameters()), preset("32-true"))
    with run.step() as step:
        step.backward(model(torch.randn(2, 3)).value.mean())
    assert isinstance(step.outcome, Stepped)
    outcome = skip_of_value(run)
    assert (outcome.op, outcome.kind) == ("div", "nan")


def skip_of_value(run: Run) -> Skipped:
    """A skipped step of a model that hides its output in an object."""
    with run.step() as step:
        step.backward(run.model(torch.randn(2, 3)).value.mean() / 0.0)
    assert isinstance(step.outcome, Skipped)
    return step.outcome


def test_modes_that_the_loop_opens_itself_stay_in_order() -> None:
    """Around the model, around the loss, or around both: they close as they should."""
    run = make_run("32-true")
    x = torch.randn(11, 5)
    before = torch._C._len_torch_function_stack()
    with run.step() as step:
        with torch.device("cpu"):
            out = run.model(x)
        step.backward(out.mean())
    assert torch._C._len_torch_function_stack() == before
    with run.step() as step:
        out = run.model(x)
        with torch.device("cpu"):
            loss = out.mean()
            step.backward(loss)
    assert torch._C._len_torch_function_stack() == before
    with torch.device("cpu"), run.step() as step:
        step.backward(run.model(x).mean())
    assert torch._C._len_torch_function_stack() == before
    with pytest.raises(ZeroDivisionError), run.step():
        run.model(x)
        1 / 0  # noqa: B018 -- the exception is what is tested
    assert torch._C._len_torch_function_stack() == before
