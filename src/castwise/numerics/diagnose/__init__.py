"""Diagnosis: it broke, or it is wrong. Rounding, range, or an algorithm that fails?

    cause = diagnose(model, batches, loss_fn, policy)
    cause.summary()    Net under 16-mixed: range at mul in attention (forward) ...

The rooms, from the ground upwards:

    causes.py        what is said: one cause, where, the evidence and the remedy
    experiments.py   a format taken apart, a trail of infinities, an update
    case.py          a subject that can be run in every way that tells something
    answers.py       what was found, put into words
    hypotheses.py    what is looked for, in order
    diagnosis.py     one after the other, until one holds: `diagnose`
"""

from __future__ import annotations

from castwise.numerics.diagnose.causes import Blame as Blame
from castwise.numerics.diagnose.causes import Cause as Cause
from castwise.numerics.diagnose.causes import Diagnosis as Diagnosis
from castwise.numerics.diagnose.causes import EvidenceRow as EvidenceRow
from castwise.numerics.diagnose.diagnosis import diagnose as diagnose
