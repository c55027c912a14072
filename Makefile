# Each target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false

.PHONY: quickstart test lint bench clean

quickstart: $(VENV)/ready
	HF_HUB_OFFLINE=1 bash recipes/run.sh quickstart

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 python -m pytest -n 2

lint: $(VENV)/ready
	ruff check .
	ruff format --check .

bench: $(VENV)/ready
	python benchmarks/train_throughput.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
