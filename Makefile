# Each command runs in a virtual environment of its own, which the first one creates and which is brought up to date
# where pyproject.toml or constraints.txt has changed. environment.sh lists the variables that choose Python and torch.

# The folder of the environment.
VENV ?= .venv
# Further arguments of pytest, such as PYTEST_ARGS="-x tests/flow".
PYTEST_ARGS ?=

RUN = "$(VENV)/bin/python" -m
unexport PYTHONHOME PYTHONPATH

.PHONY: demo test test-slow check bench docs environment

demo: environment
	$(RUN) d2f_fast demo --output_dir demo

test: environment
	$(RUN) pytest $(PYTEST_ARGS)

test-slow: environment
	$(RUN) pytest -m "slow and not gpu" $(PYTEST_ARGS)

check: environment
	$(RUN) ruff check . && $(RUN) ruff format --check . && $(RUN) mypy -p d2f_fast && $(RUN) pytest $(PYTEST_ARGS)

bench: environment
	$(RUN) pytest --benchmark $(PYTEST_ARGS)

docs: environment
	"$(VENV)/bin/python" docs/build_site.py

environment: $(VENV)/installed.txt
	@cat "$(VENV)/installed.txt"

$(VENV)/installed.txt: pyproject.toml constraints.txt environment.sh
	@bash environment.sh "$(VENV)"
