# Two commands: `make compare` and `make test`. Both make .venv first, from pinned versions.
PYTHON ?= python3
BIN := .venv/bin

# Two test processes of two threads each: threads that spin while they wait would slow both many
# times over. `compare` has the machine to itself, and there sleeping threads slow small models.
test test-slow: export OMP_WAIT_POLICY = passive

.PHONY: compare test test-slow lint format docs clean

compare: .venv/installed
	$(BIN)/polypatch compare

test: .venv/dev
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright
	POLYPATCH_CHECK_SHAPES=1 $(BIN)/pytest -m "not slow" -n 2

test-slow: .venv/dev
	$(BIN)/pytest -m slow

lint: .venv/dev
	$(BIN)/ruff check --fix . && $(BIN)/ruff format . && $(BIN)/pyright

docs: .venv/dev
	$(BIN)/polypatch papers --write docs/papers.md

.venv/bin/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "polypatch needs Python 3.11 or newer: make PYTHON=python3.11")'
	$(PYTHON) -m venv .venv

.venv/installed: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/dev: .venv/bin/python pyproject.toml constraints.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	touch .venv/installed $@

clean:
	rm -rf .venv runs report
