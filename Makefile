# The README's two commands, and what they need. Everything is installed inside this folder, but for Debian packages.
#
#   make quickstart   the whole pipeline on text and lexical relations from WordNet; no GPU, no model hub
#   make test         formatter, linter, type checker and test suite
#   make test-fast    the same without the tests marked slow

VENV   ?= .venv
PYTHON ?= $(shell command -v python3.11 || command -v python3)
CONFIG ?= configs/quickstart.yaml
PY     := $(VENV)/bin/python

export PATH := $(abspath $(VENV))/bin:$(PATH)

.PHONY: quickstart test test-fast check env wordnet clean
.DELETE_ON_ERROR:

quickstart: env wordnet
	$(PY) launcher/pipeline.py --config $(CONFIG)

test: check wordnet
	$(PY) -m pytest

test-fast: check wordnet
	$(PY) -m pytest -m "not slow"

check: env
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy

env: $(VENV)/.installed

# deepspeed comes as source and looks at the torch it is built for, so torch is installed first and build isolation is off.
$(VENV)/.installed: pyproject.toml
	@cluster/setup/system_packages.sh venv $(PYTHON)
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip "setuptools>=77" wheel
	$(PY) -m pip install "torch>=2.9,<3" torchvision
	DS_BUILD_OPS=0 $(PY) -m pip install --no-build-isolation -e ".[dev]"
	touch $@

wordnet: env
	@$(PY) -m dskd wordnet --quiet 2>/dev/null || cluster/setup/system_packages.sh wordnet $(VENV)
	@$(PY) -m dskd wordnet

clean:
	rm -rf $(VENV) work build *.egg-info .pytest_cache .mypy_cache .ruff_cache
