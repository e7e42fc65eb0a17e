"""Sets stored as arrays: idx files (MNIST and its kin), npz files, CIFAR-10's batches.

Every reader raises DataError, one line that names the file, for what is missing or of another form: what was
found, what is expected, and how to convert it. Forms that have one meaning are read. Pickles are never
loaded.
"""
import contextlib
import gzip
import io
import math
import shlex
import socket
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from support import files

from . import pixels
from .registry import WAYS_OUT, DataError, ImageSet, dataset, named, readable

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
    arrays = read_npz(EMBEDDED, ("images", "labels"))
    part = slice(0, EMBEDDED_TRAIN) if ask.split == "train" else slice(EMBEDDED_TRAIN, None)
    images, labels = check(arrays["images"], arrays["labels"], EMBEDDED, 0, 9)
    return ImageSet(images[part], labels[part], DIGITS)


@dataset("mnist", "MNIST, downloaded through torchvision when absent", n=60_000, classes=DIGITS,
         files="MNIST", overlaps=("mnist10k",))
def load_mnist(ask):
    return ImageSet(*read_pair([ask.root / "MNIST" / "raw"], STEMS[ask.split], ask.root, "MNIST"), DIGITS)


@dataset("fashion", "Fashion-MNIST, downloaded through torchvision when absent", n=60_000, classes=GARMENTS,
         files="FashionMNIST", jiggled=False)  # all garments are centred and upright
def load_fashion(ask):
    folders = [ask.root / "FashionMNIST" / "raw", DEBIAN_FASHION]
    return ImageSet(*read_pair(folders, STEMS[ask.split], ask.root, "FashionMNIST"), GARMENTS)


@dataset("emnist", "EMNIST letters, downloaded through torchvision when absent", n=124_800, classes=LETTERS,
         files="EMNIST")
def load_emnist(ask):
    """EMNIST stores images column by column, transposed against MNIST. Labels of its letters run from 1 to
    26.
    """
    folders, stem = [ask.root / "EMNIST" / "raw", ask.root], f"emnist-letters-{ask.split}"
    images, labels = read_pair(folders, stem, ask.root, "EMNIST", 1, 26, split="letters")
    return ImageSet(images.transpose(2, 3).contiguous(), labels - 1, LETTERS)


@dataset("omniglot", "handwriting of 50 alphabets without labels, omniglot.npz in the data root",
         role="public", n=32_000, classes=("handwriting",), files="omniglot.npz")
def load_omniglot(ask):
    path = ask.root / "omniglot.npz"
    if not path.exists():
        raise DataError(f"{path} not found: {WAYS_OUT}, or draw public handwriting instead (data set "
                        "strokes)")
    images = read_npz(path, ("images",))["images"]
    return ImageSet(*check(images, np.zeros(len(images), np.uint8), path, 0, 0), ["handwriting"])


@dataset("cifar10", "CIFAR-10, downloaded through torchvision when absent", channels=3, side=32, n=50_000,
         classes=CIFAR10, files="cifar-10-batches-py", overlaps=("public32",))
def load_cifar10(ask):
    place = ask.root / "cifar-10-batches-py"
    if not ask.download and not place.exists():
        raise DataError(f"{place} not found: {WAYS_OUT}")
    read, reason = fetched("CIFAR10", ask.root, place.exists(), train=ask.split == "train")
    if reason:
        raise DataError(f"{place} not found, download failed ({reason}): {WAYS_OUT}")
    return ImageSet(*check(read.data, np.array(read.targets), ask.root, 0, 9), list(read.classes))


@dataset("public32", "small colour photographs, public32.npz in the data root", role="public", channels=3,
         side=32, n=12_000, files="public32.npz", overlaps=("cifar10",))
def load_public32(ask):
    path = ask.root / "public32.npz"
    if not path.exists():
        raise DataError(f"{path} not found: {WAYS_OUT}, or use another public set (cifar10, folder:PATH)")
    return own_arrays(path)


@dataset("npz", "your own arrays: images (N,H,H) or (N,H,H,3) uint8, labels (N,), class_names", own=True)
def load_npz(ask):
    return own_arrays(located(ask.root, ask.where), ask.split, ask.classes, ask.private)


def own_arrays(path, split=None, classes=None, private=False):
    """ImageSet of an npz; labels and class_names may be absent. split None: all of it.

    Arrays of a split, as MedMNIST and Keras name them, are that split, "val" held out as "test" is. Otherwise
    each image decides for itself (`held_out`).
    """
    with opened(path) as arrays:
        images, labels, told = gathered(arrays, path, split)
        names = declared_classes(path, arrays, classes, private)
        by_name = "class_names" not in arrays
    if labels is None:
        labels = np.zeros(images.shape[:1], np.uint8)
    elif labels.ndim > 1 and labels.size != len(images):  # one-hot: its width declares as many classes
        names, by_name = names or [str(i) for i in range(labels.shape[1])], False
    elif by_name or labels.dtype.kind in "US":
        names, labels = matched(labels, names, path)
    images, labels = check(images, labels, path, 0, len(names) - 1)
    if split is not None and not told:
        side = torch.tensor([held_out(x.numpy().tobytes()) for x in images]) == (split == "test")
        images, labels = images[side], labels[side]
    if not len(images):
        raise DataError(f"{path} has no image in the split {split!r}: too few images")
    return ImageSet(images, labels, names)


ROLES = {"images": {"images", "image", "imgs", "x", "data"},
         "labels": {"labels", "label", "y", "targets", "target"}}
SIDES = {"train": "train", "test": "test", "val": "test", "valid": "test", "validation": "test"}


def roles(names):
    """Names of arrays -> {(role, side): [names]}: "x_train", "train_images" and "images" (side "") by one
    rule."""
    found = {}
    for name in sorted(names):
        words = set(name.lower().split("_"))
        side = next((SIDES[word] for word in sorted(words & SIDES.keys())), "")
        for role, words_of_role in ROLES.items():
            if len(words & words_of_role) == 1 and words <= words_of_role | SIDES.keys():
                found.setdefault((role, side), []).append(name)
    return found


def gathered(arrays, path, split):
    """(images, labels or None, whether the arrays' names say which split they are)."""
    found, told = roles(arrays), False
    plain = found.get(("images", ""), [])
    wanted = [("images" if "images" in plain else plain[0], "")] if plain else []
    if not plain:
        told = split is not None and ("images", "test") in found and ("images", "train") in found
        sides = [split] if told else ["train", "test"]
        wanted = [(name, side) for side in sides for name in found.get(("images", side), [])]
    if not wanted or len(plain) > 1 and "images" not in plain:
        names = ", ".join(arrays)[:200]
        raise DataError(f"{path}: found the arrays {names or '(none)'}, expected images and labels; convert "
                        "like this: np.savez('own.npz', images=..., labels=...)")
    labels = found.get(("labels", wanted[0][1]), [])
    if told or not plain:
        labels = [name for side in sides for name in found.get(("labels", side), [])]
    elif "labels" in labels:
        labels = ["labels"]
    if len(labels) not in (0, len(wanted)):
        raise DataError(f"{path}: found labels {', '.join(labels)[:200]} for the images {wanted[0][0]}, "
                        "expected one array of labels for each of images; convert like this: np.savez(..., "
                        "labels=...)")
    images = [arranged(arrays[name], path) for name, _ in wanted]
    images = np.concatenate([pixels.to_bytes(x, path) for x in images]) if len(images) > 1 else images[0]
    return images, np.concatenate([arrays[name] for name in labels]) if labels else None, told


def matched(labels, names, path):
    """Labels that name their classes, "cat" or 3 -> (class names, labels (N,) from 0).

    Without an array class_names a whole number is the name of a class if all declared names are numbers, else
    its place. names []: a public set's, in their order.
    """
    text = labels.dtype.kind in "US"
    if not text and names and not all(name.isdecimal() for name in names):
        return names, labels
    values, places = np.unique(labels if text else whole(labels, labels.size, path), return_inverse=True)
    values = [readable(x) for x in values]
    names = names or values
    if not set(values) <= set(names):  # which ones is private
        spread = f" outside 0..{len(names) - 1}" if names == [str(i) for i in range(len(names))] else ""
        raise DataError(f"{path}: found labels{spread} that are none of the classes "
                        f"{', '.join(names)[:200]}, expected their names or, where class_names is an array, "
                        "their places from 0; convert like this: name all classes by --classes, or save "
                        "labels - 1 if the first is called 1")
    return names, np.array([names.index(x) for x in values])[places.reshape(-1)]


def declared_classes(path, arrays, classes, private):
    """Names of an npz's classes: class_names, else `classes`; [] if a public set says nothing and has labels.
    """
    names = [readable(x) for x in np.ravel(arrays.get("class_names", classes or []))]
    if not any(role == "labels" for role, _ in roles(arrays)):
        return names or ["0"]
    if private and not names:
        raise DataError(f"{path} has no array class_names, and the list of classes is published, so it is "
                        "not made from private labels: say --classes a,b,c, or --classes N for 0 to N-1")
    return named(names, path)


def describe_npz(path, classes=None, private=False):
    """(side, channels, class names) of an npz, from the header of its images and the names alone."""
    with opened(path) as arrays:
        found = [names for (role, _), names in roles(arrays).items() if role == "images"] or [["images"]]
        if not hasattr(arrays, "zip"):  # a single array
            shape = arrays["images"].shape
        else:
            with arrays.zip.open(f"{found[0][0]}.npy") as file:
                version = np.lib.format.read_magic(file)
                number = "1_0" if version == (1, 0) else "2_0"
                shape, _, _ = getattr(np.lib.format, f"read_array_header_{number}")(file)
        _, channels, side, _ = arranged(np.broadcast_to(np.uint8(0), shape), path).shape
        return side, channels, declared_classes(path, arrays, classes, private)


# ---- files -------------------------------------------------------------------------------------------------


def held_out(key):
    """Whether the image with these bytes as its key is on the "test" side: one in ten, whatever the others
    are.
    """
    return zlib.crc32(key) % 10 == 0


def located(root, where):
    """The path of an own set as given, else under the data root. Raises DataError if there is neither."""
    found = next((p for p in (files.expanded(where), root / where) if p.exists()), None)
    if found is None:
        raise DataError(f"{where} not found, neither here nor in {root}")
    return found


PATIENCE = 30  # seconds that a server may be silent


def fetched(name, root, there=False, **options):
    """Let torchvision read or download a set -> (the set, ""), or (None, the reason why not, in one line)."""
    import torchvision
    if not there:
        source = getattr(torchvision.datasets, name)
        where = [*getattr(source, "mirrors", []), getattr(source, "url", None) or "its distributor"][0]
        print(f"fetching {name} from {where} into {root}; without an answer for {PATIENCE} seconds it is "
              f"given up",
              file=sys.stderr, flush=True)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(PATIENCE)  # torchvision's own requests have none
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints each failed mirror
            return getattr(torchvision.datasets, name)(root, download=True, **options), ""
    except Exception as error:  # of urllib, tarfile, zipfile and gdown, which raise what they like
        return None, " ".join(str(error).split())[:120] or type(error).__name__
    finally:
        socket.setdefaulttimeout(before)


def read_pair(folders, stem, root, name, first_label=0, last_label=9, **options):
    """Images and labels stem-images-idx3-ubyte, stem-labels-idx1-ubyte from the first folder that has both.
    """
    paths, reason = find(folders, stem), ""
    if paths is None:
        _, reason = fetched(name, root, **options)
        paths = find(folders, stem)
    if paths is None:
        wanted = folders[0] / f"{stem}-images-idx3-ubyte"
        raise DataError(f"{wanted} not found, download failed ({reason or 'it brought nothing'}): "
                        f"{WAYS_OUT}, or use the embedded data (--preset digits)")
    return check(read_idx(paths[0]), read_idx(paths[1]), paths[0], first_label, last_label)


def find(folders, stem):
    """[images, labels] in the first place that has both; None if none does.

    Plain or .gz, "idx3" after a dash or a dot, in the folder, the one above or "gzip" in them: forms that are
    distributed, in that order.
    """
    def there(place, kind):
        names = (f"{stem}-{kind}{dash}ubyte" for dash in ("-idx3-", "-idx1-", ".idx3-", ".idx1-"))
        paths = (place / f"{name}{suffix}" for name in names for suffix in ("", ".gz"))
        return next((path for path in paths if path.is_file()), None)

    for folder in folders:
        for place in (folder, folder.parent, folder / "gzip", folder.parent / "gzip"):
            paths = [there(place, kind) for kind in ("images", "labels")]
            if None not in paths:
                return paths
    return None


def read_idx(path):
    """One idx file of unsigned bytes (LeCun's MNIST page): 0 0 8 ndim, ndim big-endian uint32 sizes, then the
    bytes.
    """
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except Exception as error:  # of gzip, zlib and the file system
        raise DataError(files.unfit(path, "an idx file", error)) from error
    ndim = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", ndim, 4).tolist() if ndim and len(raw) >= 4 + 4 * ndim else []
    if not shape or len(raw) - 4 - 4 * ndim != math.prod(shape):
        raise DataError(files.unfit(path, "an idx file", f"{len(raw)} bytes, another number than its header "
                                                         f"says"))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


@contextlib.contextmanager
def opened(path):
    """The arrays of an npz, or the images of an npy, by name; whatever goes wrong with them -> DataError.

    Pickled objects are refused: loading one would run its code.
    """
    try:
        found = np.load(path, allow_pickle=False)
        if isinstance(found, np.ndarray):
            yield {"images": found}
        else:
            with found:
                yield found
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path} not found: restore it from the repository") from error
    except IsADirectoryError as error:
        place = shlex.quote(str(path))
        raise DataError(f"{path} is a folder, expected an npz file: say folder:{place}") from error
    except KeyError as error:
        raise DataError(f"{path}: {' '.join(str(error).split())}, but it is needed; convert like this: "
                        "np.savez('own.npz', images=..., labels=...)") from error
    except Exception as error:  # of zipfile, zlib and numpy, which has a dozen types
        if "pickle" in str(error) and zipfile.is_zipfile(path):
            error = ("an array of objects: images of unequal size, or pickles; convert like this: np.stack "
                     "of images of one size, np.array(class_names, dtype=str)")
        raise DataError(files.unfit(path, "an npz file of numpy", error)) from None


def read_npz(path, keys, optional=()):
    """{key: array}."""
    with opened(path) as arrays:
        return {key: arrays[key] for key in (*keys, *(key for key in optional if key in arrays))}


def check(images, labels, path, first_label, last_label):
    """numpy images and labels in any form with one meaning -> tensors (N,C,H,H) uint8, (N,) int64.

    DataError names path for others, and for labels outside first_label..last_label.
    """
    images = torch.from_numpy(np.array(pixels.to_bytes(arranged(images, path), path), order="C"))
    labels = whole(labels, len(images), path)
    if labels.min() < first_label or labels.max() > last_label:
        raise DataError(f"{path}: found labels outside {first_label}..{last_label}, expected {first_label} "
                        "for the first class; convert like this: labels - 1 if they count from 1, or declare "
                        "more classes")
    return images, torch.from_numpy(labels.astype(np.int64))


def arranged(images, path):
    """(N,H,H), (N,H,H,C) or (N,C,H,H), C 1 or 3 -> a view (N,C,H,H). DataError, with the way to convert, for
    others."""
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
    """Labels (N,), (N,1) or one-hot (N,K) of whole numbers in any dtype -> (N,) integers; DataError for
    others."""
    expected = f"expected ({n},) whole numbers from 0"
    one_hot = labels.ndim == 2 and labels.shape[1] > 1 and len(labels) == n and labels.dtype.kind in "biuf"
    if one_hot:
        if not ((labels == 1).sum(1) == 1).all() or not ((labels != 0).sum(1) == 1).all():
            raise DataError(f"{path}: found labels {labels.shape} that are not one-hot, {expected}; convert "
                            "like this: one class of each image, labels.argmax(1)")
        return labels.argmax(1)
    shapely = labels.shape in ((n,), (n, 1)) and labels.dtype.kind in "biuf"
    if not shapely or labels.dtype.kind == "f" and not (labels == np.rint(labels)).all():
        raise DataError(f"{path}: found labels {labels.dtype} {labels.shape} for {n} images, {expected}; "
                        "convert like this: labels.astype('int64'), one for each image")
    return labels.reshape(n).astype(np.int64)
