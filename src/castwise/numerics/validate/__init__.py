"""Validation: is a policy good enough? Errors against float64, beside those of fp32.

    report = validate(model, batches, loss_fn, policy)
    report.summary()   validation of bf16-mixed holds: output 3.1e-03 of 6.3e-02, ...
    report.check()     raises BudgetError and names what is too far off

The rooms, from the ground upwards:

    module_runs.py          one run: outputs of modules, gradients that reach them
    operators_on_trial.py   each operator alone, on inputs that it should have had
    three_runs.py           reference, baseline and candidate
    verdicts.py             results, modules and operators, each beside its limit
    validation.py           a model under a policy: `validate`
    plain_function.py       a function against another algorithm: `validate_function`
    resolvent_accuracy.py   the resolvent diagonal against the dense inverse
"""

from __future__ import annotations

from castwise.numerics.validate.plain_function import (
    validate_function as validate_function,
)
from castwise.numerics.validate.validation import validate as validate
from castwise.numerics.validate.verdicts import Judged as Judged
from castwise.numerics.validate.verdicts import ModuleVerdict as ModuleVerdict
from castwise.numerics.validate.verdicts import Validation as Validation
