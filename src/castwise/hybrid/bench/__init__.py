"""The benchmark of the hybrid trainer, built so that it can say no.

problems.py       models, data, and a loss that has to be reached
regimes.py        where prediction might pay: full and large batches, fine-tuning, ...
schedule_free.py  a rival that averages instead of predicting
rivals.py         every method, and how it makes one step
notes.py          what was measured so far, on disk, so that a bench can go on
race.py           tuning on one grid, then seeds; medians, spread and a verdict
controls.py       what has to come out, or the harness is broken
stacking.py       memory of the savings together, against vanilla fp32

castwise bench hybrid softmax minibatch --seeds 5
"""

from __future__ import annotations

from castwise.hybrid.bench.controls import BENCHES as BENCHES
from castwise.hybrid.bench.controls import run_benches as run_benches
