# .venv holds what is installed, data/ the models and texts; every target makes what it needs of them.
# PYTHON=... picks the interpreter of .venv, PIP_ARGS=... is handed to pip (an index, a proxy), ARGS=... to what a target runs.
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
STAMPS := $(VENV)/.stamps
CLANG_FORMAT := $(PY) -c "from clang_format import clang_format; clang_format()"
# Each test process has one thread of torch. A file stays in one process, because its tests share what was built for them.
TWO := -n 2 --dist loadfile --no-loadscope-reorder
ARGS ?=
DOCS_ARGS ?=

# What the extension module is made of: a change in any of these rebuilds it (ninja compiles only what changed).
NATIVE := $(shell find csrc -type f -not -path 'csrc/simt/*' \
          \( -name '*.h' -o -name '*.def' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' -o -name '*.cmake' \)) \
          CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc docs/teaching -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

.PHONY: help demo check test bench gpu docs lint format wheel serve-test clean frameworks quantized vllm

help:
	@echo "make demo        fine-tune a pretrained transformer on real text with LoTR and LoRA (four minutes on two cores)"
	@echo "make check       the tests to run while you work: operators, layers, a few kernels (90 seconds)"
	@echo "make test        the tests (five minutes); with the slow ones, as CI: make test ARGS='-m \"not full\"'"
	@echo "make bench       the benchmarks of this machine; ARGS=--quick shows in minutes that they run"
	@echo "make gpu         on a machine with a GPU, without network: build, tests and benchmarks, within ARGS=\"--budget 540\" seconds"
	@echo "make docs        the site, in build-docs/          make lint, make format   style, the order of imports"
	@echo "make wheel       one wheel for every Python from 3.10 and torch from 2.10 on, for CPU and GPUs, in dist/"
	@echo "make serve-test  the tests that need vLLM (2 GB)   make clean     removes what was built"
	@echo "make frameworks, quantized, vllm   installs what their tests need: DeepSpeed and TRL; torchao and bitsandbytes; vLLM"

# ---- set-up ----------------------------------------------------------------------------------------------------------

$(STAMPS)/venv: .ci/make_venv
	@sh .ci/make_venv $(VENV) $(PYTHON)
	@mkdir -p $(STAMPS) && touch $@

# requirements/NAME.txt -> $(STAMPS)/need-NAME
$(STAMPS)/need-%: requirements/%.txt requirements/build.txt requirements/demo.txt | $(STAMPS)/venv
	@$(PY) .ci/install.py $* $(PIP_ARGS) -r $<
	@touch $@

# setup.py prints its progress only where pip does not keep its output, so it compiles before pip registers the package.
$(STAMPS)/build: $(NATIVE) | $(STAMPS)/need-build
	@echo "setup: compiling the extension (30 s on two cores; with nvcc 90 s)"
	@$(PY) setup.py --quiet build_ext --inplace
	@$(PY) -m pip --disable-pip-version-check install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/data: examples/data.py | $(STAMPS)/venv
	@$(PY) examples/data.py minilm snippets $(PIP_ARGS)
	@touch $@

frameworks: $(STAMPS)/frameworks
$(STAMPS)/frameworks: requirements/frameworks.txt .ci/make_frameworks | $(STAMPS)/need-test
	@sh .ci/make_frameworks $(PY) $(VENV)/frameworks $(PIP_ARGS)
	@touch $@

# In a folder of their own: transformers imports torchao, with warnings, wherever it is installed.
quantized: $(STAMPS)/quantized
$(STAMPS)/quantized: requirements/quantized.txt | $(STAMPS)/need-test
	@$(PY) .ci/install.py quantized $(PIP_ARGS) --no-deps --upgrade --target $(VENV)/quantized -r $<
	@touch $@

vllm: $(STAMPS)/vllm
$(STAMPS)/vllm: requirements/vllm.txt .ci/make_vllm | $(STAMPS)/build
	@sh .ci/make_vllm $(PY) $(VENV)/vllm $(PIP_ARGS)
	@touch $@

# ---- what a reader or a developer runs -------------------------------------------------------------------------------

demo: $(STAMPS)/need-demo $(STAMPS)/build $(STAMPS)/data
	@$(PY) examples/finetune_text.py $(ARGS)

CHECKED := python_tests/test_operators.py python_tests/test_layers.py python_tests/test_bad_input.py \
  $(foreach kernel,shrink expand_add,"python_tests/kernels/test_kernels.py::test_kernel[$(kernel)-bf16]")
check: $(STAMPS)/need-test $(STAMPS)/build
	@$(PY) -m pytest -q $(TWO) $(CHECKED) $(ARGS)

test: $(STAMPS)/need-test $(STAMPS)/build $(STAMPS)/data
	@$(PY) -m pytest $(TWO) --durations=10 --durations-min=30 $(ARGS)

serve-test: $(STAMPS)/need-test $(STAMPS)/vllm $(STAMPS)/data
	@LOTR_VLLM_PYTHON=$(VENV)/vllm/bin/python $(PY) -m pytest -q python_tests/serving $(ARGS)

bench: $(STAMPS)/need-bench $(STAMPS)/build $(STAMPS)/data
	@$(PY) -m bench $(ARGS)

# Installs nothing, because a machine with a GPU may have no network. The Python that has torch: PYTHON, .venv's, or python3.
GPU_PY = $(or $(PYTHON),$(if $(wildcard $(PY)),$(PY),python3))
gpu:
	@$(GPU_PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' \
	  || { echo "make gpu: expected a Python that has torch, got $(GPU_PY). Name it: make gpu PYTHON=/path/to/python" >&2; exit 1; }
	@$(GPU_PY) -m bench.gpu $(ARGS)

# mkdocs's own --quiet would hide warnings from --strict too
docs: $(STAMPS)/need-docs $(STAMPS)/build
	@log=$$(NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(DOCS_ARGS) 2>&1) || { echo "$$log" | grep -v '^INFO' >&2; false; }
	@echo "docs: open build-docs/index.html; its search needs a server: python3 -m http.server -d build-docs"

lint: $(STAMPS)/need-lint
	@$(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet . \
	  && $(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES) </dev/null && $(PY) .ci/check_includes.py \
	  && { log=$$($(VENV)/bin/lint-imports --no-cache) || { echo "$$log" | sed -n '/^Broken contracts/,$$p' >&2; false; }; } \
	  && echo "lint: clean" || { echo "lint: see above; make format mends the layout" >&2; exit 1; }

format: $(STAMPS)/need-lint
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format --quiet . && $(CLANG_FORMAT) -i $(CXX_FILES) </dev/null

# TORCH="2.10.* 2.13.*" names the versions it is tried with (the oldest and the newest); each gets an environment in build-wheel.
wheel: $(STAMPS)/need-wheel
	@PIP_ARGS="$(PIP_ARGS)" sh .ci/make_wheel $(PY) $(TORCH)

clean:
	rm -rf build* dist *.egg-info lotr_ext/*.so $(STAMPS)/build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
