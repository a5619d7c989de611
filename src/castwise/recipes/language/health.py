"""The measures of a model's sensitive layers, as one number each for the journal."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Probe(Protocol):
    """What watches the sensitive layers of a model, by forward hooks."""

    paused: bool
    """Whether forwards pass unmeasured."""

    def read(self) -> Mapping[str, Any]:
        """Return the latest measures by fqn, as dataclasses."""
        ...


class NoProbe:
    """Watches nothing: for models without a sensitive layer."""

    paused = True

    def read(self) -> Mapping[str, Any]:
        """Return nothing."""
        return {}


def worst(found: Mapping[str, Any]) -> dict[str, float]:
    """Return the worst of all layers for each measure; NaN is worse than any number."""
    rows = list(found.values())
    if not rows:
        return {}
    names = [
        field.name for field in dataclasses.fields(rows[0]) if field.name != "messages"
    ]
    return {name: float(np.max([getattr(row, name) for row in rows])) for name in names}


def messages(found: Mapping[str, Any]) -> list[str]:
    """Return why measures are missing, with the layer."""
    return [f"{fqn}: {text}" for fqn, row in found.items() for text in row.messages]
