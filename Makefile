# `make demo` and `make test` do all the set-up they need first. `make help` lists everything.
SHELL := /bin/bash
PYTHON := .venv/bin/python
PYTEST_ARGS ?=

.PHONY: help setup setup-dev demo demo-cluster test test-all lint format coverage bench clean

help: ## list these commands
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 14

setup: ## make .venv with what serving needs
	@tools/setup.sh

setup-dev:
	@tools/setup.sh dev

demo: setup ## serve the demo model, ask it a question over HTTP, stop
	@$(PYTHON) tools/first_run.py

demo-cluster: setup-dev ## a router and three instances; one is killed while it answers
	@$(PYTHON) tools/first_cluster.py

test: setup-dev lint ## lint, types, layers, then the default tests
	@echo "==> tests"
	@$(PYTHON) -m pytest -n 2 --dist loadfile --durations 10 $(PYTEST_ARGS)

test-all: setup-dev ## the default tests and the slow ones
	@$(PYTHON) -m pytest -m "not gpu" --timeout 1800 --durations 20 $(PYTEST_ARGS)

lint: setup-dev ## ruff, mypy, import-linter
	@echo "==> ruff: style"
	@$(PYTHON) -m ruff check .
	@$(PYTHON) -m ruff format --check .
	@echo "==> mypy: types"
	@$(PYTHON) -m mypy
	@echo "==> import-linter: layers"
	@.venv/bin/lint-imports

format: setup-dev ## rewrite the code in the house style
	@$(PYTHON) -m ruff check --fix .
	@$(PYTHON) -m ruff format .

coverage: setup-dev ## line coverage of the rooms that work without torch
	@$(PYTHON) -m pytest -n 2 --dist loadfile --cov --cov-report= $(PYTEST_ARGS)
	@.venv/bin/coverage report --include 'xllm/core/*,xllm/config/*,xllm/wire/*,xllm/text/*,xllm/scheduler/*,xllm/kv/*' \
	  --fail-under 95 --skip-covered --show-missing

bench: setup-dev ## our engine beside transformers on this CPU (a quarter of an hour on 2 cores)
	@$(PYTHON) benchmarks/cpu_vs_transformers.py
	@$(PYTHON) benchmarks/host_overhead.py

clean: ## remove what tools wrote, keep .venv
	rm -rf build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache .coverage*
