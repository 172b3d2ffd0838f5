# make demo   train, convert and evaluate a network on real data     make test   run the tests
# make check  format, lint and types                                 make bench  compare latencies
# make cuda-report  registers, spills and instructions of the CUDA kernels (where nvcc was found)
# Each sets up what it needs in .venv; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml CMakeLists.txt README.md $(shell find csrc qcfs_fast -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inc' -o -name '*.py')
PYTHON_FILES := $(wildcard qcfs_fast tests benchmarks examples tools setup.py)
CXX_FILES := $(shell find csrc tests -name '*.cpp' -o -name '*.cu' -o -name '*.h')

.PHONY: demo test check format bench cuda-report clean

# Nothing below starts python in this folder: the package in use must be the installed one, with its kernels, and
# not the sources beside it.
demo: $(VENV)/.installed
	cd $(VENV) && bin/python -m qcfs_fast demo --output ../demo-output

test: $(VENV)/.installed $(VENV)/.tools
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pytest tests $(PYTEST_ARGS)

bench: $(VENV)/.installed $(VENV)/.tools
	$(VENV)/bin/pytest benchmarks --benchmark-only $(PYTEST_ARGS)

cuda-report: $(VENV)/.installed $(VENV)/.tools
	cd $(VENV) && bin/python ../tools/cuda_report.py --output cuda-report.json

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
