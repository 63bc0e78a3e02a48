# Each target sets up what it needs: cargo, a C compiler, make and Python 3.10+ (with venv) are enough.
# Set PYTHON to choose the interpreter, TORCH to choose the torch version: make test PYTHON=python3.12

PYTHON ?= python3
TORCH ?= 2.11.0

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip
RUST := Cargo.toml Cargo.lock build.rs pyproject.toml $(shell find src -type f)
NATIVE := $(shell find native -type f -not -name '*.so' -not -name '*.pyc')

# maturin builds for the environment that VIRTUAL_ENV names; an active conda would contradict it.
export VIRTUAL_ENV := $(CURDIR)/$(VENV)
unexport CONDA_PREFIX
# maturin calls pip as well, and passes no options on.
export PIP_QUIET := 1
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-rust test-python lint format bench tables wheel native venv clean distclean

help:
	@echo 'make demo     draws scenes, trains on them, compares, searches; writes out/demo/report.html'
	@echo 'make test     all tests, Rust and Python'
	@echo 'make lint     formatting, clippy, ruff, mypy, stubs'
	@echo 'make bench    the benchmarks; writes benchmarks/results/ and the tables of README.md'
	@echo 'make wheel    the wheels and the source distribution, checked, in dist/'
	@echo 'make native   the encoders in Rust (laps-rs-native) in $(VENV)/'
	@echo 'make venv     only what the others need first: $(VENV)/ with torch $(TORCH) and the built package'
	@echo 'make clean    remove what was built (make distclean: also $(VENV)/)'

# ---- set-up: stamps in .venv/ remember what is done ------------------------------------------------------------------

$(VENV)/.stamp-venv:
	@command -v cargo >/dev/null || { echo 'make: cargo is missing; install Rust from https://rustup.rs' >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo 'make: $(PYTHON) is not Python 3.10 or newer (choose one: make PYTHON=python3.12 ...)' >&2; exit 1; }
	@echo '[venv] creating $(VENV)/ with $(PYTHON)'
	@$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade 'pip>=25.1'
	@touch $@

$(VENV)/.stamp-tools: pyproject.toml $(VENV)/.stamp-venv
	@echo '[venv] installing torch $(TORCH) and the tools (the first time: about 5 GB on disk)'
	@# torchvision here, or installing the package would bring the newest, and that another torch.
	@$(PIP) install 'torch==$(TORCH)' torchvision --group dev
	@touch $@

$(VENV)/.stamp-native: $(RUST) $(VENV)/.stamp-tools
	@echo '[venv] building the native module'
	@$(BIN)/maturin develop --release --locked --quiet
	@touch $@

$(VENV)/.stamp-bench: pyproject.toml $(VENV)/.stamp-tools
	@$(PIP) install --group bench || echo '[bench] no maxsim-cpu for this machine: its comparison is left out' >&2
	@touch $@

# tch asks the `python` of the environment where libtorch is.
TCH := PATH="$(CURDIR)/$(BIN):$$PATH"

$(VENV)/.stamp-encoders: $(RUST) $(NATIVE) $(VENV)/.stamp-tools
	@echo '[native] building the encoders in Rust'
	@$(TCH) $(BIN)/maturin develop --locked --quiet --manifest-path native/Cargo.toml
	@touch $@

native: $(VENV)/.stamp-encoders

venv: $(VENV)/.stamp-native

# ---- the work ----------------------------------------------------------------------------------------------------------

demo: venv
	@$(BIN)/laps demo --out out/demo

test: test-rust test-python

test-rust: venv
	@echo '[test] cargo test'
	@$(TCH) cargo test --locked --quiet --features cuda,index,torch

test-python: venv native
	@# A broken one would only skip its tests.
	@$(BIN)/python -c 'import laps.encoders.native'
	@echo '[test] pytest'
	@$(BIN)/python -m pytest --quiet --numprocesses logical --maxprocesses 8 --dist worksteal

lint: venv native
	@echo '[lint] cargo fmt, clippy, doc'
	@cargo fmt --check
	@cargo clippy --locked --quiet --all-targets -- --deny warnings
	@cargo clippy --locked --quiet --all-targets --features python,cuda -- --deny warnings
	@# With profiles and features as for building and testing, or torch-sys (minutes) would be compiled once more.
	@$(TCH) cargo clippy --locked --quiet --all-targets --features cuda,index,torch -- --deny warnings
	@$(TCH) cargo clippy --locked --quiet --all-targets --package laps-rs-native --profile native -- --deny warnings
	@$(TCH) RUSTDOCFLAGS='--deny warnings' cargo doc --locked --quiet --no-deps --features cuda,index,torch
	@echo '[lint] ruff, mypy, stubs, tables'
	@$(BIN)/ruff check --quiet
	@$(BIN)/ruff format --check --quiet
	@$(BIN)/mypy --no-error-summary python/laps python/laps_command benchmarks scripts
	@$(BIN)/python -m mypy.stubtest laps._laps
	@# torch first: it brings the libraries that this module is linked to.
	@$(BIN)/python -c 'import sys, torch; from mypy.stubtest import main; sys.argv[1:] = ["laps_native._native"]; sys.exit(main())'
	@$(BIN)/python -m benchmarks.tables --check

format: venv
	@cargo fmt
	@$(BIN)/ruff check --quiet --fix
	@$(BIN)/ruff format --quiet

# Some five hours on two cores, most of them for the comparisons of heads.
bench: venv native $(VENV)/.stamp-bench
	@$(BIN)/python -m benchmarks.head
	@$(BIN)/python -m benchmarks.heads
	@$(BIN)/python -m benchmarks.max_sim
	@$(BIN)/python -m benchmarks.evaluation
	@$(BIN)/python -m benchmarks.training
	@$(BIN)/python -m benchmarks.encoders
	@$(BIN)/python -m benchmarks.demo
	@$(BIN)/python -m benchmarks.grounding
	@$(BIN)/python -m benchmarks.search
	@$(BIN)/python -m benchmarks.compare scenes
	@$(BIN)/python -m benchmarks.compare scenes-ablation
	@$(BIN)/python -m benchmarks.tables

tables: venv
	@$(BIN)/python -m benchmarks.tables

# On Linux zig links against the glibc of manylinux_2_28, whatever the glibc of this machine. --sdist builds the wheel
# from the unpacked source distribution, so that what is missing in that one fails here.
ifeq ($(shell uname -s),Linux)
PORTABLE := --compatibility manylinux_2_28 --zig
endif

wheel: $(VENV)/.stamp-tools
	@echo '[wheel] building the source distribution, and the wheel from it'
	@rm -rf dist
	@PATH="$(VIRTUAL_ENV)/bin:$$PATH" CARGO_TARGET_DIR=$(CURDIR)/target/wheel \
	  $(BIN)/maturin build --release --locked --strip --sdist $(PORTABLE) --out dist --quiet
	@echo '[wheel] building the wheel of the native encoders'
	@$(TCH) $(BIN)/maturin build --locked --strip --manifest-path native/Cargo.toml --out dist --quiet
ifeq ($(shell uname -s),Linux)
	@$(BIN)/python scripts/check_wheel.py
endif
	@ls dist

clean:
	rm -rf target dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis $(VENV)/.stamp-native $(VENV)/.stamp-encoders python/laps/*.so native/python/laps_native/*.so
	find python tests benchmarks scripts -name __pycache__ -prune -exec rm -rf {} +

distclean: clean
	rm -rf $(VENV)
