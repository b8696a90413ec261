PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
export HF_HUB_OFFLINE := 1

.PHONY: quickstart test test-slow coverage package docs docs-serve site-check lint types pyright smoke install clean

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

# Lines and branches of the package that the default tests run; below the share in pyproject.toml it fails.
coverage: install
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --cov --cov-report=term:skip-covered --cov-report=html

# Wheel and source archive, and the wheel used in an environment of its own.
package: install
	$(BIN)/python -m pytest tests/test_package.py

docs: install
	$(BIN)/python -m mkdocs build --strict

docs-serve: install
	$(BIN)/python -m mkdocs serve

# Every page in headless Chromium; says so and goes on where there is none (exit status 2).
site-check:
	$(BIN)/python scripts/check_site.py || test $$? -eq 2

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: install
	$(BIN)/python -m mypy
	$(BIN)/python -m mypy --strict tests/typed_user_script.py

# An extra of its own: it brings a copy of Node.
pyright: install
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[pyright]'
	$(BIN)/basedpyright

smoke: install
	for example in examples/*.py; do echo "== $$example"; $(BIN)/python $$example --smoke || exit 1; done

clean:
	rm -rf $(VENV) site runs
