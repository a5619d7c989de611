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
    from castwise.distributed.likeness import watch_ranks as watch_ranks
    from castwise.distributed.replication import feedback_of as feedback_of
    from castwise.distributed.replication import replicate as replicate
    from castwise.distributed.sharding import Sharding as Sharding
    from castwise.distributed.sharding import shard as shard
    from castwise.errors import CastwiseError as CastwiseError
    from castwise.graph import CompiledModel as CompiledModel
    from castwise.graph import Plan as Plan
    from castwise.graph import compile as compile  # noqa: A004 -- as in torch.compile
    from castwise.hybrid.hybrid_trainer import HybridTrainer as HybridTrainer
    from castwise.integrations.grad_scaler import GradScaler as GradScaler
    from castwise.islands import AppliedPolicy as AppliedPolicy
    from castwise.islands import apply_policy as apply_policy
    from castwise.islands import module_facts as module_facts
    from castwise.layers.cayley import CayleyPropagator as CayleyPropagator
    from castwise.layers.resolvent import resolvent_diagonal as resolvent_diagonal
    from castwise.loss_scale import DynamicScale as DynamicScale
    from castwise.loss_scale import NoScale as NoScale
    from castwise.loss_scale import StaticScale as StaticScale
    from castwise.memory.budget import BudgetPlan as BudgetPlan
    from castwise.memory.budget import plan_for_budget as plan_for_budget
    from castwise.memory.estimate import Estimate as Estimate
    from castwise.memory.estimate import estimate as estimate
    from castwise.memory.monitor import MemoryMonitor as MemoryMonitor
    from castwise.memory.offload import offload_saves as offload_saves
    from castwise.memory.recompute import recompute as recompute
    from castwise.memory.saves import store_saves as store_saves
    from castwise.numerics.census import FormatCensus as FormatCensus
    from castwise.numerics.census import observe as observe
    from castwise.numerics.contract import Contract as Contract
    from castwise.numerics.contract import contract as contract
    from castwise.numerics.diagnose import Diagnosis as Diagnosis
    from castwise.numerics.diagnose import diagnose as diagnose
    from castwise.numerics.lint import LintReport as LintReport
    from castwise.numerics.lint import lint as lint
    from castwise.numerics.search import Budget as Budget
    from castwise.numerics.search import Found as Found
    from castwise.numerics.search import Measure as Measure
    from castwise.numerics.search import SearchSettings as SearchSettings
    from castwise.numerics.search import search as search
    from castwise.numerics.validate import Validation as Validation
    from castwise.numerics.validate import validate as validate
    from castwise.numerics.validate.plain_function import (
        validate_function as validate_function,
    )
    from castwise.numerics.watch import WatchSchedule as WatchSchedule
    from castwise.numerics.watch import watch as watch
    from castwise.optim import hold_weights as hold_weights
    from castwise.policy import OperatorTable as OperatorTable
    from castwise.policy import Policy as Policy
    from castwise.policy import Precision as Precision
    from castwise.policy import Rule as Rule
    from castwise.policy import preset as preset
    from castwise.rounding import round_nearest as round_nearest
    from castwise.rounding import round_stochastic as round_stochastic
    from castwise.training.sentinel import Sentinel as Sentinel
    from castwise.training.sentinel import SentinelSettings as SentinelSettings
    from castwise.training.step import Run as Run
    from castwise.training.step import Skipped as Skipped
    from castwise.training.step import Stepped as Stepped
    from castwise.training.step import prepare as prepare

__version__ = "0.1.0"

# public name -> the room that owns it
_ROOMS = {
    "AppliedPolicy": "castwise.islands",
    "Budget": "castwise.numerics.search",
    "BudgetPlan": "castwise.memory.budget",
    "CastwiseError": "castwise.errors",
    "CayleyPropagator": "castwise.layers.cayley",
    "CheckpointShelf": "castwise.checkpoints",
    "CompiledModel": "castwise.graph",
    "Contract": "castwise.numerics.contract",
    "Decision": "castwise.decision",
    "Diagnosis": "castwise.numerics.diagnose",
    "DynamicScale": "castwise.loss_scale",
    "Estimate": "castwise.memory.estimate",
    "FormatCensus": "castwise.numerics.census",
    "Found": "castwise.numerics.search",
    "GradScaler": "castwise.integrations.grad_scaler",
    "HybridTrainer": "castwise.hybrid.hybrid_trainer",
    "LintReport": "castwise.numerics.lint",
    "Measure": "castwise.numerics.search",
    "MemoryMonitor": "castwise.memory.monitor",
    "NoScale": "castwise.loss_scale",
    "OperatorTable": "castwise.policy",
    "Plan": "castwise.graph",
    "Policy": "castwise.policy",
    "Precision": "castwise.policy",
    "Rule": "castwise.policy",
    "Run": "castwise.training.step",
    "SearchSettings": "castwise.numerics.search",
    "Sentinel": "castwise.training.sentinel",
    "SentinelSettings": "castwise.training.sentinel",
    "Sharding": "castwise.distributed.sharding",
    "Skipped": "castwise.training.step",
    "StaticScale": "castwise.loss_scale",
    "Stepped": "castwise.training.step",
    "Validation": "castwise.numerics.validate",
    "WatchSchedule": "castwise.numerics.watch",
    "apply_policy": "castwise.islands",
    "compile": "castwise.graph",
    "contract": "castwise.numerics.contract",
    "diagnose": "castwise.numerics.diagnose",
    "estimate": "castwise.memory.estimate",
    "feedback_of": "castwise.distributed.replication",
    "hold_weights": "castwise.optim",
    "lint": "castwise.numerics.lint",
    "load_checkpoint": "castwise.checkpoints",
    "module_facts": "castwise.islands",
    "observe": "castwise.numerics.census",
    "offload_saves": "castwise.memory.offload",
    "plan_for_budget": "castwise.memory.budget",
    "prepare": "castwise.training.step",
    "preset": "castwise.policy",
    "recompute": "castwise.memory.recompute",
    "replicate": "castwise.distributed.replication",
    "resolvent_diagonal": "castwise.layers.resolvent",
    "round_nearest": "castwise.rounding",
    "round_stochastic": "castwise.rounding",
    "save_checkpoint": "castwise.checkpoints",
    "search": "castwise.numerics.search",
    "shard": "castwise.distributed.sharding",
    "store_saves": "castwise.memory.saves",
    "validate": "castwise.numerics.validate",
    "validate_function": "castwise.numerics.validate.plain_function",
    "watch": "castwise.numerics.watch",
    "watch_ranks": "castwise.distributed.likeness",
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
