# The commands of this project. Each sets up what it needs in .venv first, so that a fresh clone needs only make and Python.
#
#   make demo                    train, score and merge all three methods on a small real model (DEMO="--quick" shortens it)
#   make test                    run the quick half of the tests (PYTEST="-m slow" for the other), in PROCESSES=2
#   make latest / make lowest    run them with the newest / the lowest releases that pyproject.toml allows, in a venv of its own
#   make interpreters            run a short part of them on every other Python 3.11 to 3.13 that can be found or installed
#   make conformance             run PEFT's own tests on our methods (CONFORMANCE="--fast" shortens it)
#   make torture                 stop, fill and alter for some minutes (TORTURE="--minutes 5" changes how long)
#   make docs                    build the documentation's site into site/; a link that does not hold fails it
#   make audit                   look up known faults of the installed packages (AUDIT="--ignore-vuln ID" leaves one out)
#   make lint / make format      check the code style and the types / apply the style
#   make lock                    renew requirements/, the versions that the other commands install (LOCK="--upgrade-package peft"
#                                moves one package alone)
#   make clean                   remove what make and Python made; runs/ stays
#
# PYTHON=...   the interpreter to build .venv with; by default the newest of 3.13, 3.12 and 3.11 that works
# TORCH=...    what to install as torch, such as another version or a wheel; by default torch==2.13.0
#
# requirements/ pins every package but torch by version and hash. One version of torch has different wheels for CPUs and for
# each CUDA, so torch is pinned by version alone.

SHELL := /bin/bash
RELEASES ?= locked
VENV := .venv$(if $(filter-out locked,$(RELEASES)),-$(RELEASES))
BIN := $(VENV)/bin
# Of two set-ups at a time the second waits: they would take files from under each other.
ALONE := flock Makefile
PIP := $(ALONE) $(BIN)/python -m pip install --disable-pip-version-check
LOCKED_TORCH := torch==2.13.0
LOCK ?= --upgrade
TORCH ?=
DEMO ?=
PYTEST ?=
PROCESSES ?= 2
CONFORMANCE ?=
TORTURE ?=
AUDIT ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test latest lowest interpreters conformance torture docs audit lint format lock check-lock clean

help:
	@sed -n 's/^#   //p' Makefile

demo: $(VENV)/.demo
	$(BIN)/svdtune demo $(DEMO)

test: $(VENV)/.dev
	$(BIN)/python -m pytest --numprocesses $(PROCESSES) --dist worksteal $(PYTEST)

# The newest releases are those of today, also where .venv-latest is there.
latest:
	$(MAKE) test RELEASES=latest --what-if pyproject.toml

# The lowest releases of SciPy and Matplotlib have no wheels for later Pythons.
lowest:
	$(MAKE) test RELEASES=lowest PYTHON="$(or $(PYTHON),python3.11)"

interpreters: .venv-lock/.uv
	.venv-lock/bin/python .ci/interpreters.py

conformance: $(VENV)/.conformance
	$(BIN)/python -m conformance $(CONFORMANCE)

torture: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m torture $(TORTURE)

docs: $(VENV)/.docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

audit: $(VENV)/.dev
	$(BIN)/python .ci/audit.py $(AUDIT)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Each list holds to the versions of the next larger one, so that all of them fit into one .venv.
lock: .venv-lock/.uv
	$(call compile,uv,requirements/uv.in,$(LOCK))
	$(call compile,conformance,pyproject.toml --extra demo --extra dev --extra conformance,$(LOCK))
	$(call compile,dev,pyproject.toml --extra demo --extra dev,--constraints requirements/conformance.txt)
	$(call compile,demo,pyproject.toml --extra demo,--constraints requirements/dev.txt)
	$(call compile,docs,pyproject.toml --extra docs,--constraints requirements/conformance.txt)
	$(call compile,build,requirements/build.in,--constraints requirements/conformance.txt $(LOCK))

# $(call compile,NAME,SOURCES,OPTIONS): requirements/NAME.txt, for every Python and platform that svdtune supports.
compile = .venv-lock/bin/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate \
	--custom-compile-command "make lock" --no-emit-package torch --constraints <(echo $(LOCKED_TORCH)) \
	$(2) $(3) --output-file requirements/$(1).txt

# uv would settle for a newer Transformers, so as to have newer releases of what it depends on.
lowest_transformers = sed -n 's/.*"transformers>=\([0-9.]*\)".*/transformers==\1.*/p' pyproject.toml

check-lock: $(VENV)/.dev
	$(BIN)/python -m pip check

clean:
	rm -rf .venv .venv-* build dist site .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# pip takes the lists without their dependencies, which they name all of, and builds nothing with tools of other versions.
$(VENV)/.demo $(VENV)/.dev $(VENV)/.conformance $(VENV)/.docs: $(VENV)/.%: pyproject.toml $(wildcard requirements/*.txt) | $(BIN)/pip
ifeq ($(RELEASES),locked)
	$(PIP) --quiet --require-hashes --no-deps --requirement requirements/build.txt
	$(PIP) --require-hashes --no-deps --no-build-isolation --requirement requirements/$*.txt || $(BIN)/python -c "$$WHY"
	$(call torch,$(LOCKED_TORCH))
	$(PIP) --no-deps --no-build-isolation --editable .
else ifeq ($(RELEASES),latest)
	$(call torch,torch)
	$(PIP) --upgrade --upgrade-strategy eager --editable ".[$*]" $(TORCH) || $(BIN)/python -c "$$WHY"
else
	$(MAKE) .venv-lock/.uv
	.venv-lock/bin/uv pip compile --quiet --resolution lowest-direct --python $(BIN)/python --extra $* pyproject.toml \
		--constraints <($(lowest_transformers)) $(if $(TORCH),--override <(echo "$(TORCH)")) --output-file $(VENV)/lowest.txt
	$(PIP) --requirement $(VENV)/lowest.txt || $(BIN)/python -c "$$WHY"
	$(PIP) --no-deps --editable .
endif
	@touch $@

# After a pip that failed: pycosat, which reasoning-gym asks for, comes as C alone, and what pip says of it is long.
define WHY
import os, shutil, sys, sysconfig
compiler = (os.environ.get("CC") or sysconfig.get_config_var("CC")).split()[0]
if not shutil.which(compiler) or not os.path.isfile(sysconfig.get_path("include") + "/Python.h"):
    print("One package, pycosat, is built from C, and a C compiler or the header Python.h is missing here. Install them "
          "(Debian and Ubuntu: apt install gcc python3-dev), or name the compiler: make CC=/path/to/gcc", file=sys.stderr)
sys.exit(1)
endef
export WHY

# $(call torch,DEFAULT): an import decides, not pip's list: a torch that .venv sees from elsewhere is as good. The import is of
# a part, since half of a torch is a module too.
torch = if [ -n "$(TORCH)" ] || ! $(BIN)/python -c "import torch.nn; print('torch', torch.__version__, 'is there, and stays')" \
	2>/dev/null; then $(PIP) $(or $(TORCH),$(1)); fi

.venv-lock/.uv: requirements/uv.txt | .venv-lock/bin/pip
	$(ALONE) .venv-lock/bin/python -m pip install --quiet --require-hashes --requirement $<
	@touch $@

# pip comes last, so with it all is there.
%/bin/pip:
	@python="$(PYTHON)"; \
	works() { command -v "$$1" >/dev/null && "$$1" -c "import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))" 2>/dev/null; }; \
	if [ -z "$$python" ]; then \
		for candidate in python3.13 python3.12 python3.11 python3; do \
			if works "$$candidate"; then python="$$candidate"; break; fi; done; fi; \
	if [ -z "$$python" ] || ! works "$$python"; then \
		echo "svdtune needs Python 3.11 or newer with its venv module; $${python:-none} does not do." >&2; \
		echo "Install one (Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3" >&2; \
		exit 1; fi; \
	$(ALONE) "$$python" -m venv $*
