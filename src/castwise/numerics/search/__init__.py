"""Search: the cheapest precision policy within an error budget.

found = search(model, batches, loss_fn, Budget(gradient=1e-2))

budget.py          how wrong gradient, output, loss or a measure may be
candidates.py      the precisions that a module may get
structure.py       tensors inside nested values
bench.py           where a model runs under a policy and is measured
visits.py          who is told of every call of every module
reference_step.py  one step in fp64, and what each module saw in it
units.py           the modules that get a format of their own, and groups of them
isolation.py       each unit alone in one format: what its rounding changes
probes.py          what that does to the whole gradient, by secants
scores.py          all of that as plain values
scoring.py         how scores are taken, and what it costs
cost.py            flops, bytes or measured time
solve.py           the knapsack
assignment.py      a choice written as a policy
record_file.py     scores and trials on disk, to stop and go on
found.py           what was found, with its evidence
search.py          score, solve, try
"""

from castwise.numerics.search.budget import Budget as Budget
from castwise.numerics.search.budget import Measure as Measure
from castwise.numerics.search.found import Found as Found
from castwise.numerics.search.policy_search import SearchSettings as SearchSettings
from castwise.numerics.search.policy_search import search as search
