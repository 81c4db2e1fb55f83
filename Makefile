# Needs only Python 3.11 to 3.13, git and make. Everything is installed into .venv.

VENV := .venv
STAMP := $(VENV)/.installed

ifeq ($(OS),Windows_NT)
SCRIPTS := Scripts
PYTHON ?= python
else
SCRIPTS := bin
PYTHON ?= python3
endif

PY := $(VENV)/$(SCRIPTS)/python
PIP := $(PY) -m pip
PYTEST := $(PY) -m pytest

# A timeout always: without one, nbval waits for ever for a kernel that died.
# loadfile: the cells of one notebook share a kernel, so they stay on one worker.
UNIT := -n 2
NBVAL := --nbval --nbval-current-env --nbval-cell-timeout=600 -n 2 --dist loadfile

LINT := $(PY) -m ruff check . && $(VENV)/$(SCRIPTS)/lint-imports && $(PY) -m mypy

# Jupyter looks here first for the kernel "python3", so it is this environment's own.
export JUPYTER_PATH := $(CURDIR)/$(VENV)/share/jupyter
export PIP_DISABLE_PIP_VERSION_CHECK := 1

# The committed outputs are those of virtual GPUs, on a machine with real ones too. The models are
# small, and tests run side by side: more threads would only get in each other's way.
test unit nb notebooks conformance pytorch-tests frames: export COURSE_DEVICES := virtual
test unit nb notebooks conformance pytorch-tests frames: export OMP_NUM_THREADS := 1

# In a container one is often root, and Jupyter wants to be told that this is meant.
ifeq ($(shell id -u),0)
ROOT := --allow-root
endif

.PHONY: help lab fresh test browser unit nb notebooks portable test-with conformance \
  pytorch-tests build/hosted images badges frames student slides bench lint constraints dist site site-test clean

help:
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {print "\n" substr($$0, 5)} \
	  /^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

##@ To learn
# More flags for JupyterLab: make lab LAB=--no-browser
lab: $(STAMP) ## Install everything, then open a working copy of the lessons in JupyterLab
	$(PY) tools/lab.py --ServerApp.ip=127.0.0.1 $(ROOT) $(LAB)

fresh: $(STAMP) ## Fetch a lesson anew into your working copy, with your answers (NB=02)
	$(PY) tools/lab.py --fresh $(NB)

##@ To teach
student: $(STAMP) ## Make the lessons without solutions, and an answer key, in build/editions
	$(PY) tools/editions.py build/editions

# What writes the slides is of no use to anyone else: it is installed when they are made.
slides: $(STAMP) ## Make a deck for each lesson, to edit and to show, in build/slides
	@$(PIP) install -q python-pptx
	$(PY) tools/slides.py build/slides

##@ To change the course
test: $(STAMP) ## Check all: lint, unit tests, and every notebook against its outputs
	@lint=0; ($(LINT)) || { lint=1; echo "Lint is not content, see above; the tests go on." >&2; }; \
	$(PYTEST) $(NBVAL) tests notebooks && exit $$lint

unit: $(STAMP) ## Run the unit tests only
	$(PYTEST) $(UNIT)

browser: $(STAMP) ## Try a lesson in JupyterLab in a real browser (needs playwright and Chromium)
	$(PYTEST) -p no:randomly tests/browser

conformance: $(STAMP) ## Compare all of PyTorch's own test databases with the CPU (minutes)
	$(PYTEST) $(UNIT) tests/conformance

# TESTS=folder: the folder "test" of PyTorch's source, of a version near the one installed.
pytorch-tests: $(STAMP) ## Run PyTorch's own device-generic tests on virtual GPUs (an hour)
	$(PY) tools/run_pytorch_tests.py $(TESTS)

nb: $(STAMP) ## Check every notebook against its committed outputs only
	$(PYTEST) $(NBVAL) notebooks

portable: $(STAMP) ## Which cells print something else on other CPUs (NB=notebooks/02_x.ipynb)
	$(PY) tools/portable.py $(NB)

# Another virtual environment under build/, for `make clean` to remove.
OTHER = build/torch-$(TORCH)
test-with: ## Run the unit tests under another PyTorch (TORCH=2.14.1)
	@test -n "$(TORCH)" || { echo "Say which PyTorch: make test-with TORCH=2.14.1" >&2; exit 1; }
	@test -d $(OTHER) || $(PYTHON) -m venv $(OTHER)
	@echo "Installing PyTorch $(TORCH) and everything else in $(OTHER) (minutes, the first time) ..."
	@sed 's/^torch==.*/torch==$(TORCH)/' constraints.txt > $(OTHER)/constraints.txt
	@$(OTHER)/$(SCRIPTS)/python -m pip install -q -c $(OTHER)/constraints.txt -e ".[lab,test]"
	COURSE_DEVICES=virtual OMP_NUM_THREADS=1 JUPYTER_PATH=$(abspath $(OTHER))/share/jupyter \
	  $(OTHER)/$(SCRIPTS)/python -m pytest $(UNIT) tests

notebooks: $(STAMP) ## Run the notebooks anew and keep their outputs (one: NB=notebooks/02_x.ipynb)
	$(PY) tools/notebook_tools.py execute $(NB)

images: $(STAMP) ## Draw every picture anew, and the printed sheet of formulas
	@for script in images/*.py docs/teaching/handout.py; do \
	  echo "$$script"; $(PY) "$$script" || exit 1; done

badges: $(STAMP) ## Write the course's address into README.md, from [project.urls] in pyproject.toml
	$(PY) tools/addresses.py

frames: $(STAMP) ## Draw every position of the explorers anew whose code has changed (minutes)
	$(PY) tools/explorer_frames.py $(EXPLORER)

build/hosted: $(STAMP) # the lessons as Colab and hubs open them; .github/workflows/site.yml asks
	$(PY) tools/hosted.py $@

bench: $(STAMP) ## Run the benchmarks: virtual GPUs, then real processes
	$(PY) tools/bench_virtual.py
	$(PY) tools/bench_processes.py

lint: $(STAMP) ## Check style (ruff), arrows between modules (import-linter), types (mypy)
	@$(LINT)

# torch keeps its pin: moving it is a decision, so edit that line by hand first. Its local version
# and the GPU libraries it brings are left out: they follow from the machine that installs.
constraints: ## Pin the newest version of everything else than torch in constraints.txt
	@echo "Resolving all dependencies in a fresh environment (minutes) ..."
	@set -e; fresh=$$(mktemp -d); trap 'rm -rf "$$fresh"' EXIT; pip="$$fresh/$(SCRIPTS)/python -m pip"; \
	$(PYTHON) -m venv "$$fresh"; \
	grep '^torch==' constraints.txt > "$$fresh/torch"; \
	$$pip install -q -c "$$fresh/torch" torch; \
	$$pip install -q -c "$$fresh/torch" -e ".[lab,test,site]"; \
	$$pip freeze --all --exclude pip --exclude-editable > "$$fresh/all"; \
	{ echo "# What the committed outputs were made with. Refresh: make constraints"; \
	  sed -E -e 's/\+.*//' -e '/^(nvidia|cuda|triton)/d' "$$fresh/all"; } > constraints.txt

# What builds is in an environment of its own, under build/, for `make clean` to remove.
# A lesson is run from the wheel and a copy of itself, outside of the repository.
RELEASE = build/release-tools
dist: $(STAMP) ## Build the wheel and the sdist, check both, and run a lesson from the wheel
	rm -rf dist build/wheel build/outside
	@test -d $(RELEASE) || $(PYTHON) -m venv $(RELEASE)
	@$(RELEASE)/$(SCRIPTS)/python -m pip install -q build twine
	$(RELEASE)/$(SCRIPTS)/python -m build --outdir dist .
	$(RELEASE)/$(SCRIPTS)/python -m twine check --strict dist/*
	$(PIP) install -q --no-deps --target build/wheel dist/*.whl
	@mkdir -p build/outside && cp notebooks/00_*.ipynb build/outside/
	cd build/outside && COURSE_DEVICES=virtual OMP_NUM_THREADS=1 PYTHONPATH=$(CURDIR)/build/wheel \
	  $(CURDIR)/$(PYTEST) -q --rootdir=. -p no:randomly --nbval --nbval-current-env \
	  --nbval-cell-timeout=600 .

# What the page needs besides is installed when it is first built: lessons and tests do without it.
SITE := $(VENV)/.site
site: $(SITE) ## Build the web page in build/site, from the lessons as they are committed
	rm -rf build/site
	$(PY) tools/stage_site.py build/site-source
	$(PY) -m sphinx -q -W --keep-going -b html -c docs -d build/site-doctrees \
	  build/site-source build/site
	@echo "The web page: build/site/index.html"

# axe-core looks for what a screen reader could not read. Without npm its test is skipped.
AXE := build/axe/package/axe.min.js
site-test: site ## Check the web page: links, frames, and in a browser if playwright is there
	@test -f $(AXE) || ! command -v npm >/dev/null || { mkdir -p build/axe && cd build/axe && \
	  npm pack --silent axe-core@4 >/dev/null && tar xzf axe-core-*.tgz package/axe.min.js; }
	$(PYTEST) -p no:randomly tests/site

$(SITE): $(STAMP)
	@echo "Installing what the web page needs ..."
	@$(PIP) install -q -c constraints.txt -e ".[lab,site]"
	@touch $(SITE)

clean: ## Remove caches and build leftovers (.venv stays)
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .import_linter_cache .mypy_cache .hypothesis notebooks/.ipynb_checkpoints
	find course_lib images tests tools -name __pycache__ -prune -exec rm -rf {} +

# torch first, at its pin: then nothing installed later can bring another build of it.
$(STAMP): pyproject.toml constraints.txt
	@$(PIP) --version >/dev/null 2>&1 || { \
	  $(PYTHON) -c "import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 14))" || { \
	    echo "Python 3.11 to 3.13 is needed. If you have one: make PYTHON=python3.13 ..." >&2; exit 1; }; \
	  echo "Making a virtual environment in $(VENV) ..."; $(PYTHON) -m venv $(VENV); }
	@echo "Installing PyTorch (minutes, the first time) ..."
	@$(PIP) install -c constraints.txt torch
	@echo "Installing everything else (one or two minutes, silently) ..."
	@$(PIP) install -q -c constraints.txt -e ".[lab,test]"
	@touch $(STAMP)
