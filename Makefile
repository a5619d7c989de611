# Two commands on a fresh machine: `make train` and `make test`. Everything else serves them.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --constraint constraints.txt
USER   := $(VENV)/.installed-for-users
DEV    := $(VENV)/.installed-for-developers

.PHONY: train test check docs accept benchmarks clean

train: $(USER)          ## train the KenKen solver in bf16, three minutes and a quarter on two cores
	$(BIN)/castwise train kenken --preset small --dtype bf16 $(ARGS)

test: check docs        ## lint, types, storeys, documentation, tests
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 $(ARGS)

check: $(DEV)           ## lint, types and storeys alone
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(DEV)            ## the documentation, built strictly into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

accept: $(DEV)          ## experiments against thresholds frozen before; skips what is recorded
	$(BIN)/python benchmarks/accept.py $(ARGS)
	$(BIN)/python benchmarks/accept_kenken.py --seeds 3 --json docs/accepted/kenken.json

benchmarks: $(DEV)      ## the figures of the README; nothing else should run meanwhile
	$(BIN)/python benchmarks/kenken_data.py
	$(BIN)/python benchmarks/kenken_precision.py --runs 1

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

$(USER): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable .
	touch $@

$(DEV): pyproject.toml constraints.txt | $(VENV)/bin/python
	$(PIP) --editable '.[dev]'
	touch $@ $(USER)

clean:                  ## forget the environment, built pages and compiled kernels
	rm -rf $(VENV) site
	find src -name '*.nb[ci]' -delete
