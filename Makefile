# One file does all the set-up. Needs: Python 3.11 or newer with venv and pip, make, bash.
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c

PYTHON ?= python3
VENV ?= .venv
VENV_FLAGS ?=
OUT ?= out/tiny-wan
JOBS ?= 2
PYTEST_ARGS ?=

export PIP_DISABLE_PIP_VERSION_CHECK = 1

BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALLED_TEST := $(VENV)/.installed-test
# A torch that is there (a CUDA build, a container's own) is kept; only a new environment gets the pinned one.
PIN = $$($(BIN)/python -c 'import importlib.util as u; print("" if u.find_spec("torch") else "-c constraints.txt")')

.PHONY: edge-check wheel wheel-check walks triton-check launches-check dynamo-check attention-check help venv demo demo-steps test slow stress campaign variants lint ruff types warm forked-tests lengths format docs clean plugin gpu-check kernels kernels-check

help:
	@echo "make demo    export examples/tiny-wan: 4-bit weights, ONNX graphs, TensorRT-RTX engines; inspect it; make a clip"
	@echo "make test    ruff, mypy and the tests but the slow ones"
	@echo "make slow    the tests that take longest: a server in a browser, the notebook, kills, whole graphs of every family"
	@echo "make gpu-check  the CUDA kernels on this machine's GPU: right and how fast, one table (GPU_PYTHON=, GPU_OUT=, GPU_ARGS=)"
	@echo "make stress  the fault tests at their full counts: 500 kills, 200 races, 100 000 mutations"
	@echo "make campaign  more than 400 000 mutations over the parsers, command lines, 200 kills, as a table (CAMPAIGN= names some parts)"
	@echo "make variants  the numeric tests as other processors run them: threads, instruction sets (VARIANTS= names some)"
	@echo "make kernels        the CUDA kernels' library (needs nvcc, or FETCH_NVCC=1); kernels-check also reads its machine code"
	@echo "make kernels plugin HOST=aarch64 SM=\"87 110\"  both for a Jetson, on x86-64"
	@echo "make edge-check  that library and the plugin's harness under qemu-user (aarch64-linux-gnu-g++, qemu-aarch64, nvcc, TENSORRT_ROOT)"
	@echo "make wheel   dist/*.whl, with the kernels' library where it was built (HOST=aarch64: with that of a Jetson)"
	@echo "make wheel-check  such a wheel in a new environment: its commands, run from /"
	@echo "make walks   the pages for six users, command by command in such an environment, as transcripts in docs/walks (COMFYUI_ROOT=)"
	@echo "make venv    only the environment: $(VENV) with dvdq-export and dvdq-inspect"
	@echo "make dynamo-check  a worker behind NVIDIA Dynamo's own frontend, out of its wheels (90 MB)"
	@echo "make triton-check  the model repository in a real tritonserver, out of nvidia-pytriton's wheel (55 MB)"
	@echo "make launches-check  the kernels that torch.compile makes of a block, counted with Triton's wheel (1 GB on disk), without a GPU"
	@echo "make attention-check  our calls of the libraries of 8-bit attention, in their own wheels (107 MB), without a GPU"
	@echo "make lint    ruff and mypy"
	@echo "make format  rewrite the sources in the house style"
	@echo "make docs    the documentation as a site, build/site/index.html"
	@echo "make plugin  the TensorRT plugin library, build/plugins/libdvdquant_plugins.so; needs TENSORRT_ROOT"
	@echo "make clean   remove caches, build outputs and $(OUT)*; $(VENV) stays"
	@echo
	@echo "variables: PYTHON=$(PYTHON)  VENV=$(VENV)  VENV_FLAGS=  OUT=$(OUT)  JOBS=$(JOBS) (test processes)  PYTEST_ARGS="

$(BIN)/pip:
	@command -v $(PYTHON) >/dev/null || { echo "$(PYTHON) was not found; install Python 3.11 or newer, or: make PYTHON=/path/to/python3 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; v = sys.version_info; \
		sys.exit(0 if v >= (3, 11) else "$(PYTHON) is Python %d.%d and dvdquant needs 3.11 or newer: make PYTHON=python3.12 ..." % v[:2])'
	$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing dvdquant and what it needs into $(VENV) (2.5 GB on disk, minutes the first time)"
	@$(BIN)/python -m pip install -qq -e . $(PIN)
	@touch $@

$(INSTALLED_TEST): pyproject.toml constraints.txt | $(BIN)/pip
	@echo "installing dvdquant with its test tools into $(VENV) (2.5 GB on disk, minutes the first time)"
	@$(BIN)/python -m pip install -qq -e '.[test]' $(PIN)
	@touch $(INSTALLED) $@

venv: $(INSTALLED)

demo: $(INSTALLED)
	@$(MAKE) --no-print-directory demo-steps || \
		{ echo; echo "FAIL      the error stands above; what went well before it is in $(OUT).log" >&2; exit 1; }
	@echo
	@echo "PASS      every graph was judged, every file was checked, the clip is drawn"
	@echo "open      $(OUT)/report.html"

demo-steps:
	@mkdir -p $(dir $(OUT))
	$(BIN)/dvdq export examples/tiny-wan -o $(OUT) --recipe w4a4 --latent 8x24x24 --text-tokens 5 \
		--sm 8.0 --sm 8.6 --sm 8.9 --sm 12.0 --target rtx --target onnx --verify --report | tee $(OUT).log
	$(BIN)/dvdq inspect $(OUT) --check | tee -a $(OUT).log
	@$(BIN)/python examples/list_engines.py $(OUT)
	$(BIN)/dvdq run $(OUT) --prompt "ring red right large black" --compare --steps 20 --delta 0.2 \
		-o $(OUT)-clip/clip.mp4 --strip $(OUT)-clip/strip.png --trace $(OUT)-clip/trace.json | tee -a $(OUT).log
	@test -s $(OUT)/report.html && test -s $(OUT)-clip/clip.mp4

# pytriton wants numpy 1 and an older protobuf, so its wheel is unpacked beside the environment, for the server in it alone.
TRITON := build/triton
$(TRITON)/.unpacked:
	@mkdir -p $(TRITON)
	$(BIN)/python -m pip install -q --no-deps --target $(TRITON)/server nvidia-pytriton==0.7.0
	$(BIN)/python -m pip install -q --no-deps --target $(TRITON)/numpy numpy==1.26.4
	$(BIN)/python -m pip install -q --no-deps --target $(TRITON)/client tritonclient python-rapidjson grpcio
	@touch $@

triton-check: $(INSTALLED_TEST) $(TRITON)/.unpacked
	DVDQ_TRITON=$(TRITON) $(BIN)/python -m pytest -q tests/deploy/serve/bridges/test_serve_triton.py $(PYTEST_ARGS)

# Built from the tracked files alone, so that no leftover of build/ gets into it.
wheel: $(INSTALLED_TEST)
	@rm -rf build/wheel dist && mkdir -p build/wheel/source
	@git ls-files -z | tar --null -T - -cf - | tar -xf - -C build/wheel/source
	@mkdir -p build/wheel/source/build && if [ -d build/kernels$(DASH_HOST) ]; then \
		ln -s $(abspath build/kernels$(DASH_HOST)) build/wheel/source/build/kernels$(DASH_HOST); fi
	@DVDQUANT_HOST=$(HOST) $(BIN)/python -m build --wheel --no-isolation --outdir dist build/wheel/source >build/wheel/log \
		|| { tail -20 build/wheel/log >&2; exit 1; }
	@ls -l dist/*.whl

# Everything that the commands need comes from the wheel's own requirements: a new environment of 2.6 GB, removed at the end.
wheel-check: wheel
	$(BIN)/python docs/scripts/walks.py dist/*.whl --only install --check

walks: wheel
	$(BIN)/python docs/scripts/walks.py dist/*.whl

# Dynamo pins releases that others here do not share, so it is unpacked beside the environment as well.
DYNAMO := build/dynamo
$(DYNAMO)/.unpacked:
	@mkdir -p $(DYNAMO)
	$(BIN)/python -m pip install -q --no-deps --target $(DYNAMO) ai-dynamo==1.6.1 ai-dynamo-runtime==1.6.1 \
	    uvloop msgspec pyzmq redis kubernetes zstandard
	@touch $@

dynamo-check: $(INSTALLED_TEST) $(DYNAMO)/.unpacked
	DVDQ_DYNAMO=$(DYNAMO) $(BIN)/python -m pytest -q tests/deploy/serve/bridges/test_serve_dynamo.py $(PYTEST_ARGS)

# The releases that dvdquant/ops/attention/libraries.py was written for; newer ones are tried by their numbers here.
ATTENTION := build/attention
$(ATTENTION)/.unpacked:
	@mkdir -p $(ATTENTION)
	$(BIN)/python -m pip install -q --no-deps --target $(ATTENTION) comfy-kitchen==0.2.40 fa3-fwd==0.0.3 \
	    nvidia-cudnn-frontend==1.32.0 sageattention==1.0.6
	@touch $@

attention-check: $(INSTALLED_TEST) $(ATTENTION)/.unpacked
	DVDQ_ATTENTION=$(ATTENTION) $(BIN)/python -m pytest -q tests/ops/attention/test_attention_packages.py $(PYTEST_ARGS)

# PyTorch for CUDA brings its own Triton along, which counts. One for the CPU shall stay without it.
LAUNCHES := build/launches
$(LAUNCHES)/.unpacked:
	@mkdir -p $(LAUNCHES)
	$(BIN)/python -m pip install -q --no-deps --target $(LAUNCHES) triton==3.9.0
	@touch $@

COUNT_LAUNCHES = $(BIN)/python -m pytest -q tests/benchmarks/test_compiled_launches.py $(PYTEST_ARGS)
launches-check: $(INSTALLED_TEST)
	@if $(BIN)/python -c 'import sys, importlib.util as u; sys.exit(u.find_spec("triton") is None)'; then \
		$(COUNT_LAUNCHES); \
	else \
		$(MAKE) --no-print-directory $(LAUNCHES)/.unpacked && PYTHONPATH=$(abspath $(LAUNCHES)) $(COUNT_LAUNCHES); \
	fi

lint: $(INSTALLED_TEST) ruff
	$(BIN)/mypy

ruff: $(INSTALLED_TEST)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

warm: $(INSTALLED_TEST)
	@$(BIN)/python -m tests.support.warm_up

# A test process takes the files in our order (tests/support/longest_first.py), not in that of their numbers of tests. What it compiles is
# kept, whatever the environment says: else every run rewrites the assertions of all test files once a process.
BY_FILE := --dist loadfile --no-loadscope-reorder
KEEPING := env -u PYTHONDONTWRITEBYTECODE
FORKED = $(KEEPING) $(BIN)/python -m pytest -n $(JOBS) --forked-workers $(BY_FILE) --cpu-seconds 15

# mypy takes what the tests leave of the cores while they wait; what it said comes at the end.
TYPES := build/types.log
test: $(INSTALLED_TEST) ruff
	@mkdir -p $(dir $(TYPES))
	@$(MAKE) --no-print-directory -j2 -k types forked-tests || { cat $(TYPES); exit 1; }
	@cat $(TYPES)

types:
	@nice -n 10 $(BIN)/mypy >$(TYPES) 2>&1

forked-tests:
	$(FORKED) -m "not slow and not stress" $(PYTEST_ARGS)

slow: $(INSTALLED_TEST)
	$(FORKED) -m "slow and not stress" $(PYTEST_ARGS)

stress: $(INSTALLED_TEST) warm
	$(KEEPING) $(BIN)/python -m pytest -n $(JOBS) $(BY_FILE) -m stress --timeout 3600 $(PYTEST_ARGS)

CAMPAIGN ?=
campaign: $(INSTALLED_TEST) warm
	$(BIN)/python -m tests.support.run_campaign $(CAMPAIGN)

VARIANTS ?=
variants: $(INSTALLED_TEST)
	$(BIN)/python tests/support/run_variants.py $(VARIANTS)

lengths:
	@$(PYTHON) tests/support/report_lengths.py

format: $(INSTALLED_TEST)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Needs nvcc (PATH or CUDA_HOME) for the GPU library; objects are cached by content in build/kernels. HOST=aarch64 compiles for
# that processor on x86-64, into build/kernels-aarch64; SM="87 110" for these GPUs alone; FETCH_NVCC=1 fetches nvcc's wheels where
# there is none.
HOST ?=
SM ?=
FETCH_NVCC ?=
KERNELS_FLAGS = --jobs $(JOBS) $(if $(HOST),--host $(HOST)) $(if $(SM),--architectures $(SM)) $(if $(FETCH_NVCC),--fetch-nvcc)
kernels: $(INSTALLED)
	$(BIN)/python kernels/build.py $(KERNELS_FLAGS)

kernels-check: $(INSTALLED)
	$(BIN)/python kernels/check_sass.py $(KERNELS_FLAGS)

# Five minutes of CPU the first time; objects are cached.
edge-check: $(INSTALLED_TEST)
	@$(MAKE) --no-print-directory kernels HOST=aarch64 SM="87 110"
	$(BIN)/python -m pytest -q tests/kernels/test_cross_build.py $(PYTEST_ARGS)

# One self-contained file where the kernels' archive is built; else the plugin loads libdvdquant_kernels.so when it runs.
DASH_HOST = $(if $(HOST),-$(HOST))
PLUGIN_ARCHIVE = $(wildcard build/kernels$(DASH_HOST)/libdvdquant_kernels.a)
PLUGIN_FLAGS = $(if $(HOST),-DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=$(HOST) -DCMAKE_CXX_COMPILER=$(HOST)-linux-gnu-g++ \
	-DCUDART_STATIC="$(abspath $(firstword $(wildcard build/kernels$(DASH_HOST)/cudart-$(HOST)/nvidia/*/lib/libcudart_static.a)))")
plugin:
	@if [ ! -f "$${TENSORRT_ROOT:-}/include/NvInfer.h" ] && [ ! -f /usr/include/$$(uname -m)-linux-gnu/NvInfer.h ]; then \
		echo "plugin skipped: TensorRT's C++ headers were not found; set TENSORRT_ROOT to the folder that holds include/NvInfer.h" >&2; \
	elif ! command -v cmake >/dev/null; then \
		echo "plugin skipped: cmake was not found" >&2; \
	else \
		cmake -S plugins -B build/plugins$(DASH_HOST) -UTENSORRT_INCLUDE $(PLUGIN_FLAGS) \
			-DDVDQUANT_KERNELS_ARCHIVE="$(abspath $(PLUGIN_ARCHIVE))"; \
		cmake --build build/plugins$(DASH_HOST) -j $(JOBS); \
		echo "plugin    build/plugins$(DASH_HOST)/libdvdquant_plugins.so ($(if $(PLUGIN_ARCHIVE),with its kernels,loads libdvdquant_kernels.so when it runs))"; \
	fi

# Runs in the Python that holds a CUDA build of torch, which may not be this checkout's environment.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))
GPU_OUT ?= kernels/bench/results
# Such as --seconds 240 --bench-seconds 120 where there are ten minutes: by default it takes about fifteen.
GPU_ARGS ?=
gpu-check:
	$(GPU_PYTHON) kernels/check/gpu_check.py --out $(GPU_OUT) $(GPU_ARGS)

# The drawings take minutes and stay as they are: python docs/scripts/drawings.py.
docs: $(INSTALLED_TEST)
	$(BIN)/python docs/scripts/chain.py
	$(BIN)/python -m mkdocs build --strict --quiet
	@echo "site      build/site/index.html"

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis $(OUT) $(OUT).log $(OUT)-clip
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -print0 | xargs -0 rm -rf
