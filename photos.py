"""Photographs on disk: CelebA's layout and plain folders of picture files, decoded once to small squares.

The colour sets of DP-LDM (Liu et al. 2024, experiments on CelebA and CIFAR-10) begin here; data.py finds the folders and
makes image sets of what is read. Everything is cut to its central square, CelebA's 178 x 218 pixels to 178 x 178 as the
authors do, and resized with antialiasing. All functions raise ValueError, one line that names the file.

Look at a folder from the shell: `python data.py folder:PATH`.
"""

import contextlib
import hashlib
import json
import os
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import IMG_EXTENSIONS
from tqdm import tqdm

import folder

CACHE_FROM = 1000  # fewer pictures are decoded faster than anybody notices
CROP = "central square"  # part of a cache's name: change it with the crop


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
    names = lines[1] if len(lines) > 1 else []
    for picture, *values in lines[2:]:
        if len(values) != len(names) or not set(values) <= code.keys() or picture in rows:
            raise ValueError(damaged(path, f"row {picture[:60]}: expected once, with {len(names)} values 1 or -1"))
        rows[picture] = [code[value] for value in values]
    if not rows or lines[0] != [str(len(rows))]:
        raise ValueError(damaged(path, f"{len(rows)} rows, announced: {' '.join(lines[0])[:20] if lines else 'nothing'}"))
    return names, rows


def read_partition(path):
    """Rows "picture part" -> {picture: 0 train, 1 validation, 2 test}."""
    parts = {}
    for line in read_lines(path):
        if len(line) != 2 or line[1] not in ("0", "1", "2") or line[0] in parts:
            raise ValueError(damaged(path, f"row {' '.join(line)[:60]}: expected once a picture and 0, 1 or 2"))
        parts[line[0]] = int(line[1])
    return parts


def tree(base):
    """Picture files under a folder -> (paths relative to it, sorted; class of each; class names).

    One subfolder per class, as torchvision's ImageFolder has it, or one flat folder, whose only class is "picture".
    """
    files = sorted(p.relative_to(base) for p in base.rglob("*") if p.suffix.lower() in IMG_EXTENSIONS and p.name[0] != ".")
    classes = sorted({p.parts[0] for p in files if len(p.parts) > 1})
    loose = next((p for p in files if len(p.parts) == 1), None)
    if classes and loose:
        raise ValueError(f"{base / loose} lies beside the class folders ({', '.join(classes)[:60]}): move it into one of them")
    return files, [classes.index(p.parts[0]) if classes else 0 for p in files], classes or ["picture"]


def captions(path, files):
    """captions.txt, lines "filename TAB caption", names relative to its folder -> the captions of these files."""
    lines = [line.split("\t") for line in read_text(path).splitlines() if line.strip()]
    if wrong := next((line for line in lines if len(line) != 2), None):
        raise ValueError(f"{path}: line {' '.join(wrong)[:60]!r} is not 'filename TAB caption'")
    found = dict(lines)
    if lacking := next((p for p in files if p.as_posix() not in found), None):
        raise ValueError(f"{path} has no line for {lacking}")
    return [found[p.as_posix()] for p in files]


def read_text(path):
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ValueError(f"{path} not found, though the set needs it: restore it from its source") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(damaged(path, error)) from error


def read_lines(path):
    """The lines of a text file, split at white space, empty ones left out."""
    return [line.split() for line in read_text(path).splitlines() if line.strip()]


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
    if kept and kept.exists():
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
        with contextlib.suppress(OSError), folder.replacing(kept) as file:
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


def damaged(path, why):
    return f"{path} is damaged ({' '.join(str(why).split())}): delete it and run again, or restore it from its source"
