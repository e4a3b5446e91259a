# Few targets; `make help` lists them. Everything they need besides Python 3.11 or 3.12 is installed into .venv.
SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
ARGS ?=

.DEFAULT_GOAL := help
.PHONY: help ranking preflight test lint format clean

help: ## this list
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-9s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

ranking: $(VENV)/.installed ## rank the policies of config/config.yaml (ARGS="--config seed=3" for another run)
	@$(BIN)/python -m workflow_src.launch $(ARGS)

preflight: $(VENV)/.installed ## what a run would do and why, its cost, what is missing (ARGS="--configfile …")
	@$(BIN)/python -m workflow_src.preflight $(ARGS)

test: $(VENV)/.installed ## lint, dry runs, unit tests, a miniature run of everything and its second run
	@$(BIN)/python -m tests.run_all

lint: $(VENV)/.installed ## ruff and snakefmt, as `make test` runs them
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/snakefmt --check Snakefile rules

format: $(VENV)/.installed ## rewrite sources in house style
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format . && $(BIN)/snakefmt Snakefile rules

clean: ## remove results (asks first)
	@read -p "remove results/ and .snakemake/? [y/N] " answer; if [ "$$answer" = y ]; then \
	  rm -rf .snakemake && find results -mindepth 1 -not -name README.md -delete; fi

# The stamp is younger than what decides the environment's content, so an edit there installs anew.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; v in ((3, 11), (3, 12)) or sys.exit(f"error: Python {v[0]}.{v[1]} found; Rehearsal needs 3.11 or 3.12, e.g. make PYTHON=python3.11")'
	@echo "installing into $(VENV) (once; about 1 GB)" >&2
	@$(PYTHON) -m venv $(VENV) || { echo "error: python venv is missing; on Debian: apt-get install python3-venv" >&2; exit 1; }
	@PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@
