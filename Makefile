# Each target makes .venv itself when it is missing or older than what it is made from.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
export PATH := $(CURDIR)/$(BIN):$(PATH)
export TOKENIZERS_PARALLELISM := false
# Where bytecode is not kept, each process rewrites the tests' assertions anew, for seconds.
unexport PYTHONDONTWRITEBYTECODE
# A file's tests share what is costly to make, so each file goes to one of two processes, in the order of conftest.py.
TESTS := -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# What computes: its results must not hang on the kind of CPU.
NUMERICAL := tests/checkpoints tests/custom tests/generation tests/pretraining tests/training \
	tests/evaluation/test_measuring.py tests/test_encoding.py tests/test_resizing.py tests/judges
CPUS := ATEN_CPU_CAPABILITY=default ATEN_CPU_CAPABILITY=avx2 DNNL_MAX_CPU_ISA=AVX2

# One that failed is run again by `make test-shuffled SEED=...`.
SEED ?= $(shell date +%s)

.PHONY: quickstart rewards demo check test coverage test-shuffled test-cpus test-lowest lint bench clean

quickstart: $(VENV)/ready
	HF_HUB_OFFLINE=1 bash recipes/run.sh quickstart

# The quickstart's model goes on by rewards for about a quarter of an hour, and is compared with what it was.
rewards: $(VENV)/ready
	[ -e runs/quickstart/evaluation/metrics.json ] || $(MAKE) quickstart
	HF_HUB_OFFLINE=1 bash recipes/run.sh quickstart_grpo

# The quickstart's model in a page that runs it in the browser; Ctrl-C ends the server.
demo: $(VENV)/ready
	[ -e runs/quickstart/evaluation/metrics.json ] || $(MAKE) quickstart
	HF_HUB_OFFLINE=1 python publish.py --config recipes/quickstart/demo.yaml
	(sleep 1; python -m webbrowser http://localhost:8000/) & \
	python -m http.server 8000 --bind localhost --directory runs/demo/space

# The daily tests: no script runs to its end, no model is trained for long, no browser starts, no port is opened.
check: $(VENV)/ready
	HF_HUB_OFFLINE=1 python $(TESTS) -m "not slow and not browser and not network"

test: $(VENV)/ready
	HF_HUB_OFFLINE=1 python $(TESTS) -rs

# The lines of fledge/ that the tests run, those in processes of their own included.
coverage: $(VENV)/ready
	HF_HUB_OFFLINE=1 coverage run $(TESTS)
	coverage combine --quiet
	coverage report --skip-covered --sort=cover

test-shuffled: $(VENV)/ready
	HF_HUB_OFFLINE=1 python $(TESTS) -rs --shuffle $(SEED)

test-cpus: $(VENV)/ready
	for cpu in $(CPUS); do echo "== $$cpu"; env $$cpu HF_HUB_OFFLINE=1 python $(TESTS) $(NUMERICAL) || exit 1; done

# On the lowest versions that pyproject.toml allows, in an environment of its own.
test-lowest: build/lowest/ready
	HF_HUB_OFFLINE=1 build/lowest/bin/python $(TESTS) -rs

lint: $(VENV)/ready
	ruff check .
	ruff format --check .
	mypy

bench: $(VENV)/ready
	python benchmarks/train_throughput.py

$(VENV)/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	python -m pip install --constraint constraints.txt --editable '.[dev,eval]'
	touch $@

# uv takes the lowest version of what pyproject.toml names and the newest of what that needs; pip searches for hours.
build/lowest/ready: pyproject.toml
	$(PYTHON) -m venv build/lowest
	build/lowest/bin/python -m pip install uv
	build/lowest/bin/uv pip install --python build/lowest/bin/python --resolution lowest-direct --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) runs build *.egg-info
