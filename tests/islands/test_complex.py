from __future__ import annotations

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn
from torch.nn import functional

from castwise.autocast import autocast
from castwise.islands import apply_policy, module_facts
from castwise.numerics.contract import contract
from castwise.policy.rules import Policy

WIDE = {"fp32": torch.complex64, "fp64": torch.complex128}
REAL = {"fp32": torch.float32, "fp64": torch.float64}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Spectral(nn.Module):
    """Multiplies a spectrum by complex weights and mixes it by a complex matrix."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.filter = nn.Parameter(torch.randn(width // 2 + 1, dtype=torch.cfloat))
        self.mix = nn.Parameter(
            torch.randn(width // 2 + 1, width // 2 + 1, dtype=torch.cfloat) / 3
        )
        self.register_buffer("phase", torch.polar(torch.ones(5), torch.randn(5)))
        self.seen: list[torch.dtype] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Real in, real out."""
        spectrum = torch.fft.rfft(x)
        self.seen.append(spectrum.dtype)
        spectrum = (spectrum * self.filter * self.phase) @ self.mix
        return torch.fft.irfft(spectrum, n=x.shape[-1])


class Model(nn.Module):
    """A low layer on both sides of the spectral one."""

    def __init__(self, width: int = 9) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.spectral = Spectral(width)
        self.after = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Low, complex, low."""
        y: torch.Tensor = self.after(self.spectral(self.before(x)))
        return y


def policy(low: str, precision: str) -> Policy:
    """The spectral layer as an island."""
    found = Policy(name="test").with_default(f"p=fp32,c={low},o={low},r=fp32")
    return found.with_rule(module="spectral", precision=precision)


@pytest.mark.parametrize("low", ["bf16", "fp16"])
@pytest.mark.parametrize("fmt", ["fp32", "fp64"])
def test_a_complex_island_inside_low_surroundings(low: str, fmt: str) -> None:
    """complex64 or complex128 inside; values and gradients equal those by hand."""
    model = Model()
    plain = copy.deepcopy(model)
    asked = policy(low, f"p={fmt},c={fmt}")
    apply_policy(model, asked.bind(module_facts(model)), "cpu")
    assert model.spectral.filter.dtype is WIDE[fmt]
    assert model.spectral.phase.dtype is WIDE[fmt]
    x = torch.randn(4, 9)
    dtype = torch.bfloat16 if low == "bf16" else torch.float16
    with autocast("cpu", low):
        y = model(x)
        hidden = plain.before(x)
        with torch.autocast("cpu", enabled=False):
            wide = copy.deepcopy(plain.spectral)
            for tensor in (*wide.parameters(), *wide.buffers()):
                tensor.data = tensor.data.to(WIDE[fmt])
            inner = wide(hidden.to(REAL[fmt])).to(dtype)
        want = plain.after(inner)
    assert model.spectral.seen == [WIDE[fmt]]
    assert torch.equal(y, want)
    got = torch.autograd.grad(
        y.float().sum(), [model.before.weight, model.spectral.mix]
    )
    hand = torch.autograd.grad(want.float().sum(), [plain.before.weight, wide.mix])
    assert torch.equal(got[0], hand[0])
    assert torch.equal(got[1], hand[1])
    assert got[1].dtype is WIDE[fmt]


@pytest.mark.parametrize("default", ["bf16", "fp16"])
def test_complex_weights_survive_surroundings_in_which_there_are_none(
    default: str,
) -> None:
    """No complex bf16 exists: weights and buffers stay complex64, phases whole."""
    model = Model()
    state = copy.deepcopy(model.spectral.state_dict())
    asked = Policy(name="test").with_default(default)
    asked = asked.with_rule(module="spectral", precision=f"p={default},c=fp32")
    apply_policy(model, asked.bind(module_facts(model)), "cpu")
    assert model.before.weight.dtype is not torch.float32
    for name, value in model.spectral.state_dict().items():
        assert value.dtype is torch.complex64
        assert torch.equal(value, state[name])
    model(torch.randn(4, 9)).float().sum().backward()
    assert model.spectral.mix.grad.dtype is torch.complex64


def test_complex_values_may_cross_borders() -> None:
    """Handed from one island to another, they keep their digits and their gradient."""

    class Rotate(nn.Module):
        def forward(self, z: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
            assert z.dtype is torch.complex128
            return z * torch.exp(1j * w)

    model = nn.Sequential(OrderedDict(rotate=Rotate()))
    asked = Policy(name="test").with_default("p=fp32,c=bf16,o=bf16,r=fp32")
    asked = asked.with_rule(module="rotate", precision="c=fp64,o=fp32")
    apply_policy(model, asked.bind(module_facts(model)), "cpu")
    z = torch.randn(7, dtype=torch.cfloat, requires_grad=True)
    w = torch.randn(7, dtype=torch.bfloat16, requires_grad=True)
    with autocast("cpu", "bf16"):
        out = model.rotate(z, w)
    assert out.dtype is torch.complex64, "fp32 on the way out"
    out.abs().pow(2).sum().backward()
    torch.testing.assert_close(z.grad, 2 * z.detach())
    assert z.grad.dtype is torch.complex64
    assert w.grad.dtype is torch.bfloat16
    assert float(w.grad.abs().max()) < 1e-5, "a rotation does not change the norm"


@pytest.mark.parametrize("backward", [None, "fp64"])
def test_a_complex_island_is_proved_and_may_have_a_backward_of_its_own(
    backward: str | None,
) -> None:
    """The contract counts complex operators by the digits that they have."""
    asked = policy("bf16", "p=fp32,c=fp32")
    if backward is not None:
        rule = asked.with_rule(module="spectral", stage="backward", precision=backward)
        asked = Policy(
            name="test", default=rule.default, rules=(rule.rules[-1], *asked.rules)
        )
    proof = contract(
        Model(),
        [(torch.randn(4, 9), torch.randn(4, 9))],
        functional.mse_loss,
        asked,
    ).check()
    runs = proof.select(module="spectral", stage="backward")
    actual = {run.actual for run in runs if run.op != "cast" and run.num_flops}
    assert actual == {"complex128" if backward else "complex64"}
