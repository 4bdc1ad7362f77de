# `make help` lists the targets. Every one of them first sees to .venv; once that is installed, this
# takes no time until pyproject.toml or constraints.txt changes.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEV := $(VENV)/.dev-installed
DOCS := $(VENV)/.docs-installed
# Extra arguments, for example: make test ARGS="-k dense"
ARGS ?=

# Older releases of pip read the pins of their isolated build environments from the first of these,
# newer ones from the second.
export PIP_CONSTRAINT := constraints.txt
export PIP_BUILD_CONSTRAINT := constraints.txt

.DEFAULT_GOAL := help
.PHONY: help install demo test lint types bench docs clean distclean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  \1\t\2/p' $(firstword $(MAKEFILE_LIST)) | expand -t 14

install: $(DEV) ## create .venv with the pinned development tools

$(PY):
	$(PYTHON) -m venv $(VENV)

$(DEV): pyproject.toml constraints.txt | $(PY)
	$(PY) -m pip install -c constraints.txt -e ".[dev]"
	@touch $@

$(DOCS): $(DEV)
	$(PY) -m pip install -c constraints.txt -e ".[docs]"
	@touch $@

demo: $(DEV) ## the main job on real input: figures and summary.json in demo/
	$(PY) -m tutorials.demo --out demo $(ARGS)

test: $(DEV) ## all tests, on two processes
	$(PY) -m pytest -n 2 $(ARGS)

lint: $(DEV) ## style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

types: $(DEV) ## mypy on the library, then on a user's script against the built wheel
	.ci/types $(PY)

bench: $(DEV) ## steps beside the same arithmetic in raw torch; maps; gradient estimators
	$(PY) -m benchmarks.svi_step $(ARGS)
	$(PY) -m benchmarks.thresholded_step $(ARGS)
	$(PY) -m benchmarks.conv_maps $(ARGS)
	$(PY) -m benchmarks.estimators

docs: $(DOCS) ## the site, in docs/_build/html; runs the tutorials (SMOKE=1: briefly)
	$(PY) -m sphinx -W --keep-going -b html docs docs/_build/html

clean: ## remove what the other targets wrote, .venv aside
	rm -rf build dist demo docs/_build docs/_autosummary docs/_results docs/_tutorials docs/results.md *.egg-info
	rm -rf .mypy_cache .ruff_cache .pytest_cache .hypothesis .coverage htmlcov
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

distclean: clean ## clean, and remove .venv
	rm -rf $(VENV)
