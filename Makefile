# make demo   virtual environment, then the default run: train, sample, evaluate (minutes: README.md)
# make test   virtual environment, then the tests
# make docs   tables and walkthrough anew, and runs/walkthrough.html: paper and code side by side
# make course docs/course.md and its images: the cells of docs/course.ipynb and what they give (minutes)
PY = .venv/bin/python
.PHONY: demo test lint bench docs course

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

docs: .venv/ready
	$(PY) -m bench.tables --write
	mkdir -p runs
	$(PY) docs/weave.py --html runs/walkthrough.html

course: .venv/ready
	$(PY) docs/render.py
