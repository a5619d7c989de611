"""Every check finds what was planted for it, and stays quiet beside it."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import castwise as cw
from castwise.errors import RuleError
from castwise.numerics.lint import CHECKS, LintReport, lint
from castwise.policy import Policy, preset

BF16 = preset("bf16-mixed")
FP16 = preset("16-mixed")
FP32 = preset("32-true")
PURE = preset("bf16-true").with_storage("plain")
PURE_FP16 = preset("16-true").with_storage("plain")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test makes the same models, whatever ran before."""
    torch.manual_seed(0)


def batch(*shape: int, classes: int | None = None) -> list[tuple[torch.Tensor, ...]]:
    """One batch of random numbers, and a target of the same rows."""
    torch.manual_seed(5)
    x = torch.randn(*shape)
    y = torch.randn(shape[0], 3)
    return [(x, torch.randint(classes, (shape[0],)) if classes else y)]


class Rotary(nn.Module):
    """Turns pairs of features by a frequency times a position."""

    def __init__(self, *, positions: int = 4096, careful: bool = False) -> None:
        super().__init__()
        self.max_seq_len = positions
        self.careful = careful
        inv_freq = 1e4 ** -(torch.arange(0, 8, 2) / 8)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.out = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn, then mix."""
        steps = torch.arange(x.shape[1], device=x.device)
        if self.careful:
            angles = steps.float()[:, None] * self.inv_freq[None, :]
        else:
            angles = torch.einsum("i,j->ij", steps.float(), self.inv_freq)
        turn = torch.cat([angles.cos(), angles.sin()], -1)
        return self.out(x * turn).mean(1)


def checks_of(report: LintReport) -> set[str]:
    """Ids of the checks that found something."""
    return {finding.check for finding in report.findings}


def look(model: nn.Module, policy: Policy, *args: Any, **more: Any) -> LintReport:
    """Lint with a squared error where no other loss is given."""
    more.setdefault("loss_fn", functional.mse_loss)
    return lint(model, policy, *args, **more)


def test_a_rotary_buffer_that_a_rule_rounds_is_found_with_its_angle() -> None:
    """The figure is the largest error of the angle at the last position."""
    rounded = BF16.with_rule(module="inv_freq", precision="bf16")
    (found,) = lint(Rotary(positions=2048), rounded).of("rounded-angle")
    exact = 1e4 ** -(torch.arange(0, 8, 2).double() / 8)
    error = float((exact - exact.bfloat16().double()).abs().max()) * 2048
    assert found.place == "inv_freq"
    assert f"{error:.3g} rad at position 2048" in found.figure


def test_a_rotary_buffer_that_nobody_rounds_is_no_finding() -> None:
    """Buffers stay in fp32 unless a rule names them, and 64 positions forgive."""
    assert lint(Rotary(), BF16).is_clean
    short = BF16.with_rule(module="inv_freq", precision="bf16")
    assert lint(Rotary(positions=16), short).is_clean


def test_a_model_that_was_cast_before_is_found_as_well() -> None:
    """Nobody knows any more what the frequencies were, so half an ulp is told."""
    report = lint(Rotary().bfloat16(), preset("bf16-true"))
    assert "rounded-angle" in checks_of(report)


def test_a_table_of_cosines_may_be_rounded() -> None:
    """Its error does not grow with the position."""
    model = nn.Linear(3, 3)
    model.register_buffer("cos_table", torch.arange(4096.0).cos())
    assert lint(model, BF16.with_rule(module="cos_table", precision="bf16")).is_clean


def test_frequencies_that_autocast_rounds_are_found_in_a_forward() -> None:
    """The einsum is a product, so its inputs are cast; a multiplication is not."""
    report = look(Rotary(), BF16, batches=batch(2, 300, 8))
    assert "rounded-angle" in checks_of(report)
    assert "integer-position" in checks_of(report)
    assert "test_planted.py" in report.of("integer-position")[0].where
    assert look(Rotary(careful=True), BF16, batches=batch(2, 300, 8)).is_clean


class Positions(nn.Module):
    """Adds a position to its input in the format of the input."""

    def __init__(self, cast: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 3)
        self.cast = cast

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count in the format of the hidden state, or in fp32."""
        hidden = self.mix(x)
        steps = torch.arange(hidden.shape[1])
        counted = steps.to(hidden.dtype) if self.cast else steps.float()
        return (hidden + 1e-3 * counted[:, None]).mean(1)


def test_integers_above_256_collide_in_bf16_and_not_below() -> None:
    """257 has no number of its own in bf16."""
    far = look(Positions(cast=True), BF16, batches=batch(2, 259, 5))
    assert checks_of(far) == {"integer-position"}
    assert look(Positions(cast=True), BF16, batches=batch(2, 257, 5)).is_clean
    assert look(Positions(cast=False), BF16, batches=batch(2, 259, 5)).is_clean


def test_a_table_of_positions_is_found_when_a_rule_rounds_it() -> None:
    """0 ... 299 are 300 numbers in fp32, and fewer in bf16."""
    model = nn.Linear(3, 3)
    model.register_buffer("steps", torch.arange(300.0))
    rounded = BF16.with_rule(module="steps", precision="bf16")
    assert checks_of(lint(model, rounded)) == {"integer-position"}
    assert lint(model, BF16).is_clean


def norm_model() -> nn.Sequential:
    """A norm weight at 1, and a product with small weights."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.LayerNorm(64), nn.Linear(64, 3))


@pytest.mark.parametrize(
    ("rate", "lost"), [(1e-3, True), (1.9e-3, True), (2e-3, False)]
)
def test_a_norm_weight_at_one_does_not_move_below_half_an_ulp(
    rate: float, lost: bool
) -> None:
    """Half of the distance from 1 down to the next number of bf16 is 2^-9."""
    model = norm_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=rate)
    found = lint(model, PURE, optimizer).of("lost-update")
    assert ("1.weight" in {f.place for f in found}) is lost


def test_weights_that_are_held_with_their_remainder_lose_nothing() -> None:
    """A weight storage keeps what 16 bits cannot; fp32 weights need none."""
    model = norm_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    assert lint(model, BF16, optimizer).is_clean
    assert checks_of(lint(model, PURE, optimizer)) == {
        "lost-update",
        "lost-decay",
    }
    for storage in ("split", "kahan", "stochastic", "master"):
        assert lint(model, PURE.with_storage(storage), optimizer).is_clean
    hold = cw.hold_weights(optimizer)
    assert lint(model, PURE, optimizer).is_clean
    hold.remove()


def test_sgd_is_judged_by_the_gradient_of_a_batch() -> None:
    """Its update is the rate times the gradient, so a batch is needed."""
    model = nn.Linear(6, 3)
    nn.init.ones_(model.weight)
    slow = torch.optim.SGD(model.parameters(), lr=1e-6)
    fast = torch.optim.SGD(model.parameters(), lr=1.0)
    pure = PURE
    data = batch(9, 6)
    assert "lost-update" in checks_of(look(model, pure, slow, batches=data))
    assert "lost-update" not in checks_of(look(model, pure, fast, batches=data))
    assert "lost-update" not in checks_of(lint(model, pure, slow))


@pytest.mark.parametrize(("decay", "lost"), [(0.01, True), (1.0, False), (0.0, False)])
def test_decay_below_half_an_ulp_is_found(decay: float, lost: bool) -> None:
    """A rate of 3e-3 times 0.01 is 3e-5 of the weight; bf16 needs 2e-3."""
    model = norm_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=decay)
    found = checks_of(lint(model, PURE, optimizer))
    assert ("lost-decay" in found) is lost


def test_decay_that_is_added_to_the_gradient_is_not_judged() -> None:
    """L2 regularisation goes through the moments, and is no change of its own."""
    model = norm_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=0.01)
    assert "lost-decay" not in checks_of(lint(model, PURE, optimizer))


class Masked(nn.Module):
    """Attention scores with a constant for what is hidden."""

    def __init__(self, value: float | None) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 3)
        self.value = value

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hide the first column."""
        scores = self.mix(x)
        hidden = torch.zeros(3, dtype=torch.bool)
        hidden[0] = True
        value = torch.finfo(scores.dtype).min if self.value is None else self.value
        return scores.masked_fill(hidden, value).softmax(-1)


def test_a_mask_of_minus_a_billion_overflows_fp16_and_not_bf16() -> None:
    """PyTorch refuses the fill half-way; the lint says so and goes on."""
    report = look(Masked(-1e9), FP16, batches=batch(4, 5))
    assert checks_of(report) == {"overflowing-constant"}
    (found,) = [f for f in report.findings if "masked_fill" in f.where]
    assert "test_planted.py" in found.where
    assert "stopped half-way" in report.unchecked[1]
    assert look(Masked(-1e9), BF16, batches=batch(4, 5)).is_clean
    assert look(Masked(None), FP16, batches=batch(4, 5)).is_clean
    assert look(Masked(-6e4), FP16, batches=batch(4, 5)).is_clean


def test_a_mask_that_a_module_keeps_is_found_without_a_batch() -> None:
    """As an attribute or a buffer, where the module computes in fp16."""
    assert checks_of(lint(Masked(-1e9), FP16)) == {"overflowing-constant"}
    assert lint(Masked(-1e9), BF16).is_clean
    model = nn.Linear(3, 3)
    model.register_buffer("bias_of_mask", torch.tensor([0.0, -1e9]))
    assert checks_of(lint(model, FP16)) == {"overflowing-constant"}
    model.register_buffer("bias_of_mask", torch.tensor([0.0, -torch.inf]))
    assert lint(model, FP16).is_clean


class Literal(nn.Module):
    """The constant stands in the source."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Hide what is negative."""
        return torch.where(x > 0, self.mix(x), -1e5)


def test_a_constant_in_the_source_is_found_without_a_batch() -> None:
    """The line is named."""
    (found,) = lint(Literal(), FP16).findings
    assert "test_planted.py" in found.where
    assert "-100000 becomes -inf" in found.figure


class Norm(nn.Module):
    """A root mean square norm, written out."""

    def __init__(self, eps: float) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 3)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Divide by the root mean square, in the format of the product."""
        hidden = self.mix(x)
        return hidden / (hidden * hidden).mean(-1, keepdim=True).add(self.eps).sqrt()


def test_an_eps_that_is_zero_in_fp16_is_found() -> None:
    """1e-8 is below half of the smallest number, 6e-8; 1e-5 is not."""
    assert checks_of(look(Norm(1e-8), FP16, batches=batch(4, 5))) == {"vanishing-eps"}
    assert checks_of(lint(Norm(1e-8), FP16)) == {"vanishing-eps"}
    assert look(Norm(1e-5), FP16, batches=batch(4, 5)).is_clean
    assert look(Norm(1e-8), BF16, batches=batch(4, 5)).is_clean
    assert lint(nn.LayerNorm(5, eps=1e-8), FP16).is_clean


def test_an_optimizer_whose_eps_is_zero_in_its_states_is_found() -> None:
    """Adam in fp16 divides by zero where a gradient vanishes."""
    model = nn.Linear(5, 3)
    usual = torch.optim.Adam(model.parameters(), lr=0.1)
    larger = torch.optim.Adam(model.parameters(), lr=0.1, eps=1e-4)
    pure = PURE_FP16
    assert "vanishing-eps" in checks_of(lint(model, pure, usual))
    assert "vanishing-eps" not in checks_of(lint(model, pure, larger))
    assert "vanishing-eps" not in checks_of(lint(model, FP16, usual))


def test_cross_entropy_of_rounded_probabilities_is_found() -> None:
    """A sigmoid in bf16 is 1 from 6.2 on; with logits, or in fp32, all is well."""
    torch.manual_seed(0)
    x = torch.randn(8, 5)
    data = [(x, torch.randint(2, (8, 3)).float())]
    ends = nn.Sequential(nn.Linear(5, 3), nn.Sigmoid())
    report = look(ends, BF16, batches=data, loss_fn=functional.binary_cross_entropy)
    assert checks_of(report) == {"bce-on-probabilities"}
    wide = BF16.with_rule(module="*", precision="fp32")
    assert look(
        ends, wide, batches=data, loss_fn=functional.binary_cross_entropy
    ).is_clean
    logits = functional.binary_cross_entropy_with_logits
    assert look(ends[0], BF16, batches=data, loss_fn=logits).is_clean
    assert checks_of(lint(ends, BF16, loss_fn=functional.binary_cross_entropy)) == {
        "bce-on-probabilities"
    }


def test_a_long_product_in_fp16_that_nearly_overflows_is_found() -> None:
    """4,096 terms of 10 sum to 40,960 of 65,504."""
    model = nn.Linear(4096, 3, bias=False)
    nn.init.ones_(model.weight)
    data = [(torch.full((2, 4096), 10.0), torch.zeros(2, 3))]
    assert checks_of(look(model, FP16, batches=data)) == {"long-reduction"}
    assert look(model, BF16, batches=data).is_clean
    small = [(torch.full((2, 4096), 1.0), torch.zeros(2, 3))]
    assert look(model, FP16, batches=small).is_clean


class Running(nn.Module):
    """A running sum over a sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add up what is positive."""
        return self.mix(x).relu().cumsum(1).mean(1)


def test_a_long_running_sum_in_bf16_is_found() -> None:
    """It stalls after 256 terms of one size; the usual table keeps it in fp32."""
    low = BF16.with_rule(op="cumsum", category="as_is", because="to test")
    assert checks_of(look(Running(), low, batches=batch(2, 300, 5))) == {
        "long-reduction"
    }
    assert look(Running(), low, batches=batch(2, 200, 5)).is_clean
    assert look(Running(), BF16, batches=batch(2, 300, 5)).is_clean


class _Bare(torch.autograd.Function):
    """A product whose backward does not know of autocast."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Multiply again."""
        x, weight = ctx.saved_tensors
        grad = grad.to(weight.dtype)
        return grad @ weight.mT, x.mT @ grad


class _Carried(torch.autograd.Function):
    """The same with its autocast carried over."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu")
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Multiply."""
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        """Multiply again."""
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.mT @ grad


class _Through(torch.autograd.Function):
    """A straight-through estimator: pointwise, so nothing can go wrong."""

    @staticmethod
    def forward(_: Any, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Round."""
        return x.round() * weight.sum()

    @staticmethod
    def backward(_: Any, grad: torch.Tensor) -> Any:
        """Pass on."""
        return grad, None


class Custom(nn.Module):
    """A module that uses one of them."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5)[:, :3].clone())
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return self.function.apply(x, self.weight).reshape(len(x), -1)[:, :3]


class Named(nn.Module):
    """A module whose source names the bare function."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.eye(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it through a function."""
        return through_a_function(x, self.weight)


def through_a_function(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """One call further away."""
    return _Bare.apply(x, weight)


def test_a_custom_function_that_multiplies_needs_custom_bwd() -> None:
    """Found in the graph of a forward, or by name; pointwise ones are harmless."""
    data = batch(4, 5)
    (found,) = look(Custom(_Bare), BF16, batches=data).findings
    assert found.check == "bare-custom-function"
    assert found.where.startswith("_Bare at test_planted.py:")
    assert look(Custom(_Carried), BF16, batches=data).is_clean
    assert look(Custom(_Through), BF16, batches=data).is_clean
    assert checks_of(lint(Named(), BF16)) == {"bare-custom-function"}
    assert lint(Named(), FP32).is_clean


def absolute(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean distance, in whatever format the output has."""
    return (output - target.to(output.dtype)).abs().mean()


def test_a_loss_in_bf16_is_found() -> None:
    """In fp32 it is none, and losses of the operator table are in fp32."""
    data = batch(4, 5)
    model = nn.Linear(5, 3)
    (found,) = look(model, BF16, batches=data, loss_fn=absolute).findings
    assert found.check == "low-loss"
    assert "test_planted.py" in found.where
    in_fp32 = lambda output, target: absolute(output.float(), target)  # noqa: E731 -- short
    assert look(model, BF16, batches=data, loss_fn=in_fp32).is_clean
    assert look(model, BF16, batches=data).is_clean


@pytest.mark.parametrize(("target", "reachable"), [(0.29, False), (0.3, True)])
def test_label_smoothing_forbids_a_target_below_its_entropy(
    target: float, reachable: bool
) -> None:
    """0.1 over 3 classes: the entropy, 0.2911 nats, is the least loss."""
    smooth = functools.partial(functional.cross_entropy, label_smoothing=0.1)
    report = look(
        nn.Linear(5, 3),
        BF16,
        batches=batch(8, 5, classes=3),
        loss_fn=smooth,
        target_loss=target,
    )
    p = torch.tensor([1 - 0.1 + 0.1 / 3, 0.1 / 3, 0.1 / 3]).double()
    least = float(-(p * p.log()).sum())
    assert (target >= least) is reachable
    assert report.is_clean is reachable
    if not reachable:
        (found,) = report.of("smoothed-target")
        assert f"{least:.4g}" in found.figure


def test_a_target_without_smoothing_is_not_judged() -> None:
    """A plain cross entropy can reach zero."""
    report = look(
        nn.Linear(5, 3),
        BF16,
        batches=batch(8, 5, classes=3),
        loss_fn=functional.cross_entropy,
        target_loss=0.01,
    )
    assert report.is_clean


def test_a_silence_needs_a_reason_and_is_listed() -> None:
    """By check, or by check at places; what it covers is still in the report."""
    model = norm_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    pure = PURE
    reason = "a master copy is kept elsewhere"
    report = lint(model, pure, optimizer, silence={"lost-update": reason})
    assert report.is_clean
    assert {each.reason for each in report.silenced} == {reason}
    part = lint(model, pure, optimizer, silence={"lost-update@1.*": reason})
    assert {each.finding.place for each in part.silenced} == {"1.weight"}
    assert part.findings[0].place == "0.weight"
    assert "2.weight" in part.findings[0].others
    with pytest.raises(RuleError, match="needs a reason"):
        lint(model, pure, silence={"lost-update": " "})
    with pytest.raises(RuleError, match="did you mean lost-update"):
        lint(model, pure, silence={"lost-updates": reason})


def test_a_policy_file_silences_with_a_reason() -> None:
    """As where the lint is called, which has the last word; the idle one is told."""
    model = norm_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)
    policy = Policy.parse(
        PURE.to_yaml()
        + """
silences:
  - check: lost-update
    at: "1.*"
    because: norm weights stay at 1 here
  - check: low-loss
    because: the loss is tiny
"""
    )
    report = lint(model, policy, optimizer)
    (part,) = report.silenced
    assert (part.finding.place, part.key) == ("1.weight", "lost-update@1.*")
    assert part.reason == "norm weights stay at 1 here"
    assert not report.is_clean
    assert report.unused == ("low-loss",)
    said = {"lost-update@1.*": "by the caller", "lost-update": "all of it"}
    again = lint(model, policy, optimizer, silence=said)
    assert again.is_clean
    assert {each.reason for each in again.silenced} == set(said.values())
    assert lint(model, Policy.parse(policy.to_yaml()), optimizer) == report


def test_a_report_is_plain_data_and_comes_back() -> None:
    """JSON holds what was found, silenced and left unchecked."""
    report = lint(Masked(-1e9), FP16, silence={"overflowing-constant": "never in fp16"})
    again = LintReport.from_record(report.record())
    assert again == report
    assert report.unchecked
    assert "1 silenced" in report.summary()


def test_a_lint_leaves_the_model_as_it_was() -> None:
    """Weights, buffers, gradients, classes and random states."""
    model = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3), nn.Dropout(0.3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = batch(4, 5)
    random = torch.get_rng_state()
    look(model, PURE, optimizer, batches=data)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(w.grad is None for w in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)
    assert type(model[0]) is nn.Linear


def test_every_check_has_a_planted_mistake_here() -> None:
    """A check that nothing tests would not be noticed when it breaks."""
    text = Path(__file__).read_text()
    assert [check for check in CHECKS if f'"{check}"' not in text] == []
