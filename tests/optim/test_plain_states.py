from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from castwise.errors import WeightStorageError
from castwise.optim import (
    SGD,
    AdamW,
    Lion,
    SweepSettings,
    hold_weights,
    load_plain_state_dict,
    plain_state_dict,
)

EIGHT = SweepSettings(states="8bit", min_8bit_size=0, backend="twin")
TWIN = SweepSettings(backend="twin")


def model() -> nn.Sequential:
    """Odd sizes, on both sides of a block."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 83), nn.Tanh(), nn.Linear(83, 5))


def set_gradients(net: nn.Module, step: int) -> None:
    """Gradients that bf16 holds, the same for every format of the weights."""
    lot = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        gradient = torch.randn(parameter.shape, generator=lot).bfloat16()
        parameter.grad = gradient.to(parameter.dtype)


def advance(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    """Step on such gradients."""
    for step in steps:
        set_gradients(net, step)
        optimizer.step()


@pytest.mark.parametrize("storage", ["split", "master"])
@pytest.mark.parametrize("fused", [False, True])
def test_stock_torch_goes_on_where_split_weights_stopped(
    storage: str, *, fused: bool
) -> None:
    """Written as plain fp32 and read by torch alone, no bit of the run is lost."""
    net, whole = model(), model()
    optimizer = torch.optim.AdamW(net.parameters(), fused=fused)
    reference = torch.optim.AdamW(whole.parameters(), fused=fused)
    held = hold_weights(optimizer, storage)
    advance(net, optimizer, range(6))
    advance(whole, reference, range(12))

    written = copy.deepcopy((held.fp32_weights(net), plain_state_dict(optimizer)))
    stock = model()
    stock.load_state_dict(written[0])
    theirs = torch.optim.AdamW(stock.parameters(), fused=fused)
    theirs.load_state_dict(written[1])
    advance(stock, theirs, range(6, 12))
    for mine, other in zip(stock.parameters(), whole.parameters(), strict=True):
        assert mine.dtype == torch.float32
        assert torch.equal(mine, other)
    assert all(
        key in {"step", "exp_avg", "exp_avg_sq"}
        for state in written[1]["state"].values()
        for key in state
    )


def test_split_weights_go_on_where_stock_torch_stopped() -> None:
    """The other way: fp32 weights and states of torch, held from then on."""
    whole, stock, net = model(), model(), model()
    reference = torch.optim.Adam(whole.parameters(), amsgrad=True)
    theirs = torch.optim.Adam(stock.parameters(), amsgrad=True)
    advance(whole, reference, range(9))
    advance(stock, theirs, range(4))

    optimizer = torch.optim.Adam(net.parameters(), amsgrad=True)
    held = hold_weights(optimizer)
    held.load_fp32_weights(net, stock.state_dict())
    load_plain_state_dict(optimizer, theirs.state_dict())
    advance(net, optimizer, range(4, 9))
    exact = held.fp32_weights(net)
    assert all(torch.equal(exact[k], v) for k, v in whole.state_dict().items())


@pytest.mark.parametrize(
    ("ours", "theirs", "keywords"),
    [
        (AdamW, torch.optim.AdamW, {}),
        (SGD, torch.optim.SGD, {"momentum": 0.9}),
    ],
)
@pytest.mark.parametrize("settings", [TWIN, EIGHT], ids=["fp32", "8bit"])
def test_our_states_are_torchs_states(
    ours: Any, theirs: Any, keywords: dict[str, Any], settings: SweepSettings
) -> None:
    """Under torch's names, in torch's formats, and a step of torch agrees with ours."""
    net, stock = model(), model()
    optimizer = ours(net.parameters(), settings=settings, **keywords)
    advance(net, optimizer, range(3))
    other = theirs(stock.parameters(), **keywords)
    advance(stock, other, range(1))
    saved = copy.deepcopy(plain_state_dict(optimizer))
    names = set(other.state_dict()["state"][0])
    assert names <= set(saved["state"][0]) <= names | {"step"}
    stock.load_state_dict(net.state_dict())
    other.load_state_dict(saved)
    start = [parameter.detach().clone() for parameter in net.parameters()]
    advance(net, optimizer, range(3, 4))
    advance(stock, other, range(3, 4))
    moved = zip(net.parameters(), stock.parameters(), start, strict=True)
    for mine, their, before in moved:
        apart = (mine - their).abs().max()
        assert apart <= 1e-4 * (mine - before).abs().max()


@pytest.mark.parametrize("kind", [AdamW, Lion])
def test_states_go_to_fp32_and_back(kind: Any) -> None:
    """Coding what was decoded gives the same codes; scales differ by a rounding."""
    net, again = model(), model()
    optimizer = kind(net.parameters(), settings=EIGHT)
    advance(net, optimizer, range(3))
    other = kind(again.parameters(), settings=EIGHT)
    load_plain_state_dict(other, plain_state_dict(optimizer))
    for mine, theirs in zip(net.parameters(), again.parameters(), strict=True):
        for key, value in optimizer.state[mine].items():
            found = other.state[theirs][key]
            if key == "step" or not value.is_floating_point():
                assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), key
                assert torch.as_tensor(found).dtype == torch.as_tensor(value).dtype
            else:
                torch.testing.assert_close(found, value, rtol=2**-22, atol=0)


def test_states_of_another_kind_are_refused() -> None:
    """AdamW cannot begin with the momentum of SGD."""
    net, other = model(), model()
    sgd = torch.optim.SGD(other.parameters(), momentum=0.9)
    advance(other, sgd, range(1))
    with pytest.raises(WeightStorageError, match="needs the state exp_avg; got mom"):
        load_plain_state_dict(AdamW(net.parameters(), settings=TWIN), sgd.state_dict())
