# Each target sets up what it needs in .venv; `make PYTHON=/path/to/python3.12 ...` picks the Python.

VENV := .venv
BIN := $(CURDIR)/$(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# The first Python >= 3.11 that runs (a pyenv shim may exist and fail).
PYTHON ?= $(shell for p in python3.13 python3.12 python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && { echo $$p; break; }; done)

# Two files of tests at a time: JAX itself leaves one of two cores idle for much of them.
PARALLEL := --numprocesses 2 --dist loadfile

.PHONY: quickstart phone test test-slow test-plans lint format clean

quickstart: $(VENV)/core.stamp  ## text to a trained model in minutes, on a CPU
	PATH="$(BIN):$$PATH" bash launch/quickstart.sh

phone: $(VENV)/phone.stamp  ## the quickstart's model as an ExecuTorch program, executed and compared
	PATH="$(BIN):$$PATH" bash launch/phone.sh

test: $(VENV)/test.stamp  ## the default suite
	$(BIN)/python -m pytest $(PARALLEL)

test-slow: $(VENV)/test.stamp  ## the slow tests alone
	$(BIN)/python -m pytest -m slow $(PARALLEL)

test-plans: $(VENV)-plan/plan.stamp  ## what compilers of TPUs and GPUs make of the training step
	$(CURDIR)/$(VENV)-plan/bin/python -m pytest -m slow tests/test_plans.py tests/test_compiled_step.py \
		tests/test_compiled_tpu.py

lint: $(VENV)/lint.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/lint.stamp
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-plan build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

$(VENV)/python.stamp:
	@test -n "$(PYTHON)" || { echo "error: no Python >= 3.11 found; use make PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is no Python >= 3.11; use make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/core.stamp: $(VENV)/python.stamp requirements.txt pyproject.toml
	$(PIP) install --editable .
	@touch $@

$(VENV)/phone.stamp: $(VENV)/core.stamp
	$(PIP) install --editable '.[executorch]'
	@touch $@

$(VENV)/test.stamp: $(VENV)/core.stamp
	$(PIP) install --editable '.[test]'
	@touch $@

# An environment of its own: JAX looks for a GPU and a TPU wherever their packages are.
$(VENV)-plan/plan.stamp: $(VENV)/core.stamp
	$(VENV)/bin/python -m venv $(VENV)-plan
	$(VENV)-plan/bin/python -m pip --disable-pip-version-check --quiet install --editable '.[tpu,cuda]' \
		"$$(sed -n 's/.*"\(pytest==[^"]*\)".*/\1/p' pyproject.toml)"
	@touch $@

$(VENV)/lint.stamp: $(VENV)/python.stamp pyproject.toml
	$(PIP) install "$$(sed -n 's/.*"\(ruff==[^"]*\)".*/\1/p' pyproject.toml)"
	@touch $@
