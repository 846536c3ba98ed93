# Every target does its own set-up: `make run` and `make test` work from a fresh clone.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
# A pip index with the small CPU build of torch, for those who want it: make run TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(TORCH_INDEX),--extra-index-url $(TORCH_INDEX))
export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: help setup run nano test test-distributed e2e e2e-k8s tools audit lint format compile images bench bench-gpu clean

help: ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(READY) ## make the environment

$(READY): requirements.lock requirements-nodeps.lock pyproject.toml
	@echo "setting up $(VENV) (about two minutes)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -r requirements.lock
	$(PIP) --no-deps -r requirements-nodeps.lock
	$(PIP) --no-deps --editable .
	touch $@

run: $(READY) ## the whole recipe on this machine
	$(BIN)/k2 run

nano: $(READY) ## the whole recipe in under a minute
	$(BIN)/k2 run --preset nano

test: lint ## lint and all tests
	OMP_NUM_THREADS=1 $(BIN)/pytest -n 2 --dist loadfile

test-distributed: $(READY) ## training over 2, 4 and 8 ranks against one process, and ranks that fail
	OMP_NUM_THREADS=1 K2_ALL_RANKS=1 $(BIN)/pytest -s tests/distributed tests/stages/test_pretrain_ranks.py

e2e: $(READY) ## all images, and the DAG in containers of the CPU image; needs root on Debian 12
	images=$$($(BIN)/python -m tests.e2e_containers.prepare) && \
	env $$images K2_E2E=containers $(BIN)/pytest tests/e2e_containers tests/images

e2e-k8s: $(READY) ## a real Kubernetes 1.20 with the platform and jobs on it; the same, and 12 CPU minutes once
	$(BIN)/python -m tests.e2e_k8s.build
	images=$$($(BIN)/python -m tests.e2e_containers.prepare cpu store) && \
	env $$images K2_E2E=k8s $(BIN)/pytest tests/e2e_k8s

tools: $(READY) ## fetch kubectl, helm, hadolint and promtool, with which more tests run
	$(BIN)/python manifests/tools.py

audit: $(READY) ## locked versions, files and licences, known weaknesses, and IMAGES; exit 3 where it cannot look
	$(BIN)/python -m manifests.audit $(IMAGES)

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## put the code into its canonical form
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

compile: $(READY) ## render the pipelines for Kubeflow into pipelines/compiled
	$(BIN)/k2 pipeline compile --deployment pipelines/deployments/gpu.yaml --revision 0000000000000000000000000000000000000000 --out pipelines/compiled

images: ## the CPU and the GPU image and the store's, with docker, podman or buildah
	$(PYTHON) images/build.py cpu
	$(PYTHON) images/build.py gpu
	$(PYTHON) images/build.py store

bench: $(READY) ## all benchmarks
	for topic in $$($(BIN)/k2 bench | grep -v gpu); do $(BIN)/k2 bench $$topic; done

bench-gpu: $(READY) ## GPU kernels against torch, SDPA and Liger; needs a CUDA GPU
	$(BIN)/k2 bench gpu

clean: ## remove the environment, the embedded store and the runs
	rm -rf $(VENV) .k2 runs
