# make demo      everything from raw text to a reasoning model, on two cores (sets itself up; stop and repeat at will)
# make chat      talk to SmolLM2, a small published model (sets itself up; PROMPT="..." asks once)
# make test      all tests but the slow ones          make check     lint, types, import law, quick tests
# make test-full the slow ones too                    make setup     the environment alone
#
# PYTHON=python3.12 chooses another interpreter; PIP_FLAGS="--index-url ..." another package index.

VENV  := .venv
BIN   := $(VENV)/bin
STAMP := $(VENV)/.stamp
# two processes of one thread each: the tests' tensors are too small to share among threads
PYTEST := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

.PHONY: demo chat test test-full check setup
.DEFAULT_GOAL := demo

demo: $(STAMP)-rl
	@$(BIN)/abyssal run runs/laptop.toml

chat: $(STAMP)-core
	@$(BIN)/abyssal chat smollm2 $${PROMPT:+--prompt "$$PROMPT"}

test: $(STAMP)-dev
	@$(PYTEST) tests

test-full: $(STAMP)-dev
	@$(PYTEST) -m '' tests

check: $(STAMP)-dev
	@$(BIN)/ruff check -q abyssal tests bench
	@$(BIN)/mypy --no-error-summary
	@$(PYTEST) -m 'not slow and not way' tests

setup: $(STAMP)-dev

# A stamp is younger than what it was installed from, or pip runs again.
$(STAMP)-core: pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" sh .ci/setup $(VENV)
	@touch $@

$(STAMP)-rl: pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" sh .ci/setup $(VENV) rl,data
	@touch $@ $(STAMP)-core

$(STAMP)-dev: pyproject.toml constraints.txt
	@PYTHON="$(PYTHON)" PIP_FLAGS="$(PIP_FLAGS)" sh .ci/setup $(VENV) rl,data,dev
	@touch $@ $(STAMP)-rl $(STAMP)-core
