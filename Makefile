# make setup, make test, make sweep: each sets up .venv when it is missing or out of date, and only then.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: setup test test-slow sweep

setup: $(READY)

# On a machine whose own Python already has a CUDA build of torch, the environment sees that one; elsewhere torch comes
# as constraints.txt pins it.
$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit(f"Python 3.11 or newer is needed and $(PYTHON) is {v[0]}.{v[1]}: make PYTHON=python3.12")'
	@if $(PYTHON) -c 'import torch, sys; sys.exit(not torch.version.cuda)' 2>/dev/null; then \
	  $(PYTHON) -m venv --system-site-packages $(VENV) && grep -vE '^(torch|triton|nvidia-.*)==' constraints.txt > $(VENV)/constraints.txt; \
	else \
	  $(PYTHON) -m venv $(VENV) && cp constraints.txt $(VENV)/constraints.txt; \
	fi
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c $(VENV)/constraints.txt -e '.[test]'
	@touch $(READY)

# Two processes of one thread each: on two cores twice as fast as one of two threads.
TEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test: $(READY)
	$(TEST)

test-slow: $(READY)
	$(TEST) -m 'slow or not slow'

sweep: $(READY)
	$(BIN)/python -m experiments.sweep sweep=quickstart
