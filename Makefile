# make demo: the whole thing in a few minutes. make test: lint, types, tests. Both set up .venv first.
.PHONY: demo test lint types tests docs bench clean
MAKEFLAGS += --jobs=3
PYTHON ?= python3
BIN := .venv/bin

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable . \
		pytest pytest-xdist ruff mypy tensorboard playwright hypothesis opacus dp-accounting bitsandbytes
	touch $@

demo: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/fedcollm demo fedcollm-demo
	@echo "for fedcollm on the command line: . $(BIN)/activate"

test: lint types tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

tests: .venv/installed
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 3 --dist worksteal --durations 10

docs: .venv/installed
	$(BIN)/python tests/generate_docs.py

bench: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks

clean:
	rm -rf .venv fedcollm-demo
