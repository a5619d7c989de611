"""Search: the cheapest precision policy within an error budget.

    found = search(model, batches, loss_fn, Budget(gradient=1e-2))

Modules are scored in a dozen steps of the model however many there are, a knapsack
chooses, and what it chooses is tried for real before it is returned. The rooms, from
the ground upwards:

    budget.py          how wrong gradient, output, loss or a measure may be
    candidates.py      the precisions that a module may get
    structure.py       tensors inside nested values
    visits.py          who is told of every call of every module
    bench.py           where a model runs under a policy and is measured
    reference_step.py  one step in fp64, and what each module saw in it
    units.py           the modules that get a format of their own, and groups of them
    handovers.py       in which formats tensors go from module to module
    unit_play.py       one call of a unit run again
    isolation.py       each unit alone in one format: what its rounding changes
    probes.py          what that does to the whole gradient, by secants
    cost.py            flops, bytes or measured time
    scores.py          all of that as plain values
    record_file.py     scores and trials on disk, to stop and go on
    scoring.py         how scores are taken, and what it costs
    solve.py           the knapsack
    assignment.py      a choice written as a policy
    problem.py         the knapsack of one budget, and its solution as a policy
    found.py           what was found, with its evidence
    belief.py          what trials taught about the choices not run yet
    trials.py          policies run for real, until the cheapest that holds is known
    policy_search.py   score, solve, try
"""

from castwise.numerics.search.budget import Budget as Budget
from castwise.numerics.search.budget import Measure as Measure
from castwise.numerics.search.found import Found as Found
from castwise.numerics.search.policy_search import SearchSettings as SearchSettings
from castwise.numerics.search.policy_search import search as search
