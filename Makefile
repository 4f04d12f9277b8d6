# make demo: run a federation.  make demo-llm: one of a language model.  make demo-federation: a real one, of three nodes over TLS.
# make test: everything.  make check: the fast part.  make setup: install only.  make bench: the figures.  make docs: the site of docs/.

# A checkout may lie anywhere. But Ray starts its workers by a command line without quotes, and Flower hands Alembic a list of folders
# joined by spaces: below a path with a space the environment itself lies in the cache folder, and .venv is a link to it.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/fedsb
VENV := $(if $(filter 1,$(words $(CURDIR))),.venv,$(if $(filter 1,$(words $(CACHE))),$(CACHE),/tmp/fedsb)/venv-$(firstword $(shell pwd | cksum)))
BIN := $(VENV)/bin
# Tests at a time. Three on two cores are slower: Flower's processes wait for one another then.
WORKERS ?= 2
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --dist worksteal --durations 5

REQUIREMENTS := pyproject.toml setup.py constraints.txt $(wildcard requirements*.txt)

export HF_HUB_OFFLINE := 1
export FLWR_TELEMETRY_ENABLED := 0
export FLWR_DISABLE_UPDATE_CHECK := 1
export FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION := 1
export RAY_USAGE_STATS_ENABLED := 0
export TOKENIZERS_PARALLELISM := false
# Empty, that is off: images for containers often set it, and then every process compiles torch, Ray and transformers again (10 s each).
export PYTHONDONTWRITEBYTECODE :=

.PHONY: setup browser demo demo-llm demo-federation check lint style types test all-tests bench docs clean
.DEFAULT_GOAL := demo

setup: $(VENV)/installed-dev $(VENV)/installed-quant $(VENV)/installed-trackers $(VENV)/installed-docs browser

# For the tests of a report's page, which are skipped where there is none: not everybody may install packages.
BROWSER := chromium chromium-driver fonts-dejavu-core
APT := timeout 300 apt-get -qq -o DPkg::Lock::Timeout=60
browser:
	@command -v chromium >/dev/null && command -v chromedriver >/dev/null || \
	if command -v apt-get >/dev/null && [ "$$(id -u)" = 0 ]; then \
		echo "installing chromium …"; export DEBIAN_FRONTEND=noninteractive; \
		$(APT) install -y --no-install-recommends $(BROWSER) >/dev/null 2>&1 || \
		{ $(APT) update && $(APT) install -y --no-install-recommends $(BROWSER); } >/dev/null 2>&1 || \
		echo "chromium could not be installed: tests of the page in a browser are skipped"; \
	else echo "no chromium here: tests of the page in a browser are skipped"; fi

# The demo needs less than the tests; whoever has the tests has the demo.
demo: $(if $(wildcard $(VENV)/installed-dev),$(VENV)/installed-dev,$(VENV)/installed-demo)
	$(BIN)/python scripts/demo.py

demo-llm: $(if $(wildcard $(VENV)/installed-dev),$(VENV)/installed-dev,$(VENV)/installed-llm)
	$(BIN)/python scripts/demo_llm.py

demo-federation: $(if $(wildcard $(VENV)/installed-dev),$(VENV)/installed-dev,$(VENV)/installed-demo)
	$(BIN)/python scripts/demo_federation.py

check: lint
	$(PYTEST) -m "not slow and not gpu"

# Types beside the tests: alone they would keep one core busy for a minute.
test: style
	$(MAKE) --no-print-directory --jobs 2 types all-tests

all-tests: $(VENV)/installed-dev $(VENV)/installed-quant $(VENV)/installed-trackers $(VENV)/installed-docs browser
	$(PYTEST) -p scripts.skipped_groups -rs --fail-if-group-skipped

lint: style types

style: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/installed-dev
	$(BIN)/mypy

# The site, without a network; a warning, such as of a link that leads nowhere, is an error.
docs: $(VENV)/installed-docs
	PYTHONPATH="$(CURDIR):$(VENV)/docs" $(BIN)/python -m sphinx -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

bench: $(VENV)/installed-dev
	$(BIN)/python scripts/bench/core.py

$(VENV)/installed-dev $(VENV)/installed-demo $(VENV)/installed-llm: $(VENV)/installed-%: $(REQUIREMENTS) | $(VENV)/bin/python
	@echo "installing the project and its dependencies into .venv (some minutes the first time) …"
	@# Byte-compiling all of torch, Ray and transformers takes longer than compiling what is imported when it is.
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt -e '.[$*]'
	$(if $(filter dev llm,$*),$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r requirements-llm-bare.txt)
	$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --no-deps -r requirements-axe-bare.txt)
	touch $@

# Beside the environment: transformers imports torchao wherever it is, which takes seconds a process. Byte-compiled here: Python warns of it.
$(VENV)/installed-quant: requirements-quant.txt constraints.txt | $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/quant -c constraints.txt -r requirements-quant.txt
	touch $@

# Beside the environment too: what they bring along is many packages that nothing else here needs, and that transformers would import.
TRACKERS := requirements-tensorboard.txt requirements-mlflow.txt requirements-wandb.txt requirements-trackers-bare.txt
$(VENV)/installed-trackers: $(TRACKERS) constraints.txt | $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/trackers -c constraints.txt $(TRACKERS:%=-r %)
	touch $@

# And beside it: docutils and the like are of no use to a run.
DOCS := requirements-docs.txt requirements-docs-bare.txt
$(VENV)/installed-docs: $(DOCS) constraints.txt | $(VENV)/installed-dev
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade --target $(VENV)/docs -c constraints.txt $(DOCS:%=-r %)
	touch $@

$(VENV)/bin/python:
	"$(PYTHON)" -m venv $(VENV)
	@test -e .venv || ln -s $(VENV) .venv

clean:
	rm -rf $(VENV) .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
