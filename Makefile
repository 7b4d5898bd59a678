# Everything on a fresh machine with Python 3.11 and nothing installed: `make demo`, `make test`.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
# The CPU build is enough for the demo and the tests. To use a GPU, install beside your own torch: see README.md.
TORCH  ?= torch==2.13.0

export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1

.PHONY: help demo test test-slow check lint types install clean

help:
	@echo "make demo       compress the demo checkpoint end to end, print before and after"
	@echo "make test       lint, types, tests (minutes, two cores)"
	@echo "make test-slow  the tests that take long"
	@echo "make install    the environment in $(VENV)"
	@echo "make clean      remove environment, caches and outputs"

$(VENV)/.installed: setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade pip
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet -e ".[test,report]" -c constraints.txt
	touch $@

install: $(VENV)/.installed

demo: install
	$(BIN)/moe-compress run recipes/demo.yaml --overwrite

# Two processes of one thread each: on two cores faster than one process with two threads, and they don't contend.
test: install lint types
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m slow

check: lint types

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The package's folders are mapped by setup.cfg; mypy sees them through a tree of links that has their import names.
types: install
	rm -rf build/types && mkdir -p build/types/moe_compress
	ln -s $(CURDIR)/compress/* $(addprefix $(CURDIR)/,calib quant prune merge cli recipes) build/types/moe_compress/
	MYPYPATH=build/types $(BIN)/mypy --config-file pyproject.toml --explicit-package-bases -p moe_compress

clean:
	rm -rf $(VENV) build out .mypy_cache .pytest_cache .ruff_cache *.egg-info
