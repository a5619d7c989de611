"""Proof that a policy is good enough, and that it holds.

Storey: above `islands` and `autocast`, below `training`. Candidates come as callables.

    contract.py   which formats operators really ran in
"""
