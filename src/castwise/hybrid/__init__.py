"""Training in phases, with a precision for each, and predictions that are verified.

hybrid_trainer.py     HybridTrainer: one step of whatever phase it is
settings.py           HybridSettings and their builder
phase_precision.py    MixedPrecisionConfig: the format of each phase
phases.py             the table of transitions
predictor.py          the seam; predictors/ are behind it
prediction.py         one prediction from proposal to landing
verification.py       two forwards on a fresh batch
exact_weights.py      weights in fp32, snapshots, rollback
residuals.py          what predictions got wrong, tensor by tensor
divergence.py         when the loss leaves its course
phase_length.py       the seam of how far to predict: by rule (horizon.py), or by a
                      bandit that may choose not to (arms.py)
pace.py               what a fall of the loss is worth in steps
resting_states.py     optimizer states that leave the device while nothing needs them
agreement.py          one decision on every process
phase_statistics.py   what each phase cost and brought; phase_meter.py measures it
memory_by_phase.py    what each phase will hold, before anything runs
stepping.py           the same as the steps of the plain trainer, for recipes
bench/                does it pay? A benchmark that can say no
"""

from __future__ import annotations

from castwise.hybrid.hybrid_trainer import HybridStep as HybridStep
from castwise.hybrid.hybrid_trainer import HybridTrainer as HybridTrainer
from castwise.hybrid.memory_by_phase import estimate_memory as estimate_memory
from castwise.hybrid.phase_precision import MixedPrecisionConfig as MixedPrecisionConfig
from castwise.hybrid.phases import Phase as Phase
from castwise.hybrid.phases import Transition as Transition
from castwise.hybrid.predictor import Predictor as Predictor
from castwise.hybrid.predictors import PREDICTORS as PREDICTORS
from castwise.hybrid.settings import HybridSettings as HybridSettings
