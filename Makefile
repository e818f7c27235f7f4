# Everything runs in .venv, made on the first call from requirements.txt; PYTHON=python3.12 picks another interpreter.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.requirements
FOREIGN := .venv-foreign
DEMO := runs/demo

.PHONY: venv demo test test-slow soak lint format bench bench-foreign bench-torch notebooks results clean

venv: $(STAMP)

$(STAMP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "dynjax needs Python 3.11 or newer; '$(PYTHON)' is $$($(PYTHON) --version 2>&1 || true). Try: make PYTHON=python3.12 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --requirement requirements.txt --editable .
	@touch $(STAMP)

# Train the static twin, then the adaptive net from its weights; evaluate, predict: minutes on two cores.
demo: venv
	$(BIN)/python -m experiments.train digits_unet_static --workdir $(DEMO)_static
	$(BIN)/python -m experiments.train digits_unet_tiles --workdir $(DEMO) --init-from $(DEMO)_static
	$(BIN)/python -m experiments.evaluate --workdir $(DEMO)
	$(BIN)/python -m experiments.predict --workdir $(DEMO) --out $(DEMO)/predictions --budget 0.5 $(DEMO)/examples/*.png
	@echo; cat $(DEMO)/table.txt

test: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup
	XLA_FLAGS= JAX_DISABLE_MOST_OPTIMIZATIONS=0 $(BIN)/python -m pytest -n 2 -m optimised tests/test_optimised.py tests/test_execute.py tests/test_losses.py

test-slow: venv
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m slow

# How reliable it is, in counts: kills, signals, damaged files, random decisions; minutes. Writes benchmarks/results/soak.csv.
soak: venv
	$(BIN)/python tests/soak.py --minutes 10

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/mypy dynjax

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: venv
	$(BIN)/python -m benchmarks.executors
	$(BIN)/python -m benchmarks.thin
	$(BIN)/python -m benchmarks.inside
	$(BIN)/python -m benchmarks.dynamics
	$(BIN)/python -m benchmarks.kernels
	$(BIN)/python -m benchmarks.platform
	$(BIN)/python -m benchmarks.training
	$(BIN)/python -m benchmarks.memory
	$(BIN)/python -m benchmarks.many_classes

# Models that others wrote, made dynamic, in an environment of its own: 10 minutes. PYTHON=python3.12 has more of them.
bench-foreign: $(FOREIGN)/.requirements
	$(FOREIGN)/bin/python -m benchmarks.foreign

# jaxnn asks for torch and torchvision, gigabytes that only its reading of pictures needs.
$(FOREIGN)/.requirements: benchmarks/foreign-requirements.txt pyproject.toml
	@test -x $(FOREIGN)/bin/python || $(PYTHON) -m venv $(FOREIGN)
	$(FOREIGN)/bin/python -m pip install --quiet --requirement benchmarks/foreign-requirements.txt --editable .
	$(FOREIGN)/bin/python -m pip install --quiet --no-deps jaxnn
	@touch $(FOREIGN)/.requirements

# Static nets beside the same in PyTorch and ONNX Runtime: 10 minutes. Unless pip is told otherwise, torch is gigabytes.
bench-torch: $(FOREIGN)/.torch-requirements
	$(FOREIGN)/bin/python -m benchmarks.static_segmenters

$(FOREIGN)/.torch-requirements: benchmarks/torch-requirements.txt pyproject.toml
	@test -x $(FOREIGN)/bin/python || $(PYTHON) -m venv $(FOREIGN)
	$(FOREIGN)/bin/python -m pip install --quiet --requirement benchmarks/torch-requirements.txt --editable .
	@touch $(FOREIGN)/.torch-requirements

# Writes every notebook from its text form and runs it in place, so that it is kept with its pictures: minutes.
notebooks: venv
	$(BIN)/python -m experiments.notebooks

results: venv
	$(BIN)/python -m experiments.results render

clean:
	rm -rf $(DEMO) $(DEMO)_static .pytest_cache .ruff_cache .import_linter_cache .mypy_cache
