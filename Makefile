# Each target sets up what it needs. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

.PHONY: setup test lint demo test-lowest plans bench-prediction

setup: $(VENV)/.done

# torch comes first and alone, so that nothing else chooses its version.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest -n auto

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: setup
	$(BIN)/bitplan demo

# The tests on the lowest transformers, optuna and pydantic that pyproject.toml names.
test-lowest: $(LOWEST)/.done
	$(LOWEST)/bin/python -m pytest -n auto

$(LOWEST)/.done: pyproject.toml constraints.txt constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install -q -c constraints.txt torch
	$(LOWEST)/bin/pip install -q -c constraints-lowest.txt -e ".[dev]"
	touch $@

# The embedded model's plans at three budgets, made again.
plans: setup
	for bpw in 3 4 6; do \
	  $(BIN)/bitplan plan planner/demo/model --text planner/demo/text/calibration.txt \
	    --heldout planner/demo/text/heldout.txt --bpw $$bpw --force -o plans/demo-$$bpw-bpw.json || exit 1; \
	done

# How well the predicted losses order units and formats, against measuring each alone (about 4 minutes).
bench-prediction: setup
	$(BIN)/python -m benchmarks.prediction
