"""Idle threads do not starve other work: every program asks for a short spin before torch is imported."""
import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# Many small operations by two threads each; prints the seconds.
WORK = """
import time
from support import threads
import torch
torch.set_num_threads(2)
a, b = torch.randn(64, 256), torch.randn(256, 256)
for _ in range(50):
    a @ b
begin = time.perf_counter()
for _ in range(500):
    torch.nn.functional.silu(a @ b)
print(time.perf_counter() - begin)
"""


def start(code, **environment):
    kept = {key: value for key, value in os.environ.items()
            if key not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env={**kept, **environment}, text=True,
                            stdout=subprocess.PIPE)


def first_import(path):
    tree = ast.parse(path.read_text())
    return next(ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))


@pytest.mark.parametrize("name", ["train.py", "sample.py", "evaluate.py", "bench/__init__.py",
                                  "extensions/__init__.py", "pretrained/__init__.py"])
def test_programs_and_packages_of_programs_ask_for_the_spin_before_anything_else(name):
    assert first_import(ROOT / name) == "from support import threads"


def test_the_spin_is_set_unless_the_user_has():
    code = "import os\nfrom support import threads\nprint(os.environ['GOMP_SPINCOUNT'])"
    for environment, expected in (({}, "1000"), ({"GOMP_SPINCOUNT": "77"}, "77")):
        assert start(code, **environment).communicate()[0].strip() == expected


def test_it_is_set_before_torch_is_imported():
    code = "import sys\nfrom support import threads\nprint('torch' in sys.modules)"
    assert start(code).communicate()[0].strip() == "False"


@pytest.mark.skipif(len(getattr(os, "sched_getaffinity", lambda _: [])(0)) < 2, reason="needs two cores")
def test_two_programs_side_by_side_do_not_starve_each_other():
    alone = float(start(WORK).communicate()[0])
    both = [start(WORK) for _ in range(2)]
    slower = max(float(process.communicate()[0]) for process in both)
    assert slower < 12 * alone + 1  # twice is fair; without a short spin it can be thirty times
