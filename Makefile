# Every target sets up what it needs; nothing but Python 3.11+ and make is assumed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
# In a folder of its own: beside its OpenTelemetry exporters Ray's job agent does not start.
TORCHFT := $(CURDIR)/$(VENV)/torchft
ARGS   ?=
NAME   ?=

.PHONY: train test test-gpu test-s3 check bench soak ui lock clean help

help:            ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/ —/'

$(STAMP): requirements.lock pyproject.toml
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the locked requirements into $(VENV) (about 2 GB; a few minutes the first time)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

train: $(STAMP)  ## train the default experiment; ARGS="experiment=… optimizer.lr=0.1"
	@$(BIN)/descent train $(ARGS)

soak: $(STAMP)   ## 200 faults in one run, and whether anything of them shows in its result; some minutes
	@$(BIN)/descent chaos experiment=digits name=soak-$$(date +%s) epochs=null steps=6000 batch.size=64 \
		workers=4 spares=3 resources.cpus=0.25 evaluate.every=500 checkpoint.every=30s regroup.heartbeat_s=2 \
		tracking.system_metrics=false diagnostics.every=1000 chaos.faults=200 chaos.every_s=0.3 chaos.kinds.kill=2 \
		chaos.kinds.nan=4 chaos.kinds.slow=3 chaos.kinds.partition=6 chaos.kinds.kill_in_save=0.5 chaos.kinds.stop=0.5 \
		chaos.kinds.raylet=0.2 chaos.kinds.gcs=0.2 chaos.kinds.driver=0.2 $(ARGS)

ui: $(STAMP)     ## open the MLflow UI on the embedded store
	@$(BIN)/descent ui $(ARGS)

test: $(STAMP)   ## all tests, two files at a time; ARGS="-k name" selects, ARGS="-n 0" takes one after the other
	@$(BIN)/python -m pytest -n 2 --dist loadfile $(ARGS)

test-s3: $(STAMP)  ## the store on rclone's and Ceph's S3, which it installs (pip; apt as root) or leaves out
	@$(BIN)/python -m tests.storage $(ARGS)

test-gpu: $(STAMP)  ## the tests of what moves to a GPU, on the one here or on a stand-in that computes on the CPU
	@$(BIN)/python -m pytest tests/gpu $(ARGS)

check: $(STAMP)  ## ruff, mypy (strict), import-linter
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@$(BIN)/lint-imports --no-cache

bench: $(STAMP)  ## benchmarks; NAME="step_loop startup" selects
	@test -d $(TORCHFT) || $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(TORCHFT) \
		torchft==0.2.0 opentelemetry-exporter-otlp-proto-http==1.45.2 opentelemetry-exporter-otlp-proto-common==1.45.2 \
		opentelemetry-exporter-otlp-common==0.66b2 opentelemetry-exporter-http-transport==0.66b2
	@TORCHFT=$(TORCHFT) $(BIN)/python -m tests.bench $(NAME)

lock: $(STAMP)   ## rewrite requirements.lock from the current environment
	@$(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//' > requirements.lock

clean:           ## remove what the targets made
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .descent
