"""Unscaling, checking and clipping at once: the numbers of the float64 original."""

from __future__ import annotations

import math

import pytest
import torch

from castwise.errors import SettingsError
from castwise.optim.unscale_clip import unscale_and_clip

SHAPES = ((1,), (63, 5), (1000,), (2049,), (3, 4096))


def drawn(*formats: torch.dtype) -> list[torch.Tensor]:
    """Gradients of odd sizes, formats in turn."""
    draws = torch.Generator().manual_seed(5)
    return [
        torch.randn(shape, generator=draws).to(formats[at % len(formats)])
        for at, shape in enumerate(SHAPES)
    ]


def original(
    gradients: list[torch.Tensor], scale: float, max_norm: float
) -> tuple[list[torch.Tensor], float]:
    """The same in float64, as it is written in books."""
    wide = [each.double() / scale for each in gradients]
    norm = math.sqrt(sum(float(each.square().sum()) for each in wide))
    factor = min(1.0, max_norm / (norm + 1e-6))
    return [each * factor for each in wide], norm


@pytest.mark.parametrize("scale", [1.0, 3.0, 2.0**13])
@pytest.mark.parametrize("max_norm", [1e-3, 0.7, 1e6])
@pytest.mark.parametrize(
    "formats",
    [
        (torch.float32,),
        (torch.bfloat16,),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16, torch.float32),
    ],
)
def test_gradients_are_those_of_the_original(
    formats: tuple[torch.dtype, ...], max_norm: float, scale: float
) -> None:
    """By machine code and by operators, each rounded once to its own format."""
    gradients = drawn(*formats)
    wanted, norm = original(gradients, scale, max_norm)
    versions = [each._version for each in gradients]
    found = unscale_and_clip(gradients, scale=scale, max_norm=max_norm)
    assert found == pytest.approx(norm, rel=1e-6)
    for got, want in zip(gradients, wanted, strict=True):
        unit = torch.finfo(got.dtype)
        room = max(unit.eps, 2e-6)
        assert torch.allclose(got.double(), want, rtol=room, atol=unit.smallest_normal)
    if scale != 1.0:
        pairs = zip(gradients, versions, strict=True)
        assert all(each._version > before for each, before in pairs)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("fmt", [torch.float32, torch.bfloat16, torch.float16])
def test_one_number_that_is_not_finite_stops_everything(
    value: float, fmt: torch.dtype
) -> None:
    """In the first place, in the last one, and in one that no vector reaches."""
    for at, place in ((0, 0), (1, 314), (4, 4096), (4, 12287)):
        gradients = drawn(fmt)
        gradients[at].view(-1)[place] = value
        before = [each.clone() for each in gradients]
        assert not math.isfinite(unscale_and_clip(gradients, scale=8.0, max_norm=1.0))
        for got, want in zip(gradients, before, strict=True):
            assert torch.equal(got.nan_to_num(), want.nan_to_num())


def test_squares_that_overflow_are_no_infinities() -> None:
    """Gradients of 1e30 are finite, and so is their norm."""
    gradients = [torch.full((2049,), 1e30), torch.ones(3)]
    norm = unscale_and_clip(gradients, max_norm=1.0)
    assert norm == pytest.approx(1e30 * math.sqrt(2049), rel=1e-6)
    assert gradients[0].double().norm().item() == pytest.approx(1.0, rel=1e-5)


def test_what_needs_no_change_is_not_written() -> None:
    """No scale, and a norm within the limit: the same bits, and the same version."""
    gradients = drawn(torch.float32)
    before = [(each.clone(), each._version) for each in gradients]
    unscale_and_clip(gradients, max_norm=1e9)
    for got, (want, version) in zip(gradients, before, strict=True):
        assert torch.equal(got, want)
        assert got._version == version
    assert unscale_and_clip([]) == 0.0


@pytest.mark.parametrize("wrong", [{"scale": 0.0}, {"max_norm": -1.0}])
def test_a_limit_that_freezes_the_weights_is_refused(wrong: dict[str, float]) -> None:
    """Neither 0 nor below."""
    with pytest.raises(SettingsError, match="above 0; got"):
        unscale_and_clip(drawn(torch.float32), **wrong)
