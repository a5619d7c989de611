"""Does prediction pay? Backward passes and processor time to a loss fixed beforehand.

    python benchmarks/hybrid.py softmax        deterministic, convex: it has to pay
    python benchmarks/hybrid.py minibatch      a perceptron in batches of 64
    python benchmarks/hybrid.py language       a char transformer: it must not pay
    python benchmarks/hybrid.py shut           what a gate that never opens costs
    python benchmarks/hybrid.py curve full_batch physics large_batch fine_tuning
                                late_training  where it might pay
    python benchmarks/hybrid.py stacking       memory of all savings together

The same as `castwise bench hybrid`; the room is `castwise.hybrid.bench`. Exit code 1
says that a control failed: the harness itself is then not to be trusted.
"""

from __future__ import annotations

import sys

from castwise.cli import main

if __name__ == "__main__":
    main(["bench", "hybrid", *sys.argv[1:]])
