# make help lists the targets. All of them work in .venv, which the first one makes; to use another environment that has
# everything, say make PYTHON=/path/to/python TARGET.
VENV ?= .venv
ifeq ($(origin PYTHON),undefined)
PYTHON := $(VENV)/bin/python
ENV := env
endif
# More to say to pytest: make test ARGS="-k launch -x"
ARGS ?=
SOURCES := pdtransport kernels launch tests benchmarks examples scripts noxfile.py
PRESENT := $(wildcard $(SOURCES))

.PHONY: help env bench-env demo test test-fast test-pythons coverage test-more test-long soak sanitize mutants fuzz model lint format types bench clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

env:  ## make .venv with vLLM, UCX and pdtransport; a second run does only what changed
	@scripts/setup_env.sh $(VENV)

bench-env:  ## env, and what the benchmarks compare with
	@scripts/setup_env.sh $(VENV) --bench

demo: $(ENV)  ## bring examples/quickstart.yaml up, complete prompts, compare with a plain server
	$(PYTHON) -m pdtransport.launch.demo examples/quickstart.yaml

# Three at a time (one often waits), a module's tests together, in the order that tests/conftest.py gives: tests/vllm, and
# beside it the others.
PARALLEL := -n 3 --dist loadgroup --no-loadscope-reorder --durations 15
test: $(ENV)  ## unit tests, processes, and vLLM: what every change must pass
	$(PYTHON) -m pytest -m "not more and not long" $(PARALLEL) $(ARGS)

test-more: $(ENV)  ## the tests marked "more": continuous integration runs them after make test
	$(PYTHON) -m pytest -m more -n 2 --dist loadgroup --no-loadscope-reorder --durations 15 $(ARGS)

test-fast: $(ENV)  ## unit tests and the simulator
	$(PYTHON) -m pytest -m "not more and not long" tests/unit tests/sim $(ARGS)

test-pythons: $(ENV)  ## test-fast on each Python from 3.10 to 3.13 that is found, in environments of their own (.nox)
	$(PYTHON) -m nox -- $(ARGS)

coverage: $(ENV)  ## test-fast with coverage, subprocesses included: lines and branches by room
	$(PYTHON) -m pytest -m "not more and not long" tests/unit tests/sim --cov --cov-report= $(PARALLEL) $(ARGS)
	$(PYTHON) -m scripts.covered

test-long: $(ENV)  ## the tests that are marked long, and only those: minutes each
	$(PYTHON) -m pytest -m long --durations 15 $(ARGS)

soak: $(ENV)  ## half an hour of requests beside a plain server: does anything grow? ARGS="--minutes 2": shorter
	$(PYTHON) -m tests.soak $(ARGS)

sanitize: $(ENV)  ## the C kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(PYTHON) -m tests.sanitize

mutants: $(ENV)  ## are bugs made on purpose found? ARGS=listed: a minute; all: what real processes must find, too
	$(PYTHON) -m tests.mutants $(ARGS)

SECONDS ?= 30
fuzz: $(ENV)  ## whatever arrives from outside, guided by coverage: SECONDS=30 of each kind, two at a time
	$(PYTHON) -m tests.fuzz all --seconds $(SECONDS)

model: $(ENV)  ## every state of small hand-offs, all cases: minutes; make test explores a part
	$(PYTHON) -m tests.model

lint: $(ENV) types  ## ruff, mypy, and which room imports which
	$(PYTHON) -m ruff check $(PRESENT)
	$(PYTHON) -m ruff format --check $(PRESENT)
	cd .mypy && PYTHONPATH=. $(FROM_MYPY) -c "from importlinter.cli import lint_imports_command as run; run()" \
		../pyproject.toml --no-cache

FROM_MYPY = $(if $(findstring /,$(PYTHON)),$(abspath $(PYTHON)),$(PYTHON))
# kernels/ and launch/ lie at the top but are pdtransport.kernels and pdtransport.launch: mypy reads a tree of links that
# has the installed shape.
types: $(ENV)
	@mkdir -p .mypy/pdtransport && echo '*' >.mypy/.gitignore && find .mypy/pdtransport -type l -delete
	@ln -s $(abspath $(wildcard pdtransport/*) kernels launch) .mypy/pdtransport/
	cd .mypy && $(FROM_MYPY) -m mypy --config-file ../pyproject.toml --cache-dir cache

format: $(ENV)  ## let ruff format and mend what it can
	$(PYTHON) -m ruff check --fix $(PRESENT)
	$(PYTHON) -m ruff format $(PRESENT)

bench: $(if $(ENV),bench-env)  ## the hand-off beside NIXL's, and the links
	$(PYTHON) -m benchmarks.handoff --against nixl --lens 512,2048,4000
	$(PYTHON) -m benchmarks.links

clean:  ## remove what was built and cached, but not .venv
	rm -rf build dist .coverage .nox .mypy .mypy_cache .pytest_cache .ruff_cache .hypothesis .demo *.egg-info
	find $(PRESENT) -name __pycache__ -prune -exec rm -rf {} +
