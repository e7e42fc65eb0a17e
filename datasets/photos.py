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
from .arrays import fetched, located
from .registry import WAYS_OUT, DataError, ImageSet, dataset, named, natural, readable

# others: "not NAME", "NAME"
ATTRIBUTE_CLASSES = {"Male": ["female", "male"], "Young": ["not young", "young"]}
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
         "(lines \"filename TAB caption\")", channels=3, side=0, own=True)
def load_folder(ask):
    base = located(ask.root, ask.where)
    paths, labels, names, others = tree(base, ask.classes)
    keys = own_keys([base / path for path in paths])
    rows = [i for i, key in enumerate(keys) if (key % 10 == 0) == (ask.split == "test")]
    if not rows:
        raise DataError(f"{base} has no image in the split {ask.split!r}: it has {len(paths)} in "
                        f"all{left_out(others)}")
    lines, source = captions(base, [paths[i] for i in rows], [keys[i] // 10 for i in rows], others)
    if ask.split == "train":
        said = f"found {len(lines):,} in {source}" if lines else "none, sentences about classes are used"
        print(f"captions: {said}{left_out(others)}", file=sys.stderr)
    return ImageSet([base / paths[i] for i in rows], torch.tensor(labels)[rows], names, lines)


def own_keys(paths):
    """A number from the content of each file: what an image's side and caption hang on, and never its name.

    A renamed image stays on its side. Of an unreadable file 0; `decode` names them all.
    """
    def key(path):
        with contextlib.suppress(OSError):
            return zlib.crc32(path.read_bytes())
        return 0

    with ThreadPool(torch.get_num_threads()) as pool:
        return pool.map(key, paths)


def left_out(others):
    """What to say of the other files: "; left out: 3 .heic, 1 .txt", or ""."""
    count = Counter(path.suffix.lower() or "without a suffix" for path in others)
    found = ", ".join(f"{count[suffix]:,} {suffix}" for suffix in sorted(count))
    return f"; left out, no format that Pillow reads here: {found}" if found else ""


@dataset("celeba", "CelebA's folder as distributed; --label-attribute gives the two classes", role="private",
         channels=3,
         side=178, n=162_770)
def load_celeba(ask, name="celeba"):
    reason, attempted = "", name == "celeba" and ask.download and celeba_lists(ask.root, name)[0] is None
    if attempted:  # torchvision wants the package gdown for it
        _, reason = fetched("CelebA", ask.root)
    base, listed, partition = celeba_lists(ask.root, name)
    if base is None:
        tried = f", download failed ({reason or 'it brought nothing'})" if attempted else ""
        raise DataError(f"{ask.root / name / 'list_attr_celeba.txt'} not found{tried}: {WAYS_OUT}")
    paths, attributes = celeba(base, listed, partition, ask.split)
    if ask.label_attribute not in attributes:
        raise ValueError(f"--label-attribute {ask.label_attribute}: {listed} has {', '.join(attributes)}")
    labels = attributes[ask.label_attribute].long()
    return ImageSet(paths, labels, attribute_classes(ask.label_attribute), None, attributes)


@dataset("faces", "other photographs of faces in CelebA's layout, in the folder faces of the data root",
         role="private",
         channels=3, side=178, n=5_000)
def load_faces(ask):
    return load_celeba(ask, "faces")


def celeba_lists(root, name):
    """(folder, list of attributes, list of parts) of CelebA's layout in ROOT/name or ROOT, .txt or .csv; else
    Nones."""
    found = ((base, base / f"list_attr_celeba.{form}", base / f"list_eval_partition.{form}")
             for base in (root / name, root) for form in ("txt", "csv"))
    return next((paths for paths in found if paths[1].exists()), (None, None, None))


def attribute_names(root, name, label_attribute):
    """Names of the attributes of CelebA's layout, from the head of the list; no image is read."""
    _, listed, _ = celeba_lists(root, name)
    if listed is None:
        raise DataError(f"{root / name / 'list_attr_celeba.txt'} not found: {WAYS_OUT}")
    _, found, _ = attribute_rows(listed)
    if label_attribute not in found:
        raise ValueError(f"--label-attribute {label_attribute}: {listed} has {', '.join(found)}")
    return found


def attribute_classes(name):
    """The two classes that an attribute gives: its absence, its presence."""
    words = name.replace("_", " ").lower()
    return list(ATTRIBUTE_CLASSES.get(name, [f"not {words}", words]))


# ---- lists -------------------------------------------------------------------------------------------------


def celeba(base, listed, partition, split):
    """CelebA's lists -> (paths of the split's images, {attribute: (N,) bool}).

    The partition's 0 is "train", 1 and 2 are "test". The attributes are those that the list names, however
    many. Every image must stand in both lists exactly once.
    """
    names, rows = read_attributes(listed)
    parts = read_partition(partition)
    for here, there, path, other in ((parts, rows, listed, partition), (rows, parts, partition, listed)):
        if lacking := next((image for image in here if image not in there), None):
            raise wrong(path, f"no row for {lacking}", f"those of {other}: one of the two belongs to "
                                                       f"another set")
    images = [image for image, part in parts.items() if (part == 0) == (split == "train")]
    if not images:
        raise wrong(partition, f"no image of the split {split!r}", "some")
    table = torch.tensor([rows[image] for image in images])  # (N, attributes) bool
    place = base / "img_align_celeba"
    place = place / place.name if (place / place.name).is_dir() else place  # as the CSV form is packed
    return [place / image for image in images], {name: table[:, i].clone() for i, name in enumerate(names)}


def wrong(path, found, expected):
    """The ValueError for a list; what stands in its lines is private and not repeated."""
    return ValueError(f"{path}: found {found}, expected {expected}")


def attribute_rows(path):
    """(announced number of rows or None, names, rows) of a list of attributes: the .csv has one line as its
    head."""
    lines = read_lines(path)
    if lines and lines[0][1][0] == "image_id":
        return None, lines[0][1][1:], lines[1:]
    return (lines[0][1] if lines else []), (lines[1][1] if len(lines) > 1 else []), lines[2:]


def read_attributes(path):
    """The names, then a row per image -> names, {image: [bool] in their order}."""
    announced, names, lines = attribute_rows(path)
    code, rows = {"1": True, "-1": False}, {}
    for number, (image, *values) in lines:
        complete = len(values) == len(names) and set(values) <= code.keys()
        if not complete or image in rows or not inside(image):
            raise wrong(path, f"something else in line {number}",
                        f"a file inside the folder, once, with {len(names)} values 1 or -1")
        rows[image] = [code[value] for value in values]
    if not rows or announced not in (None, [str(len(rows))]):
        raise wrong(path, f"{len(rows)} rows", "as many as the first line announces")
    return names, rows


def read_partition(path):
    """Rows "image part" -> {image: 0 train, 1 validation, 2 test}."""
    parts = {}
    for number, row in read_lines(path):
        if number == 1 and row == ["image_id", "partition"]:  # the head of the .csv
            continue
        if len(row) != 2 or row[1] not in ("0", "1", "2") or row[0] in parts or not inside(row[0]):
            raise wrong(path, f"something else in line {number}", "a file inside the folder, once, and 0, 1 "
                                                                  "or 2")
        parts[row[0]] = int(row[1])
    return parts


def inside(name):
    """Is this the plain name of a file in its folder? Not so "/x", "../x", and "./x", another name of x."""
    return PurePosixPath(name).as_posix() == name and name[0] != "/" and ".." not in name.split("/")


def tree(base, classes=None):
    """Image files under a folder -> (paths relative to it, sorted; class of each; class names; the other
    files).

    One subfolder per class, as torchvision's ImageFolder has it, or one flat folder, whose only class is
    "picture". A class is a subfolder, empty or not: no image makes or unmakes one. `classes` gives their
    order and may name more. Links are followed; folders that are hidden or of the system are left out.
    """
    if not base.is_dir():
        raise ValueError(f"{base} is no folder; say npz:{shlex.quote(str(base))} of arrays, unpack an "
                         f"archive")
    found, others, met = [], [], {}
    for place, folders, names in os.walk(base, onerror=unreadable, followlinks=True):
        if (twin := met.setdefault(os.path.realpath(place), place)) is not place:
            raise ValueError(f"{place} and {twin} are the same folder, whose images would count twice; make "
                             f"it one")
        folders[:] = [name for name in folders if name[0] != "." and name not in SYSTEM]
        for name in names:
            if name[0] != "." and name not in SYSTEM:
                path = Path(place, name).relative_to(base)
                (found if path.suffix.lower() in SUFFIXES else others).append(path)
        if place == os.fspath(base):
            top = sorted(folders, key=natural)
    if top and (loose := min((path for path in found if len(path.parts) == 1), default=None)):
        beside = f"lies beside the class folders ({', '.join(top)[:60]})"
        raise ValueError(f"{base / loose} {beside}: move it into one of them")
    folders = {name: readable(name) for name in top}
    if not classes:
        ask_about(base, top, found)
    names = named([readable(name) for name in classes or folders.values() or ["picture"]], base)
    if lacking := next((name for name in top if folders[name] not in names), None):
        raise ValueError(f"{base / lacking} is a folder of a class that --classes does not name")
    if not top and len(names) > 1:
        raise ValueError(f"{base} is a flat folder, so one class, and --classes names {len(names)}")
    found.sort()
    return found, [names.index(folders[path.parts[0]]) if top else 0 for path in found], names, others


def unreadable(error):
    raise ValueError(f"{error.filename} cannot be read: {error.strerror}")


def ask_about(base, top, found):
    """Refuse subfolders that are hardly classes, splits or a wrapping, unless --classes says that they
    are."""
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
    """(one caption for each file, where from); (None, "") where there are none. What was read leaves
    `others`.

    captions.txt: lines "filename TAB caption"; metadata.jsonl or .csv: file_name and text; else a .txt beside
    each image. Of several captions an image's own key, from its bytes, chooses.
    """
    found, listed = {}, next((path for path in others if path.as_posix() in READERS), None)
    if listed:
        source, used = base / listed, {listed}
        for number, row in READERS[listed.as_posix()](source):
            if len(row) != 2 or not all(isinstance(part, str) for part in row):  # the line itself is private
                raise wrong(source, f"something else in line {number}", "'filename TAB caption', or "
                                                                        "file_name and "
                            "text; convert like this: one image and one caption to a line")
            found.setdefault(listed_name(row[0]), []).append(row[1])
    else:
        notes = {path.with_suffix(""): path for path in others if path.suffix.lower() == ".txt"}
        used = {path: notes[path.with_suffix("")] for path in paths if path.with_suffix("") in notes}
        if not used:
            return None, ""
        source, found = "a .txt beside each", {
            listed_name(path.as_posix()): [" ".join(read_text(base / note).split())]
            for path, note in used.items()}
        used = notes.values()
    others[:] = [path for path in others if path not in set(used)]
    lines = []
    for path, key in zip(paths, keys, strict=True):
        if not (options := found.get(listed_name(path.as_posix()))):
            raise ValueError(f"{source} of {base} has no line for {path}: give each image a caption, or none")
        lines.append(options[key % len(options)])
    return lines, source


def listed_name(name):
    """A file's name as lists may write it: "/" for "\\", without "./" and the "#0" of a caption's number,
    NFC."""
    name = re.sub(r"(\.\w+)#\d+$", r"\1", name.strip().replace("\\", "/")).removeprefix("./")
    return unicodedata.normalize("NFC", name)


def tabbed(path):
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(number, line.split("\t")) for number, line in lines if line.strip()]


def from_jsonl(path):
    """(number, [file_name, caption]) of each line; [] where it is none."""
    for number, line in enumerate(read_text(path).splitlines(), 1):
        row = []
        with contextlib.suppress(ValueError, AttributeError, RecursionError):
            row = named_cells(json.loads(line))
        if line.strip():
            yield number, row


def from_csv(path):
    cells = csv.DictReader(read_text(path).splitlines())
    return [(number, named_cells(row)) for number, row in enumerate(cells, 2)]


def named_cells(row):
    """{"file_name": ..., "text" or "caption": ...} -> [name, caption]."""
    return [row.get("file_name"), next((row[key] for key in ("text", "caption") if key in row), None)]


READERS = {"captions.txt": tabbed, "metadata.jsonl": from_jsonl, "metadata.csv": from_csv}


def read_text(path):
    """A text file in UTF-8, or in UTF-16 that says so; ValueError, one line, for others."""
    try:
        raw = path.read_bytes()
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        return raw.decode("utf-16" if wide else "utf-8-sig")
    except FileNotFoundError as error:
        raise ValueError(f"{path} not found, though the set needs it: restore it from its source") from error
    except UnicodeDecodeError as error:
        raise wrong(path, "bytes that are no UTF-8", "text in UTF-8; convert like this: "
                    f"iconv -f LATIN1 -t UTF-8 {shlex.quote(str(path))} > new.txt") from error
    except OSError as error:
        raise ValueError(files.unfit(path, "text", error)) from error


def read_lines(path):
    """[(number from 1, words)] of the lines of a text file, words apart at blanks or commas, empty lines left
    out."""
    lines = enumerate(read_text(path).splitlines(), 1)
    return [(number, line.replace(",", " ").split()) for number, line in lines if line.strip(" ,\t")]


# ---- pixels ------------------------------------------------------------------------------------------------


def decode(paths, size, channels=3, cache=None):
    """Image files -> (N, channels, size, size) uint8, in as many threads as torch uses.

    From CACHE_FROM images on the result is kept in the folder `cache` (None: not), under a name made from
    all it depends on: the files, their sizes and times, `size`, `channels`. A cache that cannot be read or
    written is done without.
    """
    stats = [(str(path), *state(path)) for path in paths]
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

    broken = {}

    def fill(i):
        try:
            images[i] = square(paths[i], size, channels)
        except ValueError as error:
            broken[i] = str(error)

    # threads suffice: PIL decodes outside the interpreter's lock
    with ThreadPool(torch.get_num_threads()) as pool:
        for _ in tqdm(pool.imap(fill, range(len(paths)), 16), "    decoding", len(paths), leave=False,
                      unit="image",
                      disable=len(paths) < CACHE_FROM):
            pass
    if broken:  # all at once: nobody mends a folder file by file
        several = f"{len(broken)} files are no images: " if len(broken) > 1 else ""
        raise ValueError(several + "; ".join(broken[i] for i in sorted(broken)))
    if kept:
        with contextlib.suppress(OSError), files.replacing(kept, private=True) as file:
            np.save(file, images.numpy())
    return images


def state(path):
    """(size, time) of a file; zeros if there is none, which `square` will say."""
    with contextlib.suppress(OSError):
        stat = os.stat(path)
        return stat.st_size, stat.st_mtime_ns
    return 0, 0


def square(path, size, channels):
    """One image file -> (channels, size, size) uint8: its central square; PIL's bilinear filter antialiases.

    What is transparent becomes white paper. Pixels of more than 8 bits: `eight_bits`.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            image = ImageOps.exif_transpose(image)  # cameras store an image as it was held
            if image.mode[0] in "IF":
                image = eight_bits(image, path)
            if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "La", "RGBa"):
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            side = min(image.size)
            left, top = ((length - side) // 2 for length in image.size)
            small = image.convert("RGB" if channels == 3 else "L").resize(
                (size, size), Image.Resampling.BILINEAR, (left, top, left + side, top + side))
    except DataError:
        raise
    except FileNotFoundError as error:
        raise ValueError(f"{path} not found, though it is listed: restore it from its source") from error
    except Exception as error:  # PIL raises a dozen types
        reason = "no image in it" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(files.unfit(path, f"a whole image ({', '.join(FORMATS)})", reason)) from error
    return torch.from_numpy(np.array(small)).view(size, size, channels).permute(2, 0, 1)


def eight_bits(image, path):
    """Grey of 16 bits, full scale, -> 8 bits; 32 bits and floats by the rule of arrays (`pixels.to_bytes`).

    By constants, and refused where this image alone shows that they are wrong: 12 bits in 16 would be black.
    """
    values = np.array(image)
    if image.mode.startswith("I;16") or image.format == "PNG" or values.dtype == np.uint16:
        if 0 < values.max() < 4096:
            raise DataError(f"{path}: found 16 bits of which at most 12 are used, expected 0..65535 or 8 "
                            "bits; convert like this: values * 16 of 12 bits")
        return Image.fromarray((values * (1 / 257)).astype(np.uint8))
    return Image.fromarray(pixels.to_bytes(values, path))
