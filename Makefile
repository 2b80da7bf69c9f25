PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: quickstart test quality style

$(STAMP): setup.cfg pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[dev]'
	touch $@

quickstart: $(STAMP)  ## train, distil, evaluate, analyse and write a model card on scikit-learn's digits, offline
	PYTHON=$(BIN)/python bash scripts/quickstart.sh

test: $(STAMP)  ## the whole test suite, offline
	$(BIN)/python -m pytest

quality: $(STAMP)  ## what CI checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(STAMP)  ## mend what can be mended automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
