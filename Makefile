# What people and CI both call. `make quickstart` and `make test` work on a fresh clone with Python 3.11+ and make.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# The CPU build, which installs quickly. For another build: make setup TORCH="torch --index-url ..."
TORCH ?= torch==2.13.0
# GLUE as JSON lines, a folder a task, for reproduce-small and parts of bench.
DATA ?= ../shared/data/glue

export HF_HUB_OFFLINE ?= 1

.PHONY: setup quickstart test test-fast lint format constraints bench reproduce-small arena arena-ablations pictures clean

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -q --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

quickstart: setup
	$(BIN)/unolora train configs/quickstart.yaml --overwrite true

test: setup
	$(BIN)/python -m pytest -q -m "not slow"
	$(BIN)/python -m pytest -q -m slow

test-fast: setup
	$(BIN)/python -m pytest -q -m "not slow"

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The newest versions that the ranges in pyproject.toml allow; run the tests before keeping them.
constraints:
	$(PYTHON) -m venv $(VENV)-newest
	$(VENV)-newest/bin/python -m pip install -q --disable-pip-version-check $(TORCH)
	$(VENV)-newest/bin/python -m pip install -q --disable-pip-version-check -e '.[dev,quant]'
	head -2 constraints.txt > constraints.new
	$(VENV)-newest/bin/python -m pip freeze --exclude-editable --exclude torch | sort -f >> constraints.new
	mv constraints.new constraints.txt
	rm -r $(VENV)-newest

bench: setup
	$(BIN)/unolora bench --data $(DATA)

reproduce-small: setup
	$(BIN)/python scripts/reproduce.py configs/glue-small.yaml results/glue-small --data-root $(DATA) --jobs 2

# Hours each; interrupted, they go on where they stopped. docs/method.md is written again from what is in results/.
arena: setup
	$(BIN)/python scripts/reproduce.py configs/arena.yaml results/arena --data-root $(DATA) --jobs 2
	$(BIN)/python scripts/method_tables.py

arena-ablations: setup
	$(BIN)/python scripts/reproduce.py configs/arena-ablations.yaml results/arena-ablations --data-root $(DATA) --jobs 2
	$(BIN)/python scripts/method_tables.py

# Of runs/quickstart, results/glue-small and benchmarks.md, into docs/; needs Chromium.
pictures: setup
	$(BIN)/unolora report results/glue-small --output runs/glue-small.html
	$(BIN)/python scripts/picture.py runs/quickstart/report.html docs/report.png
	$(BIN)/python scripts/picture.py runs/quickstart/report.html docs/learned.png --section learned --height 2600
	$(BIN)/python scripts/picture.py runs/glue-small.html docs/comparison.png
	$(BIN)/unolora bench --figures runs/growth.html
	$(BIN)/python scripts/picture.py runs/growth.html docs/growth.png --width 1180 --height 1860

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache dist
