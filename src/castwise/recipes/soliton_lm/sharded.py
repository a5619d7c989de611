"""FSDP2 in Lightning, with checkpoints of castwise.

Lightning has two strategies. `FSDPStrategy` wraps modules in FSDP1, and refuses any
device but a GPU; `ModelParallelStrategy` leaves sharding to `configure_model`, and runs
wherever FSDP2 does, over gloo on a CPU as well. What it would save is a pickle. Here
each rank gives its part of weights and states to the run's checkpoint files, and takes
from them what it will hold, whoever saved them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, final

from lightning.pytorch.strategies import ModelParallelStrategy

from castwise.distributed.sharding import shard
from castwise.fitting import fit_to_device, is_sharded
from castwise.training.resharding import laid_out

if TYPE_CHECKING:
    import torch
    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from castwise.policy import Policy


def cutter(
    policy: Policy, device: torch.device, fallback: str | None
) -> Callable[[nn.Module, DeviceMesh], None]:
    """Return what cuts a model over the processes of a mesh.

    Args:
        policy: That the run will train under.
        device: Where.
        fallback: The format to use instead of one that the device cannot do.
    """
    fitted, _ = fit_to_device(policy, device, fallback)

    def cut(model: nn.Module, mesh: DeviceMesh) -> None:
        shard(model, fitted, mesh=mesh)

    return cut


def whole_weights(model: nn.Module) -> dict[str, Any]:
    """Return every weight in one piece; every rank must call."""
    return {
        name: each.full_tensor() if is_sharded(each) else each
        for name, each in model.state_dict().items()
    }


@final
class ShardedStrategy(ModelParallelStrategy):
    """Cuts weights over all processes; each writes and reads its own part.

    Args:
        num_ranks: How many processes there are.
    """

    def __init__(self, num_ranks: int) -> None:
        super().__init__(data_parallel_size=num_ranks, tensor_parallel_size=1)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Let Lightning hand over the states that `load_checkpoint` has returned."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's part of every weight."""
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        """Return this rank's part of every state."""
        bare = getattr(optimizer, "optimizer", optimizer)  # inside LightningOptimizer
        found: dict[str, Any] = bare.state_dict()
        return found

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        """Let every rank write, through the files of the run."""
        self.checkpoint_io.save_checkpoint(checkpoint, filepath, storage_options)

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return a checkpoint with every tensor cut as this run holds it."""
        found = self.checkpoint_io.load_checkpoint(
            checkpoint_path, weights_only=weights_only
        )
        module = self.lightning_module
        assert module is not None
        (optimizer,), (states,) = self.optimizers, found["optimizer_states"]
        tree = {"model": found["state_dict"], "optimizer": states, "averages": {}}
        cut = laid_out(tree, module, optimizer)
        return {
            **found,
            "state_dict": cut["model"],
            "optimizer_states": [cut["optimizer"]],
        }

    def load_model_state_dict(
        self, checkpoint: Mapping[str, Any], strict: bool = True
    ) -> None:
        """Load what was cut."""
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load what was cut."""
        for optimizer, states in zip(
            self.optimizers, checkpoint["optimizer_states"], strict=True
        ):
            optimizer.load_state_dict(states)
