PYTHON ?= python

.PHONY: check test bench

check:  ## style, types, floors
	$(PYTHON) -m ruff check src tests benchmarks
	$(PYTHON) -m ruff format --check src tests benchmarks
	$(PYTHON) -m pyright
	$(PYTHON) -m pytest tests/test_house.py

test:  ## everything but the slow tests
	$(PYTHON) -m pytest

bench:  ## speed beside transformers, fidelity to the original, quality of the bundled model
	$(PYTHON) benchmarks/inference.py
	$(PYTHON) benchmarks/fidelity.py
	$(PYTHON) benchmarks/bundled_model.py
