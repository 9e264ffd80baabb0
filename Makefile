# `make` lists the targets. Each works on a fresh clone with only Python (>= 3.11) and make: it makes
# .venv if there is none and installs the dependencies into it, once. Later runs use no network.
#
# An existing .venv is used as it is. The default torch brings several GB of CUDA libraries, so on
# Linux without a GPU first make .venv and install PyTorch's CPU build into it (pytorch.org, "Get
# Started", says how); any torch>=2.11,<2.14 is kept.

PYTHON ?= python3
MINUTES ?= 0
VENV := .venv
BIN := $(VENV)/bin
# Stamps: an installation is complete only if its stamp exists. It is repeated when pyproject.toml or
# a C source changes; the next make continues an interrupted one.
RUN := $(VENV)/.installed
DEV := $(VENV)/.installed-dev
QUICK := runs/quickstart/model
NATIVE := setup.py $(wildcard kernels/bitnet_kernels/cpu/native/*.[ch])
# Each core gets a block of adjacent tests; a core that is done takes half of another core's rest.
SPREAD := -n auto --dist worksteal

.PHONY: help quickstart test slow test-machines gpu lint types format clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile
	@echo 'make PYTHON=python3.12 ... takes another Python; the head of Makefile tells more'

quickstart: $(RUN)  ## train a small ternary model on a CPU in minutes, pack it, let it write
	$(BIN)/python train.py configs/quickstart.toml
	$(BIN)/bitnet pack $(QUICK)
	$(BIN)/bitnet eval $(QUICK)-packed --data data/python-stdlib --baselines
	$(BIN)/bitnet generate $(QUICK)-packed --prompt "    def __init__(self" \
	  --max-new-tokens 150 --temperature 1 --top-p 0.95

test: $(DEV)  ## run the tests (about 9 minutes on 2 cores)
	$(BIN)/pytest $(SPREAD)

slow: $(DEV)  ## run the tests that take minutes
	$(BIN)/pytest $(SPREAD) -m slow

gpu:  ## check and measure everything on a GPU; MINUTES=12, OUT= and WHEELS= folders (docs/gpu.md)
	@set -- bitnet/bench/gpu.py --minutes "$(MINUTES)" $(if $(OUT),--out "$(OUT)") \
	  $(if $(WHEELS),--wheels "$(WHEELS)"); \
	for python in $(BIN)/python $(PYTHON); do \
	  if $$python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' 2>/dev/null; then \
	    exec $$python "$$@"; \
	  fi; \
	done; \
	for python in $(BIN)/python $(PYTHON); do \
	  if $$python -c 'import torch' 2>/dev/null; then exec $$python "$$@"; fi; \
	done; \
	$(MAKE_COMMAND) --no-print-directory $(DEV) && exec $(BIN)/python "$$@"

test-machines: $(DEV)  ## run the tests as on other CPUs: make test-machines ENVS="avx2 threads2"
	$(BIN)/python tests/machines.py $(ENVS)

lint: $(DEV)  ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(DEV)  ## check types
	$(BIN)/mypy

format: $(DEV)  ## format the code and mend what ruff can
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove caches and builds; keeps .venv, data and runs
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
	find bitnet kernels tests -name __pycache__ -prune -exec rm -rf {} +

# A virtual environment that can install: the existing one, a new one or, if an incomplete one cannot
# be completed, one from scratch.
define venv
	@if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
	  $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
	    echo 'error: $(PYTHON) is missing or older than Python 3.11; try: make PYTHON=python3.12 ...' >&2; \
	    exit 2; }; \
	  $(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	    echo 'error: $(PYTHON) has no venv module (Debian, Ubuntu: apt install python3-venv)' >&2; \
	    exit 2; }; \
	  echo 'making $(VENV)'; \
	  { $(PYTHON) -m venv $(VENV) && $(BIN)/python -m pip --version >/dev/null; } \
	    || $(PYTHON) -m venv --clear $(VENV); \
	fi
endef

$(RUN): pyproject.toml $(NATIVE)
	$(venv)
	$(BIN)/python -m pip install --disable-pip-version-check -e .
	@touch $@

$(DEV): pyproject.toml $(NATIVE)
	$(venv)
	$(BIN)/python -m pip install --disable-pip-version-check -e ".[dev]"
	@touch $(RUN) $@
