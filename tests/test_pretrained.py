"""pretrained/: every file is what its note says, and is a public network of drawn images."""
import hashlib
import shlex

import pytest
import torch

import datasets
import pretrained.__main__ as pretrained
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
