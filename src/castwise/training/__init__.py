"""One plain loop: a step that explains itself, and a trainer that survives a kill.

    step.py          prepare, Run, Step: what one update does
    outcome.py       Stepped, Skipped: what became of it
    admission.py     what a run refuses before it does anything
    in_force.py      the policy asked for, and the precision that is in force
    trainer.py       the loop: epochs, evaluation, checkpoints, resume

A step knows nothing of the trainer; a loop of one's own needs no more than `step.py`.
"""
