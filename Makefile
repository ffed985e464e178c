.PHONY: check test bench docs

check:
	ruff check . && ruff format --check . && mypy -p d2f_fast && pytest

test:
	pytest

bench:
	pytest --benchmark

docs:
	pdoc --docformat google --output-directory site d2f_fast d2f_fast.base_model d2f_fast.data d2f_fast.evaluate \
		d2f_fast.kernels.lora_linear d2f_fast.export.inference d2f_fast.export.to_onnx
