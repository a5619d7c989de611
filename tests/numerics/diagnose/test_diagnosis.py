from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from castwise.errors import TargetError
from castwise.numerics.diagnose import Diagnosis, diagnose
from castwise.policy import Policy, preset

STORIES = Path(__file__).parents[3] / "examples" / "failure_stories.py"
LOW = Policy.parse("castwise: 1\nname: low\ndefault: p=bf16,c=bf16,o=bf16,r=fp32\n")


@pytest.fixture(scope="module")
def stories() -> Any:
    """The example file with the two failures that were misread."""
    spec = importlib.util.spec_from_file_location("failure_stories", STORIES)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def line_of(found: Diagnosis, text: str) -> bool:
    """Whether the line to blame, in this file, contains a text."""
    file, _, number = (found.where or "").rpartition(":")
    return text in Path(file).read_text().splitlines()[int(number) - 1]


def test_plain_cg_on_a_skew_system_is_the_algorithm(stories: Any) -> None:
    """Float64 leaves unit norm by nine orders as well, and iterations make it worse."""
    model, batches, deviation = stories.unitary_steps(width=64)
    found = diagnose(
        model,
        batches,
        deviation,
        preset("bf16-mixed"),
        limit=1e-2,
        iterations={n: stories.unitary_steps(n, width=64)[0] for n in (3, 8)},
    )
    assert found.cause == "algorithm"
    rows = {each.what: each.measure for each in found.evidence}
    for fmt in ("fp64", "fp32"):
        assert rows[fmt] > 1e8
    assert rows["fp64"] == pytest.approx(rows["fp32"], rel=1e-2)
    assert "more iterations make it worse" in found.because
    assert "no format helps" in found.because


def test_unitary_steps_that_are_solved_rightly_are_sound(stories: Any) -> None:
    """The same model with a solver of the right kind: nothing to find."""
    model, batches, deviation = stories.unitary_steps(width=64)

    def solve(right: torch.Tensor) -> torch.Tensor:
        matrix = torch.eye(64) + 1j * model.half_step * model.hamiltonian
        psi = torch.complex(right[:, 0], right[:, 1])
        out = torch.linalg.solve(matrix.mT.to(psi.dtype), psi, left=False)
        return torch.stack([out.real, out.imag], 1)

    model.solve = solve
    found = diagnose(model, batches, deviation, limit=1e-2, tolerance=1e-3)
    assert found.evidence[0].measure < 1e-9
    assert found.cause in {"none", "rounding"}  # the deviation itself is 1e-7 of 0


@pytest.mark.parametrize(
    ("dtype", "num_sites", "low", "high"),
    [
        (torch.float32, 128, 105, 128),
        pytest.param(torch.float64, 1024, 900, 985, marks=pytest.mark.slow),
    ],
)
def test_products_of_determinants_are_range_at_the_index_where_they_overflow(
    stories: Any, dtype: torch.dtype, num_sites: int, low: int, high: int
) -> None:
    """Near site 115 in complex64, near 950 in complex128, though all is masked."""
    model, batches, _ = stories.determinants(num_sites)
    found = diagnose(model.forward, [(batches[0][0].to(dtype),)])
    assert found.cause == "range"
    assert found.op in {"mul", "sub"}
    assert low <= (found.blame.call or 0) <= high
    assert (
        ".append(a[..., "
        in Path(STORIES)
        .read_text()
        .splitlines()[int((found.where or "0:0").rpartition(":")[2]) - 1]
    )
    assert "rescale" in found.remedy


def test_determinants_of_a_short_chain_are_sound(stories: Any) -> None:
    """At 64 sites nothing overflows."""
    model, batches, _ = stories.determinants(64)
    assert diagnose(model.forward, [(batches[0][0],)], tolerance=1e-3).is_sound


def masked_softmax(scores: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """Attention weights with a mask constant that bf16 holds and fp16 does not."""
    return (scores + hidden.to(scores.dtype) * -1e9).softmax(-1)


def test_a_mask_constant_that_overflows_fp16_is_range() -> None:
    """-1e9 is -inf in fp16, and a row that is masked altogether is NaN."""
    scores, hidden = torch.randn(5, 7).half(), torch.zeros(5, 7, dtype=torch.bool)
    hidden[2], hidden[0, 3:] = True, True
    found = diagnose(masked_softmax, [(scores, hidden)])
    assert found.cause == "range"
    assert found.op == "mul"
    assert line_of(found, "-1e9")
    assert "torch.finfo" in found.remedy
    hidden[2] = False
    for narrow in (scores, scores.bfloat16()):
        assert diagnose(masked_softmax, [(narrow, hidden)]).is_sound


def test_a_number_that_pytorch_refuses_is_range() -> None:
    """masked_fill says so itself."""

    def fill(scores: torch.Tensor) -> torch.Tensor:
        return scores.masked_fill(scores > 0, -1e9).softmax(-1)

    found = diagnose(fill, [(torch.randn(5, 7).half(),)])
    assert found.cause == "range"
    assert "without overflow" in found.because
    assert line_of(found, "masked_fill")


def test_a_layer_norm_of_a_large_mean_in_bf16_is_rounding() -> None:
    """300 + noise has two digits of the noise left in bf16."""
    model = nn.Sequential(nn.LayerNorm(33), nn.Linear(33, 5))
    policy = Policy.parse(
        "castwise: 1\nname: norms-low\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n"
        "rules: [{op: layer_norm, category: low}]\n"
    )
    x = 300 + torch.randn(9, 33)
    found = diagnose(model, [(x, torch.randn(9, 5))], functional.mse_loss, policy)
    assert found.cause == "rounding"
    assert found.op in {"native_layer_norm", "layer_norm"}
    assert found.module == "0"
    small = [(x - 300, torch.randn(9, 5))]
    assert diagnose(model, small, functional.mse_loss, policy).is_sound


def test_a_bf16_weight_that_does_not_move_is_rounding_of_the_update() -> None:
    """Steps of 1e-4 from weights of order one are below half a unit of bf16."""
    torch.manual_seed(0)
    model = nn.Linear(33, 5)
    nn.init.uniform_(model.weight, 0.5, 1.0)
    batch = torch.randn(9, 33), torch.randn(9, 5)
    sgd = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    found = diagnose(
        model, [batch], functional.mse_loss, LOW, optimizer=sgd, tolerance=0.2
    )
    assert found.cause == "rounding"
    assert (found.op, found.blame.stage) == ("update", "update")
    assert found.blame.tensor == "weight"
    assert "hold_weights" in found.remedy
    fast = torch.optim.AdamW(model.parameters(), lr=1e-1, weight_decay=0)
    assert diagnose(
        model, [batch], functional.mse_loss, LOW, optimizer=fast, tolerance=0.2
    ).is_sound


def test_a_gradient_that_underflows_fp16_is_range_and_names_the_loss_scale() -> None:
    """Gradients of 1e-8 are zero in fp16; a loss scale brings them back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 15), nn.Tanh(), nn.Linear(15, 5))
    batch = torch.randn(9, 33), torch.randn(9, 5)
    policy = Policy.parse(
        "castwise: 1\nname: unscaled\nloss_scale: none\n"
        "default: p=fp32,c=fp16,o=fp16,r=fp32\n"
    )

    def tiny(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return functional.mse_loss(output.float(), target) * 1e-7

    found = diagnose(model, [batch], tiny, policy)
    assert found.cause == "range"
    assert found.blame.stage == "backward"
    assert "loss scale" in found.remedy
    assert diagnose(model, [batch], tiny, preset("16-mixed")).is_sound
    assert diagnose(model, [batch], tiny, preset("bf16-mixed")).is_sound


def test_digits_that_fp16_does_not_have_are_rounding_at_any_loss_scale() -> None:
    """The emulation overflows at the scale of the candidate; that does not mislead."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(33, 15), nn.Tanh(), nn.Linear(15, 5))
    batch = torch.randn(9, 33), 1000 * torch.randn(9, 5)
    found = diagnose(
        model, [batch], functional.mse_loss, preset("16-mixed"), tolerance=1e-5
    )
    assert found.cause == "rounding"


def normalised(x: torch.Tensor) -> torch.Tensor:
    """Divide by a norm that may be zero."""
    return x / x.norm(dim=-1, keepdim=True)


def test_zero_over_zero_is_the_algorithm_with_its_line() -> None:
    """No format has an answer; the line is named."""
    x = torch.randn(5, 7)
    x[3] = 0
    found = diagnose(normalised, [(x,)])
    assert found.cause == "algorithm"
    assert found.op == "div"
    assert line_of(found, "x / x.norm")


def test_zero_over_zero_in_a_model_is_the_algorithm_in_its_module() -> None:
    """Under a policy as well, with a backward."""

    class Norm(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return normalised(x)

    model = nn.Sequential(nn.Linear(7, 7, bias=False), Norm())
    x = torch.randn(5, 7)
    x[3] = 0
    found = diagnose(
        model, [(x, torch.randn(5, 7))], functional.mse_loss, preset("bf16-mixed")
    )
    assert (found.cause, found.module) == ("algorithm", "1")


class Rotary(nn.Module):
    """Rotary embedding as models have it, with its table in a buffer."""

    def __init__(self) -> None:
        super().__init__()
        powers = torch.arange(0, 32, 2) / 32
        self.register_buffer("inv_freq", 10000.0**-powers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Turn pairs by position times frequency, in fp32."""
        at = torch.arange(x.shape[1], device=x.device)
        angle = at[:, None].float() * self.inv_freq.float()
        a, b = x.float().chunk(2, -1)
        cos, sin = angle.cos(), angle.sin()
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        return turned.to(x.dtype)


def test_a_rotary_table_cast_to_bf16_is_rounding_of_that_buffer() -> None:
    """By a policy that names buffers, and by a cast of the whole model."""
    model = nn.Sequential(nn.Linear(32, 32), Rotary())
    batch = torch.randn(1, 4095, 32), torch.randn(1, 4095, 32)
    policy = Policy.parse(
        "castwise: 1\nname: buffers-low\ndefault: p=fp32,c=bf16,o=bf16,r=fp32\n"
        "rules: [{type: Buffer, precision: p=bf16}]\n"
    )
    found = diagnose(model, [batch], functional.mse_loss, policy)
    assert found.cause == "rounding"
    assert found.blame.tensor == "1.inv_freq"
    assert diagnose(model, [batch], functional.mse_loss, preset("bf16-mixed")).is_sound
    cast = nn.Sequential(nn.Linear(32, 32), Rotary())
    cast.load_state_dict(model.state_dict())
    cast = cast.bfloat16()
    low = batch[0].bfloat16(), batch[1].bfloat16()
    found = diagnose(cast, [low], functional.mse_loss, reference=model)
    assert (found.cause, found.blame.tensor) == ("rounding", "1.inv_freq")


def test_a_batch_with_an_infinity_is_data() -> None:
    """The place in the batches is named."""
    model = nn.Linear(7, 3)
    good = torch.randn(5, 7), torch.randn(5, 3)
    bad = torch.randn(5, 7), torch.randn(5, 3)
    bad[0][2, 1] = torch.inf
    found = diagnose(model, [good, bad], functional.mse_loss, preset("bf16-mixed"))
    assert found.cause == "data"
    assert (found.where or "").startswith("batches[1][0]")


def test_a_mask_of_infinities_in_a_batch_is_no_bad_data() -> None:
    """Float64 is finite with it, so it is meant."""

    def attend(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        return (scores + mask).softmax(-1)

    mask = torch.zeros(5, 7)
    mask[:, 4:] = -torch.inf
    assert diagnose(attend, [(torch.randn(5, 7), mask)]).is_sound


def test_a_model_that_draws_from_the_system_is_nondeterministic() -> None:
    """Equal random states, different results; dropout alone is none of that."""
    source = torch.Generator().manual_seed(0)

    def noisy(x: torch.Tensor) -> torch.Tensor:
        return x + torch.randn(x.shape, generator=source)

    assert diagnose(noisy, [(torch.randn(5, 7),)]).cause == "nondeterminism"
    model = nn.Sequential(nn.Linear(7, 33), nn.Dropout(0.5), nn.Linear(33, 3))
    batch = torch.randn(5, 7), torch.randn(5, 3)
    assert diagnose(model, [batch], functional.mse_loss, preset("bf16-mixed")).is_sound


def test_a_function_that_computes_something_else_is_the_algorithm() -> None:
    """Float64 does not agree with the reference."""
    x = torch.randn(9, 9)
    found = diagnose(torch.tanh, [(x,)], reference=lambda x: x - x**3 / 3)
    assert found.cause == "algorithm"
    assert "against the reference" in found.because
    assert diagnose(
        torch.tanh, [(x,)], reference=lambda x: 2 * torch.sigmoid(2 * x) - 1
    ).is_sound


def test_the_model_is_afterwards_what_it_was() -> None:
    """A diagnosis of a policy and an optimizer leaves no trace."""
    model = nn.Linear(33, 5)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    batch = torch.randn(9, 33), torch.randn(9, 5)
    diagnose(model, [batch], functional.mse_loss, LOW, optimizer=optimizer)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(w.dtype == torch.float32 and w.grad is None for w in model.parameters())
    assert not optimizer.state


def test_a_record_is_plain() -> None:
    """JSON holds cause, blame and evidence."""
    x = torch.randn(5, 7)
    x[3] = 0
    record = json.loads(json.dumps(diagnose(normalised, [(x,)]).record()))
    assert record["cause"] == "algorithm"
    assert record["blame"]["op"] == "div"
    assert record["evidence"][0]["what"] == "fp64"


def test_mistakes_are_told_in_one_sentence() -> None:
    """No batches, a policy without a module, a measure without its limit."""
    x = torch.randn(3)
    with pytest.raises(TargetError, match="at least 1 batch"):
        diagnose(torch.tanh, [])
    with pytest.raises(TargetError, match="tuples of its arguments, got a Tensor"):
        diagnose(torch.tanh, [x])
    with pytest.raises(TargetError, match="a policy needs a module"):
        diagnose(torch.tanh, [(x,)], policy=LOW)
    with pytest.raises(TargetError, match="a measure needs a limit"):
        diagnose(torch.tanh, [(x,)], measure=lambda o, _: o.sum())
    with pytest.raises(
        TargetError, match=r"raised: .*size.* at .*test_diagnosis.py:\d+"
    ):
        diagnose(lambda x: x @ x[:2], [(x,)])
