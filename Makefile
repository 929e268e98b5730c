# `make quickstart` and `make test` need Python >= 3.11, git and make; `make help` lists the rest.
# Another Python: `PYTHON=python3.13 make test` (after `make clean` when .venv holds a different one), or both side by
# side: `PYTHON=python3.13 make test VENV=.venv-3.13`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check
# The newest release each supported Python can run, every file pinned by its hash, no index named.
COMPILE := $(BIN)/uv pip compile --quiet --upgrade --universal --fork-strategy requires-python --generate-hashes \
	--no-emit-index-url --no-emit-find-links --no-annotate --custom-compile-command "make lock" pyproject.toml

help:  ## list these commands
	@sed -n 's/^\([a-z]*\):.*##/\1\t/p' Makefile

quickstart: $(VENV)/quickstart.stamp  ## install the locked environment, run the main job, say where its figures are
	$(BIN)/python -m experiments quickstart

test: $(VENV)/test.stamp lint  ## install what the tests need, check style and types, run the tests
	$(BIN)/pytest -n 2

lint: $(VENV)/test.stamp  ## style and types alone
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyright --pythonpath $(BIN)/python

lock: $(BIN)/python  ## renew both lock files
	$(INSTALL) uv
	$(COMPILE) --group tests --output-file locks/test.txt
	$(COMPILE) --group build --group experiments --constraint locks/test.txt --output-file locks/quickstart.txt

clean:  ## remove the environment and what tools leave behind
	rm -rf .venv .venv-* build *.egg-info .pytest_cache .ruff_cache .hypothesis

$(VENV)/%.stamp: locks/%.txt pyproject.toml | $(BIN)/python
	$(INSTALL) --require-hashes --requirement $<
	$(INSTALL) --no-deps --no-build-isolation --editable .
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("$(PYTHON) is Python %d.%d; entk needs 3.11 or newer: PYTHON=python3.12 make ..." % sys.version_info[:2])'
	$(PYTHON) -m venv $(VENV)

.PHONY: help quickstart test lint lock clean
