# make demo   train, convert and evaluate a network on real data     make test   the tests (10 minutes)
# make check  format, lint and types, without a change               make quick  those of the inner loop (2 minutes)
# make fuzz   odd calls, files and models, ten minutes of each: SECONDS or CASES, KINDS and SEED say otherwise; SANITIZE=1
#             builds the native module with the sanitizers of addresses and of undefined behaviour, for g++
# make fuzz-native   libFuzzer on files that libqcfs reads, ten minutes or SECONDS, under the same sanitizers, by clang++
# make soak   an hour of networks made, called in many ways and dropped: memory must not grow; MINUTES says otherwise
# make format rewrite files as `make check` wants them               make bench  compare latencies (10 minutes)
# make test-slow   what is left: builds under sanitizers, for arm64 and of CUDA; emulated and interpreted GPU kernels;
#             trainings and processes that take more than ten seconds
# make readme-figures  measure what the README shows, and write its table and pictures (half an hour)
# make study-latency   time the network that ships, and write the README's three numbers (five minutes)
# make test-triton VERSION=3.3.0   its tests with that Triton in place of the pinned one
# make test-arm64  the CPU kernels for arm64, cross-compiled and emulated (Debian: g++-aarch64-linux-gnu qemu-user)
# make docs   the documentation as a site, in site/              make gallery  run the notebooks of docs/gallery, keep outputs
# make cuda-report  registers, spills and instructions of the CUDA kernels (where nvcc was found)
# make gpu    on a machine with a GPU, nvcc and torch: builds, tests, sanitizers, benchmark and profile in ten minutes, with
#             what PYTHON has and no network; GPU_ARGS="--device cpu" tries it out (tools/measure_gpu.py)
# make lock   hashes of the versions in constraints.txt, into requirements/
# Each sets up what it needs in .venv; PYTHON chooses the interpreter.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml MANIFEST.in CMakeLists.txt README.md $(shell find csrc qcfs_fast -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.inc' -o -name '*.c' -o -name '*.py' -o -name 'py.typed')
PYTHON_FILES := $(wildcard qcfs_fast tests benchmarks examples tools setup.py)
CXX_FILES := $(shell find csrc tests qcfs_fast -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.c')

.PHONY: demo docs gallery test test-slow quick fuzz fuzz-native soak test-triton test-arm64 check format bench readme-figures figures-write study-latency cuda-report gpu lock clean

# Nothing below starts python in this folder: the package in use must be the installed one, with its kernels, and
# not the sources beside it.
demo: $(VENV)/.installed
	cd $(VENV) && bin/python -m qcfs_fast demo --output ../demo-output

TESTS := PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pytest tests -n 2 --dist loadfile --no-loadscope-reorder
SLOW := slow and (long or native or triton or cuda)
test: $(VENV)/.installed $(VENV)/.tools
	$(TESTS) -m 'not ($(SLOW))' $(PYTEST_ARGS)

test-slow: $(VENV)/.installed $(VENV)/.tools
	$(TESTS) -m '$(SLOW)' $(PYTEST_ARGS)

quick: $(VENV)/.installed $(VENV)/.tools
	$(TESTS) -m 'not slow' $(PYTEST_ARGS)

KINDS := operators odd_integers files models
ifdef SANITIZE
# Emulated tiles would take nearly all of the time: `make test-slow` has them. Leaks cannot be told in an interpreter.
FUZZ_NEEDS := $(VENV)/sanitized/.installed
FUZZ_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so.6)" \
    PYTHONPATH=../$(VENV)/sanitized QCFS_FAST_MAX_ISA=avx512vnni UBSAN_OPTIONS=print_stacktrace=1 \
    ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1:max_allocation_size_mb=6000:malloc_context_size=2:quarantine_size_mb=16
endif
fuzz: $(VENV)/.installed $(VENV)/.tools $(FUZZ_NEEDS)
	cd tests && $(FUZZ_ENV) ../$(PY) -W ignore -m fuzz $(KINDS) $(if $(CASES),--cases $(CASES),--seconds $(or $(SECONDS),600)) --seed $(or $(SEED),0)

# Portable kernels alone: the reader is what is asked. Debian: clang, libclang-rt-dev.
LIBFUZZER := $(VENV)/libfuzzer
fuzz-native: $(VENV)/.tools
	export PATH="$(CURDIR)/$(VENV)/bin:$$PATH" && \
	    cmake -S . -B $(LIBFUZZER) -DCMAKE_C_COMPILER=clang -DCMAKE_CXX_COMPILER=clang++ -DQCFS_FAST_CUDA=off \
	    -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=portable -DQCFS_FAST_LIBQCFS=ON \
	    -DQCFS_FAST_SANITIZE=fuzzer,address,undefined && cmake --build $(LIBFUZZER) --target hostile_files
	mkdir -p $(LIBFUZZER)/found
	cd $(LIBFUZZER) && ./hostile_files -max_total_time=$(or $(SECONDS),600) -timeout=60 found $(CURDIR)/tests/native/corpus

soak: $(VENV)/.installed $(VENV)/.tools
	cd tests && ../$(PY) -W ignore soak.py --minutes $(or $(MINUTES),60)

# Laid over the environment for this one run: the packages in it stay as they are. The interpreter of early releases
# makes scalars of arrays in a way that NumPy 2.4 ended.
test-triton: $(VENV)/.installed $(VENV)/.tools
	$(if $(VERSION),,$(error say which: make test-triton VERSION=3.3.0))
	test -d $(VENV)/triton-$(VERSION) || $(PIP) install --no-deps --target $(VENV)/triton-$(VERSION) triton==$(VERSION) 'numpy<2.4'
	PYTHONPATH="$(CURDIR)/$(VENV)/triton-$(VERSION)" $(PY) -P -c "import triton; assert triton.__version__ == '$(VERSION)', triton.__version__"
	PYTHONPATH="$(CURDIR)/$(VENV)/triton-$(VERSION)" TEST_TRITON_THOROUGH=1 $(VENV)/bin/pytest -n 2 tests/test_triton.py tests/test_triton_compile.py $(PYTEST_ARGS)

test-arm64: $(VENV)/.installed $(VENV)/.tools
	command -v aarch64-linux-gnu-g++ && command -v qemu-aarch64
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" $(VENV)/bin/pytest tests/test_native.py -k arm64

bench: $(VENV)/.installed $(VENV)/.tools $(VENV)/.peers
	$(VENV)/bin/pytest benchmarks --benchmark-only $(PYTEST_ARGS)

# In parts of less than ten minutes each, all added to one file: `make figures-resnet18_224-1 figures-write` measures one
# part again.
RESULTS := docs/benchmark-results.json
FIGURES := resnet18_224-1 resnet18_224-8 resnet18_224-32 vgg16_bn_32-1 vgg16_bn_32-8 vgg16_bn_32-32 vgg16_bn_224-1 \
    $(foreach network,resnet20_32 resnet18_32 vgg16_32,$(network)-1 $(network)-8 $(network)-128) \
    demo_8-1 lenet_32-1 mlp_28-1 threads layers
readme-figures:
	rm -f $(RESULTS)
	$(MAKE) $(addprefix figures-,$(FIGURES))
	$(MAKE) figures-write

figures-write: $(VENV)/.installed $(VENV)/.tools
	$(VENV)/bin/qcfs-fast compare $(RESULTS) --plots docs/images --format png --readme README.md

figures-layers: $(VENV)/.installed $(VENV)/.tools $(VENV)/.peers
	$(VENV)/bin/qcfs-fast bench --layers --output $(RESULTS)

# The others are measured on the threads that torch takes, all cores'.
figures-threads: $(VENV)/.installed $(VENV)/.tools $(VENV)/.peers
	$(VENV)/bin/qcfs-fast bench --networks "resnet20 32" "resnet18 224" "demo 8" "lenet 32" "mlp 28" --batches 1 \
	    --steps 4 --threads 1 --output $(RESULTS)

figures-%: $(VENV)/.installed $(VENV)/.tools $(VENV)/.peers
	$(VENV)/bin/qcfs-fast bench --networks "$$(echo $* | sed 's/_\([0-9]*\)-.*/ \1/')" \
	    --batches $(lastword $(subst -, ,$*)) --steps $(if $(filter %-1,$*),1 2 4 8 16,4) --output $(RESULTS)

# Times the network that ships beside its ANN and the loop over T, in turns. Accuracies are the same on every machine and
# stay as they are in docs/studies.
study-latency: $(VENV)/.installed $(VENV)/.tools $(VENV)/.peers
	mkdir -p build/study && cp docs/studies/shipped.json build/study/results.json
	$(VENV)/bin/qcfs-fast study qcfs_fast/study/fashion/model.safetensors fashion-mnist --neuron plain offset sum \
	    --steps 1 2 4 8 --latency 1 --remeasure --output build/study
	cp build/study/results.json docs/studies/shipped.json
	$(PY) -P tools/write_accuracy.py shipped

docs: $(VENV)/.torch requirements/docs.txt
	$(PIP) $(LOCKED) -r requirements/docs.txt
	$(VENV)/bin/mkdocs build --strict

# What the notebooks write stays beside their copies.
gallery: $(VENV)/.installed requirements/docs.txt
	$(PIP) $(LOCKED) -r requirements/docs.txt
	rm -rf build/gallery && mkdir -p build && cp -r docs/gallery build/gallery
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" jupyter nbconvert --to notebook --output-dir docs/gallery \
	    --execute --ExecutePreprocessor.record_timing=False build/gallery/*.ipynb

cuda-report: $(VENV)/.installed $(VENV)/.tools
	cd $(VENV) && bin/python ../tools/cuda_report.py --output cuda-report.json

gpu:
	$(PYTHON) tools/measure_gpu.py $(GPU_ARGS)

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

# Nothing is installed whose hash requirements/ lacks.
LOCKED = install --no-deps --require-hashes

# torch first and pinned: left to a range, pip takes the newest build with several GB of CUDA packages. The second of its
# lines finds something to do only for a build that needs NVIDIA's libraries: it pins them itself.
$(VENV)/.torch: requirements/build.txt requirements/torch.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) $(LOCKED) -r requirements/build.txt -r requirements/torch.txt
	$(PIP) install -c constraints.txt torch
	touch $@

BUILD_PIP := $(VENV)/build/bin/python -m pip --quiet --disable-pip-version-check
$(VENV)/build/.installed: $(VENV)/.torch
	$(PYTHON) -m venv $(VENV)/build
	$(BUILD_PIP) $(LOCKED) -r requirements/build.txt
	touch $@

# As users get it: the source distribution, from it the wheel in an environment without torch, and that is installed.
# tests/test_packaging.py looks into both. pip takes a wheel of the version that is installed only by force.
DIST := $(VENV)/dist
$(VENV)/.installed: $(VENV)/build/.installed requirements/demo.txt $(SOURCES)
	rm -rf $(DIST)
	$(PY) -c "import setuptools.build_meta as b; b.build_sdist('$(DIST)')" >/dev/null
	PATH="$(CURDIR)/$(VENV)/build/bin:$$PATH" $(BUILD_PIP) wheel --no-deps --no-build-isolation --check-build-dependencies \
	    --wheel-dir $(DIST) $(DIST)/*.tar.gz
	$(PIP) $(LOCKED) -r requirements/demo.txt
	$(PIP) install --no-deps --force-reinstall $(DIST)/*.whl
	$(PIP) install --no-index "$$(echo $(DIST)/*.whl)[demo]"
	touch $@

$(VENV)/sanitized/.installed: $(VENV)/.tools $(SOURCES)
	PATH="$(CURDIR)/$(VENV)/bin:$$PATH" CMAKE_ARGS=-DQCFS_FAST_SANITIZE=address,undefined QCFS_FAST_CUDA=off \
	    $(PIP) install --no-deps --no-build-isolation --upgrade --target $(VENV)/sanitized .
	touch $@

# Their own requirements (torchaudio, tensorboard, ...) are not needed for the neurons measured here.
$(VENV)/.peers: $(VENV)/.torch requirements/demo.txt requirements/peers.txt
	$(PIP) $(LOCKED) -r requirements/demo.txt -r requirements/peers.txt
	touch $@

$(VENV)/.tools: $(VENV)/.torch requirements/demo.txt requirements/tools.txt
	$(PIP) $(LOCKED) -r requirements/demo.txt -r requirements/tools.txt
	touch $@

# Hashes of the index at hand, for every platform. PyTorch's CPU build (Python 3.11, Linux, x86_64) lies on its own index.
# Pages and notebooks take what is newest when this runs.
UV_COMPILE := $(VENV)/bin/uv pip compile - -c constraints.txt --universal --python-version 3.11 --generate-hashes \
    --no-annotate --custom-compile-command 'make lock' --quiet --output-file
CPU_TORCH := --hash=sha256:6746dbcbeb526eb61330b76b41ff1b4eb848951103a892eeb080dfa2b264667b
lock:
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install uv==0.13.9
	for step in build torch demo tools peers; do \
	    sed -n "/^# $$step:/,/^#/p" constraints.txt | $(UV_COMPILE) requirements/$$step.txt --no-deps || exit 1; done
	sed -i.bak 's/^torch==.*/&\n    $(CPU_TORCH) \\/' requirements/torch.txt && rm requirements/torch.txt.bak
	printf '%s\n' mkdocs-material 'mkdocstrings[python]' mkdocs-jupyter nbconvert ipykernel | $(UV_COMPILE) requirements/docs.txt
