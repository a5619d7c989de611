"""PyTorch's own test cases of gradient scaling, run beside the scaler that they are of.

Each drives torch's scaler and ours through the same loop and compares every number.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from castwise.errors import LossScaleError
from castwise.integrations.grad_scaler import GradScaler, ScalerOrderError

DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.gpu))
Scaler = Any
Body = Callable[[list[Any], Scaler, list[nn.Module], list[torch.optim.Optimizer]], None]


@pytest.fixture(params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """Every device that there is."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return str(request.param)


def make_models(device: str, num: int) -> list[nn.Module]:
    """Small models, equal whenever they are made."""
    torch.manual_seed(4)
    return [
        nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).to(device) for _ in range(num)
    ]


def make_data(device: str) -> list[Any]:
    """Four batches with their targets."""
    lot = torch.Generator().manual_seed(5)
    return [
        [torch.randn(8, 8, generator=lot).to(device) for _ in range(2)]
        for _ in range(4)
    ]


def compare(
    device: str,
    body: Body,
    *,
    num: int = 1,
    optimizer: Callable[..., torch.optim.Optimizer] = torch.optim.SGD,
    **settings: Any,
) -> tuple[float, float]:
    """Run a loop under both scalers; weights, scales and states must be equal."""
    settings = {"init_scale": 128.0, "growth_interval": 1} | settings
    ends = []
    for kind in (torch.amp.GradScaler, GradScaler):
        models = make_models(device, num)
        optimizers = [optimizer(model.parameters(), lr=0.1) for model in models]
        scaler = kind(device, **settings)
        body(make_data(device), scaler, models, optimizers)
        ends.append((models, scaler))
    (theirs, their_scaler), (ours, our_scaler) = ends
    for left, right in zip(theirs, ours, strict=True):
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert our_scaler.get_scale() == their_scaler.get_scale()
    assert our_scaler.state_dict() == their_scaler.state_dict()
    return settings["init_scale"], our_scaler.get_scale()


def poison(model: nn.Module, value: float = math.inf) -> None:
    """Make one gradient not finite."""
    weight = next(iter(model.parameters()))
    assert weight.grad is not None
    weight.grad[2, 3] = value


mse = nn.functional.mse_loss


def test_a_plain_loop_with_one_skipped_step(device: str) -> None:
    """The third batch overflows: its step is skipped and the scale halved."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for number, (x, y) in enumerate(data):
            optimizers[0].zero_grad()
            scaler.scale(mse(models[0](x), y)).backward()
            if number == 2:
                poison(models[0])
            scaler.step(optimizers[0])
            scaler.update()

    assert compare(device, body) == (128.0, 128.0 * 2 * 2 / 2 * 2)


@pytest.mark.parametrize("fused", [False, True])
def test_adam_fused_or_not(device: str, *, fused: bool) -> None:
    """Torch hands its scale to fused optimizers; ours divides before, to the same."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for number, (x, y) in enumerate(data * 3):
            optimizers[0].zero_grad()
            scaler.scale(mse(models[0](x), y)).backward()
            if number in {2, 7}:
                poison(models[0], math.nan)
            scaler.step(optimizers[0])
            scaler.update()

    compare(
        device,
        body,
        optimizer=lambda weights, lr: torch.optim.Adam(weights, lr=lr, fused=fused),
    )


def test_clipping_after_unscale(device: str) -> None:
    """The norm that is clipped is that of the gradients themselves."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for number, (x, y) in enumerate(data):
            optimizers[0].zero_grad()
            scaler.scale(mse(models[0](x), y)).backward()
            if number == 1:
                poison(models[0])
            scaler.unscale_(optimizers[0])
            nn.utils.clip_grad_norm_(models[0].parameters(), 0.2)
            scaler.step(optimizers[0])
            scaler.update()

    compare(device, body)


def test_a_gradient_penalty(device: str) -> None:
    """Gradients that are part of the loss are unscaled by hand."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for x, y in data:
            optimizers[0].zero_grad()
            loss = mse(models[0](x), y)
            weights = tuple(models[0].parameters())
            grads = torch.autograd.grad(scaler.scale(loss), weights, create_graph=True)
            inverse = 1.0 / scaler.get_scale()
            norm = sum((g * inverse).pow(2).sum() for g in grads).sqrt()
            scaler.scale(loss + norm).backward()
            scaler.step(optimizers[0])
            scaler.update()

    compare(device, body)


def test_accumulation_over_batches(device: str) -> None:
    """One update for two backwards, both at the same scale."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for number, (x, y) in enumerate(data):
            scaler.scale(mse(models[0](x), y) / 2).backward()
            if number % 2:
                scaler.step(optimizers[0])
                scaler.update()
                optimizers[0].zero_grad()

    compare(device, body)


def test_several_models_losses_and_optimizers(device: str) -> None:
    """One optimizer skips, the other steps; the scale hears of both."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for number, (x, y) in enumerate(data):
            for optimizer in optimizers:
                optimizer.zero_grad()
            outputs = [model(x) for model in models]
            first = mse(0.7 * outputs[0] + 0.3 * outputs[1], y)
            second = mse(0.6 * outputs[0] - 0.4 * outputs[1], y)
            scaler.scale(first).backward(retain_graph=True)
            scaler.scale(second).backward()
            if number == 2:
                poison(models[0])
            scaler.unscale_(optimizers[0])
            for optimizer in optimizers:
                scaler.step(optimizer)
            scaler.update()

    assert compare(device, body, num=2) == (128.0, 512.0)


def test_a_new_scale_is_taken_as_a_number_or_a_tensor(device: str) -> None:
    """And the count of good updates goes on, as in torch."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for number, (x, y) in enumerate(data):
            optimizers[0].zero_grad()
            scaler.scale(mse(models[0](x), y)).backward()
            scaler.step(optimizers[0])
            new = (None, 3.0, torch.tensor(48.0, device=device), None)[number]
            scaler.update(new)

    compare(device, body, growth_interval=2)


def test_factors_can_be_read_and_set(device: str) -> None:
    """The getters and setters of torch, with the same effect on the numbers."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        scaler.set_growth_factor(3.0)
        scaler.set_backoff_factor(0.25)
        scaler.set_growth_interval(2)
        assert scaler.get_growth_factor() == 3.0
        assert scaler.get_backoff_factor() == 0.25
        assert scaler.get_growth_interval() == 2
        for number, (x, y) in enumerate(data * 2):
            optimizers[0].zero_grad()
            scaler.scale(mse(models[0](x), y)).backward()
            if number == 4:
                poison(models[0])
            scaler.step(optimizers[0])
            scaler.update()

    compare(device, body)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("place", ["dense", "strided", "0-dim", "bf16", "none"])
def test_infinities_are_found_wherever_they_stand(
    device: str, value: float, place: str
) -> None:
    """One bad number among gradients of several layouts and formats."""
    weights = {
        "dense": nn.Parameter(torch.ones(64, 7, device=device)),
        "strided": nn.Parameter(torch.ones(6, 5, device=device)),
        "0-dim": nn.Parameter(torch.ones((), device=device)),
        "bf16": nn.Parameter(torch.ones(9, device=device, dtype=torch.bfloat16)),
    }
    optimizer = torch.optim.SGD(list(weights.items()), lr=1.0)
    scaler = GradScaler(device, init_scale=4.0)
    for name, weight in weights.items():
        gradient = torch.full_like(weight.detach(), 8.0)
        weight.grad = gradient.mT.clone().mT if name == "strided" else gradient
    if place != "none":
        gradient = weights[place].grad
        assert gradient is not None
        gradient[(-1,) * gradient.dim()] = value
    scaler.step(optimizer)
    scaler.update()
    stepped = all(bool((w == -1.0).all()) for w in weights.values())
    assert stepped is (place == "none")
    assert scaler.get_scale() == (4.0 if place == "none" else 2.0)
    if place != "none":
        assert scaler.last_finding is not None
        assert scaler.last_finding.parameter == place


@pytest.mark.parametrize("dtype", [torch.float16, torch.complex64])
def test_gradients_that_torch_refuses_are_unscaled(
    device: str, dtype: torch.dtype
) -> None:
    """Torch raises for fp16, and on a CPU for complex ones."""
    weight = nn.Parameter(torch.ones(5, device=device, dtype=dtype))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = GradScaler(device, init_scale=16.0)
    scaler.scale((weight * weight.conj()).real.sum().float()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert bool((weight == -1.0).all())


def test_sparse_gradients_are_unscaled_like_torch_does(device: str) -> None:
    """Entries of one place add up, and one that is not finite is found."""
    scaler = GradScaler(device, init_scale=4.0)
    weight = nn.Parameter(torch.zeros(6, 2, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    index = torch.tensor([[1, 1, 4]], device=device)
    values = torch.full((3, 2), 4.0, device=device)
    weight.grad = torch.sparse_coo_tensor(index, values, (6, 2), check_invariants=True)
    scaler.step(optimizer)
    assert weight[:, 0].tolist() == [0, -2, 0, 0, -1, 0]
    scaler.update()
    bad = values.clone()
    bad[1, 1] = math.inf
    weight.grad = torch.sparse_coo_tensor(index, bad, (6, 2), check_invariants=True)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0


def test_states_go_to_torch_and_back(device: str) -> None:
    """The same five numbers, in either direction, and nothing when disabled."""
    theirs = torch.amp.GradScaler(device, init_scale=3.0, growth_interval=7)
    ours = GradScaler(device)
    ours.load_state_dict(theirs.state_dict())
    assert ours.state_dict() == theirs.state_dict()
    back = torch.amp.GradScaler(device)
    back.load_state_dict(ours.state_dict())
    assert back.get_scale() == 3.0
    assert GradScaler(device).state_dict() == torch.amp.GradScaler(device).state_dict()
    off = GradScaler(device, enabled=False)
    assert off.state_dict() == {}
    off.load_state_dict({"scale": 2.0})
    with pytest.raises(ScalerOrderError, match="state is empty"):
        ours.load_state_dict({})
    assert pickle.loads(pickle.dumps(ours)).state_dict() == ours.state_dict()  # noqa: S301 -- our own bytes


def test_a_disabled_scaler_is_not_there(device: str) -> None:
    """Losses, steps and closures pass through."""

    def body(data: list[Any], scaler: Scaler, models: Any, optimizers: Any) -> None:
        for x, y in data:
            optimizers[0].zero_grad()
            loss = mse(models[0](x), y)
            assert scaler.scale(loss) is loss
            loss.backward()
            scaler.unscale_(optimizers[0])
            scaler.step(optimizers[0])
            scaler.update()

    compare(device, body, enabled=False)


def test_outputs_of_any_nesting_are_scaled(device: str) -> None:
    """Lists and tuples keep their type, other iterables are mapped."""
    scaler = GradScaler(device, init_scale=2.0)
    one = torch.ones(1, device=device)
    scaled = scaler.scale([one, (one, [one])])
    assert isinstance(scaled[1], tuple)
    assert scaled[1][1][0].item() == 2.0
    assert [each.item() for each in scaler.scale(each for each in (one, one))] == [2, 2]
    with pytest.raises(ScalerOrderError, match="tensor or an iterable"):
        scaler.scale(3.0)


def _ready(device: str) -> tuple[GradScaler, torch.optim.Optimizer]:
    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = GradScaler(device, init_scale=4.0)
    scaler.scale(weight.sum()).backward()
    return scaler, optimizer


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        (("unscale_", "unscale_"), "unscale_ was already called"),
        (("step", "unscale_"), "step was already called"),
        (("step", "step"), "step\\(\\) was already called"),
        (("update",), "no gradient was checked"),
        (("closure",), "closure"),
        (("zero", "step"), "holds no gradient"),
    ],
)
def test_the_order_that_torch_asks_for_is_asked_for(
    device: str, calls: Sequence[str], message: str
) -> None:
    """As a RuntimeError, which is what loops written for torch catch."""
    scaler, optimizer = _ready(device)
    does: dict[str, Callable[[], Any]] = {
        "unscale_": lambda: scaler.unscale_(optimizer),
        "step": lambda: scaler.step(optimizer),
        "update": scaler.update,
        "zero": optimizer.zero_grad,
        "closure": lambda: scaler.step(optimizer, closure=lambda: 0.0),
    }
    for call in calls[:-1]:
        does[call]()
    with pytest.raises(RuntimeError, match=message):
        does[calls[-1]]()


def test_what_step_returns_is_returned(device: str) -> None:
    """And nothing where the step was skipped."""

    class Telling(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            return "stepped"

    weight = nn.Parameter(torch.ones(3, device=device))
    optimizer, scaler = Telling([weight], lr=1.0), GradScaler(device)
    for bad in (False, True):
        optimizer.zero_grad()
        scaler.scale(weight.sum() * (math.inf if bad else 1.0)).backward()
        assert scaler.step(optimizer) == (None if bad else "stepped")
        scaler.update()


def test_at_the_floor_it_stops_where_torch_goes_on_to_nothing(device: str) -> None:
    """Torch's scale is 0 after 170 bad updates; ours explains itself at 1."""
    scaler, optimizer = _ready(device)
    with pytest.raises(LossScaleError, match="floor 1 and the gradient of"):
        for _ in range(170):
            weight = optimizer.param_groups[0]["params"][0]
            weight.grad = torch.full_like(weight, math.inf)
            scaler.step(optimizer)
            scaler.update()
    assert scaler.get_scale() == 1.0


@pytest.mark.gpu
def test_a_change_of_scale_never_waits_for_the_device() -> None:
    """Scaling a loss and updating the scale read nothing back; the check reads once."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight = nn.Parameter(torch.ones(3, device="cuda"))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = GradScaler("cuda", growth_interval=1)
    for _ in range(3):
        optimizer.zero_grad()
        torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.scale(weight.sum()).backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        scaler.step(optimizer)
        torch.cuda.set_sync_debug_mode("error")
        try:
            scaler.update()
            assert scaler.get_scale() > 1.0
        finally:
            torch.cuda.set_sync_debug_mode("default")
