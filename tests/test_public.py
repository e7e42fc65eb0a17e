"""What the public networks know: no private image may be among it, whatever its name, place or checkpoint.

All stages on tiny networks, the public ones without training: only what they say of themselves matters here.
"""
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import datasets
import train
import unet
import vae
from datasets import photos
from support import dry_run, files, presets

TINY = presets.PRESETS["faces"] | dict(
    vae=vae.VAEConfig(3, 3, 4, (1, 1, 1), num_groups=4), unet=unet.UNetConfig(4, 4, 16, (1,), num_groups=4),
    flips=False, vae_steps=1, ldm_steps=1, batch_size=8, steps=1, micro_batch=8, sample_steps=1, delta=1e-3,
    sigma=2.0, accountant="rdp")
NOTHING = "nothing would be private"


@pytest.fixture(scope="module", autouse=True)
def tiny():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "faces", TINY)
        patch.setattr(train, "fit", lambda *args, **named: None)
        yield


def write_images(base, n, seed):
    """n images of noise in two class folders."""
    generator = np.random.default_rng(seed)
    for i in range(n):
        (base / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (32, 32, 3), np.uint8)
        Image.fromarray(noise).save(base / "ab"[i % 2] / f"{i}.png")


def run_tiny(out, public, private, *flags):
    train.main(["--preset", "faces", "--precision", "float32", "--device", "cpu", "--public", public,
                "--private", private, "--out", str(out), *map(str, flags)])
    return out


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Two folders of images, and a run whose public networks were trained on the first."""
    place = tmp_path_factory.mktemp("public")
    write_images(place / "first", 40, 0)
    write_images(place / "second", 40, 1)
    run_tiny(place / "run", f"folder:{place / 'first'}", f"folder:{place / 'second'}", "--steps", 0)
    return place


def test_the_digests_of_public_images_travel_with_the_networks(place, tmp_path):
    found = [files.load(place / "run" / "public" / name) for name in ("vae.pt", "ldm.pt")]
    expected = datasets.digests(datasets.load(f"folder:{place / 'first'}").images)
    assert all(torch.equal(c["digests"], expected) for c in found) and len(expected) > 30
    second = f"folder:{place / 'second'}"
    out = run_tiny(tmp_path / "r", f"folder:{place / 'first'}", second, "--init", place / "run")
    assert files.read_json(out / "release" / "privacy.json")["steps"] == 1  # no image in common
    assert torch.equal(files.load(out / "public" / "ldm.pt")["digests"], expected)
    assert b"digests" not in (out / "release" / "model.pt").read_bytes()
    # A feature network that learned another folder is not taken for one of this folder.
    (place / "run" / "public" / "features.pt").write_bytes(b"of other images")
    again = run_tiny(tmp_path / "q", f"folder:{place / 'first'}", second, "--init", place / "run")
    (place / "run" / "public" / "features.pt").unlink()
    assert not (again / "public" / "features.pt").exists()
    for name in ("vae.pt", "ldm.pt"):  # the same holds when a run goes on
        path = out / "public" / name
        checkpoint = files.load(path)
        files.save({**checkpoint, "digests": datasets.digests(datasets.load(second).images[:1])}, path)
        with pytest.raises(ValueError, match=f"images of it .* {NOTHING}"):
            train.main(["--resume", "--out", str(out)])
        files.save(checkpoint, path)
    train.main(["--resume", "--out", str(out)])


def road(kind, place, there):
    """The images of `first` on another road -> (name of a private set, its flags)."""
    if kind == "copied":
        shutil.copytree(place / "first", there / "copied")
        return f"folder:{there / 'copied'}"
    if kind == "one of them":
        shutil.copytree(place / "second", there / "mixed")
        files, *_ = photos.tree(place / "first")
        keys = photos.own_keys([place / "first" / file for file in files])
        public = next(file for file, key in zip(files, keys, strict=True) if key % 10)  # not held out
        shutil.copy(place / "first" / public, there / "mixed" / "a" / "x.png")
        return f"folder:{there / 'mixed'}"
    if kind == "as arrays":
        images = datasets.load(f"folder:{place / 'first'}").images
        np.savez(there / "own.npz", images=images.permute(0, 2, 3, 1).numpy(), class_names=["x"])
        return f"npz:{there / 'own.npz'}"
    base = there / "celeba"  # in CelebA's layout, with a border that the crop takes off again
    (base / "img_align_celeba").mkdir(parents=True)
    rows = []
    for i, file in enumerate(sorted((place / "first").rglob("*.png"))):
        framed = Image.new("RGB", (32, 40))
        framed.paste(Image.open(file), (0, 4))
        framed.save(base / "img_align_celeba" / f"{i}.png")
        rows.append(f"{i}.png")
    (base / "list_attr_celeba.txt").write_text(f"{len(rows)}\nMale\n" + "".join(f"{row} 1\n" for row in rows))
    (base / "list_eval_partition.txt").write_text("".join(f"{row} 0\n" for row in rows))
    return "celeba"


@pytest.mark.parametrize("kind", ["copied", "one of them", "as arrays", "as celeba"])
def test_init_does_not_hide_what_the_networks_know(kind, place, tmp_path):
    """The public set at hand is another one: only the checkpoints of the earlier run know."""
    private = road(kind, place, tmp_path)
    write_images(tmp_path / "third", 40, 2)
    with pytest.raises(ValueError, match=NOTHING) as caught:
        run_tiny(tmp_path / "r", f"folder:{tmp_path / 'third'}", private, "--init", place / "run",
                 "--data-root", tmp_path)
    assert "\n" not in str(caught.value) and "images of it are" in str(caught.value)  # not how many
    assert not (tmp_path / "r").exists()


def test_the_public_set_at_hand_is_checked_as_well(place, tmp_path):
    """Without --init it is what will be trained on, with it what the release shows beside the samples."""
    shutil.copytree(place / "second", tmp_path / "copied")
    for flags in ([], ["--init", place / "run"]):
        with pytest.raises(ValueError, match=f"images of it .* {NOTHING}"):
            run_tiny(tmp_path / "r", f"folder:{tmp_path / 'copied'}", f"folder:{place / 'second'}", *flags)
        assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("steps", [0, 1])
@pytest.mark.parametrize("public, private", [("first", "first"), ("first", "first/a"), ("first/a", "first")])
def test_one_place_is_refused_before_any_image_is_read(public, private, steps, place, tmp_path, monkeypatch):
    """Public = parent or part of private, relative to the data root against absolute.

    Without private steps too: the statement of such a run says that no private image was read.
    """
    monkeypatch.setattr(datasets, "load", None)  # calling it would be a TypeError
    with pytest.raises(ValueError, match=NOTHING):
        run_tiny(tmp_path / "r", f"folder:{public}", f"folder:{place / private}", "--data-root", place,
                 "--steps", steps)


def altered(place, there, change):
    """A copy of the run whose public checkpoints were changed."""
    shutil.copytree(place / "run", there / "altered")
    for name in ("vae.pt", "ldm.pt"):
        path = there / "altered" / "public" / name
        checkpoint = files.load(path)
        change(checkpoint)
        files.save(checkpoint, path)
    return there / "altered"


def test_few_images_are_drawn_where_no_network_is_trained_on_them(tmp_path, monkeypatch):
    drawn, load = [], datasets.load

    def watched(name, *args, **kwargs):
        if name == "strokes":
            drawn.append(kwargs["n"])
        return load(name, *args, **kwargs)

    monkeypatch.setattr(datasets, "load", watched)
    flags = ["--preset", "smoke", "--public-n", "1200", "--steps", "0", "--vae-steps", "1", "--ldm-steps",
             "1"]
    train.main([*flags, "--out", str(tmp_path / "a")])
    train.main([*flags, "--init", str(tmp_path / "a"), "--out", str(tmp_path / "b")])
    assert drawn == [1200, 1000]
    assert (tmp_path / "b" / "release" / "comparison.png").exists()


@pytest.mark.parametrize("origin", ["folder", "public32", "strokes"])
def test_networks_from_before_digests_are_taken_only_if_drawn_images_made_them(origin, place, tmp_path):
    init = altered(place, tmp_path, lambda c: (c.pop("digests"), c.update(trained_on=origin)))
    flags = (f"folder:{place / 'first'}", f"folder:{place / 'second'}", "--init", init)
    if origin == "strokes":
        run_tiny(tmp_path / "r", *flags)
        return
    with pytest.raises(ValueError, match="before digests .* train the public stages again") as caught:
        run_tiny(tmp_path / "r", *flags)
    assert "\n" not in str(caught.value) and not (tmp_path / "r").exists()


def test_a_release_is_no_public_network(place, tmp_path):
    release = place / "run" / "release" / "model.pt"
    message = "a release with a privacy statement, no public network"
    shutil.copytree(place / "run", tmp_path / "altered")
    shutil.copy(release, tmp_path / "altered" / "public" / "ldm.pt")
    sets = (f"folder:{place / 'first'}", f"folder:{place / 'second'}")
    for flags in (["--init", tmp_path / "altered"],):
        with pytest.raises(ValueError, match=message) as caught:
            run_tiny(tmp_path / "r", *sets, *flags)
        assert "\n" not in str(caught.value) and str(Path(flags[1])) in str(caught.value)


def test_a_dry_run_decodes_nothing_but_looks_where_the_sets_lie(place, tmp_path, monkeypatch):
    monkeypatch.setattr(photos, "decode", None)
    monkeypatch.setattr(dry_run, "estimate", lambda *args: None)
    first, second = f"folder:{place / 'first'}", f"folder:{place / 'second'}"
    run_tiny(tmp_path / "r", first, second, "--init", place / "run", "--dry-run")
    with pytest.raises(ValueError, match=NOTHING):
        run_tiny(tmp_path / "r", first, f"{first}/a", "--dry-run")


def test_private_classes_are_declared_on_the_command_line(place, tmp_path):
    images = np.random.default_rng(3).integers(0, 256, (40, 32, 32, 3), np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(40) % 2)
    sets = (f"folder:{place / 'first'}", f"npz:{tmp_path / 'own.npz'}", "--init", place / "run")
    with pytest.raises(ValueError, match="class_names.*--classes"):
        run_tiny(tmp_path / "r", *sets)
    out = run_tiny(tmp_path / "r", *sets, "--classes", "cat,dog")
    assert files.load(out / "release" / "model.pt")["classes"] == ["cat", "dog"]
    with pytest.raises(ValueError, match="--resume.*classes"):
        train.main(["--resume", "--out", str(out), "--classes", "dog,cat"])
