# make demo: run a federation.  make test: everything.  make check: the fast part.  make setup: install only.  make bench: the figures.

# Installed by name into a folder of the checkout; no absolute path is written here, so a checkout may lie anywhere.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
REQUIREMENTS := pyproject.toml setup.py constraints.txt $(wildcard requirements*.txt)

export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false

.PHONY: setup demo check lint test bench clean
.DEFAULT_GOAL := demo

setup: .venv/installed-dev

# The demo needs less than the tests; whoever has the tests has the demo.
demo: $(if $(wildcard .venv/installed-dev),.venv/installed-dev,.venv/installed-demo)
	$(BIN)/python scripts/demo.py

check: lint
	$(BIN)/python -m pytest -q -m "not slow and not gpu"

test: lint
	$(BIN)/python -m pytest -p scripts.skipped_groups -q -rs --fail-if-group-skipped

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/installed-dev
	$(BIN)/python scripts/bench_core.py

.venv/installed-dev .venv/installed-demo: .venv/installed-%: $(REQUIREMENTS) | .venv/bin/python
	@echo "installing the project and its dependencies into .venv (some minutes the first time) …"
	@# Byte-compiling all of torch, Ray and transformers takes longer than compiling what is imported when it is.
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[$*]'
	touch $@

.venv/bin/python:
	"$(PYTHON)" -m venv .venv

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
