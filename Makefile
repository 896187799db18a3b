# The two commands of the README are `make demo` and `make test`; both install what they need into .venv, once.
PYTHON ?= python3
WORKLOAD ?= tabular
SERVE ?= no
VENV := .venv
BIN := $(VENV)/bin
DEMO_EXTRAS := compress,export,predict,serve,data,experiments

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow test-cuda lint format protocol benchmarks heart-disease survival-curves clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /  make \1\t/' | expand -t 20

demo: $(VENV)/.demo ## four organisations train, compress, export and serve one model (WORKLOAD=tabular|vision, SERVE=yes)
	$(BIN)/python -m experiments.demo scenario=$(WORKLOAD) serve=$(SERVE)

# Three processes on two cores: a quarter of the suite's time is spent waiting for sockets and other processes.
test: $(VENV)/.dev ## ruff, mypy, import-linter and the test suite
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n 3 --dist worksteal

test-slow: $(VENV)/.dev ## the tests that take long, and every property on new examples
	$(BIN)/python -m pytest -m "slow or hypothesis" --hypothesis-profile explore --timeout 900

test-cuda: $(VENV)/.dev ## every path that touches a device, on a GPU; without one it says so
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.cuda

lint: $(VENV)/.dev ## ruff, mypy and import-linter alone
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

format: $(VENV)/.dev ## let ruff sort and format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protocol: $(VENV)/.dev ## generate the gRPC code from the .proto files
	$(BIN)/python -m fedclaw.transport.grpc.protocol.generate
	$(BIN)/python -m fedclaw.serve.inference.protocol.generate

benchmarks: $(VENV)/.dev ## exchange, aggregation, private step, secure aggregation, simulation, scale, startup, export, latency, serving
	$(BIN)/python -m experiments.benchmarks.exchange
	$(BIN)/python -m experiments.benchmarks.aggregation
	$(BIN)/python -m experiments.benchmarks.dp_step
	$(BIN)/python -m experiments.benchmarks.secure_aggregation
	$(BIN)/python -m experiments.benchmarks.simulation
	$(BIN)/python -m experiments.benchmarks.scale
	$(BIN)/python -m experiments.benchmarks.startup
	$(BIN)/python -m experiments.benchmarks.export
	$(BIN)/python -m experiments.benchmarks.latency
	$(BIN)/python -m experiments.benchmarks.serving

heart-disease: $(VENV)/.demo ## FLamby's heart-disease table and beyond (DATA=directory of the four UCI files)
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.heart_disease data=$(DATA)

survival-curves: $(VENV)/.demo ## survival curves over TCGA-BRCA's regions and GBSG2 (DATA=directory of brca.csv, GBSG2=file of GBSG2)
	OMP_NUM_THREADS=1 $(BIN)/python -m experiments.survival_curves data=$(DATA) gbsg2=$(GBSG2)

clean: ## remove .venv, caches and the demo's output
	rm -rf $(VENV) runs/demo .mypy_cache .pytest_cache .ruff_cache

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "FedClaw needs Python 3.11 or newer; choose one with make PYTHON=python3.12 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# The stamps hold pyproject.toml's and the constraints' time: a changed dependency is installed, nothing twice.
$(VENV)/.demo: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[$(DEMO_EXTRAS)]'
	@touch $@

$(VENV)/.dev: pyproject.toml constraints.txt | $(BIN)/python
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	@touch $@ $(VENV)/.demo
