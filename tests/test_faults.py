"""Every kind of input that bug reports of other programs name: read, or named in one line.

Parametrised by kind; each test writes its own small input.
"""
import errno
import gzip
import json
import os
import socket
import struct
import types
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import datasets
import sample
import vae
from bench import autoencoder_limit
from datasets import arrays, photos, pixels, registry
from extensions import original_weights, text
from support import files, team

RANDOM = np.random.default_rng(0)
N = 60
IMAGES = RANDOM.integers(0, 256, (N, 8, 8, 3), np.uint8)
LABELS = np.arange(N) % 3
NAMES = ["ant", "bee", "cow"]


@pytest.fixture(autouse=True)
def no_data_root(monkeypatch, tmp_path):
    monkeypatch.setenv("DPLDM_DATA", str(tmp_path / "nothing"))


def refused(call, *words):
    """The message of a ValueError: one line with the words, that proposes to delete nothing."""
    with pytest.raises(ValueError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and "delete" not in message and "damaged" not in message, message
    assert all(str(word) in message for word in words), (words, message)
    return message


def draw(path, color=None, size=(12, 12), **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(zlib.crc32(path.name.encode(errors="replace"))).integers(
        0, 256, (*size, 3), np.uint8)
    (Image.fromarray(array) if color is None else Image.new("RGB", size, color)).save(path, **options)


def both(name, **options):
    """All images of an own set, from its two sides."""
    parts = [datasets.load(name, split, size=8, **options) for split in ("train", "test")]
    assert parts[0].classes == parts[1].classes
    return parts[0].classes, torch.cat([p.images for p in parts]), torch.cat([p.labels for p in parts])


def rows(images, labels):
    return sorted(zip((x.numpy().tobytes() for x in images), labels.tolist(), strict=True))


# ---- arrays: one meaning, many forms


FORMS = {
    "float": {"images": (IMAGES / 255).astype(np.float32)},
    "double": {"images": IMAGES / 255},
    "half": {"images": (IMAGES / 255).astype(np.float16)},
    "int64": {"images": IMAGES.astype(np.int64)},
    "uint16 to 255": {"images": IMAGES.astype(np.uint16)},
    "channels first": {"images": IMAGES.transpose(0, 3, 1, 2)},
    "column": {"labels": LABELS[:, None]},
    "one-hot": {"labels": np.eye(3)[LABELS]},
    "whole floats": {"labels": LABELS.astype(np.float32)},
    "bytes": {"class_names": np.array(NAMES, "S")},
    "names": {"labels": np.array(NAMES)[LABELS]},
    "other keys": {"images": None, "x": IMAGES, "labels": None, "y": LABELS}}


@pytest.mark.parametrize("kind", FORMS)
@pytest.mark.parametrize("private", [False, True])
def test_arrays_with_one_meaning_are_read(tmp_path, kind, private):
    usual = {"images": IMAGES, "labels": LABELS, "class_names": NAMES}
    np.savez(tmp_path / "a.npz", **usual)
    np.savez(tmp_path / "b.npz", **{k: v for k, v in (usual | FORMS[kind]).items() if v is not None})
    (names, images, labels), (_, x, y) = (both(f"npz:{tmp_path / n}", private=private)
                                          for n in ("b.npz", "a.npz"))
    assert names == NAMES and rows(images, labels) == rows(x, y)
    described = datasets.describe(f"npz:{tmp_path / 'b.npz'}", size=8)
    assert described.classes == NAMES and described.images.shape[1:] == (3, 8, 8)


@pytest.mark.parametrize("shape, axes", [((N, 8, 8), 1), ((N, 8, 8, 1), 1), ((N, 1, 8, 8), 1),
                                         ((N, 3, 8, 8), 3)])
def test_grey_and_colour_in_any_layout(tmp_path, shape, axes):
    np.savez(tmp_path / "a.npz", images=IMAGES.ravel()[: np.prod(shape)].reshape(shape))
    np.save(tmp_path / "a.npy", IMAGES.ravel()[: np.prod(shape)].reshape(shape))
    for file in ("a.npz", "a.npy"):
        assert both(f"npz:{tmp_path / file}")[1].shape == (N, axes, 8, 8)
        assert datasets.describe(f"npz:{tmp_path / file}", size=8).images.shape[1] == axes


@pytest.mark.parametrize("keys", [
    ("train_images", "train_labels", "val_images", "val_labels", "test_images", "test_labels"),
    ("x_train", "y_train", "x_val", "y_val", "x_test", "y_test")])
def test_stored_splits_are_kept(tmp_path, keys):
    cuts = (slice(0, 40), slice(40, 50), slice(50, 60))
    values = [x[cut] for cut in cuts for x in (IMAGES, LABELS[:, None])]
    np.savez(tmp_path / "m.npz", **dict(zip(keys, values, strict=True)))
    train, test = (datasets.load(f"npz:{tmp_path / 'm.npz'}", split, size=8, classes=["0", "1", "2"],
                                 private=True) for split in ("train", "test"))
    assert len(train) == 40 and len(test) == 20 and train.labels.tolist() == LABELS[:40].tolist()
    assert np.array_equal(train.images.permute(0, 2, 3, 1), IMAGES[:40])
    assert sorted(test.labels.tolist()) == sorted(LABELS[40:].tolist())


@pytest.mark.parametrize("classes, found", [
    (["1", "2", "3"], ["1", "2", "3"]),
    (["3", "1", "2"], ["3", "1", "2"]),
    (None, ["1", "2", "3"]),
    (["0", "1", "2"], "none of the classes"),
    (["a", "b", "c"], "labels - 1")])
def test_labels_that_count_from_one(tmp_path, classes, found):
    """Whole numbers are names where the names are numbers. Nothing is guessed from the labels that occur."""
    np.savez(tmp_path / "a.npz", images=IMAGES, labels=LABELS + 1)
    if isinstance(found, str):
        refused(lambda: both(f"npz:{tmp_path / 'a.npz'}", classes=classes, private=True), found)
        return
    names, images, labels = both(f"npz:{tmp_path / 'a.npz'}", classes=classes, private=classes is not None)
    right = {x.transpose(2, 0, 1).tobytes(): str(y + 1) for x, y in zip(IMAGES, LABELS, strict=True)}
    assert names == found and all(names[y] == right[x] for x, y in rows(images, labels))


@pytest.mark.parametrize("kind, arrays_there, words", [
    ("floats to 255", {"images": IMAGES.astype(np.float32)}, ["float32", "0..1", "convert like this"]),
    ("floats from -1", {"images": IMAGES / 127.5 - 1}, ["float64", "(images + 1) / 2"]),
    ("not numbers", {"images": np.full((9, 8, 8), np.nan)}, ["float64"]),
    ("16 bits", {"images": IMAGES.astype(np.uint16) * 257}, ["uint16", "65535"]),
    ("negative", {"images": IMAGES.astype(np.int16) - 5}, ["int16"]),
    ("flat rows", {"images": IMAGES.reshape(N, -1)}, ["reshape"]),
    ("alpha", {"images": np.zeros((9, 8, 8, 4), np.uint8)}, [":3"]),
    ("oblong", {"images": np.zeros((9, 8, 6), np.uint8)}, ["square"]),
    ("several labels", {"images": IMAGES, "labels": np.ones((N, 3))}, ["one-hot", "argmax"]),
    ("half labels", {"images": IMAGES, "labels": LABELS + 0.5}, ["whole numbers"]),
    ("twice", {"images": IMAGES, "labels": LABELS, "class_names": ["a", "b", "a"]}, ["'a' twice"]),
    ("objects", {"images": IMAGES, "labels": LABELS, "class_names": np.array(NAMES, object)}, ["dtype=str"]),
    ("other arrays", {"photos": IMAGES}, ["photos", "expected images"])])
def test_other_arrays_are_named_with_the_way_to_convert(tmp_path, kind, arrays_there, words):
    np.savez(tmp_path / "a.npz", **arrays_there)
    refused(lambda: datasets.load(f"npz:{tmp_path / 'a.npz'}", size=8), tmp_path / "a.npz", "expected",
            "convert", *words)


def test_pixels_are_scaled_by_constants_of_the_dtype_and_never_by_the_set():
    dark = IMAGES[:9] // 4
    for x in (dark, dark / 255, dark.astype(np.int32), (dark / 255).astype(np.float32)):
        assert np.array_equal(pixels.to_bytes(x, "x"), dark)
    assert pixels.to_bytes(np.array([True, False]), "x").tolist() == [255, 0]


# ---- files of another kind, by their first bytes


KINDS = {
    "LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "git lfs pull"),
    "HTML page": (b"\n<!DOCTYPE html><html>not found", "HTML page"),
    "server's error": (b"<?xml version='1.0'?><Error>", "XML"),
    "empty": (b"", "an empty file"),
    "half a zip": (b"PK\x03\x04" + bytes(100), "half a download"),
    "gzip": (gzip.compress(b"x"), "gzip"),
    "pickle": (b"\x80\x04N.", "pickle"),
    "JSON": (b'{"a": 1}', "JSON"),
    "HDF5": (b"\x89HDF\r\n\x1a\n", "HDF5"),
    "tar": (bytes(257) + b"ustar" + bytes(250), "tar")}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reader", ["arrays", "weights", "image"])
def test_files_of_another_kind_are_told_apart_by_their_first_bytes(tmp_path, kind, reader):
    raw, word = KINDS[kind]
    path = tmp_path / "a.png"
    path.write_bytes(raw)
    read = {"arrays": lambda: datasets.load(f"npz:{path}", size=8),
            "weights": lambda: original_weights.read(path),
            "image": lambda: photos.square(path, 8, 3)}[reader]
    assert "weights_only" not in refused(read, path, word, "found", "expected")


def write_safetensors(path, tensors):
    header, raw = {"__metadata__": {"format": "pt"}}, b""
    for name, value in tensors.items():
        data = value.numpy().tobytes()
        header[name] = {
            "dtype": {torch.float32: "F32", torch.int64: "I64", torch.float16: "F16"}[value.dtype],
            "shape": list(value.shape), "data_offsets": [len(raw), len(raw) + len(data)]}
        raw += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw)


def test_safetensors_are_read(tmp_path):
    path = tmp_path / "x.safetensors"
    tensors = {"a.weight": torch.randn(3, 4), "b": torch.tensor(7), "c": torch.randn(2).half(),
               "d": torch.zeros(0, 3)}
    write_safetensors(path, tensors)
    found = original_weights.read(path)
    assert found.keys() == tensors.keys() and all(torch.equal(found[k], v) for k, v in tensors.items())
    raw = path.read_bytes()
    for cut in (len(raw) - 1, 40):
        path.write_bytes(raw[:cut])
        refused(lambda: original_weights.read(path), path, "half a download")


def test_running_code_is_proposed_only_where_code_was_found(tmp_path):
    path = tmp_path / "it's.ckpt"
    torch.save({"state_dict": {}, "callbacks": {pytest.Item: 1}}, path)
    with pytest.raises(ValueError, match="weights_only=False") as caught:
        original_weights.read(path)
    assert "'\"'\"'s.ckpt'" in str(caught.value), "quoted for a shell"


# ---- pixels of image files


def save_mode(path, kind):
    grey = np.tile(np.linspace(0, 255, 16), (16, 1))
    ink = np.zeros((16, 16, 4), np.uint8)
    ink[4:12, 4:12, 3] = 255  # black on nothing
    clear = Image.fromarray(ink[..., 3]).convert("P")
    clear.putpalette([0] * 768)
    image, options = {
        "black on transparent": (Image.fromarray(ink), {}),
        "black on transparent, grey": (Image.fromarray(ink).convert("LA"), {}),
        "palette with transparency": (clear, {"transparency": 0}),
        "float 0..1": (Image.fromarray((grey / 255).astype(np.float32)), {}),
        "float 0..255": (Image.fromarray(grey.astype(np.float32)), {}),
        "32 bits to 255": (Image.fromarray(grey.astype(np.int32)), {}),
        "32 bits beyond": (Image.fromarray(grey.astype(np.int32) * 9000), {}),
        "16 bits": (Image.fromarray((grey * 257).astype(np.uint16)), {}),
        "12 bits in 16": (Image.fromarray((grey * 16).astype(np.uint16)), {})}[kind]
    image.save(path, **options)


@pytest.mark.parametrize("kind, expected", [
    ("black on transparent", "white"), ("black on transparent, grey", "white"),
    ("palette with transparency", "white"), ("float 0..1", "ramp"), ("float 0..255", "beyond 0..1"),
    ("32 bits to 255", "ramp"), ("32 bits beyond", "int32"), ("16 bits", "ramp"),
    ("12 bits in 16", "at most 12")])
@pytest.mark.parametrize("channels", [1, 3])
def test_no_pixels_are_destroyed_in_silence(tmp_path, kind, expected, channels):
    path = tmp_path / ("x.tif" if "bits" in kind or "float" in kind else "x.png")
    save_mode(path, kind)
    if expected not in ("white", "ramp"):
        refused(lambda: photos.square(path, 16, channels), path, expected, "convert like this")
        return
    image = photos.square(path, 16, channels)[0].int()
    if expected == "white":
        assert image[0, 0] == 255 and image[8, 8] == 0
    else:
        assert (image[3] - torch.linspace(0, 255, 16)).abs().max() <= 1


def test_an_image_of_one_colour_is_warned_of(tmp_path, capsys):
    for i in range(20):
        draw(tmp_path / "f" / f"{i}.png")
    datasets.load(f"folder:{tmp_path / 'f'}", size=8)
    assert "one colour" not in capsys.readouterr().err
    draw(tmp_path / "f" / "blank.png", "black")
    datasets.load(f"folder:{tmp_path / 'f'}",
                  "test" if photos.own_keys([tmp_path / "f" / "blank.png"])[0] % 10 == 0 else "train", size=8)
    assert "blank.png" in capsys.readouterr().err


def test_photographs_of_200_megapixels(tmp_path):
    Image.new("1", (20_000, 10_000), 1).save(tmp_path / "large.png")
    with Image.open(tmp_path / "large.png") as image:
        assert image.size == (20_000, 10_000)  # no bomb, no warning


def test_all_unreadable_images_are_named_at_once(tmp_path):
    paths = [tmp_path / f"{i}.png" for i in range(9)]
    for path in paths:
        draw(path)
    paths[3].write_bytes(b""), paths[5].write_bytes(paths[5].read_bytes()[:60]), paths[7].unlink()
    message = refused(lambda: photos.decode(paths, 8), "3 files", paths[3], paths[5], paths[7])
    assert str(paths[4]) not in message


def test_unreadable_images_of_both_sides_are_named_at_once(tmp_path):
    folder = tmp_path / "n" / "a"
    for i in range(60):
        draw(folder / f"{i}.png")
    broken = {}
    for i in range(100):  # until both sides have one: the content decides
        path = folder / f"broken{i}.png"
        path.write_bytes(b"no image" + bytes([i]))
        side = "test" if photos.own_keys([path])[0] % 10 == 0 else "train"
        path.unlink() if side in broken else broken.update({side: path})
    refused(lambda: datasets.load(f"folder:{tmp_path / 'n'}", size=8), *broken.values(), "held out: ")
    broken["test"].unlink()
    message = refused(lambda: datasets.load(f"folder:{tmp_path / 'n'}", size=8), broken["train"])
    assert "held out" not in message


def test_a_folder_too_small_to_hold_out_images_says_so_and_only_when_asked(tmp_path):
    paths = [tmp_path / "tiny" / f"{i}.png" for i in range(40)]
    for path in paths:
        draw(path)
        if photos.own_keys([path])[0] % 10 == 0:
            path.unlink()
    left = sum(path.exists() for path in paths)
    message = refused(lambda: datasets.load(f"folder:{tmp_path / 'tiny'}", "test", size=8), "one in ten")
    assert f"'test' among its {left}" in message and "add images" in message
    number = next(i for i in range(99) if zlib.crc32(bytes([i])) % 10)
    (tmp_path / "tiny" / "broken.png").write_bytes(bytes([number]))
    message = refused(lambda: datasets.load(f"folder:{tmp_path / 'tiny'}", size=8), "broken.png")
    assert "held out" not in message and "split" not in message


def test_nothing_is_downloaded_where_images_are_only_listed(tmp_path, monkeypatch):
    for name, source in (("mnist", "MNIST"), ("cifar10", "CIFAR10"), ("celeba", "CelebA")):
        monkeypatch.setattr(torchvision.datasets, source, lambda *args, **kwargs: pytest.fail("a download"))
        refused(lambda name=name: datasets.load(name, root=tmp_path, decode=False), "nothing is downloaded")


# ---- folders


def test_numbers_in_names_of_classes_are_numbers(tmp_path):
    for name in ("1", "2", "3", "10"):
        for i in range(20):
            draw(tmp_path / "n" / name / f"{i}.png")
    assert datasets.load(f"folder:{tmp_path / 'n'}", size=8).classes == ["1", "2", "3", "10"]
    assert registry.numbered(["1", "2", "3", "10"]) == {1: 0, 2: 1, 3: 2, 10: 3}
    assert registry.numbered(["a", "2"]) == {0: 0, 1: 1} and registry.numbered(["01", "1"]) == {0: 0, 1: 1}
    assert sorted(["x10", "x2", "2b", "b"], key=registry.natural) == ["2b", "b", "x2", "x10"]


def test_renamed_images_stay_on_their_side(tmp_path):
    for i in range(80):
        draw(tmp_path / "a" / f"{i}.png")
    before = [datasets.digests(datasets.load(f"folder:{tmp_path / 'a'}", side, size=8).images)
              for side in ("train", "test")]
    for i, path in enumerate(sorted((tmp_path / "a").iterdir())):
        path.rename(path.with_name(f"renamed-{i}.png"))
    after = [datasets.digests(datasets.load(f"folder:{tmp_path / 'a'}", side, size=8).images)
             for side in ("train", "test")]
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1]) and 1 <= len(after[1]) <= 24
    datasets.refuse_seen(*after, "set")
    refused(lambda: datasets.refuse_seen(after[0], torch.cat([after[1], after[0][:3]]), "set"), "set: 3 of")


@pytest.mark.parametrize("suffix, form", [
    (".jfif", "JPEG"), (".jpe", "JPEG"), (".gif", "GIF"), (".tif", "TIFF"), (".TIFF", "TIFF"),
    (".JPG", "JPEG"), (".jp2", "JPEG2000"), (".webp", "WEBP"), (".avif", "AVIF")])
def test_every_format_of_pillow_is_read_whatever_its_suffix(tmp_path, suffix, form):
    if form not in photos.FORMATS:
        pytest.skip(f"this Pillow has no {form}")
    for i in range(60):
        draw(tmp_path / f"{i}{suffix}", format=form)
    assert len(both(f"folder:{tmp_path}")[1]) == 60


def test_other_files_are_counted_and_captions_are_told(tmp_path, capsys):
    for i in range(20):
        draw(tmp_path / f"{i}.png")
    for name in ("a.heic", "b.HEIC", "c.mp4", "README"):
        (tmp_path / name).write_bytes(b"x")
    datasets.load(f"folder:{tmp_path}", size=8)
    error = capsys.readouterr().err
    assert "2 .heic, 1 .mp4, 1 without a suffix" in error or ".heic" in photos.SUFFIXES
    assert "captions: none, sentences about classes are used" in error


@pytest.mark.parametrize("kind", ["link", "twice", "loop", "unreadable"])
def test_linked_and_unreadable_folders_do_not_vanish(tmp_path, kind, monkeypatch):
    base, other = tmp_path / "base", tmp_path / "other"
    for i in range(20):
        draw(other / f"{i}.png")
        draw(base / "a" / f"{i}.png")
    (base / "b").symlink_to({"loop": base, "unreadable": other}.get(kind, other))
    if kind == "link":
        assert [len(x) for x in photos.tree(base)[:3]] == [40, 40, 2]
        return
    if kind == "twice":
        (base / "c").symlink_to(other)
    if kind == "unreadable":
        scan = os.scandir

        def closed(place):
            if Path(place).name == "b":
                raise PermissionError(errno.EACCES, "Permission denied", str(place))
            return scan(place)

        monkeypatch.setattr(os, "scandir", closed)
    refused(lambda: photos.tree(base),
            "cannot be read: Permission" if kind == "unreadable" else "count twice")


@pytest.mark.parametrize("names, word", [
    (["train", "val"], "parts of a set"), (["train", "test"], "parts of a set"),
    (["my images"], "only class")])
def test_a_folder_too_high_is_asked_about(tmp_path, names, word):
    for name in names:
        for kind in "ab":
            draw(tmp_path / name / kind / "0.png")
    message = refused(lambda: photos.tree(tmp_path), word, "--classes")
    assert (f"'folder:{tmp_path}/my images'" in message or f"folder:'{tmp_path}/my images'" in message
            or "train" in names)
    assert photos.tree(tmp_path, names)[2] == names


def test_names_of_files_that_are_no_utf8(tmp_path):
    for i in range(20):
        for name in (b"caf\xe9", "e\u0301".encode()):
            place = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))
            draw(place / os.fsdecode(b"\xff%d.png" % i))
    names, images, labels = both(f"folder:{tmp_path}")
    assert names == ["caf\\xe9", "\u00e9"] and len(images) == 40 and labels.sum() == 20
    "".join(names).encode()
    assert datasets.class_list("e\u0301") == ["\u00e9"]


# ---- captions


def says(i):
    return f"image {i} of a caf\u00e9"


def lines(name="{}.png"):
    return "".join(f"{name.format(i)}\t{says(i)}\n" for i in range(30))


CAPTIONS = {
    "plain": ("captions.txt", lines().encode()),
    "BOM": ("captions.txt", lines().encode("utf-8-sig")),
    "UTF-16": ("captions.txt", lines().encode("utf-16")),
    "CRLF": ("captions.txt", lines().replace("\n", "\r\n").encode()),
    "backslashes": ("captions.txt", lines(".\\{}.png").encode()),
    "numbered": ("captions.txt", lines("{}.png#0").encode()),
    "metadata.jsonl": ("metadata.jsonl", "".join(
        json.dumps({"file_name": f"{i}.png", "text": says(i)}) + "\n" for i in range(30)).encode()),
    "metadata.csv": ("metadata.csv", ("file_name,caption\n" + "".join(
        f"{i}.png,{says(i)}\n" for i in range(30))).encode()),
    "beside": (None, None)}


@pytest.mark.parametrize("kind", CAPTIONS)
def test_captions_in_any_form(tmp_path, capsys, kind):
    name, raw = CAPTIONS[kind]
    for i in range(30):
        draw(tmp_path / f"{i}.png", (i, 0, 0))
        if name is None:
            (tmp_path / f"{i}.txt").write_text(says(i) + "\n")
    if name:
        (tmp_path / name).write_bytes(raw)
    found = datasets.load(f"folder:{tmp_path}", size=8)
    assert found.captions == [says(i) for i in found.images[:, 0, 0, 0].tolist()]
    error = capsys.readouterr().err
    assert f"captions: found {len(found)} in" in error and "left out" not in error


def test_names_of_another_normal_form_are_found(tmp_path):
    draw(tmp_path / "\u00e9.png")
    (tmp_path / "captions.txt").write_text("e\u0301.png\tx\n")
    assert photos.captions(tmp_path, [Path("\u00e9.png")], [0], [Path("captions.txt")])[0] == ["x"]


def test_only_line_ends_end_a_line_of_captions(tmp_path):
    (tmp_path / "metadata.csv").write_text('file_name,text\na.png,"a dog\nruns"\nb.png,a\u2028b\n')
    assert photos.caption_rows(tmp_path / "metadata.csv") == [("a.png", "a dog\nruns"), ("b.png", "a\u2028b")]
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a\u2028b"}\n\n')
    assert photos.caption_rows(tmp_path / "metadata.jsonl") == [("a.png", "a\u2028b")]


def test_an_npy_of_objects_is_refused_with_advice(tmp_path):
    np.save(tmp_path / "o.npy", np.array([RANDOM.random((3, 3)), RANDOM.random((4, 4))], dtype=object))
    refused(lambda: datasets.load(f"npz:{tmp_path / 'o.npy'}"), "found an array of objects", "np.stack")


def test_the_list_of_captions_does_not_hang_on_the_order_of_the_folder(tmp_path):
    (tmp_path / "captions.txt").write_text("a.png\tfirst\n")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,second\n")
    for names in (["captions.txt", "metadata.csv"], ["metadata.csv", "captions.txt"]):
        assert photos.captions(tmp_path, [Path("a.png")], [0], [Path(name) for name in names])[0] == ["first"]


def test_a_file_that_cannot_be_read_is_on_no_side(tmp_path, monkeypatch):
    draw(tmp_path / "a.png")

    def closed(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", closed)
    refused(lambda: photos.own_keys([tmp_path / "a.png"]), "a.png cannot be read: Permission")


def test_of_several_captions_an_image_draws_one_by_its_own_bytes(tmp_path):
    for i in range(40):
        draw(tmp_path / f"{i}.png")
    (tmp_path / "captions.txt").write_text("".join(f"{i}.png\t{word} {i}\n" for i in range(40)
                                                   for word in ("one", "two")))
    first = datasets.load(f"folder:{tmp_path}", size=8)
    words = [caption.split()[0] for caption in first.captions]
    assert 5 < words.count("one") < len(words) - 5
    gone = sorted(tmp_path.glob("*.png"))[0]
    gone.unlink()  # nobody else's caption changes
    left = datasets.load(f"folder:{tmp_path}", size=8).captions
    assert set(left) <= set(first.captions) and len(left) >= len(first.captions) - 1


@pytest.mark.parametrize("names, others", [
    (["a.jpg", "a.png"], ["a.txt"]),  # one caption for both
    (["\u00e9.png", "e\u0301.png"], ["captions.txt"])])  # the same name in two normal forms
def test_two_images_never_share_captions(tmp_path, names, others):
    """Else one image, with its own line of captions, could change the caption of the other."""
    (tmp_path / others[0]).write_text("\u00e9.png\tone\n" if "captions" in others[0] else "one")
    names, others = ([Path(name) for name in some] for some in (names, others))
    refused(lambda: photos.captions(tmp_path, names, [0, 1], others), "two images go by the name", "rename")


@pytest.mark.parametrize("name, raw, word", [
    ("captions.txt", lines().encode("latin-1"), "iconv -f LATIN1"),
    ("captions.txt", b"0.png\tHIV\ttwice\n", "line 1"),
    ("metadata.jsonl", b'{"file_name": "0.png"}\n', "line 1"),
    ("metadata.jsonl", b'["HIV"]\n', "line 1"),
    ("metadata.csv", b"name,words\n0.png,HIV\n", "line 2"),
    ("captions.txt", b"1.png\tHIV\n", "no line for 0.png")])
def test_other_captions_are_named_and_not_repeated(tmp_path, name, raw, word):
    (tmp_path / name).write_bytes(raw)
    message = refused(lambda: photos.captions(tmp_path, [Path("0.png")], [0], [Path(name)]), name, word)
    assert "HIV" not in message


def test_the_words_of_public_captions_are_in_the_vocabulary(monkeypatch):
    captions = ["a bright Circle"] * 3 + ["a zebra", "a zebra", "a yak"]
    assert {"bright", "circle", "zebra", "yak"} <= set(text.vocabulary([], [], captions))
    assert text.vocabulary([], []) == text.vocabulary([], [], None)
    monkeypatch.setattr(text, "MOST_WORDS", 4)  # a, bright, circle, zebra
    assert "yak" not in text.vocabulary([], [], captions) and "zebra" in text.vocabulary([], [], captions)
    assert "\n" not in text.NOTE and "<unk>" in text.NOTE


# ---- full sets


@pytest.mark.parametrize("dash", ["-", "."])
@pytest.mark.parametrize("place", ["EMNIST/raw", "EMNIST", "EMNIST/gzip", "gzip", "."])
def test_idx_files_under_the_names_and_in_the_folders_that_are_distributed(
        tmp_path, monkeypatch, dash, place):
    monkeypatch.setattr(torchvision.datasets, "EMNIST", None)  # a download would be a TypeError
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    for kind, array, code in (("images", RANDOM.integers(0, 256, (3, 28, 28), np.uint8), 3),
                              ("labels", np.array([1, 2, 26], np.uint8), 1)):
        header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
        path = folder / f"emnist-letters-train-{kind}{dash}idx{code}-ubyte.gz"
        path.write_bytes(gzip.compress(header + array.tobytes()))
    assert datasets.load("emnist", root=tmp_path).labels.tolist() == [0, 1, 25]


def test_celeba_as_csv(tmp_path):
    base = tmp_path / "celeba"
    for i in range(6):
        draw(base / "img_align_celeba" / "img_align_celeba" / f"{i}.jpg")
    (base / "list_attr_celeba.csv").write_text("image_id,Male,Young\n" + "".join(
        f"{i}.jpg,{1 if i % 2 else -1},1\n" for i in range(6)))
    (base / "list_eval_partition.csv").write_text("image_id,partition\n" + "".join(
        f"{i}.jpg,{i // 4}\n" for i in range(6)))
    train = datasets.load("celeba", root=tmp_path, size=8)
    assert (train.labels.tolist() == [0, 1, 0, 1]
            and len(datasets.load("celeba", "test", tmp_path, size=8)) == 2)
    assert list(datasets.describe("celeba", tmp_path).attributes) == ["Male", "Young"]


@pytest.mark.parametrize("name, word", [("mnist", "MNIST"), ("cifar10", "CIFAR10"), ("celeba", "CelebA")])
def test_a_download_says_where_from_has_a_time_out_and_a_reason(tmp_path, capsys, monkeypatch, name, word):
    waits = []

    class Silent:
        mirrors = ["https://example.org/"]

        def __init__(self, *args, **kwargs):
            waits.append(socket.getdefaulttimeout())
            raise TimeoutError("timed out")

    monkeypatch.setattr(torchvision.datasets, word, Silent)
    refused(lambda: datasets.load(name, root=tmp_path), "download failed (timed out)")
    assert f"fetching {word} from https://example.org/ into {tmp_path}" in capsys.readouterr().err
    assert waits == [arrays.PATIENCE] and socket.getdefaulttimeout() is None


def test_without_a_home_directory(monkeypatch):
    monkeypatch.delenv("DPLDM_DATA")
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    assert datasets.data_root() == Path("dpldm-data") and len(datasets.load("mnist10k", "test", n=3)) == 3


@pytest.mark.parametrize("side, word", [(64, "--size 64"), (40, "--size 64"), (300, "32: shrink"),
                                        (27, "resize")])
def test_sizes_that_cannot_be_padded(side, word):
    refused(lambda: pixels.pad(torch.zeros(1, 1, side, side), 32), word)


def test_one_colour_is_seen_whatever_the_border(tmp_path, capsys):
    images = RANDOM.integers(0, 256, (40, 28, 28), dtype=np.uint8)
    images[[3, 5]] = np.uint8([0, 255])[:, None, None]
    assert pixels.one_colour(torch.from_numpy(images)[:, None]) == [3, 5]
    np.savez(tmp_path / "own.npz", images=images[[5] * 40])
    datasets.load(f"npz:{tmp_path / 'own.npz'}", split="test" if zlib.crc32(images[5]) % 10 == 0 else "train")
    assert "of one colour" in capsys.readouterr().err, "white, in a border of black"


def test_own_sets_are_known_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    whole = f"folder:{tmp_path / 'mine'}"
    assert datasets.resolved("folder:mine") == whole and datasets.resolved("mnist") == "mnist"
    assert datasets.resolved("portraits+folder:mine") == f"portraits+{whole}"
    assert datasets.resolved("mnist:mine") == "mnist:mine", "no name of a set, to be refused as it was typed"


# ---- files that are written


@pytest.mark.parametrize("kind", ["pipe", "link to a pipe", "link"])
def test_only_plain_files_are_replaced(tmp_path, kind):
    """A pipe stands for devices too: a test that fails must not replace the machine's own."""
    path, target = tmp_path / "out", tmp_path / "target"
    if "pipe" in kind:
        os.mkfifo(path if kind == "pipe" else target)
        reader = os.open(path if kind == "pipe" else target, os.O_RDONLY | os.O_NONBLOCK)
    else:
        target.write_bytes(b"old")
    if "link" in kind:
        path.symlink_to(target)
    before = [p.lstat().st_mode for p in sorted(tmp_path.iterdir())]
    with files.replacing(path) as file:
        np.savez_compressed(file, x=np.zeros(3))
    assert [p.lstat().st_mode for p in sorted(tmp_path.iterdir())] == before
    if "pipe" in kind:
        assert os.read(reader, 10**5).startswith(b"PK")
        os.close(reader)
    else:
        assert target.read_bytes().startswith(b"PK")
    assert files.write_through(Path("/dev/null")) and not files.write_through(tmp_path / "new")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
@pytest.mark.parametrize("write", ["checkpoint", "arrays", "ledger"])
def test_a_full_disk_is_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, code, write):
    path = tmp_path / "x"
    path.write_bytes(b"old\n")

    def full(*args):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", full)

    def run():
        if write == "ledger":
            files.append_row({"step": 0}, path)
        elif write == "checkpoint":
            files.save({"a": torch.zeros(3)}, path)
        else:
            with files.replacing(path) as file:
                try:
                    np.savez(file, x=np.zeros(3))
                    full()
                except OSError:
                    raise RuntimeError("unexpected pos 1 vs 2")  # what an archive says then  # noqa: B904

    refused(run, path, os.strerror(code), "--resume")
    assert [p.name for p in tmp_path.iterdir()] == ["x"] and path.read_bytes().startswith(b"old\n")
    assert write == "ledger" or path.read_bytes() == b"old\n"


def test_an_empty_world_size_is_one_process(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "")
    team.join()


def test_more_than_255_classes_are_drawn(tmp_path, monkeypatch, capsys):
    classes = [f"c{i}" for i in range(300)]
    release = types.SimpleNamespace(classes=classes, tokenizer=None, privacy={"statement": ""},
                                    model=types.SimpleNamespace(embedder=True))
    monkeypatch.setattr(sample, "load_release", lambda *args: release)
    monkeypatch.setattr(sample, "generate",
                        lambda release, labels, *args: torch.zeros(len(labels), 1, 4, 4).byte())
    sample.main(["run", "--n", "300", "--npz", str(tmp_path / "x.npz")])
    with np.load(tmp_path / "x.npz") as found:
        assert found["labels"].tolist() == list(range(300))


def test_the_limit_of_an_autoencoder_is_measured_on_own_sets(monkeypatch, capsys, tmp_path):
    """The release says "npz"; where it lies is asked of the run folder. Grey sets are cut as samples are."""
    np.savez(tmp_path / "own.npz", images=IMAGES, labels=LABELS, class_names=NAMES)
    network = vae.AutoencoderKL(vae.VAEConfig(3, 3, 4, (1, 1), num_groups=4, resolution=8)).eval()
    release = types.SimpleNamespace(classes=NAMES, crop=8, vae=network,
                                    data={"public": "npz", "private": "npz"})
    name = f"npz:{tmp_path / 'own.npz'}"
    monkeypatch.setattr(autoencoder_limit.sample, "load_release", lambda run: release)
    monkeypatch.setattr(autoencoder_limit.scored, "sources", lambda release, run: [name, name])
    asked = []

    def stop(run, public, *args, frame):
        asked.append((public, frame))
        raise KeyboardInterrupt

    monkeypatch.setattr(autoencoder_limit.metrics, "feature_network", stop)
    with pytest.raises(KeyboardInterrupt):
        autoencoder_limit.main([str(tmp_path)])
    assert asked == [(name, (8, 8))]
