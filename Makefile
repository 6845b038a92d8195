# make demo    compress the bundled teacher, compare, generate: the newcomer's first command
# make test    all tests that need neither a GPU nor much time (under 15 minutes on 2 cores)
# make lint    ruff and mypy
# make wheel   build a wheel into dist/
# make clean   remove everything that make made, the virtual environment included
#
# Everything happens in .venv, made on first use with $(PYTHON), which must be 3.11 or newer:
#     make demo PYTHON=python3.12
# PIP_FLAGS goes to every `pip install`, for example to choose where packages come from.

PYTHON ?= python3
PIP_FLAGS ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
INSTALL := $(PIP) install --quiet $(PIP_FLAGS) -c constraints.txt
# A change in any of these means that the C++ core or the dependencies must be installed anew.
BUILD_INPUTS := pyproject.toml constraints.txt CMakeLists.txt \
	$(shell find src/slimba/kernels -name '*.cpp' -o -name '*.hpp' -o -name '*.h' -o -name CMakeLists.txt)
DEMO_OUT ?= slimba-demo

.PHONY: demo test lint wheel venv clean

demo: $(VENV)/installed-demo
	$(BIN)/slimba demo --out $(DEMO_OUT)

# The parallel workers share the cores, so each computes with one thread.
test: $(VENV)/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto -m "not slow and not gpu"

lint: $(VENV)/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

wheel: $(VENV)/created
	$(PIP) wheel --quiet $(PIP_FLAGS) --no-deps --wheel-dir dist .
	@ls -l dist/*.whl

venv: $(VENV)/installed-dev

$(VENV)/created:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "$(PYTHON) is older than 3.11; run make with PYTHON=/path/to/a/newer/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

# Editable: Python sources are used where they are, the C++ core is compiled into the environment.
$(VENV)/installed-demo: $(VENV)/created $(BUILD_INPUTS)
	$(INSTALL) -e '.[train]'
	@touch $@

$(VENV)/installed-dev: $(VENV)/created $(BUILD_INPUTS)
	$(INSTALL) -e '.[dev]'
	@touch $@ $(VENV)/installed-demo

clean:
	rm -rf $(VENV) build dist slimba-demo .pytest_cache .ruff_cache .mypy_cache
	find src tests scripts benchmarks -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
