# `make demo` upscales the shipped photo; `make test` runs every test. Both set up .venv first.
# Without an NVIDIA card, add PIP="--extra-index-url https://download.pytorch.org/whl/cpu" on Linux
# to install the small CPU build of torch.
PYTHON ?= python3
PIP ?=
BIN := .venv/bin

.PHONY: demo test clean

demo: .venv/.demo
	$(BIN)/tudsr demo -o out

test: .venv/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist worksteal

.venv/.demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP) -c constraints.txt -e '.[cli]'
	touch $@

.venv/.test: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --disable-pip-version-check $(PIP) -c constraints.txt -e '.[dev]'
	touch $@

clean:
	rm -rf .venv out build *.egg-info
