# Each target makes its virtual environment first, so it works alone in a fresh clone with Python 3.11 or newer.
PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,$(shell command -v $(p) 2>/dev/null)))
BIN := .venv/bin
READY := .venv/ready
TEST := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/python -m pytest

.PHONY: demo test lint contract docs clean

demo: $(READY)
	$(BIN)/python -m luthier.demo --out demo/run

test: $(READY)
	$(TEST) -n 2 tests

lint: $(READY)
	$(BIN)/ruff check src tests evidence benchmarks docs examples
	$(BIN)/pyright

# every method on every architecture, each killed and resumed
contract: $(READY)
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE $(BIN)/luthier contract --all

# pages that are made from the code
docs: $(READY)
	$(BIN)/python docs/generate.py

$(READY): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[demo,dev,tensorboard]'
	touch $(READY)

clean:
	rm -rf .venv build dist demo .pytest_cache .ruff_cache src/*.egg-info
