# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer: they install what they need first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PHOTOS ?=
DATA ?=
LABELS ?=
export PHOTOS DATA LABELS # recipes read them from the environment, since a path may hold spaces and quotes
# Photographs of your own get a run of their own: the same folder would resume the one on drawn pictures.
SPACE := $(subst ,, )
DEMO := runs/demo$(if $(PHOTOS),-$(subst $(SPACE),-,$(notdir $(abspath $(PHOTOS)))))

.PHONY: help install demo experiments docs test test-slow check format clean
.DEFAULT_GOAL := help

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(BIN)/.installed ## create .venv with latentcodec and its tools

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Fetching PyTorch and other packages with pip: about 6 GB on disk, which needs the network"
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]'
	touch $@

demo: install ## train a small codec, put it into a pipeline, measure it; PHOTOS=folder for your own images
	@$(BIN)/python bench/demo.py --out "$(DEMO)" $${PHOTOS:+--images "$$PHOTOS"}

experiments: install ## the classic VAE experiments on digits, and a page that explains them; DATA=mnist for your own
	@$(BIN)/python experiments/classic_vae/run.py $${DATA:+--data "$$DATA"} $${LABELS:+--label-column "$$LABELS"}

test: install ## the test suite, four to ten minutes on two cores
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m "not slow"

test-slow: install ## what takes longer: real kills, large images, compilers, the bundled codecs on photographs
	$(BIN)/python -m pytest -q -n 2 --dist loadgroup -m slow

check: install ## linter, formatter and type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install ## the documentation as a site in site/, which opens from disk; fails on a broken link
	$(BIN)/mkdocs build --strict --quiet
	@echo "site/index.html"

format: install ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean: ## remove the demo's results and the virtual environment
	rm -rf runs/demo* "$(VENV)"
