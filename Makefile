# Needs Python 3.11 or newer and make, nothing else: every target prepares .venv first (8 GB with torch's CUDA, 11 GB until
# it is installed).
PYTHON ?= python3
# Ours is an environment that holds `ready`, from its first moment on. One of another program (`uv run`) is left alone.
VENV := $(shell if [ -L .venv ] || { [ -e .venv ] && ! [ -e .venv/ready ]; }; then echo .venv-make; else echo .venv; fi)
BIN := $(VENV)/bin
READY := $(VENV)/ready

.PHONY: install search test test-all test-fast check docs lock clean

install: $(READY)

# Exact versions with hashes from requirements.lock, on every machine the same.
$(READY): requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.12 ..." % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	@[ $(VENV) = .venv ] || echo "note: .venv was not made by this Makefile and is left as it is; using $(VENV)" >&2
	@[ -e $@ ] || { mkdir $(VENV) && touch -d 2000-01-01 $@; }
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV)
	@echo "installing requirements.lock into $(VENV): 3 GB of downloads, some minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

# make search ARGS="search_spaces/quick.yaml --dataset mnist"
search: $(READY)
	$(BIN)/python scripts/search.py $(ARGS)

# All that every change is tried with. Tests that start Ray wait most of their time: three of them keep two cores busy.
test: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not long" $(ARGS)

# Rarer faults as well: before a release, and after a change to what survives them.
test-all: $(READY)
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder $(ARGS)

# Without the tests that start Ray.
test-fast: $(READY)
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow" $(ARGS)

# What CI checks besides the tests: the hooks of .pre-commit-config.yaml.
check: $(READY)
	$(BIN)/pre-commit run --all-files

# The pages as a site in site/, with search; a broken link fails. With --quiet, MkDocs would not count one.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build
	@echo "look at it with: $(BIN)/python -m http.server --bind 127.0.0.1 --directory site"

# Newest versions that pyproject.toml allows; needs uv. No index address gets into the file.
lock:
	uv pip compile pyproject.toml --extra dev --universal --generate-hashes --upgrade --quiet \
		--no-emit-index-url --no-emit-find-links --no-annotate --no-header -o requirements.lock

clean:
	[ ! -e $(READY) ] || rm -rf $(VENV)
	rm -rf .mypy_cache .pytest_cache .ruff_cache .hypothesis
