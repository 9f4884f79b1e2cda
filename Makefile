# Every command does all of its own set-up. `make help` lists them.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q

.DEFAULT_GOAL := help
.PHONY: help demo test families lint format docs gpu venv clean

help:  ## List the commands
	@echo "make COMMAND [PYTHON=python3.12 VENV=.venv312]"
	@echo
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  %-8s %s\n", $$1, $$2 }' Makefile
	@echo
	@echo "VENV is the folder of the virtual environment (default: .venv). PYTHON is the interpreter that makes it."
	@echo "A second Python needs a folder of its own: make test PYTHON=python3.12 VENV=.venv312"

demo: $(VENV)/.ready  ## Train a vision-language model to read handwritten numbers (a few minutes on a CPU, no download)
	$(BIN)/python recipes/sft_vlm.py

test: lint docs  ## Run lint, build the docs, then all tests in two processes (what CI runs)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

families: $(VENV)/.ready-for-tests  ## Train every known architecture, tiny, and write docs/models.md (half an hour)
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python tests/families/table.py

lint: $(VENV)/.ready-for-tests  ## Check style, formatting, types and the import rules
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.ready-for-tests  ## Format the code and apply ruff's safe fixes
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.ready-for-tests  ## Build the documentation into site/; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

gpu: $(VENV)/.ready-for-tests  ## Run what needs a CUDA device: the tests marked gpu, and the step times
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/step_time.py --hidden 2048 --layers 16 --batch 8 --length 1024 --rounds 3

venv: $(VENV)/.ready-for-tests  ## Make the virtual environment, with all that development needs

$(VENV)/.ready: pyproject.toml constraints.txt
	@echo "Installing torch, transformers, TRL and the rest into $(VENV) (once, a few minutes)"
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) -c constraints.txt -e ".[all]"
	@touch $@

# See tests/requirements.txt. Triton has a folder of its own: where it can be imported and there is no GPU, parts of
# torch and transformers fail. The tests that run its interpreter put it on the path of their processes.
$(VENV)/.ready-for-tests: $(VENV)/.ready tests/requirements.txt
	@echo "Installing what tests and lint need into $(VENV)"
	@$(PIP) -c constraints.txt -e ".[all,dev]"
	@$(PIP) --no-deps -r tests/requirements.txt
	@$(PIP) --no-deps -c constraints.txt --upgrade --target $(VENV)/triton triton
	@touch $@

clean:  ## Delete the virtual environment and all outputs
	rm -rf $(VENV) outputs site
