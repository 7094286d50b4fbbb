# Two commands on a fresh machine: `make demo` and `make test`. Each sets up .venv with all it needs.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
CPP := $(wildcard csrc/*.cpp csrc/*.hpp csrc/*/*.cpp csrc/*/*.hpp csrc/*/*.cu csrc/*/*.cuh)

.PHONY: demo test lint format bench papers clean

demo: $(VENV)/installed
	$(BIN)/dropscope demo --out dropscope-demo

test: $(VENV)/installed
	$(BIN)/python -m pytest

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(CPP)

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CPP)

bench: $(VENV)/installed
	$(PIP) --group bench
	$(BIN)/python -m bench --readme; status=$$?; $(BIN)/python -m bench.scaling && exit $$status

# Every figure and table of the four papers again: docs/papers.md and docs/papers/.
papers: $(VENV)/installed
	$(BIN)/dropscope reproduce all --out docs

# The tools first, then the package without build isolation, so that an edit of csrc/ rebuilds in seconds.
$(VENV)/tools: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade "pip>=25.1"
	$(PIP) --group dev
	touch $@

$(VENV)/installed: $(VENV)/tools CMakeLists.txt $(CPP)
	PATH="$(abspath $(BIN)):$$PATH" $(PIP) --no-build-isolation --editable ".[demo]"
	touch $@

clean:
	rm -rf build dist $(VENV)
