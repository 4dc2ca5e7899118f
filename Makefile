# Needs Python 3.11 or newer, git and make; everything else is put into .venv, at the versions in constraints.txt.

PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3 python; do \
	command -v $$p >/dev/null 2>&1 && $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
# uv is fast, but does not read pip's configuration (a company's index, a local one): where it fails, pip does it.
install = $(BIN)/uv pip install --system-certs --python $(BIN)/python -c constraints.txt -e $(1) \
	|| $(BIN)/python -m pip install -c constraints.txt -e $(1)
# A process a core, each with one thread; but eight at most, as each holds torch. The files run in the order of tests/conftest.py.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder
# Python keeps what it compiled: else each of the processes that tests start compiles torch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.DEFAULT_GOAL := help
.PHONY: help demo test quick lint types contracts format docs clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.package ## Quantize the built-in model, show what it costs and saves, and write a page about it
	$(BIN)/tersor demo

test: $(VENV)/.dev ## Run all tests: what CI runs
	$(PYTEST)

quick: $(VENV)/.dev ## Run only the tests that take seconds
	$(PYTEST) -m "not slow"

lint: $(VENV)/.dev ## Check style and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev ## Check types, strictly
	$(BIN)/mypy

contracts: $(VENV)/.dev ## Check which room imports which
	$(BIN)/lint-imports

format: $(VENV)/.dev ## Format the code
	$(BIN)/ruff check --fix-only --quiet .
	$(BIN)/ruff format .

docs: $(VENV)/.dev ## Build the documentation into site/
	$(BIN)/mkdocs build --strict

clean: ## Remove the environment and everything that was built
	rm -rf $(VENV) site dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis

# Each stamp is newer than what it depends on: a changed requirement reinstalls, anything else is instant.
$(VENV)/.uv:
	@test -n "$(PYTHON)" || { echo "make: found no Python 3.11 or newer; install one, or name it: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
		{ echo "make: $(PYTHON) is not Python 3.11 or newer" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt uv
	@touch $@

$(VENV)/.package: pyproject.toml constraints.txt $(VENV)/.uv
	$(call install,'.[report]')
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt $(VENV)/.uv
	$(call install,'.[dev]')
	@touch $@ $(VENV)/.package
