"""A language model that mixes tokens by the response of a learned chain.

settings.py   what can be asked of it
model.py      the model, and what it is compared with
task.py       batches, loss and measures for the trainer
recipe.py     the whole run, from text to report
command.py    `castwise train resolvent_lm`
"""
