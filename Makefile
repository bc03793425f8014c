# `make quickstart` and `make test` each do all of their own set-up on a machine with git, make and Python >= 3.11.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: quickstart test test-slow test-browser fuzz check format clean

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 13) else "imglish needs Python 3.11 to 3.13; set PYTHON=python3.x")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev,bench]'
	@touch $(READY)

quickstart: $(READY)
	$(BIN)/imglish quickstart

test: check
	$(BIN)/python -m pytest -n 2 -m "not slow and not fuzz and not gpu and not browser"

test-slow: $(READY)
	$(BIN)/python -m pytest -m "slow"

test-browser: $(READY)
	$(BIN)/python -m pytest -m "browser"

fuzz: $(READY)
	$(BIN)/python -m pytest -m "fuzz" --timeout=3600

check: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist *.egg-info
