# make demo   train, convert and evaluate a network on real data     make test   run the tests
# make check  format, lint and types                                 make bench  compare latencies
# make test-triton VERSION=3.3.0   its tests with that Triton in place of the pinned one
# Each sets up what it needs in .venv; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml CMakeLists.txt README.md $(shell find csrc qcfs_fast -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inc' -o -name '*.py')
PYTHON_FILES := $(wildcard qcfs_fast tests benchmarks examples tools setup.py)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test test-triton check format bench clean

# Nothing below starts python in this folder: the package in use must be the installed one, with its kernels, and
# not the sources beside it.
demo: $(VENV)/.installed
	cd $(VENV) && bin/python -m qcfs_fast demo --output ../demo-output

test: $(VENV)/.installed $(VENV)/.tools
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pytest tests -n 2 --dist loadfile $(PYTEST_ARGS)

# Laid over the environment for this one run: the packages in it stay as they are. The interpreter of early releases
# makes scalars of arrays in a way that NumPy 2.4 ended.
test-triton: $(VENV)/.installed $(VENV)/.tools
	$(if $(VERSION),,$(error say which: make test-triton VERSION=3.3.0))
	test -d $(VENV)/triton-$(VERSION) || $(PIP) install --no-deps --target $(VENV)/triton-$(VERSION) triton==$(VERSION) 'numpy<2.4'
	PYTHONPATH="$(CURDIR)/$(VENV)/triton-$(VERSION)" $(PY) -P -c "import triton; assert triton.__version__ == '$(VERSION)', triton.__version__"
	PYTHONPATH="$(CURDIR)/$(VENV)/triton-$(VERSION)" TEST_TRITON_THOROUGH=1 $(VENV)/bin/pytest -n 2 tests/test_triton.py tests/test_triton_compile.py $(PYTEST_ARGS)

bench: $(VENV)/.installed $(VENV)/.tools
	$(VENV)/bin/pytest benchmarks --benchmark-only $(PYTEST_ARGS)

check: $(VENV)/.tools
	$(VENV)/bin/ruff format --check $(PYTHON_FILES)
	$(VENV)/bin/ruff check $(PYTHON_FILES)
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(CXX_FILES)

format: $(VENV)/.tools
	$(VENV)/bin/ruff format $(PYTHON_FILES)
	$(VENV)/bin/ruff check --fix $(PYTHON_FILES)
	$(VENV)/bin/clang-format -i $(CXX_FILES)

clean:
	rm -rf $(VENV) build *.egg-info

# torch first and pinned: left to a range, pip takes the newest build with several GB of CUDA packages.
$(VENV)/.torch: constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch
	$(PIP) install -c constraints.txt --no-deps torchvision
	touch $@

# An isolated build, as users run it: the environment it builds in has no torch.
$(VENV)/.installed: $(VENV)/.torch $(SOURCES)
	$(PIP) install -c constraints.txt '.[demo]'
	touch $@

$(VENV)/.tools: $(VENV)/.torch
	$(PIP) install -c constraints.txt pytest pytest-benchmark pytest-xdist hypothesis pillow triton ruff mypy clang-format cmake setuptools
	touch $@
