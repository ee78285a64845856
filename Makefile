# make setup        a virtual environment in .venv with pinned versions, without a GPU
# make extras       stock libraries (timm, transformers, ...), DALI (CPU), ray on top: 1 GB; the tests that need them run then
# make quickstart   pre-train and probe a tiny encoder on this machine
# make collapse     what the contrastive loss is for: five objectives on digits, three seeds (an hour of CPU time)
# make check        what has to pass before a change is proposed: lint and test
# make bench        all benchmarks that need no GPU; writes their figures into docs/BENCHMARKS.md
#                   (BENCH_FLAGS="--data-path CORPUS" measures a corpus of your own)
# make chaos        the fault campaign: kills, damaged files, failing disks, hanging ranks; 20 minutes, docs/RELIABILITY.md
#                   (CHAOS_FLAGS="--seed 3 --only kills:17" repeats one case)
# make gpu-check    tests and benchmarks on a machine with a GPU, with that machine's own Python

VENV := .venv
BIN := $(VENV)/bin

# The first of these that runs and is Python 3.11 or 3.12.
FITS := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do \
	"$$p" -c '$(FITS)' 2>/dev/null && echo $$p && break; done)

# Wheels of torch without CUDA (200 MB instead of 3 GB). Used only if it answers; empty = do not ask.
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
ANSWERS := import sys, urllib.request; urllib.request.urlopen(sys.argv[1] + "/torch/", timeout=10)
# Sets $$index for pip. torchvision too must come from where torch came from, or its compiled part cannot be loaded.
ASK_INDEX = index=""; if test -n "$(TORCH_INDEX)" && \
	$(BIN)/python -c '$(ANSWERS)' "$(TORCH_INDEX)" 2>/dev/null; then index="--extra-index-url $(TORCH_INDEX)"; fi

export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: setup extras quickstart collapse test lint format check bench chaos gpu-check clean

setup: $(VENV)/.installed

$(VENV)/.installed: requirements/cpu.txt setup.py
	@test -n "$(PYTHON)" || { echo "setup: no Python 3.11 or 3.12 found; give its path:" \
		"make setup PYTHON=/path/to/python3.12"; exit 1; }
	@echo "setup: $(VENV) with $$($(PYTHON) --version), a minute or more"
	@$(PYTHON) -m venv $(VENV)
	@$(ASK_INDEX); $(BIN)/pip install --quiet --quiet $$index --requirement requirements/cpu.txt
	@$(BIN)/pip install --quiet --quiet --no-deps --no-build-isolation --editable .
	@touch $@
	@echo "setup: done; activate with  . $(BIN)/activate"

extras: setup
	@$(ASK_INDEX); $(BIN)/pip install --quiet --quiet $$index --requirement requirements/extras.txt

quickstart: setup
	@PATH="$(CURDIR)/$(BIN):$$PATH" bash examples/quickstart.sh

collapse: setup
	OMP_NUM_THREADS=1 $(BIN)/python examples/experiments/collapse/run.py --data digits --preset small --output runs/collapse

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: lint test

bench: extras
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/run_all.py $(BENCH_FLAGS)

chaos: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m benchmarks.chaos $(CHAOS_FLAGS)

gpu-check:
	$(PYTHON) -m pytest --quiet -m gpu
	$(PYTHON) benchmarks/gpu.py

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
