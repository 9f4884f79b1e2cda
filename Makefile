# make demo: a vision-language model learns to read handwritten numbers, in a few minutes, nothing to download.
# make test: lint, types, all tests. Both make their own virtual environment first; `make venv` does only that.
# make gpu: what needs a CUDA device: the tests marked `gpu`, and the step times at a size that fills one.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --disable-pip-version-check -q

.PHONY: demo test gpu venv clean

demo: venv
	$(BIN)/python recipes/sft_vlm.py

test: venv $(VENV)/.ready-for-tests
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -n 2 --dist worksteal

gpu: venv $(VENV)/.ready-for-tests
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python benchmarks/step_time.py --hidden 2048 --layers 16 --batch 8 --length 1024 --rounds 3

venv: $(VENV)/.ready

$(VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) -c constraints.txt -e ".[dev]"
	touch $@

# See tests/requirements.txt. Triton lies in a folder of its own: where it can be imported and there is no GPU, parts of
# torch and transformers fail; the tests that run its interpreter put it on the path of their processes.
$(VENV)/.ready-for-tests: $(VENV)/.ready tests/requirements.txt
	$(PIP) --no-deps -r tests/requirements.txt
	$(PIP) --no-deps -c constraints.txt --upgrade --target $(VENV)/triton triton
	touch $@

clean:
	rm -rf $(VENV) outputs
