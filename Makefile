# Two commands for a newcomer: `make demo` and `make test`. Both set up .venv first; deploy/setup.sh says what that needs.
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: setup demo test numerics compare claims claims-lab bench gpu-check gpu-full chaos chaos-training fuzz screenshots docs reference locks locks-check pin-images sbom release soak lint types proto proto-check clean

setup: $(STAMP)
	@echo "Everything is in $(VENV). Next: make demo, which takes about nine minutes on two cores."

# PYTHON=python3.13 uses that one, in place of the first usable one of 3.12, 3.11 and 3.13.
$(STAMP): pyproject.toml
	@PYTHON="$(PYTHON)" deploy/setup.sh $(VENV)
	@touch $@

demo: $(STAMP)
	$(BIN)/vaopd demo

# VA-OPD and Standard OPD on the demo's pair, three seeds each, and their held-out accuracy; continues where it stopped.
compare: $(STAMP)
	set -e; for seed in 0 1 2; do for variant in va_opd standard; do run=compare-$$variant-$$seed; \
	  test -d runs/$$run/model || $(BIN)/vaopd up configs/tiny.toml --no-api --set run.name=$$run --set run.seed=$$seed \
	    --set objective.variant=$$variant --set teacher.address=127.0.0.1:0; done; done
	$(BIN)/vaopd report runs/compare-*-[0-2] --plot docs/images/opd-vs-vaopd.png

# When VA-OPD helps: the runs that benchmarks/results/claims/lab.json lacks, then docs/when_va_opd_helps.md's tables and figure.
# All of them take more than an hour of one CPU core; LAB_OPTIONS="--device cuda" runs hundreds in one batch.
claims-lab: $(STAMP)
	$(BIN)/python benchmarks/claims/lab/run.py $(LAB_OPTIONS)
	$(BIN)/python benchmarks/claims/lab/summary.py

# When VA-OPD helps on the whole system: the runs that benchmarks/results/claims/system.json lacks, then its table. It
# says how long that takes; CLAIMS_OPTIONS="--arm va_opd --arm standard" chooses pieces, "--stop-after-s 3000" an hour's.
claims: $(STAMP)
	$(BIN)/python benchmarks/claims/system/run.py $(CLAIMS_OPTIONS)
	$(BIN)/python benchmarks/claims/system/summary.py

# Each prints its tables; --json FILE saves the numbers for benchmarks/plots.py.
BENCHMARKS := floor paired_scoring against_vllm train_step fused_kl codecs service_cost sharing
bench: $(STAMP)
	set -e; for name in $(BENCHMARKS); do $(BIN)/python benchmarks/$$name.py; done

# On a host with a GPU, with its own torch (GPU_PYTHON=…), from the source tree: two parts of at most five minutes each.
# They need no vLLM and no hub. PART=1 or PART=2 runs one of them. Figures: benchmarks/results/gpu-CARD.json.
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,python3)
PART ?= 1 2
gpu-check:
	for part in $(PART); do PYTHONPATH=.:services:$$PYTHONPATH $(GPU_PYTHON) -m benchmarks.gpu $$part || failed=1; done; \
	  exit $${failed:-0}

# On a host with vLLM and the hub: 20 steps of configs/geometry3k-8b.toml with the real models on all cards, in up to an
# hour. GPU_OPTIONS=--cpu runs the same on the tiny pair. Figures: benchmarks/results/gpu-full-CARD.json.
gpu-full: $(STAMP)
	PYTHONPATH=.:services:$$PYTHONPATH $(BIN)/python -m benchmarks.gpu full $(GPU_OPTIONS)

screenshots: $(STAMP)
	$(BIN)/python benchmarks/viewer.py --screenshots docs/images

# Both print their seed; SEED=N repeats it. The first takes 3 minutes, the second 15.
SEED_OPTION = $(if $(SEED),--seed $(SEED))
chaos: $(STAMP)
	$(BIN)/python -m tests.faults.chaos $(SEED_OPTION)

chaos-training: $(STAMP)
	$(BIN)/python -m tests.faults.chaos --training $(SEED_OPTION)

# Servers under a mixed load with the dearest requests in it: memory over time, and the waits of a light job.
MINUTES ?= 10
soak: $(STAMP)
	$(BIN)/python -m tests.faults.soak --minutes $(MINUTES)

# Three workers on two cores, since many tests wait for a process or a deadline. A file's tests share their servers.
# tests/conftest.py puts the files with slow tests first; xdist would reorder them.
test: $(STAMP)
	$(BIN)/python -m pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder

# The numeric tests with the kernels of lesser processors: without AVX-512, without AVX2.
numerics: $(STAMP)
	$(BIN)/python -m tests.numerics

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(STAMP)
	$(BIN)/mypy

# deploy/locks: the versions that go together, with digests. LOCK_OPTIONS=--upgrade takes the newest. The second resolves
# them again, by metadata alone, in half a minute.
locks: $(STAMP)
	$(BIN)/python deploy/locks/lock.py $(LOCK_OPTIONS)
locks-check: $(STAMP)
	$(BIN)/python deploy/locks/lock.py --check

# Writes the digest of each base image behind its tag, in the Dockerfiles and docker-compose.yml. Needs docker or skopeo.
pin-images:
	python3 deploy/pin_images.py

# A release's files, in build/release: wheel, source, bills of materials, licences, digests.
SBOM := build/tools/sbom
release: locks-check sbom
	$(BIN)/uv build --quiet --out-dir build/release
	cd build/release && rm -f .gitignore && sha256sum -- * >../SHA256SUMS && mv ../SHA256SUMS .
sbom: $(STAMP)
	test -x $(SBOM)/bin/cyclonedx-py || { $(BIN)/python -m venv $(SBOM) && \
	  $(SBOM)/bin/pip install --quiet --disable-pip-version-check 'cyclonedx-bom>=7.5,<8'; }
	$(SBOM)/bin/python deploy/sbom.py build/release --python $(BIN)/python

# The documentation site, in build/site.
docs: reference
	test -x $(BIN)/mkdocs || $(BIN)/pip install --quiet --disable-pip-version-check --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

# docs/reference, generated from the code.
reference: $(STAMP)
	$(BIN)/python docs/tools/reference.py

# A longer search for inputs that aren't refused with a named error; FUZZ_SECONDS for each decoder.
FUZZ_SECONDS ?= 60
fuzz: $(STAMP)
	$(BIN)/pip install --quiet --disable-pip-version-check 'atheris>=3.0'
	for target in image message key; do \
	  $(BIN)/python tests/fuzz/decoding.py $$target -max_total_time=$(FUZZ_SECONDS) -rss_limit_mb=512 -max_len=65536 \
	    -artifact_prefix=$(VENV)/ || exit 1; done
	VAOPD_FUZZ_EXAMPLES=2000 $(BIN)/python -m pytest tests/faults/test_bad_input_properties.py

proto: $(STAMP)
	$(BIN)/python -m grpc_tools.protoc -Iproto --python_out=. --pyi_out=. --grpc_python_out=. proto/vaopd/pb/*.proto

proto-check: proto
	git diff --exit-code -- vaopd/pb

clean:
	rm -rf $(VENV) build dist *.egg-info
