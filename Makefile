# The commands of this project. Each sets up what it needs in .venv first, so that a fresh clone needs only make and Python.
#
#   make demo                    train, score and merge all three methods on a small real model (DEMO="--quick" shortens it)
#   make test                    run the tests (PYTEST="-m slow" for the long ones)
#   make conformance             run PEFT's own tests on our methods (CONFORMANCE="--fast" shortens it)
#   make torture                 stop, fill and alter for some minutes (TORTURE="--minutes 5" changes how long)
#   make audit                   look up known faults of the installed packages (AUDIT="--ignore-vuln ID" leaves one out)
#   make lint / make format      check / apply the code style
#   make clean                   remove what make and Python made; runs/ stays
#
# PYTHON=...   the interpreter to build .venv with; by default the newest of 3.13, 3.12 and 3.11 that works
# TORCH=...    what to install as torch, such as another version or a wheel; by default torch==2.13.0

SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
TORCH ?=
DEMO ?=
PYTEST ?=
CONFORMANCE ?=
TORTURE ?=
AUDIT ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test conformance torture audit lint format clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/svdtune demo $(DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest $(PYTEST)

conformance: $(VENV)/.conformance
	$(BIN)/python -m conformance $(CONFORMANCE)

torture: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m torture $(TORTURE)

audit: $(VENV)/.dev
	-$(BIN)/python -m pip install --quiet pip-audit
	$(BIN)/python .ci/audit.py $(AUDIT)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# `import torch` decides, not pip's list: a torch that .venv sees from elsewhere is as good.
$(VENV)/.torch: | $(BIN)/python
	@if [ -n "$(TORCH)" ] || ! $(BIN)/python -c "import torch" 2>/dev/null; then \
		$(BIN)/python -m pip install $(or $(TORCH),torch==2.13.0); fi
	@touch $@

$(VENV)/.demo $(VENV)/.dev $(VENV)/.conformance: $(VENV)/.%: pyproject.toml | $(VENV)/.torch
	$(BIN)/python -m pip install --editable ".[$*]"
	@touch $@

$(BIN)/python:
	@python="$(PYTHON)"; \
	works() { command -v "$$1" >/dev/null && "$$1" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }; \
	if [ -z "$$python" ]; then \
		for candidate in python3.13 python3.12 python3.11 python3; do \
			if works "$$candidate"; then python="$$candidate"; break; fi; done; fi; \
	if [ -z "$$python" ] || ! works "$$python"; then \
		echo "svdtune needs Python 3.11 or newer with its venv module; $${python:-none} does not do." >&2; \
		echo "Install one (Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi; \
	"$$python" -m venv $(VENV)
