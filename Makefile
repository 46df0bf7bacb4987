# Each target sets up what it needs. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
LOWEST := .venv-lowest

.PHONY: setup test test-all test-faults gpu zoo fuzz lint demo wheel-smoke test-lowest plans bench-prediction bench-rounding bench-one-bit bench-layout \
	bench-exports bench-audit bench-memory bench-speed bench-compare bench-interval bench-search bench-reduced bench-real \
	bench-double-quant bench-rotation bench-calibration bench-planners bench-k-quants bench-tuned-starts

setup: $(VENV)/.done

# torch comes first and alone, so that nothing else chooses its version.
$(VENV)/.done: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt torch
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

# Files go to the workers whole, the longest first (tests/conftest.py).
test: setup
	$(BIN)/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

# Also the slow tests: every causal LM class of transformers that can be built tiny (15 minutes on one core).
test-all: setup
	$(BIN)/python -m pytest -n auto --dist worksteal -m "not faults"

# Long commands that are killed, run beside each other, on a full disk, on a cache with flipped bits (half an hour on one
# core; KILLS=5 for less).
KILLS ?= 20
test-faults: setup
	KILLS=$(KILLS) $(BIN)/python -m pytest -s -m faults tests/faults

# All that only a GPU shows, in ten minutes on one card; without one, a sentence.
gpu: setup
	$(BIN)/python -m benchmarks.gpu

# docs/zoo.md, the table of those classes.
zoo: setup
	$(BIN)/python -m tests.zoo.table

# The readers of files from outside, on random changes: SECONDS for each (all: 6 minutes).
SECONDS ?= 60
fuzz: setup
	SECONDS=$(SECONDS) $(BIN)/python -m pytest tests/attacks/test_fuzz.py

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

# The tests on the lowest versions that constraints-lowest.txt names.
test-lowest: $(LOWEST)/.done
	$(LOWEST)/bin/python -m pytest -n auto --dist loadfile --no-loadscope-reorder

$(LOWEST)/.done: pyproject.toml constraints.txt constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/pip install -q -c constraints.txt torch
	$(LOWEST)/bin/pip install -q -c constraints-lowest.txt -e ".[dev]"
	touch $@

# Make the plans of the embedded model at three budgets again.
plans: setup
	for bpw in 3 4 6; do \
	  $(BIN)/bitplan plan planner/demo/model --text planner/demo/text/calibration.txt \
	    --heldout planner/demo/text/heldout.txt --bpw $$bpw --force -o plans/demo-$$bpw-bpw.json || exit 1; \
	done

# Compare bitplan's roundings with four other tools, each in its own environment (two hours).
# ALSO="--also MODEL TEXT HELDOUT" adds models to the embedded one.
bench-rounding: setup
	$(BIN)/python -m benchmarks.rounding $(ALSO)

# The same on SmolLM2-135M from the registry, beside mixed plans of the same bytes (hours; each row is kept when done). By
# 8192 tokens, its plot is docs/real.svg, of all rows that are kept.
# TEXT and HELDOUT are text files; METHODS="yaqa" BITS=4 makes one row, TOKENS=32768 of as much text as plans read.
METHODS ?= nearest,gptq,yaqa,tuned,plan,plan-whole,bitsandbytes,hqq,gptqmodel,auto-round
BITS ?= 4,3,2
TOKENS ?= 8192
bench-real: setup
	$(BIN)/pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m benchmarks.rounding --only-also --also "$$($(BIN)/python -m benchmarks.real_model)" $(TEXT) $(HELDOUT) \
	  --tokens $(TOKENS) --methods $(METHODS) --bits $(BITS) $(if $(filter 8192,$(TOKENS)),--picture docs/real.svg)

# Bitplan's plans beside other planners', at equal bytes of linear layers and at equal total bytes (two hours).
# ALSO="--averages 3.5 --arms linears everything" makes some of the rows.
bench-planners: setup
	$(BIN)/python -m benchmarks.planners $(ALSO)

# Plans beside llama.cpp's K-quants at equal file bytes, on the same model (an hour).
bench-k-quants: setup
	$(BIN)/pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m benchmarks.k_quants "$$($(BIN)/python -m benchmarks.real_model)" $(TEXT) $(HELDOUT)

# How much calibration text, and which, rounding gains from (10 minutes). ALSO="--also MODEL TEXT HELDOUT" adds models.
bench-calibration: setup
	$(BIN)/python -m benchmarks.calibration $(ALSO)

# Where tuned should start, by the number of calibration tokens (20 minutes). ALSO="--also MODEL TEXT HELDOUT"
bench-tuned-starts: setup
	$(BIN)/python -m benchmarks.tuned_starts $(ALSO)

# Whether offline rotation and rows lose less than groups at equal bytes, on the same model (half an hour).
bench-rotation: setup
	$(BIN)/pip install -q -c constraints.txt -e ".[gguf]"
	$(BIN)/python -m benchmarks.rotation "$$($(BIN)/python -m benchmarks.real_model)" $(TEXT) $(HELDOUT)

# Whether a model below 2 bits per weight beats a bigram of its calibration text (about 2 minutes).
bench-one-bit: setup
	$(BIN)/python -m benchmarks.one_bit

# Held-out KL of formats with double-quantized scales, and of plans with and without them (about 10 minutes).
# ALSO="--also MODEL TEXT HELDOUT" adds models to the embedded one.
bench-double-quant: setup
	$(BIN)/python -m benchmarks.double_quant $(ALSO)

# Whether gptqmodel and auto-gptq compute the same logits from bitplan's GPTQ layout (2 minutes, 10 GB of environments).
bench-layout: setup
	$(BIN)/python -m benchmarks.gptq_layout

# Whether the tools that exports are for read them as reported (3 minutes, and 15 to set up their environments and
# llama-quantize).
bench-exports: setup
	$(BIN)/python -m benchmarks.exports

# Compare estimated and measured memory: six plans, two contexts (6 minutes). ALSO="--8b --device cuda"
bench-memory: setup
	$(BIN)/python -m benchmarks.memory $(ALSO)

# Tokens per second of every format, compared with three other tools. ALSO="--8b --device cuda"
bench-speed: setup
	$(BIN)/python -m benchmarks.speed $(ALSO)

# Rank correlation of predicted losses with those measured for each unit alone (about 4 minutes).
bench-prediction: setup
	$(BIN)/python -m benchmarks.prediction

# Seconds and peak memory of an audit by tier and model size (15 minutes). ALSO="--sizes 1500", ALSO="--tiers measured",
# ALSO="--sizes 60 --peers" adds AutoScheme and ModelOpt (half an hour and their environments).
bench-audit: setup
	$(BIN)/python -m benchmarks.audit $(ALSO)

# Ten rows of `bitplan compare` from an empty cache, on the bundled task; its plot is docs/frontier.svg (5 minutes).
bench-compare: setup
	$(BIN)/python -m benchmarks.compare

# Coverage of the paired 95 % interval for known differences (10 minutes). ALSO="--also MODEL TEXT"
bench-interval: setup
	$(BIN)/python -m benchmarks.interval $(ALSO)

# The search beside the knapsack alone, uniform plans, high first and last layers, and random draws (an hour).
# ALSO="--also MODEL TEXT HELDOUT" adds models to the embedded one; ALSO="--knapsack" is the solver alone.
bench-search: setup
	$(BIN)/python -m benchmarks.search $(ALSO)

# Samplers beside each other where the optimum is known (10 minutes). ALSO="--arms gp" needs nothing, "cma-es" cmaes.
bench-reduced: setup
	$(BIN)/python -m benchmarks.reduced $(ALSO)
