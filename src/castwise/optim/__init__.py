"""Steps that survive 16 bits: how weights are held, updated, clipped and stored."""

from __future__ import annotations

from castwise.optim.holding import HeldWeights as HeldWeights
from castwise.optim.holding import hold_weights as hold_weights
from castwise.optim.storage import STORAGES as STORAGES
