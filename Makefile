# make demo: the whole job on synthetic images; make test: every test but those of clusters; make cluster: those, on a
# real SLURM (Debian: slurm-wlm munge shellcheck) and with the real wandb agent; make chaos: faults, on and on; make lint;
# make fuzz: damaged input to every reader; make docs: the site, in site/; make lock, lowest, sbom, dist: see
# docs/development.md
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

# LOCKED=1: the exact versions of requirements.lock, each file by its hash; else the newest that pyproject.toml allows
LOCKED ?=

.PHONY: demo large cifar10 test cluster chaos fuzz docs lint format lock lowest sbom dist clean env
env: $(STAMP)

$(STAMP): pyproject.toml requirements.lock
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or newer is needed; name one: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(if $(LOCKED),$(BIN)/pip install --quiet --require-hashes -r requirements.lock)
	$(BIN)/pip install --quiet $(if $(LOCKED),--no-deps) --editable '.[all,dev,docs]'
	@touch $@

demo: $(STAMP)
	$(BIN)/irkd demo

# shards behind an S3 server: two processes, killed, and three; for a new start remove runs/large
large: $(STAMP)
	$(BIN)/python -m benchmarks.large

# teacher, student, measurements and page on CIFAR-10; each step goes on where it stopped. CIFAR10: a folder with the
# Hugging Face parquet files; without it the original archive is fetched
CIFAR10 ?=
RUNS := runs/cifar10-strong
cifar10: $(STAMP)
	$(BIN)/irkd render $(if $(CIFAR10),parquet --path $(CIFAR10),cifar10 --path data --download) --out shards/cifar10 \
		--resolutions 12,16,20,24,28,32 --workers 2
	$(BIN)/irkd train configs/cifar10/strong/teacher.yaml
	$(BIN)/irkd evaluate $(RUNS)/teacher-seed0
	$(BIN)/irkd train configs/cifar10/strong/custom_p4.yaml
	$(BIN)/irkd evaluate $(RUNS)/custom_p4-seed0
	$(BIN)/irkd report $(RUNS)/custom_p4-seed0

# two halves side by side, on two cores, that take about as long: most of tests/training, whose log comes last, and the rest
test: $(STAMP)
	@log=$$(mktemp); { $(BIN)/python -m pytest tests/training --ignore-glob='tests/training/test_t*' >$$log 2>&1 & } ; half=$$!; \
		$(BIN)/python -m pytest --ignore=tests/cluster --ignore-glob='tests/training/test_[!t]*'; code=$$?; \
		wait $$half || code=1; cat $$log; rm -f $$log; exit $$code

cluster: $(STAMP)
	$(BIN)/python -m pytest tests/cluster

FAULTS ?= 200
SEED ?= 7
chaos: $(STAMP)
	$(BIN)/python -m tests.chaos --faults $(FAULTS) --seed $(SEED)

MINUTES ?= 60
fuzz: $(STAMP)
	$(BIN)/python -m tests.fuzz.driver --minutes $(MINUTES) --out runs/fuzz

# opened without a server or a network: site/index.html
docs: $(STAMP)
	$(BIN)/python pages/reference.py
	$(BIN)/python -m mkdocs build --strict --quiet

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# what only a release needs, apart from what runs and tests
TOOLS := .venv-tools
$(TOOLS)/.installed:
	$(PYTHON) -m venv $(TOOLS)
	$(TOOLS)/bin/pip install --quiet uv build twine
	@touch $@

# for every platform and Python that pyproject.toml allows, told apart by markers
COMPILE = $(TOOLS)/bin/uv pip compile pyproject.toml --universal --python-version 3.11 --extra all --extra dev --extra docs \
	--quiet --no-header --no-annotate --no-emit-index-url --no-emit-find-links
lock: $(TOOLS)/.installed
	$(COMPILE) --upgrade --generate-hashes --output-file requirements.lock
	$(COMPILE) --upgrade --resolution lowest-direct --output-file requirements-lowest.txt

# the oldest versions that pyproject.toml allows: installed apart, and used for a small job and the quick tests
LOWEST := .venv-lowest
lowest: $(TOOLS)/.installed
	$(PYTHON) -m venv --clear $(LOWEST)
	$(TOOLS)/bin/uv pip install --quiet --python $(LOWEST)/bin/python -r requirements-lowest.txt
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest tests/test_cli.py::test_the_demo tests/test_config.py tests/test_checkpoint.py \
		tests/data/test_shards.py tests/data/test_sources.py tests/distill tests/training/test_optim.py \
		tests/training/test_curriculum.py

sbom: $(STAMP)
	$(BIN)/python release/sbom.py sbom.json requirements.lock

# the same commit gives the same bytes: the time in the archives is the commit's
dist: $(TOOLS)/.installed
	rm -rf dist
	SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) $(TOOLS)/bin/python -m build --outdir dist .
	$(TOOLS)/bin/twine check --strict dist/*

clean:
	rm -rf $(VENV) $(TOOLS) $(LOWEST) dist site sbom.json .pytest_cache .ruff_cache
