"""Ranks that hold other bits, formats or policies are found and named."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.distributed.fingerprint import fingerprints
from castwise.distributed.likeness import watch_ranks
from castwise.distributed.replication import replicate
from castwise.distributed.sharding import shard
from castwise.errors import RanksError, SettingsError
from shared_net import ROWS, Messages, loss_of, net, policy_of
from two_ranks import TwoRanks


def _flip(tensor: torch.Tensor) -> None:
    """Flip one bit of the last number, which two updates do not round off."""
    flat = tensor.detach().view(-1).view(torch.int32)
    flat[-1] ^= 1 << 12


def drifted(rank: int, fault: str) -> Any:
    """Four steps compared at every second; rank 1 goes astray before the third."""
    model, policy = net(), policy_of("bf16-mixed fp32")
    if fault == "sharded":
        shard(model, policy)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, policy)
    ddp = model if fault == "sharded" else replicate(model, policy)
    watching = watch_ranks(run, every=2, but=("*.nothing",))
    sent = []
    try:
        for number in range(4):
            with Messages() as noted, run.step() as step:
                step.backward(loss_of(ddp(ROWS[rank])))
            sent.append(
                [each for each in noted.sent if each[0].startswith("allgather_")]
            )
            if number == 1 and rank == 1:
                _astray(fault, run, model)
    except RanksError as error:
        return str(error), watching.num_looks, sent
    watching.remove()
    assert run.watchers == []
    return "alike", watching.num_looks, sent


def _astray(fault: str, run: Any, model: Any) -> None:
    if fault == "weight":
        _flip(model.delicate.bias)
    if fault in {"phase", "sharded"}:
        run.phase = "predict"
    if fault == "policy":
        run.override("blocks.0", "c=fp32,o=fp32", because="rank 1 alone")


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("none", "alike"),
        ("weight", "rank 1 holds another 'delicate.bias' than rank 0 (1 of 14 weights"),
        ("phase", "rank 1 and rank 0 differ: 'phase predict' against 'phase full'"),
        ("policy", "rank 1 and rank 0 differ: 'policy "),
        ("sharded", "rank 1 and rank 0 differ: 'phase predict' against 'phase full'"),
    ],
)
def test_a_rank_that_goes_astray_is_named(
    two_ranks: TwoRanks, fault: str, said: str
) -> None:
    """At the next look, on all ranks at once; one of them says what it is."""
    zero, one = two_ranks(drifted, fault)
    assert zero[0].startswith(said) if said == "alike" else said in zero[0]
    assert zero[1] == one[1] == 2
    if fault == "none":
        assert one[0] == "alike"
        assert [len(each) for each in zero[2]] == [0, 1, 0, 1]  # one message a look
        assert {each[2] for messages in zero[2] for each in messages} == {4}
    else:
        assert "after 4 watched steps" in zero[0]
        assert one[0] == "rank 0 says in what the ranks differ; this rank stops too"


class Norms(nn.Module):
    """A buffer that training writes, one that nobody writes, one that differs."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)
        self.register_buffer("table", torch.linspace(0, 1, 3))
        self.register_buffer("own", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Running statistics follow the rows of this rank."""
        y: torch.Tensor = self.norm(self.first(x)) * self.table
        return y


def buffered(rank: int, fault: bool) -> list[str]:
    """Running means differ between forwards, and a table may not."""
    model, policy = Norms(), cw.preset("32-true")
    model.own += rank
    run = cw.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1), policy)
    ddp = replicate(model, policy, broadcast_buffers=False)
    watching = watch_ranks(run, every=1, but=("own",))
    said = []
    for number in range(3):
        try:
            with run.step() as step:
                step.backward(loss_of(ddp(ROWS[rank])))
        except RanksError as error:
            said.append(str(error))
        if fault and number == 0 and rank == 1:
            _flip(model.table)
    assert watching.num_looks == 3
    return said


def test_a_buffer_that_one_rank_changed_is_named(two_ranks: TwoRanks) -> None:
    """And not one that all ranks write, nor one that was excepted."""
    assert two_ranks(buffered, False) == ([], [])
    zero, one = two_ranks(buffered, True)
    assert "rank 1 holds another 'table' than rank 0 (1 of 1 buffers" in zero[0]
    assert len(zero) == len(one) == 2  # it is told until somebody mends it


@pytest.mark.parametrize(
    "dtype",
    [
        torch.float32, torch.bfloat16, torch.float64, torch.float8_e4m3fn,
        torch.complex64, torch.int64, torch.bool,
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [0, 1, 63, 2**18 + 5])
def test_every_bit_counts(dtype: torch.dtype, size: int) -> None:
    """Each single change gives another fingerprint, and so does another order."""
    torch.manual_seed(0)
    tensor = torch.randn(size).mul(9).to(dtype)
    (usual,) = fingerprints([tensor])
    assert fingerprints([tensor.clone(), tensor]) == [usual, usual]
    if not size:
        return
    for place in {0, size // 2, size - 1}:
        other = tensor.clone()
        octets = other.view(-1, 1).view(torch.uint8)
        octets[place, -1] ^= 1
        assert fingerprints([other]) != [usual]
    if size > 1 and tensor[0] != tensor[-1]:
        other = tensor.clone()
        other[0], other[-1] = tensor[-1], tensor[0]
        assert fingerprints([other]) != [usual]
    assert fingerprints([]) == []


def test_without_processes_there_is_nothing_to_compare() -> None:
    """The remedy is one line."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = cw.prepare(model, optimizer, cw.preset("bf16-mixed"))
    with pytest.raises(SettingsError, match="init_process_group"):
        watch_ranks(run)
