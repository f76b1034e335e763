# One place for every command. Nothing but Python >= 3.11, make and a network is needed first.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-services test-long bench check format install clean

demo: $(STAMP)  ## catch three poisoners among ten clients and forget them
	$(BIN)/secateur demo

test: $(STAMP)  ## the quick suite: everything that needs no system package
	$(BIN)/python -m pytest -m "not services and not long"

test-services: $(STAMP)  ## tests that need a system package: Chromium
	$(BIN)/python -m pytest -m services

test-long: $(STAMP)  ## tests that take minutes
	$(BIN)/python -m pytest -m long

bench: $(STAMP)  ## measure the engines against others; ARGS="--help" tells what can be chosen
	$(BIN)/python -m benchmarks.engines $(ARGS)

check: $(STAMP)  ## format, lint, types, import rules
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)  ## rewrite what check would complain of
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

install: $(STAMP)  ## make .venv from the pinned versions

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 15) else "Secateur needs Python 3.11 to 3.14, and $(PYTHON) is %d.%d; run: make PYTHON=python3.11" % v[:2])'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(STAMP)

clean:  ## remove the environment and caches
	rm -rf $(VENV) benchmarks/.venv-pfl .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
