"""What only a GPU can show, skipped without one: the first part of `python -m bench.gpu`, one test each."""
import argparse
from functools import partial

import pytest
import torch

from bench import gpu

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def by_text(bench):
    gpu.smoke(bench, "text", "--condition", "text")


@pytest.mark.parametrize("check", [
    partial(gpu.methods, tune="attention"), partial(gpu.methods, tune="all"), gpu.lengths, gpu.noise,
    gpu.sampling, gpu.replayed, gpu.stopped, by_text])
def test_on_a_gpu(check, tmp_path):
    check(gpu.Bench(argparse.Namespace(device="cuda", out=tmp_path, work=tmp_path / "runs", tiny=True,
                                       minutes=5)))
