"""Proof that a policy is good enough, and that it holds.

Storey: above `region`, below `training`. Candidates come as callables.

    census.py         which formats operators really ran in
    contract.py       every operator ran in the format that the policy promises
    breaches.py       what breaks a contract, and how it is found
    promise.py        what a policy promises for one call, and whether the call kept it
    witness.py        every operator of a run beside what it was promised
    call_site.py      module, source line and name of a call
    transport.py      operators that carry weights between processes: passed over
    error.py          how far a result is from the right one, and how far it may be
    operator_call.py  what one call read, wrote and computed
    forensics.py      which operator made the first value that is not finite, and why
    origins.py        where infinities and NaNs come from, operator by operator
    watched_call.py   one call: what it read, what it wrote, and once more in fp64
    replay.py         a model run again in float64, on the same random draws
    untouched.py      a model that a proof may run, and that is afterwards what it was
    diagnose.py       rounding, range or an algorithm that fails: why something broke
    validate.py       errors under a policy against float64, beside those of fp32
    lint/             mistakes of precision that can be seen before the first step
    exponents.py      histograms that answer for every format and loss scale
    watch.py          what underflows, overflows or does not move while a run goes on
"""
