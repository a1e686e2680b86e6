# make demo    the whole way on generated data: train, convert, score (two CPU cores: minutes)
# make test    all tests
# make lint    ruff and mypy
# make venv    only the environment, .venv
#
# TORCH chooses the torch that the environment gets, e.g. make venv TORCH="torch==2.14.1 torchvision"

PYTHON ?= python3
TORCH ?= torch torchvision
BIN := .venv/bin

.PHONY: demo test lint venv
.DELETE_ON_ERROR:

demo: venv
	$(BIN)/python tools/demo.py

test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

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
