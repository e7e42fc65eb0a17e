"""Photographs: CelebA's layout and plain folders of image files, decoded once to small squares.

The colour sets of DP-LDM (Liu et al. 2024, experiments on CelebA and CIFAR-10) begin here. Everything is cut
to its central square, CelebA's 178 x 218 pixels to 178 x 178 as the authors do, and resized with
antialiasing. All functions raise ValueError, one line that names the file.

Look at a folder from the shell: `python -m datasets folder:PATH`.
"""
import codecs
import contextlib
import csv
import hashlib
import io
import json
import os
import re
import shlex
import sys
import unicodedata
import zlib
from collections import Counter
from multiprocessing.pool import ThreadPool
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from PIL import Image, ImageOps

from support import files
from support.bars import tqdm

from . import pixels
from .arrays import fetched, located, there
from .registry import WAYS_OUT, DataError, ImageSet, dataset, named, natural, own_rows, readable, reading

ATTRIBUTE_CLASSES = {"Male": ["female", "male"]}  # others: "not NAME", "NAME"
CACHE_FROM = 1000  # fewer images are decoded faster than anybody notices
Image.MAX_IMAGE_PIXELS = 300_000_000  # PIL refuses twice as many, lest a small file fill the memory
Image.init()
FORMATS = [form for form in (
    "AVIF", "BMP", "GIF", "HEIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
    if form in Image.OPEN]
SUFFIXES = {suffix for suffix, form in Image.registered_extensions().items() if form in FORMATS}
SPLITS = {"train", "training", "val", "valid", "validation", "test", "testing"}  # hardly classes
SYSTEM = {"@eaDir", "__MACOSX", "lost+found", "Thumbs", "$RECYCLE.BIN"}  # folders that are no classes
CROP = "central square"  # part of a cache's name: change it with the crop
CACHED = f"*{'[0-9a-f]' * 24}.npy*"  # names of files in the cache, unfinished ones included


# ---- the sets: images of the result is the list of paths ---------------------------------------------------


@dataset("folder",
         "your own image files: one subfolder per class, or one flat folder; captions.txt is optional "
         "(lines \"filename TAB caption\")", channels=3, side=0, own=True,
         facts=lambda ask: {"classes": tree(located(ask.root, ask.where), ask.classes)[2]})
def load_folder(ask):
    base = located(ask.root, ask.where)
    paths, labels, names, others = tree(base, ask.classes)
    keys = own_keys([base / path for path in paths])
    rows = own_rows(keys, ask.split, base, left_out(others))
    # The last digit of the key chose the side, the others choose the caption.
    lines, source = captions(base, [paths[i] for i in rows], [keys[i] // 10 for i in rows], others)
    if ask.split == "train":
        said = f"found {len(lines):,} in {source}" if lines else "none, sentences about classes are used"
        print(f"captions: {said}{left_out(others)}", file=sys.stderr)
    return ImageSet([base / paths[i] for i in rows], torch.tensor(labels)[rows], names, lines)


def own_keys(paths):
    """A number from the content of each file. It decides side and caption; the name does not.

    A renamed image stays on its side. ValueError for a file that cannot be read.
    """
    def key(path):
        try:
            return zlib.crc32(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path} cannot be read: {error.strerror}") from error

    with ThreadPool(torch.get_num_threads()) as pool:
        return pool.map(key, paths)


def left_out(others):
    """What to say of the other files: "; left out, no format that ...: 3 .heic, 1 .txt", or ""."""
    count = Counter(path.suffix.lower() or "without a suffix" for path in others)
    found = ", ".join(f"{count[suffix]:,} {suffix}" for suffix in sorted(count))
    return f"; left out, no format that Pillow reads here: {found}" if found else ""


def celeba_facts(ask):
    _, names, _, classes = read_celeba(ask)
    return {"attributes": names, "classes": classes}


@dataset("faces", "other photographs of faces in CelebA's layout, in the folder faces of the data root",
         role="private", channels=3, side=178, n=5_000, facts=celeba_facts)
@dataset("celeba", "CelebA's folder as distributed; --label-attribute gives the two classes", role="private",
         channels=3, side=178, n=162_770, facts=celeba_facts)
def load_celeba(ask):
    """CelebA's layout: a list of attributes, of any names, and one of splits: 0 "train", 1 and 2 "test".

    Every image must stand in both lists exactly once.
    """
    listed, names, rows, classes = read_celeba(ask)
    partition = listed.with_name(listed.name.replace("attr_celeba", "eval_partition"))
    _, parts = read_list(partition, {"0": 0, "1": 1, "2": 2}, ["partition"])
    if lacking := min(rows.keys() ^ parts.keys(), default=None):
        short, long = (listed, partition) if lacking in parts else (partition, listed)
        raise wrong(short, f"no row for {lacking}", f"those of {long}: one of the two belongs to another set")
    images = [image for image, (part,) in parts.items() if (part == 0) == (ask.split == "train")]
    if not images:
        raise wrong(partition, f"no image of the split {ask.split!r}", "some")
    table = torch.tensor([rows[image] for image in images])  # (N, attributes) bool
    attributes = dict(zip(names, table.T.contiguous(), strict=True))
    place = listed.parent / "img_align_celeba"
    place = place / place.name if (place / place.name).is_dir() else place  # as the CSV form is packed
    labels = attributes[ask.label_attribute].long()
    return ImageSet([place / image for image in images], labels, classes, None, attributes)


def read_celeba(ask):
    """(path of the list of attributes, their names, {image: [bool]}, two classes). DataError if absent."""
    listed, reason = celeba_list(ask.root, ask.name), ""
    if not listed.exists() and ask.name == "celeba":  # torchvision wants the package gdown for it
        _, reason = fetched(ask, "CelebA")
        listed = celeba_list(ask.root, ask.name)
    if not listed.exists():
        raise DataError(f"{listed} not found{reason and ', '}{reason}: {WAYS_OUT}")
    names, rows = read_list(listed, {"1": True, "-1": False})
    return listed, names, rows, attribute_classes(ask.label_attribute, names, listed)


def celeba_list(root, name):
    """Path of CelebA's list of attributes in ROOT/name or ROOT, .txt or .csv; the first of them if absent."""
    places, forms = (root / name, root), ("txt", "csv")
    return there(*(place / f"list_attr_celeba.{form}" for place in places for form in forms))


def attribute_classes(name, names, title):
    """The two classes that an attribute gives, its absence and its presence. ValueError if it is no name."""
    if name not in names:
        raise ValueError(f"--label-attribute {name}: {title} has {', '.join(names)}")
    words = name.replace("_", " ").lower()
    return list(ATTRIBUTE_CLASSES.get(name, [f"not {words}", words]))


# ---- lists -------------------------------------------------------------------------------------------------


def wrong(path, found, expected):
    """The ValueError for a list; lines are named by number, because what stands in them is private."""
    return ValueError(f"{path}: found {found}, expected {expected}")


def read_list(path, code, names=()):
    """A list of CelebA's, .txt or .csv: a row for each image -> names of the columns, {image: [values]}.

    code: {what stands there: its value}. names: of a list without a head. A head is the number of rows and
    the names, in two lines, or "image_id" and the names in one.
    """
    lines, announced = read_lines(path), None
    head = [words for _, words in lines[:2]]
    if head and head[0][0] == "image_id":
        names, lines = head[0][1:], lines[1:]
    elif head and len(head[0]) == 1:
        announced, names, lines = head[0][0], head[-1], lines[2:]
    rows = {}
    for number, (image, *values) in lines:
        complete = len(values) == len(names) and set(values) <= code.keys()
        if not complete or image in rows or not inside(image):
            raise wrong(path, f"something else in line {number}",
                        f"a file inside the folder, once, with {len(names)} values of {', '.join(code)}")
        rows[image] = [code[value] for value in values]
    if not rows or announced not in (None, str(len(rows))):
        raise wrong(path, f"{len(rows)} rows", "as many as the first line announces, and one at least")
    return names, rows


def inside(name):
    """Does a path stay inside its folder, in its one spelling? Not so "/x", "../x", and "./x" for x."""
    return PurePosixPath(name).as_posix() == name and name[0] != "/" and ".." not in name.split("/")


def tree(base, classes=None):
    """Image files under a folder -> four lists: sorted relative paths, labels, class names, other files.

    One subfolder per class, as torchvision's ImageFolder has it, or one flat folder, whose only class is
    "picture". A class is a subfolder, empty or not: no image makes or unmakes one. `classes` gives their
    order and may name more. Links are followed; folders that are hidden or of the system are left out.
    """
    if not base.is_dir():
        raise ValueError(f"{base} is no folder; say npz:{shlex.quote(str(base))} of arrays, unpack an "
                         "archive")
    found, others, met = [], [], {}
    for place, folders, names in os.walk(base, onerror=unreadable, followlinks=True):
        if (twin := met.setdefault(os.path.realpath(place), place)) != place:  # who came first
            raise ValueError(f"{place} and {twin} are the same folder, whose images would count twice; make "
                             "it one")
        folders[:] = visible(folders)
        for path in (Path(place, name).relative_to(base) for name in visible(names)):
            (found if path.suffix.lower() in SUFFIXES else others).append(path)
        if place == os.fspath(base):
            top = sorted(folders, key=natural)
    if top and (loose := min((path for path in found if len(path.parts) == 1), default=None)):
        beside = f"lies beside the class folders ({', '.join(top)[:60]})"
        raise ValueError(f"{base / loose} {beside}: move it into one of them")
    if not classes:
        ask_about(base, top, found)
    names = named([readable(name) for name in classes or top or ["picture"]], base)
    if lacking := next((name for name in top if readable(name) not in names), None):
        raise ValueError(f"{base / lacking} is a folder of a class that --classes does not name")
    if not top and len(names) > 1:
        raise ValueError(f"{base} is a flat folder, so one class, and --classes names {len(names)}")
    found.sort()
    label = {name: i for i, name in enumerate(names)}
    return found, [label[readable(path.parts[0])] if top else 0 for path in found], names, others


def visible(names):
    """Those that are not hidden and not of the system."""
    return [name for name in names if name[0] != "." and name not in SYSTEM]


def unreadable(error):
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


def ask_about(base, top, found):
    """Refuse subfolders that are splits or a wrapping rather than classes, unless --classes names them."""
    split = next((name for name in top if name.lower().startswith("train")), None)
    if split and {name.lower() for name in top} <= SPLITS:
        reason = "are parts of a set, and would become classes"
    elif len(top) == 1 and found and min(len(path.parts) for path in found) > 2:
        split, reason = top[0], "holds all the folders, and would become the only class"
    else:
        return
    raise ValueError(f"{base}: {', '.join(top)} {reason}; say folder:{shlex.quote(str(base / split))}, or "
                     f"--classes {shlex.quote(','.join(top))} if that is meant")


# ---- captions ----------------------------------------------------------------------------------------------


def captions(base, paths, keys, others):
    """(one caption for each file, where from), or (None, "") if there are none.

    Takes all files of captions out of `others`, unread ones too.

    captions.txt: lines "filename TAB caption"; metadata.jsonl or .csv: file_name and text; else a .txt beside
    each image. Of several captions an image's own key, from its bytes, chooses.
    """
    lists = [Path(name) for name in LISTS if Path(name) in others]  # the first one counts
    if lists:
        source, used = base / lists[0], lists
        rows = caption_rows(source)
    else:
        notes = {path.with_suffix(""): path for path in others if path.suffix.lower() == ".txt"}
        beside = {path: notes[path.with_suffix("")] for path in paths if path.with_suffix("") in notes}
        if not beside:
            return None, ""
        source, used = "a .txt beside each", notes.values()
        rows = [(path.as_posix(), " ".join(read_text(base / note).split())) for path, note in beside.items()]
    used = set(used)
    others[:] = [path for path in others if path not in used]
    called = Counter(listed_name((path if lists else path.with_suffix("")).as_posix()) for path in paths)
    if shared := [name for name, times in called.items() if times > 1]:
        # A caption shared by two images would depend on both. So one image could change that of the other.
        raise ValueError(f"{base}: two images go by the name {shared[0]} in the captions: rename one")
    found, lines = {}, []
    for name, caption in rows:
        found.setdefault(listed_name(name), []).append(caption)
    for path, key in zip(paths, keys, strict=True):
        if not (options := found.get(listed_name(path.as_posix()))):
            raise ValueError(f"{source} of {base} has no line for {path}: give each image a caption, or none")
        lines.append(options[key % len(options)])
    return lines, source


LISTS = {  # what csv.DictReader is told of each list of captions; the lines of .jsonl are no table
    "captions.txt": {"fieldnames": ["file_name", "text"], "delimiter": "\t", "quoting": csv.QUOTE_NONE},
    "metadata.csv": {}, "metadata.jsonl": None,
}


def caption_rows(path):
    """[(name of a file, caption)] of a list of captions. ValueError names a line that has something else."""
    # Only \n, \r\n and \r end a line, where str.splitlines knows more. A quoted caption keeps its line end.
    lines = [line if line.strip() else "\n" for line in io.StringIO(read_text(path), newline=None)]
    found = []
    if path.suffix == ".jsonl":
        rows = [(number, from_json(line)) for number, line in enumerate(lines, 1) if line.strip()]
    else:
        with reading(path, "a table"):
            table = csv.DictReader(lines, **LISTS[path.name])
            rows = [(table.line_num, row) for row in table]
    for number, row in rows:
        pair = row.get("file_name"), row.get("text", row.get("caption"))
        if None in row or not all(isinstance(part, str) for part in pair):  # the line itself is private
            raise wrong(path, f"something else in line {number}", "'filename TAB caption', or file_name and "
                        "text; convert like this: one image and one caption to a line")
        found.append(pair)
    return found


def from_json(line):
    """The dict in a line; {} if there is none."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(row := json.loads(line), dict):
            return row
    return {}


def listed_name(name):
    """A file's name as lists may write it: "/" for "\\", no "./", no "#0" of a caption's number, NFC."""
    name = re.sub(r"(\.\w+)#\d+$", r"\1", name.strip().replace("\\", "/")).removeprefix("./")
    return unicodedata.normalize("NFC", name)


def read_text(path):
    """A text file in UTF-8, or in UTF-16 that says so; ValueError, one line, for others."""
    try:
        raw = path.read_bytes()
    except OSError as error:  # no DataError: a dry run takes that for a set that is absent, and assumes it
        raise ValueError(f"{path} cannot be read: {error.strerror}") from error
    wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return raw.decode("utf-16" if wide else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise wrong(path, "bytes that are no UTF-8", "text in UTF-8; convert like this: "
                    f"iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > new.txt") from error


def read_lines(path):
    """[(number from 1, words)] of a text file's lines that are not empty; blanks or commas part words."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(number, words) for number, line in lines if (words := line.replace(",", " ").split())]


# ---- pixels ------------------------------------------------------------------------------------------------


def decode(paths, size, channels=3, cache=None):
    """Image files -> (N, channels, size, size) uint8, in as many threads as torch uses.

    From CACHE_FROM images on the result is kept in the folder `cache` (None: not), under a name made from
    all it depends on: the files, their sizes and times, `size`, `channels`. A cache that cannot be read or
    written is done without. ValueError names the files that are no images.
    """
    shape, kept = (len(paths), channels, size, size), None
    if cache and len(paths) >= CACHE_FROM:
        with contextlib.suppress(OSError):  # of a file that is missing; it is named below
            stats = [(str(path), (state := os.stat(path)).st_size, state.st_mtime_ns) for path in paths]
            key = hashlib.sha256(json.dumps([CROP, channels, size, stats]).encode()).hexdigest()[:24]
            kept = Path(cache) / f"{key}.npy"
    if kept:
        with contextlib.suppress(OSError):
            files.only_owner(kept.parent, CACHED)
        with contextlib.suppress(OSError, ValueError, EOFError):
            found = np.load(kept, allow_pickle=False)
            if found.shape == shape and found.dtype == np.uint8:
                return torch.from_numpy(found)
    images = torch.empty(shape, dtype=torch.uint8)

    def fill(i):
        """Decode image i -> what is wrong with it, or None."""
        try:
            images[i] = square(paths[i], size, channels)
        except ValueError as error:
            return str(error)

    # threads suffice: PIL decodes outside the interpreter's lock
    with ThreadPool(torch.get_num_threads()) as pool:
        told = tqdm(pool.imap(fill, range(len(paths)), 16), "    decoding", len(paths), leave=False,
                    unit="image", disable=len(paths) < CACHE_FROM)
        broken = [message for message in told if message]
    if broken:  # all at once: nobody mends a folder file by file
        several = f"{len(broken)} files are no images: " if len(broken) > 1 else ""
        more = f"; and {len(broken) - 100} more" if len(broken) > 100 else ""
        raise ValueError(several + "; ".join(broken[:100]) + more)
    if kept:
        with contextlib.suppress(OSError, ValueError), files.replacing(kept, private=True) as file:
            np.save(file, images.numpy())
    return images


def square(path, size, channels):
    """One image file -> (channels, size, size) uint8: its central square; PIL's bilinear filter antialiases.

    What is transparent becomes white paper. Pixels of more than 8 bits: `eight_bits`.
    """
    with reading(path, f"a whole image ({', '.join(FORMATS)})"), Image.open(path, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)  # cameras store an image as it was held
        if image.mode[0] in "IF":
            image = eight_bits(image, path)
        if "transparency" in image.info or image.mode[-1] in "Aa":  # RGBA, LA, PA, RGBa
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
        side = min(image.size)
        left, top = ((length - side) // 2 for length in image.size)
        small = image.convert("RGB" if channels == 3 else "L").resize(
            (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    return torch.from_numpy(np.array(small)).view(size, size, channels).permute(2, 0, 1)


def eight_bits(image, path):
    """Grey of 16 bits, full scale, -> 8 bits; 32 bits and floats by the rule of arrays (`pixels.to_bytes`).

    The scale is fixed. An image of at most 12 bits in 16 would be nearly black, so it is refused.
    """
    values = np.array(image)
    if values.dtype.kind == "u":
        if 0 < values.max() < 4096:
            raise DataError(f"{path}: found 16 bits of which at most 12 are used, expected 0..65535 or 8 "
                            "bits; convert like this: values * 16 of 12 bits")
        return Image.fromarray((values * (1 / 257)).astype(np.uint8))
    return Image.fromarray(pixels.to_bytes(values, path))
