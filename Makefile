# Bare `make` lists the targets. Each of them makes .venv and installs what it needs first.
PYTHON ?= python3
# FAISS=gpu installs faiss-gpu in place of faiss-cpu; later targets keep what is installed
FAISS ?= $(if $(wildcard .venv/.installed-gpu),gpu,cpu)
EXTRA := $(if $(filter gpu,$(FAISS)),gpu,train)
# PILLOW=simd compiles pillow-simd in Pillow's place: decode and resize take half to a third of the CPU time
PILLOW ?= $(if $(wildcard .venv/.pillow-simd),simd)
WORKERS ?= auto
BIN := .venv/bin
STAMP := .venv/.installed-$(FAISS)
DEV := .venv/.dev
comma := ,
# install the project with extras; pip in place of uv where uv cannot reach a package index
define extras
$(BIN)/uv pip install --quiet --python $(BIN)/python -c constraints.txt -c docker/constraints.txt -e '.[$(1)]' \
	|| $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -c docker/constraints.txt -e '.[$(1)]'
@# that has put Pillow in the place of pillow-simd
@if test -e .venv/.pillow-simd; then rm .venv/.pillow-simd; $(MAKE) --no-print-directory .venv/.pillow-simd; fi
endef
# the tests start hundreds of processes: without bytecode on disk each of them compiles all that it imports
PYTEST := env -u PYTHONDONTWRITEBYTECODE OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --maxprocesses 4 --dist loadfile --no-loadscope-reorder --durations 20

.DEFAULT_GOAL := help
.PHONY: help install dev demo test test-all lint format constraints lock licences docs bench bench-gpu serve containers clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-11s %s\n", $$1, $$2}'

install: $(STAMP) $(if $(filter simd,$(PILLOW)),.venv/.pillow-simd)  ## make .venv with all that demo, tour and serve need; FAISS=gpu, PILLOW=simd

dev: $(DEV) $(if $(filter simd,$(PILLOW)),.venv/.pillow-simd)  ## make install, and tests, linters and documentation tools

$(STAMP): pyproject.toml constraints.txt docker/constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed, this is %s; name one with make PYTHON=python3.11" % sys.version.split()[0])'
	$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@# the two own the same files: uninstall the other one first
	@if ls .venv/.installed-* >/dev/null 2>&1 && ! test -e $@; then \
		$(BIN)/python -m pip uninstall --quiet --yes faiss-cpu faiss-gpu; rm -f .venv/.installed-*; fi
	@rm -f .venv/.pillow-simd
	@# torch by pip, which knows mirrors and wheel folders of this machine; the rest by uv, which resolves in seconds
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt -c docker/constraints.txt uv torch torchvision
	$(call extras,$(EXTRA)$(comma)user)
	@touch $@

$(DEV): $(STAMP)
	$(call extras,$(EXTRA)$(comma)dev)
	@touch $@

# needs a compiler and the headers that docker/Dockerfile installs; without them formats would be missing
.venv/.pillow-simd: $(STAMP)
	$(BIN)/python -m pip uninstall --quiet --yes pillow
	CC="cc -mavx2" $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps --force-reinstall --no-binary pillow-simd pillow-simd==12.1.1.post0
	@$(BIN)/python -c 'import sys; from PIL import features; lost = [name for name in ("jpg", "jpg_2000", "zlib", "libtiff", "webp", "freetype2", "littlecms2") if not features.check(name)]; sys.exit(f"pillow-simd was built without {lost}: install the headers that docker/Dockerfile names, then make install PILLOW=simd" if lost else 0)' \
		|| { $(BIN)/python -m pip uninstall --quiet --yes pillow-simd; $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps -c constraints.txt pillow; exit 1; }
	@touch $@

demo: install  ## precompute, train and evaluate on shipped scenes: one table in a few minutes
	$(BIN)/teacher-cache demo

test: dev  ## every promise at reduced counts; 10 minutes on 2 cores
	$(PYTEST) -m "not slow"

test-all: dev  ## every test: those of make test and the rest, with all kills, injections, S3, Ray, browser, PostgreSQL
	$(PYTEST)

lint: dev  ## ruff, mypy, the import contracts, Dockerfile, compose files
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/hadolint docker/Dockerfile
	$(BIN)/check-jsonschema --builtin-schema vendor.compose-spec docker/compose.yaml docker/compose.gpu.yaml
	$(BIN)/check-jsonschema --builtin-schema vendor.renovate renovate.json

format: dev  ## let ruff write the formatting
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

constraints: install  ## constraints.txt, after a change of dependencies; existing pins stay where they fit (UPGRADE="-P NAME" renews one)
	$(BIN)/uv pip compile pyproject.toml --quiet --universal --python-version 3.11 --no-header --no-annotate --no-emit-index-url \
		--extra train --extra dev --extra bench -c docker/constraints.txt $(UPGRADE) -o constraints.txt
	@# what depends on the machine is in docker/constraints.txt
	sed -i -E '/^(torch|torchvision|triton|nvidia-[a-z0-9-]*|cuda-[a-z0-9-]*)==/d' constraints.txt

lock: install  ## the versions and digests that the light image installs, for every platform; after a change of dependencies
	@for image in light inventory; do \
		$(BIN)/python docker/requirements.py $$image > docker/requirements-$$image.in && \
		$(BIN)/uv pip compile --quiet --universal --python-version 3.11 --generate-hashes --no-annotate --no-emit-index-url \
			--custom-compile-command "make lock" -c constraints.txt -o docker/requirements-$$image.txt docker/requirements-$$image.in; \
		status=$$?; rm -f docker/requirements-$$image.in; test $$status = 0 || exit $$status; \
	done

licences: dev  ## docs/licences.md, from what is installed; after a change of dependencies
	@mkdir -p build
	$(BIN)/python docs/make_licences.py > build/licences.md
	mv build/licences.md docs/licences.md

bench: dev  ## speed and size against the peers on this machine's CPU, into benchmarks/results/; takes hours
	$(call extras,$(EXTRA)$(comma)bench)
	$(BIN)/python -m benchmarks.bench

bench-gpu: dev  ## the sections that need a CUDA device
	$(call extras,$(EXTRA)$(comma)bench)
	$(BIN)/python -m benchmarks.bench --device cuda

docs: dev  ## the documentation site, from docs/ and the docstrings, into site/; nothing is fetched
	$(BIN)/python -m sphinx -n -W --keep-going -q -d build/doctrees docs site
	@echo "site/index.html"

serve: install  ## a local Prefect server and worker with the deployments of prefect.yaml
	$(BIN)/python -m teacher_cache.flows.serve

containers:  ## build the images with Docker, run the main job through compose.yaml, look into the containers, take them away
	docker/try.sh

clean:  ## remove .venv, the site and the tools' own caches; your caches and runs stay
	rm -rf .venv .venv-peers .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis build/doctrees site docs/project
