# Two commands: `make demo` and `make test`. Each sets itself up: Python 3.11 and a package registry are all it needs.
PYTHON ?= python3.11
VENV ?= .venv
BIN := $(VENV)/bin
GPU_PYTHON ?= python3
READY := $(VENV)/.ready

.PHONY: demo test lint compare soak gpu clean

demo: $(READY)
	$(BIN)/molex demo --out runs/demo

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright
	$(BIN)/python -m pytest -n auto --dist loadfile

compare: $(READY)
	$(BIN)/python recipes/compare_methods.py

soak: $(READY)
	$(BIN)/python -m benchmarks.soak

# on a GPU machine, whose own torch is for its CUDA: no environment is made
gpu:
	$(GPU_PYTHON) -m benchmarks.gpu

lint: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# torch comes first: left to the other packages' ranges, pip may take a newer build with gigabytes of GPU libraries
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
