# The same commands as CI, for the tree you work in (`pip install -e ".[offline,dev]"` first).
PYTHON ?= python

.PHONY: check lint test smoke bench reliability tables

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

bench: ## the peers side by side; needs FTUNE_DATA and the extra `bench`
	$(PYTHON) scripts/bench/speed.py

reliability: ## 1,000 kills, every call killed and failed, every power loss: 2 cores, under 40 minutes
	$(PYTHON) scripts/reliability

tables: ## the tables of README.md from the schema and the results
	$(PYTHON) scripts/readme_tables.py
