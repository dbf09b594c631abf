# The same commands as CI, for the tree you work in (`pip install -e ".[offline,dev]"` first).
PYTHON ?= python

.PHONY: check lint test smoke bench bench-all reliability tables

check: lint ## lint, types and the fast tests
	$(PYTHON) -m pytest -q -n auto -m "not slow"

lint:
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

test: ## every test
	$(PYTHON) -m pytest -q -n auto

smoke: ## train, expect, eval, predict in seconds
	PATH="$(dir $(shell command -v $(PYTHON))):$$PATH" bash scripts/ci_smoke.sh

bench: ## speed beside its peers; needs FTUNE_DATA and the extra `bench`
	$(PYTHON) scripts/bench/speed.py

bench-all: bench ## every benchmark of a CPU, an hour or more on a quiet machine, then the page of all results
	$(PYTHON) scripts/bench/speed.py --shape base --rows 320 --variants trainer_best,trainer_bf16,ftune
	$(PYTHON) scripts/bench/memory.py --rows 640
	$(PYTHON) scripts/bench/startup.py --rows 640
	$(PYTHON) scripts/bench/tokenising.py
	$(PYTHON) scripts/bench/scaling.py data
	$(PYTHON) scripts/bench/scaling.py length
	$(PYTHON) scripts/bench/scaling.py processes --rows 640
	$(PYTHON) scripts/bench/task_peers.py
	$(PYTHON) scripts/bench/page.py

reliability: ## 1,000 kills, every call killed and failed, every power loss: 2 cores, under 40 minutes
	$(PYTHON) scripts/reliability

tables: ## the tables of README.md from the schema and the results
	$(PYTHON) scripts/readme_tables.py
