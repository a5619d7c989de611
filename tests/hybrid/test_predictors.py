"""What each predictor proposes, against its formula, and how sure it is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from castwise.errors import PredictionError
from castwise.hybrid import PREDICTORS
from castwise.hybrid.exact_weights import ExactWeights
from castwise.hybrid.predictor import Predictor
from castwise.hybrid.predictors import AdamHold, OuterNesterov, make_predictor
from castwise.hybrid.predictors.backtest import NUM_COORDINATES, BackTest
from castwise.optim import AdamW, SweepSettings
from castwise.policy import preset
from castwise.training.step import prepare


class Point(nn.Module):
    """Weights that a test moves by hand."""

    def __init__(self, size: int = 7) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.zeros(size, dtype=torch.float32))
        self.b = nn.Parameter(torch.zeros(1, 3))

    def to_vector(self) -> Tensor:
        """All weights in one."""
        return torch.cat([self.a.detach(), self.b.detach().reshape(-1)])

    def put(self, vector: Tensor) -> None:
        """Set all weights."""
        with torch.no_grad():
            self.a.copy_(vector[: self.a.numel()])
            self.b.copy_(vector[self.a.numel() :].reshape(1, 3))


def begin(predictor: Predictor, model: nn.Module, optimizer: object = None) -> None:
    """Give a predictor hold of the weights of a model."""
    used = optimizer or torch.optim.SGD(model.parameters(), lr=0.1)
    run = prepare(model, used, preset("32-true"))  # type: ignore[arg-type]
    predictor.begin(ExactWeights(run))


def follow(
    predictor: Predictor, model: Point, course: Callable[[int], Tensor], num_steps: int
) -> None:
    """Let a predictor watch weights go along a course."""
    for step in range(1, num_steps + 1):
        model.put(course(step))
        predictor.observe()
        if predictor.window_ended and step < num_steps:
            predictor.settle("not_asked")


def vector_of(deltas: dict[str, Tensor]) -> Tensor:
    """A proposal as one vector."""
    return torch.cat([deltas["a"], deltas["b"].reshape(-1)])


def test_a_straight_course_is_foreseen_exactly() -> None:
    """The line's confidence is 1, and its proposal is the way that will come."""
    model, way = Point(), torch.linspace(-1, 1, 10)
    predictor = make_predictor("window_line", {}, window=4)
    begin(predictor, model)
    follow(predictor, model, lambda step: way * step, 4)
    assert predictor.confidence() is None
    predictor.settle("not_asked")
    follow(predictor, model, lambda step: way * (4 + step), 4)
    assert predictor.confidence() == pytest.approx(1.0)
    torch.testing.assert_close(vector_of(predictor.propose(12)), way * 12)


def test_the_line_is_shrunk_by_its_back_test() -> None:
    """Two windows at 60 degrees: cosine 1/2, half the way."""
    model = Point()
    first = torch.zeros(10).index_fill_(0, torch.tensor([0]), 1.0)
    second = 0.5 * first
    second[9] = 0.75**0.5
    predictor = make_predictor("window_line", {}, window=2)
    begin(predictor, model)
    follow(predictor, model, lambda step: first * step / 2, 2)
    predictor.settle("not_asked")
    follow(predictor, model, lambda step: first + second * step / 2, 2)
    assert predictor.confidence() == pytest.approx(0.5)
    torch.testing.assert_close(vector_of(predictor.propose(6)), 0.5 * second * 3)


def test_a_random_walk_gives_no_confidence() -> None:
    """Displacements that have nothing to do with each other."""
    model = Point(4000)
    predictor = make_predictor("window_line", {}, window=1)
    begin(predictor, model)
    generator = torch.Generator().manual_seed(0)
    steps = torch.randn(3, 4003, generator=generator).cumsum(0)
    follow(predictor, model, lambda step: steps[step - 1], 3)
    assert (predictor.confidence() or 0.0) < 0.06


@pytest.mark.parametrize("name", ["window_line", "adam_hold", "rna"])
def test_after_a_landing_two_windows_come_before_the_next_finding(name: str) -> None:
    """What was seen before a jump says nothing about what comes after it."""
    model = Point()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    (model.a.sum() + model.b.sum()).backward()
    optimizer.step()
    predictor = make_predictor(name, {"window": 5}, window=5)
    optimizer.zero_grad()
    begin(predictor, model, optimizer)
    way = torch.ones(10)
    follow(predictor, model, lambda step: way * step, 10)
    assert predictor.confidence() is not None
    predictor.settle("landed")
    follow(predictor, model, lambda step: way * (20 + step), 5)
    assert predictor.confidence() is None


def test_adam_hold_is_the_next_step_of_adamw_many_times() -> None:
    """On a constant gradient AdamW does just what was held, decay and all."""
    model = Point()
    with torch.no_grad():
        model.a.fill_(2.0)
    gradient = torch.linspace(0.5, 2.0, 10)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    predictor = AdamHold(window=4)
    begin(predictor, model, optimizer)

    def update() -> None:
        model.a.grad, model.b.grad = gradient[:7], gradient[7:].reshape(1, 3)
        optimizer.step()
        predictor.observe()

    for _ in range(30):
        update()
    before = model.to_vector()
    proposed = vector_of(predictor.propose(10))
    for _ in range(10):
        update()
    came = model.to_vector() - before
    torch.testing.assert_close(proposed, came, rtol=2e-3, atol=1e-6)


def test_adam_hold_holds_the_momentum_of_sgd() -> None:
    """Lr times the buffer."""
    model = Point()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    predictor = AdamHold(window=1)
    begin(predictor, model, optimizer)
    model.a.grad, model.b.grad = torch.ones(7), torch.zeros(1, 3)
    optimizer.step()
    assert torch.equal(predictor.propose(4)["a"], torch.full((7,), -2.0))


def test_adam_hold_refuses_an_optimizer_without_momentum() -> None:
    """Plain SGD keeps nothing that could be held."""
    model = Point()
    predictor = AdamHold(window=1)
    begin(predictor, model)
    with pytest.raises(PredictionError, match="keeps nothing for 'a'"):
        predictor.propose(1)


@pytest.mark.parametrize(("momentum", "rate"), [(0.5, 0.7), (0.0, 0.5)])
def test_outer_nesterov_follows_its_formula(momentum: float, rate: float) -> None:
    """Against the recursion written out in float64; momentum 0 is Lookahead."""
    model = Point()
    predictor = OuterNesterov(window=1, momentum=momentum, rate=rate)
    begin(predictor, model)
    slow, buffer = torch.zeros(10).double(), torch.zeros(10).double()
    generator = torch.Generator().manual_seed(4)
    for _ in range(6):
        step = torch.randn(10, generator=generator)
        fast = model.to_vector() + step
        model.put(fast)
        predictor.observe()
        landing = fast + vector_of(predictor.propose(99))
        model.put(landing)
        predictor.settle("landed")
        d = fast.double() - slow
        buffer = momentum * buffer + d
        slow = slow + rate * (d + momentum * buffer)
        torch.testing.assert_close(landing.double(), slow, rtol=1e-5, atol=1e-5)
        slow = landing.double()


def test_a_refused_landing_leaves_the_outer_momentum_alone() -> None:
    """Only what was done counts."""
    model = Point()
    predictor = OuterNesterov(window=1)
    begin(predictor, model)
    model.put(torch.ones(10))
    predictor.observe()
    predictor.propose(1)
    predictor.settle("refused")
    model.put(torch.full((10,), 2.0))
    predictor.observe()
    torch.testing.assert_close(
        vector_of(predictor.propose(1)), torch.full((10,), 0.7 * 1.5 - 1.0)
    )


def test_rna_solves_a_quadratic_in_few_dimensions() -> None:
    """Gradient descent in 3 eigendirections: 4 residuals combine to the minimum."""
    model = Point()
    eigenvalues = torch.zeros(10)
    eigenvalues[:3] = torch.tensor([0.02, 0.1, 0.5])
    start = torch.ones(10) * (eigenvalues > 0)
    predictor = make_predictor(
        "rna", {"num_iterates": 4, "regularisation": 1e-14}, window=4
    )
    model.put(start)
    begin(predictor, model)
    follow(predictor, model, lambda step: start * (1 - eigenvalues) ** step, 4)
    landing = model.to_vector() + vector_of(predictor.propose(1))
    assert model.to_vector().norm() > 1.0
    assert landing.norm() < 0.01


def test_the_sketch_tells_the_cosine_of_everything() -> None:
    """4096 of 300,000 coordinates: within 0.03 of the full value."""
    torch.manual_seed(0)
    sizes = {"a": 100_000, "b": 199_999, "c": 1}
    one = {name: torch.randn(size) for name, size in sizes.items()}
    other = {name: value + torch.randn(sizes[name]) for name, value in one.items()}
    backtest = BackTest()
    backtest.begin(one)
    assert 4000 < backtest.sketch(one).numel() <= NUM_COORDINATES
    backtest.promise(backtest.sketch(one))
    backtest.come(backtest.sketch(other))
    full = torch.nn.functional.cosine_similarity(
        torch.cat(list(one.values())), torch.cat(list(other.values())), dim=0
    )
    assert backtest.cosine == pytest.approx(float(full), abs=0.03)


def test_null_proposes_nothing_and_is_sure() -> None:
    """The control."""
    model = Point()
    predictor = make_predictor("null", {}, window=3)
    begin(predictor, model)
    assert predictor.confidence() == 1.0
    assert not vector_of(predictor.propose(5)).any()
    assert predictor.bytes_per_parameter == 0


def test_the_cost_in_memory_is_stated() -> None:
    """Bytes per trained number between steps, as measured on the state."""
    for name in PREDICTORS:
        model = Point(5000)
        predictor = make_predictor(name, {}, window=20)
        begin(predictor, model)
        for _ in range(20):
            predictor.observe()
        kept = predictor.state_dict().get("kept")
        found = sum(tensor.nbytes for tensor in leaves(kept)) / 5003
        assert found == pytest.approx(predictor.bytes_per_parameter), name


def leaves(tree: object) -> list[Tensor]:
    """All tensors of a tree."""
    if isinstance(tree, Tensor):
        return [tree]
    inner = tree.values() if isinstance(tree, dict) else tree
    if isinstance(tree, dict | list):
        return [tensor for each in inner for tensor in leaves(each)]  # type: ignore[union-attr]
    return []


def test_modes_of_a_linear_course_are_run_on_exactly() -> None:
    """Two decaying modes, one of them turning: DMD foresees every step of them."""
    model = Point(61)
    torch.manual_seed(2)
    basis = torch.linalg.qr(torch.randn(64, 3, dtype=torch.float64))[0]
    turn = torch.tensor([[0.9, -0.3, 0.0], [0.3, 0.9, 0.0], [0.0, 0.0, 0.7]]).double()

    def course(step: int) -> Tensor:
        start = torch.ones(3, dtype=torch.float64)
        return (basis @ (torch.linalg.matrix_power(turn, step) @ start)).float()

    predictor = make_predictor("dmd", {"num_iterates": 10}, window=10)
    model.put(course(0))
    begin(predictor, model)
    follow(predictor, model, course, 10)
    expected = course(27) - course(10)
    found = vector_of(predictor.propose(17))
    assert float((found - expected).norm() / expected.norm()) < 1e-2


def test_a_mode_that_grows_is_held_at_its_last_size() -> None:
    """Its eigenvalue is put on the unit circle: the last step, many times."""
    model, way = Point(), torch.linspace(-1, 1, 10)
    predictor = make_predictor("dmd", {"num_iterates": 4, "rank": 1}, window=4)
    begin(predictor, model)
    follow(predictor, model, lambda step: way * 2.0**step, 4)
    last = way * (2.0**4 - 2.0**3)
    torch.testing.assert_close(
        vector_of(predictor.propose(5)), 5 * last, rtol=1e-3, atol=1e-3
    )


def test_modes_of_weights_that_stand_still_are_none() -> None:
    """No division by the nothing that happened."""
    model = Point()
    predictor = make_predictor("dmd", {}, window=20)
    begin(predictor, model)
    follow(predictor, model, lambda _: torch.ones(10) * 0, 20)
    assert float(vector_of(predictor.propose(9)).abs().max()) == 0.0


def test_moments_in_8_bits_are_no_numbers_to_hold() -> None:
    """Codes would be taken for a direction; the remedy is named."""
    torch.manual_seed(0)
    model = Point(5000)  # smaller ones stay in fp32
    optimizer = AdamW(model.parameters(), lr=0.1, settings=SweepSettings(states="8bit"))
    predictor = make_predictor("adam_hold", {}, window=1)
    begin(predictor, model, optimizer)
    (model.a.sum() + model.b.sum()).backward()
    optimizer.step()
    with pytest.raises(PredictionError, match="codes of 8 bits; take window_line"):
        predictor.propose(3)
