# `make demo` and `make test` are all a newcomer needs; both make .venv first.
PYTHON ?= python3
# Where pip looks for torch besides the index it is set up with. For the small CPU build instead of the CUDA one:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-container soak check bench golden clean
.DELETE_ON_ERROR:

$(STAMP): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or newer is needed: apt-get install python3, or make PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' || { echo "python3-venv is needed: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(BIN)/pip install --quiet --disable-pip-version-check -e '.[local,report,dev]'
	@touch $@

demo: $(STAMP)
	$(BIN)/prism-launch run recipes/demo.yaml --cluster local

test: $(STAMP)
	$(BIN)/python -m pytest -n 2 --dist loadfile

# What `make test` leaves out: repetitions, and faults that wait long on Slurm's own timers.
soak: $(STAMP)
	$(BIN)/python -m pytest -m soak

# Containers by what is installed here: docker, podman, ch-run, Slurm. Part of `make test`.
test-container: $(STAMP)
	$(BIN)/python -m pytest -rs tests/containers tests/cluster/test_containers_on_slurm.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Five minutes, seven on busy cores; docs/bench.md says what is measured. One section: make bench BENCH="diff --json F".
bench: $(STAMP)
	$(BIN)/python -W ignore -m tests.bench.bench $(BENCH)

# Accepts changed scripts, references and losses: writes tests/golden/ and docs anew; look at the difference before you
# commit.
golden: $(STAMP)
	$(BIN)/python tests/test_render.py
	$(BIN)/python tests/test_docs.py
	PYTHONPATH=tests $(BIN)/python tests/workers/megatron/test_golden_losses.py

clean:
	rm -rf .venv build dist .mypy_cache .ruff_cache .pytest_cache
