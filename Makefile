# make verify | test | test-layers | lint | bench. Each sets up .venv by itself: only a python3 of 3.11 or later is needed.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
WORKERS ?= auto

.DEFAULT_GOAL := verify
.PHONY: verify test test-layers lint bench

verify: $(STAMP)
	@echo "== verify: titanic_mlp in PyTorch against its ports, from the weights to the trained model"
	$(BIN)/equivalence verify titanic_mlp

test: $(STAMP)
	@echo "== test: pytest, in parallel by model"
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup

test-layers: $(STAMP)
	@echo "== test-layers: every sample of torch's module database, to NNX and to Linen"
	EQUIVALENCE_ALL=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup tests/layers/test_module_db.py

lint: $(STAMP)
	@echo "== lint: ruff, then mypy"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	@echo "== bench: every benchmark, one after the other"
	@set -e; for file in benchmarks/[a-z]*.py; do echo "-- $$file"; $(BIN)/python $$file; done

# torch first and by itself: asked for with the rest, a resolver may prefer a newer build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or later is needed; try: make PYTHON=python3.11")'
	@echo "== setting up $(VENV) (about two minutes, once)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'torch==2.13.0' -c constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[all]'
	@touch $(STAMP)
