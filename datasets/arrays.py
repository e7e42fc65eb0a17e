"""Sets stored as arrays: idx files (MNIST and its kin), npz files, CIFAR-10's batches.

Every reader raises DataError, one line that names the file, for what is missing or damaged. Pickles are never loaded.
"""
import contextlib
import gzip
import io
import math
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision

from .registry import WAYS_OUT, DataError, ImageSet, dataset

EMBEDDED = Path(__file__).resolve().parent / "mnist10k.npz"
EMBEDDED_TRAIN = 8_000  # private images of mnist10k; the rest is held out
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts its files
STEMS = {"train": "train", "test": "t10k"}
DIGITS = [str(d) for d in range(10)]
LETTERS = [chr(ord("a") + i) for i in range(26)]
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# ---- the sets ----------------------------------------------------------------------------------------------------


@dataset("mnist10k", "10,000 MNIST training digits, embedded: 8,000 private, 2,000 held out", role="private",
         n=EMBEDDED_TRAIN, classes=DIGITS, overlaps=("mnist",))
def load_mnist10k(ask):
    arrays = read_npz(EMBEDDED, ("images", "labels"))
    part = slice(0, EMBEDDED_TRAIN) if ask.split == "train" else slice(EMBEDDED_TRAIN, None)
    images, labels = check(arrays["images"], arrays["labels"], EMBEDDED, 0, 9)
    return ImageSet(images[part], labels[part], DIGITS)


@dataset("mnist", "MNIST, downloaded through torchvision when absent", n=60_000, classes=DIGITS, files="MNIST",
         overlaps=("mnist10k",))
def load_mnist(ask):
    def download():
        torchvision.datasets.MNIST(ask.root, download=True)

    return ImageSet(*read_pair([ask.root / "MNIST" / "raw"], STEMS[ask.split], download), DIGITS)


@dataset("fashion", "Fashion-MNIST, downloaded through torchvision when absent", n=60_000, classes=GARMENTS,
         files="FashionMNIST")
def load_fashion(ask):
    def download():
        torchvision.datasets.FashionMNIST(ask.root, download=True)

    folders = [ask.root / "FashionMNIST" / "raw", DEBIAN_FASHION]
    return ImageSet(*read_pair(folders, STEMS[ask.split], download), GARMENTS)


@dataset("emnist", "EMNIST letters, downloaded through torchvision when absent", n=124_800, classes=LETTERS,
         files="EMNIST")
def load_emnist(ask):
    """EMNIST stores images column by column, transposed against MNIST. Labels of its letters run from 1 to 26."""
    def download():
        torchvision.datasets.EMNIST(ask.root, split="letters", download=True)

    folders, stem = [ask.root / "EMNIST" / "raw"], f"emnist-letters-{ask.split}"
    images, labels = read_pair(folders, stem, download, first_label=1, last_label=26)
    return ImageSet(images.transpose(2, 3).contiguous(), labels - 1, LETTERS)


@dataset("omniglot", "handwriting of 50 alphabets without labels, omniglot.npz in the data root", role="public",
         n=32_000, classes=("handwriting",), files="omniglot.npz")
def load_omniglot(ask):
    path = ask.root / "omniglot.npz"
    if not path.exists():
        raise DataError(f"{path} not found: {WAYS_OUT}, or draw public handwriting instead (data set strokes)")
    images = read_npz(path, ("images",))["images"]
    return ImageSet(*check(images, np.zeros(len(images), np.uint8), path, 0, 0), ["handwriting"])


@dataset("cifar10", "CIFAR-10, downloaded through torchvision when absent", channels=3, side=32, n=50_000,
         classes=CIFAR10, files="cifar-10-batches-py", overlaps=("public32",))
def load_cifar10(ask):
    place = ask.root / "cifar-10-batches-py"
    if not ask.download and not place.exists():
        raise DataError(f"{place} not found: {WAYS_OUT}")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            read = torchvision.datasets.CIFAR10(ask.root, train=ask.split == "train", download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{place} not found, download failed: {WAYS_OUT}") from error
    return ImageSet(*check(read.data, np.array(read.targets), ask.root, 0, 9), list(read.classes))


@dataset("public32", "small colour photographs, public32.npz in the data root", role="public", channels=3, side=32,
         n=12_000, files="public32.npz", overlaps=("cifar10",))
def load_public32(ask):
    path = ask.root / "public32.npz"
    if not path.exists():
        raise DataError(f"{path} not found: {WAYS_OUT}, or use another public set (cifar10, folder:PATH)")
    return own_arrays(path)


@dataset("npz", "your own arrays: images (N,H,H) or (N,H,H,3) uint8, labels (N,), class_names", own=True)
def load_npz(ask):
    return own_arrays(located(ask.root, ask.where), ask.split, ask.classes, ask.private)


def own_arrays(path, split=None, classes=None, private=False):
    """ImageSet of an npz; labels and class_names may be absent. split None: all of it."""
    arrays = read_npz(path, ("images",), optional=("labels", "class_names"))
    labels = arrays.get("labels", np.zeros(arrays["images"].shape[:1], np.uint8))
    names = declared_classes(path, arrays, classes, private)
    images, labels = check(arrays["images"], labels, path, 0, len(names or range(1000)) - 1)
    names = names or [str(x) for x in range(int(labels.max()) + 1)]  # of a public set
    if split is not None:
        side = torch.tensor([held_out(x.numpy().tobytes()) for x in images]) == (split == "test")
        images, labels = images[side], labels[side]
    if not len(images):
        raise DataError(f"{path} has no image in the split {split!r}: too few images")
    return ImageSet(images, labels, names)


def declared_classes(path, arrays, classes, private):
    """Names of an npz's classes: class_names, else `classes`; [] if a public set says nothing and has labels."""
    names = [str(x) for x in np.ravel(arrays.get("class_names", classes or []))]
    if "labels" not in arrays:
        return names or ["0"]
    if private and not names:
        raise ValueError(f"{path} has no array class_names, and the list of classes is published, so it is "
                         "not made from private labels: say --classes a,b,c, or --classes N for 0 to N-1")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: class_names has a name twice")
    return names


def describe_npz(path, classes=None, private=False):
    """(side, channels, class names) of an npz, from the header of its images and the names alone."""
    arrays = read_npz(path, (), optional=("class_names",))
    try:
        with zipfile.ZipFile(path) as archive, archive.open("images.npy") as file:
            version = np.lib.format.read_magic(file)
            header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            shape, _, _ = header(file)
            if "labels.npy" in archive.namelist():
                arrays["labels"] = None  # they are there; nobody reads them
    except Exception as error:  # of zipfile and numpy
        raise DataError(damaged(path, error)) from error
    return shape[1], 3 if len(shape) == 4 else 1, declared_classes(path, arrays, classes, private)


# ---- files -------------------------------------------------------------------------------------------------------


def held_out(key):
    """Whether the image with these bytes as its key is on the "test" side: one in ten, whatever the others are."""
    return zlib.crc32(key) % 10 == 0


def located(root, where):
    """The path of an own set as given, else under the data root. Raises DataError if there is neither."""
    found = next((p for p in (Path(where).expanduser(), root / where) if p.exists()), None)
    if found is None:
        raise DataError(f"{where} not found, neither here nor in {root}")
    return found


def read_pair(folders, stem, download, first_label=0, last_label=9):
    """Images and labels stem-images-idx3-ubyte, stem-labels-idx1-ubyte from the first folder that has both."""
    paths = find(folders, stem)
    if paths is None:
        failures = (OSError, RuntimeError, zipfile.BadZipFile)  # URLError is an OSError
        with contextlib.suppress(*failures), contextlib.redirect_stdout(io.StringIO()):  # it prints each failed mirror
            download()
        paths = find(folders, stem)
    if paths is None:
        wanted = folders[0] / f"{stem}-images-idx3-ubyte"
        raise DataError(f"{wanted} not found, download failed: {WAYS_OUT}, or use the embedded data (--preset digits)")
    return check(read_idx(paths[0]), read_idx(paths[1]), paths[0], first_label, last_label)


def find(folders, stem):
    """[images, labels] in the first folder that has both, plain or .gz; None if no folder does."""
    names = (f"{stem}-images-idx3-ubyte", f"{stem}-labels-idx1-ubyte")
    for place in folders:
        paths = [next((p for p in (place / name, place / f"{name}.gz") if p.exists()), None) for name in names]
        if None not in paths:
            return paths
    return None


def read_idx(path):
    """One idx file of unsigned bytes (LeCun's MNIST page): 0 0 8 ndim, ndim big-endian uint32 sizes, then the bytes."""
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except Exception as error:  # of gzip, zlib and the file system
        raise DataError(damaged(path, error)) from error
    ndim = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", ndim, 4).tolist() if ndim and len(raw) >= 4 + 4 * ndim else []
    if not shape or len(raw) - 4 - 4 * ndim != math.prod(shape):
        raise DataError(damaged(path, f"{len(raw)} bytes do not fit the header"))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_npz(path, keys, optional=()):
    """{key: array}. Pickled objects are refused: loading one would run its code."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in (*keys, *(key for key in optional if key in arrays))}
    except FileNotFoundError as error:
        raise DataError(f"{path} not found: restore it from the repository") from error
    except ValueError as error:
        why = "an array of objects: images of unequal size, or pickles" if "pickle" in str(error) else error
        raise DataError(damaged(path, why)) from error
    except Exception as error:  # of zipfile, zlib and numpy, which has a dozen types for damaged files
        raise DataError(damaged(path, error)) from error


def check(images, labels, path, first_label, last_label):
    """numpy (N,H,H) or (N,H,H,3) uint8, (N,) integers -> tensors (N,C,H,H) uint8, (N,) int64; DataError names path."""
    shape = images.shape
    layout = len(shape) in (3, 4) and shape[0] > 0 and shape[1] == shape[2] and shape[3:] in ((), (3,))
    if images.dtype != np.uint8 or not layout:
        raise DataError(damaged(path, f"images are {images.dtype} {shape}, expected uint8 (N,H,H) or (N,H,H,3)"))
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(damaged(path, f"{len(images)} images with labels {labels.dtype} {labels.shape}"))
    if labels.min() < first_label or labels.max() > last_label:
        raise DataError(damaged(path, f"labels outside {first_label}..{last_label}"))
    images = torch.from_numpy(images.copy())
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64))


def damaged(path, why):
    return f"{path} is damaged ({' '.join(str(why).split())}): restore it from its source"
