"""Steps that survive 16 bits: how weights are held, updated, clipped and stored."""

from __future__ import annotations

from castwise.optim.adamw import AdamW as AdamW
from castwise.optim.clipping import ByGroup as ByGroup
from castwise.optim.clipping import ByRow as ByRow
from castwise.optim.holding import HeldIn as HeldIn
from castwise.optim.holding import HeldWeights as HeldWeights
from castwise.optim.holding import held_weights_of as held_weights_of
from castwise.optim.holding import hold_weights as hold_weights
from castwise.optim.lion import Lion as Lion
from castwise.optim.plain_states import load_plain_state_dict as load_plain_state_dict
from castwise.optim.plain_states import plain_state_dict as plain_state_dict
from castwise.optim.sgd import SGD as SGD
from castwise.optim.storage import STORAGES as STORAGES
from castwise.optim.sweep import SweepOutcome as SweepOutcome
from castwise.optim.sweep import SweepSettings as SweepSettings
from castwise.optim.unscale_clip import unscale_and_clip as unscale_and_clip
