# Each target makes the virtual environment first, if it is missing or older than what it is made from.

PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# Where figures of a CUDA device are kept, and what its tests do about packages that are not there and about warnings.
FIGURES := docs
CUDA_TESTS := --continue-on-collection-errors -W default
ON_CUDA = @$(BIN)/python -c 'import sys, torch; torch.cuda.is_available() or sys.exit("There is no CUDA device here, so nothing was run. On a machine with one, install a CUDA build of torch into .venv.")'
gpu matrix: export PYTHONPATH := $(CURDIR)$(if $(PYTHONPATH),:$(PYTHONPATH))

# Nothing is looked up on the network at run time.
export HF_HUB_OFFLINE := 1
export HF_DATASETS_OFFLINE := 1

.PHONY: help demo test qlora lint bench gpu matrix picture clean

help:
	@echo "make demo     read eight times further: extend the default model, print the table"
	@echo "make test     run all tests"
	@echo "make qlora    install bitsandbytes and run the tests that need it"
	@echo "make lint     check style, format and types"
	@echo "make bench    measure attention over patterns against a matrix product"
	@echo "make gpu      measure and test the kernels on a CUDA device"
	@echo "make matrix   run every test that needs a CUDA device"
	@echo "make picture  draw docs/patterns.svg anew"
	@echo "make clean    remove what these have made, the virtual environment included"

demo: $(READY)
	rm -rf out/demo
	$(BIN)/longspan demo --output out/demo

# Two processes of one thread each: the tests are many and small. Each has half of the files, and takes from the other at the
# end, so that what a file prepares is prepared once.
test: $(READY)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist worksteal

# By themselves: whatever imports peft imports bitsandbytes where it is.
qlora: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt bitsandbytes
	$(BIN)/python -m pytest tests/test_extend_qlora.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY)
	$(BIN)/python benchmarks/attention.py --json out/attention.json

# Tables first, then one test of each kind. What fails stops nothing, and is named at the end. After a fault of the device
# nothing runs in a process any more, so programs of our own are tested in another. Compilers warn of their own doings, so
# warnings are no errors there. Where no network is, a Python that has torch for CUDA, pytest, pytest-timeout
# and hypothesis will do, and nothing is installed:
#     make gpu READY= BIN=/path/to/bin
gpu: $(READY)
	$(ON_CUDA)
	@failed=; \
	step() { name="$$1"; shift; echo "$$*"; "$$@" || failed="$$failed $$name"; }; \
	step gpu.py $(BIN)/python benchmarks/gpu.py --json $(FIGURES)/gpu.json --table $(FIGURES)/gpu.md; \
	step attention.py $(BIN)/python benchmarks/attention.py --device cuda --dtype bfloat16 --json $(FIGURES)/attention.cuda.json; \
	step tests $(BIN)/python -m pytest tests -m 'cuda and brief' -k 'not triton' $(CUDA_TESTS); \
	step triton $(BIN)/python -m pytest tests -m 'cuda and brief' -k triton $(CUDA_TESTS); \
	test -z "$$failed" || { echo "These failed:$$failed" >&2; exit 1; }

matrix: $(READY)
	$(ON_CUDA)
	$(BIN)/python -m pytest tests -m cuda $(CUDA_TESTS)

picture: $(READY)
	$(BIN)/python docs/patterns.py

clean:
	rm -rf longspan/kernel/native/native_*.so .venv out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis

# Torch comes first: the constraint picks its build before anything else can ask for another.
$(READY): pyproject.toml constraints.txt hatch_build.py $(wildcard longspan/kernel/native/cpp/*)
	@$(PYTHON) -c 'import sys; sys.version_info >= (3, 11) or sys.exit("Longspan needs Python 3.11 or newer, got " + sys.version.split()[0] + "; try make PYTHON=python3.12")'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@
