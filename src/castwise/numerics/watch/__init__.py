"""A watch over the numbers of a run: what underflows, overflows, or does not move.

    with watch(run, schedule=WatchSchedule(every=100)) as watching:
        for x, y in loader:
            with run.step() as step:
                step.backward(loss_fn(model(x), y))
    watching.windows[-1].largest_scale("fp16")

The rooms, from the ground upwards:

    exponents.py         histograms that answer for every format and loss scale
    windows.py           what is told: windows of steps
    counting_kernel.py   counting in machine code, on the CPU
    samples.py           what is counted of a tensor
    table.py             one row for each tensor, the same on all ranks
    watching.py          hooks on the steps that a schedule names: `watch`
"""

from __future__ import annotations

from castwise.numerics.watch.watching import Watch as Watch
from castwise.numerics.watch.watching import WatchSchedule as WatchSchedule
from castwise.numerics.watch.watching import watch as watch
from castwise.numerics.watch.windows import TensorKind as TensorKind
from castwise.numerics.watch.windows import TensorWatch as TensorWatch
from castwise.numerics.watch.windows import WatchWindow as WatchWindow
