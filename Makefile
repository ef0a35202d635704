# make demo | test | lint | types | check | bench; the first two do all the set-up.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help demo test lint types check bench bench-learning clean

help:  ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/'

$(BIN)/.runtime: requirements.txt pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt
	$(BIN)/pip install --quiet --disable-pip-version-check --no-build-isolation --no-deps -e .
	touch $@

$(BIN)/.dev: requirements-dev.txt $(BIN)/.runtime
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@

demo: $(BIN)/.runtime  ## the whole loop on this machine, nothing to install: make demo ARGS="--duration 60 --headless --json"
	@$(BIN)/stream-scorer demo $(ARGS)

test: $(BIN)/.dev  ## all tests; those on real servers run when KAFKA_HOME is set
	$(BIN)/pytest $(ARGS)

lint: $(BIN)/.dev  ## ruff and the import contracts
	$(BIN)/ruff check .
	$(BIN)/lint-imports

types: $(BIN)/.dev  ## mypy, strict
	$(BIN)/mypy

check: lint types test  ## what CI runs

bench: $(BIN)/.dev  ## scoring speed against peers; writes build/bench/speed.json
	$(BIN)/python -m tests.bench.speed $(ARGS)

bench-learning: $(BIN)/.dev  ## delayed-feedback methods side by side; writes build/bench/learning.csv
	$(BIN)/python -m tests.bench.learning $(ARGS)

clean:  ## remove what was built
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache
