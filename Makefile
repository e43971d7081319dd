# `make demo` and `make test` are all a newcomer needs; both make .venv first.
PYTHON ?= python3
# Where pip looks for torch besides the index it is set up with. For the small CPU build instead of the CUDA one:
#   make demo TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
BIN := .venv/bin
STAMP := .venv/installed
export OMP_NUM_THREADS ?= 1

.PHONY: demo test test-container test-megatron-lm test-bridge test-mcore-next soak check bench bench-gpu golden clean
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

# What touches megatron-core, on the newest of it, in an environment of its own. It asks for Python 3.12 or newer:
#   make test-mcore-next PYTHON_NEXT=/path/to/python3.12
PYTHON_NEXT ?= python3.12
NEXT := .venv-mcore-next
NEXT_TESTS ?= tests/parity tests/convert tests/workers/megatron tests/scale

$(NEXT)/installed: pyproject.toml
	$(PYTHON_NEXT) -m venv $(NEXT)
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) torch==2.13.0
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check -e '.[local,dev]' triton
	@$(NEXT)/bin/python -c 'import sys; sys.version_info < (3, 12) and print("Older than megatron-core allows: forced")'
	$(NEXT)/bin/pip install --quiet --disable-pip-version-check --no-deps --ignore-requires-python 'megatron-core>=0.19,<0.20'
	@touch $@

test-mcore-next: $(NEXT)/installed
	$(NEXT)/bin/pip list --disable-pip-version-check | grep megatron
	$(NEXT)/bin/python -m pytest $(NEXT_TESTS)

# Megatron-LM's own --load and save_checkpoint: make test-megatron-lm MEGATRON_LM=/path/to/checkout of core_v0.16.1.
test-megatron-lm: $(STAMP)
	MEGATRON_LM=$(MEGATRON_LM) $(BIN)/python -m pytest -rs tests/convert/test_megatron_lm.py

# Megatron-Bridge in an environment of its own, since it wants transformers 4; without the CUDA libraries it names.
BRIDGE := .venv-bridge
$(BRIDGE)/installed: $(STAMP)
	$(PYTHON) -m venv $(BRIDGE)
	$(BRIDGE)/bin/pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX)) \
	  torch==2.13.0 megatron-core==0.16.1 'transformers<5' omegaconf hydra-core==1.3.2 safetensors einops psutil rich six tensorboard tqdm
	$(BRIDGE)/bin/pip install --quiet --disable-pip-version-check --no-deps megatron-bridge==0.3.1
	@touch $@

test-bridge: $(BRIDGE)/installed
	MEGATRON_BRIDGE_PYTHON=$(CURDIR)/$(BRIDGE)/bin/python $(BIN)/python -m pytest -rs tests/convert/test_bridge.py

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Five minutes, eight on busy cores; docs/bench.md says what is measured. One section: make bench BENCH="diff --json F".
bench: $(STAMP)
	$(BIN)/python -W ignore -m tests.bench.bench $(BENCH)

# On a machine with an NVIDIA GPU: builds .venv-gpu and measures; docs/bench.md. MEGATRON_LM=PATH compares with a checkout.
bench-gpu:
	$(PYTHON) tests/bench/gpu_setup.py .venv-gpu
	.venv-gpu/bin/python -W ignore -m tests.bench.gpu $(if $(MEGATRON_LM),--megatron-lm $(MEGATRON_LM)) $(BENCH)

# Accepts changed scripts, fingerprints, references and losses: writes tests/golden/ and docs anew; look at the difference
# before you commit.
golden: $(STAMP)
	$(BIN)/python tests/test_render.py
	$(BIN)/python tests/test_fingerprints.py
	$(BIN)/python tests/test_docs.py
	PYTHONPATH=tests $(BIN)/python tests/workers/megatron/test_golden_losses.py

clean:
	rm -rf .venv .venv-gpu $(BRIDGE) $(NEXT) build dist .mypy_cache .ruff_cache .pytest_cache
