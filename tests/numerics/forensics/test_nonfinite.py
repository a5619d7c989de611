from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from castwise.numerics.forensics import NonFiniteOperator, first_nonfinite


class Formula(nn.Module):
    """Applies a formula to its input, one module below the root."""

    def __init__(self, formula: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.formula = formula

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Apply it."""
        return self.formula(x)


def made_by(
    formula: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> NonFiniteOperator | None:
    """Run a formula forward inside of a model and blame."""
    model = nn.Sequential(nn.Identity(), Formula(formula))
    return first_nonfinite(lambda: model(x), model)


def gradient_made_by(
    formula: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor
) -> NonFiniteOperator | None:
    """Run a formula forward and backward and blame."""
    model = nn.Sequential(nn.Identity(), Formula(formula))
    leaf = x.clone().requires_grad_()
    return first_nonfinite(lambda: torch.autograd.grad(model(leaf).sum(), leaf), model)


def fp16(*values: float) -> torch.Tensor:
    """Some fp16 numbers."""
    return torch.tensor(values, dtype=torch.float16)


def test_what_is_finite_blames_nobody() -> None:
    """None, and not an operator that is nearly guilty."""
    assert made_by(torch.exp, fp16(1.0, -3.0)) is None
    assert gradient_made_by(torch.sqrt, fp16(1.0, 4.0)) is None


def test_an_overflow_names_operator_module_line_and_value() -> None:
    """The exp of 12 is no fp16 number, and is one with a wider exponent."""
    found = made_by(lambda x: torch.exp(x).sqrt(), fp16(1.0, 12.0, -3.0))
    assert found is not None
    assert (found.op, found.module, found.stage) == ("exp", "1", "forward")
    assert (found.kind, found.made, found.format) == ("overflow", "inf", "fp16")
    assert found.values == (12.0,)
    assert found.format_max == 65504.0
    assert found.is_range
    assert "test_nonfinite.py:" in found.where
    assert "overflows fp16: it made inf from 12, and" in str(found)


def test_a_product_that_mixes_numbers_tells_the_largest() -> None:
    """No single operand is to blame in a matrix product."""
    found = made_by(lambda x: x @ x.T, 300 * torch.ones(3, 7, dtype=torch.float16))
    assert found is not None
    assert (found.op, found.kind, found.values) == ("mm", "overflow", ())
    assert found.largest_input == 300.0


@pytest.mark.parametrize(
    ("formula", "x", "op", "made"),
    [
        (lambda x: x / x, (1.0, 0.0), "div", "NaN"),
        (torch.log, (2.0, 0.0), "log", "inf"),
        (torch.log, (2.0, -1.0), "log", "NaN"),
        (lambda x: x.sqrt() + 1, (-2.0, 0.0), "sqrt", "NaN"),
    ],
)
def test_arithmetic_without_an_answer_is_nan_in_every_format(
    formula: Callable[[torch.Tensor], torch.Tensor],
    x: tuple[float, ...],
    op: str,
    made: str,
) -> None:
    """0 / 0 and log 0 have no remedy in a wider exponent."""
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        found = made_by(formula, torch.tensor(x, dtype=dtype))
        assert found is not None
        assert (found.op, found.kind, found.made) == (op, "nan", made)
        assert not found.is_range


def test_an_overflow_beyond_fp64_is_still_one() -> None:
    """A sum of large terms grows past every exponent; log 0 does not."""
    found = made_by(torch.exp, torch.tensor([1000.0]))
    assert found is not None
    assert found.kind == "overflow"


def test_a_division_by_what_underflowed_is_told_from_one_by_zero() -> None:
    """1e-5 squared is 0 in fp16; named is where it became 0."""
    found = made_by(lambda x: 1 / (x * x).sqrt(), fp16(1.0, 1e-5))
    assert found is not None
    assert (found.op, found.kind) == ("reciprocal", "underflow")
    assert found.underflow is not None
    assert found.underflow.startswith("mul (fp16, ")
    assert "underflowed to 0 in mul" in str(found)
    true_zero = made_by(lambda x: 1 / (x * x).sqrt(), fp16(1.0, 0.0))
    assert true_zero is not None
    assert true_zero.kind == "nan"


def test_a_cast_that_overflows_is_the_culprit() -> None:
    """The operator before it was fine in fp32."""
    found = made_by(lambda x: (x * 2).half(), torch.tensor([60_000.0]))
    assert found is not None
    assert (found.op, found.kind, found.values) == ("cast", "overflow", (120_000.0,))


def test_a_backward_is_told_with_the_line_of_its_forward() -> None:
    """The derivative of sqrt has a pole at 0 although sqrt itself is fine."""
    found = gradient_made_by(lambda x: x.sqrt() + x, torch.tensor([4.0, 0.0]))
    assert found is not None
    assert (found.stage, found.node, found.kind) == ("backward", "sqrt", "nan")
    assert found.module == "1"
    assert "test_nonfinite.py:" in found.where
    assert "in the backward of sqrt" in str(found)


def test_gradients_that_overflow_in_the_backward_are_range() -> None:
    """A gradient of fp16 that a scale made too large."""
    found = gradient_made_by(lambda x: (x * 1000) * 1000, fp16(1.0))
    assert found is not None
    assert (found.stage, found.op, found.kind) == ("backward", "mul", "overflow")


def test_a_mask_of_infinities_is_no_fault_until_a_row_is_masked_altogether() -> None:
    """Softmax of a masked row is fine; of a row of nothing but masks it is NaN."""
    x = torch.randn(3, 5)

    def masked(mask: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda x: x.masked_fill(mask, -math.inf).softmax(-1)

    some = torch.zeros(3, 5, dtype=torch.bool)
    some[:, 2:] = True
    assert made_by(masked(some), x) is None
    some[1] = True
    found = made_by(masked(some), x)
    assert found is not None
    assert (found.op, found.made, found.inputs_finite) == ("softmax", "NaN", False)
    given = torch.zeros(3, 5)
    given[1] = -math.inf
    found = made_by(lambda x: (x + given).softmax(-1), x)
    assert found is not None
    assert found.op == "softmax"


def test_the_origin_is_found_behind_what_follows_from_it() -> None:
    """An overflow that layer norm turns into NaN is still the overflow's fault."""
    model = nn.Sequential(nn.Linear(3, 5), Formula(lambda x: x * 1e30 * 1e30))
    model.append(nn.LayerNorm(5))
    x = torch.ones(2, 3)
    found = first_nonfinite(lambda: model(x).sum(), model)
    assert found is not None
    assert (found.op, found.module, found.kind) == ("mul", "1", "overflow")


def test_an_infinity_that_reaches_no_result_is_left_alone() -> None:
    """The first one in time is not the one that matters."""

    def formula(x: torch.Tensor) -> torch.Tensor:
        torch.log(0 * x)
        return x / (x - x)

    found = made_by(formula, torch.ones(3))
    assert found is not None
    assert found.op == "div"


def test_a_poisoned_weight_is_named() -> None:
    """The operator is innocent: what it was fed was not finite."""
    model = nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 2))
    with torch.no_grad():
        model[1].bias[1] = math.nan
    found = first_nonfinite(lambda: model(torch.ones(2, 3)), model)
    assert found is not None
    assert found.source == "the weight 1.bias"
    assert not found.inputs_finite
    assert "what the weight 1.bias held" in str(found)


def test_operators_in_place_are_judged_by_what_they_overwrote() -> None:
    """`x *= c` overflows although afterwards its input is infinite as well."""

    def formula(x: torch.Tensor) -> torch.Tensor:
        y = x.clone()
        y.mul_(1000.0)
        return y

    found = made_by(formula, fp16(100.0))
    assert found is not None
    assert (found.op, found.kind, found.inputs_finite) == ("mul", "overflow", True)


def test_memory_that_was_never_written_is_nobodys_fault() -> None:
    """What empty returns may read as NaN."""

    def formula(x: torch.Tensor) -> torch.Tensor:
        y = torch.empty_like(x)
        y.copy_(x)
        return y + 1

    freed = torch.full((4097,), math.nan)
    del freed
    assert made_by(formula, torch.ones(4097)) is None


def test_a_backward_inside_of_the_callable_is_judged_by_the_gradients() -> None:
    """A loop that calls backward itself needs to return nothing."""
    model = nn.Sequential(nn.Linear(3, 1, bias=False))
    x = torch.zeros(2, 3)
    found = first_nonfinite(lambda: model(x).abs().sqrt().sum().backward(), model)
    assert found is not None
    assert (found.stage, found.node) == ("backward", "sqrt")


def test_recomputed_modules_are_seen() -> None:
    """A checkpointed block overflows in its first forward already."""
    block = Formula(lambda x: torch.exp(x * 20))
    model = nn.Sequential(nn.Linear(2, 2), block)
    nn.init.eye_(model[0].weight)

    def run() -> object:
        y = checkpoint(block, model[0](torch.full((1, 2), 9.0)), use_reentrant=False)
        return torch.autograd.grad(y.sum(), tuple(model.parameters()))

    found = first_nonfinite(run, model)
    assert found is not None
    assert (found.op, found.module, found.stage) == ("exp", "1", "forward")


def test_attention_in_bf16_and_embeddings_run_under_the_watch() -> None:
    """Fused kernels with several results, sparse and integer inputs do no harm."""
    model = nn.Sequential(
        nn.Embedding(11, 8), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    ).bfloat16()
    tokens = torch.arange(10).reshape(2, 5)

    def run() -> object:
        out = model(tokens).float()
        loss = functional.cross_entropy(out.flatten(0, 1), tokens.flatten() % 8)
        return torch.autograd.grad(loss, tuple(model.parameters()))

    assert first_nonfinite(run, model) is None
    with torch.no_grad():
        model[1].norm1.weight.fill_(3e38)
    found = first_nonfinite(run, model)
    assert found is not None
    assert found.module is not None
    assert found.module.startswith("1")
