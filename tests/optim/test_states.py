from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from castwise.optim import SGD, AdamW, Lion, SweepSettings
from castwise.optim import states as states_room
from castwise.optim.states import BLOCK, CODES, StateCode, num_blocks

EIGHT = SweepSettings(states="8bit", min_8bit_size=0)


class _LinearSquares(StateCode):
    """The negative control: evenly spaced codes for a moment that divides."""

    name = "quartic"  # in its place
    dtype = torch.uint8

    def encode_ratio(self, values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        inverse = torch.where(scale > 0, 1 / scale, 0.0)
        return (values * inverse * 255 + 0.5).to(torch.uint8)

    def decode_ratio(self, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return codes.float() * (scale / 255)


def _round_trip(code: StateCode, values: torch.Tensor) -> torch.Tensor:
    codes = torch.empty(values.shape, dtype=code.dtype)
    scales = torch.empty(num_blocks(len(values)))
    code.encode(values, codes, scales)
    return code.decode(codes, scales)


@pytest.mark.parametrize("size", [1, 63, 256, 1000])
def test_first_moments_come_back_within_half_a_code(size: int) -> None:
    """The root of the ratio is off by at most half of 1 / 127, signs are kept."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) ** 3
    back = _round_trip(CODES["signed_quadratic"], values)
    for block, told in zip(values.split(BLOCK), back.split(BLOCK), strict=True):
        scale = block.abs().max()
        root, root_back = (block / scale).abs().sqrt(), (told / scale).abs().sqrt()
        assert torch.all((root - root_back).abs() <= 0.5 / 127 + 1e-6)
        assert torch.all(block.sign() * told.sign() >= 0)


@pytest.mark.parametrize("size", [1, 63, 256, 1000])
def test_second_moments_come_back_within_half_a_code(size: int) -> None:
    """The fourth root of the ratio is off by at most half of 1 / 255."""
    values = torch.randn(size, generator=torch.Generator().manual_seed(size)) ** 6
    back = _round_trip(CODES["quartic"], values)
    for block, told in zip(values.split(BLOCK), back.split(BLOCK), strict=True):
        root, root_back = (block / block.max()) ** 0.25, (told / block.max()) ** 0.25
        assert torch.all((root - root_back).abs() <= 0.5 / 255 + 1e-6)


@pytest.mark.parametrize("name", CODES)
def test_coding_what_was_decoded_changes_nothing(name: str) -> None:
    """Every code is a fixed point, so that a save and a load cannot drift."""
    code = CODES[name]
    low = -127 if code.dtype == torch.int8 else 0
    codes = torch.arange(low, 128 if low else 256).to(code.dtype)
    for scale in (1.0, 3e-7, 1e30, torch.finfo(torch.float32).tiny):
        values = code.decode(codes, torch.tensor([scale]))
        again, scales = torch.empty_like(codes), torch.empty(1)
        code.encode(values, again, scales)
        exact = values if scale > 1e-30 else values * 0 + values  # subnormals may merge
        assert torch.equal(code.decode(again, scales), exact) or scale < 1e-30
        if scale > 1e-30:
            assert torch.equal(again, codes)


@pytest.mark.parametrize("name", CODES)
def test_blocks_of_zeros_and_of_almost_zeros_are_zeros(name: str) -> None:
    """No division by a scale of 0, nothing infinite from a subnormal one."""
    for value in (0.0, 1e-45, 1e-39):
        assert torch.equal(
            _round_trip(CODES[name], torch.full((300,), value)) * 0 + 0,
            torch.zeros(300),
        )


def test_a_second_moment_vanishes_later_than_the_first() -> None:
    """What the choice of codes is about: m is never left with nothing to divide it."""
    gradients = torch.logspace(-8, 0, 2001)
    gradients[-1] = 1.0
    vanished_m = _round_trip(CODES["signed_quadratic"], gradients[-255:]) == 0
    for start in range(0, 1745, 255):
        some = torch.cat([gradients[start : start + 255], torch.ones(1)])
        m = _round_trip(CODES["signed_quadratic"], some)
        v = _round_trip(CODES["quartic"], some**2)
        assert not torch.any((m != 0) & (v == 0))
        linear = _round_trip(_LinearSquares(), some**2)
        if start > 1000:
            assert torch.any((m != 0) & (linear == 0)), "the control must fail"
    assert not vanished_m[-1]


@pytest.mark.parametrize(
    ("kind", "keywords", "least"),
    [(AdamW, {}, 2.1), (SGD, {"momentum": 0.9}, 1.05), (Lion, {}, 1.05)],
)
def test_states_take_the_bytes_that_were_promised(
    kind: Any, keywords: dict[str, Any], least: float
) -> None:
    """At most 2.1 bytes a parameter for two moments, half for one."""
    parameter = torch.nn.Parameter(torch.randn(300, 341))
    optimizer = kind([parameter], settings=EIGHT, **keywords)
    tensors = [v for v in optimizer.state[parameter].values() if torch.is_tensor(v)]
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert size / parameter.numel() <= least


def _classify(make: Callable[[Any], torch.optim.Optimizer], seed: int) -> float:
    """Train a small network with embeddings, norms and rare features; its last loss.

    Rare rows of the embedding and the wide spread of gradient sizes inside a block are
    what a code of second moments has to bear.
    """
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Embedding(97, 24),
        torch.nn.Flatten(),
        torch.nn.Linear(24 * 6, 64),
        torch.nn.LayerNorm(64),
        torch.nn.GELU(),
        torch.nn.Linear(64, 97),
    )
    optimizer = make(model.parameters())
    lot = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(200):
        draws = torch.rand(64, 6, generator=lot) ** 4
        words = (draws * 97).long()
        answers = (words[:, 0] + words[:, 3]) % 97
        loss = torch.nn.functional.cross_entropy(model(words), answers)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        losses.append(loss.item())
    last = losses[-20:]
    return sum(last) / len(last)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_eight_bits_train_as_well_as_thirty_two(seed: int) -> None:
    """The loss of 8-bit AdamW is that of AdamW, and finite."""
    keywords: dict[str, Any] = {"lr": 4e-3, "betas": (0.9, 0.95)}
    exact = _classify(lambda p: AdamW(p, **keywords), seed)
    coded = _classify(lambda p: AdamW(p, settings=EIGHT, **keywords), seed)
    assert math.isfinite(coded)
    assert abs(coded - exact) < 0.01


def test_evenly_spaced_second_moments_diverge(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: the test above would notice a code that does not work."""
    broken = {**CODES, "quartic": _LinearSquares()}
    monkeypatch.setattr("castwise.optim.swept.CODES", broken)
    monkeypatch.setattr(states_room, "CODES", broken)
    settings = SweepSettings(states="8bit", min_8bit_size=0, backend="twin")
    keywords: dict[str, Any] = {"lr": 4e-3, "betas": (0.9, 0.95)}
    coded = _classify(lambda p: AdamW(p, settings=settings, **keywords), 0)
    assert not coded < 20.0


@pytest.mark.parametrize(("kind", "keywords"), [(SGD, {"momentum": 0.9}), (Lion, {})])
def test_momentum_in_eight_bits_trains_too(kind: Any, keywords: dict[str, Any]) -> None:
    """SGD and Lion lose nothing that matters either."""
    lr = 0.1 if kind is SGD else 1e-3
    exact = _classify(lambda p: kind(p, lr=lr, **keywords), 0)
    coded = _classify(lambda p: kind(p, lr=lr, settings=EIGHT, **keywords), 0)
    assert abs(coded - exact) < 0.01
