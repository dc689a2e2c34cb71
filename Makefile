# Every target sets up .venv when it is missing or out of date, and only then.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

# Two processes of one thread each: on two cores twice as fast as one of two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

.PHONY: help setup check test test-slow format sweep studies bench-gpu

help:  ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' Makefile | expand -t 12

setup: $(READY)  ## make .venv with everything that the tests and the sweep need

check: $(READY)  ## formatting, lint, types and the quick tests: about two minutes
	$(BIN)/ruff format --check --quiet .
	$(BIN)/ruff check --quiet .
	@$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python --summary=none & types=$$!; \
	$(PYTEST) -m 'not slow and not thorough'; tests=$$?; wait $$types && exit $$tests

test: check  ## the check, and then all other tests but the slow ones
	$(PYTEST) -m 'thorough and not slow'

test-slow: $(READY)  ## the tests that take minutes each
	$(PYTEST) -m slow

format: $(READY)  ## format the code and mend what lint can
	$(BIN)/ruff format --quiet .
	$(BIN)/ruff check --quiet --fix .

sweep: $(READY)  ## three kinds of language model compared on this machine, in about a quarter of an hour
	$(BIN)/python -m experiments.sweep sweep=quickstart

studies: $(READY)  ## every study of configs/study, again where it is not finished
	$(BIN)/python -m experiments.study all=true

bench-gpu: $(READY)  ## on a machine with a GPU: every check of the kernels, then every race, to results/bench/<device>
	$(BIN)/python -m pytest -q -n 4 tests/kernels -m 'not slow'
	$(BIN)/python -m experiments.bench kernels=recurrent kernels.out="'results/bench/{name}/recurrent'"
	$(BIN)/python -m experiments.bench kernels=attending kernels.out="'results/bench/{name}/attending'"

# On a machine whose own Python already has a CUDA build of torch, the environment sees that one; elsewhere torch comes
# as constraints.txt pins it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.version.cuda)' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && grep -vE '^(torch|triton|nvidia-.*)==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	  $(PYTHON) -m venv $(VENV) && cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[test,check]'
	@touch $(READY)
