"""Every exception that castwise raises on purpose, as one tree.

A message says what was needed, what came, where, and the remedy, in one sentence. The
command line prints it without a traceback and leaves with exit code 2. Whatever is not
in this tree is a bug in castwise or in the user's own code, and keeps its traceback.
"""

from __future__ import annotations


class CastwiseError(Exception):
    """The root of the tree: a mistake that its message explains."""


class SettingsError(CastwiseError):
    """A setting or flag has a value that cannot be honoured."""


class FormatError(CastwiseError):
    """A number format is unknown, or a text does not name one."""


class UnsupportedFormatError(FormatError):
    """A device cannot compute in, or store, the format that was asked for."""


class PolicyError(CastwiseError):
    """A precision policy is wrong."""


class PrecisionTextError(PolicyError):
    """A one-line precision text such as `p=fp32,c=bf16` does not parse."""


class RuleError(PolicyError):
    """A rule contradicts itself or another rule."""


class UnmatchedRuleError(RuleError):
    """A rule matches nothing in the model that it was applied to."""


class PolicyDocumentError(PolicyError):
    """A policy file is malformed; the message names file and line."""


class IslandError(PolicyError):
    """A module cannot be held in the precision that a rule gives it."""


class ContractError(PolicyError):
    """A model did not run in the formats that its policy promises."""


class LossScaleError(CastwiseError):
    """The loss scale was used out of order, or has nowhere left to go."""


class StepError(CastwiseError):
    """A training step was opened, closed or fed in the wrong order."""


class WeightStorageError(CastwiseError):
    """Weights or optimizer states cannot be held, or restored, as asked."""


class CheckpointError(CastwiseError):
    """A checkpoint cannot be written, found or used."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint is truncated, or its contents do not match their digest."""


class ForeignCheckpointError(CheckpointError):
    """A file is no castwise checkpoint, or one of another kind."""


class NewerCheckpointError(CheckpointError):
    """A checkpoint was written by a later version of the file format."""


class ContradictionError(CheckpointError):
    """Settings contradict the checkpoint that a run resumes from; all are named."""


class StorageError(CastwiseError):
    """A file or folder cannot be read or written: full, missing or not permitted."""


class PuzzleError(CastwiseError):
    """A puzzle is malformed or impossible; the message names the place."""


class DataError(CastwiseError):
    """A data set is damaged, of another version, or too small for what was asked."""


class TargetError(CastwiseError):
    """A model, its batches or its loss cannot be used as given; the line is named."""


class RanksError(CastwiseError):
    """Processes that train together are not alike, or one of them is missing."""


class BudgetError(CastwiseError):
    """An error or byte budget cannot be met; the message says by how much."""


class MemoryShortageError(CastwiseError):
    """A step needs more memory than its device has; who holds what, and what helps."""


class MissingExtraError(CastwiseError):
    """An optional package is missing; the message names the extra that brings it."""


class SolverError(CastwiseError):
    """A solver cannot give the answer that was asked for, and will not guess one."""


class PhaseError(CastwiseError):
    """A phase is unknown, or may not follow the one before it."""


class PredictionError(CastwiseError):
    """A predictor cannot predict this model, or proposed what does not fit it."""
