"""Image sets, public and private, as uint8 tensors with labels.

The method (Liu, Lyu, Vinaroz, Park: Differentially Private Latent Diffusion Models, TMLR 2024, Sec. 3) pairs a public
set with a private one. This file only reads pictures; who may look at them, and how often, is decided in train.py, and
the Poisson sampler of the private stage lives in dp_sgd.py.

    name       part      what
    strokes    public    handwriting drawn by strokes.py, nothing stored
    mnist10k   private   10,000 MNIST training digits in data/: the first 8,000 "train", the last 2,000 "test"
    mnist, fashion, emnist (letters)     the full sets, downloaded through torchvision when absent
    omniglot   public    handwriting of 50 alphabets without labels, omniglot.npz in the data root

The data root is --data-root, else the environment variable DPLDM_DATA, else ~/.cache/dpldm.
Alone:  python data.py NAME [SPLIT]     prints the figures of a set and writes NAME.png, ten columns.
"""

import contextlib
import gzip
import io
import math
import os
import sys
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import folder
import strokes

EMBEDDED = Path(__file__).resolve().parent / "data" / "mnist10k.npz"
EMBEDDED_TRAIN = 8_000  # private pictures of mnist10k; the rest is held out
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts its files
DIGITS = [str(d) for d in range(10)]
LETTERS = [chr(ord("a") + i) for i in range(26)]
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
WAYS_OUT = "point --data-root or DPLDM_DATA at a folder that has it"


class DataError(ValueError):
    """A data file is missing or damaged; the message is one line that names it and the ways out."""


@dataclass
class ImageSet:
    """Pictures in memory: images (N,C,H,W) uint8, ink on background 0; labels (N,) int64 in 0..len(classes)-1."""

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    captions: list[str] | None = None
    attributes: dict[str, torch.Tensor] | None = None

    def __len__(self):
        return len(self.labels)


def load(name, split="train", root=None, size=32, public_classes=None, n=None, seed=0):
    """Read (or draw, for "strokes") an image set.

    name            a key of LOADERS
    split           "train" or "test"; "strokes" and "omniglot" have no split, every call gives the whole set
    root            data root as str or Path; None: DPLDM_DATA, else ~/.cache/dpldm
    size            side of the returned pictures in pixels; smaller ones are padded with background on all sides
    public_classes  "strokes" only: "digits" (labels 0..9), "letters" (0..25) or "all" (default; digits, then letters)
    n               number of pictures; a seeded subset in the set's order, or how many to draw (default 60,000)
    seed            rules the drawing and the subset; never the private stage
    Returns ImageSet. Raises DataError if files are missing or damaged, ValueError for arguments out of range.
    """
    if name not in LOADERS:
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(LOADERS)}")
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if public_classes is not None and name != "strokes":
        raise ValueError(f"public_classes only applies to 'strokes', not to {name!r}")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    root = data_root(root)
    if name == "strokes":
        images, labels, classes = draw_strokes(public_classes or "all", n or 60_000, seed)
    else:
        images, labels, classes = LOADERS[name](root, split)
        if n is not None and n > len(labels):
            raise ValueError(f"{name} {split} has {len(labels)} pictures, fewer than the {n} asked for")
        if n is not None:
            chosen = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))[:n].sort().values
            images, labels = images[chosen], labels[chosen]
    return ImageSet(name, pad(images, size), labels, classes)


def data_root(root=None):
    """The folder of the full sets: the argument, else the environment variable DPLDM_DATA, else ~/.cache/dpldm."""
    return Path(root or os.environ.get("DPLDM_DATA") or "~/.cache/dpldm").expanduser()


# ---- pixels ------------------------------------------------------------------------------------------------------


def pad(images, size):
    """(N,C,h,h) -> (N,C,size,size): a border of zeros, the background. ValueError if size < h or size - h is odd."""
    border, uneven = divmod(size - images.shape[-1], 2)
    if border < 0 or uneven:
        raise ValueError(f"cannot pad {images.shape[-1]} pixels to {size}: the difference must be even and positive")
    return F.pad(images, (border,) * 4)


def crop(images, size=28):
    """The inverse of pad: the central size x size pixels of (N,C,H,W), any dtype."""
    border, uneven = divmod(images.shape[-1] - size, 2)
    if border < 0 or uneven:
        raise ValueError(f"cannot crop {images.shape[-1]} pixels to {size}: the difference must be even and positive")
    return images[..., border : border + size, border : border + size]


def to_float(images):
    """uint8 0..255 -> float32 -1..1, the range in which every network of this project sees pictures."""
    return images.float() / 127.5 - 1


def to_uint8(x):
    """float -1..1 -> uint8 0..255, rounded; values outside are clamped. Exact inverse of to_float."""
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def save_grid(images, path, columns=10):
    """Write images (N,C,H,W) uint8 as one PNG, row by row, small ones enlarged; all or nothing (folder.replacing)."""
    enlarge = max(1, min(3, 900 // (columns * images.shape[-1])))
    images = images.cpu().repeat_interleave(enlarge, 2).repeat_interleave(enlarge, 3)
    grid = torchvision.utils.make_grid(images.float() / 255, nrow=columns, padding=enlarge, pad_value=0.2)
    with folder.replacing(path) as file:
        torchvision.utils.save_image(grid, file, format="png")


# ---- the sets: images (N,C,h,h) uint8, labels (N,) int64, class names --------------------------------------------


def draw_strokes(public_classes, n, seed):
    """n pictures by strokes.draw; every class equally often (to within one), in random order."""
    groups = {"digits": (0, 10), "letters": (10, 36), "all": (0, 36)}
    if public_classes not in groups:
        raise ValueError(f"public_classes must be one of {', '.join(groups)}, not {public_classes!r}")
    first, last = groups[public_classes]
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % (last - first))[torch.randperm(n, generator=generator)]
    return strokes.draw(labels + first, generator), labels, list(strokes.CLASSES[first:last])


def load_mnist10k(root, split):
    arrays = read_npz(EMBEDDED, ("images", "labels"))
    part = slice(0, EMBEDDED_TRAIN) if split == "train" else slice(EMBEDDED_TRAIN, None)
    images, labels = check(arrays["images"], arrays["labels"], EMBEDDED, 0, 9)
    return images[part], labels[part], DIGITS


MNIST_STEM = {"train": "train", "test": "t10k"}


def load_mnist(root, split):
    def download():
        torchvision.datasets.MNIST(root, download=True)

    return *read_pair([root / "MNIST" / "raw"], MNIST_STEM[split], download), DIGITS


def load_fashion(root, split):
    def download():
        torchvision.datasets.FashionMNIST(root, download=True)

    folders = [root / "FashionMNIST" / "raw", DEBIAN_FASHION]
    return *read_pair(folders, MNIST_STEM[split], download), GARMENTS


def load_emnist(root, split):
    """EMNIST letters. Pictures are stored column by column, transposed against MNIST; labels run from 1 to 26."""

    def download():
        torchvision.datasets.EMNIST(root, split="letters", download=True)

    folders, stem = [root / "EMNIST" / "raw"], f"emnist-letters-{split}"
    images, labels = read_pair(folders, stem, download, first_label=1, last_label=26)
    return images.transpose(2, 3).contiguous(), labels - 1, LETTERS


def load_omniglot(root, split):
    path = root / "omniglot.npz"
    if not path.exists():
        raise DataError(f"{path} not found: {WAYS_OUT}, or draw public handwriting instead (data set strokes)")
    images = read_npz(path, ("images",))["images"]
    return *check(images, np.zeros(len(images), np.uint8), path, 0, 0), ["handwriting"]


LOADERS = {  # strokes draws, the others read files: (root, split)
    "strokes": draw_strokes,
    "mnist10k": load_mnist10k,
    "mnist": load_mnist,
    "fashion": load_fashion,
    "emnist": load_emnist,
    "omniglot": load_omniglot,
}


# ---- files -------------------------------------------------------------------------------------------------------


def read_pair(folders, stem, download, first_label=0, last_label=9):
    """Pictures and labels stem-images-idx3-ubyte, stem-labels-idx1-ubyte from the first folder that has both."""
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
    """[pictures, labels] in the first folder that has both, plain or .gz; None if no folder does."""
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
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(damaged(path, error)) from error
    ndim = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", ndim, 4).tolist() if ndim and len(raw) >= 4 + 4 * ndim else []
    if not shape or len(raw) - 4 - 4 * ndim != math.prod(shape):
        raise DataError(damaged(path, f"{len(raw)} bytes do not fit the header"))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_npz(path, keys):
    """{key: array}. Pickled objects are refused: loading one would run its code."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in keys}
    except FileNotFoundError as error:
        raise DataError(f"{path} not found: restore it from the repository") from error
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(damaged(path, error)) from error


def check(images, labels, path, first_label, last_label):
    """numpy (N,H,H) or (N,H,H,3) uint8, (N,) integers -> tensors (N,C,H,H) uint8, (N,) int64; DataError names path."""
    shape = images.shape
    layout = len(shape) in (3, 4) and shape[0] > 0 and shape[1] == shape[2] and shape[3:] in ((), (3,))
    if images.dtype != np.uint8 or not layout:
        raise DataError(damaged(path, f"pictures are {images.dtype} {shape}, expected uint8 (N,H,H) or (N,H,H,3)"))
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(damaged(path, f"{len(images)} pictures with labels {labels.dtype} {labels.shape}"))
    if labels.min() < first_label or labels.max() > last_label:
        found = f"labels run from {labels.min()} to {labels.max()}"
        raise DataError(damaged(path, f"{found}, expected {first_label} to {last_label}"))
    images = torch.from_numpy(images.copy())
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64))


def damaged(path, why):
    return f"{path} is damaged ({' '.join(str(why).split())}): delete it and run again, or restore it from its source"


if __name__ == "__main__":
    try:
        chosen = load(*sys.argv[1:3], n=1000) if sys.argv[1:] else sys.exit(__doc__)
    except ValueError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{chosen.name}: {tuple(chosen.images.shape)}, mean {chosen.images.float().mean():.1f}, {chosen.classes}")
    save_grid(chosen.images[:100], f"{chosen.name}.png")
