# SPDX-License-Identifier: Apache-2.0
# Everything runs inside .venv; PYTHON names the interpreter that creates it.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

PYTHON ?= $(firstword $(shell command -v python3.11) $(shell command -v python3))
BIN := .venv/bin
CORES := $(shell nproc 2>/dev/null || echo 2)
export MAX_JOBS ?= $(CORES)
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Hundreds of processes import torch and torchvision: without bytecode each would parse their sources again.
unexport PYTHONDONTWRITEBYTECODE

NATIVE := $(shell find csrc -type f)
FORMATTED := $(filter %.h %.cpp %.cu,$(NATIVE))
PYTEST_ARGS ?= -q
# Processes that test, each a file at a time; their threads share the cores. What needs several threads asks for them.
WORKERS ?= $(shell echo $$(($(CORES) < 8 ? $(CORES) : 8)))
THREADS = $(shell echo $$(($(WORKERS) > 1 ? ($(CORES) + $(WORKERS) - 1) / $(WORKERS) : $(CORES))))
PARALLEL := -n $(WORKERS) --dist loadfile --durations=15

VENV_STAMP := .venv/.installed-$(firstword $(shell cksum requirements/test.txt))

SANITIZED := build/sanitized

.PHONY: FORCE help venv build test test-isa fuzz soak sanitize mutants lint format demo bench docs sdist wheels clean cuda-objects

help:  ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

venv: $(VENV_STAMP)  ## create .venv with the pinned requirements
	@:

# Bytecode comes with the first import of a module; most are never imported.
$(VENV_STAMP): requirements/test.txt
	@[ -n "$(PYTHON)" ] && "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "make venv: needs Python 3.11 or newer; install it or run: make venv PYTHON=/path/to/python3"; exit 1; }
	@command -v "$${CXX:-c++}" >/dev/null || \
	  { echo "make venv: needs a C++ compiler; on Debian: apt-get install g++"; exit 1; }
	@[ -x $(BIN)/python ] || "$(PYTHON)" -m venv .venv || \
	  { rm -rf .venv; echo "make venv: cannot create .venv; on Debian: apt-get install python3-venv python3-dev"; exit 1; }
	@[ -f "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("include"))')/Python.h" ] || \
	  { echo "make venv: needs the Python headers; on Debian: apt-get install python3-dev"; exit 1; }
	@echo "installing requirements/test.txt into .venv"
	@$(BIN)/python -m pip install --no-compile -r requirements/test.txt | sed -u '/^Requirement already/d'
	@rm -f .venv/.installed-*
	@touch $@

build: build/built  ## compile the extension and install it in place
	@:

# What to build for: the environment and this machine say so. The file is as old as its answer.
build/target: $(VENV_STAMP) FORCE
	@mkdir -p build
	@$(BIN)/python setup.py -q target > $@.new
	@if cmp -s $@.new $@; then rm $@.new; else mv $@.new $@; fi

# Compiled first, for pip hides the progress.
build/built: build/target $(VENV_STAMP) $(NATIVE) setup.py pyproject.toml
	@$(BIN)/python setup.py -q build_ext --inplace
	@$(BIN)/python -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

FORCE:

cuda-objects: $(VENV_STAMP)  ## compile the CUDA code alone, link nothing; FORCE_CUDA=1 needs no GPU
	@$(BIN)/python setup.py -q cuda_objects

test: export OMP_NUM_THREADS ?= $(THREADS)
test: build lint  ## lint, then run the tests (PYTEST_ARGS="-q -k name")
	@$(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS)

# What torch, oneDNN, MKL and fastdense then find; one thread, where sums have one order, and two. What torch.compile
# kept for the processor as it is does not compile there.
AVX2 := ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 FASTDENSE_SIMD=avx2
AVX2 += TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-avx2
SSE := ATEN_CPU_CAPABILITY=default ONEDNN_MAX_CPU_ISA=SSE41 MKL_ENABLE_INSTRUCTIONS=SSE4_2 FASTDENSE_SIMD=baseline
SSE += TORCHINDUCTOR_CACHE_DIR=$(CURDIR)/build/inductor-sse

test-isa: build  ## run the tests as on processors without AVX-512 and without AVX2
	@failed=; for threads in 1 2; do for isa in "$(AVX2)" "$(SSE)"; do \
	  echo "OMP_NUM_THREADS=$$threads $$isa"; \
	  env $$isa OMP_NUM_THREADS=$$threads $(BIN)/python -m pytest $(PARALLEL) $(PYTEST_ARGS) || failed=1; \
	done; done; [ -z "$$failed" ]

fuzz: build  ## try operators and models on thousands of random cases, about half an hour
	@HYPOTHESIS_PROFILE=fuzz $(BIN)/python -m pytest $(PYTEST_ARGS) tests/test_random_cases.py tests/test_random_models.py

soak: build  ## train small networks for a thousand steps; memory must not grow
	@$(BIN)/python -m benchmarks.soak

# A copy of the tree, so that the normal build stays what it is. Planted mistakes may well leave their memory; Python
# leaks at its end, a process must have the sanitizer's library before all others, and its last words go to stderr.
sanitize: export SANITIZE := address,undefined
sanitize: export ASAN_OPTIONS ?= detect_leaks=0:protect_shadow_gap=0
sanitize: export UBSAN_OPTIONS ?= halt_on_error=1:print_stacktrace=1
sanitize: $(VENV_STAMP)  ## run the tests on a CPU build with address and undefined behaviour sanitizers
	@mkdir -p $(SANITIZED)
	@find $(SANITIZED) -mindepth 1 -maxdepth 1 -not -name build -exec rm -rf {} +
	@tar -c --exclude=./build --exclude=./.git --exclude=./.venv --exclude='*.so' --exclude=__pycache__ . | tar -x -C $(SANITIZED)
	@cd $(SANITIZED) && FORCE_CPU=1 $(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	@cd $(SANITIZED) && LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libstdc++.so)" \
	  $(CURDIR)/$(BIN)/python -m pytest -p no:cacheprovider --capture=sys -k 'not planted' $(PYTEST_ARGS)

mutants: build  ## plant mistakes in the native code; the tests must notice each
	@$(BIN)/python -m tests.plant_mutants

lint: $(VENV_STAMP)  ## check style and types
	@$(BIN)/ruff check --quiet .
	@$(BIN)/ruff format --check --quiet .
	@$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	@$(BIN)/mypy --no-error-summary

format: $(VENV_STAMP)  ## rewrite the sources in the project's style
	@$(BIN)/ruff check --fix --quiet .
	@$(BIN)/ruff format --quiet .
	@$(BIN)/clang-format -i $(FORMATTED)

demo: build  ## run the demonstration
	@$(BIN)/python -m fastdense demo

bench: build  ## run the benchmarks
	@$(BIN)/python -m pytest benchmarks --benchmark-only

sdist: $(VENV_STAMP)  ## pack the source distribution into dist/
	@$(BIN)/python -m build --sdist --no-isolation

docs: build  ## build the documentation into site/
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict
	@echo "built site/index.html; its search needs a server: $(BIN)/python -m http.server --directory site"

# WHEELS="python3.12 --torch torch==2.13.0" chooses interpreters and torch.
wheels: sdist  ## build a wheel for each Python found, try each in a clean environment
	@$(BIN)/python release/wheels.py "$$(ls -t dist/fastdense-*.tar.gz | head -n 1)" $(WHEELS)

clean:  ## remove builds and caches, keep .venv
	@rm -rf build dist site *.egg-info fastdense/*.so fastdense/_C*.json .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	@find . -name __pycache__ -not -path './.venv/*' -prune -exec rm -rf {} +
