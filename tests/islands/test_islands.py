from __future__ import annotations

import copy
import io
import pickle
import sys
import threading
import warnings
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from castwise.autocast import autocast
from castwise.errors import IslandError
from castwise.islands import AppliedPolicy, apply_policy, module_facts
from castwise.policy.rules import Policy

BF16_MIXED = "p=fp32,c=bf16,o=bf16,r=fp32"
Pair = namedtuple("Pair", "left right")  # noqa: PYI024 -- the plain kind is what is tested


class Probe(nn.Module):
    """A linear layer that notes what it saw."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.seen: list[Any] = []

    def forward(self, x: torch.Tensor, *rest: Any, **named: Any) -> torch.Tensor:
        """Apply the layer; note the formats on both sides."""
        y = self.linear(x)
        self.seen.append((x.dtype, y.dtype, rest, named))
        return y


class Model(nn.Module):
    """A low layer, a probe and a low layer, odd in every dimension."""

    def __init__(self, width: int = 7) -> None:
        super().__init__()
        self.before = nn.Linear(width, width)
        self.probe = Probe(width)
        self.after = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Low, probe, low."""
        return self.after(torch.tanh(self.probe(self.before(x))))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def policy(default: str = BF16_MIXED, **rules: str) -> Policy:
    """Rules by module glob, with `__` for a dot."""
    found = Policy(name="test").with_default(default)
    for module, precision in rules.items():
        found = found.with_rule(module=module.replace("__", "."), precision=precision)
    return found


def put(model: nn.Module, asked: Policy) -> AppliedPolicy:
    """Bind and apply."""
    return apply_policy(model, asked.bind(module_facts(model)), "cpu")


def backward_of(model: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Run forward under bf16 and backward outside of it; return the gradients."""
    model.zero_grad()
    with autocast("cpu", "bf16"):
        loss = model(x).float().pow(2).mean()
    loss.backward()
    return {
        name: p.grad.clone()
        for name, p in model.named_parameters()
        if p.grad is not None
    }


def by_hand(model: Model, x: torch.Tensor) -> torch.Tensor:
    """What an fp32 island around `probe` must compute, written out."""
    with autocast("cpu", "bf16"):
        y = model.before(x)
        with torch.autocast("cpu", enabled=False):
            y = nn.functional.linear(
                y.float(), model.probe.linear.weight, model.probe.linear.bias
            )
        return model.after(torch.tanh(y.bfloat16()))


def test_an_island_computes_in_its_format_and_hands_out_what_the_policy_says() -> None:
    """Inputs go up at the border, outputs come back, and only there."""
    model = Model()
    put(model, policy(probe="p=fp32,c=fp32"))
    x = torch.randn(5, 7)
    with autocast("cpu", "bf16"):
        y = model(x)
    assert [seen[:2] for seen in model.probe.seen] == [(torch.float32, torch.float32)]
    torch.testing.assert_close(y, by_hand(model, x), rtol=0, atol=0)


def test_gradients_cross_the_border_correctly() -> None:
    """The gradient through the casts equals the one of the casts written by hand."""
    model = Model()
    x = torch.randn(5, 7)
    loss = by_hand(model, x).float().pow(2).mean()
    expected = torch.autograd.grad(loss, list(model.parameters()))
    put(model, policy(probe="p=fp32,c=fp32"))
    found = backward_of(model, x)
    for got, want in zip(found.values(), expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_a_bare_format_keeps_its_output_format_too() -> None:
    """`fp32` alone gives all four fields, so the output stays fp32."""
    model = Model()
    put(model, policy(probe="fp32"))
    outputs = []
    model.probe.register_forward_hook(lambda *given: outputs.append(given[2].dtype))
    with autocast("cpu", "bf16"):
        model(torch.randn(5, 7))
    assert outputs == [torch.float32]


@dataclass
class Batch:
    """A dataclass as data loaders make them."""

    values: torch.Tensor
    index: torch.Tensor


@dataclass(frozen=True)
class FrozenBatch:
    """One that refuses assignment."""

    values: torch.Tensor
    note: str = "kept"


class Collector(nn.Module):
    """Returns what it was given."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Hand everything back."""
        self.given = (args, kwargs)
        return args, kwargs


def test_every_container_is_searched_for_floating_tensors() -> None:
    """Nested containers, named tuples, keyword arguments and dataclasses cross."""
    model = nn.Sequential(Collector())
    put(model, policy(**{"0": "c=fp32,o=fp32"}))
    low = torch.ones(3, dtype=torch.bfloat16)
    index = torch.arange(3)
    cache = {"index": index}
    given = (
        [low, (low, index)],
        OrderedDict(a=low),
        Pair(low, index),
        Batch(low, index),
        FrozenBatch(low),
        cache,
        torch.complex(torch.ones(1), torch.ones(1)),
    )
    args, kwargs = model[0](*given, extra={"deep": [low]}, flag=True)
    assert args[0][0].dtype is torch.float32
    assert args[0][1][0].dtype is torch.float32
    assert args[0][1][1] is index
    assert type(args[1]) is OrderedDict
    assert args[1]["a"].dtype is torch.float32
    assert type(args[2]) is Pair
    assert args[2].left.dtype is torch.float32
    assert args[3].values.dtype is torch.float32
    assert args[3].index is index
    assert (args[4].values.dtype, args[4].note) == (torch.float32, "kept")
    assert args[5] is cache, "a container without anything to cast passes as it is"
    assert args[6].dtype is torch.complex64
    assert kwargs["extra"]["deep"][0].dtype is torch.float32
    assert kwargs["flag"] is True
    assert given[3].values is low, "the caller's containers are left alone"
    assert given[0][0] is low


def test_a_tensor_given_twice_is_cast_once() -> None:
    """Attention asks `query is key`; the answer must not change at the border."""
    model = nn.Sequential(Collector())
    put(model, policy(**{"0": "fp32"}))
    x = torch.ones(3, dtype=torch.bfloat16)
    args, _ = model[0](x, x, [x])
    assert args[0] is args[1] is args[2][0]
    assert args[0].dtype is torch.float32


def test_a_list_inside_itself_does_not_hang() -> None:
    """A container that contains itself passes through the border."""
    model = nn.Sequential(Collector())
    put(model, policy(**{"0": "fp32"}))
    loop: list[Any] = [torch.ones(1, dtype=torch.bfloat16)]
    loop.append(loop)
    args, _ = model[0](loop)
    assert args[0][0].dtype is torch.float32


def test_fp64_islands_work_with_wide_and_with_narrow_weights() -> None:
    """`fp64` holds weights in fp64; `c=fp64` alone casts them for each forward."""
    x = torch.randn(5, 7)
    for precision, held in (("fp64", torch.float64), ("c=fp64", torch.float32)):
        model = Model()
        put(model, policy(probe=precision))
        gradients = backward_of(model, x)
        assert model.probe.seen[0][:2] == (torch.float64, torch.float64)
        assert model.probe.linear.weight.dtype is held
        assert gradients["probe.linear.weight"].dtype is held
        assert isinstance(model.probe.linear.weight, nn.Parameter)
        assert (
            model.probe.linear.weight
            is dict(model.named_parameters())["probe.linear.weight"]
        )


def test_fp64_is_handed_to_a_low_region_in_fp32() -> None:
    """Autocast multiplies no fp64, so an fp64 output must not crash what follows."""
    model = nn.Sequential(OrderedDict(solver=nn.Linear(3, 3), head=nn.Linear(3, 3)))
    put(model, policy(solver="fp64"))
    outputs = []
    model.solver.register_forward_hook(lambda *given: outputs.append(given[2].dtype))
    with autocast("cpu", "bf16"):
        model(torch.randn(2, 3))
    assert outputs == [torch.float32]
    wide = nn.Sequential(OrderedDict(solver=nn.Linear(3, 3)))
    put(wide, policy(default="fp32", solver="fp64"))
    assert wide(torch.randn(2, 3)).dtype is torch.float64


def test_weights_cast_for_a_forward_come_back_after_an_exception() -> None:
    """A forward that dies leaves the module's own parameters in place."""

    class Dies(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.linear(x)
            raise ValueError("boom")

    model = nn.Sequential(Dies())
    weight = model[0].linear.weight
    put(model, policy(**{"0": "c=fp64"}))
    with pytest.raises(ValueError, match="boom"):
        model(torch.randn(2, 3))
    assert model[0].linear.weight is weight


def test_removal_leaves_no_trace() -> None:
    """Classes, attributes, formats and state are what they were."""
    model = Model()
    classes = [type(m) for m in model.modules()]
    attributes = [sorted(vars(m)) for m in model.modules()]
    state = copy.deepcopy(model.state_dict())
    parameters = list(model.parameters())
    applied = put(model, policy(probe="fp64", after="c=fp32"))
    applied.remove()
    assert [type(m) for m in model.modules()] == classes
    assert [sorted(vars(m)) for m in model.modules()] == attributes
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for name, value in model.state_dict().items():
        assert value.dtype is state[name].dtype
        torch.testing.assert_close(value, state[name], rtol=0, atol=0)


def test_state_dict_keys_do_not_change() -> None:
    """A checkpoint of the plain model loads into the applied one, and back."""
    model = Model()
    keys = list(model.state_dict())
    put(model, policy(probe="fp32"))
    assert list(model.state_dict()) == keys
    model.load_state_dict(Model().state_dict())


def test_a_deep_copy_is_an_island_of_its_own() -> None:
    """The copy runs its own weights, in fp32, and is removed on its own."""
    model = Model()
    applied = put(model, policy(probe="p=fp32,c=fp32"))
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for p in twin.probe.parameters():
            p.zero_()
    with autocast("cpu", "bf16"):
        twin(torch.randn(2, 7))
        own = twin.probe(torch.randn(2, 7))
    assert twin.probe.seen[0][0] is torch.float32
    assert float(own.detach().abs().max()) == 0.0
    applied.remove()
    assert isinstance(twin.probe, Probe)
    assert type(twin.probe) is not Probe
    assert type(model.probe) is Probe


@pytest.mark.parametrize("way", ["pickle", "torch.save"])
def test_pickled_islands_arrive_as_islands(way: str) -> None:
    """Both ways of writing a whole module keep the island."""
    model = nn.Sequential(nn.Linear(5, 5), nn.LayerNorm(5))
    put(model, policy(**{"1": "fp32"}))
    x = torch.randn(3, 5)
    if way == "pickle":
        twin = pickle.loads(pickle.dumps(model))  # noqa: S301 -- our own bytes
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    dtypes = []
    twin[1].register_forward_pre_hook(lambda *given: dtypes.append(given[1][0].dtype))
    with autocast("cpu", "bf16"):
        assert twin(x).dtype is torch.float32
        torch.testing.assert_close(twin(x), model(x), rtol=0, atol=0)
    assert dtypes[0] is torch.bfloat16, "hooks stand outside of the border"


def test_nested_islands_have_a_border_each() -> None:
    """A bf16 module inside an fp32 island inside bf16 runs in bf16."""
    model = nn.Sequential(nn.Sequential(Probe(), Probe()), Probe())
    asked = (
        Policy(name="test")
        .with_default(BF16_MIXED)
        .with_rule(module="0.1", precision="p=fp32,c=bf16,o=fp32")
        .with_rule(module="0", precision="fp32")
    )
    applied = put(model, asked)
    with autocast("cpu", "bf16"):
        model(torch.randn(3, 7))
    assert [probe.seen[0][1] for probe in (model[0][0], model[0][1], model[1])] == [
        torch.float32,
        torch.bfloat16,
        torch.bfloat16,
    ]
    assert applied.coverage() == (
        "1 module in fp32 inside bf16: 0; 1 module in bf16 inside bf16: 0.1"
    )


def test_containers_without_a_forward_are_no_border() -> None:
    """A rule on a ModuleList makes islands of what it contains."""

    class Listed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Probe(), Probe()])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    model = Listed()
    applied = put(model, policy(blocks="p=fp32,c=fp32"))
    with autocast("cpu", "bf16"):
        model(torch.randn(3, 7))
    assert applied.coverage() == "2 modules in fp32 inside bf16: blocks.0, blocks.1"
    assert [b.seen[0][0] for b in model.blocks] == [torch.float32] * 2


def test_a_type_rule_finds_subclasses_and_governs_what_is_below() -> None:
    """`type: Probe` makes islands of probes and of their subclasses."""

    class FinerProbe(Probe):
        pass

    model = nn.Sequential(Probe(), FinerProbe(), nn.Linear(7, 7))
    asked = policy().with_rule(type="Probe", precision="p=fp32,c=fp32")
    applied = put(model, asked)
    assert applied.coverage() == "2 modules in fp32 inside bf16: 0, 1"
    with autocast("cpu", "bf16"):
        model(torch.randn(3, 7))
    assert model[1].seen[0][1] is torch.float32


def test_torch_nn_names_are_known() -> None:
    """`torch.nn.LayerNorm` is what people write; it is not where the class lives."""
    facts = module_facts(nn.Sequential(nn.LayerNorm(3)))
    assert "torch.nn.LayerNorm" in facts[1].types
    assert "LayerNorm" in facts[1].types
    assert "torch.nn.modules.normalization.LayerNorm" in facts[1].types


def test_two_forwards_then_one_backward() -> None:
    """An island keeps nothing of its own from one call to the next."""
    model = Model()
    put(model, policy(probe="p=fp32,c=fp32"))
    x, y = torch.randn(3, 7), torch.randn(3, 7)
    apart = [backward_of(model, each)["probe.linear.weight"] for each in (x, y)]
    model.zero_grad()
    with autocast("cpu", "bf16"):
        losses = [model(each).float().pow(2).mean() for each in (x, y)]
    sum(losses).backward()
    torch.testing.assert_close(
        model.probe.linear.weight.grad, apart[0] + apart[1], rtol=1e-6, atol=1e-7
    )


def test_an_island_may_call_itself() -> None:
    """Re-entrance: each level has its casts, and weights come back once."""

    class Recursive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: torch.Tensor, depth: int) -> torch.Tensor:
            y = self.linear(x)
            assert y.dtype is torch.float64
            return self(y.float(), depth - 1) if depth else y

    model = nn.Sequential()
    model.append(Recursive())
    weight = model[0].linear.weight
    put(model, policy(**{"0": "c=fp64,o=fp32"}))
    assert model[0](torch.randn(2, 3), 4).dtype is torch.float32
    assert model[0].linear.weight is weight


def test_threads_do_not_disturb_each_other() -> None:
    """Two threads in one model get what one thread alone gets, fp64 casts included."""
    model = Model()
    put(model, policy(probe="c=fp64"))
    inputs = [torch.randn(3, 7) for _ in range(8)]
    with autocast("cpu", "bf16"), torch.no_grad():
        expected = [model(x) for x in inputs]
    found: list[Any] = [None] * len(inputs)

    def work(start: int) -> None:
        with autocast("cpu", "bf16"), torch.no_grad():
            for _ in range(20):
                for at in range(start, len(inputs), 2):
                    found[at] = model(inputs[at])

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=0)


def test_evaluation_without_gradients_in_between_changes_nothing() -> None:
    """A no_grad forward inside the region must not poison the training forward."""
    model = Model()
    put(model, policy(probe="p=fp32,c=fp32"))
    x = torch.randn(3, 7)
    expected = backward_of(model, x)
    model.zero_grad()
    with autocast("cpu", "bf16"):
        with torch.no_grad():
            model(x)
        loss = model(x).float().pow(2).mean()
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=0)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_outside_the_region_gives_the_same_gradients(
    use_reentrant: bool,
) -> None:
    """Both kinds of checkpointing recompute the island in its formats."""
    model = Model()
    put(model, policy(probe="p=fp32,c=fp32"))
    x = torch.randn(3, 7, requires_grad=True)
    expected = backward_of(model, x)
    model.zero_grad()
    with autocast("cpu", "bf16"):
        y = checkpoint(model, x, use_reentrant=use_reentrant)
        loss = y.float().pow(2).mean()
    loss.backward()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], rtol=0, atol=0)
    assert {seen[0] for seen in model.probe.seen} == {torch.float32}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_inside_of_an_island_sees_its_weights_cast(
    use_reentrant: bool,
) -> None:
    """When a part is recomputed, the island's forward, which cast them, is over."""

    class Recomputing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(7, 7)

        def forward(self, x: torch.Tensor, *, recompute: bool) -> torch.Tensor:
            if not recompute:
                return self.inner(x)
            y: torch.Tensor = checkpoint(self.inner, x, use_reentrant=use_reentrant)
            return y

        def inner(self, x: torch.Tensor) -> torch.Tensor:
            return torch.sin(self.linear(x))

    model = nn.Sequential(nn.Linear(7, 7), Recomputing())
    put(model, policy(**{"1": "c=fp64"}))
    x = torch.randn(3, 7)
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        with autocast("cpu", "bf16"):
            y = model[1](model[0](x), recompute=recompute)
        y.float().sum().backward()
        gradients.append([weight.grad for weight in model.parameters()])
        assert type(model[1].linear.weight) is nn.Parameter
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


def test_recurrent_layers_and_weights_that_hooks_compute_are_cast() -> None:
    """Their forwards read other slots than their parameters."""
    pruned = prune.l1_unstructured(nn.Linear(7, 7), "weight", amount=5)
    for module in (nn.LSTM(7, 7), pruned):
        model = nn.Sequential(module)
        put(model, policy(default="fp32", **{"0": "c=fp64"}))
        out = model(torch.randn(3, 7))
        out = out[0] if isinstance(out, tuple) else out
        out.sum().backward()
        assert all(weight.grad is not None for weight in model.parameters())
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}


def test_threads_may_train_one_model() -> None:
    """Forward and backward in two threads, with weights cast and one of them again."""
    model = Model()
    asked = policy(probe="c=fp64")
    asked = asked.with_rule(module="after", stage="backward", precision="fp64")
    put(model, asked)
    inputs = [torch.randn(3, 7) for _ in range(6)]
    weights = list(model.parameters())

    def gradients(x: torch.Tensor) -> Any:
        with autocast("cpu", "bf16"):
            loss = model(x).float().pow(2).mean()
        return torch.autograd.grad(loss, weights)

    expected = [gradients(x) for x in inputs]
    found: list[Any] = [None] * len(inputs)

    def work(start: int) -> None:
        for _ in range(10):
            for at in range(start, len(inputs), 2):
                found[at] = gradients(inputs[at])

    threads = [threading.Thread(target=work, args=(start,)) for start in (0, 1)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)  # a race that is rare otherwise is met at once
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for got, want in zip(found, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
    assert all(type(weight) is nn.Parameter for weight in model.parameters())


def test_hooks_stand_outside_and_keep_working() -> None:
    """Forward and backward hooks see the values of the surroundings."""
    model = Model()
    seen = []
    model.probe.register_forward_hook(
        lambda *given: seen.append((given[1][0].dtype, given[2].dtype))
    )
    model.probe.register_full_backward_hook(
        lambda *given: seen.append((given[1][0].dtype, given[2][0].dtype))
    )
    put(model, policy(probe="p=fp32,c=fp32"))
    backward_of(model, torch.randn(3, 7))
    assert seen == [(torch.bfloat16, torch.bfloat16)] * 2


def test_weights_tied_across_two_storage_formats_are_refused() -> None:
    """The error names the weight, both modules and the rule; nothing was changed."""
    model = nn.Sequential(
        OrderedDict(embed=nn.Embedding(9, 5), head=nn.Linear(5, 9, bias=False))
    )
    model.head.weight = model.embed.weight
    with pytest.raises(IslandError, match=r"(?s)'embed' and 'head'.*'head.weight'"):
        put(model, policy(default="bf16", head="fp32"))
    assert model.head.weight.dtype is torch.float32
    assert type(model.head) is nn.Linear


def test_tied_weights_of_one_format_stay_tied() -> None:
    """An island may share fp32 weights with its bf16-computing surroundings."""
    model = nn.Sequential(
        OrderedDict(embed=nn.Embedding(9, 5), head=nn.Linear(5, 9, bias=False))
    )
    model.head.weight = model.embed.weight
    put(model, policy(default="bf16", head="p=bf16,c=fp32,o=fp32"))
    assert model.head.weight is model.embed.weight
    assert model.head.weight.dtype is torch.bfloat16
    with autocast("cpu", "bf16"):
        out = model(torch.tensor([[1, 2, 3]]))
    out.float().sum().backward()
    assert model.embed.weight.grad.dtype is torch.bfloat16


def test_one_module_under_two_names_needs_one_precision() -> None:
    """A module that is used twice cannot be held in two ways; both names are said."""
    shared = nn.Linear(3, 3)
    model = nn.Sequential(OrderedDict(one=shared, two=shared))
    with pytest.raises(IslandError, match=r"'one' and 'two' are one module"):
        put(model, policy(two="fp32"))


def test_a_patched_forward_is_refused() -> None:
    """A forward on the instance would bypass the island silently."""
    model = Model()
    model.probe.forward = lambda x: x
    with pytest.raises(IslandError, match="'probe' has a forward patched onto"):
        put(model, policy(probe="fp32"))


def test_a_script_module_is_refused() -> None:
    """Its forward cannot be wrapped."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still met
        scripted = torch.jit.script(nn.Linear(3, 3))
    with pytest.raises(IslandError, match="'0' is a ScriptModule"):
        put(nn.Sequential(scripted), policy(**{"0": "fp32"}))


def test_a_policy_is_applied_once() -> None:
    """A second policy on top of the first is refused; after removal it is not."""
    model = Model()
    applied = put(model, policy(probe="fp32"))
    with pytest.raises(IslandError, match="already has a policy"):
        put(model, policy(after="fp32"))
    applied.remove()
    put(model, policy(after="fp32"))


class Rotary(nn.Module):
    """Holds a table that must not be rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("inv_freq", 1.0 / 10_000 ** (torch.arange(3) / 3))
        self.register_buffer("position", torch.arange(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Scale by both."""
        return x * self.weight * self.inv_freq


def test_buffers_go_up_with_their_module_and_never_down() -> None:
    """A rotary table survives bf16-true; an fp64 island lifts it (gpt-neox#1003)."""
    model = nn.Sequential(OrderedDict(low=Rotary(), high=Rotary()))
    table = model.low.inv_freq.clone()
    put(model, policy(default="bf16", high="fp64"))
    assert model.low.weight.dtype is torch.bfloat16
    assert model.low.inv_freq.dtype is torch.float32
    torch.testing.assert_close(model.low.inv_freq, table, rtol=0, atol=0)
    assert model.high.inv_freq.dtype is torch.float64
    assert model.low.position.dtype is torch.int64
    model(torch.randn(2, 3)).sum().backward()


def test_a_rule_may_name_a_buffer() -> None:
    """By fqn or by `type: Buffer`; a rule on the module above it does not count."""
    model = nn.Sequential(OrderedDict(low=Rotary(), high=Rotary()))
    put(model, policy(default="bf16", low__inv_freq="p=bf16", high="p=bf16,c=bf16"))
    assert model.low.inv_freq.dtype is torch.bfloat16
    assert model.high.inv_freq.dtype is torch.float32
    other = nn.Sequential(Rotary())
    put(other, policy(default="bf16").with_rule(type="Buffer", precision="p=bf16"))
    assert other[0].inv_freq.dtype is torch.bfloat16


def test_pure_bf16_casts_what_a_caller_brings() -> None:
    """Under bf16-true fp32 inputs meet bf16 weights; the root casts them."""
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    put(model, policy(default="bf16", probe="p=fp32,c=fp32"))
    assert model.before.weight.dtype is torch.bfloat16
    assert model.probe.linear.weight.dtype is torch.float32
    y = model(torch.randn(3, 7))
    assert y.dtype is torch.bfloat16
    y.float().sum().backward()
    assert model.probe.seen[0][:2] == (torch.float32, torch.float32)
    optimizer.step()
    held = optimizer.param_groups[0]["params"]
    assert all(a is b for a, b in zip(held, model.parameters(), strict=True))


def test_parametrizations_work_before_and_after() -> None:
    """torch.nn.utils.parametrize may come first, come later and leave, in any order."""

    class Double(nn.Module):
        def forward(self, w: torch.Tensor) -> torch.Tensor:
            return 2 * w

    parametrize = torch.nn.utils.parametrize
    for first in (True, False):
        model = Model()
        target = model.probe.linear
        x = torch.randn(3, 7)
        if first:
            parametrize.register_parametrization(target, "weight", Double())
        applied = put(model, policy(probe__linear="c=fp64,o=fp32"))
        if not first:
            parametrize.register_parametrization(target, "weight", Double())
        expected = nn.functional.linear(x, target.weight, target.bias)
        out = target(x)
        torch.testing.assert_close(out, expected)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin.probe.linear(x), out, rtol=0, atol=0)
        if first:
            applied.remove()
            assert type(target).__name__ == "ParametrizedLinear"
            assert type(target).__bases__ == (nn.Linear,)
        parametrize.remove_parametrizations(target, "weight")
        torch.testing.assert_close(target(x), expected)
        applied.remove()
        assert type(target) is nn.Linear


def test_parametrizations_leave_an_island_that_stays() -> None:
    """Removing a parametrization under an island leaves the island in force."""
    model = Model()
    torch.nn.utils.parametrizations.spectral_norm(model.probe.linear)
    put(model, policy(probe__linear="p=fp32,c=fp32,o=fp32"))
    torch.nn.utils.parametrize.remove_parametrizations(model.probe.linear, "weight")
    with autocast("cpu", "bf16"):
        assert model.probe.linear(torch.randn(2, 7)).dtype is torch.float32


def test_weight_norm_and_pruning_keep_working() -> None:
    """The hook-based tools of torch.nn.utils see an ordinary module."""
    model = Model()
    put(model, policy(probe="p=fp32,c=fp32"))
    torch.nn.utils.parametrizations.weight_norm(model.probe.linear)
    prune.l1_unstructured(model.after, "weight", amount=3)
    backward_of(model, torch.randn(3, 7))
    vector = torch.nn.utils.parameters_to_vector(model.parameters())
    torch.nn.utils.vector_to_parameters(vector * 0.5, model.parameters())
    assert model.probe.seen[0][:2] == (torch.float32, torch.float32)


def test_phases_switch_without_rebuilding() -> None:
    """A rule on `predict` changes the formats when the phase does, and back."""
    model = Model()
    asked = policy(probe="p=fp32,c=fp32").with_rule(
        module="before", phase="predict", precision="c=fp64,o=fp32"
    )
    applied = put(model, asked)
    before = []
    model.before.register_forward_hook(lambda *given: before.append(given[2].dtype))
    for phase in ("full", "predict", "full"):
        applied.phase = phase
        with autocast("cpu", "bf16"):
            model(torch.randn(2, 7))
    assert before == [torch.bfloat16, torch.float32, torch.bfloat16]
    applied.phase = "predict"
    assert "1 module in fp64 inside bf16: before" in applied.coverage()
    with pytest.raises(IslandError, match="a phase is one of"):
        applied.phase = "sleep"


def test_signatures_and_names_look_as_before() -> None:
    """Frameworks read the signature of forward; a printed model looks the same."""
    import inspect

    model = Model()
    signature, text = inspect.signature(model.probe.forward), repr(model)
    put(model, policy(probe="fp32"))
    assert inspect.signature(model.probe.forward) == signature
    assert repr(model) == text


def test_functional_transforms_pass_through_an_island() -> None:
    """grad, vmap and jvp of torch.func see ordinary differentiable casts."""
    model = Model()
    put(model, policy(probe="p=fp32,c=fp32", before="fp32", after="fp32"))
    weights = dict(model.named_parameters())
    x = torch.randn(4, 7)

    def loss(weights: dict[str, torch.Tensor], x: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(model, weights, (x,)).pow(2).sum()

    each = torch.vmap(torch.func.grad(loss), (None, 0))(weights, x)
    whole = torch.func.grad(loss)(weights, x)
    for name, value in whole.items():
        torch.testing.assert_close(each[name].sum(0), value, rtol=1e-4, atol=1e-5)
