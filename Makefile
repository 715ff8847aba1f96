# make demo, make test, make soak and make check each install what they need, once, and again when the lock changes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: demo test soak check docs figures bench clean

demo: $(INSTALLED)
	$(BIN)/python examples/digits/make_data.py
	$(BIN)/python examples/digit_scenes/make_data.py
	$(BIN)/python examples/demo.py

# in two processes, each with one thread: networks this small are slower on more
test: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# the tests that take long, or much memory
soak: $(INSTALLED)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m soak

check: $(INSTALLED)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

docs: $(INSTALLED)
	$(BIN)/python docs/generate.py

# runs every command that the pages show, the benchmarks too: about an hour
figures: demo
	$(BIN)/python docs/generate.py
	$(BIN)/python docs/figures.py

bench: $(INSTALLED)
	$(BIN)/python bench/quantize.py
	$(BIN)/python bench/evaluate.py
	$(BIN)/python bench/detection.py
	$(BIN)/python bench/annotations.py
	$(BIN)/python bench/onnx_files.py
	$(BIN)/python bench/analyze.py

# uv, because pip takes minutes for what it does in one; --no-deps, because the lock is complete
$(INSTALLED): requirements/lock.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -r requirements/lock.txt
	$(BIN)/uv pip install --quiet --python $(BIN)/python --no-deps -e .
	touch $@

clean:
	rm -rf $(VENV) results examples/digits/data examples/digit_scenes/data
