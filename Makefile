# Each target does its own set-up: a virtual environment in .venv with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
NAME ?= pretrain
# Further settings for make pretrain, such as ARGS='train.steps=2000 optimizer.lr=1e-3'
ARGS ?=
# One rank a GPU, as many as divide the batch of 24; without GPUs, two ranks on the CPU.
RANKS = $(shell $(BIN)/python -c "import torch; print(max(n for n in (1, 2, 3, 4, 6, 8, 12, 24) if n <= (torch.cuda.device_count() or 2)))")

# Packages of pure Python that a GPU machine without a package index may lack, for `make gpu`.
SITE ?= .site
SITE_PACKAGES = hydra hydra_core-* omegaconf omegaconf-* antlr4 antlr4_python3_runtime-*
ON_GPU = PYTHONPATH=$(SITE) python3 -m

.PHONY: pretrain test parity faults kill50 lint types benchmark gpu clean

pretrain: $(VENV)/.run
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node=$(RANKS) pretrain_gpt.py experiment=pretrain name=$(NAME) $(ARGS)
	$(BIN)/kilotron generate outputs/$(NAME) --prompt "The following" --max-new-tokens 80 --temperature 0.5
	@echo
	@echo "What to try next:"
	@echo "  another text   $(BIN)/kilotron generate outputs/$(NAME) --prompt 'Return the' --temperature 0.7 --seed 1"
	@echo "  train longer   make pretrain NAME=longer ARGS='train.steps=2000'"
	@echo "  your own text  $(BIN)/kilotron prepare FILES --tokenizer bytes --output outputs/my_text"
	@echo "                 $(BIN)/python pretrain_gpt.py name=my_text data=files data.path=outputs/my_text train.steps=1000"
	@echo "  every setting  $(BIN)/python pretrain_gpt.py --help"

# Two files of tests at a time: a test of one process leaves the other core idle.
test: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

parity: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.parity.matrix
	OMP_NUM_THREADS=1 $(BIN)/pytest -m slow

# Ranks that are killed, hang and fail, disks that fill, files that are damaged: what goes on is as if nothing had been.
faults: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/pytest -m faults -rP

# One run, killed at fifty random moments.
kill50: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.kill50

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

benchmark: $(VENV)/.dev
	$(BIN)/python -m benchmarks.train_step

# Copies those packages, and says what to run on such a machine, with its own Python, from this folder; the most valuable first.
gpu: $(VENV)/.run
	rm -rf $(SITE)
	mkdir $(SITE)
	cd "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')" && cp -R $(SITE_PACKAGES) $(abspath $(SITE))
	find $(SITE) -name __pycache__ -prune -exec rm -r {} +
	@echo
	@echo "Take this folder with $(SITE) to the GPU machine. None of these takes more than ten minutes there:"
	@echo "$(ON_GPU) benchmarks.gpu --parts ceilings shapes --output outputs/gpu_1"
	@echo "$(ON_GPU) pytest tests/test_gpu.py tests/core/test_dropout.py -m 'gpu and not nccl' -n 6 --dist loadgroup & $(ON_GPU) pytest tests/test_gpu.py -m 'gpu and nccl'; wait"
	@echo "$(ON_GPU) benchmarks.gpu --parts variants --output outputs/gpu_3"
	@echo "$(ON_GPU) benchmarks.gpu --parts trainer generation loss shapes --peers transformers --modes compiled --shapes gpt2_small llama_1b --output outputs/gpu_4"
	@echo "Their tables, into docs/benchmarks.md:"
	@echo "$(ON_GPU) benchmarks.gpu --tables-from outputs/gpu_1/figures.jsonl outputs/gpu_3/figures.jsonl outputs/gpu_4/figures.jsonl --docs docs/benchmarks.md"

$(VENV)/.run: setup.py constraints.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "Kilotron needs Python 3.11 or newer: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet -c constraints.txt -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.run
	$(BIN)/pip install --quiet -c constraints.txt -e '.[dev]'
	@touch $@

clean:
	rm -rf $(VENV) $(SITE) *.egg-info
