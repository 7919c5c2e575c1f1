# make demo and make test do all set-up by themselves from a bare machine.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEV := $(VENV)/.dev

export HF_HUB_OFFLINE ?= 1
export TOKENIZERS_PARALLELISM ?= false

.PHONY: install demo check test test-slow test-engines bench docs clean

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing exitsafe and PyTorch into $(VENV); this takes a few minutes the first time"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install -c constraints.txt torch
	$(BIN)/python -m pip install -c constraints.txt -e ".[report]"
	touch $(STAMP)

$(DEV): $(STAMP)
	@echo "Installing what the tests and checks need on top"
	$(BIN)/python -m pip install --quiet -c constraints.txt --group dev -e ".[all]"
	# It declares torchvision, of which there is no CPU build; what exitsafe's plugin needs does without.
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps lmms-eval
	# The tests' processors need it; they alone can import it beside a PyTorch for CPUs (tests/startup).
	$(BIN)/python -m pip install --quiet -c constraints.txt --no-deps --upgrade --target $(VENV)/torchvision torchvision
	touch $@

demo: install
	$(BIN)/exitsafe demo --out runs/demo

check: $(DEV)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

test: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test-slow: $(DEV)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m slow

test-engines: $(DEV)
	PYTHON=$(BIN)/python tests/engines/install.sh vllm llama transformers smollm2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m engines tests/engines

bench: $(DEV)
	$(BIN)/python -m benchmarks

docs: $(VENV)/.docs
	$(BIN)/mkdocs build --strict

$(VENV)/.docs: $(STAMP)
	$(BIN)/python -m pip install --quiet -c constraints.txt --group docs
	touch $@

clean:
	rm -rf site $(VENV) .engines .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
