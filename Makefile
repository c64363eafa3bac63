# Each target makes its own .venv. TORCH is what pip is given for torch: a small CPU wheel by default; on a GPU machine,
# say `make test TORCH=torch`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo test lint examples bench clean

demo: .venv/base
	rm -rf demo
	$(BIN)/minimax-jax demo demo

test: .venv/test
	$(BIN)/pytest

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

examples: .venv/test
	for example in examples/*.py; do echo "== $$example" && $(BIN)/python $$example || exit 1; done

bench: .venv/test
	$(BIN)/python benchmarks/convert.py $(BENCH_FLAGS)

clean:
	rm -rf .venv demo

.venv/base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

# torch goes first, so that nothing else pulls another build of it. NeMo AutoModel, the tests' oracle for the native
# layout, names dependencies by the gigabyte that its adapter does not need: it is installed without them.
.venv/test: .venv/base
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test,dev]"
	$(BIN)/pip install --quiet --no-deps "nemo-automodel>=0.7,<0.8"
	touch $@
