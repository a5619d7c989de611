"""A language model of complex-valued blocks around a stack of Cayley propagators.

settings.py    what can be asked of it
model.py       the model, and what it is compared with
module.py      the model as Lightning sees it
spread.py      over which processes a run is spread
replicated.py  DDP in Lightning, with the sums of a policy
sharded.py     FSDP2 in Lightning
callbacks.py   journal, display, health and checkpoints of a Lightning run
plain_files.py Lightning's checkpoints as safetensors files
recipe.py      the whole run, from text to report
command.py     `castwise train soliton_lm`
"""
