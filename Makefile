.DEFAULT_GOAL := help
SHELL := /bin/bash
VENV := .venv/bin
# Ray and torch start many processes; bytecode written at install is read by all of them
unexport PYTHONDONTWRITEBYTECODE
export RAY_USAGE_STATS_ENABLED := 0

.PHONY: help
help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  \1\t\2/' | expand -t 16

.PHONY: setup
setup: ## make .venv with the package installed for development
	@scripts/setup.sh

.PHONY: demo
demo: setup ## run the main job: real data -> 2-worker DDP -> model version -> endpoint -> metrics
	@$(VENV)/lepton-ray demo $(ARGS)

.PHONY: test
test: setup packages ## run all tests (unit, integration on a real Ray, S3, Prometheus and chart)
	@$(VENV)/python -m pytest $(ARGS)

.PHONY: test-fast
test-fast: setup ## run the unit tests and house rules only
	@$(VENV)/python -m pytest tests/unit tests/house_rules $(ARGS)

.PHONY: faults
faults: setup ## inject every fault of tests/faults with many seeds (an hour), and write docs/faults-table.md
	@LEPTON_FAULT_SEEDS=all LEPTON_FAULT_TABLE=docs/faults-table.md $(VENV)/python -m pytest tests/faults --timeout 5400 $(ARGS)

.PHONY: packages
packages: ## install the Debian packages that the tests start (prometheus), where they are missing
	@scripts/packages.sh

.PHONY: lint
lint: setup ## ruff, mypy strict, import contracts
	@$(VENV)/ruff check .
	@$(VENV)/ruff format --check .
	@$(VENV)/mypy
	@$(VENV)/lint-imports --no-cache | tail -n 12

.PHONY: format
format: setup ## format the code and fix what ruff can fix
	@$(VENV)/ruff check --fix --quiet . || true
	@$(VENV)/ruff format .

.PHONY: chart-lint
chart-lint: setup ## lint the Helm chart
	@$(VENV)/python scripts/helm.py lint --strict helm/lepton-ray -f helm/lepton-ray/ci/s3-values.yaml

.PHONY: bench
bench: setup ## measure training against torchrun, plain Ray Train, Ray Data and DataLoader (benchmarks/training.py)
	@$(VENV)/python benchmarks/training.py $(ARGS)

.PHONY: bench-data
bench-data: setup ## measure queries against pyarrow.dataset (benchmarks/data.py)
	@$(VENV)/python benchmarks/data.py $(ARGS)

.PHONY: bench-cleaning
bench-cleaning: setup ## measure cleaning against pandas and polars (benchmarks/data_cleaning.py)
	@$(VENV)/python benchmarks/data_cleaning.py $(ARGS)

.PHONY: bench-recovery
bench-recovery: setup ## measure what faults cost, stock Ray Train beside it, over an hour (benchmarks/recovery.py)
	@$(VENV)/python benchmarks/recovery.py $(ARGS)

.PHONY: docs
docs: setup ## write the generated pages (docs/metrics.md)
	@$(VENV)/python -m lepton_ray.monitoring.catalogue > docs/metrics.md

.PHONY: lock
lock: setup ## renew requirements/*.txt from pyproject.toml
	@$(VENV)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --custom-compile-command 'make lock' pyproject.toml -o requirements/runtime.txt
	@$(VENV)/uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --custom-compile-command 'make lock' --extra dev -c requirements/runtime.txt pyproject.toml -o requirements/dev.txt

.PHONY: clean
clean: ## remove .venv, caches and the local store
	@rm -rf .venv .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .hypothesis build dist lepton-store
