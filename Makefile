PYTHON ?= $(shell command -v python3.11 || command -v python3)
# `make test LATEST=1`: the newest releases within setup.cfg's bounds instead of those of constraints.txt
VENV := $(if $(LATEST),.venv-latest,.venv)
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# two test processes of one thread each are faster than one of two; a file's tests share what they set up
WORKERS ?= 2

.PHONY: quickstart test quality style constraints latest

$(STAMP): setup.cfg pyproject.toml constraints.txt scripts/install.sh $(if $(LATEST),latest)
	$(PYTHON) -m venv $(VENV)
	bash scripts/install.sh $(BIN)/python $(if $(LATEST),,constraints.txt)
	touch $@

quickstart: $(STAMP)  ## train, distil, evaluate, analyse and write a model card on scikit-learn's digits, offline
	PYTHON=$(BIN)/python bash scripts/quickstart.sh

test: $(STAMP)  ## the whole test suite, offline
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile --no-loadscope-reorder

quality: $(STAMP)  ## what CI checks
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(STAMP)  ## mend what can be mended automatically
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: $(STAMP)  ## write the versions of this environment into constraints.txt, once the suite has passed on them
	bash scripts/constraints.sh $(BIN)/python > constraints.tmp
	mv constraints.tmp constraints.txt
