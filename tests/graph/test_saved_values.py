from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 -- its usual name

import castwise as cw
from castwise.errors import SettingsError
from castwise.graph import saved_values
from castwise.graph.compiled import CompiledModel
from castwise.graph.inner import INNER, Inner
from castwise.memory.row_formats import ROW_FORMATS
from castwise.numerics.error import relative_error
from graph_cases import CASES, Case, step
from random_nets import ROWS, WIDTH, RandomNet

ERRORS = {"fp16": 3e-3, "bf16": 2e-2, "int8": 0.05}
"""Gradients of small models of some ten operators; a wrong value is off by far more."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*should not be instantiated"),  # Dynamo itself
    pytest.mark.filterwarnings("ignore:The .grad attribute"),  # asked for by Dynamo
    pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning"),
]


@pytest.fixture
def everything_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Values of test models are small, and would all be left alone."""
    monkeypatch.setattr(saved_values, "_SMALL", 0)
    monkeypatch.setattr(saved_values, "_MUCH_SMALLER", 1 << 40)


class Block(nn.Module):
    """Attention whose q, k and v are views of one product, and a gated product."""

    def __init__(self, width: int = 64, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.into, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.gate, self.up = nn.Linear(width, width), nn.Linear(width, width)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """From inputs to outputs, [rows, length, width]."""
        parts = self.into(self.norm(x)).unflatten(-1, (3, 4, -1)).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        x = x + F.silu(self.gate(x)) * self.up(x)
        return F.dropout(x, self.dropout, self.training)


def held_bytes(model: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor) -> int:
    """Bytes of what a forward holds for its backward, weights and input left out."""
    standing = {w.untyped_storage()._cdata for w in (*model.parameters(), x)}
    found: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in standing:
            found[storage._cdata] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = run(x)
    assert out.requires_grad
    return sum(found.values())


@pytest.mark.usefixtures("everything_is_stored")
@pytest.mark.parametrize("fmt", ["fp16", "int8"])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_only_gradients_move_and_by_no_more_than_the_format(
    case: Case, fmt: str
) -> None:
    """Outputs and buffers keep every bit; gradients are near those of float64."""
    torch.manual_seed(0)
    model = case.build()
    plain = copy.deepcopy(model)
    exact = copy.deepcopy(model).double()
    torch.compiler.reset()
    as_it_was = cw.compile(plain, "32-true", inner="aot_eager")
    stored = cw.compile(model, "32-true", inner="aot_eager", saves=fmt)
    for seed in (1, 2):
        right = step(exact, exact, case.inputs(torch.float64, seed))
        before = step(plain, as_it_was, case.inputs(torch.float32, seed))
        got = step(model, stored, case.inputs(torch.float32, seed))
        assert torch.equal(got[0], before[0])
        limit = ERRORS[fmt] + 2 * relative_error(before[1], right[1])
        assert relative_error(got[1], right[1]) <= limit
    for one, other in zip(model.buffers(), plain.buffers(), strict=True):
        assert torch.equal(one, other)
    bill = stored.saves()
    assert bill.num_packed or case.name == "constants"
    assert bill.after_bytes <= 0.57 * bill.before_bytes


@pytest.mark.usefixtures("everything_is_stored")
@pytest.mark.parametrize("seed", range(24))
def test_random_programs_with_views_and_writes_keep_their_outputs(seed: int) -> None:
    """Whatever is viewed or written, what is stored is what the backward reads."""
    torch.compiler.reset()
    torch.manual_seed(seed)
    net = RandomNet(seed)
    plain = copy.deepcopy(net)
    fmt = ROW_FORMATS[seed % 3]
    runs = {
        net: cw.compile(net, "32-true", inner="aot_eager", saves=fmt),
        plain: cw.compile(plain, "32-true", inner="aot_eager"),
    }
    x = torch.randn(ROWS, WIDTH)
    found = []
    for model, run in runs.items():
        outputs = [out for out in run(x.clone()) if out.requires_grad]
        if outputs:
            torch.stack([out.sum() for out in outputs]).sum().backward()
        grads = [w.grad for w in model.parameters() if w.grad is not None]
        found.append((outputs, grads))
    for one, other in zip(found[0][0], found[1][0], strict=True):
        assert torch.equal(one, other)
    if found[1][1]:
        assert relative_error(found[0][1], found[1][1]) <= 4 * ERRORS[fmt]


@pytest.mark.parametrize("inner", INNER)
def test_what_waits_for_the_backward_takes_half(inner: Inner) -> None:
    """Not the bill alone: what autograd holds is counted."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Block(), torch.randn(4, 32, 64)
    exact = copy.deepcopy(model).double()
    right = step(exact, exact, x.double())
    plain = cw.compile(copy.deepcopy(model), "32-true", inner=inner)
    stored = cw.compile(model, "32-true", inner=inner, saves="fp16")
    got = step(model, stored, x)
    assert relative_error(got[1], right[1]) < 1e-3
    bill = stored.saves()
    assert bill.num_packed >= 4, bill
    assert bill.after_bytes <= 0.51 * bill.before_bytes
    if inner != "eager":  # there the hooks of the store are the ones that count
        before = held_bytes(plain._orig_mod, plain, x)
        after = held_bytes(model, stored, x)
        assert after < 0.6 * before
        assert before - after == bill.before_bytes - bill.after_bytes


@pytest.mark.slow
def test_generated_code_stores_what_the_same_graphs_do() -> None:
    """Inductor fuses the casts: its gradients are those of the operators, rounded."""
    grads = {}
    for inner in ("aot_eager", "inductor"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model, x = Block(), torch.randn(4, 32, 64)
        run = cw.compile(model, "bf16-mixed", inner=inner, saves="int8")
        grads[inner] = step(model, run, x)[1]
        assert run.saves().num_packed >= 4
    assert relative_error(grads["inductor"], grads["aot_eager"]) < 0.02


def test_views_of_one_value_are_stored_once() -> None:
    """q, k and v are parts of one product: one storage, not three."""

    class Thrice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into = nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            y = self.into(x)
            return (y.view(-1) * y.t().reshape(-1)).sum() + (y.view(8, -1) ** 3).sum()

    torch.compiler.reset()
    model = Thrice()
    run = cw.compile(model, "32-true", inner="aot_eager", saves="bf16")
    run(torch.randn(64, 64)).backward()
    bill = run.saves()
    assert bill.num_packed == 1
    assert bill.before_bytes == 4 * 64 * 64


def test_dropout_is_drawn_once() -> None:
    """The mask of the forward is that of the backward."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model, x = Block(dropout=0.5), torch.randn(4, 32, 64)
    plain = copy.deepcopy(model)
    found = []
    for each, fmt in ((model, "fp16"), (plain, None)):
        run = cw.compile(each, "32-true", inner="aot_eager", saves=fmt)
        torch.manual_seed(7)
        found.append(step(each, run, x))
    assert torch.equal(found[0][0], found[1][0])
    assert relative_error(found[0][1], found[1][1]) < 1e-3


def test_batches_of_any_size_are_stored_by_one_graph() -> None:
    """Sizes are symbols there, and no new graph is made for a new one."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = Block()
    exact = copy.deepcopy(model).double()
    run = cw.compile(model, "32-true", inner="aot_eager", saves="fp16", dynamic=True)
    captured = []
    for rows in (4, 7, 3):
        x = torch.randn(rows, 32, 64)
        right, got = step(exact, exact, x.double()), step(model, run, x)
        assert relative_error(got[1], right[1]) < 1e-3
        captured.append(run.num_captured)
    assert captured[0] == captured[-1]
    assert run.saves().num_packed >= 4


def test_what_others_hold_anyway_is_left_alone() -> None:
    """Weights, inputs, what the model returns, statistics: each with its reason."""

    class Returns(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.into = nn.LayerNorm(64), nn.Linear(64, 64)

        def forward(self, x: Tensor) -> Tensor:
            return self.into(self.norm(x)).tanh()

    torch.compiler.reset()
    run = cw.compile(Returns(), "32-true", inner="aot_eager", saves="fp16")
    run(torch.randn(512, 64)).sum().backward()
    left = dict(run.saves().left_alone)
    assert left.pop("an output") == 1
    assert left.pop("a weight, buffer or input") >= 2
    assert left.pop("a statistic", 0) + left.pop("small", 0) >= 1
    assert not left


def test_what_the_backward_takes_the_exponential_of_keeps_its_digits() -> None:
    """A log-probability of -50 in 11 bits would be a probability off by 2 %."""

    class LossInside(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(64, 500)

        def forward(self, x: Tensor) -> Tensor:
            return F.cross_entropy(50 * self.head(x), torch.arange(len(x)))

    torch.manual_seed(0)
    model, x = LossInside(), torch.randn(64, 64)
    exact = copy.deepcopy(model).double()
    right = step(exact, exact, x.double())
    torch.compiler.reset()
    run = cw.compile(model, "32-true", inner="aot_eager", saves="bf16")
    assert relative_error(step(model, run, x)[1], right[1]) < 1e-5
    assert run.saves().left_alone["an exponent"] == 1


def test_numbers_beyond_fp16_are_kept() -> None:
    """Activations of a million do not overflow, and those of 1e-9 do not vanish."""
    for magnitude in (1e6, 1e-9):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
        model.append(nn.Softplus())

        class Scaled(nn.Module):
            def __init__(self, inside: nn.Module, by: float) -> None:
                super().__init__()
                self.inside, self.by = inside, by

            def forward(self, x: Tensor) -> Tensor:
                y = self.inside(x) * self.by
                return (y * y).sum() / self.by**2

        scaled = Scaled(model, magnitude)
        exact = copy.deepcopy(scaled).double()
        x = torch.randn(64, 64)
        right = step(exact, exact, x.double())
        run = cw.compile(scaled, "32-true", inner="aot_eager", saves="fp16")
        assert relative_error(step(scaled, run, x)[1], right[1]) < 1e-3
        assert run.saves().num_packed >= 2


@pytest.mark.slow
def test_formats_are_not_mixed_up_by_a_cache_of_generated_code() -> None:
    """The same graph is compiled again for another format."""
    found = []
    for fmt in ("bf16", "fp16", "bf16"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), None
        x = torch.randn(128, 64)
        exact = copy.deepcopy(model).double()
        run = cw.compile(model, "32-true", inner="inductor", saves=fmt)
        right = step(exact, exact, x.double())[1]
        found.append(relative_error(step(model, run, x)[1], right))
        assert run.saves().num_packed == 1
    assert found[1] < found[0] / 4
    assert found[0] == found[2]


def test_the_contract_holds_with_saves_in_another_format() -> None:
    """Casts of storage are no operators that compute in a format nobody promised."""
    torch.compiler.reset()
    model, x = Block(), torch.randn(4, 32, 64)
    run = cw.compile(model, "bf16-mixed", inner="aot_eager", saves="bf16")
    run(x).sum().backward()
    contract = run.prove(lambda: run(x).sum().backward())
    assert contract.holds, str(contract)


@pytest.mark.parametrize("inner", INNER)
def test_an_unknown_format_is_refused(inner: Inner) -> None:
    """At once, and by name."""
    with pytest.raises(SettingsError, match="fp16, bf16, int8, got 'fp8'"):
        cw.compile(nn.Linear(3, 3), inner=inner, saves="fp8")


def test_without_gradients_nothing_is_kept() -> None:
    """Inference has no backward to keep anything for."""
    torch.compiler.reset()
    run = cw.compile(Block(), "32-true", inner="aot_eager", saves="fp16")
    with torch.no_grad():
        run(torch.randn(4, 32, 64))
    assert isinstance(run, CompiledModel)
    assert run.saves().num_packed == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.filterwarnings("ignore")  # Inductor warns of what a machine lacks
def test_a_gpu_holds_half_between_forward_and_backward() -> None:
    """Counted by the allocator of CUDA, in generated kernels."""
    found = {}
    for fmt in (None, "fp16"):
        torch.compiler.reset()
        torch.manual_seed(0)
        model = nn.Sequential(*(Block(256) for _ in range(4))).cuda()
        exact, x = copy.deepcopy(model).double(), torch.randn(16, 128, 256).cuda()
        run = cw.compile(model, "32-true", inner="inductor", saves=fmt)
        got = step(model, run, x)[1]
        model.zero_grad()
        before = torch.cuda.memory_allocated()
        out = run(x)
        held = torch.cuda.memory_allocated() - before
        del out
        right = step(exact, exact, x.double())[1]
        found[fmt] = held, relative_error(got, right)
    assert found["fp16"][0] < 0.6 * found[None][0]
    assert found["fp16"][1] < 5e-4
