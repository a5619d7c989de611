from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from castwise.islands import apply_policy, module_facts
from castwise.islands.products import ProductsHold, products_now
from castwise.policy import Policy

IEEE = ("ieee",) * 3
FAST = ("bf16", "none", "none")
mkldnn: Any = torch.backends.mkldnn
cuda: Any = torch.backends.cuda
cudnn: Any = torch.backends.cudnn


@pytest.fixture(autouse=True)
def fast_products() -> Iterator[None]:
    """A user who lets oneDNN round fp32 products to bf16; put back afterwards."""
    torch.manual_seed(0)
    mkldnn.matmul.fp32_precision = "bf16"
    yield
    assert products_now("cpu") == FAST, "an island left the switches changed"
    mkldnn.matmul.fp32_precision = "none"


class Watch(torch.autograd.Function):
    """Hands its input on; notes the switches in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, notes: list[Any]) -> torch.Tensor:
        """Note the switches of the forward."""
        ctx.notes = notes
        notes.append(("forward", products_now("cpu")))
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Note the switches of the backward."""
        ctx.notes.append(("backward", products_now("cpu")))
        return gradients[0], None


class Watched(nn.Module):
    """A product with a watch on each side; `fails` says where it dies."""

    def __init__(self, fails: str = "") -> None:
        super().__init__()
        self.linear = nn.Linear(5, 5)
        self.notes: list[Any] = []
        self.fails = fails

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Watch, product, watch."""
        y: torch.Tensor = Watch.apply(
            self.linear(Watch.apply(x, self.notes)), self.notes
        )
        if self.fails == "forward":
            raise ZeroDivisionError
        if self.fails == "backward":
            y.register_hook(lambda _: 1 / 0)
        return y


def watched_model(fails: str = "", precision: str = "c=fp32") -> nn.Sequential:
    """Watched outside, watched island, watched outside."""
    model = nn.Sequential(Watched(), Watched(fails), Watched())
    policy = Policy(name="test").with_default("p=fp32,c=bf16,o=bf16,r=fp32")
    policy = policy.with_rule(module="1", precision=precision)
    apply_policy(model, policy.bind(module_facts(model)), "cpu")
    return model


def run(model: nn.Module) -> torch.Tensor:
    """Forward in bf16."""
    with torch.autocast("cpu", torch.bfloat16):
        out: torch.Tensor = model(torch.randn(3, 5))
    return out.float().sum()


def test_products_are_ieee_inside_and_fast_outside_in_forward_and_backward() -> None:
    """Whatever the global switches say; the neighbours keep what the user chose."""
    model = watched_model()
    run(model).backward()
    assert set(model[1].notes) == {("forward", IEEE), ("backward", IEEE)}
    for neighbour in (model[0], model[2]):
        assert set(neighbour.notes) == {("forward", FAST), ("backward", FAST)}


def test_switches_turned_after_the_forward_do_not_reach_the_backward() -> None:
    """Only the backward sees the change, and it is still IEEE."""
    mkldnn.matmul.fp32_precision = "none"
    model = watched_model()
    loss = run(model)
    mkldnn.matmul.fp32_precision = "bf16"
    loss.backward()
    assert ("backward", IEEE) in model[1].notes
    assert ("backward", FAST) in model[0].notes


def test_an_island_whose_inputs_need_no_gradient_gives_the_switches_back() -> None:
    """There is no border to leave at; the end of the backward does it."""
    model = nn.Sequential(Watched())
    policy = Policy(name="test").with_rule(module="0", precision="c=fp32,o=bf16")
    apply_policy(model, policy.bind(module_facts(model)), "cpu")
    run(model).backward()
    assert ("backward", IEEE) in model[0].notes


def test_a_backward_of_its_own_in_fp32_is_ieee_in_both_of_its_passes() -> None:
    """The forward is not: it runs in bf16, and nothing was promised for it."""
    model = nn.Sequential(Watched(), Watched(), Watched())
    policy = Policy(name="test").with_default("p=fp32,c=bf16,o=bf16,r=fp32")
    policy = policy.with_rule(module="1", stage="backward", precision="fp32")
    apply_policy(model, policy.bind(module_facts(model)), "cpu")
    run(model).backward()
    notes = model[1].notes
    assert notes[:2] == [("forward", FAST)] * 2
    assert notes[2:4] == [("forward", IEEE)] * 2
    assert set(notes[4:]) == {("backward", IEEE)}
    for neighbour in (model[0], model[2]):
        assert set(neighbour.notes) == {("forward", FAST), ("backward", FAST)}


@pytest.mark.parametrize("fails", ["forward", "backward"])
def test_an_exception_gives_the_switches_back(fails: str) -> None:
    """In forward by the with block, in backward when the engine drops its callbacks."""
    model = watched_model(fails)
    with pytest.raises(ZeroDivisionError):
        run(model).backward()
    assert products_now("cpu") == FAST


def test_every_backward_through_one_graph_is_held() -> None:
    """A retained graph, and a gradient of one input alone."""
    model = watched_model()
    loss = run(model)
    for _ in range(2):
        model[1].notes.clear()
        loss.backward(retain_graph=True)
        assert set(model[1].notes) == {("backward", IEEE)}
        assert products_now("cpu") == FAST


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputed_islands_are_held_too(use_reentrant: bool) -> None:
    """The recompute and the backward that follows it."""
    model = watched_model()
    x = torch.randn(3, 5, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = checkpoint(model, x, use_reentrant=use_reentrant)
    out.float().sum().backward()
    assert set(model[1].notes) == {("forward", IEEE), ("backward", IEEE)}
    assert len(model[1].notes) > 4, "it was not recomputed"


def test_results_and_gradients_do_not_depend_on_the_switches() -> None:
    """The same bits under fast and under IEEE switches, in large products."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(257, 257))
    policy = Policy(name="test").with_default("p=fp32,c=bf16,o=bf16,r=fp32")
    policy = policy.with_rule(module="0", precision="fp32")
    apply_policy(model, policy.bind(module_facts(model)), "cpu")
    x = torch.randn(257, 257, requires_grad=True)
    results = []
    for switch in ("bf16", "ieee"):
        mkldnn.matmul.fp32_precision = switch
        y = model(x)
        results.append((y, *torch.autograd.grad(y.pow(2).sum(), (x, model[0].weight))))
    mkldnn.matmul.fp32_precision = "bf16"
    for fast, ieee in zip(*results, strict=True):
        assert torch.equal(fast, ieee)


def test_the_latest_hold_decides_and_the_first_value_comes_back() -> None:
    """Nested holds, released in any order."""
    outer = ProductsHold("cpu", "tf32")
    inner = ProductsHold("cpu", "ieee")
    assert products_now("cpu") == IEEE
    outer.release()
    assert products_now("cpu") == IEEE
    inner.release()
    inner.release()
    assert products_now("cpu") == FAST


@pytest.mark.parametrize("chosen", ["high", "medium"])
def test_the_old_tf32_switches_of_cuda_are_held_as_well(chosen: str) -> None:
    """They are two names of one state; both can be read inside, and come back."""
    mkldnn.matmul.fp32_precision = "none"
    torch.set_float32_matmul_precision(chosen)  # noqa: TID251 -- what users do
    on_cpu = mkldnn.matmul.fp32_precision
    assert cudnn.allow_tf32 is True, "torch's default"
    try:
        with ProductsHold("cuda", "ieee"):
            assert products_now("cuda") == IEEE
            assert cuda.matmul.allow_tf32 is False
            assert cudnn.allow_tf32 is False
            assert mkldnn.matmul.fp32_precision == on_cpu
        assert cuda.matmul.allow_tf32 is True
        assert cudnn.allow_tf32 is True
        assert torch.get_float32_matmul_precision() == chosen
        assert mkldnn.matmul.fp32_precision == on_cpu
    finally:
        torch.set_float32_matmul_precision("highest")  # noqa: TID251 -- puts it back
        mkldnn.matmul.fp32_precision = "bf16"
        cuda.matmul.fp32_precision = "none"


def test_an_inherited_switch_inherits_again() -> None:
    """What a switch took from the one above it is not written down as its own."""
    backends: Any = torch.backends
    try:
        with backends.__allow_nonbracketed_mutation():  # others may have frozen them
            mkldnn.matmul.fp32_precision = "none"
            mkldnn.fp32_precision = "bf16"
            with ProductsHold("cpu", "ieee"):
                assert products_now("cpu") == IEEE
            assert products_now("cpu") == ("bf16",) * 3
            mkldnn.fp32_precision = "none"
            assert products_now("cpu") == ("none",) * 3
    finally:
        mkldnn.matmul.fp32_precision = "bf16"


def test_frozen_switches_are_held_and_given_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whoever imports torch's own test helpers freezes the switches of the process."""
    before = mkldnn.matmul.fp32_precision
    frozen = "__allow_nonbracketed_mutation_flag"
    monkeypatch.setitem(vars(torch.backends), frozen, False)
    with ProductsHold("cpu", "tf32"):
        assert mkldnn.matmul.fp32_precision == "tf32"
    assert mkldnn.matmul.fp32_precision == before
    assert not vars(torch.backends)[frozen]
