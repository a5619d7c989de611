"""Proof that a policy is good enough, and that it holds.

Storey: above `region`, below `training`. Candidates come as callables.

    census.py     which formats operators really ran in
"""
