# make demo: the whole job on synthetic images; make test: every test but those of clusters; make cluster: those, on a
# real SLURM (Debian: slurm-wlm munge shellcheck) and with the real wandb agent; make chaos: faults, on and on; make lint
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test cluster chaos lint format clean env
env: $(STAMP)

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --editable '.[all,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/irkd demo

test: $(STAMP)
	$(BIN)/python -m pytest --ignore=tests/cluster

cluster: $(STAMP)
	$(BIN)/python -m pytest tests/cluster

FAULTS ?= 200
SEED ?= 7
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache
