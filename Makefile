.PHONY: check test bench docs

check:
	ruff check . && ruff format --check . && mypy -p d2f_fast && pytest

test:
	pytest

bench:
	pytest --benchmark

docs:
	pdoc --docformat google --output-directory site d2f_fast
