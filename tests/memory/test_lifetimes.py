"""The ledger: births, deaths, and whom they belong to."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from castwise.memory.lifetimes import KINDS, Ledger, Lifetimes


class Net(nn.Module):
    """Two products with a root between, and a view."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(7, 63)
        self.outer = nn.Linear(63, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return [N, 5]."""
        return self.outer(self.inner(x).exp().view(-1, 63))


def watched(*, recompute: bool = False) -> tuple[Lifetimes, Net]:
    """A forward and backward of 33 rows."""
    net, x = Net(), torch.ones(33, 7)
    ledger = Ledger(net)
    for name, weight in net.named_parameters():
        ledger.name(weight, kind="weights", module=name.rpartition(".")[0])
    ledger.name(x, kind="batch")
    with ledger:
        out = checkpoint(net, x, use_reentrant=False) if recompute else net(x)
        loss = out.sum()
        del out
        ledger.begin("backward")
        loss.backward()
        ledger.begin("update")
        for weight in net.parameters():
            ledger.name(weight.grad, kind="gradients")
    return ledger.lifetimes(), net


def test_views_and_in_place_operators_hold_nothing_more() -> None:
    """A storage is counted once, however many tensors show it."""
    x = torch.zeros(10)
    ledger = Ledger(nn.Identity())
    with ledger:
        y = x + 1
        z = y.view(2, 5).t()
        z.add_(1)
        ledger.begin("backward")
    lifetimes = ledger.lifetimes()
    assert [(a.op, a.num_bytes) for a in lifetimes.allocations] == [
        ("", 40),
        ("add", 40),
    ]
    assert lifetimes.curve() == [40, 80]


def test_death_is_heard_when_it_happens() -> None:
    """The peak is where two live together, and a later one does not add."""
    ledger = Ledger(nn.Identity())
    with ledger:
        for _ in range(3):
            first = torch.ones(10)
            second = first * 2
            del first, second
    lifetimes = ledger.lifetimes()
    assert max(lifetimes.curve()) == 80
    assert lifetimes.curve()[-1] == 0
    assert lifetimes.peak() == (2, 80)


def test_saved_bytes_are_those_that_hooks_count() -> None:
    """Unique storages that autograd packs, but weights and the batch."""
    net, x = Net(), torch.ones(33, 7)
    packed: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        packed[storage._cdata] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = net(x).sum()
    standing = (*net.parameters(), x)
    for tensor in standing:
        packed.pop(tensor.untyped_storage()._cdata, None)
    lifetimes, _ = watched()
    assert lifetimes.saved_bytes() == sum(packed.values()) == 33 * 63 * 4
    del loss


def test_kinds_and_modules_are_told_apart() -> None:
    """Weights, gradients and activations stand under their modules."""
    lifetimes, _ = watched()
    held = {(a.kind, a.module): a.num_bytes for a in lifetimes.allocations}
    assert held["saved", ""] > 0  # exp is the net's own
    assert {kind for kind, _ in held} <= set(KINDS)
    gradients = [a for a in lifetimes.allocations if a.kind == "gradients"]
    assert sum(a.num_bytes for a in gradients) == 4 * sum(
        weight.numel() for weight in Net().parameters()
    )
    assert {a.module for a in gradients} == {"inner", "outer"}
    assert all(a.died is None for a in gradients)


def test_recompute_is_a_stage_of_its_own() -> None:
    """What is run again belongs to its module, and was not saved."""
    plain, _ = watched()
    again, _ = watched(recompute=True)
    stages = {a.stage for a in again.allocations}
    assert "recompute" in stages
    assert "recompute" not in {a.stage for a in plain.allocations}
    modules = {a.module for a in again.allocations if a.stage == "recompute"}
    assert "inner" in modules
    assert again.saved_bytes() < plain.saved_bytes()


def test_casts_of_weights_are_a_kind() -> None:
    """What autocast makes of a weight is told from activations."""
    net, x = Net(), torch.ones(33, 7)
    ledger = Ledger(net)
    for weight in net.parameters():
        ledger.name(weight, kind="weights")
    with ledger, torch.autocast("cpu", torch.bfloat16, cache_enabled=True):
        loss = net(x).sum()
        ledger.begin("backward")
    casts = [a for a in ledger.lifetimes().allocations if a.kind == "casts"]
    assert sum(a.num_bytes for a in casts) == 2 * sum(
        w.numel() for w in net.parameters()
    )
    assert {a.format for a in casts} == {"bf16"}
    del loss


def test_resized_storages_are_followed_where_asked() -> None:
    """A storage that is emptied and filled again dies and is born again."""
    x = torch.zeros(64)
    ledger = Ledger(nn.Identity(), resizes=True)
    ledger.name(x, kind="weights")
    with ledger:
        y = x + 1
        y.untyped_storage().resize_(0)
        z = torch.ones(2)
        y.untyped_storage().resize_(256)
        z = z + 1
    assert max(ledger.lifetimes().curve()) == 256 + 256 + 16
    sizes = [a.num_bytes for a in ledger.lifetimes().allocations if a.op == "add"]
    assert sizes == [256, 0, 256, 8]
    del y, z


def test_hooks_leave_with_the_ledger() -> None:
    """A model that was watched is what it was."""
    _, net = watched()
    for module in net.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


@pytest.mark.parametrize("at_end", [True, False])
def test_modules_that_raise_are_left(at_end: bool) -> None:
    """The stack of running modules is empty after an exception too."""

    class Raises(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if at_end:
                x = x + 1
            raise ValueError("no")

    net = nn.Sequential(nn.Identity(), Raises())
    ledger = Ledger(net)
    with ledger:
        with pytest.raises(ValueError, match="no"):
            net(torch.ones(3))
        made = torch.ones(3)
    assert ledger.lifetimes().allocations[-1].module == ""
    del made
