"""A precision plugin for Lightning's Trainer and Fabric, by policy.

    trainer = Trainer(plugins=[CastwisePrecision("policy.yaml")])
    fabric = Fabric(plugins=[CastwisePrecision("bf16-mixed")])

It enters through Lightning's own hooks and patches nothing:

    convert_module     the policy is put on the model: islands, formats of weights
    convert_input      a batch is cast where weights are held low, or in fp64
    forward_context    the operator table is in force around a step
    backward           autocast is off, also in manual optimization
    optimizer_step     gradients are unscaled, checked, clipped, and stepped by or not
    teardown           the policy is taken off; no trace is left on the model

One class serves `lightning` and `pytorch_lightning`, which are two packages with two
sets of classes: it derives from the plugin of each that is installed, and calls the one
that the model belongs to.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
from typing import TYPE_CHECKING, Any

import torch

from castwise.distributed.gradients import clip
from castwise.errors import LossScaleError, MissingExtraError, SettingsError
from castwise.integrations.hosted import HostedPolicy, Unmatched, policy_of
from castwise.integrations.loop_scale import LoopScale
from castwise.loss_scale import LossScale, NoScale, loss_scale_of
from castwise.policy.precision import FP32
from castwise.policy.presets import preset

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path
    from types import ModuleType

    from torch import nn

    from castwise.loss_scale import NonFinite
    from castwise.policy.rules import Policy


def _installed() -> tuple[ModuleType, ...]:
    """Every Lightning that is installed, under either of its names."""
    names = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
    paths = [path for top, path in names.items() if importlib.util.find_spec(top)]
    if not paths:
        raise MissingExtraError(
            "castwise.integrations.lightning needs the package lightning, which is not "
            "installed; get it by pip install 'castwise[lightning]'"
        )
    paths.sort(key=lambda path: path not in sys.modules)  # the user's own comes first
    first = importlib.import_module(paths[0])
    log = _rank_zero().log
    found = (first, *map(importlib.import_module, paths[1:]))
    _rank_zero().log = log  # each import takes the messages of both to its own logger
    return found


def _rank_zero() -> Any:
    """How both packages say something once, and not once in every process."""
    return importlib.import_module("lightning_utilities.core.rank_zero")


_LIGHTNINGS = _installed()

if TYPE_CHECKING:
    from lightning.pytorch.plugins.precision import Precision as _Plugin
else:
    _Plugin = type(
        "_Plugin",
        tuple(package.plugins.precision.Precision for package in _LIGHTNINGS),
        {"__doc__": "A precision plugin of every Lightning that is installed."},
    )

KEY = "CastwisePrecision"
"""Where a Lightning checkpoint keeps our state, whatever a subclass is called."""

_STOCK_KEYS = ("MixedPrecision", "native_amp_scaling_state")

_LIGHTNING_NAMES = (
    "32-true",
    "bf16-mixed",
    "16-mixed",
    "bf16-true",
    "16-true",
    "64-true",
)


class CastwisePrecision(_Plugin):
    """A castwise policy as a precision plugin of Lightning.

    Args:
        policy: A policy, the name of a preset, or a policy file.
        device: `cpu` or `cuda`. Default: the Trainer's device; in Fabric where the
            model stands.
        loss_scale: Default: what the policy says, or else what its formats need.
        fallback: The format to use instead of one that the device cannot do.
        unmatched: What happens to a rule that matches nothing: `raise`, or `warn` and
            go on without it, for several models that share one policy.

    Raises:
        PolicyError: The policy is wrong, or there is none of that name.
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        *,
        device: str | None = None,
        loss_scale: LossScale | None = None,
        fallback: str | None = None,
        unmatched: Unmatched = "raise",
    ) -> None:
        self.hosted = HostedPolicy(
            policy_of(policy), fallback=fallback, unmatched=unmatched
        )
        self.policy = self.hosted.asked
        self.device = device
        self.precision = _lightning_name(self.policy)  # type: ignore[assignment]
        decided = loss_scale_of(self.policy.decide_loss_scale().value)
        self._loop = LoopScale(loss_scale or decided, self._named_parameters)

    @property
    def loss_scale(self) -> LossScale:
        """The loss scale, which has learned from every step so far."""
        self._loop.settle()
        return self._loop.loss_scale

    @property
    def num_skipped(self) -> int:
        """How many optimizer steps were skipped."""
        return self._loop.num_skipped

    @property
    def last_finding(self) -> NonFinite | None:
        """Why the last optimizer step was skipped; none where it was not."""
        return self._loop.last_finding

    @property
    def phase(self) -> str:
        """The phase whose precision is in force; may change between steps."""
        return self.hosted.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self.hosted.phase = phase

    def coverage(self) -> str:
        """One line: which modules run in another format than the rest."""
        return self.hosted.coverage()

    def convert_module(self, module: nn.Module) -> nn.Module:
        """Put the policy on the model, and log what it covers in one line.

        Raises:
            UnmatchedRuleError: A rule matches nothing in the model.
            UnsupportedFormatError: The device cannot do a format of the policy.
            IslandError: A module cannot be held as the policy says.
        """
        if self.hosted.is_idle:
            return module
        coverage, *cautions = self.hosted.put_on(module, self._device_of(module))
        _rank_zero().rank_zero_info(coverage)
        for caution in cautions:
            _rank_zero().rank_zero_warn(caution)
        return module

    @contextlib.contextmanager
    def forward_context(self) -> Iterator[None]:
        """Put the precision of the phase into force around a step."""
        if self.hosted.is_idle:
            yield
            return
        with self._new_tensors(), self.hosted.region(self.device):
            yield

    def tensor_init_context(self) -> contextlib.AbstractContextManager[Any]:
        """Let tensors be born in fp64 where the policy holds weights in fp64.

        Weights that will be held in 16 bits are born in fp32: an island among them
        keeps the digits that it needs.
        """
        return self._new_tensors()

    def module_init_context(self) -> contextlib.AbstractContextManager[Any]:
        """Let weights be born in fp64 where the policy holds them in fp64."""
        return self._new_tensors()

    def convert_input(self, data: Any) -> Any:
        """Cast a batch where weights are held low, or in fp64."""
        return data if self.hosted.is_idle else self.hosted.cast_inputs(data)

    def pre_backward(self, tensor: torch.Tensor, module: Any) -> Any:
        """Scale the loss, and call the hooks of the Trainer."""
        plugin = _plugin_of(module)
        if plugin is None:
            return None  # Fabric takes no loss from here
        return plugin.pre_backward(self, self._loop.scaled(tensor), module)

    def backward(
        self, tensor: torch.Tensor, model: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Run backward outside of autocast, which would cast its products again."""
        plugin = _plugin_of(model)
        with self._outside_autocast():
            if plugin is None:
                loss: Any = self._loop.scaled(tensor)
                loss.backward(*args, **kwargs)
            else:
                plugin.backward(self, tensor, model, *args, **kwargs)

    def post_backward(self, tensor: torch.Tensor, module: Any) -> Any:
        """Call the hooks of the Trainer."""
        plugin = _plugin_of(module)
        return None if plugin is None else plugin.post_backward(self, tensor, module)

    def optimizer_step(
        self,
        optimizer: Any,
        model: Any = None,
        closure: Callable[[], Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Unscale and check the gradients; clip and step, or skip and say why.

        Raises:
            SettingsError: The optimizer calls its closure itself, under a loss scale.
            LossScaleError: Steps were skipped and no other scale can help.
        """
        plugin = _plugin_of(model)
        if self.hosted.is_idle or self._calls_closure(optimizer):
            if plugin is not None:
                return plugin.optimizer_step(self, optimizer, model, closure, **kwargs)
            given = {} if closure is None else {"closure": closure}
            return optimizer.step(**given, **kwargs)
        result = None if closure is None else closure()
        self._loop.unscale(optimizer)
        if plugin is not None:
            self._after_closure(model, optimizer)
        finding = self._loop.end_step(optimizer)
        if finding is None:
            optimizer.step(**kwargs)
        else:
            _rank_zero().rank_zero_info(
                f"castwise skipped an optimizer step: {self._loop.because}"
            )
        return result

    def unscale_gradients(self, optimizer: torch.optim.Optimizer) -> None:
        """Unscale before Fabric clips."""
        if not self.hosted.is_idle:
            self._loop.unscale(optimizer)

    def clip_grad_by_norm(
        self, optimizer: torch.optim.Optimizer, clip_val: float
    ) -> None:
        """Clip by the global norm over all shards, summed in fp32 in every format."""
        if self.hosted.is_idle:
            super().clip_grad_by_norm(optimizer, clip_val)
            return
        weights = list(self.main_params(optimizer))
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        clip(gradients, float(clip_val))

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale's state and the phase; nothing for 32-true."""
        if self.hosted.is_idle:
            return {}
        return {"loss_scale": self.loss_scale.state_dict(), "phase": self.phase}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from our state, or from that of Lightning's MixedPrecision.

        The state of another kind of loss scale is left unread, with a warning: a run
        may change its formats when it is resumed.
        """
        if self.hosted.is_idle or not state_dict:
            return
        ours = "loss_scale" in state_dict
        try:
            self._loop.load_state_dict(state_dict["loss_scale"] if ours else state_dict)
        except LossScaleError as error:
            _rank_zero().rank_zero_warn(
                f"castwise starts with a new loss scale: {error}"
            )
        if ours:
            self.phase = state_dict["phase"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep our state under one key, also where a subclass has another name."""
        state = self.state_dict()
        if state:
            checkpoint[KEY] = state

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read our state, or what Lightning's MixedPrecision wrote."""
        for key in (KEY, *_STOCK_KEYS):
            if key in checkpoint:
                self.load_state_dict(checkpoint[key])
                return

    def teardown(self) -> None:
        """Take the policy off every model that it is on."""
        self.hosted.take_off()

    # The next two are called by name from the plugin of either package, and would find
    # the one of the first package, which refuses models of the second in silence.

    def _after_closure(self, model: Any, optimizer: Any) -> None:
        _plugin_of(model)._after_closure(self, model, optimizer)  # noqa: SLF001 -- ours by inheritance

    def _clip_gradients(self, model: Any, *args: Any, **kwargs: Any) -> None:
        _plugin_of(model)._clip_gradients(self, model, *args, **kwargs)  # noqa: SLF001 -- ours by inheritance

    def _device_of(self, module: Any) -> torch.device:
        if self.device is not None:
            return torch.device(self.device)
        trainer = getattr(module, "_trainer", None)
        if trainer is not None:
            device: torch.device = trainer.strategy.root_device
            return device
        weight = next(module.parameters(), None)
        where = "cpu" if weight is None else weight.device.type
        return torch.device("cpu" if where == "meta" else where)

    def _outside_autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.hosted.is_idle:
            return contextlib.nullcontext()
        return torch.autocast(self.hosted.device_type, enabled=False)

    @contextlib.contextmanager
    def _new_tensors(self) -> Iterator[None]:
        """As Lightning's 64-true: what a step creates is fp64 there, and only there."""
        if self.policy.default.param != "fp64":
            yield
            return
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)  # noqa: TID251 -- what 64-true means to Lightning; restored below
        try:
            yield
        finally:
            torch.set_default_dtype(before)  # noqa: TID251 -- see above

    def _calls_closure(self, optimizer: object) -> bool:
        """Whether the optimizer runs forward and backward as often as it likes."""
        if not isinstance(optimizer, torch.optim.LBFGS):
            return False
        if isinstance(self._loop.loss_scale, NoScale):
            return True
        raise SettingsError(
            f"{type(optimizer).__name__} calls its closure several times in a step, "
            "so gradients cannot be unscaled once at its end; take another optimizer, "
            "or a policy without a loss scale, such as bf16-mixed"
        )

    def _named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        for model in self.hosted.models:
            yield from model.named_parameters()


def _plugin_of(model: Any) -> Any:
    """The plugin class of the Trainer that has this model; none in Fabric."""
    if getattr(model, "_trainer", None) is None:
        return None
    for package in _LIGHTNINGS:
        if isinstance(model, package.LightningModule):
            return package.plugins.precision.Precision
    return None


def _lightning_name(policy: Policy) -> str:
    """The nearest of Lightning's own names, which its summary and loggers expect."""
    default = policy.default.over(FP32)
    same = (name for name in _LIGHTNING_NAMES if preset(name).default == default)
    return next(same, "32-true")
