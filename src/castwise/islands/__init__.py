"""Islands: modules held in another precision than their surroundings.

    applied = apply_policy(model, policy.bind(module_facts(model)), "cpu")
    print(applied.coverage())       # 2 modules in fp32 inside bf16: norm, solver
    applied.remove()                # no trace is left

At the border of an island floating inputs are cast to its compute format, autocast is
switched off (or to the island's format), fp32 matrix products are IEEE in forward and
backward, and floating outputs are cast to what the policy says. It refuses what it
cannot hold: weights shared between two formats, patched forwards, ScriptModules.

    facts.py         what a policy may know about a model
    application.py   plans, checks and applies a policy; removes it
    swap.py          how a module becomes an island without an edit
    border.py        what happens at the border
    crossing.py      casts of nested values
    products.py      IEEE or TF32 matrix products while an island runs
"""

from castwise.islands.application import AppliedPolicy as AppliedPolicy
from castwise.islands.application import apply_policy as apply_policy
from castwise.islands.facts import module_facts as module_facts
