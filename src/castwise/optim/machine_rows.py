"""What machine code is told of a chunk: a row of integers, one column each.

A chunk is some of the numbers of one parameter. Its row says how many, where they and
all that belongs to them lie, and in which formats.
"""

from __future__ import annotations

BLOCK = 256  # numbers that share the scale of an 8-bit state
SPAN = 1024  # numbers that are worked on at a time: their scratch stays in the cache

ADAMW, SGD, LION = 0, 1, 2
FP32, BF16, FP16, SPLIT = 0, 1, 2, 3  # formats of a gradient or weight
SIGNED_QUADRATIC, QUARTIC, ABSENT = 4, 5, 6  # codes of a state, besides FP32

(
    COUNT,
    GRADIENT_FORMAT,
    GRADIENT,
    WEIGHT_FORMAT,
    WEIGHT,
    REMAINDER,
    FIRST_FORMAT,
    FIRST,
    FIRST_SCALES,
    SECOND_FORMAT,
    SECOND,
    SECOND_SCALES,
    NUMBERS,
    NUM_COLUMNS,
) = range(14)
