"""The same policy file for transformers.Trainer and for plain Accelerate.

    trainer = Trainer(model, args, callbacks=[CastwiseCallback("policy.yaml")])

    accelerator = Accelerator()
    bordered = put_policy(model, "policy.yaml", optimizer, accelerator=accelerator)
    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)

Everything that a step needs stands at the model's own border (`model_border.py`), so
neither Trainer nor Accelerator is subclassed or patched. Precision has one master: the
`bf16=True`, `fp16=True` and `mixed_precision=` of the host are refused beside a policy.
They would run their own autocast, cast every output to fp32 and not say so, and on a
CPU `fp16` of Accelerate computes in fp32.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import TYPE_CHECKING, Any

import torch

from castwise.errors import LossScaleError, MissingExtraError, SettingsError
from castwise.fitting import device_of
from castwise.integrations.hosted import HostedPolicy, Unmatched, policy_of
from castwise.integrations.model_border import BorderedModel
from castwise.loss_scale import LossScale, loss_scale_of
from castwise.policy.rules import Policy

if TYPE_CHECKING:
    from pathlib import Path

    from torch import nn

for _package in ("transformers", "accelerate"):
    if importlib.util.find_spec(_package) is None:
        raise MissingExtraError(
            f"castwise.integrations.huggingface needs the package {_package}, which is "
            "not installed; get it by pip install 'castwise[huggingface]'"
        )

from accelerate.state import AcceleratorState  # noqa: E402 -- asked for above
from transformers.trainer_callback import (  # noqa: E402 -- asked for above
    ExportableState,
    TrainerCallback,
)

__all__ = ["BorderedModel", "CastwiseCallback", "put_policy"]

_logger = logging.getLogger(__name__)

_HOST_PRECISION = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")


def put_policy(
    model: nn.Module,
    policy: Policy | str | Path,
    *optimizers: Any,
    accelerator: Any = None,
    loss_scale: LossScale | None = None,
    fallback: str | None = None,
    unmatched: Unmatched = "raise",
) -> BorderedModel:
    """Put a policy on a model that a loop without a seam will train.

    Args:
        model: Any module tree, before `accelerator.prepare`.
        policy: A policy, the name of a preset, or a policy file.
        optimizers: Those that step the model; gradients that are not finite are kept
            from them. Give others to `guard` of what is returned.
        accelerator: Its device is used. Default: where the model stands.
        loss_scale: Default: what the policy says, or else what its formats need.
        fallback: The format to use instead of one that the device cannot do.
        unmatched: What happens to a rule that matches nothing: `raise` or `warn`.

    Raises:
        SettingsError: The accelerator has a mixed precision of its own.
        UnmatchedRuleError: A rule matches nothing in the model.
        UnsupportedFormatError: The device cannot do a format of the policy.
        IslandError: A module cannot be held as the policy says.
    """
    if accelerator is not None:
        _refuse_second_master(accelerator.mixed_precision, "Accelerator")
    asked = policy_of(policy)
    device = device_of(model) if accelerator is None else accelerator.device
    bordered = BorderedModel(
        model,
        HostedPolicy(asked, fallback=fallback, unmatched=unmatched),
        device,
        loss_scale or loss_scale_of(asked.decide_loss_scale().value),
    )
    for optimizer in optimizers:
        bordered.guard(optimizer)
    for number, line in enumerate(bordered.report):
        _logger.log(logging.WARNING if number else logging.INFO, "%s", line)
    return bordered


class CastwiseCallback(TrainerCallback, ExportableState):
    """A castwise policy for `transformers.Trainer`.

    The state of the loss scale is kept in `trainer_state.json` of every checkpoint, and
    read when training resumes from one.

    Args:
        policy: A policy, the name of a preset, or a policy file.
        loss_scale: Default: what the policy says, or else what its formats need.
        fallback: The format to use instead of one that the device cannot do.
        unmatched: What happens to a rule that matches nothing: `raise` or `warn`.
    """

    def __init__(
        self,
        policy: Policy | str | Path,
        *,
        loss_scale: LossScale | None = None,
        fallback: str | None = None,
        unmatched: Unmatched = "raise",
    ) -> None:
        self.policy = policy_of(policy)
        self.bordered: BorderedModel | None = None
        self._loss_scale = loss_scale
        self._fallback, self._unmatched = fallback, unmatched
        self._guarded: torch.optim.Optimizer | None = None

    def on_init_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Put the policy on the model, before the Trainer wraps it."""
        del state, control
        for name in _HOST_PRECISION:
            if getattr(args, name, False):
                _refuse_second_master(f"{name}=True", "TrainingArguments")
        _refuse_second_master(AcceleratorState().mixed_precision, "Accelerate")
        self.bordered = put_policy(
            kwargs["model"],
            self.policy,
            loss_scale=self._loss_scale,
            fallback=self._fallback,
            unmatched=self._unmatched,
        )

    def on_train_begin(
        self, args: Any, state: Any, control: Any, **kwargs: Any
    ) -> None:
        """Guard the optimizer, and continue with the loss scale of a checkpoint."""
        del args, control
        assert self.bordered is not None
        inner = getattr(kwargs["optimizer"], "optimizer", kwargs["optimizer"])
        if self._guarded is not inner:
            self.bordered.guard(inner)
            self._guarded = inner
        kept = state.stateful_callbacks.get(type(self).__name__, {})
        found = (
            kept.get("attributes", {}).get("run") if isinstance(kept, dict) else None
        )
        if found is not None:
            try:
                self.bordered.load_state_dict(found)
            except LossScaleError as error:
                _logger.warning("starting with a new loss scale: %s", error)

    def state(self) -> dict[str, Any]:
        """Return what `trainer_state.json` keeps."""
        run = None if self.bordered is None else self.bordered.state_dict()
        return {"args": {}, "attributes": {"run": run}}

    def coverage(self) -> str:
        """One line: which modules run in another format than the rest."""
        return "on no model yet" if self.bordered is None else self.bordered.coverage()

    def remove(self) -> None:
        """Take the policy off the model."""
        if self.bordered is not None:
            self.bordered.remove()
            self.bordered = self._guarded = None


def _refuse_second_master(asked: str, who: str) -> None:
    if asked != "no":
        raise SettingsError(
            f"precision has one master, and {who} has {asked} beside the policy: it "
            "would run its own autocast and cast every output to fp32; leave that out "
            "and let the policy decide"
        )
