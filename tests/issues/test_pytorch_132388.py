"""pytorch#132388: custom_fwd fails for functions whose setup_context stands apart."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.amp import custom_bwd, custom_fwd
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.numerics.contract import contract
from tolerances import TOLERANCES
from upstream import note_unless

ROUNDINGS = TOLERANCES["bf16"].gamma(4)
"""Four products in a row round to bf16, under vmap in another order."""

seen: list[torch.dtype] = []


class Apart(torch.autograd.Function):
    """x @ w, with the context set up apart from the forward; undecorated."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        """The product."""
        seen.append(x.dtype)
        return x @ w

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], _output: Tensor) -> None:
        """Keep both factors."""
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Both derivatives."""
        x, w = ctx.saved_tensors
        seen.append(gradients[0].dtype)
        return gradients[0] @ w.mT, x.mT @ gradients[0]


class Together(torch.autograd.Function):
    """The same, with the context in the forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        """The product."""
        seen.append(x.dtype)
        ctx.save_for_backward(x, w)
        return x @ w

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """Both derivatives."""
        return Apart.backward(ctx, *gradients)


class Decorated(Apart):
    """As the documentation of PyTorch says it should be written."""

    forward = staticmethod(  # type: ignore[assignment]
        custom_fwd(Apart.forward, device_type="cpu", cast_inputs=torch.float32)
    )
    backward = staticmethod(custom_bwd(Apart.backward, device_type="cpu"))  # type: ignore[assignment]


class Product(nn.Module):
    """A module around a function."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        self.function = function
        self.weight = nn.Parameter(torch.randn(7, 7))

    def forward(self, x: Tensor) -> Tensor:
        """Apply it."""
        y: Tensor = self.function.apply(x, self.weight)
        return y


class Net(nn.Module):
    """The function between two products."""

    def __init__(self, function: type[torch.autograd.Function]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.enter = nn.Linear(5, 7)
        self.custom = Product(function)
        self.leave = nn.Linear(7, 3)
        self.recompute = False

    def forward(self, x: Tensor) -> Tensor:
        """Run, maybe with the function recomputed."""
        x = self.enter(x)
        if self.recompute:
            x = checkpoint(self.custom, x, use_reentrant=False)
        else:
            x = self.custom(x)
        y: Tensor = self.leave(x)
        return y


@pytest.fixture(autouse=True)
def _none_seen() -> None:
    seen.clear()


def test_the_documented_way_fails() -> None:
    """Without castwise: the decorators look for a context where an input stands."""
    try:
        x = torch.randn(3, 7, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            Decorated.apply(x, torch.randn(7, 7)).sum().backward()
    except AttributeError:
        fails = True
    else:
        fails = False
    note_unless(fails, "pytorch#132388")


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("function", [Apart, Together])
def test_an_island_gives_a_custom_function_its_format(
    function: type[torch.autograd.Function], *, recompute: bool
) -> None:
    """Forward and backward in fp32 inside bf16, with no decorator at all."""
    model = Net(function)
    model.recompute = recompute
    policy = cw.preset("bf16-mixed").with_rule(
        module="custom", precision="p=fp32,c=fp32,o=bf16"
    )
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    inputs: list[Tensor] = []
    model.custom.register_forward_hook(lambda _m, args, _o: inputs.append(args[0]))
    with run.step() as step:
        out = model(torch.randn(3, 5))
        out.retain_grad()
        step.backward(out.float().square().sum())
        gradient = model.custom.weight.grad
        assert gradient is not None
        assert out.grad is not None
        with torch.autocast("cpu", enabled=False):
            above = out.grad @ model.leave.weight.bfloat16()
            expected = inputs[0].float().mT @ above.float()
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-6)
    assert set(seen) == {torch.float32}
    assert len(seen) == (3 if recompute else 2)


@pytest.mark.parametrize("function", [Apart, Together])
def test_the_contract_of_a_custom_function_is_proved(
    function: type[torch.autograd.Function],
) -> None:
    """Both stages of it are seen, and every product of it is high."""
    policy = cw.preset("bf16-mixed").with_rule(
        module="custom", precision="p=fp32,c=fp32,o=bf16"
    )
    batches = [(torch.randn(3, 5), torch.randn(3, 3))]
    proof = contract(Net(function), batches, nn.functional.mse_loss, policy).check()
    share = proof.share_of("custom")
    assert (share.flops_low, share.flops_high) == (0, 3 * 2 * 3 * 7 * 7)


def test_a_function_set_up_apart_passes_through_transforms() -> None:
    """Vmap and grad of torch.func want that form of a function, in an island too."""
    model = Net(Apart)
    policy = cw.preset("bf16-mixed").with_rule(
        module="custom", precision="p=fp32,c=fp32,o=bf16"
    )
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    weights = dict(model.named_parameters())
    x = torch.randn(4, 5)

    def loss(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        out = torch.func.functional_call(model, weights, (x[None],))
        return out.float().square().sum()

    with run.region():
        each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
        one = [torch.func.grad(loss)(weights, row) for row in x]
    for name, value in each.items():
        expected = torch.stack([row[name] for row in one])
        scale = expected.detach().abs().max().item()
        torch.testing.assert_close(value, expected, rtol=0, atol=ROUNDINGS * scale)
    assert set(seen) == {torch.float32}
