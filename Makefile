# Each target makes its own .venv. TORCH is what pip is given for torch: a small CPU wheel by default; on a GPU machine,
# say `make test TORCH=torch`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
BIN := .venv/bin

.PHONY: demo wheel test test-lowest lint examples docs bench aot reliability fuzz clean

demo: .venv/base
	rm -rf demo
	$(BIN)/minimax-jax demo demo

# The wheel, left in dist/ once its commands work in clean environments: without torch, and with that of .venv.
wheel: .venv/test
	.ci/wheel $(CURDIR)/.venv

test: .venv/test
	$(BIN)/pytest

# What the ranges of dependencies begin with, but for what only tests need: the newest is what `make test` has. Of torch,
# both have TORCH, with which its range begins: older ones cannot exchange FP8 arrays with others (DLPack).
LOWEST_TESTS ?= tests/test_safetensors_reader.py tests/test_conversion.py tests/test_verify.py tests/test_cli.py \
	tests/test_orbax.py tests/test_orbax_refusals.py tests/test_orbax_shardings.py tests/test_orbax_source.py tests/test_load.py \
	tests/test_torch_arrays.py tests/test_torch_fp8.py tests/test_host_lines.py tests/test_report.py tests/test_report_page.py

test-lowest: .venv-lowest/test
	.venv-lowest/bin/pytest $(LOWEST_TESTS)

lint: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

examples: .venv/test
	for example in examples/*.py; do echo "== $$example" && $(BIN)/python $$example || exit 1; done

# The site opens from the disk, and has nothing fetched. The notebook in it is run, by a kernel that would warn that it
# speaks to this machine without encryption.
docs: .venv/docs
	mkdir -p build/ipython/profile_default
	echo 'c.IPKernelApp.log_level = "ERROR"' > build/ipython/profile_default/ipython_kernel_config.py
	IPYTHONDIR=$(CURDIR)/build/ipython NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet --strict
	! grep -rlE '(src|<link [^>]*href)="?https?://' build/site --include='*.html'
	@echo "build/site/index.html"

bench: .venv/test
	$(BIN)/pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks.speed $(BENCH_FLAGS)
	$(BIN)/python -m benchmarks.torch_adapter $(TORCH_BENCH_FLAGS)

# The compilers go into a folder of their own: jax takes every plugin that it finds for a device that is there. The CUDA
# plugin has to be of jax's version; a newer libtpu than jax asks for compiles the codec to a third of the traffic.
aot: .venv/base build/aot
	PYTHONPATH=$(CURDIR)/build/aot $(BIN)/python -m benchmarks.aot $(AOT_FLAGS)

build/aot: pyproject.toml
	$(BIN)/pip install --quiet --no-deps --upgrade --target $@ "libtpu==0.0.52" nvidia-cuda-nvcc-cu12 \
		$$($(BIN)/python -c 'import jax; [print(f"jax-cuda12-{name}=={jax.__version__}") for name in ("plugin", "pjrt")]')
	touch $@

reliability: .venv/test
	$(BIN)/python benchmarks/reliability.py --output docs/reliability.md $(RELIABILITY_FLAGS)

# Guided by coverage, FUZZ_SECONDS for each parser; what it finds lies in build/fuzz. atheris runs on Linux, Python 3.11
# to 3.13.
FUZZ_SECONDS ?= 10
FUZZ_TARGETS := header index config journal sidecar certificate contents archive

fuzz: .venv/test
	$(BIN)/pip install --quiet "atheris>=3.0"
	for target in $(FUZZ_TARGETS); do mkdir -p build/fuzz/$$target && JAX_PLATFORMS=cpu $(BIN)/python \
		tests/fuzz/fuzz_parsers.py $$target build/fuzz/$$target tests/fuzz/corpus/$$target -timeout=20 \
		-max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=2048 -artifact_prefix=build/fuzz/ || exit 1; done

clean:
	rm -rf .venv .venv-lowest demo dist

.venv/base: pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --editable .
	touch $@

.venv/docs: .venv/base
	$(BIN)/pip install --quiet --editable ".[docs]"
	touch $@

# torch goes first, so that nothing else pulls another build of it. NeMo AutoModel, the tests' oracle for the native
# layout, names dependencies by the gigabyte that its adapter does not need: it is installed without them.
.venv/test: .venv/base
	$(BIN)/pip install --quiet "$(TORCH)"
	$(BIN)/pip install --quiet --editable ".[test,dev]"
	$(BIN)/pip install --quiet --no-deps "nemo-automodel>=0.7,<0.8"
	touch $@

.venv-lowest/test: .venv/base
	$(BIN)/pip install --quiet uv
	test -x .venv-lowest/bin/python || $(PYTHON) -m venv .venv-lowest
	UV_FIND_LINKS=$(PIP_FIND_LINKS) $(BIN)/uv pip install --quiet --python .venv-lowest/bin/python --resolution lowest-direct \
		"$(TORCH)" "pytest>=8.2" "pytest-xdist>=3.5" "hypothesis>=6.100" "moto[server]>=5.0.28" \
		--editable ".[fast,hub,orbax,remote,report,torch]"
	touch $@
