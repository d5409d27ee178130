# make quickstart   pre-train a small 2:4 sparse model on this machine (about 5 minutes on 2 cores)
# make test         the whole test suite (GPU tests run where there is a GPU)
# make check        linter, formatter, types

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
RUN := runs/quickstart
export OMP_NUM_THREADS ?= 1

# A machine that already has a CUDA build of torch keeps it: the environment sees its packages.
# Anywhere else the environment is its own, with the versions of tools/constraints-cpu.txt.
HAS_CUDA_TORCH := $(shell $(PYTHON) -c "import torch; print(int(torch.cuda.is_available()))" 2>/dev/null)
ifeq ($(HAS_CUDA_TORCH),1)
VENV_FLAGS := --system-site-packages
INSTALL = $(BIN)/python -m pip install -q -e .[test,dev]
else
INSTALL = $(BIN)/python -m pip install -q -c tools/constraints-cpu.txt torch && \
	$(BIN)/python -m pip install -q -c tools/constraints-cpu.txt -e .[test,dev]
endif

.PHONY: install quickstart test check format clean

install: $(VENV)/.installed

$(VENV)/.installed: setup.py tools/constraints-cpu.txt
	@echo "Installing into $(VENV) ..."
	@$(PYTHON) -m venv $(VENV_FLAGS) $(VENV)
	@$(INSTALL)
	@touch $@

quickstart: $(RUN)/data_text_document.idx
	@rm -rf $(RUN)/run
	$(BIN)/python -m deepspeed.launcher.runner --num_accelerators 2 launch/pretrain.py --config configs/quickstart.yaml

$(RUN)/corpus.jsonl: | install
	@mkdir -p $(RUN)
	$(BIN)/python tools/make_corpus.py --output $@

$(RUN)/tokenizer.model: $(RUN)/corpus.jsonl
	$(BIN)/python tools/train_tokenizer.py --input $< --output $@ --vocab-size 2048 --overwrite

$(RUN)/data_text_document.idx: $(RUN)/tokenizer.model
	$(BIN)/python tools/preprocess_data.py --input $(RUN)/corpus.jsonl --output-prefix $(RUN)/data \
		--tokenizer-model $< --workers 2 --overwrite

test: install
	$(BIN)/python -m pytest

check: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
