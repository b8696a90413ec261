PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: quickstart test test-slow docs docs-serve lint types smoke install clean

install: $(STAMP)

# torch goes first: the constraints file pins the release, so that no later package draws another build.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,docs]'
	touch $(STAMP)

quickstart: install
	$(BIN)/python examples/quickstart.py

test: install
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2

test-slow: install
	$(BIN)/python -m pytest -m "not gpu"

docs: install
	$(BIN)/python -m mkdocs build --strict

docs-serve: install
	$(BIN)/python -m mkdocs serve

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/python -m mypy

smoke: install
	for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example --smoke || exit 1; done

clean:
	rm -rf $(VENV) site runs
