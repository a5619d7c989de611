from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from castwise.errors import LossScaleError, SettingsError
from castwise.loss_scale import (
    DynamicScale,
    LossScale,
    NonFinite,
    NoScale,
    StaticScale,
    loss_scale_of,
)

OVERFLOW = NonFinite(parameter="w", kind="inf")


def test_three_hundred_scripted_steps_give_the_numbers_of_grad_scaler() -> None:
    """Same defaults, same scale, same weights at every step, with infs thrown in."""
    script = random.Random(3)
    weights = [torch.nn.Parameter(torch.linspace(-1, 1, 63)) for _ in range(2)]
    optimizers = [torch.optim.SGD([w], lr=1e-2, momentum=0.9) for w in weights]
    theirs = torch.amp.GradScaler("cpu", growth_interval=7, growth_factor=1.7)
    ours = DynamicScale(interval=7, growth=1.7)
    num_skipped = 0
    for step in range(300):
        x = torch.full((63,), script.uniform(0.1, 2.0))
        bad = script.random() < 0.12
        losses = [(w * x).pow(2).sum() for w in weights]
        theirs.scale(losses[0]).backward()
        ours.scaled(losses[1]).backward()
        if bad:
            for w in weights:
                w.grad[step % 63] = math.inf if step % 2 else math.nan
        theirs.step(optimizers[0])
        theirs.update()
        finding = ours.unscale({"w": weights[1].grad})
        assert (finding is not None) == bad
        if finding is None:
            optimizers[1].step()
        ours.adjust(finding)
        num_skipped += bad
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert ours.scale == theirs.get_scale(), f"step {step}"
        assert torch.equal(weights[0], weights[1]), f"step {step}"
        mine, their_state = ours.state_dict(), theirs.state_dict()
        assert {name: mine[name] for name in their_state} == their_state
    assert 20 < num_skipped < 60


def test_the_defaults_are_those_of_grad_scaler() -> None:
    """2^16, times 2, times 0.5, every 2000 steps."""
    theirs = torch.amp.GradScaler("cpu").state_dict()
    ours = DynamicScale().state_dict()
    assert {name: ours[name] for name in theirs} == theirs
    assert ours["floor"] == 1.0


def test_a_state_of_grad_scaler_is_read() -> None:
    """A run that began with torch's scaler continues with ours."""
    theirs = torch.amp.GradScaler("cpu", init_scale=512.0, growth_interval=9)
    ours = DynamicScale()
    ours.load_state_dict(theirs.state_dict())
    assert ours.scale == 512.0
    assert ours.state_dict()["growth_interval"] == 9


def test_at_the_floor_it_stops_with_an_explanation() -> None:
    """It never reaches 0 by skipping for ever (pytorch#99640)."""
    scale = DynamicScale(initial=8.0)
    seen = []
    with pytest.raises(
        LossScaleError, match=r"floor 1 and the gradient of 'w' holds inf"
    ):
        for _ in range(170):
            seen.append(scale.scale)
            scale.adjust(OVERFLOW)
    assert seen == [8.0, 4.0, 2.0, 1.0]


def test_the_floor_and_the_ceiling_are_never_passed() -> None:
    """A factor that would jump over a bound ends on it."""
    scale = DynamicScale(initial=10.0, floor=3.0, ceiling=25.0, interval=1)
    scale.adjust(OVERFLOW)
    scale.adjust(OVERFLOW)
    assert scale.scale == 3.0
    for _ in range(9):
        scale.adjust(None)
    assert scale.scale == 25.0


def test_growth_stops_at_the_largest_fp32_number() -> None:
    """The scale stays finite however long the run is."""
    scale = DynamicScale(initial=2.0**126, interval=1)
    for _ in range(9):
        scale.adjust(None)
    assert math.isfinite(scale.scale)
    assert torch.full((), scale.scale).isfinite()


def test_hysteresis_takes_several_overflows_and_is_refilled_by_growth() -> None:
    """Two tokens: the first overflow is forgiven, and again only after a growth."""
    scale = DynamicScale(initial=64.0, hysteresis=2, interval=3)
    scales = []
    for finding in (OVERFLOW, OVERFLOW, OVERFLOW, None, None, None, OVERFLOW, OVERFLOW):
        scale.adjust(finding)
        scales.append(scale.scale)
    assert scales == [64, 32, 16, 16, 16, 32, 32, 16]


def test_a_long_row_of_skips_stops_a_run_without_a_scale() -> None:
    """bf16 has no scale to lower; skipping for ever is no answer there either."""
    for scale in (NoScale(patience=3), StaticScale(128.0, patience=3)):
        for finding in (OVERFLOW, OVERFLOW, None, OVERFLOW, OVERFLOW):
            scale.adjust(finding)
        with pytest.raises(LossScaleError, match="3 steps in a row were skipped"):
            scale.adjust(OVERFLOW)


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex64,
        torch.complex128,
    ],
)
@pytest.mark.parametrize("scale", [NoScale(), StaticScale(4.0)])
def test_gradients_of_every_format_are_divided_and_checked(
    scale: LossScale, dtype: torch.dtype
) -> None:
    """fp16 and complex too, where GradScaler raises; the first bad one is named."""
    gradients = {
        "empty": torch.ones(0, dtype=dtype),
        "fine": torch.full((63,), 8.0, dtype=dtype),
        "second": torch.full((1,), 8.0, dtype=dtype),
        "third": torch.full((3, 5), 8.0, dtype=dtype),
    }
    assert scale.unscale(gradients) is None
    assert gradients["fine"][62] == 8.0 / scale.scale
    gradients["second"][0] = -math.inf
    gradients["third"][1, 2] = math.nan
    assert scale.unscale(gradients) == NonFinite(parameter="second", kind="inf")
    del gradients["second"]
    assert scale.unscale(gradients) == NonFinite(parameter="third", kind="NaN")


def test_mixed_formats_are_divided_in_one_call() -> None:
    """Islands leave gradients of several formats; also conjugated and sparse ones."""
    dense = torch.full((5,), 8.0)
    gradients = {
        "low": dense.bfloat16(),
        "high": dense.double(),
        "turned": torch.complex(dense, dense).conj(),
        "strided": torch.full((4, 6), 8.0).t()[::2],
        "sparse": torch.sparse_coo_tensor(
            [[1, 1, 3]], dense[:3], (5,), check_invariants=True
        ),
    }
    assert StaticScale(4.0).unscale(gradients) is None
    assert gradients["low"].eq(2.0).all()
    assert gradients["high"].eq(2.0).all()
    assert gradients["turned"].resolve_conj().eq(2.0 - 2.0j).all()
    assert gradients["strided"].eq(2.0).all()
    assert gradients["sparse"].to_dense().tolist() == [0, 4.0, 0, 2.0, 0]
    gradients["sparse"]._values()[1] = math.nan
    assert NoScale().unscale(gradients) == NonFinite(parameter="sparse", kind="NaN")


def test_finite_gradients_are_never_mistaken_for_overflow() -> None:
    """The largest number of a format passes, though its square is infinite."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        gradients = {"w": torch.full((1000,), torch.finfo(dtype).max, dtype=dtype)}
        assert NoScale().unscale(gradients) is None
    assert NoScale().unscale({}) is None
    assert StaticScale(2.0).unscale({}) is None


def test_the_scale_enters_the_loss_in_fp32_and_as_a_tensor() -> None:
    """An fp16 loss of 4 times 65536 is finite, and gradients are exactly scaled."""
    w = torch.ones(3, requires_grad=True)
    loss = DynamicScale().scaled((4 * w.mean()).half())
    assert loss.dtype is torch.float32
    assert loss.item() == 4 * 2.0**16
    assert NoScale().scaled(loss) is loss


@pytest.mark.parametrize(
    "scale",
    [
        NoScale(patience=9),
        StaticScale(96.0),
        DynamicScale(
            initial=96.0,
            growth=1.5,
            backoff=0.25,
            interval=5,
            hysteresis=3,
            floor=2.0,
            ceiling=999.0,
        ),
    ],
)
def test_state_comes_back_exactly(scale: LossScale) -> None:
    """Every number off its default survives, and the future is the same."""
    scale.adjust(OVERFLOW)
    scale.adjust(None)
    fresh: LossScale = (
        type(scale)() if not isinstance(scale, StaticScale) else (StaticScale(1.0))
    )
    fresh.load_state_dict(scale.state_dict())
    assert fresh.state_dict() == scale.state_dict()
    for finding in (None, OVERFLOW, OVERFLOW, None, None, None, None, None, OVERFLOW):
        scale.adjust(finding)
        fresh.adjust(finding)
        assert fresh.state_dict() == scale.state_dict()


def test_the_state_of_another_kind_is_refused() -> None:
    """A checkpoint of a bf16 run does not load silently into an fp16 run."""
    with pytest.raises(LossScaleError, match="of kind 'none', but this run has"):
        DynamicScale().load_state_dict(NoScale().state_dict())
    with pytest.raises(LossScaleError, match="lacks growth_factor"):
        DynamicScale().load_state_dict({"scale": 3.0})


@pytest.mark.parametrize(
    "wrong",
    [
        {"growth": 1.0},
        {"backoff": 1.0},
        {"backoff": 0.0},
        {"interval": 0},
        {"hysteresis": 0},
        {"floor": 0.0},
        {"initial": 0.5},
        {"initial": math.inf},
        {"initial": math.nan},
        {"ceiling": 2.0},
    ],
)
def test_settings_that_cannot_be_honoured_are_refused(wrong: dict[str, Any]) -> None:
    """One sentence that names the setting."""
    with pytest.raises(SettingsError, match="needs to be"):
        DynamicScale(**wrong)


def test_the_words_of_a_policy_give_a_scale() -> None:
    """none, dynamic and static:<number>; anything else is refused."""
    assert isinstance(loss_scale_of("none"), NoScale)
    assert isinstance(loss_scale_of("dynamic"), DynamicScale)
    assert loss_scale_of("static:1024").scale == 1024.0
    for wrong in ("", "static", "static:many", "static:0", "Dynamic"):
        with pytest.raises(SettingsError):
            loss_scale_of(wrong)


@given(st.lists(st.booleans(), max_size=200), st.integers(1, 3), st.integers(1, 5))
def test_the_scale_stays_between_floor_and_ceiling(
    overflows: list[bool], hysteresis: int, interval: int
) -> None:
    """Whatever happens, the scale is in range or the run is told to stop."""
    scale = DynamicScale(
        initial=16.0, ceiling=1024.0, hysteresis=hysteresis, interval=interval
    )
    for overflow in overflows:
        before = scale.scale
        try:
            scale.adjust(OVERFLOW if overflow else None)
        except LossScaleError:
            assert before == 1.0
            break
        assert 1.0 <= scale.scale <= 1024.0
        assert scale.scale <= before if overflow else scale.scale >= before


@pytest.mark.gpu
def test_a_scale_on_a_device_is_never_waited_for() -> None:
    """Scaling a loss and changing the scale read nothing back from the device."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    weight = torch.ones(5, device="cuda", requires_grad=True)
    scale = DynamicScale(interval=1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            scale.scaled(weight.sum()).backward()
            scale.adjust(None)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert scale.scale == 2.0**20
