"""The contract: every operator ran in the format that the policy promises, proved.

    proof = contract(model, batches, loss_fn, policy)
    proof.summary()    contract of bf16-mixed holds: 119 operators in 21 modules, ...
    proof.check()      raises ContractError and names every breach

The rooms, from the ground upwards:

    promise.py     what a policy promises for one call, and whether the call kept it
    transport.py   operators that carry weights between processes: passed over
    witness.py     every operator of a run beside what it was promised
    breaches.py    what breaks a contract, and how it is found
    proof.py       all of a step, proved: `contract`, or `prove` for a loop of one's own
"""

from __future__ import annotations

from castwise.numerics.contract.breaches import Breach as Breach
from castwise.numerics.contract.breaches import BreachKind as BreachKind
from castwise.numerics.contract.proof import Contract as Contract
from castwise.numerics.contract.proof import ModuleShare as ModuleShare
from castwise.numerics.contract.proof import contract as contract
from castwise.numerics.contract.proof import prove as prove
