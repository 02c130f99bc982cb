# quickstart · reproduce · reference · test · test-wheel · test-browser · figures · lab · lint · site · bench · bench-gpu : each target
# sets up what it needs.
#   make reproduce PROFILE=brief|laptop|reference     few requests; what is committed; hours for each seed
#   make reference PROFILE=laptop SEEDS=0:5           several seeds, published, as the committed results are
#   make reproduce JOBS=1     one notebook at a time; without JOBS two, where cores and memory are enough. What is published
#                             has minutes in it, so reference runs one at a time unless JOBS says otherwise.
#   make test PIP_FLAGS=...   further flags for pip, e.g. the index of CPU-only torch builds

PYTHON ?= python3
PROFILE ?= brief
SEEDS ?= 0:5
JOBS ?=
PIP_FLAGS ?=
AT_A_TIME := $(if $(JOBS),--jobs $(JOBS))
QUICK_MODEL := qwen2.5-coder-0.5b-instruct
VENV := .venv
BIN := $(VENV)/bin
# as ssah_utils/pipeline/kernel.py has it, which says why
export GOMP_SPINCOUNT ?= 10000

# Another kind of machine, as far as that can be had on this one: without AVX-512 and bfloat16.
OTHER_MACHINE := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 SSAH_DTYPE=float32
NUMERICAL := $(addprefix tests/test_,activations.py evaluation.py interventions.py models.py prompt_cache.py \
  panel.py probing.py real_model.py scores.py scoring.py search.py stats.py stepwise.py training.py unit_training.py units.py)

.PHONY: quickstart reproduce reference test test-wheel test-browser test-other-machine figures lab site bench bench-gpu lint clean

# Runs the first notebook, a few minutes, and opens it.
quickstart: $(VENV)/installed
	$(BIN)/ssah download $(QUICK_MODEL)
	$(BIN)/ssah run --profile qwen-0.5b --only 00_quickstart
	$(BIN)/python -m jupyterlab runs/qwen-0.5b/$(QUICK_MODEL)/seed-0/00_quickstart/00_quickstart.ipynb

reproduce: $(VENV)/installed
	$(BIN)/ssah sweep --profile $(PROFILE) $(AT_A_TIME)
	$(BIN)/ssah figures --profile $(PROFILE) --to runs/$(PROFILE)/figures

reference: PROFILE := laptop
reference: $(VENV)/installed
	$(BIN)/ssah sweep --profile $(PROFILE) --seeds $(SEEDS) --jobs $(or $(JOBS),1)
	$(BIN)/ssah publish --profile $(PROFILE) --seeds $(SEEDS)

test: $(VENV)/installed lint
	$(BIN)/ssah download smollm2-135m-instruct qwen2.5-coder-0.5b-instruct
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile

# The package as it is installed from a wheel, outside of the clone.
test-wheel: $(VENV)/installed
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -m wheel tests/test_wheel.py

# The explorer in JupyterLab, in a headless browser; nothing is tried where there is no Chromium.
test-browser: $(VENV)/browser
	$(BIN)/python -m pytest -q -m browser tests/test_browser.py

# The numerical tests once more as on another kind of machine; nothing to do where this is one of that kind.
test-other-machine: $(VENV)/installed
	if grep -q avx512 /proc/cpuinfo 2>/dev/null; then \
	  $(OTHER_MACHINE) HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -q -n 2 --dist loadfile $(NUMERICAL); \
	else echo "this machine has no AVX-512: make test has run the numerical tests without it"; fi

figures: $(VENV)/installed
	$(BIN)/ssah figures

lab: $(VENV)/installed
	$(BIN)/python -m jupyterlab notebooks

# From what is committed, without a network once Sphinx is installed.
site: $(VENV)/site
	$(BIN)/python -m sphinx -M html . site -c docs -q -W --keep-going
	@echo "site/html/index.html is there to open; to serve it: python -m http.server --bind 127.0.0.1 --directory site/html"

bench: $(VENV)/installed
	$(BIN)/python -m tests.bench
	$(BIN)/python -m tests.bench_growth

bench-gpu: $(VENV)/installed
	$(BIN)/python -m tests.bench_gpu

# Rules and format, and the types of the public part; all set in pyproject.toml.
lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The stamp is newer than the lock exactly when what the lock names is installed.
$(VENV)/installed: requirements.lock pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	touch $@

$(VENV)/site: requirements-site.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements-site.lock
	touch $@

$(VENV)/browser: requirements-browser.lock $(VENV)/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS) -r requirements-browser.lock
	touch $@

clean:
	rm -rf $(VENV) runs site docs/api
