from __future__ import annotations

import copy
import gc
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch

from castwise.errors import SettingsError, WeightStorageError
from castwise.optim import STORAGES, hold_weights
from castwise.optim import bites as bites_room
from castwise.optim.step_hooks import has_step_hooks, only_looks

SHAPES = ((7, 5), (13, 3), (1, 1), (3, 17))

SETTINGS: dict[str, list[dict[str, Any]]] = {
    "Adadelta": [{"lr": 1.0}, {"foreach": True, "weight_decay": 0.1}],
    "Adafactor": [{"lr": 1e-2}, {"foreach": True}],
    "Adagrad": [{"lr": 1e-2}, {"fused": True}, {"initial_accumulator_value": 0.1}],
    "Adam": [{"amsgrad": True}, {"fused": True}, {"foreach": True}],
    "AdamW": [{}, {"fused": True}, {"foreach": True}, {"maximize": True}],
    "Adamax": [{}, {"foreach": True}],
    "ASGD": [{}, {"foreach": True}],
    "LBFGS": [{"max_iter": 3}],
    "Muon": [{"lr": 1e-2}],
    "NAdam": [{"decoupled_weight_decay": True}, {"foreach": True}],
    "RAdam": [{}, {"foreach": True}],
    "RMSprop": [{"centered": True, "momentum": 0.9}, {"foreach": True}],
    "Rprop": [{}, {"foreach": True}],
    "SGD": [
        {"lr": 1e-3, "momentum": 0.9, "nesterov": True},
        {"lr": 1e-3, "fused": True, "momentum": 0.9},
        {"lr": 1e-3, "foreach": True},
    ],
}
"""Settings to try; an optimizer that torch adds later is tried with its defaults."""

EVERY_OPTIMIZER = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind)
    and issubclass(kind, torch.optim.Optimizer)
    and kind not in (torch.optim.Optimizer, torch.optim.SparseAdam)
)
EVERY_CASE = [
    pytest.param(name, settings, id=f"{name}-{'-'.join(settings) or 'defaults'}")
    for name in EVERY_OPTIMIZER
    for settings in SETTINGS.get(name, [{}])
]

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def _maker(name: str, settings: dict[str, Any]) -> Make:
    kind = getattr(torch.optim, name)
    return lambda parameters: kind(parameters, **settings)


def _parameters(seed: int = 0) -> list[torch.nn.Parameter]:
    lot = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=lot)) for s in SHAPES]


def _loss(parameters: list[torch.nn.Parameter], step: int) -> torch.Tensor:
    """Return a loss whose gradient in the weights' own bf16 view is the same for all.

    The fp32 run is shown its weights rounded as `split` rounds them; what differs
    between the runs can then only come from the update.
    """
    lot = torch.Generator().manual_seed(1000 + step)
    total = torch.zeros(())
    for parameter in parameters:
        seen = (
            parameter if parameter.dtype == torch.bfloat16 else _Seen.apply(parameter)
        )
        pull = torch.randn(parameter.shape, generator=lot).bfloat16()
        total = total + ((seen - pull) ** 2).float().sum()
    return total


class _Seen(torch.autograd.Function):
    """The bf16 view of an fp32 weight; its gradient comes back unrounded, as bf16."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor) -> torch.Tensor:
        del ctx
        bits = (weight.detach().view(torch.int32) + 0x8000) >> 16 << 16
        return bits.view(torch.float32).bfloat16()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        del ctx
        return gradient.float()


def _train_step(
    optimizer: torch.optim.Optimizer, parameters: list[torch.nn.Parameter], step: int
) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = _loss(parameters, step)
        loss.backward()
        return loss

    if isinstance(optimizer, torch.optim.LBFGS):
        optimizer.step(closure)  # type: ignore[arg-type]
    else:
        closure()
        optimizer.step()


def _named(parameters: list[torch.nn.Parameter]) -> torch.nn.ParameterList:
    return torch.nn.ParameterList(parameters)


def _assert_split_is_fp32(make: Make, num_steps: int, storage: str = "split") -> None:
    theirs, ours = _parameters(), _parameters()
    plain, optimizer = make(theirs), make(ours)
    held = hold_weights(optimizer, storage)
    for step in range(num_steps):
        _train_step(plain, theirs, step)
        _train_step(optimizer, ours, step)
        exact = held.fp32_weights(_named(ours))
        for place, parameter in enumerate(theirs):
            assert torch.equal(exact[str(place)], parameter.detach()), (step, place)
    assert all(parameter.dtype == torch.bfloat16 for parameter in ours)
    start = _parameters()
    assert any(not torch.equal(a, b) for a, b in zip(start, theirs, strict=True))


@pytest.mark.parametrize(("name", "settings"), EVERY_CASE)
def test_split_is_fp32_training_bit_by_bit(name: str, settings: dict[str, Any]) -> None:
    """Every optimizer of torch updates split weights exactly as it does fp32 ones."""
    _assert_split_is_fp32(_maker(name, settings), num_steps=100)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "settings"), EVERY_CASE)
def test_split_stays_fp32_for_a_thousand_steps(
    name: str, settings: dict[str, Any]
) -> None:
    """No difference creeps in later either."""
    _assert_split_is_fp32(_maker(name, settings), num_steps=1000)


def test_master_is_fp32_training_bit_by_bit() -> None:
    """The storage that everybody knows gives the same numbers."""
    _assert_split_is_fp32(_maker("AdamW", {}), 50, "master")


def test_an_unknown_optimizer_is_stepped_whole_and_exactly() -> None:
    """A third party's optimizer may couple parameters: it sees them all at once."""

    class Coupled(torch.optim.Optimizer):
        def __init__(self, parameters: list[torch.nn.Parameter]) -> None:
            super().__init__(parameters, {"lr": 0.01})
            self.num_calls = 0

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            del closure
            self.num_calls += 1
            every = [p for group in self.param_groups for p in group["params"]]
            size = torch.stack([p.grad.norm() for p in every]).norm()
            for parameter in every:
                parameter.sub_(0.01 * parameter.grad / size)

    _assert_split_is_fp32(Coupled, num_steps=50)
    optimizer = Coupled(_parameters())
    held = hold_weights(optimizer)
    assert "Coupled" in held.parameter_wise.because
    _train_step(optimizer, optimizer.param_groups[0]["params"], 0)
    assert optimizer.num_calls == 1


def test_parameters_are_stepped_in_bites_that_change_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However the parameters are cut into bites, the numbers are the same."""
    monkeypatch.setattr(bites_room, "_BITE", 40)
    _assert_split_is_fp32(_maker("AdamW", {"foreach": True}), num_steps=20)


def test_large_parameters_are_joined_and_split_as_small_ones_are() -> None:
    """Machine code does it for large ones, and an expanded layout by operators."""
    for weight in (torch.randn(331, 257), torch.randn(257, 331).T):
        theirs, ours = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight)
        plain, optimizer = torch.optim.RMSprop([theirs]), torch.optim.RMSprop([ours])
        held = hold_weights(optimizer)
        for step in range(3):
            _train_step(plain, [theirs], step)
            _train_step(optimizer, [ours], step)
        told = held.fp32_weights(torch.nn.ParameterList([ours]))["0"]
        assert torch.equal(told, theirs.detach())


def test_no_fp32_copy_outlives_a_step() -> None:
    """Split means 4 bytes per weight, not 4 and a hidden master."""
    parameter = torch.nn.Parameter(torch.randn(1013, 31))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    held = hold_weights(optimizer)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    gc.collect()
    fp32 = [
        thing
        for thing in gc.get_objects()
        if type(thing) in (torch.Tensor, torch.nn.Parameter)
        and thing.shape == parameter.shape
        and thing.dtype == torch.float32
    ]
    assert not fp32
    assert held.bytes_per_parameter() == 4.0


@pytest.mark.parametrize("name", [n for n in STORAGES if n != "plain"])
def test_small_updates_arrive_in_every_storage_but_plain(name: str) -> None:
    """A weight of 1.0 at a learning rate of 1e-4 moves to 0.99 in 100 steps."""
    parameter = torch.nn.Parameter(torch.ones(2001))
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    hold_weights(optimizer, name)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert abs(parameter.float().mean().item() - 0.99) < 2**-9


def test_plain_loses_small_updates_and_says_so_first() -> None:
    """Plain is refused with the reason, and does what the refusal says."""
    parameter = torch.nn.Parameter(torch.ones(11))
    optimizer = torch.optim.SGD([parameter], lr=1e-4)
    with pytest.raises(WeightStorageError, match="accept_lost_updates"):
        hold_weights(optimizer, "plain")
    hold_weights(optimizer, "plain", accept_lost_updates=True)
    for _ in range(100):
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    assert torch.equal(parameter.float(), torch.ones(11))


@pytest.mark.parametrize("name", ["split8", "kahan"])
def test_the_smaller_storages_stay_close_to_fp32(name: str) -> None:
    """Fewer bits than fp32 cost digits of the weight, not the training."""
    theirs, ours = _parameters(), _parameters()
    plain, optimizer = torch.optim.AdamW(theirs), torch.optim.AdamW(ours)
    held = hold_weights(optimizer, name)
    for step in range(200):
        _train_step(plain, theirs, step)
        _train_step(optimizer, ours, step)
    exact = held.fp32_weights(_named(ours))
    for place, parameter in enumerate(theirs):
        error = (exact[str(place)] - parameter).abs().max().item()
        assert error < 200 * 2**-17 * parameter.abs().max().item()


@pytest.mark.parametrize("name", STORAGES)
@pytest.mark.parametrize("fused", [False, True])
def test_a_resumed_run_continues_bit_by_bit(name: str, *, fused: bool) -> None:
    """Weights, what stands beside them, and states come back in their own formats."""
    ours = _parameters()
    optimizer = torch.optim.AdamW(ours, fused=fused)
    held = hold_weights(optimizer, name, accept_lost_updates=True)
    for step in range(5):
        _train_step(optimizer, ours, step)
    saved = copy.deepcopy((_named(ours).state_dict(), optimizer.state_dict()))

    again = _parameters(seed=1)
    resumed = torch.optim.AdamW(again, fused=fused)
    held_again = hold_weights(resumed, name, accept_lost_updates=True)
    resumed.load_state_dict(saved[1])
    _named(again).load_state_dict(saved[0])
    for step in range(5, 15):
        _train_step(optimizer, ours, step)
        _train_step(resumed, again, step)
    left, right = (
        held.fp32_weights(_named(ours)),
        held_again.fp32_weights(_named(again)),
    )
    assert all(torch.equal(left[key], right[key]) for key in left)
    for mine, theirs in zip(ours, again, strict=True):
        for key, value in optimizer.state[mine].items():
            assert resumed.state[theirs][key].dtype == value.dtype
            assert torch.equal(resumed.state[theirs][key], value)


def test_states_in_another_format_than_the_weight_come_back_as_they_were() -> None:
    """Torch casts states to the weight's bf16 on load (pytorch#43706); we do not."""
    ours = _parameters()
    optimizer = torch.optim.Adam(ours)
    hold_weights(optimizer)
    _train_step(optimizer, ours, 0)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(s["exp_avg"].dtype == torch.float32 for s in optimizer.state.values())


def test_weights_go_to_fp32_and_back_without_a_bit_lost() -> None:
    """The rest of the world reads and writes plain fp32 state dicts."""
    model = torch.nn.Linear(7, 3)
    start = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    held = hold_weights(optimizer)
    told = held.fp32_weights(model)
    assert all(torch.equal(told[key], start[key]) for key in start)
    other = {key: torch.randn_like(value) for key, value in start.items()}
    held.load_fp32_weights(model, other)
    told = held.fp32_weights(model)
    assert all(torch.equal(told[key], other[key]) for key in other)
    held.remove()
    assert all(torch.equal(model.state_dict()[key], other[key]) for key in other)


def test_removing_leaves_no_trace() -> None:
    """After remove() the optimizer trains fp32 weights with its own methods."""
    theirs, ours = _parameters(), _parameters()
    plain, optimizer = torch.optim.AdamW(theirs), torch.optim.AdamW(ours)
    before = set(optimizer.__dict__)
    held = hold_weights(optimizer)
    for step in range(4):
        _train_step(plain, theirs, step)
        _train_step(optimizer, ours, step)
    held.remove()
    assert set(optimizer.__dict__) == before
    for step in range(4, 8):
        _train_step(plain, theirs, step)
        _train_step(optimizer, ours, step)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True))


def test_a_weight_that_somebody_writes_is_the_weight() -> None:
    """A loaded model, a clamp under no_grad: neither is undone by what we stored."""
    for name in ("master", "split", "kahan"):
        parameter = torch.nn.Parameter(torch.randn(9))
        optimizer = torch.optim.SGD([parameter], lr=0.0)
        held = hold_weights(optimizer, name)
        with torch.no_grad():
            parameter.fill_(0.5)
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        told = held.fp32_weights(torch.nn.ParameterList([parameter]))["0"]
        assert torch.equal(told, torch.full((9,), 0.5)), name


def test_identities_groups_and_tied_weights_are_kept() -> None:
    """Parameters stay the objects they were; added groups are held; ties hold."""
    model = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    model[1].weight = model[0].weight
    before = [id(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW([model[0].weight], lr=0.1)
    hold_weights(optimizer)
    optimizer.add_param_group({"params": [model[0].bias, model[1].bias], "lr": 0.01})
    assert [id(p) for p in model.parameters()] == before
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    out = model(torch.randn(3, 5).bfloat16())
    out.float().square().sum().backward()
    optimizer.step()
    assert model[1].weight is model[0].weight
    assert len(optimizer.param_groups) == 2
    assert {g["lr"] for g in optimizer.param_groups} == {0.1, 0.01}


def test_schedulers_and_scalers_call_the_step_as_ever() -> None:
    """A learning-rate schedule sees its step calls; GradScaler unscales as ever."""
    parameter = torch.nn.Parameter(torch.ones(5))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    held = hold_weights(optimizer, grad_format="fp32")
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for _ in range(2):
        optimizer.zero_grad()
        scaler.scale(parameter.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
    told = held.fp32_weights(torch.nn.ParameterList([parameter]))["0"]
    assert torch.equal(told, torch.full((5,), -0.5))


def test_fp32_gradients_keep_what_bf16_accumulation_loses() -> None:
    """One large and many small contributions add up in fp32 and not in bf16."""
    results = {}
    for fmt in (None, "fp32"):
        parameter = torch.nn.Parameter(torch.zeros(3))
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        held = hold_weights(optimizer, grad_format=fmt)
        for _ in range(1024):
            (parameter.sum() * (1.0 + 2.0**-7)).backward()
        optimizer.step()
        told = held.fp32_weights(torch.nn.ParameterList([parameter]))["0"]
        results[fmt] = -told[0].item()
    assert results["fp32"] == 1032.0
    assert results[None] < 600.0


def test_gradients_released_in_the_backward_give_the_same_weights() -> None:
    """The update happens inside backward, and no gradient is left."""
    theirs, ours = _parameters(), _parameters()
    plain, optimizer = torch.optim.AdamW(theirs), torch.optim.AdamW(ours)
    held = hold_weights(optimizer, release_gradients=True)
    for step in range(5):
        _train_step(plain, theirs, step)
        _loss(ours, step).backward()
        assert all(parameter.grad is None for parameter in ours)
    exact = held.fp32_weights(_named(ours))
    assert all(torch.equal(exact[str(i)], p.detach()) for i, p in enumerate(theirs))


def test_sparse_gradients_update_split_weights() -> None:
    """SparseAdam on an embedding, as exactly as in fp32."""
    both = [torch.nn.Embedding(11, 3, sparse=True) for _ in range(2)]
    both[1].load_state_dict(both[0].state_dict())
    plain = torch.optim.SparseAdam(both[0].parameters(), lr=0.01)
    optimizer = torch.optim.SparseAdam(both[1].parameters(), lr=0.01)
    held = hold_weights(optimizer)
    for step in range(20):
        rows = torch.tensor([step % 11, (3 * step) % 11])
        for embedding, stepper in zip(both, (plain, optimizer), strict=True):
            stepper.zero_grad()
            embedding(rows).float().sum().backward()
            stepper.step()
    exact = held.fp32_weights(both[1])["weight"]
    assert torch.equal(exact, both[0].weight.detach())


def test_the_format_fp16_is_held_by_those_who_can() -> None:
    """Master and Kahan hold fp16 weights; split needs the exponent of fp32."""
    for name in ("master", "kahan", "stochastic"):
        parameter = torch.nn.Parameter(torch.randn(5))
        hold_weights(torch.optim.SGD([parameter], lr=0.1), name, fmt="fp16")
        assert parameter.dtype == torch.float16
    with pytest.raises(WeightStorageError, match="got fp16"):
        hold_weights(torch.optim.SGD([parameter], lr=0.1), "split", fmt="fp16")


def test_what_cannot_be_held_is_refused_by_name() -> None:
    """Each refusal says what came and what to do."""
    fine = torch.nn.Parameter(torch.randn(3))
    wave = torch.nn.Parameter(torch.randn(3, dtype=torch.complex64))
    with pytest.raises(WeightStorageError, match=r"complex64.*keep="):
        hold_weights(torch.optim.SGD([fine, wave], lr=0.1))
    assert fine.dtype == torch.float32
    hold_weights(torch.optim.SGD([fine, wave], lr=0.1), keep=[wave])
    assert (fine.dtype, wave.dtype) == (torch.bfloat16, torch.complex64)
    shared = torch.randn(3)
    twins = [torch.nn.Parameter(shared), torch.nn.Parameter(shared)]
    with pytest.raises(WeightStorageError, match="share no memory"):
        hold_weights(torch.optim.SGD(twins, lr=0.1))
    with pytest.raises(WeightStorageError, match="differentiable"):
        hold_weights(torch.optim.SGD([fine], lr=0.1, differentiable=True))
    with pytest.raises(SettingsError, match="master, split"):
        hold_weights(torch.optim.SGD([fine], lr=0.1), "splt")
    with pytest.raises(WeightStorageError, match="LBFGS may treat"):
        hold_weights(torch.optim.LBFGS([fine]), release_gradients=True)
    optimizer = torch.optim.SGD([fine], lr=0.1)
    hold_weights(optimizer)
    with pytest.raises(WeightStorageError, match="held already"):
        hold_weights(optimizer)


def test_states_of_another_storage_are_refused() -> None:
    """A remainder is no compensation."""
    one, other = (torch.optim.SGD(_parameters(), lr=0.1) for _ in range(2))
    hold_weights(one, "split")
    hold_weights(other, "kahan")
    with pytest.raises(WeightStorageError, match=r"split\.remainder"):
        other.load_state_dict(one.state_dict())


def test_a_hook_that_only_looks_is_nobody_who_acts() -> None:
    """Kept copies of weights listen to all optimizers; they must not stop releases."""
    optimizer = torch.optim.SGD([torch.ones(3, requires_grad=True)])
    looking = optimizer.register_step_post_hook(only_looks(lambda *_: None))
    assert not has_step_hooks(optimizer)
    looking.remove()
    optimizer.register_step_post_hook(lambda *_: None)
    assert has_step_hooks(optimizer)
