"""What both language models share: text, tokens, settings, loss, report and sampling.

documents.py     where text comes from, and which documents are for validation
tokenizer.py     bytes, or byte pairs learned on the spot
token_file.py    tokens on disk, mapped into memory, packed into windows
supply.py        documents to token files, once per text and tokenizer
config.py        a YAML file into settings; what it does not know is an error
settings.py      what every language model is asked: text, schedule, place
causal_lm.py     pre-norm blocks with any mixing of tokens
evaluation.py    validation loss in nats and in bits per byte
run_report.py    the page of a run, from its journal
sampling.py      text out of a checkpoint
"""
