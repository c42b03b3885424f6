# The five verbs. Each sets up what it needs; a second run finds it done.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PACKAGES := cachebus decode deploy prefill router

.PHONY: setup lint check test demo locks manifests

setup:
	@PYTHON=$(PYTHON) scripts/setup.sh $(VENV)

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

check: setup
	$(BIN)/mypy
	$(BIN)/lint-imports

test: lint check
	$(BIN)/pytest $(ARGS)

# What kustomize builds from, out of the Helm chart.
manifests: setup
	$(BIN)/python scripts/manifests.py

demo: setup
	@$(BIN)/headstart demo $(ARGS)

# The images' packages. ARGS=--upgrade takes the newest of all.
locks: setup
	scripts/lock.sh $(VENV) $(ARGS)
