# A fresh machine needs Python >= 3.11 and make; everything else goes into $(VENV).
#   make quickstart | test | test-slow | chaos | lint | claims | bench | clean
#   ARGS   is passed on:  make test ARGS='-k ddim -n 0'
#   VENV   names the environment, PYTHON the interpreter that creates it.

PYTHON ?= python3
VENV   ?= .venv
ARGS   ?=

# Two processes with one thread each suit small machines; ARGS come later on the line and win.
PYTEST = OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile
STAMP  = $(VENV)/.installed

.DEFAULT_GOAL := help
.PHONY: help install quickstart test test-slow chaos lint format claims bench clean

help:
	@echo 'make quickstart   the main job on the embedded models: table, figure, HTML'
	@echo 'make test         the tests without the slow, gpu and network ones'
	@echo 'make test-slow    the slow tests'
	@echo 'make chaos        kill, fill and damage: 20 faults of each kind; TIMES=n'
	@echo 'make lint         ruff and mypy'
	@echo 'make format       let ruff fix and format'
	@echo 'make claims       run every registered claim, results/claims.json, docs/claims.md, the README'
	@echo 'make bench        every script in benchmarks/'
	@echo 'make clean        remove caches and build output; the environment stays'

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(VENV)/bin/python || $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "evalbench needs Python >= 3.11; name one: make PYTHON=python3.12"; exit 1; }
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install -c constraints.txt -e '.[test]'
	@touch $@

quickstart: $(STAMP)
	$(VENV)/bin/evalbench quickstart $(ARGS)

test: $(STAMP)
	$(PYTEST) -m "not slow and not gpu and not network" $(ARGS)

test-slow: $(STAMP)
	$(PYTEST) -m "slow and not gpu and not network" $(ARGS)

TIMES ?= 20
chaos: $(STAMP)
	OMP_NUM_THREADS=1 EVALBENCH_CHAOS=$(TIMES) $(VENV)/bin/python -m pytest -n 0 -s --timeout 3600 tests/test_chaos.py tests/test_cluster_nodes.py $(ARGS)

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy --strict evalbench methods

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# The pages are made even when a claim's arm is an error row (exit 5).
claims: $(STAMP)
	@s=0; $(VENV)/bin/evalbench claims --run --ledger results/claims.json $(ARGS) || s=$$?; \
		$(VENV)/bin/python docs/make.py claims && exit $$s

bench: $(STAMP)
	@set -e; for script in $(sort $(filter-out benchmarks/_%,$(wildcard benchmarks/*.py))); do \
		echo "== $$script"; $(VENV)/bin/python $$script $(ARGS); done

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find evalbench methods suites tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
