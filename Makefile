# Every target sets itself up: the first one called makes .venv (requirements/env.sh), later ones find it current.
#   make demo                    train and evaluate a video model on this machine, on its processor alone if need be
#   make env PYTHON=python3.12   only the environment, with this interpreter
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help env demo test test-slow bench faults lint

SYSTEM ?= vit_llama
# Where the demo puts its corpus and shards, and its runs.
DATA ?= data/demo
RUNS ?= runs/demo
# More arguments for pytest: make test PYTEST_ARGS='-k shards -x'
PYTEST_ARGS ?=
# More arguments for the benchmarks, which add their figures to the same file: make bench BENCH_ARGS='--quick --json figures.json'
BENCH_ARGS ?=
# Trials of make faults, the seed of their series (none: another each time), and a file for their rows.
N ?= 20
SEED ?=
JSON ?=

# A process a core: the threads of several processes on few cores only wait for each other.
export OMP_NUM_THREADS ?= 1

help:
	@echo "make env          the environment (.venv), made once"
	@echo "make demo         render a corpus, train, evaluate, report (SYSTEM=vit_llama, vamos, vico, video_llama, video_chatgpt)"
	@echo "make test         lint and the fast tests"
	@echo "make test-slow    the rest: the demo for real, kill and resume, offload, a Slurm cluster on this machine"
	@echo "make bench        our training, scoring and loading against others' ways; clips encoded again; what a checkpoint costs (BENCH_ARGS='--quick --json FILE')"
	@echo "make faults N=20  that many faults injected into runs, each to be survived (SEED=7 repeats them, JSON=FILE takes the rows)"
	@echo "make lint         ruff and mypy"

env:
	@requirements/env.sh

demo: env
	@tools/demo.sh "$(SYSTEM)" "$(DATA)" "$(RUNS)"

lint: env
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

test: lint
	.venv/bin/python -m pytest --durations=15 $(PYTEST_ARGS)

test-slow: env
	.venv/bin/python -m pytest -m slow --durations=15 $(PYTEST_ARGS)

bench: env
	.venv/bin/python bench/vqa.py $(BENCH_ARGS)
	.venv/bin/python bench/data.py $(BENCH_ARGS)
	.venv/bin/python bench/video_llama.py $(BENCH_ARGS)
	.venv/bin/python bench/reencode.py $(BENCH_ARGS)
	.venv/bin/python bench/features.py $(BENCH_ARGS)
	.venv/bin/python bench/checkpoint.py $(BENCH_ARGS)

faults: env
	.venv/bin/python -m tests.faults --number $(N) $(if $(SEED),--seed $(SEED)) $(if $(JSON),--json $(JSON))
