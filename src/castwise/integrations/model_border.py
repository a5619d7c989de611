"""The region of a policy at the border of the model itself, for loops without a seam.

Lightning lets a plugin stand around each step; a loop of transformers or Accelerate, or
any other, only calls `model(...)`, `loss.backward()` and `optimizer.step()`. So all
that a step needs is put where these three touch the model:

    model(...)         enters the region, runs, leaves it: the root is made an island
    loss.backward()    gradients that enter the model are multiplied by the loss scale,
                       and those that leave it into a weight are divided again
    optimizer.step()   gradients that are not finite are taken away, so nothing moves

By the chain rule that is a scaled loss, but clipping, accumulation and logging see true
gradients, and the host need not know. Outputs leave in the format that they are
computed in, with one exception that is reported: under a loss scale fp16 outputs leave
in fp32, because the gradient must be multiplied before it is rounded to fp16.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from castwise.errors import IslandError, StepError
from castwise.integrations.hosted import HostedPolicy
from castwise.islands.border import Border, Island, PhaseNow
from castwise.islands.crossing import Crossing
from castwise.islands.swap import island_of, make_island, unmake_island
from castwise.loss_scale import LossScale, NonFinite, NoScale
from castwise.policy.keys import PHASES
from castwise.region import Region

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import nn
    from torch.utils.hooks import RemovableHandle


class BorderedModel:
    """A model whose own border puts the policy into force; made by `put_policy`.

    Args:
        model: Any module tree.
        hosted: The policy to put on it.
        device: Where the model stands.
        loss_scale: What gradients are multiplied by inside the model.
    """

    def __init__(
        self,
        model: nn.Module,
        hosted: HostedPolicy,
        device: torch.device,
        loss_scale: LossScale,
    ) -> None:
        self.model, self.hosted, self.loss_scale = model, hosted, loss_scale
        self.num_skipped = 0
        self.last_finding: NonFinite | None = None
        self.report: tuple[str, ...] = ()
        self._largest: dict[torch.Tensor, torch.Tensor] = {}  # of the gradients so far
        self._handles: list[RemovableHandle] = []
        self._now = PhaseNow("full")
        if not hosted.is_idle:
            lines = hosted.put_on(model, device, self.remove)
            self.report = (*lines, *self._outputs_widened())
            self._surround(device.type)
            for weight in model.parameters():
                if weight.requires_grad:
                    handle = weight.register_hook(self._leaving(weight))  # type: ignore[no-untyped-call]
                    self._handles.append(handle)

    @property
    def phase(self) -> str:
        """The phase whose precision is in force; may change between steps."""
        return self.hosted.phase

    @phase.setter
    def phase(self, phase: str) -> None:
        self.hosted.phase = self._now.phase = phase

    def coverage(self) -> str:
        """One line: which modules run in another format than the rest."""
        return self.hosted.coverage()

    def guard(self, optimizer: Any) -> None:
        """Keep gradients that are not finite from an optimizer; let the scale learn.

        Args:
            optimizer: Of torch, or one that Accelerate wraps around it.
        """
        if not self.hosted.is_idle:
            inner = getattr(optimizer, "optimizer", optimizer)
            self._handles.append(inner.register_step_pre_hook(self._before_step))

    def state_dict(self) -> dict[str, Any]:
        """Return the loss scale's state and the phase, as plain values."""
        return {"loss_scale": self.loss_scale.state_dict(), "phase": self.phase}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where `state_dict` was taken.

        Raises:
            LossScaleError: It was taken with another kind of loss scale.
        """
        self.phase = state["phase"]
        self.loss_scale.load_state_dict(state["loss_scale"])

    def remove(self) -> None:
        """Take everything off the model and its optimizers."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._largest.clear()
        if not self.hosted.is_idle:
            unmake_island(self.model)
            self.hosted.take_off(self.model)

    def _outputs_widened(self) -> tuple[str, ...]:
        if isinstance(self.loss_scale, NoScale):
            return ()
        return ("fp16 outputs leave the model in fp32, where the loss scale enters",)

    def _surround(self, device_type: str) -> None:
        """Make the root an island whose border enters the region."""
        own = island_of(self.model)
        if own is not None and own.own_backward:
            self.remove()
            raise IslandError(
                "the whole model has a backward of its own, which only castwise's own "
                "loop can surround; give the rule of that stage a module"
            )
        policy = self.hosted.effective
        scale = None if isinstance(self.loss_scale, NoScale) else self.loss_scale
        borders: dict[str, Border | None] = {}
        for phase in PHASES:
            border = None if own is None else own.borders[phase]
            base = policy.base_precision(phase=phase)
            assert base.compute is not None
            borders[phase] = _OuterBorder(
                compute=border.compute if border else base.compute,
                output=None,
                device_type=device_type,
                casts_weights=border.casts_weights if border else False,
                region=Region.of(policy, phase, self.hosted.applied),
                is_island=border is not None,
                loss_scale=scale,
            )
        make_island(self.model, Island(fqn="", borders=borders, now=self._now))

    def _leaving(
        self, weight: torch.Tensor
    ) -> Callable[[torch.Tensor], torch.Tensor | None]:
        """Divide a gradient by the scale on its way into a weight, and look at it."""

        def leave(gradient: torch.Tensor) -> torch.Tensor | None:
            scale = self.loss_scale.scale
            if scale != 1:
                gradient = gradient * (1.0 / scale)
            values = gradient.coalesce().values() if gradient.is_sparse else gradient
            if values.numel():
                largest = torch.linalg.vector_norm(values.detach(), math.inf)
                before = self._largest.get(weight, largest)
                self._largest[weight] = torch.maximum(before, largest)  # keeps NaN
            return gradient if scale != 1 else None

        return leave

    def _before_step(
        self, optimizer: torch.optim.Optimizer, _args: object, _kwargs: object
    ) -> None:
        weights = [w for group in optimizer.param_groups for w in group["params"]]
        weights = [w for w in weights if w.grad is not None]
        self._refuse_unseen(weights)
        finding = self._finding(weights)
        for weight in weights:
            self._largest.pop(weight, None)
            if finding is not None:
                weight.grad = None  # an optimizer passes over weights without one
        self.last_finding = finding
        self.num_skipped += finding is not None
        self.loss_scale.adjust(finding)

    def _finding(self, weights: list[torch.Tensor]) -> NonFinite | None:
        """The first gradient that was not finite when it reached its weight."""
        seen = [weight for weight in weights if weight in self._largest]
        if not seen:
            return None
        largest = torch.stack([self._largest[w].float() for w in seen]).cpu()
        if bool(largest.isfinite().all()):
            return None
        at = int((~largest.isfinite()).nonzero()[0])
        kind: Any = "NaN" if math.isnan(largest[at]) else "inf"
        names = self._names()
        return NonFinite(parameter=names.get(seen[at], "a weight"), kind=kind)

    def _names(self) -> dict[torch.Tensor, str]:
        return {weight: name for name, weight in self.model.named_parameters()}

    def _refuse_unseen(self, weights: list[torch.Tensor]) -> None:
        """A gradient that passed by us still holds the loss scale."""
        ours = {} if isinstance(self.loss_scale, NoScale) else self._names()
        for weight in weights:
            if weight in ours and weight not in self._largest and weight.numel():
                raise StepError(
                    f"the gradient of {ours[weight]!r} did not come by its weight, so "
                    "the loss scale is still in it; sharded weights need a policy "
                    "without a loss scale, such as bf16-mixed"
                )


@dataclass(frozen=True, kw_only=True, slots=True)
class _OuterBorder(Border):
    """The border of the whole model, with the region around it."""

    region: Region
    """What is in force inside."""

    is_island: bool
    """Whether values are cast here as well."""

    loss_scale: LossScale | None
    """What gradients are multiplied by on their way in, if by anything."""

    def run(
        self,
        module: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Enter the region, run, and leave it."""
        return _run_outside_graphs(self, module, forward, args, kwargs)


@torch.compiler.disable(recursive=False)  # type: ignore[no-untyped-call,untyped-decorator]
def _run_outside_graphs(
    border: _OuterBorder,
    module: nn.Module,
    forward: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    """Enter the region in eager mode; what is compiled is the model inside."""
    with border.region.entered(border.device_type):
        if border.is_island:
            outputs = Border.run(border, module, forward, args, kwargs)
        else:
            outputs = forward(module, *args, **kwargs)
    if border.loss_scale is None or not torch.is_grad_enabled():
        return outputs
    return _Scaling(border.loss_scale).values(outputs)


class _Scaling(Crossing):
    """Multiplies the gradient of every output by the loss scale."""

    __slots__ = ("_loss_scale",)

    def __init__(self, loss_scale: LossScale) -> None:
        super().__init__(torch.float32)
        self._loss_scale = loss_scale

    def _leaf(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or not value.requires_grad:
            return value
        return _ScaleGradient.apply(value, self._loss_scale)  # type: ignore[no-untyped-call]


class _ScaleGradient(torch.autograd.Function):
    """A copy, whose gradient is multiplied by a loss scale before it may be rounded."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, loss_scale: LossScale) -> torch.Tensor:
        ctx.loss_scale, ctx.dtype = loss_scale, tensor.dtype
        # a copy in any case: hosts change a loss in place, which a view forbids
        wide = torch.float32 if tensor.dtype is torch.float16 else tensor.dtype
        return tensor.to(wide, copy=True)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[torch.Tensor, None]:
        return (gradients[0] * ctx.loss_scale.scale).to(ctx.dtype), None
