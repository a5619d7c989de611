"""gpt-neox#1003: angles of rotary embeddings, computed in 16 bits, are wrong."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

import castwise as cw
from upstream import note_unless

NUM_POSITIONS, WIDTH = 2048, 32


class Rotary(nn.Module):
    """The table of cosines, as GPT-NeoX computed it: from a buffer, by einsum."""

    inv_freq: Tensor

    def __init__(self) -> None:
        super().__init__()
        powers = torch.arange(0, WIDTH, 2).float() / WIDTH
        self.register_buffer("inv_freq", 1.0 / 10000**powers)

    def forward(self, x: Tensor) -> Tensor:
        """One row of cosines for each position."""
        positions = torch.arange(x.shape[0]).type_as(self.inv_freq)
        cosines: Tensor = torch.einsum("i,j->ij", positions, self.inv_freq).cos()
        return cosines


class Model(nn.Module):
    """A product and the cosines for its rows."""

    def __init__(self) -> None:
        super().__init__()
        self.product = nn.Linear(3, WIDTH // 2)
        self.rotary = Rotary()

    def forward(self, x: Tensor) -> Tensor:
        """Rotate, in the real part only."""
        y: Tensor = self.product(x) * self.rotary(x)
        return y


def exact() -> Tensor:
    """The cosines in float64."""
    rotary = Rotary().double()
    powers = torch.arange(0, WIDTH, 2, dtype=torch.float64) / WIDTH
    rotary.inv_freq = 10000**-powers
    return rotary(torch.empty(NUM_POSITIONS, 1))


def error(cosines: Tensor) -> float:
    """The largest error of a cosine."""
    return float((cosines.double() - exact()).abs().max())


def test_angles_keep_their_digits() -> None:
    """Rounded frequencies turn far positions by radians; ours are not rounded."""
    x = torch.randn(NUM_POSITIONS, 3)
    stock = copy.deepcopy(Model()).bfloat16()
    note_unless(error(stock.rotary(x)) > 1, "gpt-neox#1003")

    for name in ("bf16-true", "16-true", "bf16-mixed"):
        model = Model()
        policy = cw.preset(name).with_rule(
            type="Rotary", precision="c=fp32,o=fp32", because="angles need fp32"
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run = cw.prepare(model, optimizer, policy)
        assert torch.equal(model.rotary.inv_freq, Rotary().inv_freq)
        with run.inference():
            cosines = model.rotary(x)
        # an angle of up to 2048 is rounded to half a unit in its last place, twice
        assert error(cosines) < 3 * NUM_POSITIONS * 2.0**-24
        run.remove()


def test_the_buffer_alone_is_kept_without_a_rule() -> None:
    """A policy that narrows every weight leaves the frequencies as they are."""
    for name in ("bf16-true", "16-true"):
        model = Model()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cw.prepare(model, optimizer, cw.preset(name))
        assert model.product.weight.dtype is not torch.float32
        assert torch.equal(model.rotary.inv_freq, Rotary().inv_freq)
