"""Proof that a policy is good enough, and that it holds.

Storey: above `region`, below `training`. Candidates come as callables.

    target.py         what evidence is gathered on: a model, batches, a loss
    untouched.py      a model that a proof may run, and that is afterwards what it was
    error.py          how far a result is from the right one, and how far it may be
    operator_call.py  what one call of an operator read, wrote and computed
    call_site.py      module, source line and name of a call
    census.py         which formats operators really ran in
    replay.py         a model run again in float64, on the same random draws
    contract/         every operator ran in the format that the policy promises
    forensics/        which operator made the first value that is not finite, and why
    validate/         errors under a policy against float64, beside those of fp32
    diagnose/         rounding, range or an algorithm that fails: why something broke
    search/           the cheapest policy within an error budget
    lint/             mistakes of precision that can be seen before the first step
    watch/            what underflows, overflows or does not move while a run goes on
"""
