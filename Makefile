# make demo         decode a real model on this machine; MODEL=<Hugging Face id, folder or GGUF file> another one
# make test         lint and the test suite
# make bench        the benchmarks
# make format       what lint asks for, where a tool can do it
# make lock         requirements/*.txt anew, with today's releases
# make test-newest  the suite with the newest release of everything, whatever pyproject.toml and the locks say
# make test-oldest  the suite with the oldest releases that pyproject.toml allows; PYTHON=python3.11 if python3 is newer
# Each sets up its virtual environment first, if needed. PYTHON=python3.12 chooses the interpreter of a new one; TEST_JOBS=4 runs
# the tests in four processes.

PYTHON ?= python3
TEST_JOBS ?= 2
BIN := .venv/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
# Packages come without bytecode (tools/setup_venv.sh): what Python compiles is kept, also where the environment says otherwise.
export PYTHONDONTWRITEBYTECODE :=

NVCC := $(shell command -v nvcc || ls /usr/local/cuda/bin/nvcc 2>/dev/null)
CPP_SOURCES := $(shell find csrc python -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: demo test test-newest test-oldest bench lint format lock clean

demo: .venv/built
	$(BIN)/python -m sirius_ext demo $(if $(MODEL),--model "$(MODEL)")

# The tests run the CUDA kernels on the CPU; where there is an nvcc, it builds them too.
test test-newest test-oldest: export SIRIUS_SIMT := ON
test test-newest test-oldest: export SIRIUS_CUDA := $(or $(SIRIUS_CUDA),$(if $(NVCC),ON,AUTO))
test: lint .venv/built-tests
	$(BIN)/python -m pytest -q -n $(TEST_JOBS) --dist worksteal

# The extension is built in place by these tools, and so by .venv's again when it is next needed there.
test-newest test-oldest: test-%:
	PYTHON="$(PYTHON)" tools/setup_venv.sh $*
	rm -f .venv/built .venv/built-tests
	export PATH="$(CURDIR)/.venv-$*/bin:$$PATH" PYTHONPATH="$(CURDIR)"; python setup.py -q build_ext --inplace && \
	  python -m pytest -q -n $(TEST_JOBS) --dist worksteal

bench: .venv/bench .venv/built
	$(BIN)/python bench/bench_ops.py
	$(BIN)/python bench/decode.py

lint: .venv/dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CPP_SOURCES)
	$(BIN)/mypy

format: .venv/dev
	$(BIN)/ruff check --fix --exit-zero .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP_SOURCES)

clean:
	rm -rf .venv .venv-newest .venv-oldest build dist *.egg-info sirius_ext/*.so .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

lock:
	PYTHON="$(PYTHON)" tools/lock.sh

.venv/demo: requirements/demo.txt requirements/torch.txt tools/setup_venv.sh
	PYTHON="$(PYTHON)" tools/setup_venv.sh demo
	touch $@

# These hold all that .venv/demo does.
.venv/dev .venv/bench: .venv/%: requirements/%.txt requirements/demo.txt requirements/torch.txt tools/setup_venv.sh
	PYTHON="$(PYTHON)" tools/setup_venv.sh $*
	touch .venv/demo $@

# The folders are listed too: their times change when a file is removed.
BUILT_FROM := CMakeLists.txt csrc/simt/CMakeLists.txt setup.py $(CPP_SOURCES) $(shell find csrc python -type d)

INSTALL := $(BIN)/pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .

.venv/built: .venv/demo pyproject.toml $(BUILT_FROM)
	@echo "building sirius_ext"
	$(INSTALL)
	touch $@

# Holds all that .venv/built does.
.venv/built-tests: .venv/dev pyproject.toml $(BUILT_FROM)
	@echo "building sirius_ext, and the CUDA kernels for the tests"
	$(INSTALL)
	touch .venv/built $@
