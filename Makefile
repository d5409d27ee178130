# make quickstart   pre-train a small 2:4 sparse model on this machine (about 5 minutes on 2 cores)
# make test         the tests, under ten minutes on 2 cores (GPU tests run where there is a GPU)
# make test-all     further layouts, families and combinations too, as CI does
# make check        linter, formatter, types

# All make .venv and install into it first. Where everything is installed already:
#   make test INSTALLED= BIN=$(dirname $(which python3))

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
RUN := runs/quickstart
# A file's tests share ranks and datasets, so a file stays in one process. The longest files come
# first (tests/order.py); the flag keeps that order.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder
export OMP_NUM_THREADS ?= 1

# A machine that has a CUDA build of torch keeps it: the environment sees its packages. Anywhere
# else the environment is its own, with the versions of tools/constraints-cpu.txt.
GPUS := $(shell $(PYTHON) -c "import torch; print(torch.cuda.device_count())" 2>/dev/null || echo 0)
ifeq ($(GPUS),0)
VENV_FLAGS :=
INSTALL = $(BIN)/python -m pip install -c tools/constraints-cpu.txt torch && \
	$(BIN)/python -m pip install -c tools/constraints-cpu.txt -e .[test,dev]
RANKS := 2
QUIET := DS_ACCELERATOR=cpu
else
VENV_FLAGS := --system-site-packages
INSTALL = $(BIN)/python -m pip install -e .[gpu,test,dev]
export MEGASPARSE_REQUIRE_TRANSFORMER_ENGINE ?= 1
RANKS := $(if $(filter 1,$(GPUS)),1,2)
endif

.PHONY: install quickstart test test-all check format clean

install: $(INSTALLED)

$(VENV)/.installed: setup.py tools/constraints-cpu.txt
	@echo "Installing into $(VENV) (once; a few minutes, about 2 GB without GPUs) ..."
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@$(INSTALL)
	@touch $@
	@echo "Installed. To use it: source $(VENV)/bin/activate"

quickstart: $(RUN)/data_text_document.idx
	@rm -rf $(RUN)/run
	$(QUIET) $(BIN)/python -m deepspeed.launcher.runner --log_level warning \
		--num_accelerators $(RANKS) launch/pretrain.py \
		--config configs/quickstart.yaml --tensor-model-parallel-size $(RANKS)

$(RUN)/corpus.jsonl: | $(INSTALLED)
	@mkdir -p $(RUN)
	$(BIN)/python tools/make_corpus.py --output $@

$(RUN)/tokenizer.model: $(RUN)/corpus.jsonl
	$(BIN)/python tools/train_tokenizer.py --input $< --output $@ --vocab-size 2048 --overwrite

$(RUN)/data_text_document.idx: $(RUN)/tokenizer.model
	$(BIN)/python tools/preprocess_data.py --input $(RUN)/corpus.jsonl --output-prefix $(RUN)/data \
		--tokenizer-model $< --workers 2 --overwrite

test: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_FLAGS) -m "not thorough"

test-all: $(INSTALLED)
	$(BIN)/python -m pytest $(PYTEST_FLAGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
