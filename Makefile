# `make demo` and `make test` each do the whole set-up first. Needs python3.11 or newer, pip and make.
# TEST_OPTIONS: more of pytest's, e.g. "-x tests/stages".
# JOBS: test files run at the same time; the tests of a file, and files that share an engine, stay together.
PYTHON ?= python3
JOBS ?= 2
VENV := .venv
BIN := $(VENV)/bin
PEERS := .venv-peers
AUDIT := .venv-audit
READY := $(VENV)/.ready

.PHONY: setup demo test test-all lint docs peers constraints audit doctor clean

setup: $(READY)

# A CPU machine gets torch's CPU build first, so that nothing pulls gigabytes of CUDA; a CUDA machine gets vLLM's choice.
# setuptools warns of every editable installation; this one is meant.
$(READY): pyproject.toml Makefile
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	export PYTHONWARNINGS='ignore:Editable installation'; \
	if command -v nvidia-smi >/dev/null 2>&1 && nvidia-smi -L >/dev/null 2>&1; then \
		$(BIN)/pip install --quiet -e '.[vllm,dev,docs]'; \
	else \
		$(BIN)/pip install --quiet torch==2.13.0 && $(BIN)/pip install --quiet -e '.[cpu,dev,docs]'; \
	fi
	$(BIN)/python -m capipe.models.torchvision_shim
	touch $@

demo: setup
	$(BIN)/capipe demo --out demo

# Every command and both in-process engines, in twelve minutes on two cores; slow tests are for test-all.
test: setup
	$(PYTEST) --quick $(TEST_OPTIONS)

# Everything, up to an hour.
test-all: setup
	$(PYTEST) --durations 25 $(TEST_OPTIONS)

PYTEST := $(BIN)/python -m pytest -n $(JOBS) --no-loadscope-reorder

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy $(PACKAGES)

PACKAGES := errors.py terminal.py manifests models stages trainer pipeline

# The site of docs/, in build/site; a link that leads nowhere ends it.
docs: setup
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

# What we measure against; its dependencies clash with ours, so it lives apart.
peers: $(PEERS)/.ready

$(PEERS)/.ready: Makefile
	test -x $(PEERS)/bin/python || $(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/pip install --quiet img2dataset
	touch $@

# The versions that are installed here, which the tests have run with. Local labels (+cpu) go: an index without them has
# other builds of the same version, and a constraint without one admits both.
constraints: setup
	$(BIN)/pip list --format freeze --exclude-editable --exclude capipe --exclude pip --exclude setuptools \
		| sed 's/+.*//' | LC_ALL=C sort -f > constraints.txt.new
	test -s constraints.txt.new && mv constraints.txt.new constraints.txt

# What is published against these versions. Needs https://pypi.org; a version that it cannot be asked about is a failure.
audit: $(AUDIT)/.ready
	$(AUDIT)/bin/pip-audit --strict --disable-pip --no-deps --progress-spinner off -r constraints.txt

$(AUDIT)/.ready: Makefile
	test -x $(AUDIT)/bin/python || $(PYTHON) -m venv $(AUDIT)
	$(AUDIT)/bin/pip install --quiet pip-audit
	touch $@

doctor: setup
	$(BIN)/capipe doctor

clean:
	rm -rf $(VENV) $(PEERS) $(AUDIT) demo build *.egg-info
