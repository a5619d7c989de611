"""One plain loop: a step that explains itself, and a trainer that survives a kill.

step.py          prepare, Run, Step: what one update does, and what became of it
in_force.py      the policy asked for, and the precision that is in force
trainer.py       the loop: epochs, evaluation, checkpoints, resume
"""
