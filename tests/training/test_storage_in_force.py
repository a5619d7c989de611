from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

from castwise.errors import (
    IslandError,
    PolicyError,
    SettingsError,
    WeightStorageError,
)
from castwise.optim import STORAGES, AdamW, SweepSettings, hold_weights
from castwise.policy import Policy, preset
from castwise.policy.keys import STORAGES as NAMES
from castwise.training.averages import ExponentialAverage
from castwise.training.step import Run, prepare

LOW = Policy(name="low").with_default("bf16")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def make_model() -> nn.Sequential:
    """Products and a norm, odd in every size."""
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Tanh(), nn.Linear(7, 3))


def make_run(policy: Policy, **settings: Any) -> Run:
    """A run of the model with torch's AdamW."""
    model = make_model()
    return prepare(model, torch.optim.AdamW(model.parameters(), **settings), policy)


def step(run: Run, seed: int = 0) -> None:
    """One step on data of that seed."""
    lot = torch.Generator().manual_seed(seed)
    x = torch.randn(11, 5, generator=lot)
    with run.step() as step:
        step.backward(run.model(x).float().pow(2).mean())


def test_policies_and_optimizers_know_the_same_storages() -> None:
    """The policy imports no torch, so it lists the names that the optimizers have."""
    assert tuple(NAMES) == tuple(STORAGES)


@pytest.mark.parametrize("name", STORAGES)
def test_a_policy_puts_its_storage_under_the_optimizer(name: str) -> None:
    """The optimizer's code stays as it is, and the record says what is in force."""
    run = make_run(LOW.with_storage(name))
    assert run.held is not None
    assert run.held.storages == {name: 80}
    (decision,) = run.precision.storage
    assert decision.value == name
    assert decision.because.startswith("low says so")
    assert ("lose updates" in decision.because) is (name == "plain")
    assert f"stored as {decision}" in run.precision.summary()
    step(run)
    assert {w.dtype for w in run.model.parameters()} == {torch.bfloat16}
    states = run.optimizer.state.values()
    assert {state["exp_avg"].dtype for state in states} == {torch.float32}


def test_split_by_policy_steps_as_hold_weights_does() -> None:
    """Two doors to one room: the same weights after the same steps, in every bit."""
    run = make_run(preset("bf16-true"))
    model = make_model()
    model.load_state_dict(run.held.fp32_weights(run.model))  # type: ignore[union-attr]
    optimizer = torch.optim.AdamW(model.parameters())
    held = hold_weights(optimizer)
    by_hand = prepare(model, optimizer, preset("bf16-true"))
    assert by_hand.held is held
    assert "held by hold_weights" in by_hand.precision.summary()
    for seed in range(5):
        step(run, seed)
        step(by_hand, seed)
    assert run.held is not None
    exact, other = run.held.fp32_weights(run.model), held.fp32_weights(model)
    assert all(torch.equal(exact[name], other[name]) for name in exact)
    assert any(not torch.equal(w, w.bfloat16().float()) for w in exact.values())


def test_what_was_not_asked_for_loses_no_update() -> None:
    """A policy that says nothing about storage trains a weight of 1.0 at lr 1e-4."""
    for policy, moves in ((LOW, True), (LOW.with_storage("plain"), False)):
        model = nn.Linear(3, 1, bias=False)
        nn.init.ones_(model.weight)
        run = prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-4), policy)
        for _ in range(100):
            with run.step() as each:
                each.backward(model(torch.ones(2, 3)).sum())
        assert bool((model.weight.float() < 1).all()) is moves


def test_each_module_has_the_storage_of_its_rule() -> None:
    """Rules mix storages and islands under one optimizer, and tied weights agree."""
    policy = LOW.with_rule(module="0", storage="kahan").with_rule(
        type="LayerNorm", precision="fp32"
    )
    run = make_run(policy)
    assert run.held is not None
    assert run.held.storages == {"kahan": 42, "split": 24}
    assert run.model[1].weight.dtype == torch.float32  # type: ignore[index]
    before = copy.deepcopy(run.held.fp32_weights(run.model))
    step(run)
    after = run.held.fp32_weights(run.model)
    assert all(not torch.equal(before[name], after[name]) for name in before)

    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    policy = LOW.with_rule(module="0", storage="kahan")
    with pytest.raises(WeightStorageError, match=r"share a weight, but store it as"):
        prepare(model, torch.optim.SGD(model.parameters()), policy)
    assert model[0].weight.dtype == torch.float32
    both = policy.with_rule(module="1", storage="kahan")
    run = prepare(model, torch.optim.SGD(model.parameters()), both)
    assert run.held is not None
    assert run.held.storages == {"kahan": 15}


def test_our_own_optimizers_sweep_what_is_split_and_join_the_rest() -> None:
    """Mixed storages under one sweep: what is not split is shown in fp32."""
    model = make_model()
    exact = copy.deepcopy(model)
    policy = LOW.with_rule(module="0", storage="master")
    settings = SweepSettings(backend="twin")
    run = prepare(model, AdamW(model.parameters(), settings=settings), policy)
    assert run.held is not None
    plain = AdamW(exact.parameters(), settings=settings)
    for seed in range(3):
        lot = torch.Generator().manual_seed(seed)
        for mine, theirs in zip(model.parameters(), exact.parameters(), strict=True):
            mine.grad = torch.randn(mine.shape, generator=lot).bfloat16()
            theirs.grad = mine.grad.float()
        run.optimizer.step()
        plain.step()
    told = run.held.fp32_weights(model)
    assert all(torch.equal(told[k], w) for k, w in exact.state_dict().items())


def test_groups_that_are_added_later_follow_the_policy() -> None:
    """Each weight is asked for when it comes; what is not the model's stays."""
    model = make_model()
    optimizer = torch.optim.AdamW(model[0].parameters())
    policy = LOW.with_rule(module="3", storage="kahan")
    run = prepare(model, optimizer, policy)
    assert run.held is not None
    optimizer.add_param_group({"params": list(model[3].parameters()), "lr": 1e-2})
    other = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [other]})
    assert run.held.storages == {"split": 42, "kahan": 24}
    assert other.dtype == torch.float32


def test_a_storage_with_nothing_to_hold_is_refused() -> None:
    """As a rule that matches nothing is; a fallback that widens is no mistake."""
    mixed = preset("bf16-mixed").with_storage("split")
    with pytest.raises(PolicyError, match="none of the optimizer's weights in 16 bits"):
        make_run(mixed)
    with pytest.raises(WeightStorageError, match="take master or kahan for fp16"):
        make_run(LOW.with_default("fp16").with_storage("split"))


def test_another_storage_than_the_one_in_force_is_refused() -> None:
    """Weights that are held already are not held again in silence."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters())
    hold_weights(optimizer, "kahan")
    with pytest.raises(SettingsError, match=r"as split .* already holds it as kahan"):
        prepare(model, optimizer, preset("bf16-true"))
    run = prepare(model, optimizer, LOW)  # says nothing, so what is there may stay
    assert [each.value for each in run.precision.storage] == ["kahan"]
    run.remove()
    assert {w.dtype for w in model.parameters()} == {torch.bfloat16}


def test_a_refused_policy_leaves_every_bit() -> None:
    """Weights come back exactly when what comes after the storage is refused."""
    model = make_model()
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.AdamW(model.parameters())
    model[0].forward = model[0].forward
    island = LOW.with_rule(module="0", precision="c=fp32")
    with pytest.raises(IslandError, match="patched onto the instance"):
        prepare(model, optimizer, island)
    assert all(torch.equal(model.state_dict()[name], before[name]) for name in before)
    assert "step" not in optimizer.__dict__


def test_removal_gives_back_what_16_bits_do_not_hold() -> None:
    """After remove() the weights are fp32, with every bit of the last step."""
    run = make_run(preset("bf16-true"))
    step(run)
    assert run.held is not None
    exact = copy.deepcopy(run.held.fp32_weights(run.model))
    model = run.model
    run.remove()
    assert all(torch.equal(model.state_dict()[name], exact[name]) for name in exact)


def test_averaged_weights_do_not_cost_the_lower_bits() -> None:
    """An evaluation with averages writes weights and writes them back."""
    run = make_run(preset("bf16-true"))
    averages = ExponentialAverage(run.model, decay=0.5)
    assert run.held is not None
    step(run)
    averages.update()
    exact = copy.deepcopy(run.held.fp32_weights(run.model))
    with averages.in_place_of_weights():
        run.model(torch.ones(1, 5))
    told = run.held.fp32_weights(run.model)
    assert all(torch.equal(told[name], exact[name]) for name in exact)


def test_states_in_eight_bits_are_not_stale() -> None:
    """Codes are no moments in another format; a run takes them."""
    model = nn.Linear(97, 53)
    settings = SweepSettings(states="8bit", backend="twin", min_8bit_size=0)
    optimizer = AdamW(model.parameters(), settings=settings)
    run = prepare(model, optimizer, preset("bf16-true"))
    with run.step() as each:
        each.backward(model(torch.ones(2, 97)).float().sum())
    assert optimizer.state[model.weight]["exp_avg"].dtype == torch.int8
