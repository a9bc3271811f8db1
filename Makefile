# Every command a developer needs. `make demo` and `make test` work on a fresh clone: they set up .venv first.
PYTHON ?= python3
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
BENCH_ARGS ?=
PEER_ARGS ?= --all --layers 1 --vocabulary 16000
BIN := $(VENV)/bin
SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' 2>/dev/null)

.PHONY: setup demo check format test test-gpu bench bench-pytest wheel clean

setup: $(VENV)/installed  ## a virtual environment with fastmerge and all its tools

$(VENV)/installed: pyproject.toml setup.py CMakeLists.txt constraints.txt $(SOURCES)
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,demo,plot]'
	touch $@

demo: setup  ## train small networks on real images, merge them by every method, compare
	$(BIN)/fastmerge demo $(DEMO_ARGS)

check: setup  ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(SOURCES)
	$(BIN)/mypy

format: setup  ## rewrite sources in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(SOURCES)

test: setup  ## all tests that need no GPU
	$(BIN)/python -m pytest -q -m "not gpu" $(TEST_ARGS)

test-gpu: setup  ## the tests that need one
	$(BIN)/python -m pytest -q -m gpu $(TEST_ARGS)

bench: setup  ## operators against their references and the machine's limits, and small merges against other programs
	$(BIN)/python -m fastmerge.benchmarks.run $(BENCH_ARGS)
	$(BIN)/python -m fastmerge.benchmarks.merges.peers build/peers $(PEER_ARGS)

bench-pytest: setup  ## the operators' declarations under pytest-benchmark
	$(BIN)/python -m pytest -o addopts= --import-mode=importlib benchmarks/test_operators.py --benchmark-only $(BENCH_ARGS)

wheel: setup  ## dist/*.whl
	$(BIN)/python -m build --wheel --outdir dist .

clean:
	rm -rf build dist $(VENV) fastmerge/_C*.so
