# Needs Python 3.11 or newer and make, nothing else: every target prepares .venv first.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: install search test test-all test-fast check lock clean

install: $(READY)

# Exact versions with hashes from requirements.lock, on every machine the same.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# make search ARGS="search_spaces/quick.yaml --dataset mnist"
search: $(READY)
	$(BIN)/python scripts/search.py $(ARGS)

# All that every change is tried with.
test: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not long" $(ARGS)

# Rarer faults as well: before a release, and after a change to what survives them.
test-all: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

# Without the tests that start Ray.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow" $(ARGS)

# What CI checks besides the tests: the hooks of .pre-commit-config.yaml.
check: $(READY)
	$(BIN)/pre-commit run --all-files

# Newest versions that pyproject.toml allows; needs uv. No index address gets into the file.
lock:
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes --upgrade --quiet \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header -o requirements.lock

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .hypothesis build dist
