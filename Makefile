# Two commands on a fresh machine: `make demo` (the main job) and `make test` (the tests). Each makes .venv by itself.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --disable-pip-version-check --constraint .constraints.txt

# A minute of processor time for 64 graphs.
COMPILED := tests/test_quantized_graphs.py::test_many_random_quantized_graphs_have_the_same_bits_compiled

.PHONY: demo test check lint types arm long bench coverage clean
.DEFAULT_GOAL := demo

$(VENV)/pip: 
	$(PYTHON) -m venv $(VENV)
	touch $@

# A stamp for each set of dependencies, so that a second run reuses them.
$(VENV)/core: pyproject.toml .constraints.txt | $(VENV)/pip
	$(PIP) --editable .
	touch $@

$(VENV)/dev: $(VENV)/core
	$(PIP) --editable '.[dev]'
	touch $@

$(VENV)/bench: $(VENV)/core
	$(PIP) --editable '.[bench]'
	touch $@

demo: $(VENV)/dev  ## train a small CNN, compile it, show what it costs and what it keeps; then ResNet-18
	$(BIN)/python -m paring.bench.demo

check: $(VENV)/dev lint types  ## the fast tier: neither torch nor TVM is imported; at most 60 s
	$(BIN)/python -m pytest -m "fast and not slow" -n 2 -q --graphs 96

# Where the tools for it are lacking it says so, and the tests that need it skip.
arm: $(VENV)/dev  ## the runtime of the emulated ARM device
	-$(BIN)/python -m paring.backends.emulator_build --prepare

test: $(VENV)/dev lint types arm  ## all tests
	$(BIN)/python -m pytest -n 2 -q --durations=10

lint: $(VENV)/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check --exclude "*.md" .

types: $(VENV)/dev
	$(BIN)/python -m paring.bench.typecheck

long: $(VENV)/dev arm  ## the long tiers, by command
	$(BIN)/python -m pytest -m "slow or not slow" -n 2 -q --graphs 100000 --deselect $(COMPILED)
	$(BIN)/python -m pytest $(COMPILED) -m slow -n 2 -q --graphs 10000

bench: $(VENV)/bench  ## the benchmark tables of the README
	$(BIN)/paring bench --suite cnn --peers eager,inductor,ort,openvino --threads 2
	$(BIN)/paring bench --suite transformer --peers eager,inductor,ort,openvino --threads 2

coverage: $(VENV)/bench  ## the table of networks that agree with torch
	$(BIN)/paring bench --coverage

clean:
	rm -rf $(VENV) build *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
