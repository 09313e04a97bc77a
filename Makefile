# The commands that the README and CI use. `make help` lists them.
#
# The first run makes .venv here, installs the versions of constraints.txt and builds csrc/; a change
# of these or of pyproject.toml installs again. PYTHON=/path/to/python chooses another Python.

# The first that starts and is 3.11 or newer: a pyenv shim may exist and yet not run.
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do \
	"$$p" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && echo "$$p" && break; done)
BIN := .venv/bin
SETUP := pyproject.toml constraints.txt $(wildcard csrc/*)
# Set-up talks on standard error and leaves standard input to the program.
INSTALL := $(BIN)/python -m pip install -qq -c constraints.txt
QUIET := </dev/null >&2

PROMPT ?=
ARGS ?=
export PROMPT

.DEFAULT_GOAL := help
.PHONY: help run test check bench docs
.SILENT:

help: ## list these commands
	sed -n 's/^\([a-z]*\):.*## \(.*\)/make \1	\2/p' Makefile

run: .venv/base-installed ## generate: PROMPT="Once upon a time", or standard input, or a session; ARGS="--stats"
	if [ -n "$$PROMPT" ]; then printf '%s' "$$PROMPT" | $(BIN)/tramontane run $(ARGS); \
	else $(BIN)/tramontane run $(ARGS); fi

test: .venv/dev-installed ## run the tests, one process per core; ARGS="tests/nn -x", ARGS="-n 0" for one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(ARGS)

check: .venv/dev-installed ## lint, formatting, types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/dev-installed ## print the tables of docs/benchmarks.md for this machine
	for name in cpu load train; do echo "== $$name"; $(BIN)/python benchmarks/$$name.py $(ARGS) || exit 1; done

docs: .venv/dev-installed ## check that every file and command that the documents name exists
	$(BIN)/python -m pytest tests/test_docs.py $(ARGS)

# torch first and pinned: left to the resolver it may come with gigabytes of CUDA libraries.
.venv/torch-installed: constraints.txt
	test -n "$(PYTHON)" || { echo "make: no Python 3.11 or newer found; use make PYTHON=/path/to/python" >&2; exit 1; }
	echo "Setting up .venv with $(PYTHON): once, a few minutes" >&2
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv $(QUIET)
	$(INSTALL) torch==2.13.0 $(QUIET)
	touch $@

# Installing builds the native kernels of csrc/, where there is a C++ compiler.
.venv/base-installed: .venv/torch-installed $(SETUP)
	$(INSTALL) -e . $(QUIET)
	touch $@

.venv/dev-installed: .venv/torch-installed $(SETUP)
	$(INSTALL) -e '.[dev]' $(QUIET)
	touch .venv/base-installed $@
