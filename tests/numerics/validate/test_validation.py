from __future__ import annotations

import json
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional

from castwise.errors import BudgetError, SettingsError, TargetError
from castwise.layers import reference
from castwise.layers.resolvent import resolvent_diagonal
from castwise.numerics.validate import validate
from castwise.numerics.validate.plain_function import validate_function
from castwise.numerics.validate.resolvent_accuracy import (
    validate_mixed_precision_accuracy,
)
from castwise.policy import Policy, preset

BF16 = preset("bf16-mixed")


class Block(nn.Module):
    """A transformer's block of odd width, with dropout."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(2 * width, width),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend, then the rest."""
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        x = x + self.out((q @ k.mT / 4).softmax(-1) @ v)
        return x + self.mlp(x)


class Model(nn.Module):
    """Two blocks and a head."""

    def __init__(self, width: int = 15) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.norm = nn.BatchNorm1d(7)
        self.head = nn.Linear(width, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Block by block."""
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def batches(num: int = 2) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of odd sizes."""
    torch.manual_seed(1)
    return [(torch.randn(3, 7, 15), torch.randn(3, 7, 5)) for _ in range(num)]


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "bf16-true", "32-true"])
def test_a_good_policy_holds(name: str) -> None:
    """With dropout, batch norm and a loss scale where the policy needs one."""
    found = validate(
        Model(), batches(), functional.mse_loss, preset(name), seeds=(0, 5)
    )
    assert found.check() is found
    assert [each.name for each in found.results] == [
        "output",
        "weight gradients",
        "input gradients",
    ]
    output = found.results[0]
    assert 0 < output.floor.relative < 1e-6
    if name != "32-true":
        assert output.measures.relative > 100 * output.floor.relative
    assert found.scale == (65536 if name == "16-mixed" else 1)
    assert {each.module for each in found.modules} == {
        n for n, _ in Model().named_modules()
    }


def test_dropout_drops_the_same_in_all_runs() -> None:
    """Otherwise the error would be that of another mask, of order one."""
    model = nn.Sequential(nn.Linear(15, 63), nn.Dropout(0.5), nn.Linear(63, 5))
    found = validate(model, batches(1), functional.mse_loss, BF16, seeds=(1, 2, 3))
    assert found.check().results[0].measures.relative < 0.02


def test_the_model_is_afterwards_what_it_was() -> None:
    """Weights, gradients, buffers, random states and classes."""
    model = Model()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    data = batches(1)
    state = torch.get_rng_state()
    validate(model, data, functional.mse_loss, preset("bf16-true"))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert all(w.dtype == torch.float32 and w.grad is None for w in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert type(model) is Model


class Delicate(nn.Module):
    """A difference of nearly equal numbers between two layers that do nothing wrong."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(15, 15)
        self.cancels = Cancels()
        self.after = nn.Linear(15, 15)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """One after the other."""
        return self.after(self.cancels(self.before(x)))


class Cancels(nn.Module):
    """Loses in bf16 what fp32 still has."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add a lot, take it away."""
        return (x + 500.0) - 500.0


def test_what_was_fed_wrong_inputs_is_not_blamed() -> None:
    """The module that cancels is at fault, the one after it inherits the error."""
    low = Policy.parse(
        "castwise: 1\nname: low\ndefault: p=bf16,c=bf16,o=bf16,r=fp32\n"
        "rules: [{op: add, category: low}, {op: sub, category: low}]\n"
    )
    x = torch.randn(9, 15)
    found = validate(Delicate(), [(x, torch.randn(9, 15))], functional.mse_loss, low)
    states = {each.module: each.state for each in found.modules}
    assert not found.holds
    assert states["cancels"] == "own"
    assert states["after"] == "inherited"
    assert states["before"] in {"holds", "inherited"}  # its gradient comes from behind
    blamed = found.blamed()
    assert blamed[0].module == "cancels"
    assert blamed[0].basis == "reference"
    assert "test_validation.py" in blamed[0].where
    with pytest.raises(
        BudgetError, match=r"broken.*\n.*output .* of 6\.\de-02"
    ) as error:
        found.check()
    assert "operator cancels: sub in forward" in str(error.value)


class CancelsWhatIsLarge(nn.Module):
    """Harmless on small inputs."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Add a lot where the input is large, take it away."""
        far = 1e5 * (x.abs().amax() > 50)
        return (x + far) - far


def test_operators_are_tried_again_where_another_batch_puts_a_module_off() -> None:
    """Once on the first batch; on a later one only if it has something new to tell."""
    low = Policy.parse(
        "castwise: 1\ndefault: p=bf16,c=bf16,o=bf16,r=fp32\n"
        "rules: [{op: add, category: low}, {op: sub, category: low}]\n"
    )
    model = Delicate()
    model.cancels = CancelsWhatIsLarge()
    x, wanted = torch.randn(9, 15), torch.randn(9, 15)
    calm, wild = (x, wanted), (1000 * x, wanted)

    def subtractions(*batches: tuple[torch.Tensor, torch.Tensor]) -> tuple[int, bool]:
        found = validate(model, batches, functional.mse_loss, low)
        tried = [
            each
            for each in found.operators
            if (each.op, each.stage) == ("sub", "forward")
        ]
        verdict = next(each for each in found.modules if each.module == "cancels")
        return sum(each.num_calls for each in tried), verdict.state == "own"

    assert subtractions(calm, calm, calm) == (1, False)
    assert subtractions(calm, wild, wild, calm) == (2, True)
    assert subtractions(wild, calm, wild) == (1, True)


def test_a_reference_that_is_the_candidate_is_no_reference() -> None:
    """In float64 both compute the same bits: nothing was compared, and that fails."""
    found = validate(Model(), batches(1), functional.mse_loss, preset("64-true"))
    assert not found.compared
    assert not found.holds
    assert found.summary() == "validation of 64-true broken: nothing was compared"
    with pytest.raises(BudgetError, match="agree in every bit"):
        found.check()


def test_another_algorithm_may_be_the_reference() -> None:
    """A model that computes something else than the reference fails in fp32."""
    model = nn.Linear(15, 5)

    def right(x: torch.Tensor) -> torch.Tensor:
        return x @ model.weight.double().T + model.bias.double()

    def wrong(x: torch.Tensor) -> torch.Tensor:
        return right(x) * 1.001

    data = [(torch.randn(9, 15), torch.randn(9, 5))]
    policy = preset("32-true")
    assert validate(model, data, functional.mse_loss, policy, reference=right).holds
    assert not validate(model, data, functional.mse_loss, policy, reference=wrong).holds


def test_a_record_is_plain_and_a_verdict_goes_with_it() -> None:
    """JSON holds everything that was found."""
    found = validate(Model(), batches(1), functional.mse_loss, BF16)
    record = json.loads(json.dumps(found.record()))
    assert record["holds"] is True
    assert record["faults"] == []
    assert record["rule"] == {"k": 1.5, "tolerance": 0.0625}
    assert len(record["modules"]) == len(found.modules)
    assert {each["stage"] for each in record["operators"]} == {"forward", "backward"}


def test_formats_named_by_hand_are_told() -> None:
    """The reference widened them; whoever reads the verdict should know."""

    class Casts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).to(torch.float32)

    found = validate(Casts(15, 5), batches(1), functional.mse_loss, BF16)
    assert len(found.lifted) == 1
    assert "test_validation.py" in found.lifted[0]
    assert found.lifted[0].endswith("to names fp32")


@torch.library.custom_op("validated::no_fp32", mutates_args=())
def no_fp32(x: torch.Tensor) -> torch.Tensor:
    """Copy bf16 and fp64; there is no kernel for fp32."""
    if x.dtype is torch.float32:
        # The test below needs an operator that lacks a kernel, as some of PyTorch's do.
        raise NotImplementedError("no kernel for fp32")  # what those raise
    return x.clone()


no_fp32.register_autograd(lambda _ctx, gradient: gradient)


class Picky(nn.Module):
    """A product, and an operator that has no fp32 form."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(5, 7)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """In whatever wide or low format comes."""
        lifted = self.lift(x)
        if lifted.dtype is torch.float32:  # the run that takes the floor
            return lifted
        out: torch.Tensor = no_fp32(lifted)
        return out


def test_an_operator_that_cannot_be_tried_alone_is_told() -> None:
    """It has no error of its own, and the report must not look as if it had."""
    batch = torch.randn(3, 5), torch.randn(3, 7)
    policy = preset("bf16-mixed")
    found = validate(
        Picky(), [batch], lambda y, t: (y.float() - t).pow(2).mean(), policy
    )
    assert found.untried == ("validated::no_fp32",)
    assert "not tried alone: validated::no_fp32" in found.summary()
    assert "validated::no_fp32" not in {each.op for each in found.operators}
    assert found.record()["untried"] == ("validated::no_fp32",)


def test_mistakes_are_told_in_one_sentence() -> None:
    """No batch, no seed, a loss without gradient, a bad tolerance."""
    model, data = Model(), batches(1)
    with pytest.raises(TargetError, match="at least 1 batches, got 0"):
        validate(model, [], functional.mse_loss, BF16)
    with pytest.raises(SettingsError, match="at least one seed"):
        validate(model, data, functional.mse_loss, BF16, seeds=())
    with pytest.raises(TargetError, match="depends on the weights, got no gradient"):
        validate(model, data, lambda o, _: o.detach().sum(), BF16)
    with pytest.raises(BudgetError, match="tolerance is a finite number"):
        validate(model, data, functional.mse_loss, BF16, tolerance=math.inf)


def test_a_model_that_fails_by_itself_is_not_blamed_on_float64() -> None:
    """What it raises anyway is told, with its line."""

    class Broken(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x[..., :3])

    with pytest.raises(
        TargetError, match=r"the model raised at .*test_validation.py:\d+"
    ):
        validate(Broken(15, 5), batches(1), functional.mse_loss, BF16)


def test_a_compiled_model_is_validated_eagerly() -> None:
    """Names of modules are those of the model."""
    compiled = torch.compile(nn.Sequential(nn.Linear(15, 5)), backend="aot_eager")
    found = validate(compiled, batches(1), functional.mse_loss, BF16)
    assert [each.module for each in found.check().modules] == ["", "0"]


# Functions: the resolvent diagonal against the dense inverse.


def chain(num_sites: int = 33) -> tuple[torch.Tensor, ...]:
    """A chain with a gradient that is neither real nor symmetric."""
    generator = torch.Generator().manual_seed(3)
    d = 2 * torch.randn(2, num_sites, generator=generator)
    b = 0.5 + torch.rand(num_sites - 1, generator=generator)
    c = 0.5 + torch.rand(num_sites - 1, generator=generator)
    return d, b, c, torch.tensor(0.3 + 1j)


def theta_phi(
    d: torch.Tensor, b: torch.Tensor, c: torch.Tensor, z: torch.Tensor
) -> torch.Tensor:
    """The textbook recursion without scaling; what overflowed is set to zero."""
    a, k, num_sites = d - z, b * c, d.shape[-1]
    one = torch.ones_like(a[..., 0])
    theta, phi = [one, a[..., 0]], [one, a[..., -1]]
    for i in range(1, num_sites):
        theta.append(a[..., i] * theta[i] - k[..., i - 1] * theta[i - 1])
    for i in range(num_sites - 2, -1, -1):
        phi.append(a[..., i] * phi[-1] - k[..., i] * phi[-2])
    phi = phi[:num_sites][::-1]
    out = torch.stack([t * p / theta[-1] for t, p in zip(theta, phi, strict=False)], -1)
    return torch.where(torch.isfinite(out), out, torch.zeros_like(out))


def _zero(*chain: torch.Tensor) -> torch.Tensor:
    return resolvent_diagonal(*chain) * 0


def _permuted(*chain: torch.Tensor) -> torch.Tensor:
    return resolvent_diagonal(*chain).roll(1, -1)


def _scaled(*chain: torch.Tensor) -> torch.Tensor:
    return resolvent_diagonal(*chain) * (1 + 1e-3)


class _WrongSign(torch.autograd.Function):
    @staticmethod
    def forward(
        _: torch.autograd.function.FunctionCtx, x: torch.Tensor
    ) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(
        _: torch.autograd.function.FunctionCtx, gradient: torch.Tensor
    ) -> torch.Tensor:
        return gradient.conj()


def _wrong_gradient(*chain: torch.Tensor) -> torch.Tensor:
    return _WrongSign.apply(resolvent_diagonal(*chain))


def _without_gradient(*chain: torch.Tensor) -> torch.Tensor:
    return resolvent_diagonal(*chain).detach()


def test_a_right_function_holds() -> None:
    """Output and all four gradients, in fp32."""
    found = validate_function(
        resolvent_diagonal, reference.resolvent_diagonal, [chain()], seeds=(0, 1)
    )
    assert found.check().results[1].name == "input gradients"
    assert found.results[1].measures.cosine == pytest.approx(1)


@pytest.mark.parametrize(
    ("wrong", "result", "least"),
    [
        (_zero, "output", 0.999),
        (_permuted, "output", 0.5),
        (_scaled, "output", 9e-4),
        (_wrong_gradient, "input gradients", 0.5),
        (_without_gradient, "input gradients", 0.999),
    ],
)
def test_validation_fails_on_what_is_wrong(
    wrong: Callable[..., torch.Tensor], result: str, least: float
) -> None:
    """Zeros, a permutation, one part in a thousand, a conjugate that is missing."""
    found = validate_function(wrong, reference.resolvent_diagonal, [chain()])
    off = {each.name: each for each in found.results if not each.holds}
    assert off[result].measures.relative >= least
    if "gradient" in wrong.__name__:
        assert "output" not in off
    with pytest.raises(BudgetError, match=result):
        found.check()


def test_validation_fails_on_an_overflowed_recursion() -> None:
    """At 33 sites theta and phi are right; at 128 they overflowed and all is zero."""
    short = validate_function(
        theta_phi, reference.resolvent_diagonal, [chain()], gradient=False
    )
    assert short.holds
    long = validate_function(
        theta_phi, reference.resolvent_diagonal, [chain(128)], gradient=False
    )
    output = long.results[0]
    assert not long.holds
    assert output.measures.relative == pytest.approx(1)
    assert output.measures.zero > 0.8
    assert output.measures.reference_zero == 0


def test_a_function_that_is_secretly_the_reference_compares_nothing() -> None:
    """Whether it calls it as it is, or in float64 with a cast behind."""

    def secretly(*chain: torch.Tensor) -> torch.Tensor:
        return reference.resolvent_diagonal(*chain).to(torch.complex64)

    for same in (reference.resolvent_diagonal, secretly):
        found = validate_function(same, reference.resolvent_diagonal, [chain()])
        assert not found.compared
        assert not found.holds
        assert "nothing was compared" in found.summary()


def test_the_accuracy_of_the_resolvent_is_told_honestly() -> None:
    """The earlier keys, now with a reference that is another algorithm."""
    found = validate_mixed_precision_accuracy(2, 31, 3)
    assert found["passed"], found["because"]
    assert 0 < found["max_error_max"] < 1e-6
    for key in ("max_error", "relative_error"):
        assert found[f"{key}_max"] >= found[f"{key}_mean"] > 0
        assert found[f"{key}_std"] >= 0
    assert 0 < found["gradient_error_max"] < 1e-5
    assert found["threshold"] == 1e-4
    assert found["share_zero"] == found["share_nonfinite"] == 0
    assert not math.isnan(validate_mixed_precision_accuracy(1, 5, 1)["max_error_std"])


@pytest.mark.parametrize("wrong", [_zero, _permuted, _scaled, _wrong_gradient])
def test_the_accuracy_of_a_wrong_resolvent_does_not_pass(
    wrong: Callable[..., torch.Tensor],
) -> None:
    """The function of this name that came before passed all of these."""
    found = validate_mixed_precision_accuracy(2, 31, 2, candidate=wrong)
    assert not found["passed"]
    assert found["because"]
    overflowed = validate_mixed_precision_accuracy(2, 128, 1, candidate=theta_phi)
    assert not overflowed["passed"]
    assert overflowed["relative_error_max"] == pytest.approx(1)


def test_a_function_that_raises_is_named_with_its_line() -> None:
    """And so are structures that do not fit."""

    def raises(x: torch.Tensor) -> torch.Tensor:
        return x @ x[:3]

    def other(x: torch.Tensor) -> torch.Tensor:
        return x[:3]

    x = torch.randn(5, 5)
    with pytest.raises(
        TargetError, match=r"candidate raises raised at .*test_validation"
    ):
        validate_function(raises, other, [(x,)])
    with pytest.raises(TargetError, match=r"same shapes, got \(5, 5\) and \(3, 5\)"):
        validate_function(torch.tanh, other, [(x,)])
    with pytest.raises(TargetError, match="needs inputs"):
        validate_function(torch.tanh, other, [])
    with pytest.raises(SettingsError, match="seq_len is at least 1"):
        validate_mixed_precision_accuracy(1, 0, 1)
