# Everything runs in .venv, which is made on first use: a bare machine needs Python 3.11 or newer, and make.
#   make train   train on two replicas with DiLoCo and with data parallel, and compare (minutes, on a CPU)
#   make test    all tests but those marked `real`     make check   lint, format, types, house rules
#   make test-real   those: processes that talk to each other
#   make setup   all of the environment          make clean   remove it, and all runs

BIN := .venv/bin
# one thread a process: two replicas, or two test processes, share the cores
export OMP_NUM_THREADS := 1

# the first that runs and is new enough
PYTHONS := python3.11 python3
NEW_ENOUGH := import ensurepip, sys, venv; sys.exit(sys.version_info < (3, 11))

TRAIN := $(BIN)/torchrun --standalone --nproc_per_node 2 -m lowcomm train
QUICKSTART := runs/quickstart

.PHONY: train test test-real check setup clean

train: .venv/ready-to-train
	rm -rf $(QUICKSTART)
	$(TRAIN) --config configs/quickstart_diloco.yaml --out $(QUICKSTART)/diloco
	$(TRAIN) --config configs/quickstart_data_parallel.yaml --out $(QUICKSTART)/data_parallel
	$(BIN)/lowcomm report $(QUICKSTART)/diloco $(QUICKSTART)/data_parallel --out $(QUICKSTART)/report.html

test: .venv/ready-to-develop
	$(BIN)/pytest -n 2 --dist loadfile -m "not real"

# they have time limits and processes of their own, so they run one by one
test-real: .venv/ready-to-develop
	$(BIN)/pytest -m real tests/multiprocess

check: .venv/ready-to-develop
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/pytest -q tests/house

setup: .venv/ready-to-develop

clean:
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis

.venv/made:
	@for python in $(PYTHONS); do \
	    if $$python -c '$(NEW_ENOUGH)' 2>/dev/null; then \
	        echo "making .venv with $$($$python --version)"; \
	        $$python -m venv .venv && touch $@; exit $$?; \
	    fi; \
	done; \
	echo "lowcomm needs Python 3.11 or newer with its venv module; none of these is: $(PYTHONS)." \
	    "Install one (Debian and Ubuntu: python3-venv as well), or name yours: make PYTHONS=/path/to/python" >&2; \
	exit 2

.venv/ready-to-train: setup.py constraints.txt | .venv/made
	$(BIN)/pip install -q -c constraints.txt -e '.[report]'
	@touch $@

.venv/ready-to-develop: setup.py constraints.txt | .venv/made
	$(BIN)/pip install -q -c constraints.txt -e '.[dev]'
	@touch $@ .venv/ready-to-train
