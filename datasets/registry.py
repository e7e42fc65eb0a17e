"""What a data set is, and the list of those that there are. To add one, decorate a loader: see `dataset`."""
import contextlib
import os
import re
import unicodedata
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from support import files

WAYS_OUT = "point --data-root or DPLDM_DATA at a folder that has it"


class DataError(ValueError):
    """A data file is missing or of another form; the message is one line that names it and the ways out."""


@dataclass
class ImageSet:
    """Images in memory: images (N,C,H,W) uint8, labels (N,) int64 in 0..len(classes)-1.

    Grey images are light on dark. captions: one sentence per image; attributes: {name: (N,) bool}; both None
    where the set has none. side: of the images before padding, to which a finished sample is cropped;
    `load` sets it and name. A loader may return paths instead of a tensor of images.
    """

    images: torch.Tensor | list[Path]
    labels: torch.Tensor
    classes: list[str]
    captions: list[str] | None = None
    attributes: dict[str, torch.Tensor] | None = None
    side: int = 0
    name: str = ""

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, rows):
        """The ImageSet of these rows, a slice or a list of whole numbers."""
        def of(values):
            if isinstance(values, dict):
                return {key: of(column) for key, column in values.items()}
            if isinstance(values, list) and isinstance(rows, list):
                return [values[row] for row in rows]
            return values if values is None else values[rows]

        return replace(self, images=of(self.images), labels=of(self.labels), captions=of(self.captions),
                       attributes=of(self.attributes))


@dataclass
class Request:
    """What a loader is asked for.

    Own sets use where, classes and private. Drawn sets use n and seed; strokes also public_classes, portraits
    size; portraits, celeba and faces label_attribute.
    """

    name: str  # of the data set, a key of REGISTRY
    root: Path  # the folder of the full data sets
    split: str = "train"  # or "test", what is held out
    where: str = ""  # the PATH of "folder:PATH" and "npz:PATH"
    classes: list[str] | None = None  # declared names, in their order
    private: bool = False  # then the list of classes is published, and must be declared
    public_classes: str = "all"
    n: int = 60_000
    seed: int = 0
    label_attribute: str = "Male"
    size: int = 32  # of the images wanted; for those drawn at any size
    download: bool = True


@dataclass
class DataSet:
    """One entry of REGISTRY: what is known without reading an image, so that a dry run may say it."""

    name: str
    load: Callable  # Request -> ImageSet
    about: str  # one line, for --help and docs/datasets.md
    # Request -> {field of this class: value}, for what hangs on the set's own files
    facts: Callable | None = None
    role: str = "either"  # "public" (nothing of it is held out), "private" or "either"
    channels: int = 1
    side: int = 28  # pixels, as stored; own photographs: 0, any
    n: int = 0  # images of the "train" side
    classes: tuple = ()  # names; () where the set itself declares them
    attributes: tuple | None = None  # names; None where it has none, and where it lists them itself
    drawn: bool = False  # made by a program: no image went in
    own: bool = False  # "name:PATH"
    augmented: bool = True  # small shifts and turns leave an image plausible: evaluate.py augments
    files: str = ""  # where it lies in the data root
    overlaps: tuple = ()  # sets with images in common, even if encoded anew


class Registry(dict):
    """{name: DataSet}. A mix "A+B" has an entry too, made when it is asked for; `in` and `get` know none."""

    def __missing__(self, name):
        if len(both := parts(name)) < 2:
            raise KeyError(name)
        first, other = (self[part] for part in both)
        return replace(first, name=name, load=None, about=f"{first.about}; and {other.about}", role="public",
                       n=first.n + min(other.n, first.n // 2), classes=(), drawn=first.drawn and other.drawn,
                       own=first.own or other.own)


REGISTRY = Registry()


def dataset(name, about, **facts):
    """Decorator: enter a loader (Request -> ImageSet) under its name.

    facts: fields of `DataSet`. A set with the role "private" or "either" must return other images for the
    split "test" than for "train". A drawn set must use n and seed of the request as well. ValueError if the
    name is taken by another loader.
    """
    def enter(load):
        def place(load):  # a notebook may enter the same one anew
            return f"{load.__module__}.{getattr(load, '__qualname__', '')}"

        if name in REGISTRY and place(REGISTRY[name].load) != place(load):
            raise ValueError(f"there is a data set {name!r} already, loaded by {place(REGISTRY[name].load)}; "
                             "give the new one another name")
        REGISTRY[name] = DataSet(name, load, about, **facts)
        return load
    return enter


def checked(found, entry, n):
    """What a loader returned, if it has the form that `ImageSet` promises. ValueError, one line, if not.

    n: how many images were asked for, which a drawn set must make; None for other sets.
    """
    def column(values, dtype):
        return isinstance(values, torch.Tensor) and values.dtype == dtype and values.shape == (count,)

    images, labels, count = found.images, found.labels, len(found.images)
    pictures = isinstance(images, torch.Tensor) and images.dtype == torch.uint8 and images.ndim == 4
    if not (pictures and images.shape[1] in (1, 3) or isinstance(images, list)):
        expected = "images (N, 1 or 3, H, W) uint8, or a list of paths"
    elif n not in (None, count):
        expected = f"{n} images, as many as were asked for"
    elif not column(labels, torch.int64):
        expected = f"labels ({count},) int64"
    elif count and not 0 <= labels.min() <= labels.max() < len(found.classes):
        expected = f"labels from 0 to {len(found.classes) - 1}, for its {len(found.classes)} classes"
    elif found.captions is not None and len(found.captions) != count:
        expected = f"{count} captions, or None"
    elif not all(column(values, torch.bool) for values in (found.attributes or {}).values()):
        expected = f"attributes ({count},) bool, or None"
    else:
        return found
    raise ValueError(f"the loader of the data set {entry.name!r} must return {expected}: see ImageSet in "
                     "datasets/registry.py")


def parts(name):
    """A mix "A+B" -> ["A", "B"], else [name]. A is a plain name: a + after a colon is a PATH's."""
    first, plus, other = str(name).partition("+")
    return [first, other] if plus and ":" not in first else [name]


def kind_of(name):
    """The key of REGISTRY that a name stands for: "folder:PATH" -> "folder". ValueError if there is none."""
    if len(both := parts(name)) == 2:
        kinds = [kind_of(part) for part in both]
        if any("+" in kind for kind in kinds):
            raise ValueError(f"{name}: a mix has two sets, not more")
        if private := next((kind for kind in kinds if REGISTRY[kind].role == "private"), None):
            raise ValueError(f"{name}: a mix is public, and {private} is a private set")
        return "+".join(kinds)
    kind, colon, place = str(name).partition(":")
    if kind not in REGISTRY or bool(place) != REGISTRY[kind].own:
        names = [f"{entry.name}:PATH" if entry.own else entry.name for entry in REGISTRY.values()]
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(names)}")
    return kind


@contextlib.contextmanager
def reading(path, expected):
    """Whatever a library raises on a file that is no `expected` -> DataError, one line; our own as they are.

    Pillow, numpy, zipfile and zlib have three dozen types for it, csv and the file system some more.
    """
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        raise DataError(files.unfit(path, expected, error)) from error


def own_rows(keys, split, path, note=""):
    """The rows of an own set that are on a side, by a number from the content of each image.

    One in ten is "test", whatever the others are. DataError, with the note, if none is on this side.
    """
    rows = [row for row, key in enumerate(keys) if (key % 10 == 0) == (split == "test")]
    if not rows:
        raise DataError(f"{path} has no image of the split {split!r} among its {len(keys)}: one in ten is "
                        f"'test', by a checksum of its content; add images, some dozens are needed{note}")
    return rows


# ---- names of classes --------------------------------------------------------------------------------------


def readable(name):
    """A class's name as text: bytes as UTF-8, accents composed, bytes that are no UTF-8 as \\xff."""
    raw = bytes(name) if isinstance(name, bytes) else os.fsencode(str(name))
    return unicodedata.normalize("NFC", raw.decode("utf-8", "backslashreplace"))


def named(names, path):
    """The names; DataError if two are equal: samples are asked for by class name."""
    if twice := next((name for name, times in Counter(names).items() if times > 1), None):
        raise DataError(f"{path}: found the class name {twice!r} twice, expected each once; convert like "
                        "this: give one of the two another name")
    return list(names)


def natural(name):
    """Sort key: numbers in names count as numbers, so that "2" comes before "10"."""
    return re.sub("[0-9]+", lambda number: number[0].zfill(20), name), name


def numbered(classes):
    """{number: label} for `--labels 1-3`: the names, if all are whole numbers, else positions."""
    own = all(name.isdecimal() and str(int(name)) == name for name in classes)
    return {int(name) if own else i: i for i, name in enumerate(classes)}
