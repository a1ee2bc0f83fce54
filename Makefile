# Everything from a fresh machine: needs Python 3.11 (or later), make and git; see README.md.
# The first call fills $(VENV) (about 5 GB of libraries), later ones find it ready.

PYTHON ?= $(shell for p in python3.11 python3 python; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV ?= .venv
DATA ?=
OUTPUT ?= output/demo
TESTS ?= tests
JOBS ?= 2
PY = $(VENV)/bin/python

.PHONY: setup test demo lint format

setup:
	@$(if $(PYTHON),$(PYTHON),$(error no Python 3.11 or later found: install one, or name it: make PYTHON=path)) \
		dev/set_up.py --venv "$(VENV)"

# Two processes on two cores, each with one thread: threads of torch would only get in each other's way.
test: setup
	OMP_NUM_THREADS=1 $(PY) -m pytest -n $(JOBS) --dist loadgroup $(TESTS)

# make demo DATA=folder runs on a folder with images/, train.json and val.json.
demo: setup
	$(PY) projects/JigsawPretrain/demo.py $(if $(DATA),--data "$(DATA)") --output "$(OUTPUT)"

lint: setup
	@$(PYTHON) dev/set_up.py --venv "$(VENV)" --lint
	$(PY) -m black -l 100 --check --diff --quiet .
	$(PY) -m isort --check-only --diff .
	$(PY) -m flake8

format: setup
	@$(PYTHON) dev/set_up.py --venv "$(VENV)" --lint
	$(PY) -m isort .
	$(PY) -m black -l 100 .
