"""Forensics: the operator that made the first value that is not finite, and why.

    found = first_nonfinite(lambda: loss_fn(model(x), y), model)
    str(found)    exp in gate (forward, model.py:31) overflows fp16: it made inf from
                  11.5, and the largest number of fp16 is 65504

The rooms, from the ground upwards:

    watched_call.py   one call: what it read, what it wrote, and once more in fp64
    origins.py        where infinities and NaNs come from, operator by operator
    nonfinite.py      the first of them, told: `first_nonfinite`
"""

from __future__ import annotations

from castwise.numerics.forensics.nonfinite import NonFiniteOperator as NonFiniteOperator
from castwise.numerics.forensics.nonfinite import first_nonfinite as first_nonfinite
from castwise.numerics.forensics.nonfinite import told as told
from castwise.numerics.forensics.origins import Kind as Kind
