"""Mistakes of precision that can be seen before the first step.

    report = lint(model, policy, optimizer, batches, loss_fn)
    report.is_clean
    print(report.summary(), *report.findings)

The policy is put on the model, the checks look, and the model is afterwards bit for bit
what it was. Without batches only modules, buffers, weights, the optimizer and the
source are looked at; with them one forward is observed too.

    findings.py    what is said, and how it is silenced with a reason
    subject.py     what is looked at
    tables.py      rotary frequencies, positions, mask constants
    updates.py     learning rate, decay and eps against the format of the weights
    functions.py   custom autograd functions, constants in the source
    observed.py    one forward under a dispatch mode
    inspection.py  all of them in order: `lint`
"""

from __future__ import annotations

from castwise.numerics.lint.findings import Finding as Finding
from castwise.numerics.lint.findings import LintReport as LintReport
from castwise.numerics.lint.findings import Silenced as Silenced
from castwise.numerics.lint.inspection import lint as lint
from castwise.policy.silences import CHECKS as CHECKS
