# Needs Python 3.11 or newer, make, and access to PyPI. Everything goes into .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
SOURCES := dlm_core dlm_pipelines dlm_cli tests benchmarks schema
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help install demo up test test-all simulate crashpoints mutants lint format bench lock clean

help: ## show this
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 18

install: $(STAMP) ## set up .venv from requirements.lock

# uv keeps itself and pip when it syncs an environment that it did not make. Compiled here, once:
# where Python is told to write no bytecode each of Dagster's processes would do it, at every start
$(STAMP): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.12 …")'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@test -x $(BIN)/uv || $(BIN)/python -m pip install --quiet --disable-pip-version-check 'uv>=0.8,<1'
	$(BIN)/uv pip sync --quiet --python $(BIN)/python --compile-bytecode --require-hashes requirements.lock
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@$(BIN)/python -m compileall -q dlm_core dlm_pipelines dlm_cli
	@touch $@

# make hands its variables on as they are: a folder's name may hold what a shell obeys
demo: install ## the lifecycle on real files; DEMO_PATH=folder takes yours, KEEP=1 leaves it running
	@$(BIN)/dlm demo

up: install ## start the services on DLM_HOME; Ctrl-C stops them
	@exec $(BIN)/dlm up

test: install ## run the tests
	$(BIN)/python -m pytest

test-all: install ## the slow and the exhaustive ones too
	$(BIN)/python -m pytest -m ''

STEPS ?= 20000
SEED ?= 1
simulate: install ## random stories beside a model; STEPS=20000 SEED=1 may be set
	$(BIN)/python -m tests.simulation --steps $(STEPS) --seed $(SEED)

crashpoints: install ## stop at every commit and storage call, recover, compare; SCENARIOS="copy drain" for some
	@$(BIN)/python -m tests.crashpoints $(SCENARIOS)

mutants: install ## break the code on purpose, the tests must notice; ONLY="name name" for some
	@$(BIN)/python -m tests.mutants $(ONLY)

lint: install ## check style, types and layers
	$(BIN)/ruff check $(SOURCES)
	$(BIN)/ruff format --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## put the sources into form
	$(BIN)/ruff check --fix $(SOURCES)
	$(BIN)/ruff format $(SOURCES)

bench: install ## write benchmarks/results.json
	$(BIN)/python -m benchmarks

lock: install ## resolve requirements.lock anew
	$(BIN)/uv pip compile pyproject.toml --quiet --group dev --extra demo --universal \
	  --python-version 3.11 --generate-hashes --no-header -o requirements.lock

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
