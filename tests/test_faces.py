"""Colour sets: CelebA's layout, own folders and arrays, errors in one line, all stages on tiny images."""

import errno
import json
import os
import runpy
import shutil
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import datasets
import diffusion
import evaluate
import metrics
import sample
import train
import unet
import vae
from bench import prompts
from datasets import photos
from extensions import memorisation
from support import command_line, files, guarantee, paper_networks, presets, run_folder, scored, settings

ATTRIBUTES = ["Male", "Wearing_Hat", "Zebra"]  # not CelebA's forty
N = 60


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DPLDM_DATA", str(tmp_path / "nothing"))


def write_celeba(root, name="celeba", n=N):
    """A folder in CelebA's layout -> the base folder. JPEG images of 22 x 28 pixels.

    Red grows with the image's number, green marks the first attribute. The top and bottom borders, outside
    the central square, are blue.
    """
    base = root / name
    (base / "img_align_celeba").mkdir(parents=True)
    rows, parts = [], []
    for i in range(n):
        pixels = np.zeros((28, 22, 3), np.uint8)
        pixels[3:25, :, 0], pixels[3:25, :, 1] = 4 * i, 200 * (i % 2)
        pixels[:3, :, 2] = pixels[25:, :, 2] = 255
        Image.fromarray(pixels).save(base / "img_align_celeba" / f"{i + 1:06d}.jpg", quality=95,
                                     subsampling=0)
        rows.append(f"{i + 1:06d}.jpg " + " ".join(f"{2 * bit - 1:2d}"
                                                   for bit in (i % 2, i % 3 == 0, i == 7)))
        parts.append(f"{i + 1:06d}.jpg {0 if i < 40 else 1 if i < 50 else 2}")
    (base / "list_attr_celeba.txt").write_text("\n".join([str(n), " ".join(ATTRIBUTES), *rows]) + "\n")
    (base / "list_eval_partition.txt").write_text("\n".join(parts) + "\n")
    return base


def one_line(caught, *words):
    message = str(caught.value)
    assert "\n" not in message and all(str(word) in message for word in words), message


# ---- CelebA's layout


def test_partition_attributes_and_labels(tmp_path):
    write_celeba(tmp_path)
    train_set, test_set = (datasets.load("celeba", split, tmp_path, 16) for split in ("train", "test"))
    assert len(train_set) == 40 and len(test_set) == 20  # partition 0; 1 and 2
    assert train_set.images.shape == (40, 3, 16,
                                      16) and train_set.images.dtype == torch.uint8 and train_set.side == 16
    assert list(train_set.attributes) == ATTRIBUTES and train_set.attributes[
        "Zebra"
    ].nonzero().flatten().tolist() == [7]
    assert train_set.labels.tolist() == [0, 1] * 20 and train_set.classes == ["female", "male"]
    assert torch.equal(test_set.attributes["Wearing_Hat"], torch.arange(40, 60) % 3 == 0)
    for whole, first in ((train_set, 0), (test_set, 40)):  # pictures, in order, belong to their rows
        red, green = whole.images[:, 0].float().mean((1, 2)), whole.images[:, 1].float().mean((1, 2))
        assert (red - 4 * torch.arange(first, first + len(whole))).abs().max() < 4
        assert torch.equal(green > 100, whole.labels == 1)
    other = datasets.load("celeba", "train", tmp_path, 16, label_attribute="Wearing_Hat")
    assert other.classes == ["not wearing hat", "wearing hat"]
    assert torch.equal(other.labels.bool(), other.attributes["Wearing_Hat"])


def test_the_central_square_is_resized_with_antialiasing(tmp_path):
    write_celeba(tmp_path)
    # the blue borders are cut off
    assert datasets.load("celeba", root=tmp_path, size=22, n=1).images[0, 2].float().mean() < 6
    stripes = np.zeros((218, 178, 3), np.uint8)
    stripes[:, ::2] = 255
    stripes[:20] = stripes[198:] = (255, 0, 0)
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    for size in (32, 64):
        x = photos.decode([tmp_path / "stripes.png"], size).float()
        assert x.shape == (1, 3, size, size)
        # grey: without antialiasing stripes would come back, 64 and more from grey
        assert (x - 127.5).abs().mean() < 10
    halves, turned = Image.new("RGB", (40, 20)), Image.Exif()
    halves.paste((255, 255, 255), (20, 0, 40, 20))
    turned[0x0112] = 6  # EXIF: was held upright, stored lying
    halves.save(tmp_path / "turned.jpg", exif=turned, quality=95)
    x = photos.decode([tmp_path / "turned.jpg"], 20)[0].float()  # the white half lies below
    assert x[:, :9].max() < 20 and x[:, 11:].min() > 235
    grey = photos.decode([tmp_path / "stripes.png"], 32, channels=1)
    assert grey.shape == (1, 1, 32, 32)


def test_a_subset_keeps_everything_together_and_dry_reading_decodes_nothing(tmp_path):
    base = write_celeba(tmp_path)
    whole, part = datasets.load("celeba", root=tmp_path,
                                size=16), datasets.load("celeba", root=tmp_path, size=16, n=11, seed=3)
    where = {picture.numpy().tobytes(): i for i, picture in enumerate(whole.images)}
    rows = torch.tensor([where[picture.numpy().tobytes()] for picture in part.images])
    assert len(rows.unique()) == 11 and torch.equal(part.labels, rows % 2)
    assert torch.equal(part.attributes["Wearing_Hat"], rows % 3 == 0)
    shutil.rmtree(base / "img_align_celeba")
    listed = datasets.load("celeba", root=tmp_path, size=64, decode=False)
    assert listed.images.shape == (40, 3, 64, 64) and listed.images.is_meta and len(listed) == 40


def test_where_the_folder_is_looked_for(tmp_path):
    base = write_celeba(tmp_path, "faces")
    assert datasets.load("faces", root=tmp_path, size=16).name == "faces"
    assert len(datasets.load("faces", root=base,
                             size=16)) == len(datasets.load("celeba", root=base, size=16)) == 40
    with pytest.raises(datasets.DataError) as caught:  # other faces are never called CelebA
        datasets.load("celeba", root=tmp_path, size=16)
    one_line(caught, "celeba/list_attr_celeba.txt", "download failed", "--data-root")


def break_celeba(kind, base):
    """One fault; returns the words that the error must hold."""
    attributes, partition = base / "list_attr_celeba.txt", base / "list_eval_partition.txt"
    picture = base / "img_align_celeba" / "000005.jpg"
    rows = attributes.read_text().splitlines()
    if kind == "truncated picture":
        picture.write_bytes(picture.read_bytes()[:400])
    elif kind == "no picture":
        picture.write_bytes(b"<html>")
    elif kind == "empty picture":
        picture.write_bytes(b"")
    elif kind == "missing picture":
        picture.unlink()
    elif kind == "missing row":
        attributes.write_text("\n".join([str(N - 1), *rows[1:6], *rows[7:]]))
    elif kind == "count":
        attributes.write_text("\n".join(rows[:-1]))
    elif kind == "value":
        attributes.write_text("\n".join([*rows[:6], "000005.jpg 1 0 1", *rows[7:]]))
    elif kind == "columns":
        attributes.write_text("\n".join([*rows[:6], "000005.jpg 1 1", *rows[7:]]))
    elif kind == "empty attributes":
        attributes.write_text("")
    elif kind == "bytes":
        attributes.write_bytes(b"\xff\xfe\x00")
    elif kind == "short partition":
        partition.write_text("\n".join(partition.read_text().splitlines()[:-1]))
        return partition, "no row for 000060.jpg"
    elif kind == "wrong partition":
        partition.write_text(partition.read_text().replace("000005.jpg 0", "000005.jpg 3"))
    elif kind == "no partition":
        partition.unlink()
    elif kind == "double":
        partition.write_text(partition.read_text() + "000005.jpg 0\n")
    elif kind == "all train":
        partition.write_text("".join(f"{i + 1:06d}.jpg 1\n" for i in range(N)))
    elif kind == "another set's partition":
        partition.write_text(partition.read_text().replace("0000", "0100"))
        return partition.name, attributes.name, "one of the two belongs to another set"
    if "picture" in kind:
        return (picture,)
    return (partition,) if kind in ("wrong partition", "no partition", "double",
                                    "all train") else (attributes,)


@pytest.mark.parametrize("kind", ["truncated picture", "no picture", "empty picture", "missing picture",
                                  "missing row", "count",
                                  "value", "columns", "empty attributes", "bytes", "short partition",
                                  "wrong partition",
                                  "another set's partition", "no partition", "double", "all train"])
def test_damage_is_one_line_that_names_the_file(tmp_path, kind):
    words = break_celeba(kind, write_celeba(tmp_path))
    with pytest.raises(ValueError) as caught:
        datasets.load("celeba", root=tmp_path, size=16)
    one_line(caught, *words)


def test_an_unknown_attribute_lists_those_there_are(tmp_path):
    write_celeba(tmp_path)
    with pytest.raises(ValueError) as caught:
        datasets.load("celeba", root=tmp_path, label_attribute="Smiling")
    one_line(caught, "--label-attribute Smiling", ", ".join(ATTRIBUTES))


def test_a_dry_run_refuses_a_set_whose_partition_alone_is_missing(tmp_path):
    write_celeba(tmp_path)
    (tmp_path / "celeba" / "list_eval_partition.txt").unlink()
    with pytest.raises(ValueError, match="list_eval_partition.txt cannot be read: No such file"):
        train.main(["--preset", "smoke", "--private", "celeba", "--data-root", str(tmp_path), "--dry-run"])


@pytest.mark.parametrize("name", ["../../x.jpg", "/etc/x.jpg", "a/../../x.jpg", "./000005.jpg", "a//b.jpg"])
@pytest.mark.parametrize("file", ["list_attr_celeba.txt", "list_eval_partition.txt"])
def test_lists_name_files_inside_their_folder_only(tmp_path, name, file):
    base = write_celeba(tmp_path)
    (base / file).write_text((base / file).read_text().replace("000005.jpg", name))
    with pytest.raises(ValueError) as caught:
        datasets.load("celeba", root=tmp_path, size=16)
    one_line(caught, base / file, f"line {7 if 'attr' in file else 5}", "inside the folder")


@pytest.mark.parametrize("file, content", [
    ("list_attr_celeba.txt", "1\nMale\n000001.jpg 1 HIV-positive\n"),
    ("list_attr_celeba.txt", "1\nMale\nHIV-positive\n"),
    ("list_attr_celeba.txt", "HIV-positive\nMale\n000001.jpg 1\n"),
    ("list_eval_partition.txt", "000001.jpg HIV-positive\n"), ("list_eval_partition.txt", "HIV-positive\n"),
    ("list_attr_celeba.txt", b"1\nMale\n000001.jpg HIV-positive\xff\n")])
def test_what_a_list_holds_is_not_repeated_in_the_error(tmp_path, file, content):
    base = write_celeba(tmp_path)
    (base / file).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError) as caught:
        datasets.load("celeba", root=tmp_path, size=16)
    one_line(caught, base / file)
    assert "HIV" not in str(caught.value) and "0xff" not in str(caught.value)


# ---- the cache


def modes(place):
    return {f"{path.stat().st_mode & 0o777:o}" for path in place.iterdir()}


@pytest.fixture
def no_umask():
    before = os.umask(0)
    yield
    os.umask(before)


def test_the_cache_is_its_owners_alone(tmp_path, monkeypatch, no_umask):
    write_celeba(tmp_path)
    monkeypatch.setattr(photos, "CACHE_FROM", 10)
    cache = tmp_path / "cache"
    datasets.load("celeba", root=tmp_path, size=16)
    assert f"{cache.stat().st_mode & 0o777:o}" == "700" and modes(cache) == {"600"}
    kept = next(cache.iterdir())
    cache.chmod(0o777), kept.chmod(0o666)  # as older versions left them
    (cache / f".{kept.name}.1.tmp").write_bytes(b"unfinished")
    datasets.load("celeba", root=tmp_path, size=16)
    assert f"{cache.stat().st_mode & 0o777:o}" == "700" and modes(cache) == {"600"}
    shared = tmp_path / "shared"  # a folder that holds other things is not the program's to close
    shared.mkdir(mode=0o777)
    (shared / "own.npy").write_bytes(b"x")
    datasets.load("celeba", root=tmp_path, size=16, cache=shared)
    assert f"{shared.stat().st_mode & 0o777:o}" == "777" and modes(shared) == {"666", "600"}
    assert f"{(shared / 'own.npy').stat().st_mode & 0o777:o}" == "666"


def test_internal_is_its_owners_alone(tmp_path, no_umask):
    out = tmp_path / "run"
    run_folder.prepare(out, resume=False)
    files.append_row({"step": 0}, out / "internal" / "ledger.jsonl")
    files.write_json({}, out / "internal" / "plan.json")
    files.write_json({}, out / "release" / "privacy.json")
    assert f"{(out / 'internal').stat().st_mode & 0o777:o}" == "700" and modes(out / "internal") == {"600"}
    assert modes(out / "release") == {"666"} and f"{(out / '.lock').stat().st_mode & 0o777:o}" == "600"
    (out / "internal").chmod(0o755), (out / "internal" / "ledger.jsonl").chmod(0o644)  # of an older version
    run_folder.prepare(out, resume=True)
    assert f"{(out / 'internal').stat().st_mode & 0o777:o}" == "700" and modes(out / "internal") == {"600"}
    # A program that prepares nothing writes into a copy.
    files.write_json({}, tmp_path / "copied" / "internal" / "evaluation.json")
    assert f"{(tmp_path / 'copied' / 'internal').stat().st_mode & 0o777:o}" == "700"
    assert modes(tmp_path / "copied" / "internal") == {"600"}

def test_the_cache_is_used_and_invalidated(tmp_path, monkeypatch):
    base, decoded = write_celeba(tmp_path), []
    monkeypatch.setattr(photos, "CACHE_FROM", 10)
    square = photos.square
    monkeypatch.setattr(photos, "square", lambda *args: (decoded.append(1), square(*args))[1])

    def read(**kwargs):
        decoded.clear()
        return datasets.load("celeba", root=tmp_path, **{"size": 16, **kwargs}).images, len(decoded)

    first, count = read()
    assert count == 40 and len(list((tmp_path / "cache").iterdir())) == 1
    again, count = read()
    assert count == 0 and torch.equal(first, again)
    assert read(size=20)[1] == 40 and read(channels=1)[1] == 40 and read(n=20)[1] == 20 and read(n=9)[1] == 9
    picture = base / "img_align_celeba" / "000001.jpg"
    before = picture.stat().st_size
    Image.new("RGB", (22, 28), (0, 0, 255)).save(picture)
    picture.write_bytes(picture.read_bytes().ljust(before, b"\0"))  # as long as before: only its time tells
    assert picture.stat().st_size == before
    changed, count = read()
    assert count == 40 and changed[0, 2].min() > 240
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(file.read_bytes()[:100])  # damaged: decoded anew
    assert torch.equal(read()[0], changed) and read()[1] == 0
    elsewhere = tmp_path / "elsewhere"
    assert torch.equal(datasets.load("celeba", root=tmp_path, size=16, cache=elsewhere).images, changed)
    assert len(list(elsewhere.iterdir())) == 1


def test_a_read_only_data_root_is_left_alone(tmp_path, monkeypatch):
    base = write_celeba(tmp_path / "root")
    monkeypatch.setattr(photos, "CACHE_FROM", 10)
    os.chmod(base.parent, 0o555)
    try:
        assert len(datasets.load("celeba", root=base.parent, size=16)) == 40
        assert sorted(p.name for p in base.parent.iterdir()) == ["celeba"]
    finally:
        os.chmod(base.parent, 0o755)
    (base.parent / "cache").write_text("a file where the folder should be")
    assert len(datasets.load("celeba", root=base.parent, size=16)) == 40


def test_a_cache_on_a_full_disk_is_done_without(tmp_path, monkeypatch):
    base = write_celeba(tmp_path / "root")
    monkeypatch.setattr(photos, "CACHE_FROM", 10)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    assert len(datasets.load("celeba", root=base.parent, size=16)) == 40


# ---- own folders and arrays


def write_pictures(base, names, size=(20, 30)):
    for i, name in enumerate(names):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", size, (i, 255 - i, 0)).save(base / name)


def test_own_folder_with_classes_and_the_split_of_each_picture_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    base = tmp_path / "own"
    names = [f"{kind}/deep/{i}.png" for kind in ("cat", "dog") for i in range(50)]
    write_pictures(base, names)
    (base / "cat" / "notes.txt").write_text("no picture")
    (base / "cat" / "._0.png").write_text("no picture either")
    train_set, test_set = (datasets.load(f"folder:{base}", split, size=8) for split in ("train", "test"))
    assert len(train_set) + len(test_set) == 100 and 2 <= len(test_set) <= 25
    assert train_set.classes == test_set.classes == ["cat", "dog"] and train_set.images.shape[1:] == (3, 8, 8)
    order = sorted(names)
    numbers = [sorted(names.index(order[i]) for i in range(100))]  # red holds the number of the picture
    red = torch.cat([train_set.images, test_set.images])[:, 0, 4, 4].sort().values
    assert red.tolist() == numbers[0]  # all pictures, none twice
    assert torch.equal(train_set.images[:, 0, 4, 4] >= 50, train_set.labels == 1)
    (base / "cat" / "deep" / "0.png").unlink()  # removing one picture moves no other to the other side
    left = [datasets.load(f"folder:{base}", split, size=8).images[:, 0, 4, 4].tolist()
            for split in ("train", "test")]
    assert left == [[r for r in x.images[:, 0, 4, 4].tolist() if r != 0] for x in (train_set, test_set)]
    # below the data root
    assert len(datasets.load("folder:own", root=tmp_path, size=8)) in (len(train_set), len(train_set) - 1)


def test_own_flat_folder_with_captions(tmp_path):
    base = tmp_path / "flat"
    names = [f"{i}.jpg" for i in range(30)]
    write_pictures(base, names)
    assert datasets.load(f"folder:{base}", size=8).captions is None
    (base / "captions.txt").write_text("".join(f"{name}\tpicture number {name}\n"
                                               for name in reversed(names)))
    loaded = datasets.load(f"folder:{base}", size=8)
    order = [name for name in sorted(names) if photos.own_keys([base / name])[0] % 10]
    assert loaded.captions == [f"picture number {name}" for name in order] and loaded.classes == ["picture"]
    part = datasets.load(f"folder:{base}", size=8, n=5)
    assert len(part.captions) == 5 and set(part.captions) <= set(loaded.captions)
    (base / "captions.txt").write_text("".join(f"{name}\tx\n" for name in order[1:]))
    with pytest.raises(ValueError) as caught:
        datasets.load(f"folder:{base}", size=8)
    one_line(caught, "captions.txt", order[0])
    (base / "captions.txt").write_text("0.jpg a caption without a tab\n")
    with pytest.raises(ValueError) as caught:
        datasets.load(f"folder:{base}", size=8)
    one_line(caught, "captions.txt", "TAB", "line 1")
    (base / "captions.txt").write_text("0.jpg\tx\n\n1.jpg\tHIV-positive\ttwice\n")
    with pytest.raises(ValueError) as caught:
        datasets.load(f"folder:{base}", size=8)
    one_line(caught, "captions.txt", "line 3")
    assert "HIV" not in str(caught.value)


def test_own_folder_refusals(tmp_path):
    write_pictures(tmp_path / "mixed", ["a/1.png", "2.png"])
    (tmp_path / "empty").mkdir()
    for name, word in (("mixed", "2.png"), ("empty", "no image"), ("absent", "not found")):
        with pytest.raises(ValueError) as caught:
            datasets.load(f"folder:{tmp_path / name}", size=8)
        one_line(caught, name, word)


def test_class_folders_declare_the_classes(tmp_path):
    """Removing one picture, the last of its class, takes no class away and moves no label."""
    base = tmp_path / "own"
    write_pictures(base, [f"{kind}/{i}.png" for kind in "ac" for i in range(20)] + ["b/x.png"])
    before = datasets.load(f"folder:{base}", size=8, private=True)
    (base / "b" / "x.png").unlink()
    after = datasets.load(f"folder:{base}", size=8, private=True)
    assert before.classes == after.classes == ["a", "b", "c"]
    assert before.labels.bincount(minlength=3)[2] == after.labels.bincount(minlength=3)[2] > 0
    (base / "b").rmdir()
    # declared, also without its folder
    asked = datasets.load(f"folder:{base}", size=8, classes=["c", "b", "a"])
    assert asked.classes == ["c", "b", "a"] and asked.labels.bincount(minlength=3)[1] == 0
    red = asked.images[:, 0, 4, 4]  # the first twenty pictures are of class a
    assert torch.equal(red < 20, asked.labels == 2)
    with pytest.raises(ValueError) as caught:
        datasets.load(f"folder:{base}", size=8, classes=["a", "b"], private=True)
    one_line(caught, base / "c", "--classes does not name")
    write_pictures(tmp_path / "flat", [f"{i}.png" for i in range(20)])
    assert datasets.load(f"folder:{tmp_path / 'flat'}", size=8, classes=["face"]).classes == ["face"]
    with pytest.raises(ValueError) as caught:
        datasets.load(f"folder:{tmp_path / 'flat'}", size=8, classes=["a", "b"])
    one_line(caught, "flat folder")


@pytest.mark.parametrize("name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "lost+found", "Thumbs"])
def test_hidden_and_system_folders_are_no_classes(tmp_path, name):
    write_pictures(tmp_path / "flat", [f"{i}.png" for i in range(20)] + [f"{name}/0.png"])
    write_pictures(tmp_path / "deep", [f"{kind}/{i}.png" for kind in "ab" for i in range(20)])
    write_pictures(tmp_path / "deep", [f"{name}/0.png", f"a/{name}/0.png"])
    flat, deep = (photos.tree(tmp_path / kind) for kind in ("flat", "deep"))
    assert flat[2] == ["picture"] and len(flat[0]) == 20 and deep[2] == ["a", "b"] and len(deep[0]) == 40


def write_npz(path, n=50, shape=(8, 8, 3), **arrays):
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (n, *shape), np.uint8)
    np.savez(path, **{"images": images, "labels": np.arange(n) % 3, "class_names": ["x", "y", "z"], **arrays})
    return images


def test_own_arrays(tmp_path):
    images = write_npz(tmp_path / "own.npz")
    train_set, test_set = (datasets.load(f"npz:{tmp_path / 'own.npz'}", split, size=8)
                           for split in ("train", "test"))
    assert train_set.classes == ["x", "y", "z"] and len(train_set) + len(test_set) == 50 and len(test_set) > 0
    numbers = {image.transpose(2, 0, 1).tobytes(): i for i, image in enumerate(images)}
    found = [[numbers[x.numpy().tobytes()] for x in part.images] for part in (train_set, test_set)]
    assert sorted(found[0]
                  + found[1]) == list(range(50)) and train_set.labels.tolist() == [i % 3 for i in found[0]]
    # without the first, all else as it was
    write_npz(tmp_path / "fewer.npz", images=images[1:], labels=np.arange(1, 50) % 3)
    fewer = datasets.load(f"npz:{tmp_path / 'fewer.npz'}", size=8)
    assert [numbers[x.numpy().tobytes()] for x in fewer.images] == [i for i in found[0] if i != 0]
    assert datasets.load(f"npz:{tmp_path / 'own.npz'}", size=4).images.shape[1:] == (3, 4, 4)
    np.savez(tmp_path / "bare.npz", images=images[..., 0])
    bare = datasets.load(f"npz:{tmp_path / 'bare.npz'}", size=12)
    assert bare.classes == ["0"] and bare.images.shape[1:] == (1, 12, 12) and bare.side == 8  # grey: padded


def test_the_classes_of_private_arrays_are_declared_and_never_counted(tmp_path):
    path, labels = f"npz:{tmp_path / 'own.npz'}", np.arange(50) % 3
    images = write_npz(tmp_path / "own.npz")
    assert datasets.load(path, size=8, private=True).classes == ["x", "y", "z"]
    with pytest.raises(ValueError) as caught:
        datasets.load(path, size=8, classes=["0", "1", "2"], private=True)
    one_line(caught, "x, y, z", "--classes")
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    assert datasets.load(path, size=8).classes == ["0", "1", "2"]  # of a public set they may be counted
    with pytest.raises(ValueError) as caught:
        datasets.load(path, size=8, private=True)
    one_line(caught, "class_names", "--classes")
    for kept in (labels >= 0, labels < 2):  # with and without all images of a class
        np.savez(tmp_path / "own.npz", images=images[kept], labels=labels[kept])
        assert datasets.load(path, size=8, classes=["a", "b", "c"], private=True).classes == ["a", "b", "c"]
    np.savez(tmp_path / "own.npz", images=images, labels=labels)
    with pytest.raises(datasets.DataError) as caught:
        datasets.load(path, size=8, classes=["a", "b"], private=True)
    one_line(caught, "labels outside 0..1")
    assert "2" not in str(caught.value).replace(str(tmp_path), ""), "the labels there are stay private"
    np.savez(tmp_path / "own.npz", images=images)  # without labels there is one class, whatever the images
    assert datasets.load(path, size=8, private=True).classes == ["0"]


@pytest.mark.parametrize("kind", ["unequal", "labels", "names", "twice", "wide", "scalar", "float labels",
                                  "no images"])
def test_own_arrays_refusals(tmp_path, kind):
    path = tmp_path / "own.npz"
    unequal = np.empty(2, dtype=object)
    unequal[:] = [np.zeros((8, 8, 3), np.uint8), np.zeros((9, 9, 3), np.uint8)]
    write_npz(path, **{"unequal": {"images": unequal}, "labels": {"labels": np.arange(49)},
                       "names": {"class_names": ["x", "y"]},
                       "twice": {"class_names": ["x", "y", "x"]},
                       "wide": {"images": np.zeros((50, 8, 9, 3), np.uint8)},
                       "scalar": {"images": np.uint8(3)},
                       "float labels": {"labels": np.full(50, 0.5)}, "no images": {}}[kind])
    if kind == "no images":
        np.savez(path, labels=np.zeros(3))
    with pytest.raises(datasets.DataError) as caught:
        datasets.load(f"npz:{path}", size=8)
    one_line(caught, path, *(["unequal"] if kind == "unequal" else []))


def test_public32_and_cifar10(tmp_path, monkeypatch):
    with pytest.raises(datasets.DataError) as caught:
        datasets.load("public32", root=tmp_path)
    one_line(caught, "public32.npz")
    images = write_npz(tmp_path / "public32.npz", shape=(32, 32, 3))
    loaded = datasets.load("public32", root=tmp_path)
    # for networks of one channel: luma, ITU-R BT.601
    grey = datasets.load("public32", root=tmp_path, channels=1).images
    luma = loaded.images.double().mul(torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
    # cut off, not rounded
    assert grey.shape == (len(loaded), 1, 32, 32) and (grey.double() - luma).abs().max() < 1.03
    assert np.array_equal(loaded.images.permute(0, 2, 3, 1).numpy(),
                          images) and loaded.classes == ["x", "y", "z"]

    class Offline:
        def __init__(self, *args, **kwargs):
            raise RuntimeError("no network")

    class Disk:
        classes = list("abcdefghij")

        def __init__(self, root, train, download):
            self.data, self.targets = (
                images[:20] if train else images[:10],
                [i % 10 for i in range(20 if train else 10)],
            )

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Offline)
    with pytest.raises(datasets.DataError) as caught:
        datasets.load("cifar10", root=tmp_path)
    one_line(caught, "cifar-10-batches-py", "download failed")
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Disk)
    assert datasets.load("cifar10", root=tmp_path).images.shape == (20, 3, 32, 32)
    assert len(datasets.load("cifar10", "test", tmp_path)) == 10


@pytest.mark.parametrize("name", ["folder", "folder:", "npz", "mnist:x", "nonsense:x", ""])
def test_unknown_names(name):
    with pytest.raises(ValueError) as caught:
        datasets.load(name)
    one_line(caught, "unknown data set", "folder:PATH")


# ---- all stages

TINY = ["--vae-steps", "2", "--vae-batch", "8", "--ldm-steps", "2", "--ldm-batch", "8", "--steps", "2",
        "--batch-size", "8",
        "--micro-batch", "8", "--sample-steps", "1", "--delta", "1e-3", "--precision", "float32", "--sigma",
        "2"]
SMALL = dict(vae=vae.VAEConfig(3, 3, 4, (1, 1, 1), num_groups=4),
             unet=unet.UNetConfig(4, 4, 16, (1,), num_groups=4))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All stages of the preset `faces` on a tiny data root, networks and all."""
    root = tmp_path_factory.mktemp("data")
    write_celeba(root, "faces")
    write_npz(root / "public32.npz", 40, (32, 32, 3))
    out = tmp_path_factory.mktemp("runs") / "faces"
    train.main(["--preset", "faces", *TINY, "--data-root", str(root), "--out", str(out)])
    return out, root


def test_faces_preset_end_to_end(run, monkeypatch):
    out, root = run
    release = sample.load_release(out)
    assert release.classes == ["female", "male"] and release.crop == 32
    assert sample.generate(release, [0, 1, 1], steps=2, progress=False).shape == (3, 3, 32, 32)
    assert Image.open(out / "release" / "comparison.png").size[0] > 18 * 32
    for path in (out / "release").iterdir():  # nothing says where the pictures lie
        assert str(root).encode() not in path.read_bytes(), path


def test_faces_are_evaluated(run, monkeypatch, capsys):
    out, root = run
    recipe = {"kind": "small-cnn", "epochs": 1, "lr": 2e-3}
    monkeypatch.setitem(evaluate.PROTOCOLS, "quick",
                        {"n": 20, "steps": 2, "eta": 0.0, "recipes": {"cnn": recipe}})
    monkeypatch.setattr(metrics, "FEATURES", recipe)
    assert evaluate.main([str(out), "--data-root", str(root), "--classifiers", "cnn"]) == 0
    result = json.loads((out / "internal" / "evaluation.json").read_text())
    assert (
        result["held_out"] == {"20 held out of faces": 20}
        and 0 <= result["accuracy"]["cnn"]["20 held out of faces"] <= 1
    )
    assert result["distance"]["frechet"] > 0 and "public32" in result["distance"]["features"]
    assert evaluate.main([str(out), "--data-root", str(root), "--memorisation", "--n", "30"]) == 0
    found = json.loads((out / "internal" / "memorisation.json").read_text())
    assert found["n"] == 30 and found["of_each"] == 20 and 0 <= found["closer_to_training"] <= 1
    assert (
        Image.open(out / "internal" / "memorisation.png").size[0] > 11 * 32
        and "PRIVATE" in capsys.readouterr().out
    )


def test_a_run_by_text_is_judged(tmp_path, monkeypatch, capsys):
    write_celeba(tmp_path, "faces")  # with the attributes Male and Wearing_Hat
    write_npz(tmp_path / "public32.npz", 40, (32, 32, 3))
    monkeypatch.setattr(prompts, "DRAWN", 2000)
    monkeypatch.setattr(prompts, "MOST", 10)
    monkeypatch.setattr(metrics, "STRONG", {"kind": "small-cnn", "epochs": 1, "lr": 1e-3})
    out, root = tmp_path / "run", ["--data-root", str(tmp_path)]
    train.main(["--preset", "faces", *TINY, "--condition", "text", *root, "--out", str(out)])
    assert prompts.main([str(out), "--n", "1", "--steps", "1", *root]) is None
    found = json.loads((out / "internal" / "prompts.json").read_text())["judges"]
    assert {name for name, judge in found.items() if "real" in judge["taught_by"]} == {"Male", "Wearing_Hat"}
    assert all(judge["shares"].keys() == prompts.PROMPTS.keys() for judge in found.values())
    assert "a man with a beard" in capsys.readouterr().out
    (out / "release").rename(tmp_path / "release")  # without its run folder
    with pytest.raises(ValueError, match="needs the run folder"):
        prompts.main([str(tmp_path / "release"), *root])


def test_memorisation_tells_copies_from_fresh_pictures():
    generator = torch.Generator().manual_seed(0)
    train_set, held_out, fresh = (torch.randn(400, 10, generator=generator).double() for _ in range(3))
    copies = memorisation.memorised(train_set[:100] + 1e-3, train_set, held_out)
    assert copies["closer_to_training"] == 1.0 and copies["distance_to_training_min_1%_median"][2] < 0.01
    # More training images than held-out ones: only a part is compared, but one copy of any of them is seen.
    few = memorisation.memorised(train_set[:100] + 1e-3, train_set, held_out[:100])
    assert abs(few["closer_to_training"] - 0.625) < 0.15 and few["of_each"] == 100
    one = memorisation.memorised(torch.cat([fresh, train_set[5:6]]), train_set, held_out[:100])
    nearest, chosen = (one[f"distance_to_{kind}_min_1%_median"][0] for kind in ("any_training", "training"))
    assert nearest < 1e-6 < chosen
    same = memorisation.memorised(fresh, train_set[:200], held_out)
    assert same["of_each"] == 200 and abs(same["closer_to_training"] - 0.5) < 4 * same["standard_error"]
    distances, index = memorisation.nearest(fresh[:5], train_set, 3)
    expected = (fresh[:5, None] - train_set).square().sum(2).sqrt().sort(1)
    assert torch.allclose(distances, expected.values[:, :3]) and torch.equal(index, expected.indices[:, :3])


def test_own_sets_end_to_end_and_evaluated_from_the_run_folder(run, tmp_path, monkeypatch):
    write_pictures(tmp_path / "public", [f"{c}/{i}.png" for c in "ab" for i in range(15)])
    write_npz(tmp_path / "private.npz", 60, (32, 32, 3))
    monkeypatch.setitem(presets.PRESETS, "faces", presets.PRESETS["faces"] | SMALL)
    out = tmp_path / "out"
    train.main(["--preset", "faces", *TINY, "--public", f"folder:{tmp_path / 'public'}", "--out", str(out),
                "--private",
                f"npz:{tmp_path / 'private.npz'}", "--data-root", str(tmp_path / "none")])
    release = sample.load_release(out)
    assert (
        release.classes == ["x", "y", "z"]
        and release.data["private"] == "npz"
        and release.data["public"] == "folder"
    )
    for path in (p for part in ("release", "public") for p in (out / part).iterdir()):
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert scored.sources(release, out) == [f"folder:{tmp_path / 'public'}",
                                            f"npz:{tmp_path / 'private.npz'}"]
    private = scored.sources(release, out)[1]
    assert len(next(iter(scored.held_out_sets(release, private).values()))) > 0
    (out / "internal" / "settings.json").unlink()
    with pytest.raises(ValueError, match="settings.json"):
        scored.sources(release, out)


def test_256_pixels_end_to_end(tmp_path, monkeypatch):
    """All stages at the size of the text preset, tiny networks: f = 8, 32x32x4 latents."""
    write_celeba(tmp_path, n=60)
    write_pictures(tmp_path / "public", [f"{i}.png" for i in range(12)])
    tiny = presets.PRESETS["celeba256-text"] | dict(
        vae=vae.VAEConfig(3, 3, 4, (1, 1, 1, 1), 1, (), 256, 4, 4, 4),
        schedule=diffusion.Schedule("cosine", "v"),
        unet=replace(paper_networks.UNETS["celeba256-text"], model_channels=16, channel_mult=(1, 1),
                     num_res_blocks=1, num_heads=2, attention_resolutions=(2,), context_dim=8, num_groups=4),
        text_width=16, text_layers=1)
    monkeypatch.setitem(presets.PRESETS, "celeba256-text", tiny)
    out = tmp_path / "out"
    train.main(["--preset", "celeba256-text", *TINY, "--vae-batch", "2", "--data-root", str(tmp_path),
                "--out", str(out),
                "--public", f"folder:{tmp_path / 'public'}", "--public-n", "8"])
    release = sample.load_release(out)
    assert release.vae.latent_shape == (4, 32, 32) and release.crop == 256
    for wanted in ([1], ["a smiling woman with a hat"]):
        assert sample.generate(release, wanted, steps=1, progress=False).shape == (1, 3, 256, 256)
    held_out = next(iter(scored.held_out_sets(release, release.data["private"], tmp_path).values()))
    assert held_out.images.shape == (20, 3, 64, 64)


def test_size_makes_the_autoencoder_larger(run):
    assert settings.parse(["--preset", "faces", "--size", "64"]).vae.resolution == 64
    assert settings.parse(["--preset", "celeba64"]).vae.resolution == 64
    out, root = run
    with pytest.raises(ValueError, match="--size 64"):
        train.main(["--preset", "faces", "--init", str(out), "--size", "64", "--data-root", str(root),
                    "--dry-run", "--precision",
                    "float32"])


@pytest.mark.parametrize("preset", ["celeba32", "celeba64", "celeba256-text"])
@pytest.mark.parametrize("condition", ["none", "class", "text"])
def test_every_preset_of_celeba_takes_every_condition(preset, condition):
    s = settings.parse(["--preset", preset, "--condition", condition])
    # the authors' first stage
    assert (s.perceptual_weight, s.adversarial_weight, s.adversarial_start) == (1.0, 0.5, 50_000)
    with torch.device("meta"):
        network = unet.UNet(s.unet)
        x, t = torch.empty(1, s.unet.in_channels, 8, 8), torch.zeros(1, dtype=torch.int64)
        context = torch.empty(1, 3, s.unet.context_dim) if s.unet.context_dim else None
        assert network(x, t, context).shape == x.shape and (context is None) == (condition == "none")


def test_a_dry_run_downloads_nothing_large_and_a_failed_download_says_why(tmp_path, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("gdown is required")

    for name in ("CelebA", "CIFAR10"):
        monkeypatch.setattr(torchvision.datasets, name, broken)
    with pytest.raises(datasets.DataError, match="download failed .gdown is required"):
        datasets.load("celeba", root=tmp_path)
    for name in ("CelebA", "CIFAR10"):
        monkeypatch.setattr(torchvision.datasets, name, None)  # calling it would be a TypeError
    for name in ("celeba", "cifar10"):
        with pytest.raises(datasets.DataError, match="not found"):
            datasets.load(name, root=tmp_path, decode=False)


def test_small_pictures_of_known_sets_are_said_to_be_enlarged(run, capsys, monkeypatch):
    assert (
        "178 pixels, enlarged to 256" in datasets.enlarged("celeba", 256)
        and datasets.enlarged("folder:x", 256) == ""
    )
    assert datasets.enlarged("celeba", 64) == datasets.enlarged("cifar10", 32) == ""
    monkeypatch.setattr(train.dry_run, "report", lambda *args: 0)  # which would time the networks
    train.main(["--preset", "faces", "--size", "256", "--dry-run", "--data-root", str(run[1]), *TINY,
                "--width", "32"])
    assert "enlarged to 256" in capsys.readouterr().err


def test_sixteen_bits_of_grey_are_scaled(tmp_path):
    Image.fromarray(np.full((8, 8), 32_768, np.uint16)).save(tmp_path / "deep.png")
    assert photos.square(tmp_path / "deep.png", 8, 3).unique().tolist() in ([127], [128])


def test_the_second_orientation_is_the_latent_of_the_mirrored_picture():
    s = settings.parse(["--preset", "faces"])
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(vae.VAEConfig(3, 3, 8, (1, 2))).eval()
    images = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    latents = train.encode(s, autoencoder, images, 2.0)
    assert latents.shape == (3, 2, 4, 16, 16)
    mirrored = train.encode(s, autoencoder, images.flip(-1), 2.0)
    assert torch.allclose(latents[:, 1], mirrored[:, 0], atol=1e-5)
    assert not torch.allclose(latents[:, 0], latents[:, 1], atol=1e-2)


@pytest.mark.parametrize("preset", ["celeba64", "celeba32", "celeba256-text", "cifar10"])
def test_dry_run_without_data_says_what_it_assumes(preset, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # has tests of its own, and takes its time
    monkeypatch.setattr(guarantee.accountant, "noise_multiplier", lambda *a: 1.0)

    def offline(*args, **kwargs):
        raise RuntimeError("no network")

    for name in ("CelebA", "CIFAR10"):
        monkeypatch.setattr(torchvision.datasets, name, offline)
    train.main(["--preset", preset, "--dry-run", "--device", "cpu", "--precision", "float32"])
    out = capsys.readouterr().out
    n = 50_000 if preset == "cifar10" else 162_770
    assert "ASSUMED" in out and f"n {n}," in out and "memory, GB" in out and "not measured" in out
    assert not list(tmp_path.iterdir())


def test_dry_run_without_data_takes_private_n(tmp_path, capsys):
    train.main(["--preset", "celeba64", "--dry-run", "--private-n", "20000", "--device", "cpu", "--sigma",
                "1", "--data-root",
                str(tmp_path), "--precision", "float32"])
    assert "n 20000," in capsys.readouterr().out


REFUSED = [
    (["--private", "folder"], "unknown data set"), (["--public", "npz"], "unknown data set"),
    (["--private", "public32"], "public only"),
    (["--private", "strokes"], "public only"), (["--size", "48"], "--size"),
    (["--label-attribute", "Smiling"], "Zebra"),
    (["--classes", "a,b"], "others were asked for"), (["--classes", "a,,b"], "--classes must be"),
    (["--private", "folder:/nonexistent/x"], "/nonexistent/x"),
    (["--private", "mnist10k"], "colour channels"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_bad_flags_are_refused_before_any_work(run, flags, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", None)
    with pytest.raises(SystemExit) as left:
        command_line.run_cli(lambda: train.main(["--preset", "faces", "--data-root", str(run[1]), *TINY,
                                                 *flags]))
    error = capsys.readouterr().err.strip().splitlines()
    assert left.value.code == 2 and message in error[-1] and error[-1].startswith("error: ")


def test_a_set_is_looked_at_from_the_shell(tmp_path, monkeypatch, capsys):
    write_pictures(tmp_path / "own", [f"{i}.png" for i in range(20)])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["datasets", "folder:own"])
    runpy.run_module("datasets", run_name="__main__")
    assert ", 3, 32, 32)" in (out := capsys.readouterr().out) and "['picture']" in out
    assert (tmp_path / "folder.png").stat().st_size > 100


def test_a_line_of_a_no_break_space_is_an_empty_line(tmp_path):
    (tmp_path / "list.txt").write_text("3\n\u00a0\na, b\n", encoding="utf-8")
    assert photos.read_lines(tmp_path / "list.txt") == [(1, ["3"]), (3, ["a", "b"])]
