# VENV=path uses another environment; without it `make` builds .venv once.
VENV ?= .venv
PYTHON ?= python3
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.hf_qie-installed
# one thread a process: two test workers on two cores, and the same arithmetic wherever the tests run
TEST_ENV := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install demo test bench gpu memory-table faults soak quality style clean

help:  ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

$(INSTALLED): setup.py constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[test,quality]"
	touch $@

install: $(INSTALLED)  ## make the environment with everything that tests and style need

demo: $(INSTALLED)  ## teach a tiny model to edit, and draw what it learned: outputs/demo/edits.png, in some minutes
	$(BIN)/python hf_qie/demo/run.py recipes/demo.yaml

test: $(INSTALLED)  ## run the tests, after the set-up they need
	$(TEST_ENV) $(BIN)/python -m pytest -n 2

faults: $(INSTALLED)  ## kill and stop extraction and training again and again, and compare what they leave; 20 minutes
	$(TEST_ENV) $(BIN)/python -m pytest -m faults

soak: $(INSTALLED)  ## run what takes longer: every optimizer, every way to compile, then 30 minutes in which nothing may grow
	$(TEST_ENV) $(BIN)/python -m pytest -n 2 -m soak
	$(TEST_ENV) $(BIN)/python tests/soak.py

bench: $(INSTALLED)  ## measure what docs/performance.md claims beside the usual way: one table, within 10 minutes
	$(TEST_ENV) $(BIN)/python tests/bench/run.py

gpu: $(INSTALLED)  ## measure on a GPU of 80 GB or more, with random weights: one table, within 10 minutes
	HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false $(BIN)/python tests/gpu/run.py

memory-table: $(INSTALLED)  ## forecast what a LoRA takes on cards of 16 to 80 GB: the table in recipes/README.md
	$(TEST_ENV) $(BIN)/python tests/memory_table.py

quality: $(INSTALLED)  ## check style; changes nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

style: $(INSTALLED)  ## fix style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:  ## remove what was built here
	rm -rf .venv outputs build *.egg-info .pytest_cache .ruff_cache
