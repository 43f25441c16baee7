# make demo    decode a real model on this machine
# make test    lint and the test suite
# make bench   the benchmarks
# make format  what lint asks for, where a tool can do it
# Each sets up .venv first, if needed. PYTHON=python3.12 chooses the interpreter of a new .venv; TEST_JOBS=4 runs the tests in
# four processes.

PYTHON ?= python3
TEST_JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)

NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
CPP_SOURCES := $(shell find csrc python -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test bench lint format clean

demo: .venv/built
	$(BIN)/python -m sirius_ext demo

# The tests run the CUDA kernels on the CPU; where there is an nvcc, it builds them too.
test: export SIRIUS_SIMT := ON
test: export SIRIUS_CUDA := $(or $(SIRIUS_CUDA),$(if $(NVCC),ON,AUTO))
test: lint .venv/built-tests
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist worksteal

bench: .venv/bench .venv/built
	$(BIN)/python bench/bench_ops.py
	$(BIN)/python bench/decode.py

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)

format: .venv/ready
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf .venv build dist *.egg-info sirius_ext/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.venv/ready: pyproject.toml tools/setup_venv.sh
	PYTHON="$(PYTHON)" tools/setup_venv.sh dev
	touch $@

.venv/bench: .venv/ready
	tools/setup_venv.sh dev,bench
	touch $@

# The folders are listed too: their times change when a file is removed.
BUILT_FROM := CMakeLists.txt csrc/simt/CMakeLists.txt setup.py $(CPP_SOURCES) $(shell find csrc python -type d)

.venv/built: .venv/ready $(BUILT_FROM)
	$(BIN)/python setup.py -q build_ext --inplace
	touch $@

# Holds all that .venv/built does.
.venv/built-tests: .venv/ready $(BUILT_FROM)
	$(BIN)/python setup.py -q build_ext --inplace
	touch .venv/built $@
