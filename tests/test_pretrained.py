"""pretrained/: every file is what its note says, and is a public network of drawn images."""
import hashlib
import shlex
from functools import partial

import pytest
import torch

import datasets
import diffusion
import dp_sgd
import pretrained.__main__ as pretrained
import tuning
from bench import runs
from extensions.bookkeeping import bookkeeping
from support import checkpoints, files, settings

NAMES = sorted(path.parent.name for path in pretrained.HERE.glob("*/note.json"))


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_what_its_note_says(name):
    folder = pretrained.HERE / name
    note = files.read_json(folder / "note.json")
    s = settings.parse(shlex.split(note["command"])[2:])
    for part in ("vae.pt", "ldm.pt"):
        path = folder / "public" / part
        assert hashlib.sha256(path.read_bytes()).hexdigest() == note["sha256"][part]
        checkpoint = checkpoints.load_public(path)
        assert checkpoint["trained_on"] == note["trained_on"][part] == s.public
        assert datasets.REGISTRY[s.public].drawn and len(checkpoint["digests"]) == 0
        checkpoints.check_finite(part, checkpoint)
    assert checkpoints.build_vae(files.load(folder / "public" / "vae.pt")).config == s.vae
    assert checkpoints.build_model(files.load(folder / "public" / "ldm.pt"))[0].unet.config == s.unet


def test_all_of_them_are_small():
    assert sum(path.stat().st_size for path in pretrained.HERE.rglob("*.pt")) < 16 * 2 ** 20


def test_half_precision_at_any_depth():
    found = pretrained.halved({"a": {"b": torch.ones(2), "c": torch.ones(2, dtype=torch.int64)}, "d": 1.5})
    assert found["a"]["b"].dtype == torch.float16 and found["a"]["c"].dtype == torch.int64
    assert found["d"] == 1.5


@pytest.mark.parametrize("bf16", [False, pytest.param(True, marks=pytest.mark.skipif(
    "bf16" not in runs.cpu(), reason="--precision auto takes bf16 only where the processor has it"))])
@pytest.mark.parametrize("name", ["digits", "garments"])
def test_one_image_more_changes_no_other_image_s_share_of_the_sum(name, bf16):
    """A micro-batch of 256 against one of 255: kernels may round differently for another size."""
    checkpoint = files.load(pretrained.HERE / name / "public" / "ldm.pt")
    model = checkpoints.build_model(checkpoint)[0]
    autoencoder = checkpoints.build_vae(files.load(pretrained.HERE / name / "public" / "vae.pt"))
    schedule, clip_norm, n = diffusion.Schedule(**checkpoint["schedule"]), 0.1, 256
    tuning.select_trainable(model, "attention")
    generator = torch.Generator().manual_seed(0)
    z0 = torch.randn(n, *autoencoder.latent_shape, generator=generator)
    batch = diffusion.draw(z0, torch.arange(n) % 10, 1, generator, schedule)

    def clipped_sum(rows):
        engine = dp_sgd.DPSGD(model, clip_norm, 1.0, n, method=bookkeeping)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            engine.accumulate(partial(diffusion.loss, schedule=schedule), *[item[rows] for item in batch])
        return torch.cat([total.double().flatten() for total in engine.sums])

    moved = clipped_sum(slice(n)) - clipped_sum(slice(n - 1))
    others = moved - clipped_sum(slice(n - 1, n))
    assert 0.99 * clip_norm < moved.norm() <= clip_norm * (1 + 1e-4)
    assert others.norm() <= 1e-4 * clip_norm
