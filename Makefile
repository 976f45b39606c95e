# The two commands of a newcomer are `make demo` and `make test`; both first make what they need (scripts/setup.sh).
PYTHON_BIN := .venv/bin/python
export PATH := $(PATH):$(CURDIR)/.tools/bin

.DEFAULT_GOAL := help
.PHONY: help setup setup-test demo test lint unit sim sim-pools collection fuzz proto manifests images images-check bench slow-pull clean

help:  ## Shows this list
	@sed -n 's/^\([a-z%-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

setup:  ## Installs what running Greenroom needs (.venv, .tools)
	@scripts/setup.sh

setup-test:  ## The same and what the tests need
	@scripts/setup.sh --test

demo: setup  ## Shows actors that sleep and wake, in about a minute
	@$(PYTHON_BIN) demo/run.py

test: setup-test lint  ## All checks and all tests
	$(PYTHON_BIN) -m pytest -n 2 --dist loadgroup $(ARGS)

lint: setup-test  ## Form, types and floors
	.venv/bin/ruff check
	.venv/bin/ruff format --check
	.venv/bin/mypy
	.venv/bin/lint-imports

unit: setup-test  ## The tests that need nothing but Python
	$(PYTHON_BIN) -m pytest -q tests/unit tests/sim $(ARGS)

sim: setup-test  ## Looks for a seed that breaks something: SEEDS=1000 FROM=0
	$(PYTHON_BIN) -m greenroom.testing.simulation --seeds $(or $(SEEDS),1000) --from $(or $(FROM),0) $(ARGS)

sim-pools: setup-test  ## The same for worker pools on Kubernetes
	$(PYTHON_BIN) -m greenroom.testing.pool_world --seeds $(or $(SEEDS),1000) --from $(or $(FROM),0) $(ARGS)

fuzz: setup-test  ## Looks for an archive or manifest that breaks the readers of images: EXAMPLES=20000
	GREENROOM_FUZZ_EXAMPLES=$(or $(EXAMPLES),20000) $(PYTHON_BIN) -m pytest -q --timeout=0 tests/unit/test_images_fuzz.py $(ARGS)

collection: setup-test  ## Searches every state of the models of the garbage collection: ARGS=--full
	$(PYTHON_BIN) -m greenroom.testing.collection $(ARGS)

manifests: setup-test  ## Writes deploy/crds.yaml and deploy/install.yaml again, from the records and the Helm chart
	$(PYTHON_BIN) scripts/crds.py
	$(PYTHON_BIN) scripts/manifests.py

images:  ## Builds the images greenroom and greenroom-agent: BASE=debian@sha256:... PREFIX=team/ TAG=...
	@scripts/images.sh

images-check:  ## Builds both on a Debian of this machine's mirror and looks at what is in them (root, buildah, minutes)
	@scripts/images_check.sh

proto: setup-test  ## Generates the code of the wire protocol again
	@scripts/proto.sh

bench: $(patsubst bench/%.py,bench-%,$(wildcard bench/[a-z]*.py))  ## Every benchmark; results in bench/results

bench-%: setup
	$(PYTHON_BIN) bench/$*.py $(ARGS)

slow-pull: setup-test  ## 360 MB over 10 Mbit/s and 400 ms, cut and killed on the way: six minutes (ARGS="--scale 0.1")
	$(PYTHON_BIN) bench/slow_pull.py $(ARGS)

clean:  ## Removes everything that setup, tests and benchmarks made
	rm -rf .venv .tools .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache bench/results dist
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
