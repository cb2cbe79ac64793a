# Targets for people and for CI alike. `make help` lists them.
PYTHON ?= python3
PORT ?= 8080
PROFILE ?= embedded
SANDBOXES ?= local
BUILDER ?= $(shell for each in docker podman buildah; do $$each info >/dev/null 2>&1 && echo $$each && break; done)
BUILD_OPTIONS ?=
TAG ?= dev
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help

help: ## list the targets
	@awk -F':.*## ' '/^[a-z-]+:.*## /{printf "  make %-15s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

$(VENV)/.runtime: requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pigeon needs Python 3.11 or newer: make PYTHON=/path/to/python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.dev: $(VENV)/.runtime requirements-dev.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-dev.lock
	@touch $@

$(VENV)/.gcp: $(VENV)/.runtime requirements-gcp.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-gcp.lock
	@touch $@

up: $(if $(filter emulators kubernetes,$(PROFILE) $(SANDBOXES)),$(VENV)/.gcp,$(VENV)/.runtime) ## start everything on 127.0.0.1:PORT (default 8080); PROFILE=emulators, SANDBOXES=kubernetes
	@PIGEON_PROFILE=$(PROFILE) PIGEON_SANDBOXES=$(SANDBOXES) exec $(BIN)/pigeon up --port $(PORT)

demo: $(VENV)/.runtime ## a scripted session, streamed to this terminal
	@exec $(BIN)/pigeon demo

check: $(VENV)/.dev ## format, lint, types, import contracts, generated schemas
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python -m schemas.generate --check

test: $(VENV)/.dev ## every test but the cluster's, in random order, warnings as errors
	$(BIN)/python -m pytest --ignore=tests/cluster

test-fast: $(VENV)/.dev ## what is worth waiting for after every change: under two minutes
	$(BIN)/python -m pytest -m "not slow" tests/schemas tests/properties tests/infra tests/local tests/contracts/test_store.py tests/producers tests/consumers tests/journeys

test-emulators: $(VENV)/.dev ## contracts, journeys and rules on Google's emulators
	$(BIN)/python -m pytest tests/emulators tests/contracts

test-cluster: $(VENV)/.dev ## contract, journeys and isolation on the cluster that KUBECONFIG names, else on `make cluster`'s
	PIGEON_TEST_KUBECONFIG="$${KUBECONFIG:-}" $(BIN)/python -m pytest tests/cluster

.venv-checkov/.made: requirements-checkov.lock
	$(PYTHON) -m venv .venv-checkov
	.venv-checkov/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes -r requirements-checkov.lock
	@touch $@

check-manifests: $(VENV)/.dev .venv-checkov/.made ## checkov on every build of the manifests and on the images; needs kubectl
	@builds=$$(mktemp -d) && trap 'rm -rf "$$builds"' EXIT && $(BIN)/python -m infra.kubernetes.builds "$$builds" && \
	.venv-checkov/bin/checkov --framework kubernetes --compact --quiet --skip-download --directory "$$builds"
	.venv-checkov/bin/checkov --framework dockerfile --compact --quiet --skip-download --directory infra/images

images: ## both images with docker, podman or buildah, whichever works; TAG=dev, BUILDER=, BUILD_OPTIONS=, see docs/kubernetes.md
	@builder="$(BUILDER)" && test -n "$$builder" || { echo "no docker, podman or buildah works here" >&2; exit 1; }; \
	for image in python-terminal worker; do \
		$$builder build $(BUILD_OPTIONS) --file infra/images/$$image/Dockerfile --tag pigeon/$$image:$(TAG) . || exit; \
	done

cluster: $(VENV)/.runtime ## a Kubernetes cluster on this machine, as root, without a registry: docs/cluster.md
	@$(BIN)/python -m infra.cluster up

cluster-down: $(VENV)/.runtime ## end that cluster; nothing but its logs stays
	@$(BIN)/python -m infra.cluster down

bench: $(VENV)/.dev ## side-by-side figures; see bench/README.md
	$(BIN)/python -m bench

schemas: $(VENV)/.dev ## write schemas/json and schemas/openapi.json anew
	$(BIN)/python -m schemas.generate

lock: ## resolve the dependencies anew (needs uv)
	uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --extra build pyproject.toml -o requirements.lock
	uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --all-extras pyproject.toml -o requirements-dev.lock -c requirements.lock
	uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate --extra build --extra gcp --extra kubernetes pyproject.toml -o requirements-gcp.lock -c requirements-dev.lock
	uv pip compile --quiet --universal --generate-hashes --python-version 3.12 --no-header --no-annotate infra/images/python-terminal/requirements.in -o infra/images/python-terminal/requirements.lock
	echo 'checkov>=3.3,<4' | uv pip compile --quiet --universal --generate-hashes --python-version 3.11 --no-header --no-annotate - -o requirements-checkov.lock

clean: ## remove the environment; sessions and their transcripts in .pigeon stay
	rm -rf $(VENV) .venv-checkov

.PHONY: help up demo check test test-fast test-emulators test-cluster check-manifests images cluster cluster-down bench schemas lock clean
