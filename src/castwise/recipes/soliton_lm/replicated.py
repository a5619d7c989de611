"""DDP in Lightning that sums gradients as the policy's `reduce` says, or smaller ones.

Lightning's own sums them in the format of the weights, whatever the policy says.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, final

from lightning.pytorch.strategies import DDPStrategy

from castwise.distributed.replication import replicate
from castwise.fitting import fit_to_device

if TYPE_CHECKING:
    from torch import nn
    from torch.nn.parallel import DistributedDataParallel

    from castwise.integrations.lightning import CastwisePrecision


@final
class ReplicatedStrategy(DDPStrategy):
    """Wraps the module by `castwise.replicate` once the policy is on it.

    Args:
        precision: The policy in force, with its loss scale.
        fallback: The format to use instead of one that the device cannot do.
        compress: How gradients are made smaller, as `replicate` reads it.
    """

    def __init__(
        self, precision: CastwisePrecision, fallback: str | None, compress: str
    ) -> None:
        super().__init__()
        self._castwise, self._fallback, self._compress = precision, fallback, compress

    def _setup_model(self, model: nn.Module) -> DistributedDataParallel:
        policy, _ = fit_to_device(
            self._castwise.policy, self.root_device, self._fallback
        )
        return replicate(
            model,
            policy,
            compress=self._compress,
            loss_scale=self._castwise.loss_scale,
            device_ids=self.determine_ddp_device_ids(),
        )
