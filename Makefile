# make demo   virtual environment, then the default run: train, sample, evaluate (minutes: README.md)
# make test   virtual environment, then the tests
PY = .venv/bin/python
.PHONY: demo test lint bench

.venv/ready: requirements.txt
	python3 -m venv .venv
	$(PY) -m pip install -q -r requirements.txt
	touch .venv/ready

demo: .venv/ready
	$(PY) train.py
	$(PY) sample.py runs/digits --n 100 --out runs/digits/release/grid.png
	$(PY) evaluate.py runs/digits

test: .venv/ready
	$(PY) -m pytest

lint: .venv/ready
	$(PY) -m pip install -q ruff
	$(PY) -m ruff check .

bench: .venv/ready
	$(PY) -m bench.dp_step
	$(PY) -m bench.accountant
