# A user needs make and Python 3.9 or newer.  What the targets install goes
# into CACHE, never into this folder; `make clean` removes it.

PYTHON ?= python3
HOME   ?= $(shell $(PYTHON) -c 'import os; print(os.path.expanduser("~"))')
CACHE  := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/procman
PYTEST := pytest==8.4.2 cronsim==2.6 tzdata==2025.2
PEERS  := huey==3.5.4 litequeue==0.9 persist-queue==1.1.0 dbos==3.4.0
LINTER := ruff==0.15.22 mypy==1.19.1

export CACHE

run_pytest = python=$$(.ci/venv "$(PYTHON)" $(PYTEST)) && \
	PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(CACHE)/pycache" \
	"$$python" -m pytest -q -p no:cacheprovider test_procman.py

.PHONY: help
help: ## prints this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' Makefile

.PHONY: demo
demo: ## runs the demo of README.md in a temporary directory
	@.ci/demo "$(PYTHON)"

.PHONY: test
test: ## runs the tests; ARGS="-x -k store" goes to pytest, PYTHON=python3.9 chooses one
	@$(run_pytest) $(ARGS)

.PHONY: test-all
test-all: ## runs the tests on every CPython from 3.9 to 3.13 found; SKIP=3.11 leaves one out
	+@.ci/test-all $(SKIP)

.PHONY: test-windows
test-windows: ## runs the tests on a Windows CPython under Wine (Linux; root, to install Wine)
	@mkdir -p "$(CACHE)"
	@flock --close "$(CACHE)/windows.lock" .ci/windows "$(PYTHON)" "$(PYTEST)" $(ARGS)

.PHONY: bench
bench: ## prints procman's speed beside its peers'; ROUNDS=5, LONG=1, ARGS="idle latency"
	@python=$$(.ci/venv "$(PYTHON)" $(PYTEST)) && TSP=$$(.ci/tsp) && \
	    PEERS=$$(.ci/venv "$(PYTHON)" $(PYTEST) $(PEERS)) && export PEERS TSP && \
	    PYTHONDONTWRITEBYTECODE= PYTHONPYCACHEPREFIX="$(CACHE)/pycache" \
	    "$$python" test_procman.py $(ARGS)

.PHONY: lint
lint: ## checks style, and types for Linux, macOS and Windows
	@python=$$(.ci/venv "$(PYTHON)" $(LINTER)) && \
	"$$python" -m ruff check --isolated --no-cache --target-version py39 --line-length 88 \
	    --select E,F,W,I,B,C4,PIE,PLE,PLW,RET,SIM,UP --ignore PLW0603 \
	    procman.py test_procman.py && \
	for platform in linux darwin win32; do \
	    "$$python" -m mypy --strict --python-version 3.9 --platform $$platform \
	        --cache-dir "$(CACHE)/mypy/$$platform" procman.py || exit; \
	done

.PHONY: map
map: ## prints where each section of procman.py starts and how long it is
	@awk 'function section(size) { printf "%5d %5d  %s\n", start, size, name } \
	    BEGIN { print " line lines"; start = 1; name = "(head)" } \
	    /^# [0-9]+\. / { section(NR - start); start = NR; name = substr($$0, 3) } \
	    END { section(NR + 1 - start); printf "%11d  total\n", NR }' procman.py

.PHONY: clean
clean: ## removes what these targets made and installed, except Wine itself
	rm -rf __pycache__ .pytest_cache "$(CACHE)"
