# Every target creates the environment first if it is not there. Python 3.11 or newer.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# Small matrix products collapse when several processes share cores with several threads each.
ONE_THREAD := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
export MUJOCO_GL ?= egl

.PHONY: help install demo test test-all lint format docs bench clean

help:
	@echo "make demo      set up, train and evaluate a policy, write runs/demo/report.html"
	@echo "make test      set up and run the tests (test-all: with the slow ones)"
	@echo "make lint      ruff, format check, type check"
	@echo "make docs      build the documentation site into site/"
	@echo "make bench     measure dipole against its peers (PEER_PYTHON=... for LeRobot)"

install: $(STAMP)

$(STAMP): requirements.lock requirements-no-deps.lock pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -r requirements.lock
	$(BIN)/python -m pip install --quiet --no-deps -r requirements-no-deps.lock
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation -e .
	touch $(STAMP)

demo: $(STAMP)
	$(BIN)/dipole demo

test: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2 -m "not slow"

test-all: $(STAMP)
	$(ONE_THREAD) $(BIN)/python -m pytest -n 2

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(STAMP)
	$(BIN)/python docs/generate.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(STAMP)
	$(BIN)/dipole bench $(if $(PEER_PYTHON),--peer-python $(PEER_PYTHON))

clean:
	rm -rf $(VENV) site build dist
