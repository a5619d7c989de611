from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import castwise as cw
from castwise.autocast import uninstall
from castwise.errors import IslandError, UnsupportedFormatError
from castwise.fp8_products import FP8, is_rounded, rounded
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.policy.rules import Policy
from castwise.region import Region

BF16_MIXED = "p=fp32,c=bf16,o=bf16,r=fp32"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Model(nn.Module):
    """A low layer, a delicate block, a low layer; odd in every dimension."""

    def __init__(self, width: int = 33) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.block = nn.Sequential(
            nn.Linear(width, width), nn.LayerNorm(width), nn.Linear(width, width)
        )
        self.after = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Low, block, low."""
        y: torch.Tensor = self.after(self.block(self.before(x)))
        return y


def policy(precision: str = "c=fp8_e4m3", default: str = BF16_MIXED) -> Policy:
    """The block in fp8."""
    found = Policy(name="test").with_default(default)
    return found.with_rule(module="block", precision=precision)


def put(model: nn.Module, asked: Policy) -> tuple[AppliedPolicy, Region]:
    """Apply, and work out the region."""
    applied = apply_policy(model, asked.bind(module_facts(model)), "cpu")
    return applied, Region.of(asked, "full", (applied,))


@pytest.mark.parametrize("fmt", FP8)
@pytest.mark.parametrize("scale", [1.0, 3e-30, 2e20])
def test_rounding_keeps_the_largest_number_in_range(fmt: str, scale: float) -> None:
    """A power of two per tensor: nothing overflows, and digits are those of fp8."""
    x = torch.randn(37, 5) * scale
    y = rounded(x, fmt)
    step = {"fp8_e4m3": 2.0**-4, "fp8_e5m2": 2.0**-3}[fmt]
    large = x.abs() > x.abs().max() / 64
    error = ((y.double() - x.double()).abs() / x.double().abs())[large]
    assert float(error.max()) <= step
    assert float(error.max()) > step / 4
    assert is_rounded(y, fmt)
    assert not is_rounded(x, fmt)


def test_what_is_not_finite_stays_so() -> None:
    """Saturation must not hide an overflow that happened before."""
    x = torch.tensor([1.0, float("inf"), -float("inf"), float("nan"), 0.0])
    y = rounded(x, "fp8_e4m3")
    assert torch.equal(y.isfinite(), x.isfinite())
    assert float(y[1]) == float("inf")
    assert rounded(torch.empty(0), "fp8_e5m2").shape == (0,)
    assert torch.equal(rounded(torch.zeros(3), "fp8_e4m3").float(), torch.zeros(3))


def by_hand(
    x: torch.Tensor, layer: nn.Linear, gradient: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One fp8 product and its backward: output, gradients of input and weight."""
    a, w = rounded(x, "fp8_e4m3"), rounded(layer.weight, "fp8_e4m3")
    y = functional.linear(a, w, layer.bias.bfloat16())
    g = rounded(gradient, "fp8_e5m2")
    return y, g @ w, (g.mT @ a).float()


def test_products_multiply_rounded_operands_in_both_directions() -> None:
    """Forward in e4m3, gradients in e5m2, all else in bf16: written out by hand."""
    model = nn.Sequential(nn.Linear(33, 17))
    _, region = put(
        model,
        Policy(name="test")
        .with_default(BF16_MIXED)
        .with_rule(module="0", precision="c=fp8_e4m3"),
    )
    x = torch.randn(5, 33, dtype=torch.bfloat16, requires_grad=True)
    gradient = torch.randn(5, 17, dtype=torch.bfloat16)
    with region.entered("cpu"):
        y = model(x)
    found = torch.autograd.grad(y, [x, model[0].weight], gradient)
    want = by_hand(x.detach(), model[0], gradient)
    assert torch.equal(y, want[0])
    assert torch.equal(found[0], want[1])
    assert torch.equal(found[1], want[2])
    plain = functional.linear(x, model[0].weight.bfloat16(), model[0].bias.bfloat16())
    error = (y - plain).detach().float().norm() / plain.detach().float().norm()
    assert 1e-3 < float(error) < 6e-2


def test_a_whole_model_in_fp8_trains_and_says_that_it_is_emulated() -> None:
    """Run.precision, coverage and summary name the emulation and how it is done."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    asked = Policy(name="all-fp8").with_default("p=fp32,c=fp8_e4m3,o=bf16,r=fp32")
    run = cw.prepare(model, optimizer, asked)
    assert [d.value for d in run.precision.emulated] == ["fp8_e4m3"]
    assert "multiplied in bf16" in run.precision.emulated[0].because
    assert "emulation: fp8_e4m3 (emulated: " in run.precision.summary()
    assert "fp8_e4m3 (emulated in bf16)" in run.precision.islands
    assert run.precision.loss_scale.value == "none", "each tensor has its own scale"
    x, y = torch.randn(9, 33), torch.randn(9, 33)
    losses = []
    for _ in range(30):
        with run.step() as step:
            step.backward(functional.mse_loss(model(x), y))
        losses.append(step.outcome.loss)
    assert losses[-1] < 0.8 * losses[0]


def test_an_island_in_fp8_covers_what_is_inside_and_nothing_else() -> None:
    """The block's products are rounded; its neighbours' and an inner island's not."""
    model = Model()
    asked = Policy(name="test").with_default(BF16_MIXED)
    asked = asked.with_rule(module="block.2", precision="p=fp32,c=fp32")
    asked = asked.with_rule(module="block", precision="c=fp8_e4m3")
    applied, region = put(model, asked)
    assert applied.coverage() == (
        "1 module in fp8_e4m3 (emulated in bf16) inside bf16: block; "
        "1 module in fp32 inside bf16: block.2"
    )
    seen: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear):
            layer.register_forward_hook(
                lambda _m, given, out, name=name: seen.update({name: (given[0], out)})
            )
    with region.entered("cpu"):
        model(torch.randn(5, 33))

    def plain(name: str, dtype: torch.dtype) -> torch.Tensor:
        layer = model.get_submodule(name)
        x = seen[name][0].to(dtype)
        return functional.linear(x, layer.weight.to(dtype), layer.bias.to(dtype))

    assert torch.equal(seen["before"][1], plain("before", torch.bfloat16))
    assert torch.equal(seen["after"][1], plain("after", torch.bfloat16))
    assert torch.equal(seen["block.2"][1], plain("block.2", torch.float32).bfloat16())
    assert not torch.equal(seen["block.0"][1], plain("block.0", torch.bfloat16))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_modules_round_again(use_reentrant: bool) -> None:
    """Around the island and inside of it, by module."""

    class Recomputing(Model):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.before(x)
            for layer in self.block:
                y = checkpoint(layer, y, use_reentrant=use_reentrant)
            return self.after(y)

    gradients = []
    for kind in (Model, Recomputing):
        torch.manual_seed(0)
        model = kind()
        _, region = put(model, policy(default="p=fp32,c=fp8_e4m3,o=bf16,r=fp32"))
        x = torch.randn(5, 33, requires_grad=True)
        with region.entered("cpu"):
            loss = model(x).float().pow(2).mean()
        loss.backward()
        gradients.append([weight.grad for weight in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_an_output_in_fp8_is_rounded_and_held_in_bf16() -> None:
    """No tensor is computed with in fp8; its numbers are handed out."""
    model = Model()
    _, region = put(model, policy("c=bf16,o=fp8_e5m2"))
    outputs: list[torch.Tensor] = []
    model.block.register_forward_hook(lambda *given: outputs.append(given[2]))
    with region.entered("cpu"):
        model(torch.randn(5, 33)).float().sum().backward()
    assert outputs[0].dtype is torch.bfloat16
    assert is_rounded(outputs[0], "fp8_e5m2")
    assert model.block[0].weight.grad is not None


def test_weights_held_in_fp8_are_refused_with_a_remedy() -> None:
    """No update can be added to them."""
    with pytest.raises(IslandError, match=r"'block'.*write p=fp32,c=fp8_e4m3,o=bf16"):
        put(Model(), policy("fp8_e4m3"))


def test_emulation_may_be_refused() -> None:
    """By a key of the policy; the error names the rule's line and both remedies."""
    text = (
        "castwise: 1\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\nemulation: refused\n"
        "rules:\n  - module: block\n    precision: c=fp8_e4m3\n"
    )
    asked = Policy.parse(text, where="policy.yaml")
    assert Policy.parse(asked.to_yaml()).emulation == "refused"
    with pytest.raises(
        IslandError, match=r"'block'.*policy.yaml:5: rule .module block.*emulation: all"
    ):
        put(Model(), asked)
    model = Model()
    with pytest.raises(UnsupportedFormatError, match="fp8_e4m3 on cpu"):
        cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), asked)
    run = cw.prepare(
        model, torch.optim.SGD(model.parameters(), lr=0.1), asked, fallback="bf16"
    )
    assert run.precision.emulated == ()


def test_without_a_region_there_is_no_silent_bf16() -> None:
    """The kernels that emulate belong to a region; without them nothing runs."""
    uninstall()
    model = Model()
    put(model, policy())
    with pytest.raises(IslandError, match="none was entered on cpu"):
        model(torch.randn(5, 33))


def test_fused_attention_and_recurrent_layers_stay_in_bf16() -> None:
    """What is multiplied inside of them cannot be rounded from outside."""

    class Attention(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            heads = x.unsqueeze(1)
            return functional.scaled_dot_product_attention(heads, heads, heads)

    model = nn.Sequential(Attention())
    _, region = put(
        model, Policy(name="test").with_default("p=fp32,c=fp8_e4m3,o=bf16,r=fp32")
    )
    x = torch.randn(2, 5, 33, dtype=torch.bfloat16)
    with region.entered("cpu"):
        y = model(x)
    heads = x.unsqueeze(1)
    plain = functional.scaled_dot_product_attention(heads, heads, heads)
    assert torch.equal(y, plain)


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # asked for by Dynamo itself
def test_compiled_models_run_it_between_their_graphs() -> None:
    """Nothing in fp8 is captured, so no graph can hold another format."""
    torch.compiler.reset()
    model = Model()
    _, region = put(model, policy())
    compiled = torch.compile(model, backend="aot_eager")
    x = torch.randn(5, 33)
    found: list[Any] = []
    for each in (model, compiled, compiled):
        with region.entered("cpu"):
            loss = each(x).float().pow(2).mean()
        found.append(torch.autograd.grad(loss, list(model.parameters())))
    for eager, *others in zip(*found, strict=True):
        assert all(torch.equal(eager, other) for other in others)
    torch.compiler.reset()
