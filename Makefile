# One file does all the set-up. Needs: Python 3.11 or newer with venv and pip, make, bash.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
OUT ?= out/tiny-wan
JOBS ?= 2
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
# A torch that is there (a CUDA build, a container's own) is kept; only a new environment gets the pinned one.
PIN = $$($(BIN)/python -c 'import importlib.util as u; print("" if u.find_spec("torch") else "-c constraints.txt")')

.PHONY: help venv demo test stress lint format docs clean

help:
	@echo "make demo    export examples/tiny-wan: 4-bit weights, ONNX graphs, TensorRT-RTX engines; then inspect the result"
	@echo "make test    ruff, mypy and the test suite"
	@echo "make stress  the fault tests at their full counts: 500 kills, 200 races, 100 000 mutations"
	@echo "make venv    only the environment: $(VENV) with dvdq-export and dvdq-inspect"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrite the sources in the house style"
	@echo "make docs    rewrite README's generated tables and the picture"
	@echo "make clean   remove caches, build outputs and $(OUT); $(VENV) stays"
	@echo
	@echo "variables: PYTHON=$(PYTHON)  VENV=$(VENV)  VENV_FLAGS=  OUT=$(OUT)  JOBS=$(JOBS) (test processes)  PYTEST_ARGS="

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; install Python 3.11 or newer, or: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(0 if v >= (3, 11) else "$(PYTHON) is Python %d.%d and dvdquant needs 3.11 or newer: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing dvdquant and what it needs into $(VENV) (2.5 GB on disk, minutes the first time)"
	@$(BIN)/python -m pip install -qq -e . $(PIN)
	@touch $@

$(INSTALLED_TEST): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing dvdquant with its test tools into $(VENV) (2.5 GB on disk, minutes the first time)"
	@$(BIN)/python -m pip install -qq -e '.[test]' $(PIN)
	@touch $(INSTALLED) $@

venv: $(INSTALLED)

demo: $(INSTALLED)
	@mkdir -p $(dir $(OUT))
	$(BIN)/dvdq-export examples/tiny-wan -o $(OUT) --latent 8x24x24 --text-tokens 5 \
		--sm 8.0 --sm 8.6 --sm 8.9 --sm 12.0 --target rtx --target onnx --verify | tee $(OUT).log
	$(BIN)/dvdq-inspect $(OUT) --check | tee -a $(OUT).log
	@$(BIN)/python examples/list_engines.py $(OUT)
	@echo "log       $(OUT).log"

lint: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	@$(BIN)/python tests/warm_up.py
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m "not stress" $(PYTEST_ARGS)

stress: $(INSTALLED_TEST)
	@$(BIN)/python tests/warm_up.py
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal -m stress --timeout 3600 $(PYTEST_ARGS)

format: $(INSTALLED_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(INSTALLED)
	$(BIN)/python docs/chain.py
	$(BIN)/python docs/tables.py

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(OUT) $(OUT).log
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
