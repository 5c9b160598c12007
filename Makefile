# fastnn: `make demo` sets everything up and runs the main job, `make test` sets up and runs the tests.
# Needs Python 3.11, gcc and cmake. Everything is installed into .venv; a second run only does what changed.

PYTHON      ?= python3.11
VENV        ?= .venv
TORCH       ?= torch==2.13.0
# Formatting depends on the formatter's version, so these two are pinned.
LINTERS     := ruff==0.17.5 clang-format==23.1.5

BIN     := $(VENV)/bin
TORCH_STAMP := $(VENV)/stamps/$(subst ==,-,$(TORCH))
PIP     := $(BIN)/python -m pip --disable-pip-version-check --quiet
EXTRAS  := test
SOURCES := pyproject.toml CMakeLists.txt $(shell find src -type f)
CPP     := $(shell find src tests -name '*.cpp' -o -name '*.hpp' -o -name '*.inl' -o -name '*.cu' -o -name '*.cuh')
RUFF    := python tests bench examples

.PHONY: demo test build emulation cuda gpu lint format bench sanitize clean

demo: build
	$(BIN)/python -m fastnn demo

test: build emulation $(if $(shell command -v nvcc),cuda)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest $(PYTEST)
# Two tests at a time: each uses torch's threads for some of its time only. Threads that wait leave the core to the other.
PYTEST ?= --numprocesses 2

build: $(VENV)/stamps/fastnn $(VENV)/stamps/bytecode

# The CUDA kernels with the CPU as the device, for tests/cuda/, and what tests the emulation itself.
emulation: $(VENV)/stamps/fastnn
	cmake -S src/cuda/host_emulation -B build/emulation -G Ninja $(CMAKE_QUIET) $(FOR_PYTHON)
	cmake --build build/emulation $(NINJA_QUIET)

# The CUDA kernels for GPUs, of which tests read the machine code, that of sm_80 and sm_90a: without that of sm_100, from the
# same PTX, it takes four fifths of the time. (`make build` has all, where FASTNN_CUDA says so.)
cuda: $(VENV)/stamps/fastnn
	cmake -S . -B build/cuda -G Ninja $(CMAKE_QUIET) -DFASTNN_CUDA=ON -DFASTNN_CUDA_SM_100=OFF $(FOR_PYTHON)
	cmake --build build/cuda --target _cuda $(NINJA_QUIET)

# On a machine with a GPU, with the torch that its Python has and nothing from a network: builds, runs the tests of the GPU's
# kernels there, some of them under compute-sanitizer, and times them. All is run, whatever fails; each part has its time.
GPU_PYTHON ?= python3
GPU        := build/gpu
gpu:
	@$(GPU_PYTHON) -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else 'make gpu: torch finds no GPU')"
	$(GPU_PYTHON) -m venv --system-site-packages $(GPU)
	$(GPU)/bin/python -m pip --disable-pip-version-check --quiet install --no-index --no-deps --no-build-isolation \
	    --editable . -C cmake.define.FASTNN_CUDA=ON
	$(GPU)/bin/python -m fastnn info
	status=0; \
	timeout 150 $(GPU)/bin/python -m pytest -q -k "cuda or triton or hopper" $(GPU_TESTS) || status=1; \
	for tool in memcheck racecheck synccheck; do \
	    timeout 40 compute-sanitizer --tool $$tool --error-exitcode 1 \
	        $(GPU)/bin/python -m pytest -q -p no:cacheprovider $(SANITIZED_ON_GPU) || status=1; \
	done; \
	timeout 150 $(GPU)/bin/python bench/gpu.py || status=1; \
	exit $$status
GPU_TESTS        ?= tests/cuda tests/triton_kernels tests/ops \
    $(shell $(GPU_PYTHON) -c "import sklearn" 2>/dev/null && echo tests/tree/test_cuda_search.py)
SANITIZED_ON_GPU ?= tests/cuda -k "edges or same_bits or order_of_threads"

FOR_PYTHON   = -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir) \
    -DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja)
CMAKE_QUIET := --log-level=WARNING
NINJA_QUIET := -- --quiet

lint: $(VENV)/stamps/lint
	$(BIN)/ruff check $(RUFF)
	$(BIN)/ruff format --check $(RUFF)
	@$(if $(CPP),$(BIN)/clang-format --dry-run -Werror $(CPP))

format: $(VENV)/stamps/lint
	$(BIN)/ruff check --fix --quiet $(RUFF)
	$(BIN)/ruff format --quiet $(RUFF)
	@$(if $(CPP),$(BIN)/clang-format -i $(CPP))

# Every row of the speed table, and the peak memory of forwards, written to bench/results/; and the tables in README.md
# made anew from them.
bench: build $(VENV)/stamps/bench
	$(BIN)/python bench/speed.py
	$(BIN)/python bench/memory.py
	$(BIN)/python bench/readme.py

# The kernels' tests and the hypothesis tests of bad input, under AddressSanitizer and UndefinedBehaviorSanitizer.
# The instrumented extension lives in build/sanitize/site beside links to the Python sources. `-S` keeps the
# environment's .pth files out, whose editable-install hook would import the ordinary build instead.
SANITIZE := build/sanitize
SITE      = $(abspath $(SANITIZE)/site):$(shell $(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
sanitize: build
	cmake -S . -B $(SANITIZE) -DCMAKE_BUILD_TYPE=RelWithDebInfo -DFASTNN_SANITIZE=ON \
	    -DPython_EXECUTABLE=$(abspath $(BIN)/python) -Dpybind11_DIR=$$($(BIN)/python -m pybind11 --cmakedir)
	cmake --build $(SANITIZE) --parallel 2
	rm -rf $(SANITIZE)/site
	mkdir -p $(SANITIZE)/site/fastnn
	ln -s $(abspath python/fastnn)/* $(SANITIZE)/site/fastnn/
	cp $$(find $(SANITIZE) -name '_cpu*.so' -not -path '*/site/*') $(SANITIZE)/site/fastnn/
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	    ASAN_OPTIONS=detect_leaks=0:abort_on_error=1 UBSAN_OPTIONS=print_stacktrace=1:halt_on_error=1 \
	    PYTHONPATH=$(SITE) $(BIN)/python -S -m pytest -p no:cacheprovider $(SANITIZE_TESTS)
SANITIZE_TESTS ?= tests/kernels tests/model/test_fuse_chain.py tests/ops/test_errors.py tests/tree/test_binning.py \
    tests/tree/test_decision_tree.py tests/tree/test_histogram_search.py tests/tree/test_histogram_tree.py tests/tree/test_predict.py

# What whole models are compared with beside torch.
$(VENV)/stamps/bench: pyproject.toml $(VENV)/stamps/fastnn
	$(PIP) install --no-build-isolation --editable ".[bench]"
	touch $@

clean:
	rm -rf build dist demo-results .pytest_cache .ruff_cache .hypothesis $(VENV)/stamps
	find python tests bench examples -name __pycache__ -prune -exec rm -rf {} +

$(VENV)/stamps/venv:
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	mkdir -p $(@D)
	touch $@

$(TORCH_STAMP): $(VENV)/stamps/venv
	$(PIP) install --no-compile "$(TORCH)"
	touch $@

$(VENV)/stamps/lint: Makefile $(VENV)/stamps/venv
	$(PIP) install $(LINTERS)
	touch $@

# Editable, so that a change of Python needs no new build; without build isolation, so that a change of C++
# compiles only the files it touches.
$(VENV)/stamps/fastnn: $(SOURCES) $(TORCH_STAMP)
	$(BIN)/python -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["build-system"]["requires"]))' \
	    > $(VENV)/stamps/build-requires.txt
	$(PIP) install ninja -r $(VENV)/stamps/build-requires.txt
	$(PIP) install --no-compile --no-build-isolation --editable ".[$(EXTRAS)]"
	touch $@

# What is installed is compiled to bytecode here, on all cores: by pip, on one, it takes a minute. (Some packages hold files for
# other versions of Python, which do not compile.)
$(VENV)/stamps/bytecode: pyproject.toml $(TORCH_STAMP) | $(VENV)/stamps/fastnn
	$(BIN)/python -m compileall -qq -j 0 $$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || true
	touch $@
