# make demo: the whole thing in a few minutes. make test: lint, types, tests. Both set up .venv first; tests, Snakemake too.
.PHONY: demo test test-lowest lint types tests docs bench clean
MAKEFLAGS += --jobs=3
PYTHON ?= python3
BIN := .venv/bin
SNAKEMAKE := .venv-snakemake/bin/snakemake
export PYTHONDONTWRITEBYTECODE =  # nothing is compiled when it is installed; what is imported is, the first time

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint constraints.txt --editable . \
		hatchling pytest pytest-xdist ruff mypy tensorboard playwright hypothesis opacus dp-accounting bitsandbytes tenseal paramiko
	touch $@

$(SNAKEMAKE):
	$(PYTHON) -m venv .venv-snakemake
	.venv-snakemake/bin/python -m pip install --quiet --no-compile --disable-pip-version-check 'snakemake>=9.27,<10'

demo: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/fedcollm demo fedcollm-demo
	@echo "for fedcollm on the command line: . $(BIN)/activate"

test: lint types tests

lint: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/installed
	$(BIN)/mypy

# Compiles what is imported, once, before several processes import it at a time.
.venv/compiled: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest --collect-only --quiet >.venv/collected || (cat .venv/collected; false)
	touch $@

# Tests write many small files and wait until each is on the disk: they write into memory, where that has 6 GB to spare.
MEMORY := $(shell [ "$$(df -Pk /dev/shm 2>/dev/null | awk 'END {print $$4}')" -gt 6000000 ] 2>/dev/null && echo /dev/shm)

tests: .venv/compiled $(SNAKEMAKE)
	TMPDIR=$(or $(MEMORY),$(TMPDIR)) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 FEDCOLLM_SNAKEMAKE=$(CURDIR)/$(SNAKEMAKE) $(BIN)/python -m pytest \
		--numprocesses 3 --dist loadfile --no-loadscope-reorder --durations 10

# The core of the tests on the oldest releases that pyproject.toml allows. PyTorch of that age brings CUDA: 6 GB.
CORE := $(filter-out tests/cli/ tests/demo/ tests/files/ tests/benchmarks/ tests/slurm/ tests/studies/ tests/vectors/ tests/__pycache__/,$(wildcard tests/*/)) \
	$(addprefix tests/cli/test_,$(addsuffix .py,carrying commands completing exporting session sharing tables))

.venv-lowest/installed: pyproject.toml tests/lowest.txt
	$(PYTHON) -m venv .venv-lowest
	.venv-lowest/bin/python -m pip install --quiet --no-compile --disable-pip-version-check --constraint tests/lowest.txt \
		--editable '.[az,dp,gs,he,quant,s3,sftp,webdav]' dp-accounting hypothesis pytest tensorboard
	touch $@

test-lowest: .venv-lowest/installed
	TMPDIR=$(or $(MEMORY),$(TMPDIR)) HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 .venv-lowest/bin/python -m pytest -m 'not slow' $(CORE)

docs: .venv/installed
	$(BIN)/python tests/generate_docs.py

bench: .venv/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m tests.benchmarks

clean:
	rm -rf .venv .venv-lowest .venv-snakemake fedcollm-demo fedmkt-demo
