# Bare `make` lists the targets. Each of them makes .venv and installs what it needs first.
PYTHON ?= python3
# gpu brings faiss-gpu in place of faiss-cpu: make install FAISS=gpu; later targets keep what is installed
FAISS ?= $(if $(wildcard .venv/.installed-gpu),gpu,cpu)
WORKERS ?= auto
BIN := .venv/bin
STAMP := .venv/.installed-$(FAISS)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format lock licences docs bench bench-gpu serve clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-9s %s\n", $$1, $$2}'

install: $(STAMP)  ## make .venv and install the project with all that it needs

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s; name one with make PYTHON=python3.11" % sys.version.split()[0])'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@# the two own the same files: the other one goes before this one comes
	@if ls .venv/.installed-* >/dev/null 2>&1 && ! test -e $@; then \
		$(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu; rm -f .venv/.installed-*; fi
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[$(FAISS),dev]'
	@touch $@

demo: install  ## precompute, train and evaluate on shipped scenes: one table in a few minutes
	$(BIN)/teacher-cache demo

test: install  ## run all tests, in WORKERS processes: most of their time they wait for others that they start
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile

lint: install  ## ruff, mypy, the import rule, Dockerfile, compose files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.gpu.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.renovate renovate.json

format: install  ## let ruff write the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock: install  ## what the light image installs, by version and digest, for every platform; after a change of dependencies
	@for image in light inventory; do \
		$(BIN)/python docker/requirements.py $$image > docker/requirements-$$image.in && \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
			--custom-compile-command "make lock" -c constraints.txt -o docker/requirements-$$image.txt docker/requirements-$$image.in; \
		status=$$?; rm -f docker/requirements-$$image.in; test $$status = 0 || exit $$status; \
	done

licences: install  ## docs/licences.md, from what is installed; after a change of dependencies
	@mkdir -p build
	$(BIN)/python docs/make_licences.py > build/licences.md
	mv build/licences.md docs/licences.md

bench: install  ## speed and size against the peers on this machine's CPU, into benchmarks/results/; hours
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.bench

bench-gpu: install  ## the sections that need a CUDA device
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -e '.[bench]'
	$(BIN)/python -m benchmarks.bench --device cuda

docs: install  ## the documentation site, from docs/ and the docstrings, into site/; nothing is fetched
	$(BIN)/python -m sphinx -n -W --keep-going -q -d build/doctrees docs site
	@echo "site/index.html"

serve: install  ## a local Prefect server and worker with the deployments of prefect.yaml
	$(BIN)/python -m teacher_cache.flows.serve

clean:  ## remove .venv, the site and what the tools keep; caches and runs stay
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build/doctrees site docs/project
