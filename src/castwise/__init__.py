"""castwise: mixed-precision training that is planned by evidence, applied, and proved.

Importing this package loads neither torch nor any integration: each public name is
fetched from its room on first use, so that `castwise --help` answers at once.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from castwise.decision import Decision as Decision
    from castwise.errors import CastwiseError as CastwiseError
    from castwise.loss_scale import DynamicScale as DynamicScale
    from castwise.loss_scale import NoScale as NoScale
    from castwise.loss_scale import StaticScale as StaticScale
    from castwise.policy import Policy as Policy
    from castwise.policy import preset as preset
    from castwise.training.step import Run as Run
    from castwise.training.step import Skipped as Skipped
    from castwise.training.step import Stepped as Stepped
    from castwise.training.step import prepare as prepare

__version__ = "0.1.0"

# public name -> the room that owns it
_ROOMS = {
    "CastwiseError": "castwise.errors",
    "Decision": "castwise.decision",
    "DynamicScale": "castwise.loss_scale",
    "NoScale": "castwise.loss_scale",
    "Policy": "castwise.policy",
    "Run": "castwise.training.step",
    "Skipped": "castwise.training.step",
    "StaticScale": "castwise.loss_scale",
    "Stepped": "castwise.training.step",
    "prepare": "castwise.training.step",
    "preset": "castwise.policy",
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
