"""Image sets: embedded digits, files in torchvision's layouts, padding, one clear line for bad files."""

import gzip
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

import datasets
from datasets import arrays, pixels


def write_idx(path, array):
    """An idx file of unsigned bytes, .gz by the name."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(header + array.tobytes()) if path.suffix == ".gz" else header
                     + array.tobytes())


def picture_set(n, seed=0):
    generator = np.random.default_rng(seed)
    return generator.integers(0, 256, (n, 28, 28), np.uint8), generator.integers(0, 10, n).astype(np.uint8)


@pytest.fixture
def offline(monkeypatch):
    """No downloads, no Debian package: whatever the machine has."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    for name in ("MNIST", "FashionMNIST", "EMNIST"):
        monkeypatch.setattr(torchvision.datasets, name, refuse)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION", Path("/nonexistent"))
    monkeypatch.delenv("DPLDM_DATA", raising=False)


# ---- the embedded set ----


def test_embedded_digits_split_8000_private_2000_held_out():
    train, test = datasets.load("mnist10k"), datasets.load("mnist10k", "test")
    assert len(train) == 8000 and len(test) == 2000
    assert train.images.shape == (8000, 1, 32, 32) and train.images.dtype == torch.uint8
    assert train.labels.dtype == torch.int64 and train.classes == list("0123456789")
    assert train.labels.bincount().min() > 600 and test.labels.bincount(minlength=10).min() > 130
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len({picture.numpy().tobytes() for picture in both}) == 10_000, "no picture is on both sides"
    with np.load(arrays.EMBEDDED) as stored:
        assert np.array_equal(pixels.crop(train.images).numpy()[:, 0], stored["images"][:8000])
        assert np.array_equal(test.labels.numpy(), stored["labels"][8000:])


def test_n_takes_a_seeded_subset_with_the_matching_labels():
    whole = datasets.load("mnist10k", "test")
    part, again, other = (datasets.load("mnist10k", "test", n=50, seed=s) for s in (3, 3, 4))
    assert len(part) == 50 and torch.equal(part.images,
                                           again.images) and not torch.equal(part.images, other.images)
    keys = [picture.numpy().tobytes() for picture in whole.images]
    where = dict(zip(keys, whole.labels.tolist(), strict=True))
    assert [where[picture.numpy().tobytes()] for picture in part.images] == part.labels.tolist()


# ---- pixels ----


def test_padding_is_background_and_crop_undoes_it():
    images = torch.randint(1, 256, (3, 1, 28, 28), dtype=torch.uint8)
    padded = pixels.pad(images, 32)
    assert padded.shape == (3, 1, 32, 32) and padded.dtype == torch.uint8
    assert torch.equal(pixels.crop(padded, 28), images) and padded.sum() == images.sum()
    assert torch.equal(pixels.pad(images, 28), images)
    for size in (31, 20):
        with pytest.raises(ValueError, match="pad"):
            pixels.pad(images, size)
    with pytest.raises(ValueError, match="crop"):
        pixels.crop(images, 27)


def test_float_range_and_exact_round_trip():
    every = torch.arange(256, dtype=torch.uint8)
    x = pixels.to_float(every)
    assert x.dtype == torch.float32 and x.min() == -1 and x.max() == 1
    assert torch.equal(pixels.to_uint8(x), every)
    assert pixels.to_uint8(torch.tensor([-3.0, 3.0, 0.0039])).tolist() == [0, 255, 128]


def test_grid_is_a_png_in_reading_order(tmp_path):
    images = torch.zeros(6, 1, 8, 8, dtype=torch.uint8)
    images[1], images[3] = 255, 128
    pixels.save_grid(images, tmp_path / "new" / "grid.png", columns=3)
    grid = np.asarray(Image.open(tmp_path / "new" / "grid.png"))
    assert grid.shape == (57, 84, 3)  # 2 x 3 pictures of 8 pixels, enlarged threefold, with lines of 3
    assert grid[12, 12, 0] == 0 and grid[12, 42, 0] == 255 and grid[42, 12, 0] == 128
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["grid.png"], "no partial file is left"


# ---- the full sets in torchvision's layout ----


@pytest.mark.parametrize("name, folder", [("mnist", "MNIST"), ("fashion", "FashionMNIST")])
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_mnist_layout(tmp_path, offline, name, folder, suffix):
    for split, part in (("train", "train"), ("test", "t10k")):
        images, labels = picture_set(7, seed=len(part))
        write_idx(tmp_path / folder / "raw" / f"{part}-images-idx3-ubyte{suffix}", images)
        write_idx(tmp_path / folder / "raw" / f"{part}-labels-idx1-ubyte{suffix}", labels)
        loaded = datasets.load(name, split, root=tmp_path, size=28)
        assert np.array_equal(loaded.images[:, 0].numpy(),
                              images) and loaded.labels.tolist() == labels.tolist()
        assert len(loaded.classes) == 10


def test_fashion_comes_from_the_debian_package_if_the_root_lacks_it(tmp_path, offline, monkeypatch):
    images, labels = picture_set(5)
    write_idx(tmp_path / "debian" / "train-images-idx3-ubyte.gz", images)
    write_idx(tmp_path / "debian" / "train-labels-idx1-ubyte.gz", labels)
    monkeypatch.setattr(arrays, "DEBIAN_FASHION", tmp_path / "debian")
    assert np.array_equal(datasets.load("fashion", root=tmp_path, size=28).images[:, 0].numpy(), images)


@pytest.mark.parametrize("split", ["train", "test"])
def test_emnist_is_turned_upright_and_its_labels_start_at_zero(tmp_path, offline, split):
    upright = np.zeros((26, 28, 28), np.uint8)
    upright[:, 3:25, 5] = 255  # an L: a vertical bar on the left,
    upright[:, 24, 5:20] = 200  # a foot at the bottom to the right
    stored = upright.transpose(0, 2, 1)  # EMNIST stores column by column
    labels = np.arange(1, 27, dtype=np.uint8)
    write_idx(tmp_path / "EMNIST" / "raw" / f"emnist-letters-{split}-images-idx3-ubyte", stored)
    write_idx(tmp_path / "EMNIST" / "raw" / f"emnist-letters-{split}-labels-idx1-ubyte", labels)
    loaded = datasets.load("emnist", split, root=tmp_path)
    assert np.array_equal(pixels.crop(loaded.images).numpy()[:, 0], upright) and loaded.images.is_contiguous()
    assert (
        loaded.labels.tolist() == list(range(26)) and "".join(loaded.classes) == "abcdefghijklmnopqrstuvwxyz"
    )


def test_emnist_label_zero_is_damage(tmp_path, offline):
    write_idx(tmp_path / "EMNIST" / "raw" / "emnist-letters-train-images-idx3-ubyte", picture_set(3)[0])
    write_idx(tmp_path / "EMNIST" / "raw" / "emnist-letters-train-labels-idx1-ubyte",
              np.array([0, 1, 2], np.uint8))
    with pytest.raises(datasets.DataError, match="labels outside 1..26"):
        datasets.load("emnist", root=tmp_path)


def test_omniglot_is_one_unlabelled_class(tmp_path, offline):
    images = picture_set(6)[0]
    np.savez(tmp_path / "omniglot.npz", images=images)
    loaded = datasets.load("omniglot", root=tmp_path)
    assert np.array_equal(pixels.crop(loaded.images).numpy()[:, 0], images)
    assert loaded.labels.tolist() == [0] * 6 and len(loaded.classes) == 1


def test_the_classes_of_a_known_set_do_not_depend_on_its_images(tmp_path, offline, monkeypatch):
    """The list is released: a label of which no image is left, or only one, changes nothing."""
    for name, folder in (("mnist", "MNIST"), ("fashion", "FashionMNIST")):
        write_idx(tmp_path / folder / "raw" / "train-images-idx3-ubyte", picture_set(1)[0])
        write_idx(tmp_path / folder / "raw" / "train-labels-idx1-ubyte", np.array([3], np.uint8))
        assert len(datasets.load(name, root=tmp_path).classes) == 10
    write_idx(tmp_path / "EMNIST" / "raw" / "emnist-letters-train-images-idx3-ubyte", picture_set(1)[0])
    write_idx(tmp_path / "EMNIST" / "raw" / "emnist-letters-train-labels-idx1-ubyte", np.array([3], np.uint8))
    assert len(datasets.load("emnist", root=tmp_path, private=True).classes) == 26
    np.savez(tmp_path / "few.npz", images=picture_set(1)[0], labels=np.array([3]))
    monkeypatch.setattr(arrays, "EMBEDDED", tmp_path / "few.npz")
    assert datasets.load("mnist10k", private=True).classes == list("0123456789")


def test_root_from_the_argument_then_the_environment(tmp_path, offline, monkeypatch):
    for folder, n in (("argument", 2), ("environment", 3)):
        np.savez(tmp_path / folder, images=picture_set(n)[0])
        (tmp_path / f"{folder}_root").mkdir()
        (tmp_path / f"{folder}.npz").rename(tmp_path / f"{folder}_root" / "omniglot.npz")
    monkeypatch.setenv("DPLDM_DATA", str(tmp_path / "environment_root"))
    assert len(datasets.load("omniglot")) == 3
    assert len(datasets.load("omniglot", root=str(tmp_path / "argument_root"))) == 2


# ---- bad input: one line that names the file and the ways out ----


FIRST_FILE = {
    "mnist": "MNIST/raw/train-images-idx3-ubyte",
    "fashion": "FashionMNIST/raw/train-images-idx3-ubyte",
    "emnist": "EMNIST/raw/emnist-letters-train-images-idx3-ubyte",
    "omniglot": "omniglot.npz",
}


@pytest.mark.parametrize("name, file", FIRST_FILE.items())
def test_missing_data_without_network(tmp_path, offline, capsys, name, file):
    with pytest.raises(datasets.DataError) as caught:
        datasets.load(name, root=tmp_path)
    message = str(caught.value)
    assert "\n" not in message and str(tmp_path / file) in message
    assert "--data-root" in message and "DPLDM_DATA" in message
    assert ("strokes" if name == "omniglot" else "--preset digits") in message
    out, error = capsys.readouterr()
    downloaded = name != "omniglot"
    assert out == "" and error.count("\n") == downloaded and ("fetching" in error) == downloaded


def test_a_download_that_brings_nothing_is_missing_data(tmp_path, offline, monkeypatch):
    monkeypatch.setattr(torchvision.datasets, "MNIST", lambda *args, **kwargs: None)
    with pytest.raises(datasets.DataError, match="not found"):
        datasets.load("mnist", root=tmp_path)


def test_a_download_is_used(tmp_path, offline, monkeypatch):
    images, labels = picture_set(4)

    def download(root, split, download):
        assert download and split == "letters"
        raw = Path(root) / "EMNIST" / "raw"
        write_idx(raw / "emnist-letters-train-images-idx3-ubyte", images)
        write_idx(raw / "emnist-letters-train-labels-idx1-ubyte", labels + 1)

    monkeypatch.setattr(torchvision.datasets, "EMNIST", download)
    assert datasets.load("emnist", root=tmp_path).labels.tolist() == labels.tolist()


def break_idx(kind, folder):
    """Write a pair of MNIST files with one fault; returns the name of the file to blame."""
    images, labels = picture_set(5)
    pictures, numbers = folder / "train-images-idx3-ubyte", folder / "train-labels-idx1-ubyte"
    write_idx(pictures, images[:, :, :20] if kind == "not square" else images)
    write_idx(numbers, labels[:4] if kind == "lengths" else np.full(5, 10, np.uint8)
              if kind == "label" else labels)
    if kind == "truncated":
        pictures.write_bytes(pictures.read_bytes()[:-1])
    elif kind == "longer":
        numbers.write_bytes(numbers.read_bytes() + b"\0")
        return numbers
    elif kind == "not idx":
        pictures.write_bytes(b"<html>not found</html>")
    elif kind == "empty":
        pictures.write_bytes(b"")
    elif kind == "gz":
        packed = gzip.compress(pictures.read_bytes())
        pictures.unlink()
        pictures = pictures.with_name(pictures.name + ".gz")
        pictures.write_bytes(packed[: len(packed) // 2])
    return numbers if kind in ("lengths", "label") else pictures


@pytest.mark.parametrize("kind", ["truncated", "longer", "not idx", "empty", "gz", "lengths", "label",
                                  "not square"])
def test_damaged_idx_file(tmp_path, offline, kind):
    blamed = break_idx(kind, tmp_path / "MNIST" / "raw")
    with pytest.raises(datasets.DataError) as caught:
        datasets.load("mnist", root=tmp_path)
    assert str(blamed) in str(caught.value) and "\n" not in str(caught.value) and "found" in str(caught.value)


@pytest.mark.parametrize("kind", ["truncated", "text", "no key", "dtype", "pickle", "colour shape", "none"])
def test_damaged_npz(tmp_path, offline, kind):
    path = tmp_path / "omniglot.npz"
    images = picture_set(5)[0]
    broken = {
        "dtype": images.astype(np.float32),
        "colour shape": np.zeros((5, 28, 28, 2), np.uint8),
        "none": images[:0],
        "pickle": np.array([{}], dtype=object),
    }
    np.savez(path, **{"pictures" if kind == "no key" else "images": broken.get(kind, images)})
    if kind == "truncated":
        path.write_bytes(path.read_bytes()[:2000])
    elif kind == "text":
        path.write_text("not here")
    with pytest.raises(datasets.DataError) as caught:
        datasets.load("omniglot", root=tmp_path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_missing_embedded_file_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(arrays, "EMBEDDED", tmp_path / "mnist10k.npz")
    with pytest.raises(datasets.DataError, match="mnist10k.npz"):
        datasets.load("mnist10k")


# ---- do two sets share images? ----


def test_digests_know_an_image_from_any_road(tmp_path):
    whole = datasets.load("mnist10k")
    found = datasets.digests(whole.images)
    assert found.dtype == torch.int64 and found.shape == (8000,) and (found.diff() > 0).all()
    assert torch.equal(found,
                       datasets.digests(whole.images.flip(0))), "the order of the images does not matter"
    assert torch.equal(found[:0], datasets.digests(whole.images[:0]))
    other = datasets.digests(datasets.load(f"npz:{arrays.EMBEDDED}").images)  # split in another way
    assert 6000 < torch.isin(other, found).sum() < 8000
    changed = whole.images[:100].clone()
    changed[:, 0, 16, 16] ^= 1
    assert not torch.isin(datasets.digests(changed), found).any()
    colour = torch.randint(256, (5, 3, 16, 16), dtype=torch.uint8)
    last = colour.contiguous(memory_format=torch.channels_last)
    assert torch.equal(datasets.digests(colour), datasets.digests(last)), "nor does their layout in memory"
    twice = torch.cat([colour, colour])
    assert torch.equal(datasets.digests(twice), datasets.digests(colour))


def test_sets_in_the_same_place_are_known_by_any_name(tmp_path, monkeypatch):
    root, mine = tmp_path / "root", tmp_path / "root" / "mine"
    (mine / "cats" / "tabby").mkdir(parents=True)
    (root / "minerals").mkdir()
    for file in ("own.npz", "public32.npz", "other.npz"):
        (root / file).touch()
    (tmp_path / "link").symlink_to(mine)
    monkeypatch.chdir(tmp_path)
    digits = f"npz:{arrays.EMBEDDED}"
    for a, b in [("mnist10k", "mnist"), ("public32", "cifar10"), ("mnist10k", digits), ("mnist", digits),
                 ("fashion", "fashion"), ("folder:mine", f"folder:{mine}"),
                 ("folder:mine", "folder:root/mine"), ("folder:mine", "folder:mine/cats/tabby"),
                 ("folder:link", "folder:mine"),
                 ("folder:link/cats", "folder:mine"), ("npz:own.npz", "npz:root/own.npz"),
                 ("npz:public32.npz", "public32"), ("npz:public32.npz", "cifar10"),
                 ("folder:gone", "folder:gone/")]:
        assert datasets.same_images(a, b, root) and datasets.same_images(b, a, root), (a, b)
    for a, b in [("mnist", "fashion"), ("strokes", "mnist10k"), ("folder:mine", "folder:minerals"),
                 ("npz:own.npz", "npz:other.npz"), ("folder:mine/cats", "folder:mine/dogs"),
                 ("folder", "folder:mine"), ("weights of x.ckpt", "npz:own.npz"), ("public32", "faces"),
                 ("celeba", "faces"), ("None", "mnist")]:
        assert not datasets.same_images(a, b, root) and not datasets.same_images(b, a, root), (a, b)
    (root / "list_attr_celeba.txt").touch()  # both names now find the files of the root itself
    assert datasets.same_images("celeba", "faces",
                                root) and not datasets.same_images("celeba", "public32", root)


@pytest.mark.parametrize("text, names", [("a,b , c", ["a", "b", "c"]), ("3", ["0", "1", "2"]), ("1", ["0"]),
                                         ("cat", ["cat"]), ("1,0", ["1", "0"])])
def test_classes_are_names_or_a_number(text, names):
    assert datasets.class_list(text) == names


@pytest.mark.parametrize("text", ["", "a,,b", "a,a", "0", "10001", "999999999999", "9" * 5000, "a,b,"])
def test_other_classes_are_refused(text):
    with pytest.raises(ValueError) as caught:
        datasets.class_list(text)
    assert str(caught.value).startswith("--classes must be") and "\n" not in str(caught.value)


BAD = [
    ({"name": "mnist10k", "classes": ["a", "b"]}, "others were asked for"),
    ({"name": "minst"}, "mnist10k"),
    ({"name": "mnist10k", "split": "valid"}, "train"),
    ({"name": "mnist10k", "n": 0}, "at least 1"),
    ({"name": "mnist10k", "n": 8001}, "8000"),
    ({"name": "mnist10k", "size": 20}, "20"),
    ({"name": "mnist10k", "public_classes": "all"}, "strokes"),
    ({"name": "strokes", "public_classes": "greek", "n": 5}, "letters"),
]


@pytest.mark.parametrize("arguments, word", BAD)
def test_bad_arguments(arguments, word):
    with pytest.raises(ValueError, match=word):
        datasets.load(**arguments)


def test_command_line_prints_one_line_and_exits_2(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["datasets", "minst"])
    with pytest.raises(SystemExit) as caught:
        runpy.run_module("datasets", run_name="__main__")
    error = capsys.readouterr().err
    assert caught.value.code == 2 and error.count("\n") == 1 and "unknown data set" in error


# ---- a loader of one's own ----


GOOD = {"images": torch.zeros(6, 1, 28, 28, dtype=torch.uint8), "labels": torch.arange(6) % 2,
        "classes": ["a", "b"], "captions": ["x"] * 6, "attributes": {"Male": torch.ones(6).bool()}}
WRONG = {  # what the message says that it must return -> what it returns instead
    r"images \(N, 1 or 3, H, W\) uint8": {"images": torch.rand(6, 1, 28, 28)},
    r"images \(N, 1 or 3,": {"images": torch.zeros(6, 28, 28, dtype=torch.uint8)},
    r"images \(N, 1 or 3, H": {"images": torch.zeros(6, 28, 28, 3, dtype=torch.uint8)},
    "6 images, as many as were asked for": {"images": GOOD["images"][:5], "labels": GOOD["labels"][:5]},
    r"labels \(6,\) int64": {"labels": torch.zeros(6)},
    r"labels \(6,\)": {"labels": torch.zeros(5, dtype=torch.int64)},
    "labels from 0 to 1, for its 2 classes": {"labels": torch.arange(6) % 3},
    "labels from 0 to 1,": {"labels": torch.arange(6) % 2 - 1},
    "6 captions": {"captions": ["x"] * 5},
    r"attributes \(6,\) bool": {"attributes": {"Male": torch.ones(6)}},
}


@pytest.fixture
def enter(monkeypatch):
    """Enter a drawn set "own" that returns what it is given; afterwards the registry is as it was."""
    entries = datasets.registry.Registry(datasets.REGISTRY)
    monkeypatch.setattr(datasets.registry, "REGISTRY", entries)
    monkeypatch.setattr(datasets, "REGISTRY", entries)

    def enter(**fields):
        @datasets.registry.dataset("own", "for this test", classes=("a", "b"), drawn=True, n=6)
        def load(ask):
            return datasets.ImageSet(**GOOD | fields)

    return enter


@pytest.mark.parametrize("wrong", WRONG)
def test_what_a_loader_returns_is_checked(enter, wrong):
    enter()
    assert datasets.load("own", n=6).images.shape == (6, 1, 32, 32)
    enter(**WRONG[wrong])
    with pytest.raises(ValueError, match=f"data set 'own' must return {wrong}") as caught:
        datasets.load("own", n=6)
    assert "\n" not in str(caught.value)


def test_a_loader_does_not_take_the_name_of_another(enter):
    enter()
    enter()  # the same one anew, as a notebook does it
    with pytest.raises(ValueError, match="'mnist' already"):
        datasets.registry.dataset("mnist", "another MNIST")(lambda ask: None)
    assert datasets.REGISTRY["mnist"].load is arrays.load_mnist


def test_a_set_of_a_loader_of_one_s_own_lies_nowhere_else(enter):
    for name in ("one", "two"):  # not drawn, and without a place in the data root
        datasets.registry.dataset(name, "", classes=("a", "b"), n=6)(lambda ask: None)
    assert not datasets.same_images("one", "mnist10k") and not datasets.same_images("one", "two")
    assert datasets.same_images("one", "one")


def test_a_named_set_has_its_classes_whatever_was_declared():
    assert datasets.describe("mnist", classes=list("0123456789")).classes == list("0123456789")
    for ask in (datasets.describe, datasets.load):
        with pytest.raises(ValueError, match="others were asked for, leave out --classes"):
            ask("mnist10k", classes=["a", "b"])


def test_a_mix_has_two_sets():
    with pytest.raises(ValueError, match="a mix has two sets, not more"):
        datasets.kind_of("strokes+garments+shapes")


def test_some_images_are_from_all_of_a_set():
    for n in (4_001, 7_999, 50_000):
        images = (torch.arange(n) * 10 // n).byte()[:, None, None, None]  # ten classes, one after the other
        some = pixels.some(images.expand(-1, 1, 8, 8)).flatten(1)[:, 0]
        assert len(some) == 4_000 and some.bincount().tolist() == pytest.approx([400] * 10, abs=2)
    assert pixels.some(images[:7]).equal(images[:7])


def test_the_grid_of_a_set_that_may_be_private_is_its_owner_s(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name, private in (("mnist10k", True), ("shapes", False)):
        monkeypatch.setattr(sys, "argv", ["datasets", name])
        runpy.run_module("datasets", run_name="__main__")
        mode = (tmp_path / f"{name}.png").stat().st_mode & 0o777
        assert (mode == 0o600) == private and ("do not publish" in capsys.readouterr().out) == private
