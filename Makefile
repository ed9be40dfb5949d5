# Two commands matter: make demo and make test. make help lists all.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
PIP := $(VENV)/bin/pip --disable-pip-version-check -qq
READY := $(VENV)/.ready
LISTS := requirements/torch.txt requirements/cpu.txt requirements/dev.txt
WANTED := $(shell cat $(LISTS) | cksum)
SEED ?= 0
DEMO_DIR ?= results/demo
TRAIN_FLAGS ?=
RUN ?= $(DEMO_DIR)/run

.DEFAULT_GOAL := help
.PHONY: FORCE help setup install doctor demo demo-real report test test-all test-faults test-docs test-lightrft bench soak lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)
	@echo "  variables: PYTHON (default python3, needs 3.11 or newer); SEED, DEMO_DIR and TRAIN_FLAGS for the demo;"
	@echo "  RUN and COMPARE for the report"

setup: $(READY) ## make .venv with everything the CPU needs (2 to 3 minutes, 3 GB)

# .venv/.ready holds the checksum of the lists that are installed: what a checkout does to the files' dates, or a user who
# has installed the packages himself, installs nothing
$(READY): FORCE
	@test -x $(PY) && test "$$(cat $@ 2>/dev/null)" = "$(WANTED)" || $(MAKE) --no-print-directory install

install:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, this is " + sys.version.split()[0] + "; set PYTHON=...")'
	@rm -f $(READY)
	@test -x $(PY) || $(PYTHON) -m venv $(VENV)
	@$(PIP) install --no-index --no-deps $(LISTS:%=-r %) 2>/dev/null || { \
		echo "installing into $(VENV): torch, vLLM, DeepSpeed and what they need (2 to 3 minutes)" && \
		$(PIP) install -r requirements/torch.txt && \
		$(PIP) install --no-deps -r requirements/cpu.txt -r requirements/dev.txt; }
	@echo "$(WANTED)" > $(READY)

doctor: ## say what this machine can do and what is missing (8 seconds; also without .venv)
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) examples/r1_aqa/doctor.py

demo: $(READY) ## train a tiny Qwen2-Audio to listen, and show what it learned (2 to 4 minutes)
	@$(PY) examples/r1_aqa/demo/run_demo.py --out_dir $(DEMO_DIR) --seed $(SEED) -- $(TRAIN_FLAGS)

demo-real: $(READY) ## the same with real recordings and Whisper's encoder (Debian 12; 600 MB to download, then 10 minutes)
	@$(PY) examples/r1_aqa/demo/run_demo.py --real --out_dir $(if $(filter file,$(origin DEMO_DIR)),results/demo-real,$(DEMO_DIR)) --seed $(SEED) -- $(TRAIN_FLAGS)

report: ## one page about a run: RUN=results/..., COMPARE="other runs and result files of eval_mmau.py"
	@$(if $(wildcard $(PY)),$(PY),$(PYTHON)) examples/r1_aqa/report.py "$(RUN)" $(if $(COMPARE),--compare $(COMPARE))

test: $(READY) ## run the tests (about 9 minutes)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-all: $(READY) ## the same and the slow ones that CI leaves out (about 20 minutes)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not faults and not docs"

test-faults: $(READY) ## kill, stop and confuse runs; thousands of bad rows and responses (about 20 minutes)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m faults

test-docs: $(READY) ## run the commands of the documents; needs make demo (about 2 minutes)
	@OMP_NUM_THREADS=1 $(PY) -m pytest -m docs

test-lightrft: $(READY) ## run the tests inside LightRFT itself: LIGHTRFT_HOME=/path/to/LightRFT (about 6 minutes)
	@if [ -z "$(LIGHTRFT_HOME)" ]; then \
		echo "skipped: LIGHTRFT_HOME is not set; it must name a checkout of opendilab/LightRFT at commit 49e62cb"; \
	else \
		$(PIP) install --no-deps -r requirements/lightrft.txt && \
		LIGHTRFT_HOME="$(LIGHTRFT_HOME)" OMP_NUM_THREADS=1 $(PY) -m pytest tests/lightrft; \
	fi

bench: $(READY) ## measure each part against its baseline; needs make demo (about 25 minutes)
	@$(PY) benchmarks/run_all.py --demo_dir $(DEMO_DIR) $(if $(SWIFT_PYTHON),--swift_python $(SWIFT_PYTHON)) $(if $(LIGHTRFT_HOME),--lightrft_home $(LIGHTRFT_HOME))

soak: $(READY) ## 2,000 steps in one run: memory, time a step, log-probs; needs make demo (about 10 minutes)
	@$(PY) benchmarks/soak.py --demo_dir $(DEMO_DIR)

lint: $(READY) ## check style and which package may import which
	@$(VENV)/bin/ruff check . && $(VENV)/bin/ruff format --check .
	@PYTHONPATH=examples/r1_aqa:runtime $(VENV)/bin/lint-imports

clean: ## remove .venv and the demos; downloads, your own runs and logs stay
	rm -rf $(VENV) results/demo results/demo-real
