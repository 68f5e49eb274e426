# Everything happens in .venv and data/, both made by `make setup`; demo, test and bench do set-up themselves.
# PYTHON=... picks the interpreter of .venv, PIP_ARGS=... is handed to pip (an index, a proxy), ARGS=... to what a target runs.
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
CLANG_FORMAT := $(PY) -c "from clang_format import clang_format; clang_format()"
# mkdocs's own --quiet would hide warnings from --strict too
SITE = { log=$$(NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict $(DOCS_ARGS) 2>&1) \
  || { echo "$$log" | grep -v '^INFO' >&2; false; }; }
# the contracts in pyproject.toml; only what is broken is worth reading
IMPORTS = { log=$$($(VENV)/bin/lint-imports --no-cache) || { echo "$$log" | sed -n '/^Broken contracts/,$$p' >&2; false; }; }
# tests run with one thread of torch each, so two files at a time, each in one process because its tests share what was built for
# them; ARGS="-n 0" runs all in one process
TWO := -n 2 --dist loadfile --no-loadscope-reorder
SLOWEST := --durations=10 --durations-min=60
STAMPS := $(VENV)/.stamps
ARGS ?=
DOCS_ARGS ?=

# What the extension module is made of: a change in any of these rebuilds it (ninja compiles only what changed).
NATIVE := $(shell find csrc -type f -not -path 'csrc/simt/*' \
          \( -name '*.h' -o -name '*.def' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh' \)) \
          CMakeLists.txt setup.py pyproject.toml
MORE_CXX := csrc/simt csrc/simt/module csrc/simt/torch docs/teaching
CXX_FILES := $(filter csrc/%,$(NATIVE)) $(wildcard $(addsuffix /*.h,$(MORE_CXX)) $(addsuffix /*.cpp,$(MORE_CXX)) $(addsuffix /*.cuh,$(MORE_CXX)))

.PHONY: help setup check demo frontier many-tasks evolve private influence loras causal-lm test test-full test-gpu serve-test gpu wheel bench docs lint format clean distclean

help:
	@echo "make demo       fine-tune a pretrained transformer on real text with LoTR (about 5 minutes on two cores)"
	@echo "make frontier   loss against trained parameters, LoTR and LoRA (hours, continues an earlier run; ARGS=--quick: three minutes)"
	@echo "make many-tasks 1,000 tasks over one model, 64 of them in a batch (three minutes)"
	@echo "make evolve     cores trained without a backward, for an accuracy and an exact match (ten minutes; ARGS=--quick: one)"
	@echo "make loras      eight LoRAs of a small language model converted to one bank, and a ninth task over it (four minutes)"
	@echo "make private    training with differential privacy, LoTR and LoRA, at three epsilons (12 minutes of one core)"
	@echo "make influence  finding wrong labels by influence, compared with kronfluence (10 minutes of one core)"
	@echo "make check      tests to run while you work: operators, autograd, layers, a few kernels (3 minutes)"
	@echo "make test       lint and the main tests (10 minutes); with the slow ones, as in CI: make test ARGS='-m \"not full\"'"
	@echo "make test-full  the long sweeps too (an hour or more)"
	@echo "make bench      every benchmark that this machine can run    make test-gpu    the tests that need a GPU"
	@echo "make gpu        on a machine with a GPU, without network: build, tests, sanitizer, benchmarks within ARGS=\"--budget 540\" seconds"
	@echo "make wheel      one wheel for every Python from 3.10 and torch from 2.10 on, for CPU and GPUs, checked and tested, in dist/"
	@echo "make docs       the documentation, to read in a browser      make lint, format, clean, distclean"
	@echo "make serve      three tasks of SmolLM2 in vLLM's server on this machine (2 GB are installed first)"
	@echo "make serve-test the tests that need vLLM     make rl         reinforcement learning of cores, with answers by vLLM"
	@echo "make setup      .venv, the build, model and data             make causal-lm   the demo with a small language model"

setup: $(STAMPS)/build $(STAMPS)/data $(STAMPS)/quantized_libraries $(STAMPS)/frameworks

$(STAMPS)/venv: .ci/make_venv
	@sh .ci/make_venv $(VENV) $(PYTHON)
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/deps: $(STAMPS)/venv requirements-dev.txt
	@echo "setup: installing requirements-dev.txt into $(VENV) (minutes the first time)"
	@$(PIP) install --quiet $(PIP_ARGS) -r requirements-dev.txt \
	  || { echo "make setup: pip could not install requirements-dev.txt (see above); set PIP_ARGS for another index" >&2; exit 1; }
	@$(PIP) install --quiet $(PIP_ARGS) --no-deps "nvidia-cutlass>=4.2" \
	  || echo "setup: pip could not install nvidia-cutlass (headers alone): python_tests/interpreter/test_cutlass.py will be skipped" >&2
	@touch $@

# For the tests of quantised bases alone, in a folder of their own: transformers imports torchao, loudly, wherever it finds it.
$(STAMPS)/quantized_libraries: $(STAMPS)/deps
	@$(PIP) install --quiet $(PIP_ARGS) --no-deps --upgrade --target $(VENV)/quantized \
	  "torchao>=0.18" "bitsandbytes>=0.47" "compressed-tensors>=0.15" loguru \
	  || { rm -rf $(VENV)/quantized; echo "setup: pip could not install torchao, bitsandbytes and compressed-tensors" >&2; }
	@touch $@

# For python_tests/frameworks and the examples of private training and influence (DeepSpeed, sentence-transformers, TRL, Opacus,
# kronfluence and what they need: half a minute, 500 MB).
$(STAMPS)/frameworks: $(STAMPS)/deps .ci/make_frameworks
	@echo "setup: installing DeepSpeed, sentence-transformers, TRL, Opacus and kronfluence into $(VENV)/frameworks"
	@sh .ci/make_frameworks $(PY) $(VENV)/frameworks $(PIP_ARGS) \
	  || { rm -rf $(VENV)/frameworks; echo "setup: pip could not install the frameworks: their tests will be skipped" >&2; }
	@touch $@

# For serving alone (2 GB).
$(STAMPS)/vllm: $(STAMPS)/build .ci/make_vllm
	@echo "setup: installing vLLM for the CPU into $(VENV)/vllm (minutes)"
	@sh .ci/make_vllm $(PY) $(VENV)/vllm $(PIP_ARGS) || { rm -rf $(VENV)/vllm; exit 1; }
	@touch $@

$(STAMPS)/build: $(STAMPS)/deps $(NATIVE)
	@echo "setup: building the extension module"
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/data: $(STAMPS)/deps examples/data.py
	@$(PY) examples/data.py $(PIP_ARGS)
	@touch $@

demo: setup
	@$(PY) examples/finetune_text.py $(ARGS)

frontier: setup
	@$(PY) examples/causal_data.py $(PIP_ARGS) && $(PY) -m bench.evidence $(ARGS)

many-tasks: setup
	@$(PY) examples/many_tasks.py $(ARGS)

evolve: setup
	@$(PY) examples/causal_data.py $(PIP_ARGS) && $(PY) examples/evolve.py $(ARGS)

loras: setup
	@$(PY) examples/causal_data.py $(PIP_ARGS) && $(PY) examples/loras_to_bank.py $(ARGS)

private: setup
	@$(PY) examples/private_text.py $(ARGS)

influence: setup
	@$(PY) examples/influence_text.py $(ARGS)

causal-lm: setup
	@$(PY) examples/causal_data.py $(PIP_ARGS) && $(PY) examples/causal_lm.py $(ARGS)

# What one runs while working: no model, no data, no site, and of the kernels a few cases under the executor.
CHECKED := python_tests/ops python_tests/autograd python_tests/layers --ignore python_tests/ops/test_cpu_isa.py \
  $(foreach kernel,shrink expand_add factor_grad shrink_grad,"python_tests/kernels/test_kernels.py::test_kernel[$(kernel)-bf16]")
check: $(STAMPS)/build
	@$(CODE) || $(LINT_FAILED)
	@$(PY) -m pytest -q $(TWO) $(CHECKED) $(ARGS)
	@echo "check: left out: the site, models, files, PEFT, processes, benchmarks, examples, other instruction sets, kernels and types;"
	@echo "check: make test has them"

test: setup lint
	@$(PY) -m pytest $(TWO) $(SLOWEST) $(ARGS)
	@echo "test: left out: without ARGS='-m \"not full\"' other frameworks, quantisers, lower instruction sets, compilers; in any case"
	@echo "test: AddressSanitizer, most schedules, shapes and mutations of the kernels, planted bugs, code for other GPUs, thousands"
	@echo "test: of random programs: make test-full has them all. What needs a GPU: make test-gpu"

test-full: setup lint
	@$(PY) -m pytest $(TWO) -m "" -o faulthandler_timeout=3600 $(SLOWEST) $(ARGS)

# Adapters in a real vLLM, whose set-up is no part of make setup.
serve-test: setup $(STAMPS)/vllm
	@LOTR_VLLM_PYTHON=$(VENV)/vllm/bin/python $(PY) -m pytest -q python_tests/serving $(ARGS)

.PHONY: serve rl
serve rl: $(STAMPS)/vllm
	@$(PY) examples/causal_data.py $(PIP_ARGS) && $(VENV)/vllm/bin/python examples/$(if $(filter rl,$@),rl_cores,serve_tasks).py $(ARGS)

test-gpu: setup
	@$(PY) -m pytest -m cuda $(ARGS)

# Of the machine as it is: nothing is installed, so no set-up. The Python that has torch: PYTHON, .venv's, or python3.
GPU_PY = $(or $(PYTHON),$(if $(wildcard $(PY)),$(PY),python3))
gpu:
	@$(GPU_PY) -c 'import importlib.util as u, sys; sys.exit(u.find_spec("torch") is None)' \
	  || { echo "make gpu: expected a Python that has torch, got $(GPU_PY); name it: make gpu PYTHON=/path/to/python" >&2; exit 1; }
	@$(GPU_PY) -m bench.gpu $(ARGS)

# TORCH="2.10.* 2.13.*" names the versions it is tried with (the oldest and the newest); each gets an environment in build-wheel.
wheel: $(STAMPS)/deps
	@PIP_ARGS="$(PIP_ARGS)" sh .ci/make_wheel $(PY) $(TORCH)

bench: setup
	@$(PY) -m bench $(ARGS)

docs: $(STAMPS)/build
	@$(SITE) && echo "docs: open build-docs/index.html; its search needs a server: python3 -m http.server -d build-docs"

CODE = $(PY) -m ruff check --quiet . && $(PY) -m ruff format --check --quiet . \
  && $(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES) </dev/null && $(PY) .ci/check_includes.py && $(IMPORTS)
LINT_FAILED = { echo "lint: see above; make format mends the layout" >&2; exit 1; }

# The site too: a page outside of its navigation, a broken link or a docstring that cannot be read is an error. It shows what the
# programs print for --help, so it needs the built package.
lint: $(STAMPS)/build
	@$(CODE) && $(SITE) && echo "lint: clean" || $(LINT_FAILED)

format: $(STAMPS)/deps
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format --quiet . && $(CLANG_FORMAT) -i $(CXX_FILES) </dev/null

clean:
	rm -rf build* dist *.egg-info lotr_ext/*.so $(STAMPS)/build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV) data
