"""Transforms of torch.func through islands, inside a region and compiled or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, jvp, vmap

import castwise as cw
from tolerances import TOLERANCES

# forward mode compiles its decompositions with torch.jit when it is first used
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")

LOW = TOLERANCES["bf16"].gamma(6)
"""Products and what is between them round to bf16, under vmap in another order."""


class Net(nn.Module):
    """A delicate product between two others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, 17)
        self.delicate = nn.Linear(17, 17)
        self.leave = nn.Linear(17, 3)
        self.seen: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        """Run, and note what the island saw."""
        x = self.delicate(self.enter(x)).tanh()
        y: Tensor = self.leave(x)
        return y


@pytest.fixture
def run() -> Any:
    """The net with an fp32 island inside bf16."""
    model = Net()
    policy = cw.preset("bf16-mixed").with_rule(
        module="delicate", precision="p=fp32,c=fp32,o=bf16"
    )
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    with run.region():
        yield run
    run.remove()


def loss(model: nn.Module, weights: dict[str, Tensor], x: Tensor) -> Tensor:
    """Of weights that are given from outside."""
    return functional_call(model, weights, (x,)).float().square().sum()


def assert_near(found: Tensor, expected: Tensor, share: float = LOW) -> None:
    """Measured by the largest number of the tensor."""
    scale = expected.detach().abs().max().item()
    torch.testing.assert_close(found, expected, rtol=0, atol=share * scale)


def weights_of(run: Any) -> dict[str, Tensor]:
    """Detached, so that a transform alone differentiates."""
    return {name: each.detach() for name, each in run.model.named_parameters()}


def test_grad_is_what_backward_gives(run: Any) -> None:
    """Bit by bit: casts at a border are ordinary operators."""
    x = torch.randn(7, 5)
    found = grad(lambda weights: loss(run.model, weights, x))(weights_of(run))
    whole = loss(run.model, dict(run.model.named_parameters()), x)
    with torch.autocast("cpu", enabled=False):
        whole.backward()
    for name, weight in run.model.named_parameters():
        assert_near(found[name], weight.grad)
        assert found[name].dtype is weight.dtype


def test_vmap_gives_the_gradient_of_each_sample(run: Any) -> None:
    """As private training, or training that weighs its samples, needs them."""
    x, weights = torch.randn(7, 5), weights_of(run)

    def of_one(weights: dict[str, Tensor], row: Tensor) -> Tensor:
        return loss(run.model, weights, row[None])

    each = vmap(grad(of_one), (None, 0))(weights, x)
    for name in weights:
        assert_near(
            each[name], torch.stack([grad(of_one)(weights, r)[name] for r in x])
        )


def test_jvp_pushes_a_tangent_through(run: Any) -> None:
    """The tangent of the output is the Jacobian times that of the input."""
    x, tangent = torch.randn(7, 5), torch.randn(7, 5)

    def call(x: Tensor) -> Tensor:
        return functional_call(run.model, weights_of(run), (x,)).float()

    value, pushed = jvp(call, (x,), (tangent,))
    torch.testing.assert_close(value, call(x), rtol=0, atol=0)
    jacobian = jacrev(call)(x)  # 7 x 3 x 7 x 5
    expected = torch.einsum("abcd,cd->ab", jacobian.double(), tangent.double())
    assert_near(pushed, expected.float(), 2 * LOW)


def test_the_island_is_high_under_every_transform(run: Any) -> None:
    """Its product in fp32, seen below the transforms."""
    x, weights = torch.randn(7, 5), weights_of(run)
    seen: list[torch.dtype] = []
    run.model.delicate.register_forward_hook(lambda _m, _a, out: seen.append(out.dtype))
    inner: list[torch.dtype] = []
    original = nn.functional.linear

    def noting(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:  # noqa: A002 -- as torch calls it
        out = original(input, weight, bias)
        if weight.shape == (17, 17):
            inner.append(out.dtype)
        return out

    nn.functional.linear = noting
    try:
        vmap(grad(lambda w, r: loss(run.model, w, r[None])), (None, 0))(weights, x)
        jvp(lambda each: loss(run.model, weights, each), (x,), (x,))
    finally:
        nn.functional.linear = original
    assert inner == [torch.float32, torch.float32]
    assert seen == [torch.bfloat16, torch.bfloat16]
