# Everything below works on a fresh machine with Python 3.11+, pip and make; nothing else has to be installed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# How many test processes run at once; the tests start their own servers, so more is not always faster.
WORKERS ?= auto

.PHONY: demo test check lint types bench clean

# A few hundred SDK calls from several users against the bundled stand-in provider, until budgets bite.
demo: $(VENV)/demo.stamp
	$(BIN)/llm-guard-mw demo

# The whole suite.
test: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -n $(WORKERS)

# What continuous integration asks for: lint, types, tests.
check: lint types test

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/dev.stamp
	$(BIN)/mypy

# Ratios against the bare app, both sides interleaved in one run.
bench: $(VENV)/dev.stamp
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "llm_guard_mw needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"

$(VENV)/demo.stamp: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[demo]"
	touch $@

$(VENV)/dev.stamp: $(VENV)/bin/python pyproject.toml
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable . --group dev
	touch $@ $(VENV)/demo.stamp
