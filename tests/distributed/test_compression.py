"""Gradients made smaller: which are, by how much, what is remembered and restored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import castwise as cw
from castwise.distributed.compression import Compression
from castwise.distributed.low_rank import LowRank
from castwise.distributed.replication import feedback_of, replicate
from castwise.errors import CastwiseError, CheckpointError, SettingsError
from castwise.islands import apply_policy, module_facts
from castwise.numerics.contract import prove
from castwise.policy import Policy
from castwise.region import Region
from shared_net import Messages
from two_ranks import TwoRanks

ROWS = torch.linspace(-1, 1, 2 * 9 * 33).reshape(2, 9, 33).mul(37).sin()
RANK_2 = "powersgd:rank=2,start=1"


class Wide(nn.Module):
    """Matrices that are worth two factors, one of them in a delicate module."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = nn.Linear(33, 40)
        self.delicate = nn.Linear(40, 40)
        self.kernels = nn.Conv1d(40, 24, 5, padding=2)
        self.leave = nn.Linear(24, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Nine rows are nine places for the convolution."""
        x = self.delicate(self.enter(x).tanh()).T
        y: torch.Tensor = self.leave(self.kernels(x).tanh().T)
        return y


def policy_of(name: str) -> Policy:
    """A preset with a delicate module in fp32; `sums` reduces in bf16."""
    preset, _, sums = name.partition(" ")
    policy = cw.preset(preset)
    if sums:
        policy = policy.with_default("p=fp32,c=bf16,o=bf16,r=bf16")
    return policy.with_rule(module="delicate", precision="p=fp32,c=fp32,r=fp32")


def begin(name: str, compress: str) -> tuple[Any, Any, LowRank | None]:
    """A run over a replicated model, and what compression remembers."""
    torch.manual_seed(0)
    model, policy = Wide(), policy_of(name)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    scale = cw.DynamicScale(initial=1024.0) if name == "16-mixed" else None
    run = cw.prepare(model, optimizer, policy, loss_scale=scale)
    ddp = replicate(
        model,
        policy,
        compress=compress,
        loss_scale=run.loss_scale,
        bucket_cap_mb=0.008,  # several buckets, so that one might overtake another
    )
    return run, ddp, feedback_of(ddp)


def loss_of(ddp: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """A loss in fp32."""
    return (ddp(rows).float() - rows[:, :3]).square().mean()


def step(run: Any, ddp: nn.Module, rows: torch.Tensor, factor: float = 1.0) -> Any:
    """One step; its gradients, as the optimizer saw them, and its outcome."""
    with run.step() as opened:
        opened.backward(loss_of(ddp, rows) * factor)
        found = {name: grad.clone() for name, grad in run.gradients().items()}
    return found, opened.outcome


def weights_of(run: Any) -> dict[str, torch.Tensor]:
    """Copies of all weights."""
    return {n: w.detach().clone() for n, w in run.model.named_parameters()}


def assert_equal(one: dict[str, Any], other: dict[str, Any]) -> None:
    """Compare every bit."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


def factored(rank: int, name: str) -> dict[str, Any]:
    """Three steps: what was sent, what arrived, and what is left to send."""
    run, ddp, feedback = begin(name, RANK_2)
    assert feedback is not None
    sent, totals, kept = [], [], []
    arrived: list[Any] = []
    own: dict[str, torch.Tensor] = {}
    for weight_name, weight in run.model.named_parameters():
        weight.register_hook(lambda g, n=weight_name: own.update({n: g.clone()}))
    for number in range(3):
        before = _copied(feedback.state_dict()["errors"])
        scale = run.loss_scale.scale
        with Messages() as noted, run.step() as opened:
            noted.sent.clear()
            opened.backward(loss_of(ddp, ROWS[rank].roll(number, 0)))
            arrived.append(_copied(run.gradients()))
        sent.append([each for each in noted.sent if "allreduce" in each[0]])
        totals.append(feedback.num_bytes)
        after = feedback.state_dict()["errors"]
        kept.append({n: (own[n] / scale, before[n], after[n].clone()) for n in after})
    return {
        "shrunk": feedback.shrunk,
        "sent": sent,
        "totals": totals,
        "arrived": arrived,
        "kept": kept,
        "weights": weights_of(run),
        "scale": run.loss_scale.scale,
    }


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "bf16-mixed sums"])
def test_matrices_travel_as_factors_and_nothing_is_lost(
    two_ranks: TwoRanks, name: str
) -> None:
    """Own gradient + what was left = what arrived + what is left, on every rank.

    Delicate and small weights travel whole, in the format of their `reduce`. The rank
    of what arrived is that of the factors; both ranks hold the same bits.
    """
    zero, one = two_ranks(factored, name)
    assert zero["shrunk"] == ("enter.weight", "kernels.weight")
    assert_equal(zero["weights"], one["weights"])
    rounding = 2.0**-8 if "sums" in name else 2.0**-20
    for found in (zero, one):
        for number in (1, 2):
            arrived = found["arrived"][number]
            for weight in found["shrunk"]:
                own, before, left = found["kept"][number][weight]
                got = arrived[weight].flatten(1) / found["scale"]
                total = own.flatten(1) + before
                torch.testing.assert_close(
                    got + left, total, rtol=0, atol=float(1e-5 * total.abs().max())
                )
                assert float(left.norm()) > 0
                assert int(torch.linalg.matrix_rank(got, rtol=1e-4)) == 2
    # the best of rank 2 cannot be beaten, and is nearly reached
    first = [each["kept"][0]["enter.weight"][0] for each in (zero, one)]
    mean = (first[0] + first[1]) / 2
    whole = zero["arrived"][0]["enter.weight"] / zero["scale"]
    assert float((whole - mean).norm() / mean.norm()) < max(rounding, 2.0**-8)
    numel = sum(weight.numel() for weight in Wide().parameters())
    shrunk = 40 * 33 + 24 * 200
    delicate = 40 * 40 + 40
    width = 2 if "sums" in name else 4
    plain = width * (numel - delicate) + 4 * delicate
    factors = 2 * (40 + 33 + 24 + 200)
    assert zero["totals"] == [plain, *[plain - width * (shrunk - factors)] * 2]
    for messages, total in zip(zero["sent"], zero["totals"], strict=True):
        size = {"torch.bfloat16": 2, "torch.float32": 4}
        assert sum(size[dtype] * count for _, dtype, count in messages) == total


def narrowed(rank: int, compress: str) -> list[tuple[str, str, int]]:
    """What one step sends; the first one deals the buckets."""
    run, ddp, feedback = begin("bf16-mixed", compress)
    assert feedback is None
    step(run, ddp, ROWS[rank])
    with Messages() as noted, run.step() as opened:
        noted.sent.clear()
        opened.backward(loss_of(ddp, ROWS[rank]))
    return [each for each in noted.sent if "allreduce" in each[0]]


def test_sixteen_bits_spare_what_is_delicate(two_ranks: TwoRanks) -> None:
    """`compress="bf16"` is r=bf16 where no rule says otherwise."""
    numel = sum(weight.numel() for weight in Wide().parameters())
    for fmt, dtype in (("bf16", "torch.bfloat16"), ("fp16", "torch.float16")):
        sent, _ = two_ranks(narrowed, fmt)
        assert len(sent) > 2
        found = {each[1]: 0 for each in sent}
        for _, sent_in, count in sent:
            found[sent_in] += count
        assert found == {dtype: numel - 1640, "torch.float32": 1640}


def skipped(rank: int) -> Any:
    """A step that overflows on one rank alone, between two that do not."""
    run, ddp, feedback = begin("16-mixed", RANK_2)
    assert feedback is not None
    step(run, ddp, ROWS[rank])
    step(run, ddp, ROWS[rank])
    before = {n: e.clone() for n, e in feedback.state_dict()["errors"].items()}
    bases = {n: e.clone() for n, e in feedback.state_dict()["bases"].items()}
    weights = weights_of(run)
    scale = run.loss_scale.scale
    _, outcome = step(run, ddp, ROWS[rank], 1e38 if rank else 1.0)
    assert_equal(before, feedback.state_dict()["errors"])
    assert_equal(bases, feedback.state_dict()["bases"])
    assert_equal(weights, weights_of(run))
    _, after = step(run, ddp, ROWS[rank])
    kinds = [type(each).__name__ for each in (outcome, after)]
    return kinds, outcome.parameter, outcome.kind, scale / run.loss_scale.scale


def test_a_skipped_step_leaves_what_is_to_be_sent(two_ranks: TwoRanks) -> None:
    """Both ranks skip for the same weight, and go on at half the loss scale."""
    zero, one = two_ranks(skipped)
    assert zero[0] == one[0] == ["Skipped", "Stepped"]
    assert zero[1] == one[1] == "enter.weight"
    assert zero[3] == one[3] == 2


def resumed(rank: int) -> Any:
    """Six steps in one go, and three and three with a checkpoint between."""
    whole = begin("bf16-mixed", RANK_2)
    for number in range(6):
        step(*whole[:2], ROWS[rank].roll(number, 0))
        if number == 2:
            run, _, feedback = whole
            assert feedback is not None
            saved = [
                run.model.state_dict(),
                run.optimizer.state_dict(),
                feedback.state_dict(),
                feedback.whole_state_dict(),
            ]
            saved = [_copied(each) for each in saved]
    found = {}
    for kind in ("own", "whole", "forgotten"):
        run, ddp, feedback = begin("bf16-mixed", RANK_2)
        run.model.load_state_dict(saved[0])
        run.optimizer.load_state_dict(_copied(saved[1]))
        assert feedback is not None
        if kind == "own":
            feedback.load_state_dict(saved[2])
        if kind == "whole":
            told: list[Any] = [saved[3]]
            torch.distributed.broadcast_object_list(told)
            feedback.load_state_dict(told[0])
        for number in range(3, 6):
            step(run, ddp, ROWS[rank].roll(number, 0))
        found[kind] = weights_of(run)
    return weights_of(whole[0]), found, *_mistakes(saved, rank)


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(each) for key, each in value.items()}
    return value.clone() if isinstance(value, torch.Tensor) else value


def _mistakes(saved: list[Any], rank: int) -> tuple[Any, list[str]]:
    """The state of four ranks on two, and states that do not fit."""
    _, _, feedback = begin("bf16-mixed", RANK_2)
    assert feedback is not None
    name = "enter.weight"
    errors = {n: torch.ones(4, *e.shape) for n, e in saved[2]["errors"].items()}
    errors[name] *= torch.arange(4.0)[:, None, None]
    four = {**saved[2], "rank": None, "num_ranks": 4, "errors": errors}
    feedback.load_state_dict(four)
    mean = feedback.state_dict()["errors"][name].unique().tolist()
    said = []
    for change in (
        {"settings": "powersgd:rank=8"},
        {"rank": 1 - rank},
        {"bases": {}},
    ):
        try:
            feedback.load_state_dict({**saved[2], **change})
        except CheckpointError as error:
            said.append(str(error))
    return mean, said


def test_what_was_not_sent_is_restored_exactly(two_ranks: TwoRanks) -> None:
    """Bit for bit with each rank's state or that of all; and missed without."""
    for whole, found, mean, said in two_ranks(resumed):
        assert_equal(found["own"], whole)
        assert_equal(found["whole"], whole)
        name = "enter.weight"
        assert not torch.equal(found["forgotten"][name], whole[name])
        assert mean == [1.5]
        assert "give compress='powersgd:rank=8'" in said[0]
        assert "whole_state_dict()" in said[1]
        assert "'enter.weight' is missing" in said[2]


def proof(rank: int, name: str, compress: str) -> list[str]:
    """The contract of a model whose gradients are compressed."""
    torch.manual_seed(0)
    model, policy = Wide(), policy_of(name)
    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    ddp = replicate(model, policy, compress=compress)
    region = Region.of(policy, "full", (applied,))

    def run() -> None:
        with region.entered("cpu"):
            loss = ddp(ROWS[rank]).square().mean()
        loss.backward()

    return [*map(str, prove(run, model, applied, brought=["fp32"]).breaches)]


@pytest.mark.parametrize("compress", ["bf16", "powersgd:rank=2,start=0"])
def test_what_compression_computes_is_no_operator_of_the_model(
    two_ranks: TwoRanks, compress: str
) -> None:
    """Casts and products of the hook are transport, and break no contract."""
    assert two_ranks(proof, "bf16-mixed", compress) == ([], [])


def refused(_: int) -> str:
    """Ask for factors under a loss scale that is not given."""
    policy = policy_of("16-mixed")
    try:
        replicate(Wide(), policy, compress="powersgd")
    except SettingsError as error:
        return str(error)
    return ""


def test_a_loss_scale_must_be_known(two_ranks: TwoRanks) -> None:
    """Else what is kept would be off by every change of the scale."""
    assert "give loss_scale=run.loss_scale" in two_ranks(refused)[0]


def test_settings_are_one_line() -> None:
    """It reads as it is written, and mistakes name what is known."""
    every = Compression(method="powersgd", rank=3, start=7, saves=4.5, seed=2)
    assert str(every) == "powersgd:rank=3,start=7,saves=4.5,seed=2"
    assert Compression.parse(str(every)) == every
    assert Compression.parse("bf16") == Compression(method="bf16")
    assert str(Compression()) == "reduce"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("powersdg", "did you mean powersgd"),
        ("powersgd:rang=4", "knows rank, start, saves, seed; got 'rang'"),
        ("powersgd:rank=four", "rank needs a number"),
        ("powersgd:rank=0", "rank >= 1"),
        ("powersgd:start=-1", "start >= 0"),
        ("powersgd:saves=nan", "saves >= 1"),
        ("bf16:rank=4", "takes no keys"),
    ],
)
def test_settings_that_mean_nothing_are_refused(text: str, said: str) -> None:
    """One sentence each."""
    with pytest.raises(CastwiseError, match=said):
        Compression.parse(text)
