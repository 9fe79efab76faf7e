# Everything happens in .venv; nothing is needed before `make demo` or `make test` but python3 and make.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
EXTRAS ?= dev

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format proto proto-check bench up down clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-12s %s\n", $$1, $$2}'

install: $(VENV)/.installed  ## create .venv and install client and server, editable

$(VENV)/.installed: pyproject.toml client/pyproject.toml constraints.txt $(wildcard csrc/*)
	@$(PYTHON) -c 'import sys; v = sys.version_info; v >= (3, 11) or sys.exit("expertd needs Python 3.11 or newer, $(PYTHON) is %d.%d: try make PYTHON=python3.12" % v[:2])'
	@echo "Installing into $(VENV): some minutes the first time, most of them for torch"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ./client -e '.[$(EXTRAS)]'
	touch $@

demo: install  ## build a small checkpoint, serve it, check every answer
	$(BIN)/expertd-server demo

test: install  ## run every test that this machine can run, two files at a time, those that take long first
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

lint: install proto-check  ## ruff, mypy --strict, clang-format, buf, generated files up to date
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy server client
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks
	$(BIN)/clang-format --dry-run --Werror $(wildcard csrc/*.cu csrc/*.cuh csrc/*.cpp csrc/*.h)
	for script in scripts/*.sh; do bash -n $$script || exit 1; done

format: install  ## rewrite files the way `make lint` wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(wildcard csrc/*.cu csrc/*.cuh csrc/*.cpp csrc/*.h)
	$(BIN)/buf format -w proto

proto: install  ## regenerate client/expertd/v1 from proto/
	scripts/proto.sh generate $(BIN)

proto-check: install
	scripts/proto.sh check $(BIN)

bench: install  ## time the CPU backend; see benchmarks/ for the others
	$(BIN)/python benchmarks/bench_layer.py

up:  ## build the image and start two shards, two replicas each, and a worker
	docker compose -f deploy/docker-compose.yml build shard-0-a
	docker compose -f deploy/docker-compose.yml up --no-build --detach --wait

down:  ## stop what `make up` started
	docker compose -f deploy/docker-compose.yml down --volumes

clean:  ## remove .venv and build output
	rm -rf $(VENV) .venv-proto build dist
