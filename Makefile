# Each target sets up what it needs. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

.PHONY: setup test lint demo wheel-smoke test-lowest plans bench-prediction bench-rounding bench-one-bit bench-layout \
	bench-exports bench-memory bench-speed bench-compare bench-interval

setup: $(VENV)/.done

# torch comes first and alone, so that nothing else chooses its version.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

demo: setup
	$(BIN)/bitplan demo

# sdist → wheel → a clean environment outside the tree: a plan, an apply, a reload, and the types that mypy and pyright
# find (minutes; 2 GB in the temporary folder).
wheel-smoke: setup
	$(BIN)/python tests/wheel_smoke.py

# The tests on the lowest transformers, optuna and pydantic that pyproject.toml names.
test-lowest: $(LOWEST)/.done
	$(LOWEST)/bin/python -m pytest -n auto --dist loadfile

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

# Whose codes are better, ours or those of four other tools, each in an environment of its own (two hours).
# ALSO="--also MODEL TEXT HELDOUT" adds models to the embedded one.
bench-rounding: setup
	$(BIN)/python -m benchmarks.rounding $(ALSO)

# Whether a model below 2 bits per weight beats a bigram of its calibration text (about 2 minutes).
bench-one-bit: setup
	$(BIN)/python -m benchmarks.one_bit

# Whether gptqmodel and auto-gptq compute from our GPTQ layout what we compute (2 minutes, 10 GB of environments).
bench-layout: setup
	$(BIN)/python -m benchmarks.gptq_layout

# Whether each export is read by its real reader as it was told (3 minutes; the readers' environments and llama-quantize
# are made first, 15 more).
bench-exports: setup
	$(BIN)/python -m benchmarks.exports

# Whether a model takes the memory that was foretold: six plans, two contexts (6 minutes). ALSO="--8b --device cuda"
bench-memory: setup
	$(BIN)/python -m benchmarks.memory $(ALSO)

# Tokens per second of every format, beside three other tools. ALSO="--8b --device cuda"
bench-speed: setup
	$(BIN)/python -m benchmarks.speed $(ALSO)

# How well the predicted losses order units and formats, against measuring each alone (about 4 minutes).
bench-prediction: setup
	$(BIN)/python -m benchmarks.prediction

# Ten rows of `bitplan compare` from an empty cache, on the bundled task; docs/frontier.svg is its picture (5 minutes).
bench-compare: setup
	$(BIN)/python -m benchmarks.compare

# In how many of 100 repetitions the paired interval covers a known difference (10 minutes). ALSO="--also MODEL TEXT"
bench-interval: setup
	$(BIN)/python -m benchmarks.interval $(ALSO)
