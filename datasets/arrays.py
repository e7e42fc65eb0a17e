"""Sets stored as arrays: idx files (MNIST and its kin), npz files, CIFAR-10's batches.

Every reader raises DataError, one line that names the file, for what is missing or of another form: what was
found, what is expected, and how to convert it. Forms that have one meaning are read. Of pickles only
CIFAR-10's batches are loaded, by torchvision, which compares their checksums first.
"""
import contextlib
import gzip
import io
import shlex
import socket
import sys
import zlib
from pathlib import Path

import numpy as np
import torch

from support import files

from . import pixels
from .registry import REGISTRY, WAYS_OUT, DataError, ImageSet, dataset, named, own_rows, readable, reading

EMBEDDED = Path(__file__).resolve().parent / "mnist10k.npz"
EMBEDDED_TRAIN = 8_000  # private images of mnist10k; the rest is held out
# where the package dataset-fashion-mnist puts its files
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
STEMS = {"train": "train", "test": "t10k"}
DIGITS = [str(d) for d in range(10)]
LETTERS = [chr(ord("a") + i) for i in range(26)]
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
            "ankle boot"]
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


# ---- the sets ----------------------------------------------------------------------------------------------


@dataset("mnist10k", "10,000 MNIST training digits, embedded: 8,000 private, 2,000 held out", role="private",
         n=EMBEDDED_TRAIN, classes=DIGITS, overlaps=("mnist",))
def load_mnist10k(ask):
    part = slice(0, EMBEDDED_TRAIN) if ask.split == "train" else slice(EMBEDDED_TRAIN, None)
    return own_arrays(EMBEDDED, classes=DIGITS)[part]


@dataset("mnist", "MNIST, downloaded through torchvision when absent", n=60_000, classes=DIGITS,
         files="MNIST", overlaps=("mnist10k",))
def load_mnist(ask):
    return ImageSet(*read_pair(ask, STEMS[ask.split]), DIGITS)


@dataset("fashion", "Fashion-MNIST, downloaded through torchvision when absent", n=60_000, classes=GARMENTS,
         files="FashionMNIST", augmented=False)  # all garments are centred and upright
def load_fashion(ask):
    return ImageSet(*read_pair(ask, STEMS[ask.split], DEBIAN_FASHION), GARMENTS)


@dataset("emnist", "EMNIST letters, downloaded through torchvision when absent", n=124_800, classes=LETTERS,
         files="EMNIST")
def load_emnist(ask):
    """EMNIST: its images are transposed against MNIST's. The labels of its letters run from 1 to 26."""
    stem = f"emnist-letters-{ask.split}"
    images, labels = read_pair(ask, stem, ask.root, first_label=1, last_label=26, split="letters")
    return ImageSet(images.transpose(2, 3).contiguous(), labels - 1, LETTERS)


@dataset("omniglot", "handwriting of 50 alphabets without labels, omniglot.npz in the data root",
         role="public", n=32_000, classes=("handwriting",), files="omniglot.npz")
def load_omniglot(ask):
    found = stored(ask.root / "omniglot.npz", "draw public handwriting instead (data set strokes)")
    return ImageSet(found.images, torch.zeros_like(found.labels), ["handwriting"])


@dataset("cifar10", "CIFAR-10, downloaded through torchvision when absent", channels=3, side=32, n=50_000,
         classes=CIFAR10, files="cifar-10-batches-py", overlaps=("public32",))
def load_cifar10(ask):
    place = ask.root / "cifar-10-batches-py"
    read, reason = fetched(ask, "CIFAR10", place.exists(), train=ask.split == "train")
    if read is None:
        state = "cannot be read" if place.exists() else "not found"
        raise DataError(f"{place} {state}, {reason}: {WAYS_OUT}")
    return ImageSet(*check(read.data, np.array(read.targets), ask.root, 0, 9), CIFAR10)


@dataset("public32", "small colour photographs, public32.npz in the data root", role="public", channels=3,
         side=32, n=12_000, files="public32.npz", overlaps=("cifar10",))
def load_public32(ask):
    return stored(ask.root / "public32.npz", "use another public set (cifar10, folder:PATH)")


def stored(path, otherwise):
    """ImageSet of an npz in the data root; DataError says what else can be done where it is absent."""
    if not path.exists():
        raise DataError(f"{path} not found: {WAYS_OUT}, or {otherwise}")
    return own_arrays(path)


@dataset("npz", "your own arrays: images (N,H,H) or (N,H,H,3) uint8, labels (N,), class_names", own=True,
         facts=lambda ask: describe_npz(located(ask.root, ask.where), ask.classes, ask.private))
def load_npz(ask):
    return own_arrays(located(ask.root, ask.where), ask.split, ask.classes, ask.private)


@dataset("voted", "drawings that private images voted for, of a run of extensions/vote.py", role="public",
         own=True, facts=lambda ask: describe_npz(voted_drawings(ask)))
def load_voted(ask):
    return own_arrays(voted_drawings(ask), voted=True)


def voted_drawings(ask):
    """The file with the drawings that voted:PATH names."""
    return located(ask.root, ask.where) / "release" / "drawings.npz"


# ---- npz files ---------------------------------------------------------------------------------------------


def own_arrays(path, split=None, classes=None, private=False, voted=False):
    """ImageSet of an npz; labels and class_names may be absent. split None: all of it.

    Arrays of a split, as MedMNIST and Keras name them, are that split, "val" held out as "test" is. Otherwise
    each image decides for itself (`own_rows`). Drawings of extensions/vote.py are refused without `voted`.
    """
    with opened(path) as arrays:
        if not voted and "voted" in arrays:
            raise DataError(f"{path}: private images have voted for these drawings, which has cost epsilon. "
                            "Say voted:RUN, with the folder of that run, so that it is counted")
        of_images, of_labels, told = layout(arrays, path, split)
        names = declared_classes(path, arrays, of_labels, classes, private)
        by_name = bool(of_labels) and "class_names" not in arrays
        images = np.concatenate([pixels.to_bytes(arrays[name], path) for name in of_images])
        labels = np.concatenate([arrays[name] for name in of_labels] or [np.zeros(len(images), np.uint8)])
    names, labels = matched(labels, names, by_name, path)
    found = ImageSet(*check(images, labels, path, 0, len(names) - 1), names)
    if split is None or told:
        return found
    return found[own_rows([zlib.crc32(image.numpy()) for image in found.images], split, path)]


ROLES = {**dict.fromkeys(("images", "image", "imgs", "x", "data"), "images"),
         **dict.fromkeys(("labels", "label", "y", "targets", "target"), "labels")}
SIDES = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


def layout(arrays, path, split=None):
    """(names of the arrays of images, of those of labels, whether they are the arrays of this split alone).

    One rule: of the words in a name one says the role, another may say the side: "x_train", "train_images",
    "images". Arrays without a side go first; of several, the one with the role's own name. DataError if
    nothing fits.
    """
    found = {}
    for name in sorted(arrays):
        words = set(name.lower().split("_"))
        side = max((SIDES[word] for word in words & SIDES.keys()), default="")  # of two words: "train"
        role = ROLES.get("_".join(words - SIDES.keys()))  # all roles are one word, so their order is none
        found.setdefault((role, side), []).append(name)
    plain = ("images", "") in found
    told = not plain and split is not None and {("images", "train"), ("images", "test")} <= found.keys()
    sides = [""] if plain else [split] if told else ["train", "test"]

    def of(role):
        groups = [found.get((role, side), []) for side in sides]
        return [name for group in groups for name in ([role] if role in group else group)]

    images, labels = of("images"), of("labels")
    if not images or plain and len(images) > 1 or len(labels) not in (0, len(images)):
        raise DataError(f"{path}: found the arrays {', '.join(arrays)[:200] or '(none)'}, expected images, "
                        "and one array of labels for each or none; convert like this: np.savez('own.npz', "
                        "images=..., labels=...)")
    return images, labels, told


def matched(labels, names, by_name, path):
    """(class names, labels as places in them), from labels that name their classes, "cat" or 3.

    Text is a name. A whole number is one as well if by_name holds, there being no array class_names, and all
    declared names are numbers; else it is a place, as a column of one-hot labels is. names []: a public
    set's, in their order.
    """
    if labels.dtype.kind not in "US":
        if labels.ndim > 1 and labels.size > len(labels):  # one-hot: its width declares as many classes
            return names or [str(i) for i in range(labels.shape[1])], labels
        if not by_name or not all(name.isdecimal() for name in names):
            return names, labels
        labels = whole(labels, len(labels), path)
    values, places = np.unique(labels, return_inverse=True)
    values = [readable(x) for x in values]
    names = names or values
    if not set(values) <= set(names):  # which ones is private
        raise DataError(f"{path}: found labels that are none of the classes {', '.join(names)[:200]}, "
                        "expected their names or, where class_names is an array, their places from 0; "
                        "convert like this: name all classes by --classes, or save labels - 1 if the first "
                        "is called 1")
    return names, np.array([names.index(x) for x in values])[places.reshape(-1)]


def declared_classes(path, arrays, labels, classes, private):
    """Names of an npz's classes: class_names, else `classes`; [] if a public set says nothing and has labels.

    labels: names of the arrays of labels. DataError if a private set with labels declares no classes.
    """
    names = [readable(x) for x in np.ravel(arrays.get("class_names", classes or []))]
    if not labels:
        return names or ["0"]
    if private and not names:
        raise DataError(f"{path} has no array class_names, and the list of classes is published, so it is "
                        "not made from private labels: say --classes a,b,c, or --classes N for 0 to N-1")
    return named(names, path)


def describe_npz(path, classes=None, private=False):
    """{side, channels, classes} of an npz, from the header of its images and the names alone."""
    with opened(path) as arrays:
        images, labels, _ = layout(arrays, path)
        if not hasattr(arrays, "zip"):  # an npy
            shape = arrays["images"].shape
        else:
            with arrays.zip.open(f"{images[0]}.npy") as file:
                major, _ = np.lib.format.read_magic(file)
                # Format 3 differs from 2 only in the encoding of its header.
                shape, _, _ = getattr(np.lib.format, f"read_array_header_{min(major, 2)}_0")(file)
        empty = np.broadcast_to(np.uint8(0), shape)  # an array of this shape that takes no memory
        _, channels, side, _ = arranged(empty, path).shape
        names = declared_classes(path, arrays, labels, classes, private)
        return {"side": side, "channels": channels, "classes": names}


@contextlib.contextmanager
def opened(path):
    """The arrays of an npz, or the images of an npy, by name; whatever goes wrong with them -> DataError.

    Pickled objects are refused: loading one would run its code.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder, expected an npz file: say folder:{shlex.quote(str(path))}")
    with reading(path, "an npz file of numpy"):
        try:
            found = np.load(path, mmap_mode="r", allow_pickle=False)  # of an npy the header alone
            if isinstance(found, np.ndarray):
                yield {"images": found}
            else:
                with found:
                    yield found
        except ValueError as error:
            if not any(words in str(error) for words in ("Object arrays", "Python objects")):
                raise
            raise DataError(f"{path}: found an array of objects, as images of unequal size are one, expected "
                            "numbers or text; convert like this: np.stack of images of one size, "
                            "np.array(class_names, dtype=str)") from error


def read_npz(path, keys, note=""):
    """The arrays of these names, {key: array}. DataError, with the note, if one is missing."""
    with opened(path) as arrays:
        if lacking := next((key for key in keys if key not in arrays), None):
            raise DataError(f"{path} has no array {lacking}{note}")
        return {key: arrays[key] for key in keys}


# ---- files -------------------------------------------------------------------------------------------------


def there(*paths):
    """The first of these paths that exists, else the first of all."""
    return next((path for path in paths if path.exists()), paths[0])


def located(root, where):
    """The path of an own set as given, else under the data root. Raises DataError if there is neither."""
    found = there(files.expanded(where), root / where)
    if not found.exists():
        raise DataError(f"{where} not found, neither here nor in {root}")
    return found


PATIENCE = 30  # seconds that a server may be silent


def fetched(ask, name, present=False, **options):
    """Let torchvision read or download a set -> (the set or None, why its files are absent, if they are)."""
    if not present and not ask.download:
        return None, "and nothing is downloaded now"
    import torchvision
    source = getattr(torchvision.datasets, name)
    if not present:
        where = [*getattr(source, "mirrors", []), getattr(source, "url", None) or "its distributor"][0]
        print(f"fetching {name} from {where} into {ask.root}; without an answer for {PATIENCE} seconds it is "
              f"given up", file=sys.stderr, flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torchvision's own requests have none
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each failed mirror
            return source(ask.root, download=ask.download, **options), "the download brought nothing"
    except Exception as error:  # of urllib, tarfile, zipfile and gdown, which raise what they like
        what = "download failed" if ask.download else "and nothing is downloaded now"
        return None, f"{what} ({' '.join(str(error).split())[:120] or type(error).__name__})"
    finally:
        socket.setdefaulttimeout(before)


def read_pair(ask, stem, *elsewhere, first_label=0, last_label=9, **options):
    """Images and labels, STEM-images-idx3-ubyte and STEM-labels-idx1-ubyte, from the first folder with both.

    The folders are torchvision's own, then those elsewhere. options: for torchvision, which downloads what is
    absent.
    """
    name = REGISTRY[ask.name].files
    folders = [ask.root / name / "raw", *elsewhere]
    paths, reason = find(folders, stem), ""
    if paths is None:
        _, reason = fetched(ask, name, **options)
        paths = find(folders, stem)
    if paths is None:
        raise DataError(f"{folders[0] / stem}-images-idx3-ubyte not found, {reason}: {WAYS_OUT}, or use the "
                        "embedded data (--preset digits)")
    return check(read_idx(paths[0]), read_idx(paths[1]), paths[0], first_label, last_label, paths[1])


def find(folders, stem):
    """[images, labels] in the first place that has both; None if none does.

    Plain or .gz, "idx3" after a dash or a dot, in the folder, the one above or "gzip" in them: forms that are
    distributed, in that order.
    """
    for folder in folders:
        for place in (folder, folder.parent, folder / "gzip", folder.parent / "gzip"):
            found = [sorted([*place.glob(f"{stem}-{kind}-ubyte"), *place.glob(f"{stem}-{kind}-ubyte.gz")])
                     for kind in ("images[-.]idx3", "labels[-.]idx1")]
            if all(found):
                return [paths[0] for paths in found]
    return None


def read_idx(path):
    """One idx file of unsigned bytes (LeCun's MNIST page).

    It holds the bytes 0 0 8 ndim, then ndim big-endian uint32 sizes, then the pixels or labels.
    """
    with reading(path, "an idx file"):
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("it begins with other bytes")
        shape = np.frombuffer(raw, ">u4", raw[3], 4).tolist()
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


# ---- forms of images and labels ----------------------------------------------------------------------------


def check(images, labels, path, first_label, last_label, of_labels=None):
    """numpy images and labels in any form with one meaning -> tensors (N,C,H,H) uint8, (N,) int64.

    DataError for others, and for labels outside first_label..last_label. It names path, or for labels
    of_labels if they have a file of their own.
    """
    of_labels = of_labels or path
    images = np.require(pixels.to_bytes(arranged(images, path), path), requirements="CW")
    labels = whole(labels, len(images), of_labels)
    if labels.min() < first_label or labels.max() > last_label:
        raise DataError(f"{of_labels}: found labels outside {first_label}..{last_label}, expected "
                        f"{first_label} for the first class; convert like this: labels - 1 if they count "
                        "from 1, or declare more classes")
    return torch.from_numpy(images), torch.from_numpy(labels)


def arranged(images, path):
    """(N,H,H), (N,H,H,C) or (N,C,H,H) -> a view (N,C,H,H), C = 1 or 3.

    DataError, with the way to convert, for other shapes.
    """
    shape = images.shape
    if len(shape) == 3:
        images = images[:, None]
    elif len(shape) == 4 and shape[3] in (1, 3) and shape[1] == shape[2]:
        images = images.transpose(0, 3, 1, 2)
    n, channels, height, width = images.shape if images.ndim == 4 else (0, 0, 0, 0)
    if not n or channels not in (1, 3) or height != width:
        raise DataError(f"{path}: found images {images.dtype} {shape}, expected uint8 (N,H,H) or (N,H,H,3), "
                        "at least one; convert like this: images[..., :3] without transparency, images[:, "
                        ":H, :H] to a square, images.reshape(-1, H, H) of flat rows")
    return images


def whole(labels, n, path):
    """Labels (N,), (N,1) or one-hot (N,K) of whole numbers in any dtype -> (N,) integers.

    DataError if a label is no whole number, or a row is not one-hot.
    """
    if labels.dtype.kind in "biuf" and labels.ndim in (1, 2) and len(labels) == n and labels.size:
        rows = labels.reshape(n, -1)
        if rows.shape[1] > 1:
            numbers = rows.argmax(1)
            same = np.eye(rows.shape[1], dtype=bool)[numbers] == rows
        else:
            numbers = np.rint(rows[:, 0])
            same = numbers == rows[:, 0]
        if same.all():
            return numbers.astype(np.int64)
    raise DataError(f"{path}: found labels {labels.dtype} {labels.shape} for {n} images, expected whole "
                    f"numbers from 0 ({n},), or one-hot ({n},K); convert like this: labels.astype('int64') "
                    "of one label for each image, labels.argmax(1) of one column for each class")
