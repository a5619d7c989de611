"""castwise: mixed-precision training that is planned by evidence, applied, and proved.

Importing this package loads neither torch nor any integration: each public name is
fetched from its room on first use, so that `castwise --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castwise.checkpoints import CheckpointShelf as CheckpointShelf
    from castwise.checkpoints import load_checkpoint as load_checkpoint
    from castwise.checkpoints import save_checkpoint as save_checkpoint
    from castwise.decision import Decision as Decision
    from castwise.errors import CastwiseError as CastwiseError
    from castwise.hybrid.hybrid_trainer import HybridTrainer as HybridTrainer
    from castwise.islands import AppliedPolicy as AppliedPolicy
    from castwise.islands import apply_policy as apply_policy
    from castwise.islands import module_facts as module_facts
    from castwise.layers.cayley import CayleyPropagator as CayleyPropagator
    from castwise.layers.resolvent import resolvent_diagonal as resolvent_diagonal
    from castwise.loss_scale import DynamicScale as DynamicScale
    from castwise.loss_scale import NoScale as NoScale
    from castwise.loss_scale import StaticScale as StaticScale
    from castwise.memory.monitor import MemoryMonitor as MemoryMonitor
    from castwise.numerics.census import FormatCensus as FormatCensus
    from castwise.numerics.census import observe as observe
    from castwise.numerics.contract import Contract as Contract
    from castwise.numerics.contract import contract as contract
    from castwise.optim import hold_weights as hold_weights
    from castwise.policy import OperatorTable as OperatorTable
    from castwise.policy import Policy as Policy
    from castwise.policy import Precision as Precision
    from castwise.policy import Rule as Rule
    from castwise.policy import preset as preset
    from castwise.rounding import round_nearest as round_nearest
    from castwise.rounding import round_stochastic as round_stochastic
    from castwise.training.step import Run as Run
    from castwise.training.step import Skipped as Skipped
    from castwise.training.step import Stepped as Stepped
    from castwise.training.step import prepare as prepare

__version__ = "0.1.0"

# public name -> the room that owns it
_ROOMS = {
    "AppliedPolicy": "castwise.islands",
    "CastwiseError": "castwise.errors",
    "CayleyPropagator": "castwise.layers.cayley",
    "CheckpointShelf": "castwise.checkpoints",
    "Contract": "castwise.numerics.contract",
    "Decision": "castwise.decision",
    "DynamicScale": "castwise.loss_scale",
    "FormatCensus": "castwise.numerics.census",
    "HybridTrainer": "castwise.hybrid.hybrid_trainer",
    "MemoryMonitor": "castwise.memory.monitor",
    "NoScale": "castwise.loss_scale",
    "OperatorTable": "castwise.policy",
    "Policy": "castwise.policy",
    "Precision": "castwise.policy",
    "Rule": "castwise.policy",
    "Run": "castwise.training.step",
    "Skipped": "castwise.training.step",
    "StaticScale": "castwise.loss_scale",
    "Stepped": "castwise.training.step",
    "apply_policy": "castwise.islands",
    "contract": "castwise.numerics.contract",
    "hold_weights": "castwise.optim",
    "load_checkpoint": "castwise.checkpoints",
    "module_facts": "castwise.islands",
    "observe": "castwise.numerics.census",
    "prepare": "castwise.training.step",
    "preset": "castwise.policy",
    "resolvent_diagonal": "castwise.layers.resolvent",
    "round_nearest": "castwise.rounding",
    "round_stochastic": "castwise.rounding",
    "save_checkpoint": "castwise.checkpoints",
}

__all__ = ["__version__", *sorted(_ROOMS)]  # noqa: PLE0604 -- the table is the list


def __getattr__(name: str) -> Any:
    """Fetch a public name from its room (PEP 562)."""
    if name not in _ROOMS:
        raise AttributeError(f"module 'castwise' has no attribute {name!r}")
    return getattr(importlib.import_module(_ROOMS[name]), name)


def __dir__() -> list[str]:
    """List the public names."""
    return sorted(__all__)
