"""Image sets, public and private, as uint8 tensors with labels.

The method (Liu, Lyu, Vinaroz, Park: Differentially Private Latent Diffusion Models, TMLR 2024, Sec. 3) pairs a public
set with a private one. This file only reads pictures; who may look at them, and how often, is decided in train.py, and
the Poisson sampler of the private stage lives in dp_sgd.py.

    name       part      what
    strokes    public    handwriting drawn by strokes.py, nothing stored
    mnist10k   private   10,000 MNIST training digits in data/: the first 8,000 "train", the last 2,000 "test"
    mnist, fashion, emnist (letters)     the full sets, downloaded through torchvision when absent
    omniglot   public    handwriting of 50 alphabets without labels, omniglot.npz in the data root
    cifar10    either    colour, 32 pixels, downloaded through torchvision when absent
    public32   public    colour, 32 pixels, public32.npz in the data root
    celeba     private   CelebA's folder as distributed, labels from one attribute; partition 0 is "train", 1 and 2 "test"
    faces      private   other photographs of faces in the same layout, in the folder faces of the data root
    folder:PATH, npz:PATH   either    your own pictures: one subfolder per class or one flat folder (captions.txt is
                            optional: filename TAB caption), or the arrays images, labels, class_names
    The list of classes is released, so a private set declares it and nothing is counted: by class folders,
    empty or not, by the array class_names, or by --classes. Only in a public npz labels may be counted.
    An own set is split by a checksum of each picture's name (npz: pixels): about one in ten is "test". No picture's side
    depends on the others, so adding or removing one changes nothing else: the neighbouring relation of the guarantee.

The data root is --data-root, else the environment variable DPLDM_DATA, else ~/.cache/dpldm. Decoded photographs are kept
in its folder cache if it may be written to: they are as private as the originals.
Alone:  python data.py NAME [SPLIT]     prints the figures of a set and writes its first hundred to NAME.png.
"""

import contextlib
import gzip
import hashlib
import io
import math
import os
import sys
import tarfile
import zipfile
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import torchvision

import folder
import photos
import strokes

EMBEDDED = Path(__file__).resolve().parent / "data" / "mnist10k.npz"
EMBEDDED_TRAIN = 8_000  # private pictures of mnist10k; the rest is held out
DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts its files
DIGITS = [str(d) for d in range(10)]
STROKES = {"digits": list(strokes.CLASSES[:10]), "letters": list(strokes.CLASSES[10:36]), "all": list(strokes.CLASSES)}
LETTERS = [chr(ord("a") + i) for i in range(26)]
GARMENTS = ["T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot"]
ATTRIBUTE_CLASSES = {"Male": ["female", "male"], "Young": ["not young", "young"]}  # others: "not NAME", "NAME"
WAYS_OUT = "point --data-root or DPLDM_DATA at a folder that has it"


class DataError(ValueError):
    """A data file is missing or damaged; the message is one line that names it and the ways out."""


@dataclass
class ImageSet:
    """Pictures in memory: images (N,C,H,W) uint8, ink on background 0; labels (N,) int64 in 0..len(classes)-1.

    side is that of the pictures before padding, what a finished picture is cropped to. captions: one sentence per
    picture; attributes: {name: (N,) bool}; None where the set has none.
    """

    name: str
    images: torch.Tensor
    labels: torch.Tensor
    classes: list[str]
    captions: list[str] | None = None
    attributes: dict[str, torch.Tensor] | None = None
    side: int = 0

    def __len__(self):
        return len(self.labels)


def load(name, split="train", root=None, size=32, public_classes=None, n=None, seed=0, label_attribute=None, channels=3,
         cache=None, decode=True, classes=None, private=False):
    """Read (or draw, for "strokes") an image set.

    name            a key of LOADERS; "folder:PATH" and "npz:PATH" for own pictures, PATH also relative to the data root
    split           "train" or "test"; "strokes", "omniglot" and "public32" have no split, every call gives the whole set
    root            data root as str or Path; None: DPLDM_DATA, else ~/.cache/dpldm
    size            side of the returned pictures in pixels; grey arrays are padded with background on all sides, colour
                    arrays resized; photographs are cut to the central square (CelebA: 178 x 178) and resized
    public_classes  "strokes" only: "digits" (labels 0..9), "letters" (0..25) or "all" (default; digits, then letters)
    n               number of pictures; a seeded subset in the set's order, or how many to draw (default 60,000)
    seed            rules the drawing and the subset; never the private stage
    label_attribute "celeba" and "faces" only: the attribute that gives the two classes (default Male)
    channels        3, or 1: colour pictures and photographs become grey; grey pictures stay grey
    cache           folder of decoded photographs; None: "cache" in the data root if that may be written to
    decode          False: photographs are only listed, images is an empty shape on the meta device; nothing large is downloaded
    classes         names of the classes in their order, for own sets; a set that has other classes is refused
    private         True: an npz must declare its classes, by class_names or the argument `classes`
    Returns ImageSet. Raises DataError if files are missing or damaged, ValueError for arguments out of range.
    """
    kind = kind_of(name)
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if public_classes is not None and kind != "strokes":
        raise ValueError(f"public_classes only applies to 'strokes', not to {name!r}")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    root = data_root(root)
    if kind == "strokes":
        images, labels, classes = draw_strokes(public_classes or "all", n or 60_000, seed)
        return ImageSet(name, pad(images, size), labels, classes, side=images.shape[-1])
    if kind in ("celeba", "faces"):
        whole = load_celeba(root, split, kind, label_attribute or "Male", download=decode)
    elif kind in OWN:
        whole = OWN[kind](root, split, name.partition(":")[2], classes, private)
    elif kind == "cifar10" and not decode and not (root / "cifar-10-batches-py").exists():
        raise DataError(f"{root / 'cifar-10-batches-py'} not found: {WAYS_OUT}")
    else:
        whole = ImageSet(name, *LOADERS[kind](root, split))
    if classes and list(classes) != list(whole.classes):
        raise ValueError(f"{name} has the classes {', '.join(whole.classes)}; others were asked for, leave "
                         "out --classes")
    part = subset(whole, n, seed, f"{name} {split}")
    if isinstance(part.images, torch.Tensor):
        colour = part.images.shape[1] == 3
        images, side = (resize(part.images, size), size) if colour else (pad(part.images, size), part.images.shape[-1])
        if colour and channels == 1:
            images = torchvision.transforms.functional.rgb_to_grayscale(images)
    elif decode:
        cache = cache or cache_folder(root)
        if cache is None and len(part) >= photos.CACHE_FROM:
            print(f"note: {root} cannot be written to, so decoded pictures are not kept; --cache FOLDER keeps them",
                  file=sys.stderr)
        images, side = photos.decode(part.images, size, channels, cache), size
    else:
        images, side = torch.empty(len(part), channels, size, size, dtype=torch.uint8, device="meta"), size
    return replace(part, name=name, images=images, side=side)


def enlarged(name, size):
    """What to say where the pictures of a known set are smaller than the networks see them, e.g. CelebA at 256; or ""."""
    side = {"celeba": 178, "faces": 178, "cifar10": 32, "public32": 32}.get(kind_of(name), size)
    return f"{kind_of(name)}'s pictures of {side} pixels, enlarged to {size}" if side < size else ""


def kind_of(name):
    """The key of LOADERS that a name stands for; "folder:PATH" -> "folder". ValueError for a name that is none."""
    kind, colon, place = str(name).partition(":")
    if kind not in LOADERS or bool(place) != (kind in OWN):
        names = [f"{key}:PATH" if key in OWN else key for key in LOADERS]
        raise ValueError(f"unknown data set {name!r}: choose one of {', '.join(names)}")
    return kind


def same_pictures(a, b, root=None):
    """Do two names of sets, as in --public and --private, mean the same images, wholly or in part?

    Judged by names and by where the sets lie, a folder within another included; no image is read. Copies
    elsewhere are found by their digests.
    """
    first, second = place(a, root), place(b, root)
    if first and second and (first == second or first in second.parents or second in first.parents):
        return True
    known = {place(kind, root): kind for kind in ("mnist10k", *FILES)}  # whose file an own set may be
    kinds = {known.get(where, str(name).partition(":")[0]) for name, where in ((a, first), (b, second))}
    return kinds in SHARING or len(kinds) == 1 and not kinds & OWN.keys()


def place(name, root=None):
    """The file or folder with a set's images, links resolved; None for drawn sets and names without one."""
    kind, _, where = str(name).partition(":")
    root = data_root(root)
    if kind in OWN and where:
        try:
            found = located(root, where)
        except DataError:
            found = Path(where).expanduser()
    elif kind in ("celeba", "faces"):
        bases = [base for base in (root / kind, root) if (base / "list_attr_celeba.txt").exists()]
        found = [*bases, root / kind][0] / "img_align_celeba"
    elif kind in FILES:
        found = root / FILES[kind]
    else:
        return EMBEDDED.resolve() if kind == "mnist10k" else None
    return found.resolve()


def digests(images):
    """Images (N,C,H,W) uint8, as the networks see them -> (M,) int64, sorted: 8 bytes of BLAKE2b of each.

    They travel with the public checkpoints: a private set that holds one of the public images is refused,
    whatever its name and place. An image compressed or resized in another way has another digest.
    """
    found = {hashlib.blake2b(image, digest_size=8).digest() for image in images.contiguous().numpy()}
    numbers = [int.from_bytes(digest, "little", signed=True) for digest in found]
    return torch.tensor(numbers, dtype=torch.int64).sort().values


def class_list(text):
    """--classes: "a,b,c" -> ["a", "b", "c"]; a number N -> ["0", ..., str(N - 1)]. ValueError for others."""
    names = [name.strip() for name in text.split(",")]
    if len(names) == 1 and names[0].isdecimal():
        names = [str(i) for i in range(min(int(names[0]), MOST_CLASSES + 1))]
    if not names or "" in names or len(set(names)) < len(names) or len(names) > MOST_CLASSES:
        raise ValueError(f"--classes must be distinct names with commas, or a number in 1 to {MOST_CLASSES}")
    return names


def subset(whole, n, seed, title):
    """n pictures of a set, chosen at random by the seed, in the set's order; None: all."""
    if n is None:
        return whole
    if n > len(whole):
        raise ValueError(f"{title} has {len(whole)} pictures, fewer than the {n} asked for")
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:n].sort().values

    def take(values):
        return [values[i] for i in chosen.tolist()] if isinstance(values, list) else values[chosen]

    return replace(whole, images=take(whole.images), labels=whole.labels[chosen],
                   captions=whole.captions and take(whole.captions),
                   attributes=whole.attributes and {k: v[chosen] for k, v in whole.attributes.items()})


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


def resize(images, size):
    """(N,C,h,h) uint8 -> (N,C,size,size) uint8, bilinear, antialiased when it shrinks."""
    if images.shape[-1] == size:
        return images
    parts = [F.interpolate(x.float(), size=(size, size), mode="bilinear", antialias=True) for x in images.split(500)]
    return torch.cat([x.round().clamp(0, 255).to(torch.uint8) for x in parts])


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
    if public_classes not in STROKES:
        raise ValueError(f"public_classes must be one of {', '.join(STROKES)}, not {public_classes!r}")
    classes = STROKES[public_classes]
    first, last = strokes.CLASSES.index(classes[0]), strokes.CLASSES.index(classes[-1]) + 1
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.arange(n) % (last - first))[torch.randperm(n, generator=generator)]
    return strokes.draw(labels + first, generator), labels, classes


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


def load_public32(root, split):
    path = root / "public32.npz"
    if not path.exists():
        raise DataError(f"{path} not found: {WAYS_OUT}, or use another public set (cifar10, folder:PATH)")
    whole = load_npz(root, None, path)
    return whole.images, whole.labels, whole.classes


def load_cifar10(root, split):
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            read = torchvision.datasets.CIFAR10(root, train=split == "train", download=True)
    except (OSError, RuntimeError, EOFError, tarfile.TarError) as error:
        raise DataError(f"{root / 'cifar-10-batches-py'} not found, download failed: {WAYS_OUT}") from error
    return *check(read.data, np.array(read.targets), root, 0, 9), list(read.classes)


def held_out(key):
    """Whether the picture with these bytes as its key is on the "test" side: one in ten, whatever the others are."""
    return zlib.crc32(key) % 10 == 0


def load_npz(root, split, where, classes=None, private=False):
    """An own set: arrays images (N,H,H) or (N,H,H,3) uint8, labels (N,), class_names; the last two may be absent."""
    path = located(root, where)
    arrays = read_npz(path, ("images",), optional=("labels", "class_names"))
    labels = arrays.get("labels", np.zeros(arrays["images"].shape[:1], np.uint8))
    names = [str(x) for x in np.ravel(arrays.get("class_names", classes or []))]
    if "labels" not in arrays:
        names = names or ["0"]
    elif private and not names:
        raise ValueError(f"{path} has no array class_names, and the list of classes is published, so it is "
                         "not made from private labels: say --classes a,b,c, or --classes N for 0 to N-1")
    if len(set(names)) < len(names):
        raise DataError(f"{path}: class_names has a name twice")
    images, labels = check(arrays["images"], labels, path, 0, len(names or range(1000)) - 1)
    names = names or [str(x) for x in range(int(labels.max()) + 1)]  # of a public set
    if split is not None:
        side = torch.tensor([held_out(x.numpy().tobytes()) for x in images]) == (split == "test")
        images, labels = images[side], labels[side]
    if not len(images):
        raise DataError(f"{path} has no picture in the split {split!r}: too few pictures")
    return ImageSet("npz", images, labels, names)


def load_folder(root, split, where, classes=None, private=False):
    """An own set of picture files; its folders are its classes, images of the result is the list of paths."""
    base = located(root, where)
    files, labels, names = photos.tree(base, classes)
    rows = [i for i, file in enumerate(files) if held_out(file.as_posix().encode()) == (split == "test")]
    if not rows:
        raise DataError(f"{base} has no picture in the split {split!r}: it has {len(files)} in all")
    captions = None
    if (base / "captions.txt").exists():
        captions = photos.captions(base / "captions.txt", [files[i] for i in rows])
    return ImageSet("folder", [base / files[i] for i in rows], torch.tensor(labels)[rows], names, captions)


def load_celeba(root, split, name="celeba", label_attribute="Male", download=True):
    """CelebA's layout in ROOT/name or ROOT itself; images of the result is the list of paths."""
    places, tried = [root / name, root], ""
    if name == "celeba" and download and not any((p / "list_attr_celeba.txt").exists() for p in places):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                torchvision.datasets.CelebA(root, download=True)
        except Exception as error:  # torchvision wants the package gdown for it, which raises what it likes
            tried = f", download failed ({' '.join(str(error).split())[:120]})"
    base = next((p for p in places if (p / "list_attr_celeba.txt").exists()), None)
    if base is None:
        raise DataError(f"{places[0] / 'list_attr_celeba.txt'} not found{tried}: {WAYS_OUT}")
    paths, attributes = photos.celeba(base, split)
    if label_attribute not in attributes:
        raise ValueError(f"--label-attribute {label_attribute}: {base / 'list_attr_celeba.txt'} has {', '.join(attributes)}")
    words = label_attribute.replace("_", " ").lower()
    classes = ATTRIBUTE_CLASSES.get(label_attribute, [f"not {words}", words])
    return ImageSet(name, paths, attributes[label_attribute].long(), list(classes), None, attributes)


LOADERS = {  # (root, split) -> images, labels, classes; strokes draws, the last four have their own arguments
    "strokes": draw_strokes,
    "mnist10k": load_mnist10k,
    "mnist": load_mnist,
    "fashion": load_fashion,
    "emnist": load_emnist,
    "omniglot": load_omniglot,
    "cifar10": load_cifar10,
    "public32": load_public32,
    "celeba": load_celeba,
    "faces": load_celeba,
    "folder": load_folder,
    "npz": load_npz,
}
OWN = {"folder": load_folder, "npz": load_npz}
FULL = {  # pictures and classes of the "train" sides, for a plan made where the files are not
    "mnist": (60_000, 10), "fashion": (60_000, 10), "emnist": (124_800, 26), "cifar10": (50_000, 10), "celeba": (162_770, 2),
    "folder:imagenet/train": (1_281_167, 1000), "folder:laion": (1_000_000, 1)}
FILES = {"mnist": "MNIST", "fashion": "FashionMNIST", "emnist": "EMNIST", "cifar10": "cifar-10-batches-py",
         "omniglot": "omniglot.npz", "public32": "public32.npz"}  # in the data root
SHARING = ({"mnist10k", "mnist"}, {"public32", "cifar10"})  # sets with images in common, even if encoded anew
DRAWN = ("strokes",)  # made by a program: no image went in
MOST_CLASSES = 10_000
PUBLIC_ONLY = ("strokes", "omniglot", "public32")  # sets without held-out pictures


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
    except Exception as error:  # of gzip, zlib and the file system
        raise DataError(photos.damaged(path, error)) from error
    ndim = raw[3] if len(raw) > 3 and raw[:3] == b"\0\0\x08" else 0
    shape = np.frombuffer(raw, ">u4", ndim, 4).tolist() if ndim and len(raw) >= 4 + 4 * ndim else []
    if not shape or len(raw) - 4 - 4 * ndim != math.prod(shape):
        raise DataError(photos.damaged(path, f"{len(raw)} bytes do not fit the header"))
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * ndim).reshape(shape)


def read_npz(path, keys, optional=()):
    """{key: array}. Pickled objects are refused: loading one would run its code."""
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return {key: arrays[key] for key in (*keys, *(key for key in optional if key in arrays))}
    except FileNotFoundError as error:
        raise DataError(f"{path} not found: restore it from the repository") from error
    except ValueError as error:
        why = "an array of objects: pictures of unequal size, or pickles" if "pickle" in str(error) else error
        raise DataError(photos.damaged(path, why)) from error
    except Exception as error:  # of zipfile, zlib and numpy, which has a dozen types for damaged files
        raise DataError(photos.damaged(path, error)) from error


def check(images, labels, path, first_label, last_label):
    """numpy (N,H,H) or (N,H,H,3) uint8, (N,) integers -> tensors (N,C,H,H) uint8, (N,) int64; DataError names path."""
    shape = images.shape
    layout = len(shape) in (3, 4) and shape[0] > 0 and shape[1] == shape[2] and shape[3:] in ((), (3,))
    if images.dtype != np.uint8 or not layout:
        raise DataError(photos.damaged(path, f"pictures are {images.dtype} {shape}, expected uint8 (N,H,H) or (N,H,H,3)"))
    if labels.shape != shape[:1] or labels.dtype.kind not in "iu":
        raise DataError(photos.damaged(path, f"{len(images)} pictures with labels {labels.dtype} {labels.shape}"))
    if labels.min() < first_label or labels.max() > last_label:
        raise DataError(photos.damaged(path, f"labels outside {first_label}..{last_label}"))
    images = torch.from_numpy(images.copy())
    images = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2).contiguous()
    return images, torch.from_numpy(labels.astype(np.int64))


def located(root, where):
    """The path of an own set as given, else under the data root. Raises DataError if there is neither."""
    found = next((p for p in (Path(where).expanduser(), root / where) if p.exists()), None)
    if found is None:
        raise DataError(f"{where} not found, neither here nor in {root}")
    return found


def cache_folder(root):
    """ROOT/cache if it may be written to, else None: data roots are often shared and read-only."""
    allowed = root.is_dir() and os.access(root, os.W_OK) and root.stat().st_mode & 0o222  # root may write regardless
    return root / "cache" if allowed else None


if __name__ == "__main__":
    try:
        name, *split = sys.argv[1:3] or sys.exit(__doc__)
        chosen = load(name, *split, n=None if kind_of(name) in OWN else 1000)
    except ValueError as error:
        print(f"data.py: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{chosen.name}: {tuple(chosen.images.shape)}, mean {chosen.images.float().mean():.1f}, {chosen.classes}")
    save_grid(chosen.images[:100], f"{kind_of(name)}.png")
