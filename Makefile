# Every target makes what it needs. .venv has the installed packages, data/ the models and texts.
#
#   PYTHON=...    the Python from which .venv is made
#   PIP_ARGS=...  passed to pip (an index, a proxy)
#   ARGS=...      passed to the command of a target
SHELL := /bin/sh
.DELETE_ON_ERROR:
.DEFAULT_GOAL := help

VENV := .venv
PY := $(VENV)/bin/python
PIP := $(PY) -m pip --disable-pip-version-check
STAMPS := $(VENV)/.stamps
CLANG_FORMAT := $(VENV)/bin/clang-format
# Two processes, each with one thread of torch. The tests of a file share fixtures, so they stay in
# one process. Files start in the order of collection, instead of those with the most tests first.
PYTEST_JOBS := -n 2 --dist loadfile --no-loadscope-reorder
ARGS ?=

# A change in any of these files rebuilds the extension. ninja compiles only what changed.
NATIVE := $(shell find csrc -type f -not -path 'csrc/simt/*' -not -name README.md) \
          CMakeLists.txt setup.py pyproject.toml
CXX_FILES := $(shell find csrc docs/teaching -name '*.h' -o -name '*.cpp' -o -name '*.cu' \
                                             -o -name '*.cuh')

.PHONY: help demo check test bench gpu docs lint format wheel serve-test clean
.PHONY: frameworks quantized vllm

help:
	@echo "make demo        fine-tunes a pretrained transformer on real text with LoTR and LoRA"
	@echo "make check       runs the tests for work in progress: operators, layers, a few kernels"
	@echo "make test        runs the tests; as in CI, with the slow ones: ARGS='-m \"not full\"'"
	@echo "make bench       runs the benchmarks; ARGS=--quick only shows that they run"
	@echo "make gpu         on a machine with a GPU: builds, tests and measures in nine minutes"
	@echo "                 (ARGS=\"--budget 1800\": in thirty); needs no network"
	@echo "make docs        builds the site in build-docs/"
	@echo "make lint        checks style and the order of imports; make format corrects the layout"
	@echo "make wheel       builds a wheel for Python 3.10+, torch 2.10+, CPUs and GPUs, in dist/"
	@echo "make serve-test  runs the tests with vLLM (2 GB)"
	@echo "make clean       removes what was built"
	@echo "make frameworks  installs DeepSpeed, TRL and sentence-transformers for their tests"
	@echo "make quantized   installs torchao and bitsandbytes for their tests"
	@echo "make vllm        installs vLLM for its tests (2 GB)"

# ---- set-up: each finished step leaves a file in $(STAMPS) ---------------------------------------

$(STAMPS)/venv: .ci/make_venv
	@sh .ci/make_venv $(VENV) $(PYTHON)
	@mkdir -p $(STAMPS) && touch $@

# requirements/NAME.txt -> $(STAMPS)/need-NAME
$(STAMPS)/need-%: requirements/%.txt requirements/build.txt requirements/demo.txt | $(STAMPS)/venv
	@echo "setup: installing requirements/$*.txt"
	@$(PIP) install $(PIP_ARGS) -r $<
	@touch $@

# requirements/bench.txt does not name torch. If it came first, pip would install the newest torch.
$(STAMPS)/need-bench: | $(STAMPS)/need-build

# The build runs before pip registers the package, because pip hides the progress of a build.
$(STAMPS)/build: $(NATIVE) | $(STAMPS)/need-build
	@echo "setup: compiling the extension"
	@$(PY) setup.py --quiet build_ext --inplace
	@$(PIP) install --quiet --no-build-isolation --no-deps --editable .
	@touch $@

$(STAMPS)/data: examples/data.py | $(STAMPS)/venv
	@$(PY) examples/data.py minilm snippets $(PIP_ARGS)
	@touch $@

frameworks: $(STAMPS)/frameworks
$(STAMPS)/frameworks: requirements/frameworks.txt .ci/make_frameworks | $(STAMPS)/need-test
	@sh .ci/make_frameworks $(PY) $(VENV)/frameworks $(PIP_ARGS)
	@touch $@

# In a separate folder, because transformers imports an installed torchao, with warnings.
quantized: $(STAMPS)/quantized
$(STAMPS)/quantized: requirements/quantized.txt | $(STAMPS)/need-test
	@$(PIP) install $(PIP_ARGS) --no-deps --upgrade --target $(VENV)/quantized -r $<
	@touch $@

vllm: $(STAMPS)/vllm
$(STAMPS)/vllm: requirements/vllm.txt .ci/make_vllm | $(STAMPS)/build
	@sh .ci/make_vllm $(PY) $(VENV)/vllm $(PIP_ARGS)
	@touch $@

# ---- what a user or a developer runs -------------------------------------------------------------

demo: $(STAMPS)/need-demo $(STAMPS)/build $(STAMPS)/data
	@$(PY) examples/finetune_text.py $(ARGS)

QUICK_TESTS := $(addprefix python_tests/, test_operators.py test_layers.py test_bad_input.py \
    "kernels/test_kernels.py::test_kernel[shrink-bf16]" \
    "kernels/test_kernels.py::test_kernel[expand_add-bf16]")
check: $(STAMPS)/need-test $(STAMPS)/build
	@$(PY) -m pytest -q $(PYTEST_JOBS) $(QUICK_TESTS) $(ARGS)

test: $(STAMPS)/need-test $(STAMPS)/build $(STAMPS)/data
	@$(PY) -m pytest $(PYTEST_JOBS) --durations=10 --durations-min=30 $(ARGS)

serve-test: $(STAMPS)/need-test $(STAMPS)/vllm $(STAMPS)/data
	@LOTR_VLLM_PYTHON=$(VENV)/vllm/bin/python $(PY) -m pytest -q python_tests/serving $(ARGS)

bench: $(STAMPS)/need-bench $(STAMPS)/build $(STAMPS)/data
	@$(PY) -m bench $(ARGS)

# Installs nothing, because a machine with a GPU may have no network.
gpu:
	@python=$$(sh .ci/python_with_torch $(VENV) $(PYTHON)) && $$python -m bench.gpu $(ARGS)

# Not mkdocs --quiet, which would hide warnings from --strict.
docs: $(STAMPS)/need-docs $(STAMPS)/build
	@NO_MKDOCS_2_WARNING=1 sh .ci/quiet '/^INFO/!p' $(PY) -m mkdocs build --strict $(ARGS)
	@echo "docs: open build-docs/index.html"
	@echo "docs: for its search, run python3 -m http.server -d build-docs"

# What lint runs if the layout of a file differs. false makes the target fail.
LAYOUT_DIFFERS := { echo "lint: make format corrects the layout" >&2; false; }
lint: $(STAMPS)/need-lint
	@$(PY) -m ruff check --quiet .
	@$(PY) -m ruff format --check --quiet . || $(LAYOUT_DIFFERS)
	@$(CLANG_FORMAT) --dry-run -Werror $(CXX_FILES) </dev/null || $(LAYOUT_DIFFERS)
	@$(PY) .ci/check_includes.py
	@sh .ci/quiet '/^Broken contracts/,$$p' $(VENV)/bin/lint-imports --no-cache
	@echo "lint: clean"

format: $(STAMPS)/need-lint
	@$(PY) -m ruff check --fix --quiet . ; $(PY) -m ruff format --quiet .
	@$(CLANG_FORMAT) -i $(CXX_FILES) </dev/null

# TORCH="2.10.* 2.13.*" names the versions of torch that try the wheel (default: the oldest and the
# newest). Each gets an environment in build-wheel.
wheel: $(STAMPS)/need-wheel
	@PIP_ARGS="$(PIP_ARGS)" sh .ci/make_wheel $(PY) $(TORCH)

clean:
	rm -rf build* dist *.egg-info lotr_ext/*.so $(STAMPS)/build .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
