from __future__ import annotations

import copy
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from castwise.errors import (
    IslandError,
    LossScaleError,
    PolicyError,
    SettingsError,
    StorageError,
    UnmatchedRuleError,
)
from castwise.integrations import lightning as room
from castwise.integrations.hosted import HostedPolicy
from castwise.integrations.lightning import KEY, CastwisePrecision
from castwise.loss_scale import DynamicScale, NoScale, StaticScale
from castwise.optim import hold_weights
from castwise.policy import Policy, preset
from castwise.training.step import prepare

pytestmark = [
    # Lightning 2.6 asks a pytree in a way that torch 2.13 deprecates
    pytest.mark.filterwarnings(
        "ignore:`isinstance\\(treespec, LeafSpec\\):FutureWarning"
    ),
    # advice on data loading, of no matter to eight rows
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # castwise says so on purpose; a test of its own asks for it
    pytest.mark.filterwarnings("ignore:fp16 products run on the cpu, slowly"),
]

NAMES = ["lightning", "pytorch_lightning"]
ROWS = torch.linspace(-1, 1, 24 * 5).reshape(24, 5).sin()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class Body(nn.Module):
    """Linear, norm, head: odd sizes, and a record of the formats that were met."""

    def __init__(self) -> None:
        super().__init__()
        self.lift = nn.Linear(5, 7)
        self.norm = nn.LayerNorm(7)
        self.head = nn.Linear(7, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Run, and note the formats."""
        low = self.lift(x)
        out: torch.Tensor = self.head(self.norm(low))
        self.seen = low.dtype, out.dtype
        return out


def loss_of(out: torch.Tensor) -> torch.Tensor:
    """A loss in fp32 or above."""
    return out.to(torch.promote_types(out.dtype, torch.float32)).pow(2).mean()


def module_of(package: str, **methods: Any) -> Any:
    """A LightningModule of one of the packages, around a Body."""
    L = importlib.import_module(package)  # noqa: N806 -- as everybody calls it

    def __init__(self: Any) -> None:  # noqa: N807 -- becomes the method of that name
        super(cls, self).__init__()
        torch.manual_seed(0)
        self.body = Body()

    def training_step(self: Any, batch: Any, _index: int) -> torch.Tensor:
        return loss_of(self.body(batch[0]))

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    defaults = {
        "__init__": __init__,
        "training_step": training_step,
        "configure_optimizers": configure_optimizers,
    }
    cls: Any = type("Net", (L.LightningModule,), defaults | methods)
    return cls()


def loader() -> DataLoader[Any]:
    """Eight batches of three rows."""
    return DataLoader(TensorDataset(ROWS), batch_size=3)


def trainer_of(package: str, plugin: Any, **settings: Any) -> Any:
    """A quiet Trainer on the CPU."""
    L = importlib.import_module(package)  # noqa: N806 -- as everybody calls it
    quiet = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    plugins = [] if plugin is None else [plugin]
    return L.Trainer(plugins=plugins, **(quiet | settings))


class Whole(nn.Module):
    """Body and loss together, as a LightningModule has them."""

    def __init__(self) -> None:
        super().__init__()
        self.body = Body()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the loss."""
        return loss_of(self.body(x))


def round_to_bf16(model: nn.Module) -> None:
    """Let bf16 hold the weights: a host casts them before it has an optimizer."""
    for weight in model.parameters():
        weight.data = weight.data.bfloat16().float()


def hold_what_is_low(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Store bf16 weights as the policies here say, and as the plugin advises."""
    weights = [w for group in optimizer.param_groups for w in group["params"]]
    kept = [weight for weight in weights if weight.dtype is torch.float32]
    if len(kept) < len(weights):
        hold_weights(optimizer, keep=kept)
    return optimizer


def by_hand(
    policy: Policy, *, accumulate: int = 1, **settings: Any
) -> tuple[Body, Any]:
    """The run that the plugin has to equal: prepare and run.step over one epoch."""
    torch.manual_seed(0)
    whole = Whole()
    round_to_bf16(whole)
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    run = prepare(whole, optimizer, policy, **settings)
    rows = [batch[0] for batch in loader()]
    for at in range(0, len(rows), accumulate):
        with run.step() as step:
            for x in rows[at : at + accumulate]:
                step.backward(whole(x) / accumulate)
    return whole.body, run


def assert_same(ours: nn.Module, theirs: nn.Module) -> None:
    """Bitwise equal weights."""
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def with_head(name: str) -> Policy:
    """A preset, with the head as an fp32 island."""
    return preset(name).with_rule(module="*head", precision="fp32", because="a test")


# --- what Lightning's own tests ask of a precision plugin


@pytest.mark.parametrize("package", NAMES)
def test_a_trainer_and_a_fabric_of_either_name_take_the_plugin(package: str) -> None:
    """The plugin is an instance of the base classes that both packages look for."""
    L = importlib.import_module(package)  # noqa: N806 -- as everybody calls it
    plugin = CastwisePrecision("bf16-mixed")
    assert trainer_of(package, plugin).precision_plugin is plugin
    assert L.Trainer(plugins=plugin, accelerator="cpu", logger=False).precision == (
        "bf16-mixed"
    )
    fabric_of = {
        "lightning": "lightning.fabric",
        "pytorch_lightning": "lightning_fabric",
    }
    fabric = importlib.import_module(fabric_of[package])
    made = fabric.Fabric(plugins=[plugin], accelerator="cpu", devices=1)
    assert made.strategy.precision is plugin


def test_a_policy_a_preset_and_a_file_are_taken(tmp_path: Path) -> None:
    """All three say the same thing."""
    path = tmp_path / "policy.yaml"
    with_head("bf16-mixed").save(path)
    assert CastwisePrecision(path).policy == with_head("bf16-mixed")
    assert CastwisePrecision(str(path)).policy == with_head("bf16-mixed")
    assert CastwisePrecision(with_head("16-mixed")).policy == with_head("16-mixed")
    assert CastwisePrecision("16-mixed").policy == preset("16-mixed")
    with pytest.raises(PolicyError, match="bf16-mixed"):
        CastwisePrecision("bf16-mixd")
    with pytest.raises(StorageError):
        CastwisePrecision("no_such_file.yaml")
    with pytest.raises(SettingsError, match="raise or warn"):
        CastwisePrecision("bf16-mixed", unmatched="ignore")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "dtype", "scale"),
    [
        ("bf16-mixed", torch.bfloat16, NoScale),
        ("16-mixed", torch.float16, DynamicScale),
        ("bf16-true", torch.bfloat16, NoScale),
        ("32-true", None, NoScale),
    ],
)
def test_the_forward_context_is_autocast_and_ends(
    name: str, dtype: torch.dtype | None, scale: type
) -> None:
    """Also before any model is there, as in `fabric.autocast()`."""
    plugin = CastwisePrecision(name)
    assert isinstance(plugin.loss_scale, scale)
    with plugin.forward_context():
        assert torch.is_autocast_enabled("cpu") is (dtype is not None)
        if dtype is not None:
            assert torch.get_autocast_dtype("cpu") is dtype
            assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype is dtype
            assert torch.ones(2, 2).to(dtype).softmax(0).dtype is torch.float32
    assert not torch.is_autocast_enabled("cpu")
    with pytest.raises(ZeroDivisionError), plugin.forward_context():
        _ = 1 / 0
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["64-true", "bf16-true", "16-true", "bf16-mixed"])
def test_a_batch_is_cast_where_weights_are_held_in_its_format(name: str) -> None:
    """Nested batches too; integers stay."""
    dtypes = {"64-true": torch.float64, "16-true": torch.float16}
    dtype = dtypes.get(name, torch.bfloat16)
    batch = {"x": torch.ones(3), "more": (torch.ones(2, dtype=torch.int64), [ROWS])}
    cast = CastwisePrecision(name).convert_input(batch)
    expected = torch.float32 if name == "bf16-mixed" else dtype
    assert cast["x"].dtype is expected
    assert cast["more"][1][0].dtype is expected
    assert cast["more"][0] is batch["more"][0]


def test_new_tensors_are_fp64_under_64_true_and_nowhere_else() -> None:
    """In a step and where weights are born; bf16-true lets weights be born in fp32."""
    plugin = CastwisePrecision("64-true")
    for context in (
        plugin.forward_context,
        plugin.module_init_context,
        plugin.tensor_init_context,
    ):
        with context():
            assert nn.Linear(2, 2).weight.dtype is torch.float64
        assert torch.get_default_dtype() is torch.float32
        with pytest.raises(ZeroDivisionError), context():
            _ = 1 / 0
        assert torch.get_default_dtype() is torch.float32
    with CastwisePrecision("bf16-true").module_init_context():
        assert nn.Linear(2, 2).weight.dtype is torch.float32


# --- what it does in a Trainer


@pytest.mark.filterwarnings("ignore:.*hold 16-bit weights plain")
@pytest.mark.parametrize("package", NAMES)
@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true", "16-mixed"])
def test_a_trainer_steps_as_run_step_does_bit_by_bit(package: str, name: str) -> None:
    """Islands, clipping and accumulation included, under either package name."""
    plugin = CastwisePrecision(with_head(name))

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        sgd = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return hold_what_is_low(sgd)

    net = module_of(package, configure_optimizers=configure_optimizers)
    round_to_bf16(net)
    kept = {}
    trainer = trainer_of(
        package, plugin, accumulate_grad_batches=2, gradient_clip_val=0.05
    )
    net.on_train_end = lambda: kept.update(copy.deepcopy(net.body.state_dict()))
    trainer.fit(net, loader())
    reference, run = by_hand(with_head(name), accumulate=2, clip_norm=0.05)
    low = torch.float16 if name == "16-mixed" else torch.bfloat16
    assert net.body.seen == reference.seen == (low, torch.float32)
    assert run.num_stepped == 4
    for key, value in reference.state_dict().items():
        torch.testing.assert_close(kept[key], value, rtol=0, atol=0)
    assert plugin.loss_scale.state_dict() == run.loss_scale.state_dict()


@pytest.mark.parametrize(
    "rule",
    [
        {"module": "body.head"},
        {"module": "*head"},
        {"type": "Linear", "module": "*head"},
        {"predicate": lambda facts: facts.fqn.endswith("head")},
    ],
    ids=["fqn", "glob", "type", "predicate"],
)
def test_modules_are_matched_and_one_line_says_which(
    rule: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The line names the modules, their format and the surroundings."""
    lines: list[str] = []
    monkeypatch.setattr(room._rank_zero(), "rank_zero_info", lines.append)
    policy = preset("bf16-mixed").with_rule(**rule, precision="fp32", because="a test")
    net = module_of("lightning")
    trainer_of("lightning", CastwisePrecision(policy)).fit(net, loader())
    assert net.body.seen == (torch.bfloat16, torch.float32)
    assert lines == [
        "castwise bf16-mixed on cpu: 1 module in fp32 inside bf16: body.head"
    ]


def test_a_rule_that_matches_nothing_raises_or_warns() -> None:
    """A protection that was silently not there is the fault of most such plugins."""
    policy = with_head("bf16-mixed").with_rule(module="propagater", precision="fp32")
    net = module_of("lightning")
    with pytest.raises(UnmatchedRuleError, match="propagater"):
        trainer_of("lightning", CastwisePrecision(policy)).fit(net, loader())
    plugin = CastwisePrecision(policy, unmatched="warn")
    with pytest.warns(UserWarning, match="left out: .*propagater"):
        trainer_of("lightning", plugin).fit(net, loader())
    assert net.body.seen == (torch.bfloat16, torch.float32)


def test_32_true_does_nothing() -> None:
    """Weights as without the plugin, no island, no key in the checkpoint."""
    plugin = CastwisePrecision("32-true")
    ours, theirs = module_of("lightning"), module_of("lightning")
    classes = []
    ours.on_train_start = lambda: classes.extend(map(type, ours.body.modules()))
    trainer = trainer_of("lightning", plugin, gradient_clip_val=0.05)
    trainer.fit(ours, loader())
    trainer_of("lightning", None, gradient_clip_val=0.05).fit(theirs, loader())
    assert_same(ours, theirs)
    assert classes == list(map(type, theirs.body.modules()))
    assert plugin.state_dict() == {}
    assert plugin.coverage() == "nothing to do: every module in fp32"


@pytest.mark.filterwarnings("ignore:.*hold 16-bit weights plain")
@pytest.mark.parametrize("name", ["bf16-mixed", "bf16-true"])
@pytest.mark.parametrize("fails", [False, True])
def test_after_the_run_no_trace_is_left(name: str, fails: bool) -> None:
    """Classes, attributes and formats are as before, also after an exception."""
    fresh = module_of("lightning")

    def validation_step(self: Any, batch: Any, _index: int) -> None:
        assert type(self.body.head) is not nn.Linear
        assert self.body.lift.weight.dtype is (
            torch.bfloat16 if name == "bf16-true" else torch.float32
        )
        assert self.body.head.weight.dtype is torch.float32
        if fails:
            raise ZeroDivisionError
        self.body(batch[0])

    net = module_of("lightning", validation_step=validation_step)
    trainer = trainer_of(
        "lightning", CastwisePrecision(with_head(name)), num_sanity_val_steps=0
    )
    if fails:
        with pytest.raises(ZeroDivisionError):
            trainer.fit(net, loader(), loader())
    else:
        trainer.fit(net, loader(), loader())
        trainer.validate(net, loader(), verbose=False)
    assert list(map(type, net.body.modules())) == list(map(type, fresh.body.modules()))
    assert {key for m in net.modules() for key in vars(m) if "castwise" in key} == set()
    assert {weight.dtype for weight in net.parameters()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def test_a_copy_made_inside_a_step_is_a_model_of_its_own() -> None:
    """A teacher made by deepcopy does not run the student's weights."""

    def training_step(self: Any, batch: Any, _index: int) -> torch.Tensor:
        teacher = copy.deepcopy(self.body)
        for weight in teacher.parameters():
            weight.data.zero_()
        out = teacher(batch[0])
        assert out.dtype is torch.float32, "the copy's head is an island as well"
        assert not out.any()
        return loss_of(self.body(batch[0]))

    net = module_of("lightning", training_step=training_step)
    plugin = CastwisePrecision(with_head("bf16-mixed"))
    trainer_of("lightning", plugin, max_steps=2).fit(net, loader())


def test_checkpointed_modules_recompute_under_the_policy() -> None:
    """Recompute runs outside of the forward context, in the same formats."""
    from torch.utils.checkpoint import checkpoint

    def run(use_reentrant: bool | None) -> nn.Module:
        def training_step(self: Any, batch: Any, _index: int) -> torch.Tensor:
            x = batch[0].requires_grad_()
            if use_reentrant is None:
                return loss_of(self.body(x))
            out: torch.Tensor = checkpoint(self.body, x, use_reentrant=use_reentrant)
            return loss_of(out)

        net = module_of("lightning", training_step=training_step)
        plugin = CastwisePrecision(with_head("bf16-mixed"))
        trainer_of("lightning", plugin).fit(net, loader())
        body: nn.Module = net.body
        return body

    plain = run(None)
    assert_same(run(use_reentrant=False), plain)
    assert_same(run(use_reentrant=True), plain)


def test_backward_in_manual_optimization_runs_outside_of_autocast() -> None:
    """There the Trainer calls backward inside of the forward context."""
    seen: list[bool] = []

    def training_step(self: Any, batch: Any, _index: int) -> None:
        optimizer = self.optimizers()
        optimizer.zero_grad()
        loss = loss_of(self.body(batch[0]))
        loss.register_hook(lambda _g: seen.append(torch.is_autocast_enabled("cpu")))
        assert torch.is_autocast_enabled("cpu")
        self.manual_backward(loss)
        optimizer.step()

    net = module_of("lightning", training_step=training_step)
    round_to_bf16(net)
    net.automatic_optimization = False
    plugin = CastwisePrecision(with_head("16-mixed"))
    trainer_of("lightning", plugin).fit(net, loader())
    assert seen == [False] * 8
    reference, run = by_hand(with_head("16-mixed"))
    assert_same(net.body, reference)
    assert plugin.loss_scale.state_dict() == run.loss_scale.state_dict()


def test_two_optimizers_divide_by_the_scale_of_their_backward() -> None:
    """The first step overflows; the second still holds gradients of the old scale."""

    def configure_optimizers(self: Any) -> Any:
        return [
            torch.optim.SGD(self.body.lift.parameters(), lr=1.0),
            torch.optim.SGD(self.body.head.parameters(), lr=1.0),
        ]

    before: dict[str, torch.Tensor] = {}

    def training_step(self: Any, batch: Any, _index: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.body.head(batch[0].new_ones(2, 7)).float().mean())
        self.body.lift.weight.grad = torch.full_like(self.body.lift.weight, math.inf)
        before.update(copy.deepcopy(self.body.state_dict()))
        first.step()
        second.step()

    net = module_of(
        "lightning",
        training_step=training_step,
        configure_optimizers=configure_optimizers,
    )
    net.automatic_optimization = False
    plugin = CastwisePrecision(with_head("16-mixed"))
    trainer_of("lightning", plugin, max_steps=2, limit_train_batches=1).fit(
        net, loader()
    )
    assert plugin.num_skipped == 1
    assert torch.equal(net.body.lift.weight, before["lift.weight"])
    moved = before["head.bias"] - net.body.head.bias.detach()
    torch.testing.assert_close(moved, torch.full((3,), 1 / 3))
    assert plugin.loss_scale.scale == 2.0**15, "one backward, one lesson"


@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed"])
def test_a_gradient_that_is_not_finite_is_never_stepped_by(name: str) -> None:
    """The step is skipped and the parameter named, clipping or not."""

    def on_after_backward(self: Any) -> None:
        if self.global_step == 2 and not plugin.num_skipped:
            self.kept = copy.deepcopy(self.body.state_dict())
            self.body.norm.bias.grad[1] = math.nan

    def on_before_zero_grad(self: Any, _optimizer: Any) -> None:
        if plugin.last_finding is not None:
            findings.append(str(plugin.last_finding))
            for key, value in self.body.state_dict().items():
                assert torch.equal(value, self.kept[key])

    findings: list[str] = []
    net = module_of(
        "lightning",
        on_after_backward=on_after_backward,
        on_before_zero_grad=on_before_zero_grad,
    )
    plugin = CastwisePrecision(name)
    trainer_of("lightning", plugin, gradient_clip_val=0.1).fit(net, loader())
    assert findings[:1] == ["the gradient of 'body.norm.bias' holds NaN"]
    assert plugin.num_skipped == 1
    assert all(weight.isfinite().all() for weight in net.parameters())
    if name == "16-mixed":
        assert plugin.loss_scale.scale == 2.0**15


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_is_no_step() -> None:
    """training_step may return None, as with Lightning's own plugins."""

    def training_step(self: Any, batch: Any, index: int) -> torch.Tensor | None:
        return loss_of(self.body(batch[0])) if index % 2 else None

    net = module_of("lightning", training_step=training_step)
    plugin = CastwisePrecision("16-mixed")
    trainer_of("lightning", plugin).fit(net, loader())
    assert plugin.num_skipped == 0
    assert plugin.loss_scale.scale == 2.0**16


def test_clipping_by_value_works_under_a_loss_scale() -> None:
    """Gradients are true ones when they are clipped."""
    largest: list[float] = []

    def optimizer_step(self: Any, *args: Any, **kwargs: Any) -> None:
        super(type(self), self).optimizer_step(*args, **kwargs)
        largest.append(max(w.grad.abs().max().item() for w in self.parameters()))

    net = module_of("lightning", optimizer_step=optimizer_step)
    plugin = CastwisePrecision("16-mixed")
    trainer_of(
        "lightning",
        plugin,
        gradient_clip_val=1e-3,
        gradient_clip_algorithm="value",
        max_steps=3,
    ).fit(net, loader())
    assert largest == pytest.approx([1e-3] * 3)


def test_fused_optimizers_may_be_clipped() -> None:
    """They unscale by themselves, which keeps Lightning's own plugin from clipping."""

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-2, fused=True)

    net = module_of("lightning", configure_optimizers=configure_optimizers)
    plugin = CastwisePrecision("16-mixed")
    trainer_of("lightning", plugin, gradient_clip_val=0.1).fit(net, loader())
    assert plugin.loss_scale.state_dict()["_growth_tracker"] == 8


def test_an_optimizer_that_calls_its_closure_needs_a_policy_without_a_scale() -> None:
    """LBFGS trains in bf16, and is refused in fp16 with the remedy."""

    def configure_optimizers(self: Any) -> torch.optim.Optimizer:
        return torch.optim.LBFGS(self.parameters(), max_iter=2)

    net = module_of("lightning", configure_optimizers=configure_optimizers)
    trainer_of("lightning", CastwisePrecision("bf16-mixed"), max_steps=2).fit(
        net, loader()
    )
    with pytest.raises(SettingsError, match=r"LBFGS .*bf16-mixed"):
        trainer_of("lightning", CastwisePrecision("16-mixed"), max_steps=2).fit(
            net, loader()
        )


def test_fp16_on_a_cpu_is_fp16_and_says_that_it_is_slow() -> None:
    """Lightning's own 16-mixed is replaced by bf16-mixed there."""
    with pytest.warns(UserWarning, match="fp16 products run on the cpu, slowly"):
        trainer_of("lightning", plugin := CastwisePrecision("16-mixed")).fit(
            net := module_of("lightning"), loader()
        )
    assert net.body.seen == (torch.float16, torch.float16)
    assert plugin.precision == "16-mixed"
    plugin = CastwisePrecision(
        preset("bf16-mixed").with_default("p=fp32,c=tf32,o=fp32"), fallback="fp32"
    )
    with pytest.warns(UserWarning, match="fallback: fp32 .instead of tf32"):
        trainer_of("lightning", plugin, max_steps=1).fit(net, loader())
    assert net.body.seen == (torch.float32, torch.float32)


def test_phases_switch_between_steps() -> None:
    """Rules keyed by phase hold in a Trainer too."""
    policy = with_head("bf16-mixed").with_phase_precision("warmup", "c=fp32,o=fp32")
    seen: list[Any] = []

    def on_train_batch_end(self: Any, *_: Any) -> None:
        seen.append(self.body.seen[0])
        plugin.phase = "full"

    net = module_of("lightning", on_train_batch_end=on_train_batch_end)
    plugin = CastwisePrecision(policy)
    plugin.phase = "warmup"
    trainer_of("lightning", plugin, max_steps=2).fit(net, loader())
    assert seen == [torch.float32, torch.bfloat16]
    with pytest.raises(PolicyError, match="phase needs one of"):
        plugin.phase = "training"


# --- checkpoints


class Renamed(CastwisePrecision):
    """A subclass, whose class name Lightning would use as the key."""


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended")
@pytest.mark.parametrize("plugin_class", [CastwisePrecision, Renamed])
def test_a_run_resumes_bit_by_bit(plugin_class: Any, tmp_path: Path) -> None:
    """The loss scale goes on counting, whatever the plugin's class is called."""
    path = tmp_path / "run.ckpt"
    scale = {"initial": 2.0**26, "interval": 2}
    policy = with_head("16-mixed")

    whole = plugin_class(policy, loss_scale=DynamicScale(**scale))
    net = module_of("lightning")
    trainer_of("lightning", whole).fit(net, loader())
    assert whole.num_skipped > 0

    first = plugin_class(policy, loss_scale=DynamicScale(**scale))
    half = module_of("lightning")
    half.on_train_batch_end = lambda *_: (
        trainer.save_checkpoint(path) if trainer.fit_loop.batch_idx == 3 else None
    )
    trainer = trainer_of("lightning", first)
    trainer.fit(half, loader())
    kept = torch.load(path, weights_only=True)
    assert kept[KEY]["phase"] == "full"
    assert kept[KEY]["loss_scale"]["kind"] == "dynamic"

    second = plugin_class(policy)
    resumed = module_of("lightning")
    trainer_of("lightning", second).fit(
        resumed, loader(), ckpt_path=path, weights_only=True
    )
    assert second.loss_scale.state_dict() == whole.loss_scale.state_dict()
    assert_same(resumed, net)


@pytest.mark.parametrize("key", ["MixedPrecision", "native_amp_scaling_state"])
def test_the_scaler_state_of_lightnings_own_plugin_is_read(key: str) -> None:
    """So a run may move over in the middle."""
    from lightning.pytorch.plugins.precision import MixedPrecision

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**9, growth_interval=7)
    scaler.scale(torch.zeros(()))
    stock = MixedPrecision("16-mixed", "cpu", scaler).state_dict()
    plugin = CastwisePrecision("16-mixed")
    plugin.on_load_checkpoint({key: stock})
    ours = plugin.loss_scale.state_dict()
    assert {name: ours[name] for name in stock} == stock
    assert ours["scale"] == 2.0**9


def test_the_state_of_another_kind_of_scale_is_left_unread_and_said() -> None:
    """A run may be resumed in other formats."""
    state = CastwisePrecision("16-mixed").state_dict()
    plugin = CastwisePrecision("bf16-mixed")
    with pytest.warns(UserWarning, match="starts with a new loss scale"):
        plugin.load_state_dict(state)
    assert plugin.loss_scale.scale == 1
    CastwisePrecision("32-true").on_load_checkpoint({KEY: state})
    CastwisePrecision("16-mixed").on_load_checkpoint({})


# --- Fabric


@pytest.mark.filterwarnings("ignore:.*hold 16-bit weights plain")
@pytest.mark.parametrize("package", ["lightning.fabric", "lightning_fabric"])
@pytest.mark.parametrize("name", ["bf16-mixed", "16-mixed", "bf16-true"])
def test_a_fabric_steps_as_run_step_does_bit_by_bit(package: str, name: str) -> None:
    """With clipping, which Fabric does after it asked for true gradients."""
    fabric_module = importlib.import_module(package)
    scale = {} if name != "16-mixed" else {"initial": 2.0**26, "interval": 2}
    plugin = CastwisePrecision(
        with_head(name), loss_scale=DynamicScale(**scale) if scale else None
    )
    fabric = fabric_module.Fabric(plugins=[plugin], accelerator="cpu", devices=1)
    torch.manual_seed(0)
    whole = Whole()
    round_to_bf16(whole)
    model, optimizer = fabric.setup(
        whole, torch.optim.SGD(whole.parameters(), lr=0.1, momentum=0.9)
    )
    hold_what_is_low(optimizer.optimizer)
    for batch in loader():
        fabric.backward(model(batch[0]))
        fabric.clip_gradients(model, optimizer, max_norm=1e9, error_if_nonfinite=False)
        optimizer.step()
        optimizer.zero_grad()
    reference, run = by_hand(
        with_head(name), loss_scale=DynamicScale(**scale) if scale else None
    )
    assert_same(whole.body, reference)
    assert plugin.loss_scale.state_dict() == run.loss_scale.state_dict()
    assert plugin.num_skipped == run.num_skipped
    assert bool(scale) is (run.num_skipped > 0)
    plugin.teardown()
    assert type(whole.body.head) is nn.Linear


def test_weights_that_lose_updates_in_a_host_are_told() -> None:
    """The optimizer is the host's: 16 bits are all that its weights have."""
    held, model = HostedPolicy(preset("bf16-true")), Whole()
    (line,) = [t for t in held.put_on(model, torch.device("cpu")) if "plain" in t]
    assert "modules hold 16-bit weights plain, not split" in line
    assert "castwise.hold_weights" in line
    held.take_off()
    quiet = HostedPolicy(preset("bf16-true").with_storage("plain"))
    assert not [t for t in quiet.put_on(Whole(), torch.device("cpu")) if "plain" in t]
    quiet.take_off()


def test_several_models_of_a_fabric_share_one_policy() -> None:
    """Each gets the rules that match in it, if that is asked for."""
    from lightning.fabric import Fabric

    policy = with_head("bf16-mixed").with_rule(module="0", precision="fp32")
    plugin = CastwisePrecision(policy, unmatched="warn")
    fabric = Fabric(plugins=[plugin], accelerator="cpu", devices=1)
    with pytest.warns(UserWarning, match="left out"):
        body = fabric.setup(Body())
    with pytest.warns(UserWarning, match="left out"):
        other = fabric.setup(nn.Sequential(nn.Linear(5, 3), nn.Linear(3, 2)))
    assert body(ROWS).dtype is torch.float32
    assert other(ROWS).dtype is torch.bfloat16
    assert type(other.module[0]) is not nn.Linear
    assert plugin.coverage() == (
        "1 module in fp32 inside bf16: head; 1 module in fp32 inside bf16: 0"
    )
    plugin.teardown()


@pytest.mark.filterwarnings("ignore:.*hold 16-bit weights plain")
def test_a_second_plugin_takes_the_place_of_the_first() -> None:
    """A notebook cell may be run again."""
    first, second = CastwisePrecision("bf16-true"), CastwisePrecision("16-true")
    body = Body()
    first.convert_module(body)
    second.convert_module(body)
    assert body.lift.weight.dtype is torch.float16
    assert first.hosted.models == ()
    second.teardown()
    assert body.lift.weight.dtype is torch.float32
    assert "castwise" not in repr(vars(body))


# --- compiled, distributed


def test_a_compiled_module_inside_keeps_its_island() -> None:
    """The inner model is compiled as one graph, and steps as in eager mode."""
    net, plain = module_of("lightning"), module_of("lightning")
    net.body.compile(backend="aot_eager", fullgraph=True)
    for each in (net, plain):
        plugin = CastwisePrecision(with_head("bf16-mixed"))
        trainer_of("lightning", plugin).fit(each, loader())
    for a, b in zip(net.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-3)
    assert net.body.seen == (torch.bfloat16, torch.float32)


# Dynamo reads .grad of tensors while it wraps them for the eager part
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_lightning_module_logs_where_log_stays_eager() -> None:
    """Dynamo cannot trace LightningModule.log; the page shows this way out."""

    def training_step(self: Any, batch: Any, _index: int) -> torch.Tensor:
        loss = loss_of(self.body(batch[0]))
        self.log("loss", loss)
        return loss

    @torch.compiler.disable
    def log(self: Any, *args: Any, **kwargs: Any) -> None:
        super(type(self), self).log(*args, **kwargs)

    net = module_of("lightning", training_step=training_step, log=log)
    compiled = torch.compile(net, backend="aot_eager")
    trainer = trainer_of("lightning", CastwisePrecision(with_head("bf16-mixed")))
    trainer.fit(compiled, loader())
    assert net.body.seen == (torch.bfloat16, torch.float32)
    assert trainer.callback_metrics["loss"] < 0.2


def test_the_loss_scale_that_can_help_no_more_stops_the_run() -> None:
    """It does not skip for ever."""

    def on_after_backward(self: Any) -> None:
        self.body.norm.bias.grad[1] = math.nan

    net = module_of("lightning", on_after_backward=on_after_backward)
    plugin = CastwisePrecision("16-mixed", loss_scale=StaticScale(8.0, patience=3))
    with pytest.raises(LossScaleError, match="3 steps in a row"):
        trainer_of("lightning", plugin).fit(net, loader())


DISTRIBUTED = """
import json, sys, torch
sys.path.insert(0, {folder!r})
import test_lightning as t
from castwise.integrations.lightning import CastwisePrecision

{methods}

if __name__ == "__main__":
    plugin = CastwisePrecision(t.with_head({name!r}))
    net = t.module_of("lightning", **methods)
    trainer = t.trainer_of("lightning", plugin, devices=2, strategy=strategy)
    trainer.fit(net, t.DataLoader(t.TensorDataset(t.ROWS), batch_size=3))
    found = dict(
        num_skipped=plugin.num_skipped,
        scale=plugin.loss_scale.scale,
        formats=list(map(str, net.body.seen)),
        finding=t.findings,
        head=type(net.body.head).__name__,
        weights=[whole(w).double().sum().item() for w in net.parameters()],
    )
    with open("rank" + str(trainer.global_rank), "w") as file:
        json.dump(found, file)
"""

DDP = """
strategy = "ddp"

def on_before_backward(self, loss):
    if self.global_rank == 1 and self.global_step == 2 and not plugin.num_skipped:
        loss.register_hook(lambda gradient: gradient * float("nan"))

def whole(weight):
    return weight.detach()

methods = dict(on_before_backward=on_before_backward, **t.noting(lambda: plugin))
"""

FSDP = """
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.fsdp import fully_shard

strategy = ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)

def configure_model(self):
    mesh = self.device_mesh["data_parallel"]
    fully_shard(self.body.head, mesh=mesh)
    fully_shard(self.body, mesh=mesh)

def on_after_backward(self):
    if self.global_rank == 1 and self.global_step == 2 and not plugin.num_skipped:
        self.body.norm.bias.grad.to_local()[1] = float("nan")  # in this shard alone

def whole(weight):
    return weight.full_tensor().detach()

methods = dict(
    configure_model=configure_model,
    on_after_backward=on_after_backward,
    **t.noting(lambda: plugin),
)
"""

findings: list[str] = []


def noting(plugin_of: Any) -> dict[str, Any]:
    """A hook that notes why steps were skipped."""

    def on_before_zero_grad(_self: Any, _optimizer: Any) -> None:
        finding = plugin_of().last_finding
        if finding is not None:
            findings.append(str(finding))

    return {"on_before_zero_grad": on_before_zero_grad}


def without_places() -> dict[str, str]:
    """The environment, without what a run before left there: a port that is taken."""
    words = ("MASTER_", "RANK", "WORLD_SIZE", "TORCHELASTIC_", "PL_")
    return {
        name: value
        for name, value in os.environ.items()
        if not any(word in name for word in words)
    }


def run_on_two(tmp_path: Path, **parts: str) -> dict[str, Any]:
    """Run a script that Lightning starts twice; both ranks must find the same."""
    script = tmp_path / "train.py"
    script.write_text(DISTRIBUTED.format(folder=str(Path(__file__).parent), **parts))
    with subprocess.Popen(
        [sys.executable, str(script)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,
        env=without_places() | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    ) as process:
        try:
            _, errors = process.communicate(timeout=120)
        finally:
            if process.poll() is None:  # Lightning started the other one: stop both
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors[-3000:]
    one, other = (json.loads((tmp_path / f"rank{rank}").read_text()) for rank in (0, 1))
    assert one == other
    found: dict[str, Any] = one
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "methods"),
    [("bf16-mixed", DDP), ("16-mixed", FSDP)],
    ids=["ddp", "fsdp2"],
)
def test_two_processes_train_and_skip_alike(
    name: str, methods: str, tmp_path: Path
) -> None:
    """DDP and ModelParallelStrategy over gloo: one rank's NaN is known to both."""
    found = run_on_two(tmp_path, name=name, methods=methods)
    assert found["num_skipped"] == 1
    assert found["scale"] == (2.0**15 if name == "16-mixed" else 1)
    low = "torch.float16" if name == "16-mixed" else "torch.bfloat16"
    assert found["formats"] == [low, "torch.float32"]
    assert "holds NaN" in found["finding"][0]
    if methods is FSDP:
        assert found["finding"] == [
            "the gradient of 'body.norm.bias' holds NaN in the rows of rank 1"
        ]
    assert all(map(math.isfinite, found["weights"]))
    assert found["head"] == ("Linear" if methods is DDP else "FSDPLinear")


def test_weights_that_are_sharded_already_are_not_narrowed() -> None:
    """The remedy is in the message."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_tensor

    torch.distributed.init_process_group(
        "gloo", rank=0, world_size=1, store=torch.distributed.HashStore()
    )
    try:
        body = Body()
        mesh = init_device_mesh("cpu", (1,))
        body.lift.weight = nn.Parameter(distribute_tensor(body.lift.weight.data, mesh))
        with pytest.raises(IslandError, match=r"'lift.weight' is sharded.*bf16-mixed"):
            CastwisePrecision("bf16-true").convert_module(body)
    finally:
        torch.distributed.destroy_process_group()


def test_without_lightning_the_extra_is_named() -> None:
    """And the message says how to get it."""
    code = (
        "import importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda n, *a: None if 'lightning' in n else real(n, *a)\n"
        "import castwise.errors\n"
        "try: import castwise.integrations.lightning\n"
        "except castwise.errors.MissingExtraError as e: print(e)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "pip install 'castwise[lightning]'" in done.stdout


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A reader may paste every block on Lightning, in order, into one session."""
    monkeypatch.chdir(tmp_path)
    with_head("bf16-mixed").save("policy.yaml")
    names: dict[str, Any] = {"net": module_of("lightning"), "loader": loader()}
    page = (Path(__file__).parents[2] / "docs" / "integrations.md").read_text()
    section = page.partition("## Lightning")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block, names)  # noqa: S102 -- our own page


def test_the_integrations_package_loads_neither_framework() -> None:
    """Each room needs its own extra, and only its own."""
    code = (
        "import sys, castwise.integrations\n"
        "print([m for m in ('lightning', 'transformers', 'torch') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
