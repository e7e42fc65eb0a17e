"""Photographs: CelebA's layout and plain folders of image files, decoded once to small squares.

The colour sets of DP-LDM (Liu et al. 2024, experiments on CelebA and CIFAR-10) begin here. Everything is cut to its
central square, CelebA's 178 x 218 pixels to 178 x 178 as the authors do, and resized with antialiasing. All functions
raise ValueError, one line that names the file.

Look at a folder from the shell: `python -m datasets folder:PATH`.
"""
import contextlib
import hashlib
import io
import json
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

from support import files

from .arrays import damaged, held_out, located
from .registry import WAYS_OUT, DataError, ImageSet, dataset

ATTRIBUTE_CLASSES = {"Male": ["female", "male"], "Young": ["not young", "young"]}  # others: "not NAME", "NAME"
CACHE_FROM = 1000  # fewer images are decoded faster than anybody notices
SYSTEM = {"@eaDir", "__MACOSX", "lost+found", "Thumbs", "$RECYCLE.BIN"}  # folders that are no classes
CROP = "central square"  # part of a cache's name: change it with the crop
CACHED = f"*{'[0-9a-f]' * 24}.npy*"  # names of files in the cache, unfinished ones included


# ---- the sets: images of the result is the list of paths ---------------------------------------------------------


@dataset("folder", "your own image files: one subfolder per class, or one flat folder; captions.txt is optional "
         "(lines \"filename TAB caption\")", channels=3, side=0, own=True)
def load_folder(ask):
    base = located(ask.root, ask.where)
    files, labels, names = tree(base, ask.classes)
    rows = [i for i, file in enumerate(files) if held_out(file.as_posix().encode()) == (ask.split == "test")]
    if not rows:
        raise DataError(f"{base} has no image in the split {ask.split!r}: it has {len(files)} in all")
    lines = None
    if (base / "captions.txt").exists():
        lines = captions(base / "captions.txt", [files[i] for i in rows])
    return ImageSet([base / files[i] for i in rows], torch.tensor(labels)[rows], names, lines)


@dataset("celeba", "CelebA's folder as distributed; --label-attribute gives the two classes", role="private", channels=3,
         side=178, n=162_770)
def load_celeba(ask, name="celeba"):
    places, tried = [ask.root / name, ask.root], ""
    if name == "celeba" and ask.download and not any((p / "list_attr_celeba.txt").exists() for p in places):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                torchvision.datasets.CelebA(ask.root, download=True)
        except Exception as error:  # torchvision wants the package gdown for it, which raises what it likes
            tried = f", download failed ({' '.join(str(error).split())[:120]})"
    base = next((p for p in places if (p / "list_attr_celeba.txt").exists()), None)
    if base is None:
        raise DataError(f"{places[0] / 'list_attr_celeba.txt'} not found{tried}: {WAYS_OUT}")
    paths, attributes = celeba(base, ask.split)
    if ask.label_attribute not in attributes:
        raise ValueError(f"--label-attribute {ask.label_attribute}: {base / 'list_attr_celeba.txt'} has "
                         f"{', '.join(attributes)}")
    labels = attributes[ask.label_attribute].long()
    return ImageSet(paths, labels, attribute_classes(ask.label_attribute), None, attributes)


@dataset("faces", "other photographs of faces in CelebA's layout, in the folder faces of the data root", role="private",
         channels=3, side=178, n=5_000)
def load_faces(ask):
    return load_celeba(ask, "faces")


def attribute_names(root, name, label_attribute):
    """Names of the attributes of CelebA's layout in ROOT/name or ROOT, the list's second line; no image is read."""
    base = next((p for p in (root / name, root) if (p / "list_attr_celeba.txt").exists()), None)
    if base is None:
        raise DataError(f"{root / name / 'list_attr_celeba.txt'} not found: {WAYS_OUT}")
    lines = read_lines(base / "list_attr_celeba.txt")
    found = lines[1][1] if len(lines) > 1 else []
    if label_attribute not in found:
        raise ValueError(f"--label-attribute {label_attribute}: {base / 'list_attr_celeba.txt'} has {', '.join(found)}")
    return found


def attribute_classes(name):
    """The two classes that an attribute gives: its absence, its presence."""
    words = name.replace("_", " ").lower()
    return list(ATTRIBUTE_CLASSES.get(name, [f"not {words}", words]))


# ---- lists -------------------------------------------------------------------------------------------------------


def celeba(base, split):
    """CelebA's lists in `base` -> (paths of the split's pictures, {attribute: (N,) bool}).

    list_eval_partition.txt: 0 is "train", 1 and 2 are "test". The attributes are those that list_attr_celeba.txt names in
    its second line, however many. Every picture must stand in both lists exactly once.
    """
    attributes, partition = base / "list_attr_celeba.txt", base / "list_eval_partition.txt"
    names, rows = read_attributes(attributes)
    parts = read_partition(partition)
    for here, there, path, other in ((parts, rows, attributes, partition), (rows, parts, partition, attributes)):
        if lacking := next((picture for picture in here if picture not in there), None):
            raise ValueError(damaged(path, f"no row for {lacking}, which {other} lists: one of the two belongs to another set"))
    pictures = [picture for picture, part in parts.items() if (part == 0) == (split == "train")]
    if not pictures:
        raise ValueError(damaged(partition, f"no picture of the split {split!r}"))
    table = torch.tensor([rows[picture] for picture in pictures])  # (N, attributes) bool
    return [base / "img_align_celeba" / p for p in pictures], {name: table[:, i].clone() for i, name in enumerate(names)}


def read_attributes(path):
    """A count, the names, then a row per picture -> names, {picture: [bool] in their order}."""
    lines, code, rows = read_lines(path), {"1": True, "-1": False}, {}
    names = lines[1][1] if len(lines) > 1 else []
    for number, (picture, *values) in lines[2:]:
        complete = len(values) == len(names) and set(values) <= code.keys()
        if not complete or picture in rows or not inside(picture):
            wanted = f"a file inside the folder, once, with {len(names)} values 1 or -1"
            raise ValueError(damaged(path, f"line {number}: expected {wanted}"))
        rows[picture] = [code[value] for value in values]
    if not rows or lines[0][1] != [str(len(rows))]:
        raise ValueError(damaged(path, f"{len(rows)} rows, the first line announces another number"))
    return names, rows


def read_partition(path):
    """Rows "picture part" -> {picture: 0 train, 1 validation, 2 test}."""
    parts = {}
    for number, row in read_lines(path):
        if len(row) != 2 or row[1] not in ("0", "1", "2") or row[0] in parts or not inside(row[0]):
            wanted = "a file inside the folder, once, and 0, 1 or 2"
            raise ValueError(damaged(path, f"line {number}: expected {wanted}"))
        parts[row[0]] = int(row[1])
    return parts


def inside(name):
    """Is this the plain name of a file in its folder? Not so "/x", "../x", and "./x", another name of x."""
    return PurePosixPath(name).as_posix() == name and name[0] != "/" and ".." not in name.split("/")


def tree(base, classes=None):
    """Picture files under a folder -> (paths relative to it, sorted; class of each; class names).

    One subfolder per class, as torchvision's ImageFolder has it, or one flat folder, whose only class is "picture".
    A class is a subfolder, empty or not: no picture makes or unmakes one. `classes` gives their order and may
    name more. Folders that are hidden or of the system are left out.
    """
    if not base.is_dir():
        raise ValueError(f"{base} is no folder")

    def seen(path):
        return not any(part[0] == "." or part in SYSTEM for part in path.parts)

    folders = sorted(p.name for p in base.iterdir() if p.is_dir() and seen(p.relative_to(base)))
    found = (p.relative_to(base) for p in base.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS)
    files = sorted(p for p in found if seen(p))
    if folders and (loose := next((p for p in files if len(p.parts) == 1), None)):
        beside = f"lies beside the class folders ({', '.join(folders)[:60]})"
        raise ValueError(f"{base / loose} {beside}: move it into one of them")
    names = list(classes or folders or ["picture"])
    if lacking := next((name for name in folders if name not in names), None):
        raise ValueError(f"{base / lacking} is a folder of a class that --classes does not name")
    if not folders and len(names) > 1:
        raise ValueError(f"{base} is a flat folder, so one class, and --classes names {len(names)}")
    return files, [names.index(p.parts[0]) if folders else 0 for p in files], names


def captions(path, files):
    """captions.txt, lines "filename TAB caption", names relative to its folder -> the captions of these files."""
    found = {}
    for number, line in enumerate(read_text(path).splitlines(), 1):
        if line.strip():
            name, *caption = line.split("\t")
            if len(caption) != 1:  # the line itself is private
                raise ValueError(f"{path}: line {number} is not 'filename TAB caption'")
            found[name] = caption[0]
    if lacking := next((p for p in files if p.as_posix() not in found), None):
        raise ValueError(f"{path} has no line for {lacking}")
    return [found[p.as_posix()] for p in files]


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path} not found, though the set needs it: restore it from its source") from error
    except UnicodeDecodeError as error:
        raise ValueError(damaged(path, "no text in UTF-8")) from error
    except OSError as error:
        raise ValueError(damaged(path, error)) from error


def read_lines(path):
    """[(number from 1, words)] of the lines of a text file, empty ones left out."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(number, line.split()) for number, line in lines if line.strip()]


# ---- pixels ------------------------------------------------------------------------------------------------------


def decode(paths, size, channels=3, cache=None):
    """Picture files -> (N, channels, size, size) uint8, in as many threads as torch uses.

    From CACHE_FROM pictures on the result is kept in the folder `cache` (None: not), under a name made from all it depends
    on: the files, their sizes and times, `size`, `channels`. A cache that cannot be read or written is done without.
    """
    try:
        stats = [(str(path), (stat := os.stat(path)).st_size, stat.st_mtime_ns) for path in paths]
    except OSError as error:
        raise ValueError(f"{error.filename} not found, though it is listed: restore it from its source") from error
    shape = (len(paths), channels, size, size)
    key = hashlib.sha256(json.dumps([CROP, channels, size, stats]).encode()).hexdigest()[:24]
    kept = Path(cache) / f"{key}.npy" if cache and len(paths) >= CACHE_FROM else None
    if kept:
        with contextlib.suppress(OSError):
            files.only_owner(kept.parent, CACHED)
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(kept, allow_pickle=False)
            if found.shape == shape and found.dtype == np.uint8:
                return torch.from_numpy(found)
    images = torch.empty(shape, dtype=torch.uint8)

    def fill(i):
        images[i] = square(paths[i], size, channels)

    with ThreadPool(torch.get_num_threads()) as pool:  # threads suffice: PIL decodes outside the interpreter's lock
        for _ in tqdm(pool.imap(fill, range(len(paths)), 16), "    decoding", len(paths), leave=False, unit="picture",
                      disable=len(paths) < CACHE_FROM):
            pass
    if kept:
        with contextlib.suppress(OSError), files.replacing(kept, private=True) as file:
            np.save(file, images.numpy())
    return images


def square(path, size, channels):
    """One picture file -> (channels, size, size) uint8: its central square; PIL's bilinear filter antialiases."""
    try:
        with Image.open(path) as picture:
            picture = ImageOps.exif_transpose(picture)  # cameras store a picture as it was held
            if picture.mode.startswith("I"):  # 16 bits of grey, which convert() would cut off at 255
                picture = picture.convert("I").point(lambda value: value * (1 / 257)).convert("L")
            side = min(picture.size)
            left, top = ((length - side) // 2 for length in picture.size)
            small = picture.convert("RGB" if channels == 3 else "L").resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    except Exception as error:  # PIL raises a dozen types on damaged files
        raise ValueError(damaged(path, error)) from error
    return torch.from_numpy(np.array(small)).view(size, size, channels).permute(2, 0, 1)
