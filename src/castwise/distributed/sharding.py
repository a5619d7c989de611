"""Put the groups of FSDP2 on a model, as a policy wants its weights held and sent.

    sharding = shard(model, policy)             # before the optimizer is built
    optimizer = torch.optim.AdamW(model.parameters())
    run = prepare(model, optimizer, policy)     # islands and operator table, as ever

`shard` brings every weight into its stored format, which nobody can do later, and calls
`fully_shard` once for each group, contained ones first. FSDP2 casts weights and
gradients; inputs and outputs are cast by the islands, and buffers by nobody.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from castwise.distributed.groups import WeightGroup, plan_groups
from castwise.errors import IslandError, SettingsError
from castwise.fitting import is_sharded
from castwise.islands import module_facts
from castwise.islands.application import plan_storage
from castwise.islands.facts import shown
from castwise.islands.swap import island_of
from castwise.policy.bound import BoundPolicy

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn
    from torch.distributed.device_mesh import DeviceMesh

    from castwise.distributed.formats import Gather
    from castwise.policy.rules import Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Sharding:
    """How the weights of a model were grouped."""

    policy: str
    """Name of the policy."""

    num_processes: int
    """Over how many processes each weight is cut."""

    groups: tuple[WeightGroup, ...]
    """The groups, containing ones before contained ones."""

    def summary(self) -> str:
        """One line for a log."""
        kinds: dict[str, int] = {}
        for group in self.groups:
            held = group.formats
            text = f"stored {held.stored}, gathered {held.gathered}"
            kinds[text] = kinds.get(text, 0) + group.num_weights
        total = sum(kinds.values())
        shares = "; ".join(
            f"{100 * number / max(total, 1):.1f} % {text}"
            for text, number in kinds.items()
            if number
        )
        return (
            f"sharding of {self.policy}: {total:,} numbers in {len(self.groups)} "
            f"groups over {self.num_processes} processes; {shares}"
        )

    def explain(self) -> str:
        """One line for each group: its formats, and why it is one."""
        return "\n".join(map(str, self.groups))


def shard(
    model: nn.Module,
    policy: Policy | BoundPolicy,
    *,
    mesh: DeviceMesh | None = None,
    units: Sequence[str] | None = None,
    gather: Gather = "low",
    reshard_after_forward: bool | int | None = None,
) -> Sharding:
    """Shard a model over processes with FSDP2, in the formats of a policy.

    Call it before the optimizer is built and before the policy is put on. The weights
    may stand on the meta device.

    Args:
        model: Any module tree; afterwards its parameters are `DTensor`.
        policy: What is held, sent and summed in which format.
        mesh: The processes. Default: all of them, on the model's kind of device.
        units: Globs for the modules whose weights shall be gathered together. Default:
            the members of every `ModuleList`. Islands are units in any case.
        gather: `low` lets weights that only products read travel in the low format,
            which changes no bit of the forward; `stored` lets none.
        reshard_after_forward: As in `fully_shard`.

    Raises:
        SettingsError: No process group is there, or a glob names no module.
        IslandError: The model is sharded or has a policy on it already, or a weight
            does not fit into a group.
        UnmatchedRuleError: A rule matches nothing in the model.
    """
    if not distributed.is_initialized():
        raise SettingsError(
            "shard needs the processes that share the model; call "
            "torch.distributed.init_process_group first"
        )
    _refuse_late(model)
    bound = (
        policy if isinstance(policy, BoundPolicy) else policy.bind(module_facts(model))
    )
    groups = plan_groups(model, bound, units, gather)
    for each in plan_storage(model, bound):
        each.hold_in(each.after)
    mesh = _whole_mesh(model) if mesh is None else mesh
    for group in reversed(groups):
        fully_shard(
            model.get_submodule(group.fqn),
            mesh=mesh,
            reshard_after_forward=reshard_after_forward,
            mp_policy=group.formats.mixed_precision(),
        )
    return Sharding(
        policy=bound.policy.name, num_processes=mesh.size(), groups=tuple(groups)
    )


def _refuse_late(model: nn.Module) -> None:
    for fqn, module in model.named_modules():
        if island_of(module) is not None:
            raise IslandError(
                f"{shown(fqn)} is an island already, and the optimizer would step by "
                "weights of before; call shard first, build the optimizer, then prepare"
            )
        if isinstance(module, FSDPModule):
            raise IslandError(
                f"{shown(fqn)} is sharded already, and its weights cannot change their "
                "groups; call shard on the whole model instead of fully_shard"
            )
    for name, weight in model.named_parameters():
        if is_sharded(weight):
            raise IslandError(
                f"{name!r} is a DTensor already; call shard on a model whose weights "
                "are whole"
            )


def _whole_mesh(model: nn.Module) -> DeviceMesh:
    kinds = {weight.device.type for weight in model.parameters()} - {"meta"}
    kind = next(iter(kinds), "cuda" if torch.cuda.is_available() else "cpu")
    return init_device_mesh(kind, (distributed.get_world_size(),))
