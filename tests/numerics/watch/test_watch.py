"""What a watch counts, when, and that nothing changes by being watched."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.errors import SettingsError
from castwise.numerics.watch import WatchSchedule, watch
from castwise.numerics.watch.exponents import ExponentHistogram
from castwise.numerics.watch.machine_counter import MachineCounter
from castwise.numerics.watch.samples import SAMPLE, Counter, LostUpdates, Places
from castwise.numerics.watch.windows import WatchWindow
from two_ranks import TwoRanks

FORMATS = ("bf16", "fp16")


def small_model() -> nn.Sequential:
    """Odd sizes, a norm, dropout."""
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(7, 11), nn.LayerNorm(11), nn.Dropout(0.2), nn.Linear(11, 3)
    )


def batch(step: int, rows: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    """A function of the step."""
    chance = torch.Generator().manual_seed(step)
    return torch.randn(rows, 7, generator=chance), torch.randn(
        rows, 3, generator=chance
    )


def train(run: Any, num_steps: int, first: int = 0) -> None:
    """Plain steps with a squared error."""
    for step in range(first, first + num_steps):
        x, y = batch(step)
        with run.step() as open_step:
            open_step.backward(functional.mse_loss(run.model(x), y))


def prepared(policy: str = "bf16-mixed", lr: float = 1e-2) -> Any:
    """A run of a small model."""
    model = small_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    return cw.prepare(model, optimizer, cw.preset(policy))


def test_a_window_holds_weights_gradients_outputs_and_their_gradients() -> None:
    """Small tensors are counted whole, and as they really are."""
    run = prepared()
    with watch(run, schedule=WatchSchedule(every=2)) as watching:
        with run.step() as step:
            x, y = batch(0)
            weight = run.model[0].weight.detach().clone()
            step.backward(functional.mse_loss(run.model(x), y))
            gradient = run.model[0].weight.grad.clone()
        train(run, 1, first=1)
    (window,) = watching.windows
    found = {(each.kind, each.name): each for each in window.tensors}
    assert found["weight", "0.weight"].histogram == ExponentHistogram.of(weight)
    assert found["gradient", "0.weight"].histogram == ExponentHistogram.of(gradient)
    assert found["output", "0"].format == "bf16"
    assert found["output", "0"].num_elements == 55
    assert found["output", "1"].histogram.total == 55
    assert found["output_gradient", "3"].histogram.total == 15
    assert ("output", "") in found


def test_watched_steps_and_others_compute_the_same_bits() -> None:
    """Dropout draws the same numbers; weights and moments are equal at the end."""
    runs = prepared(), prepared()
    torch.manual_seed(5)
    train(runs[0], 4)
    torch.manual_seed(5)
    with watch(runs[1], schedule=WatchSchedule(every=2)):
        train(runs[1], 4)
    for one, other in zip(
        runs[0].model.parameters(), runs[1].model.parameters(), strict=True
    ):
        assert torch.equal(one, other)


def test_windows_follow_the_schedule_and_hooks_go() -> None:
    """Steps 3, 4, 8, 9, with two steps in a window; in between nothing is hooked."""
    run = prepared()
    schedule = WatchSchedule(every=5, samples=2, first=3)
    told: list[WatchWindow] = []
    hooked = []
    with watch(run, schedule=schedule, on_window=told.append):
        for step in range(12):
            x, y = batch(step)
            with run.step() as open_step:
                loss = functional.mse_loss(run.model(x), y)
                hooked.append(len(run.model[0]._forward_hooks))
                open_step.backward(loss)
    assert [(w.first_step, w.last_step) for w in told] == [(3, 4), (8, 9)]
    assert [step for step, number in enumerate(hooked) if number] == [3, 4, 8, 9]
    assert told[0].of("weight")[0].histogram.total == 2 * 77
    assert not run.model[0]._forward_hooks
    assert run.watchers == []


@pytest.mark.parametrize(
    "values", [{"every": 0}, {"every": 2, "samples": 3}, {"first": -1}]
)
def test_a_schedule_that_cannot_be_is_refused(values: dict[str, int]) -> None:
    """Windows hold at least a step and do not overlap."""
    with pytest.raises(SettingsError, match="samples <= every"):
        WatchSchedule(**values)


def test_gradients_are_told_without_the_loss_scale() -> None:
    """The same numbers under a scale of 2^10 as under none."""
    plain, scaled = prepared("32-true"), prepared("32-true")
    scaled.loss_scale = cw.StaticScale(2.0**10)
    windows = []
    for run in (plain, scaled):
        torch.manual_seed(2)
        with watch(run, schedule=WatchSchedule()) as watching:
            train(run, 1)
        windows.append(watching.windows[0])
    assert windows[1].scale == 2.0**10
    for kind in ("gradient", "output_gradient"):
        assert windows[0].total(kind) == windows[1].total(kind)


def test_updates_that_round_to_nothing_are_counted() -> None:
    """Weights at 1 in bf16 cannot move by 1e-3; in fp32 all do, and what-if says so."""
    model = nn.Linear(7, 3, bias=False)
    lost = {}
    for dtype in (torch.bfloat16, torch.float32):
        model = nn.Linear(7, 3, bias=False).to(dtype)
        nn.init.ones_(model.weight)
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        with watch(model, optimizer=optimizer) as watching:
            x, y = batch(0)
            functional.mse_loss(model(x.to(dtype)), y.to(dtype)).backward()
            optimizer.step()
        lost[dtype] = watching.windows[0].of("weight")[0].lost
    assert lost[torch.bfloat16]["bf16"] == 1
    assert lost[torch.float32]["fp32"] == 0
    assert lost[torch.float32]["bf16"] == 1
    assert lost[torch.float32]["fp16"] == 0


def test_weights_whose_exact_value_is_held_elsewhere_lose_nothing() -> None:
    """Under a weight storage the bits of the parameter are only half of the truth."""
    run = prepared("bf16-true", lr=1e-4)
    assert run.held is not None
    with watch(run) as watching:
        train(run, 1)
    assert {each.format for each in watching.windows[0].of("weight")} == {"bf16"}
    assert {each.lost for each in watching.windows[0].of("weight")} == {None}
    assert watching.windows[0].lost_updates() is None


def test_a_skipped_step_is_counted_and_its_numbers_are_seen() -> None:
    """The step with an infinity has no update, and the watch goes on."""
    run = prepared("32-true")
    with watch(run, schedule=WatchSchedule(every=1)) as watching:
        with run.step() as step:
            x, y = batch(0)
            step.backward(functional.mse_loss(run.model(x), y) * torch.inf)
        train(run, 1, first=1)
    assert [w.num_skipped for w in watching.windows] == [1, 0]
    assert watching.windows[0].measures()["nonfinite"] > 0
    assert watching.windows[1].measures()["nonfinite"] == 0


def test_a_step_that_dies_leaves_no_hooks_behind() -> None:
    """The next one is watched as if nothing had been."""
    run = prepared()
    with watch(run, schedule=WatchSchedule(every=1)) as watching:
        with pytest.raises(ValueError, match="by the user"), run.step():
            run.model(batch(0)[0])
            raise ValueError("by the user")
        train(run, 1)
    (window,) = watching.windows
    assert window.of("output")[0].histogram.total == 15
    assert not run.model[0]._forward_hooks


class Vectorised(nn.Module):
    """Calls a module inside of vmap, where tensors have no memory of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Row by row."""
        return torch.vmap(self.inner)(x)


def test_what_runs_inside_of_vmap_is_left_alone() -> None:
    """Its outputs are not counted, and the step goes on; the weights are."""
    torch.manual_seed(0)
    model = Vectorised()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with watch(model, optimizer=optimizer) as watching:
        x, y = batch(0)
        functional.mse_loss(model(x), y).backward()
        optimizer.step()
    (window,) = watching.windows
    assert [each.name for each in window.of("output")] == [""]
    assert window.total("weight").total == 24


def test_a_model_needs_its_optimizer() -> None:
    """Nobody else can say when a step is over."""
    with pytest.raises(SettingsError, match="optimizer"):
        watch(small_model())


def test_a_large_tensor_is_sampled_without_global_random_numbers() -> None:
    """Eight neighbours in each of 256 stretches; structure of a stride is not hit."""
    before = torch.get_rng_state()
    places = Places(torch.device("cpu"))
    tensor = torch.arange(100_003)
    first = places.sample(tensor)
    assert torch.equal(first, places.sample(tensor))
    places.renew()
    assert not torch.equal(first, places.sample(tensor))
    assert len(first) == SAMPLE
    assert bool((first.diff() > 0).all())
    assert bool((first.view(-1, 8).diff() == 1).all())
    striped = torch.arange(128 * SAMPLE) % 128 == 0  # a constant stride would see all
    share = float(places.sample(striped).float().mean())
    assert share == pytest.approx(1 / 128, abs=0.011)
    turned = torch.arange(100_003).view(1, -1).expand(3, -1).mT
    assert len(places.sample(turned)) == SAMPLE
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stretches", [1, 256, 300])
@pytest.mark.parametrize("size", [1, 63, SAMPLE, SAMPLE + 1, 100_003])
def test_machine_code_counts_as_operators_do(
    dtype: torch.dtype, size: int, stretches: int
) -> None:
    """The loop that reads memory, and the operators that other devices use."""
    torch.manual_seed(size)
    values = torch.randn(size) * torch.exp2(torch.randint(-40, 9, (size,)).float())
    odd = torch.tensor([0.0, -0.0, 1e-42, 3e-6, torch.inf, -torch.inf, torch.nan])
    values[: len(odd)] = odd[:size]
    tensor = values.to(dtype)
    places = Places(tensor.device, stretches=stretches)
    counter = Counter(2, tensor.device)
    counter.add(1, places.sample(tensor))
    counter.count()
    machine = MachineCounter(2, (), stretches=stretches)
    machine.renew(places.draws)
    assert machine.fits(tensor)
    machine.see(1, tensor)
    machine.count()
    assert torch.equal(counter.take(), torch.from_numpy(machine.take()[0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_machine_code_counts_lost_updates_as_operators_do(dtype: torch.dtype) -> None:
    """Three weights in odd rows, one of them sampled; one that is gone is not told."""
    torch.manual_seed(0)
    old = torch.randn(9001) * torch.exp2(torch.randint(-12, 9, (9001,)).float())
    new = old + 1e-3 * torch.randn(9001) * (torch.rand(9001) < 0.7)
    gradient = torch.randn(9001) * (torch.rand(9001) < 0.9)
    sizes, rows = [1000, 1, 7000, 1000], [4, 0, 2, 6]
    olds, news, gradients = (
        [part.clone() for part in each.to(dtype).split(sizes)]
        for each in (old, new, gradient)
    )
    places = Places(old.device)
    plain, quick = LostUpdates(8, FORMATS, old.device), MachineCounter(8, FORMATS)
    quick.renew(places.draws)
    named = zip("abcd", rows, olds, [r + 1 for r in rows], gradients, strict=True)
    quick.see_weights(list(named))
    quick.see_updates(dict(zip("abc", news, strict=False)))
    quick.count()
    samples = [[places.sample(e) for e in each] for each in (olds, news, gradients)]
    plain.count(rows[:3], *(each[:3] for each in samples))
    counts, lost = map(torch.from_numpy, quick.take())
    assert torch.equal(plain.take(), lost)
    assert int(lost[0].sum()) == sum(int((s != 0).sum()) for s in samples[2][:3])
    assert int(counts[2].sum()) == SAMPLE  # of 7,000
    assert int(counts[7].sum()) == 1000  # the gradient of the one that is gone


def test_tensors_in_any_order_of_memory_are_counted() -> None:
    """Channels last is read as it stands; a view with holes and fp64 by operators."""
    run = prepared("32-true")
    machine = MachineCounter(1, ())
    images = torch.randn(2, 3, 5, 7)
    assert machine.fits(images.contiguous(memory_format=torch.channels_last))
    assert machine.fits(images.permute(2, 0, 3, 1))
    assert machine.fits(images[:1].mT)
    assert not machine.fits(images[0, 0, 0, :1].expand(3))
    assert not machine.fits(images.unfold(-1, 3, 1))
    assert not machine.fits(images[..., ::2])
    assert not machine.fits(images.double())
    run.model[0].weight.data = torch.randn(7, 11).mT  # its gradient is contiguous
    with watch(run) as watching:
        train(run, 1)
    weight = watching.windows[0].of("weight")[0]
    assert weight.histogram.total == 77
    assert weight.lost is not None
    assert weight.lost["fp32"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_counter_counts_what_the_histogram_counts(dtype: torch.dtype) -> None:
    """By exponent field or by bin, zeros and what is not finite included."""
    torch.manual_seed(0)
    usual = torch.randn(1001).to(dtype) * 1e-3
    odd = torch.tensor([0.0, -0.0, 1e-42, torch.inf, -torch.inf, torch.nan, 3e38])
    counter = Counter(3, torch.device("cpu"))
    for _ in range(2):
        counter.add(2, usual)
        counter.add(0, odd.to(dtype))
        counter.count()
    bins = counter.take()
    for row, values in ((2, usual), (0, odd.to(dtype))):
        found = ExponentHistogram.from_bins(bins)[row]
        assert found == ExponentHistogram.of(torch.cat([values, values]))
    assert int(bins[1].sum()) == 0
    assert int(counter.take().sum()) == 0


def test_a_window_is_plain_data() -> None:
    """It comes back from its record and answers what it answered."""
    run = prepared()
    with watch(run) as watching:
        train(run, 1)
    window = watching.windows[0]
    again = WatchWindow.from_record(window.record())
    assert again == window
    assert again.measures() == window.measures()
    assert again.largest_scale("fp16") == window.largest_scale("fp16")


def scene(rank: int) -> dict[str, Any]:
    """Each rank has rows of its own; the gradients are not even summed."""
    run = prepared("32-true")
    with watch(run) as watching:
        x, y = batch(rank, rows=3 + rank)
        with run.step() as step:
            step.backward(functional.mse_loss(run.model(x), y))
    return watching.windows[0].record()


def test_windows_hold_the_counts_of_all_ranks(two_ranks: TwoRanks) -> None:
    """Both ranks hold the same window, and it is the sum of what each has seen."""
    zero, one = (WatchWindow.from_record(each) for each in two_ranks(scene))
    assert zero.num_ranks == 2
    assert zero.of("weight") == one.of("weight")
    output = next(each for each in zero.of("output") if each.name == "3")
    assert output.histogram.total == (3 + 4) * 3
    assert output.histogram == next(
        each.histogram for each in one.of("output") if each.name == "3"
    )
    assert zero.of("weight")[0].histogram.total == 2 * 77
