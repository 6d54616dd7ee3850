# `make test VENV=/path/to/env` works in an environment of your own, with a CUDA torch in it, say: what is installed
# there stays, and only what is missing comes, at the version in constraints.txt.
PYTHON ?= python3
VENV ?= .venv

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
CPP := $(wildcard csrc/*.cpp csrc/*.hpp)
# Those of single kernels need a GPU.
KERNEL_BENCHES := $(addprefix benchmarks/bench_,attention.py group_norm.py pointwise.py)
BENCHES := $(filter-out $(if $(wildcard /dev/nvidiactl),,$(KERNEL_BENCHES)),$(wildcard benchmarks/bench_*.py benchmarks/end_to_end.py))

# Each process that starts would compile the package anew.
unexport PYTHONDONTWRITEBYTECODE

# $(call tests,WHICH): three workers for two cores, between which tests/conftest.py shares out the tests; beside them,
# where Triton interprets, a process that gives way.
define tests
mkdir -p build
OMP_NUM_THREADS=1 nice $(BIN)/pytest -m "$(1)" tests/interpreter > build/interpreter.txt 2>&1 & beside=$$!; status=0; \
$(BIN)/pytest -n 3 -m "$(1)" || status=$$?; \
wait $$beside || status=$$?; cat build/interpreter.txt; exit $$status
endef

.PHONY: install demo test test-ci test-all tables lint bench clean

# What builds the package comes first, since it is built in the environment itself: an isolated build would fetch its own.
define pip_install
$(PIP) install -c $(1) 'setuptools>=77' 'pybind11>=2.13' 'cmake>=3.20' ninja
$(PIP) install -c $(1) --no-build-isolation -e '.[test]'
endef

ifeq ($(VENV),.venv)
install: .venv/.installed

.venv/.installed: pyproject.toml setup.py constraints.txt CMakeLists.txt $(CPP) | .venv
	$(call pip_install,constraints.txt)
	touch $@
else
# Each time anew, since another checkout may have been installed there meanwhile.
install: | $(VENV)
	mkdir -p build
	$(PIP) list --format=freeze | sed 's/==.*//; s/.*/^&==/' | tr 'A-Z_.' 'a-z--' > build/installed.txt
	grep -vf build/installed.txt constraints.txt > build/missing.txt
	$(call pip_install,build/missing.txt)
endif

$(VENV):
	$(PYTHON) -m venv $@ || { rm -rf $@; exit 1; }

demo: install
	$(BIN)/asyncdiff-fast demo

test: install
	$(call tests,not slow and not exhaustive)

# What every change must pass.
test-ci: install
	$(call tests,not exhaustive)

test-all: install
	$(call tests,)

# The tables of docs/ whose cells are tests.
tables: install
	ASYNCDIFF_FAST_TABLES=1 $(BIN)/pytest -q -m "not slow" tests/test_compatibility.py tests/test_coverage.py

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	! grep -lE 'pybind11|Python\.h' $(filter-out csrc/bindings.cpp,$(CPP))
	$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

bench: install
	set -e; for bench in $(BENCHES); do $(BIN)/python $$bench; done

# The environment stays.
clean:
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -path ./.venv -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
