# reproduce · reference · test · figures · lab · bench · bench-gpu : each target sets up what it needs.
#   make reproduce PROFILE=smoke|laptop|reference
#   make reference PROFILE=laptop OTHER_SEEDS="1 2"    what is committed: several seeds, published; seed 0 last, as it reads the others
#   make test PIP_FLAGS=...   further flags for pip, e.g. the index of CPU-only torch builds

PYTHON ?= python3
PROFILE ?= laptop
OTHER_SEEDS ?= 1 2
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: reproduce reference test figures lab bench bench-gpu lint clean

reproduce: $(VENV)/installed
	$(BIN)/python -m ssah_utils.run --profile $(PROFILE)
	$(BIN)/python -m ssah_utils.figures --profile $(PROFILE) --to runs/$(PROFILE)/figures

reference: $(VENV)/installed
	for seed in $(OTHER_SEEDS) 0; do $(BIN)/python -m ssah_utils.run --profile $(PROFILE) --set seed=$$seed || exit 1; done
	for seed in $(OTHER_SEEDS) 0; do $(BIN)/python -m ssah_utils.publish --profile $(PROFILE) --seed $$seed || exit 1; done

test: $(VENV)/installed
	$(BIN)/python -m ssah_utils.assets
	$(BIN)/ruff check .
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q

figures: $(VENV)/installed
	$(BIN)/python -m ssah_utils.figures

lab: $(VENV)/installed
	$(BIN)/python -m jupyterlab notebooks

bench: $(VENV)/installed
	$(BIN)/python -m tests.bench

bench-gpu: $(VENV)/installed
	$(BIN)/python -m tests.bench_gpu

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# The stamp is newer than the lock exactly when what the lock names is installed.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf $(VENV) runs
