# make tiny    the whole loop on a laptop, minutes        make test    the tests, minutes
# make ladder  thoughts that pay, half a minute           make real    a real 135M model on Wikipedia, 42 minutes
#              MODEL=FOLDER DATA=FILE instead of the hub
# make setup   .venv with requirements.txt                make base    rebuild the mini-wiki and the tiny base
# make experiments         the runs that miniature/runs.jsonl lacks, then tables and plots (all anew: 150 runs)
# make experiments-quick   one claim on recorded and on fresh seeds, minutes      make figures   tables and plots alone
# A Linux laptop gets PyTorch's CUDA build by default; for the CPU build add INDEX=https://download.pytorch.org/whl/cpu
PYTHON ?= python3
INDEX ?=
RANKS ?= 2
ARGS ?=
STEPS ?= 5
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(if $(INDEX),--extra-index-url $(INDEX))
export OMP_NUM_THREADS ?= 1
# The laptop run and the tests are float32 on the CPU, also where there is a GPU
tiny ladder real methods test test-slow test-faults base experiments experiments-quick: export CUDA_VISIBLE_DEVICES =

.PHONY: setup tiny ladder real methods test test-slow test-faults base experiments experiments-quick figures lint clean
setup: .venv/.installed
.venv/.installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(PIP) -r requirements.txt
	touch $@

.venv/.installed-dev: .venv/.installed requirements-dev.txt
	$(PIP) -r requirements-dev.txt
	touch $@

methods: setup
	@for config in configs/tiny.yaml configs/tiny-*.yaml; do name=$$(basename $$config .yaml); \
	  $(BIN)/torchrun --nproc_per_node=$(RANKS) train.py $$config steps=$(STEPS) run_dir=runs/methods/$$name resume=never \
	    probe_passages=24 save_every=0 > runs-methods.log 2>&1 || { tail -n 40 runs-methods.log; exit 1; }; \
	  echo "$$name: $(STEPS) steps"; done; rm -f runs-methods.log
	$(BIN)/python metrics.py runs/methods/*

tiny: setup
	$(BIN)/torchrun --nproc_per_node=$(RANKS) train.py configs/tiny.yaml $(ARGS)

ladder: setup
	$(BIN)/torchrun --nproc_per_node=$(RANKS) train.py configs/ladder.yaml $(ARGS)

# Both stages go on where they were stopped
real: setup
	@echo "GB a rank and minutes of each stage on this CPU, by calculation, at the speed that it has now:"
	@for words in "-cold-start.yaml" ".yaml kept=0.4"; do $(BIN)/python -m bench plan configs/smollm2-135m$$words \
	  gpu=cpu gpus=$(RANKS) $(if $(MODEL),model=$(MODEL)) | grep -E "all of it|minutes|does not fit" || true; done
	$(BIN)/torchrun --nproc_per_node=$(RANKS) train.py configs/smollm2-135m-cold-start.yaml \
	  $(if $(MODEL),model=$(MODEL)) $(if $(DATA),data=$(DATA))
	$(BIN)/torchrun --nproc_per_node=$(RANKS) train.py configs/smollm2-135m.yaml \
	  model=runs/smollm2-135m-cold-start/checkpoints/latest/hf $(if $(DATA),data=$(DATA)) $(ARGS)

experiments: setup
	$(BIN)/python -m miniature run $(ARGS)
	$(BIN)/python -m miniature figures

experiments-quick: setup
	$(BIN)/python -m miniature again learns

figures: setup
	$(BIN)/python -m miniature figures

test: .venv/.installed-dev
	$(BIN)/python -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder -m "not slow and not faults" tests $(ARGS)

test-slow: .venv/.installed-dev
	$(BIN)/python -m pytest -q -m slow tests $(ARGS)

test-faults: .venv/.installed-dev
	$(BIN)/python -m pytest -q -m faults tests $(ARGS)

lint: .venv/.installed-dev
	$(BIN)/ruff check .

base: setup
	$(BIN)/python -m miniature base

clean:
	rm -rf .venv .pytest_cache .ruff_cache
