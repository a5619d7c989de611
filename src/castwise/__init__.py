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

__version__ = "0.1.0"

# public name -> the room that owns it
_ROOMS = {
    "CastwiseError": "castwise.errors",
    "Decision": "castwise.decision",
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
