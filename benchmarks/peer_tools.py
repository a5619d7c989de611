"""The tools that benchmarks/peers.py compares, each used by its own best means.

A tool answers every question in the way that its documentation offers without editing
the model. Where it offers none, the question raises `Absent`, or is asked in the
nearest way there is, and what comes out is measured as for the others.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from castwise.autocast import autocast
from castwise.dtypes import dtype_of
from castwise.errors import CastwiseError
from castwise.policy import Policy, preset
from castwise.policy.ops import DEFAULT_TABLE
from castwise.training.step import Run, prepare

BF16 = torch.bfloat16
Region = Callable[[], AbstractContextManager[Any]]


class Absent(Exception):  # noqa: N818 -- an answer, not an error
    """The tool has no way to say this."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ready:
    """A model as a tool hands it out."""

    model: Callable[..., Any]
    """What is called instead of the model."""

    region: Region
    """What is entered around forward and loss."""

    backward: Callable[[torch.Tensor], None] = lambda loss: loss.backward()  # type: ignore[no-untyped-call]
    """What is called on the loss."""

    run: Run | None = None
    """castwise's own handle."""


class Tool:
    """What every tool is asked; this one is `torch.autocast` itself."""

    name = "torch.autocast"

    def region(self) -> AbstractContextManager[Any]:
        """Around plain operators."""
        return torch.autocast("cpu", BF16)

    def ready(self, model: nn.Module) -> Ready:
        """A model whose steps run in bf16."""
        return Ready(model=model, region=self.region)

    @contextmanager
    def operator_in_fp32(self, op: str) -> Iterator[None]:
        """A region in which one more operator of PyTorch runs in fp32."""
        library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                torch.library.register_autocast(
                    f"aten::{op}", "cpu", torch.float32, lib=library
                )
            with self.region():
                yield
        finally:
            library._destroy()  # type: ignore[no-untyped-call]  # noqa: SLF001 -- the only way to undo a registration

    def held(self, model: nn.Module, fqn: str, fmt: str) -> Ready:
        """A bf16 model with one module held in a wider format, unedited."""
        model.get_submodule(fqn).to(dtype_of(fmt))
        return self.ready(model)

    def sharded(self, model: nn.Module, fqn: str) -> Ready:
        """Cut up by `fully_shard`, with one module held in fp32."""
        mesh = init_device_mesh("cpu", (1,))
        wide = MixedPrecisionPolicy(param_dtype=torch.float32, output_dtype=BF16)
        low = MixedPrecisionPolicy(param_dtype=BF16)
        fully_shard(model.get_submodule(fqn), mesh=mesh, mp_policy=wide)
        fully_shard(model, mesh=mesh, mp_policy=low)
        return Ready(model=model, region=nullcontext)

    def named(self, model: nn.Module, pattern: str) -> int:
        """How many modules a pattern of names chooses."""
        del model, pattern
        raise Absent("modules have no say; autocast stands around code")

    def lowered(self, model: nn.Module) -> nn.Module:
        """A model whose weights are held in bf16."""
        return model.to(BF16)

    def switched(self, model: nn.Module) -> tuple[Callable[..., Any], Region, Region]:
        """A model, what puts bf16 around it, and what puts fp32 around it later."""
        return model, self.region, lambda: torch.autocast("cpu", enabled=False)

    def recipe(self) -> str:
        """Write all that it was told to a text, and read it back."""
        raise Absent("its settings are arguments in the code")

    def overflowing(self, count: int) -> tuple[float, str]:
        """The loss scale after steps with an infinite gradient, and what was said."""
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        scaler = torch.amp.GradScaler("cpu")
        for _ in range(count):
            scaler.scale((weight * torch.inf).sum()).backward()  # type: ignore[no-untyped-call]
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        return float(scaler.get_scale()), ""

    def proved(self, ready: Ready, x: torch.Tensor) -> str:
        """Run a step of a model that breaks its promise; what the tool says of it."""
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            with ready.region():
                loss = ready.model(x).float().square().mean()
            ready.backward(loss)
        return "; ".join(str(each.message) for each in said)


class Lightning(Tool):
    """`MixedPrecision`, as Fabric uses it; the Trainer has the same plugin."""

    name = "Lightning"

    def __init__(self) -> None:
        for name in ("lightning", "lightning.fabric", "lightning.pytorch"):
            logging.getLogger(name).setLevel(logging.ERROR)

    def region(self) -> AbstractContextManager[Any]:
        """What the plugin puts around a forward."""
        from lightning.fabric.plugins.precision import MixedPrecision  # noqa: PLC0415 -- takes seconds

        context: AbstractContextManager[Any] = MixedPrecision(
            "bf16-mixed", "cpu"
        ).forward_context()
        return context

    def ready(self, model: nn.Module) -> Ready:
        """Set up by Fabric, which enters the region itself."""
        from lightning.fabric import Fabric  # noqa: PLC0415 -- takes seconds

        fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
        return Ready(
            model=fabric.setup(model), region=nullcontext, backward=fabric.backward
        )

    def lowered(self, model: nn.Module) -> nn.Module:
        """`bf16-true`."""
        from lightning.fabric.plugins.precision import HalfPrecision  # noqa: PLC0415 -- takes seconds

        converted: nn.Module = HalfPrecision("bf16-true").convert_module(model)
        return converted

    def switched(self, model: nn.Module) -> tuple[Callable[..., Any], Region, Region]:
        """The plugin is chosen when the Trainer or the Fabric is made."""
        del model
        raise Absent("fixed when Trainer or Fabric is made")

    def recipe(self) -> str:
        """One of seven words."""
        from lightning.fabric import Fabric  # noqa: PLC0415 -- takes seconds

        Fabric(accelerator="cpu", precision="bf16-mixed")
        raise Absent("one word for the whole model, such as bf16-mixed")

    def overflowing(self, count: int) -> tuple[float, str]:
        """The plugin drives GradScaler."""
        from lightning.fabric.plugins.precision import MixedPrecision  # noqa: PLC0415 -- takes seconds

        plugin = MixedPrecision("16-mixed", "cpu")
        weight = nn.Parameter(torch.zeros(1))
        optimizer = torch.optim.SGD([weight], lr=1.0)
        for _ in range(count):
            plugin.backward((weight * torch.inf).sum(), None)
            plugin.optimizer_step(optimizer)
            optimizer.zero_grad()
        return float(plugin.state_dict()["scale"]), ""


class Accelerate(Tool):
    """`Accelerator(mixed_precision="bf16")`, and its hooks for storage formats."""

    name = "Accelerate"

    def __init__(self) -> None:
        from accelerate import Accelerator  # noqa: PLC0415 -- takes seconds

        self.accelerator = Accelerator(cpu=True, mixed_precision="bf16")

    def region(self) -> AbstractContextManager[Any]:
        """What the accelerator puts around a forward."""
        context: AbstractContextManager[Any] = self.accelerator.autocast()
        return context

    def ready(self, model: nn.Module) -> Ready:
        """Prepared: its forward enters the region itself, and its outputs are fp32."""
        return Ready(model=self.accelerator.prepare(model), region=nullcontext)

    def held(self, model: nn.Module, fqn: str, fmt: str) -> Ready:
        """Layerwise casting, with the format for storage and for computing."""
        from accelerate.big_modeling import attach_layerwise_casting_hooks  # noqa: PLC0415 -- takes seconds

        dtype = dtype_of(fmt)
        attach_layerwise_casting_hooks(model.get_submodule(fqn), dtype, dtype)
        return self.ready(model)

    def sharded(self, model: nn.Module, fqn: str) -> Ready:
        """Its plugin has one mixed precision for all."""
        from accelerate import FullyShardedDataParallelPlugin  # noqa: PLC0415 -- takes seconds

        del model, fqn
        plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2, mixed_precision_policy="bf16"
        )
        formats = plugin.mixed_precision_policy
        raise Absent(f"one {type(formats).__name__} for the whole model")

    def named(self, model: nn.Module, pattern: str) -> int:
        """Layerwise casting skips modules by a regular expression."""
        from accelerate.big_modeling import attach_layerwise_casting_hooks  # noqa: PLC0415 -- takes seconds

        attach_layerwise_casting_hooks(
            model, BF16, BF16, skip_modules_pattern=(pattern,)
        )
        linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
        return sum(each.weight.dtype != BF16 for each in linear)

    def lowered(self, model: nn.Module) -> nn.Module:
        """bf16 for storage and for computing."""
        from accelerate.big_modeling import attach_layerwise_casting_hooks  # noqa: PLC0415 -- takes seconds

        attach_layerwise_casting_hooks(model, BF16, BF16)
        return model

    def switched(self, model: nn.Module) -> tuple[Callable[..., Any], Region, Region]:
        """Its own handler, switched off, around the prepared model."""
        from accelerate.utils import AutocastKwargs  # noqa: PLC0415 -- takes seconds

        def off() -> AbstractContextManager[Any]:
            context: AbstractContextManager[Any] = self.accelerator.autocast(
                AutocastKwargs(enabled=False)
            )
            return context

        return self.ready(model).model, nullcontext, off

    def overflowing(self, count: int) -> tuple[float, str]:
        """It has a scaler on a GPU only; there it is GradScaler."""
        from accelerate import Accelerator  # noqa: PLC0415 -- takes seconds
        from accelerate.state import AcceleratorState  # noqa: PLC0415 -- takes seconds

        AcceleratorState._reset_state()  # noqa: SLF001 -- the precision of a process is kept there
        try:
            scaler = Accelerator(cpu=True, mixed_precision="fp16").scaler
        finally:
            AcceleratorState._reset_state()  # noqa: SLF001 -- as above
            self.__init__()  # type: ignore[misc]
        if scaler is None:
            raise Absent("fp16 on a CPU is fp32, in silence")
        return super().overflowing(count)

    def recipe(self) -> str:
        """Its configuration file."""
        raise Absent("accelerate config writes one word for the whole model")


class Castwise(Tool):
    """The library of this repository."""

    name = "castwise"

    def region(self) -> AbstractContextManager[Any]:
        """The operator table in force."""
        return autocast("cpu", "bf16")

    def ready(self, model: nn.Module) -> Ready:
        """Prepared with the preset."""
        return _prepared(model, preset("bf16-mixed"))

    @contextmanager
    def operator_in_fp32(self, op: str) -> Iterator[None]:
        """Another table."""
        with autocast("cpu", "bf16", DEFAULT_TABLE.with_category(op, "fp32", "probe")):
            yield

    def held(self, model: nn.Module, fqn: str, fmt: str) -> Ready:
        """An island."""
        precision = f"c={fmt}" if fmt.startswith("fp8") else fmt
        policy = preset("bf16-mixed").with_rule(module=fqn, precision=precision)
        return _prepared(model, policy)

    def sharded(self, model: nn.Module, fqn: str) -> Ready:
        """The same policy, which makes the groups too."""
        from castwise.distributed.sharding import shard  # noqa: PLC0415 -- beside its use

        policy = preset("bf16-mixed").with_rule(module=fqn, precision="fp32")
        shard(model, policy)
        return _prepared(model, policy)

    def named(self, model: nn.Module, pattern: str) -> int:
        """A rule with a glob; one that matches nothing is an error."""
        ready = self.held(model, f"*{pattern}*", "fp32")
        assert ready.run is not None
        return int(ready.run.applied.coverage().split()[0])

    def lowered(self, model: nn.Module) -> nn.Module:
        """`bf16-true`."""
        _prepared(model, preset("bf16-true"))
        return model

    def switched(self, model: nn.Module) -> tuple[Callable[..., Any], Region, Region]:
        """A rule with a phase: one module alone goes to fp32."""
        policy = preset("bf16-mixed").with_rule(
            module="delicate", phase="correct", precision="fp32"
        )
        run = _prepared(model, policy).run
        assert run is not None

        def region(phase: str) -> AbstractContextManager[Any]:
            run.phase = phase
            return run.region()

        return model, lambda: region("full"), lambda: region("correct")

    def recipe(self) -> str:
        """The policy file, with a module, an operator and a phase in it."""
        policy = (
            preset("bf16-mixed")
            .with_rule(module="delicate", precision="fp32", because="a probe")
            .with_phase_precision("predict", "fp16")
        )
        text = policy.to_yaml()
        assert Policy.parse(text) == policy
        return text

    def overflowing(self, count: int) -> tuple[float, str]:
        """It stops at its floor, and names the parameter."""
        model = nn.Linear(1, 1)
        run = prepare(
            model, torch.optim.SGD(model.parameters(), lr=1.0), preset("16-mixed")
        )
        try:
            for _ in range(count):
                with run.step() as step:
                    step.backward((model.weight * torch.inf).sum())
        except CastwiseError as error:
            return run.loss_scale.scale, str(error)
        return run.loss_scale.scale, ""

    def proved(self, ready: Ready, x: torch.Tensor) -> str:
        """A contract run."""
        from castwise.numerics.contract import prove  # noqa: PLC0415 -- beside its use

        assert ready.run is not None

        def step() -> None:
            with ready.region():
                loss = ready.model(x).float().square().mean()
            loss.backward()

        assert isinstance(ready.model, nn.Module)
        proof = prove(step, ready.model, ready.run.applied)
        return "; ".join(str(breach) for breach in proof.breaches)


def _prepared(model: nn.Module, policy: Policy) -> Ready:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    run = prepare(model, optimizer, policy)
    return Ready(model=model, region=run.region, run=run)


TOOLS: dict[str, Callable[[], Tool]] = {
    tool.name: tool for tool in (Castwise, Tool, Lightning, Accelerate)
}
"""In the order of the table's columns."""
