# Each target makes .venv when it is missing and installs only when pyproject.toml has changed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python -m

.PHONY: demo test lint bench results results-adapt results-digits

demo: $(VENV)/.installed-demo
	$(VENV)/bin/fastlora demo

test: $(VENV)/.installed-dev
	$(RUN) pytest --numprocesses auto --dist loadfile

lint: $(VENV)/.installed-dev
	$(RUN) ruff format --check
	$(RUN) ruff check
	$(RUN) mypy

bench: $(VENV)/.installed-bench
	$(VENV)/bin/python benchmarks/cpu_layers.py --output benchmarks/results/cpu.json
	$(VENV)/bin/python benchmarks/cpu_adapters.py --output benchmarks/results/cpu-adapters.json

results: $(VENV)/.installed-results
	$(RUN) benchmarks.transfer_results

results-adapt: $(VENV)/.installed-results
	$(RUN) benchmarks.adapt_results

results-digits: $(VENV)/.installed-results
	$(RUN) benchmarks.adapt_digits

$(VENV)/.installed-%: pyproject.toml
	test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	$(RUN) pip install --disable-pip-version-check --editable ".[$*]"
	touch $@
