# Set-up is done once, in .venv, and again when pyproject.toml, setup.py or csrc/ change.
#   make demo | demo-gemma | test | test-all | test-real | lint | types | cuda-check | docs | wheel | bench |
#     experiments | figures | clean

PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check

# torch comes first and pinned: an open range takes the newest CUDA build, several GB that a CPU machine cannot use.
# Without an NVIDIA driver the CPU wheels are offered beside PyPI's, and pip prefers them.
TORCH_SPEC ?= torch==2.13.0
TORCH_INDEX ?=
HAVE_GPU := $(shell command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L 2>/dev/null | grep -q GPU && echo yes)
CPU_WHEELS := $(if $(HAVE_GPU),,--extra-index-url https://download.pytorch.org/whl/cpu)
TORCH_SOURCE := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX),$(CPU_WHEELS))

# The triton each torch was built with; CPU wheels of torch do not bring it along.
TRITON_2.11 := ==3.6.0
TRITON_2.12 := ==3.7.0
TRITON_2.13 := ==3.7.1
TRITON_2.14 := ==3.8.0
TRITON_2.15 := ==3.9.0
TORCH_MINOR := $(shell echo '$(TORCH_SPEC)' | sed -n 's/^torch==\([0-9]*\.[0-9]*\).*/\1/p')
TRITON_SPEC ?= triton$(TRITON_$(TORCH_MINOR))

DOCS_SPEC := $(shell sed -n 's/^docs = \["\(.*\)"\]/\1/p' pyproject.toml)

PYTEST_FLAGS ?= --durations=5

CSRC := $(shell find csrc -type f)
CXX_SOURCES := $(filter %.cpp %.h %.cu %.cuh,$(CSRC))
CODE := thought_kernels tests benchmarks examples setup.py .ci

.PHONY: setup demo demo-gemma test test-slow test-all test-real lint format types cuda-check docs wheel bench \
	experiments figures clean
.DELETE_ON_ERROR:

demo: setup
	$(VENV)/bin/thought-kernels demo

# On a real pretrained model, which is fetched once.
demo-gemma: setup
	$(PY) benchmarks/real/demo_gemma.py

test: setup
	$(PY) -m pytest $(PYTEST_FLAGS)

test-slow: setup
	$(PY) -m pytest -m slow $(PYTEST_FLAGS)

test-all: setup
	$(PY) -m pytest -m "not real" $(PYTEST_FLAGS)

# Real pretrained models; skipped, with the reason, where they cannot be fetched.
test-real: setup
	$(PY) -m pytest -m real -rs $(PYTEST_FLAGS)

lint: setup
	$(PY) -m ruff check $(CODE)
	$(PY) -m ruff format --check $(CODE)
	$(VENV)/bin/clang-format --dry-run -Werror $(CXX_SOURCES)

format: setup
	$(PY) -m ruff check --fix $(CODE)
	$(PY) -m ruff format $(CODE)
	$(VENV)/bin/clang-format -i $(CXX_SOURCES)

types: setup
	$(PY) -m mypy

# Compiles every CUDA source without a GPU. CUDA_CHECK_OPTIONAL=1 passes where there is no nvcc.
cuda-check: setup
	@if command -v nvcc >/dev/null; then $(PY) .ci/cuda_check.py; \
	elif [ "$(CUDA_CHECK_OPTIONAL)" = 1 ]; then echo "cuda-check: skipped, there is no nvcc on PATH"; \
	else echo "cuda-check: nvcc must be on PATH, got none; install the CUDA toolkit or pass CUDA_CHECK_OPTIONAL=1" >&2; \
	exit 1; fi

# The pages of docs/ as a site in build/site; fails where a link leads nowhere. DOCS_OPTIONAL=1 passes where mkdocs
# cannot be had.
docs: setup
	@if $(PY) -c 'import mkdocs' 2>/dev/null || $(PIP) install --quiet --retries 2 '$(DOCS_SPEC)'; then \
	$(PY) -m mkdocs build --strict --quiet; \
	elif [ "$(DOCS_OPTIONAL)" = 1 ]; then echo "docs: skipped, mkdocs cannot be installed"; \
	else echo "docs: mkdocs must be installed, got none; let pip have it or pass DOCS_OPTIONAL=1" >&2; exit 1; fi

wheel: setup
	rm -rf dist build/lib* build/bdist*
	$(PIP) wheel --quiet --no-build-isolation --no-deps --wheel-dir dist .
	$(PY) .ci/check_wheel.py dist/*.whl

bench: setup
	@set -e; for script in benchmarks/measure/bench_*.py; do echo "== $$script"; $(PY) $$script; done

# Every number that the README and docs/ show, all but weightwatcher's (its script says how to install that beside it),
# those of real models (docs/real_models.md says how to measure them) and those of toy models of the paper's size
# (docs/toy_models.md does): hours on two cores. Rows that stand in
# interference.csv and toy_geometries.csv are kept; delete these files to measure them again.
figures: setup bench experiments
	$(PY) benchmarks/measure/bench_transmute.py --model 1b --prefix 32 --no-memory \
		--providers layerwise,cached,floor,strong,onednn,two_pass,sequential
	$(PY) benchmarks/measure/predict.py
	$(PY) benchmarks/measure/launches.py
	$(PY) benchmarks/measure/commands.py
	$(VENV)/bin/thought-kernels toy geometries --output benchmarks/results/toy_geometries.csv
	@set -e; for preset in reduced reduced-nonuniform; do \
		$(VENV)/bin/thought-kernels toy sweep --preset $$preset --output build/toy-$$preset; \
		name=$$(echo $$preset | sed -n 's/reduced-/_/p'); \
		cp build/toy-$$preset/models.csv benchmarks/results/toy_sweep$$name.csv; \
		for table in clusters nulls null_clusters; do \
			cp build/toy-$$preset/$$table.csv benchmarks/results/toy_$$table$$name.csv; done; done
	$(VENV)/bin/thought-kernels toy evolution build/toy-reduced --output benchmarks/results/toy_evolution.csv
	$(VENV)/bin/thought-kernels toy drift build/toy-reduced --output benchmarks/results/toy_drift.csv
	$(PY) benchmarks/tables/write_tables.py

# Every experiment of docs/experiments.md, and how interference is foretold; then their tables and figures.
experiments: setup
	$(PY) benchmarks/measure/experiments.py
	$(PY) benchmarks/measure/interference.py
	$(PY) benchmarks/tables/write_tables.py

clean:
	rm -rf build dist *.egg-info thought_kernels/*.so

setup: $(VENV)/.built

$(VENV)/.python:
	@command -v $(PYTHON) >/dev/null || { \
	echo "setup: PYTHON must name a Python >= 3.11, got '$(PYTHON)', which is not on PATH" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and \
	"setup: Python must be at least 3.11, got %d.%d; pass PYTHON=python3.11" % sys.version_info[:2])'
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null || { \
	echo "setup: $(PYTHON) must have the venv module, got none; on Debian: apt install python3-venv" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python
	$(PIP) install --quiet --retries 2 $(TORCH_SOURCE) '$(TORCH_SPEC)'
	@$(if $(HAVE_GPU),:,$(PY) -W ignore -c 'import torch; torch.version.cuda and print("setup: got a CUDA build of torch, and no GPU \
	is here; it works, but TORCH_INDEX=<index of CPU wheels> saves gigabytes")')
	@touch $@

$(VENV)/.packages: $(VENV)/.torch pyproject.toml
	$(PIP) install --quiet 'setuptools>=77' ninja pybind11 wheel
	@if [ "$$(uname -s)" = Linux ]; then set -x; $(PIP) install --quiet '$(TRITON_SPEC)'; fi
	@touch $@

# With torch in place nothing asks for another one.
$(VENV)/.built: $(VENV)/.packages setup.py $(CSRC)
	$(PIP) install --quiet --no-build-isolation --editable '.[dev]'
	@touch $@
