# make demo: compress the bundled example network for this machine (20 minutes on two cores, installation included)
# make demo-arm: the same search for two emulated 64-bit ARM boards (needs g++-aarch64-linux-gnu and qemu-user-static)
# make check: the fast checks: style, types, layers, and the tests that need no search and no emulator (two minutes)
# make test: all checks, as in continuous integration; some need the packages that .ci/run installs, and are skipped without
# make docs: the documentation as a web site, in build/docs
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find tvm_lowrank search targets -type f ! -name '*.pyc')

.PHONY: demo demo-arm check test docs style

demo: $(VENV)/.installed
	$(BIN)/tvm_lowrank search --target x86 --budget 1% --out demo --resume

demo-arm: $(VENV)/.installed
	$(BIN)/tvm_lowrank doctor --target arm --emulate
	$(BIN)/tvm_lowrank search --target arm --emulate --budget 1% --methods spatial,spatial_rows --trials 2 \
		--out demo-arm --resume

# one process for each core; PATIENCE: a busy machine need not be waited for
PYTEST := OMP_NUM_THREADS=1 TVM_LOWRANK_PATIENCE=0 $(BIN)/pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

check: style
	$(PYTEST) -m "not slow and not needs"

# training computes in bfloat16 where the processor does; CI sees both
test: style
	TVM_LOWRANK_BFLOAT16=0 $(PYTEST)
	TVM_LOWRANK_BFLOAT16=1 $(PYTEST) tests/search/fit

# mypy and lint-imports run in $(VENV), where they find the installed package: only there search/ and targets/ are part
# of it
style: $(VENV)/.installed $(VENV)/.tools
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml
	cd $(VENV) && bin/lint-imports ../pyproject.toml

# the options of functions come from the installed package
docs: $(VENV)/.docs $(VENV)/.installed
	$(BIN)/mkdocs build --strict

# the stamps keep the downloads from being repeated until the dependencies change
$(VENV)/.dependencies: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt .
	touch $@

$(VENV)/.tools: $(VENV)/.dependencies
	$(BIN)/pip install -c constraints.txt '.[test]'
	touch $@

$(VENV)/.docs: $(VENV)/.dependencies
	$(BIN)/pip install -c constraints.txt '.[docs]'
	touch $@

# setuptools would install files again that were deleted here but are still in build/
$(VENV)/.installed: $(VENV)/.dependencies README.md LICENSE $(SOURCES)
	rm -rf build
	$(BIN)/pip install --no-deps --force-reinstall .
	touch $@
