"""One plain loop: a step that explains itself, and a trainer that survives a kill.

    step.py          prepare, Run: what one update does
    open_step.py     one open step: losses in, and the one decision at its end
    outcome.py       Stepped, Skipped: what became of it
    tape.py          how the losses of a step came about, to be run again
    replay.py        a skipped step, run again to say which operator is to blame
    state_watch.py   weights and moments that are not finite, which nobody can mend
    scale_history.py what happened to the loss scale: changes, skips and their causes
    overrides.py     modules in another precision while a run goes on, and why
    rollback.py      everything that a step changes, and the way back bit by bit
    probe.py         how far each low module is from the same in fp32
    sentinel.py      takes bad steps back, and gives modules more precision
    admission.py     what a run refuses before it does anything
    in_force.py      the policy asked for, and the precision that is in force
    trainer.py       the loop: epochs, evaluation, checkpoints, resume

A step knows nothing of the trainer; a loop of one's own needs no more than `step.py`.
"""
