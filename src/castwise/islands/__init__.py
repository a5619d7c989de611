"""Islands: modules held in another precision than their surroundings.

    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    print(applied.coverage())       # 2 modules in fp32 inside bf16: norm, solver
    applied.remove()                # no trace is left

At the border of an island floating inputs are cast to its compute format, autocast is
switched off (or to the island's format), fp32 matrix products are IEEE in forward and
backward, and floating outputs are cast to what the policy says. It refuses what it
cannot hold: weights shared between two formats, patched forwards, ScriptModules.

    facts.py         what a policy may know about a model
    layout.py        which modules become islands, and what happens at their borders
    refusals.py      what a policy cannot ask of a model
    application.py   applies a policy; removes it
    swap.py          how a module becomes an island without an edit
    border.py        what happens at the border
    crossing.py      casts of nested values
    lending.py       weights that a forward sees in another format
    products.py      IEEE or TF32 matrix products while an island runs
    own_backward.py  a backward in a precision of its own: the module is run again
    passage.py       which of the two runs this thread is in
    draws.py         the same random numbers in both
    eager.py         what `torch.compile` leaves out of its graphs
"""

from castwise.islands.application import AppliedPolicy as AppliedPolicy
from castwise.islands.application import apply_policy as apply_policy
from castwise.islands.facts import module_facts as module_facts
