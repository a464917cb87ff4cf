# `make demo` and `make test` work on a fresh machine with Python 3.11 or newer: they install what they need first.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PHOTOS ?=
export PHOTOS # recipes read it from the environment, since a path may hold spaces and quotes
# Photographs of your own get a run of their own: the same folder would resume the one on drawn pictures.
SPACE := $(subst ,, )
DEMO := runs/demo$(if $(PHOTOS),-$(subst $(SPACE),-,$(notdir $(abspath $(PHOTOS)))))

.PHONY: help install demo docs test test-slow check format clean
.DEFAULT_GOAL := help

help: ## list these commands
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

install: $(BIN)/.installed ## create .venv with latentcodec and its tools

$(BIN)/.installed: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --progress-bar off -e '.[dev]'
	touch $@

demo: install ## train a small codec, put it into a pipeline, measure it; PHOTOS=folder for your own images
	$(BIN)/accelerate launch --quiet --num_processes 1 --num_machines 1 --mixed_precision bf16 --dynamo_backend no \
		train/train.py --config train/configs/demo.yaml --output_dir "$(DEMO)" $${PHOTOS:+--data.path "$$PHOTOS"}
	$(BIN)/python bench/pipeline.py --codec "$(DEMO)/codec" --out "$(DEMO)/pipeline" $${PHOTOS:+--images "$$PHOTOS"}
	$(BIN)/python bench/reconstruction.py --codec "$(DEMO)/codec" --images "$(DEMO)/pipeline/originals" \
		--lpips_net none --out "$(DEMO)/reconstruction"
	$(BIN)/python bench/throughput.py --codec "$(DEMO)/codec" --sizes 256 --batches 1 --out "$(DEMO)/throughput"
	$(BIN)/python bench/pipeline.py --codec photo-f8c16 --out "$(DEMO)/bundled" $${PHOTOS:+--images "$$PHOTOS"}
	@echo
	@echo "The trained codec        $(DEMO)/codec"
	@echo "Its progress in pictures $(DEMO)/samples"
	@echo "Through a pipeline       $(DEMO)/pipeline/pipeline.png"
	@echo "By the bundled codec     $(DEMO)/bundled/pipeline.png"
	@echo "The reports, to open in a browser:"
	@ls "$(DEMO)"/reconstruction/*.html "$(DEMO)"/throughput/*.html

test: install ## the test suite, under five minutes on two cores
	$(BIN)/python -m pytest -q -n 2 -m "not slow"

test-slow: install ## what takes longer: real kills, large images, compilers, the bundled codecs on photographs
	$(BIN)/python -m pytest -q -n 2 -m slow

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
