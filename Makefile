# make demo: a vision-language model learns to read handwritten numbers, in a few minutes, nothing to download.
# make test: lint, types, all tests. Both make their own virtual environment first; `make venv` does only that.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test venv clean

demo: venv
	$(BIN)/python recipes/sft_vlm.py

test: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest

venv: $(VENV)/.ready

# The second line: see tests/requirements.txt.
$(VENV)/.ready: pyproject.toml constraints.txt tests/requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --disable-pip-version-check -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install --disable-pip-version-check -q --no-deps -r tests/requirements.txt
	touch $@

clean:
	rm -rf $(VENV) outputs
