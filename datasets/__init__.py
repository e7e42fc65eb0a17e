"""Image sets, public and private, as uint8 tensors with labels.

The method (Liu, Lyu, Vinaroz, Park: Differentially Private Latent Diffusion Models, TMLR 2024, section 3)
pairs a public set with a private one. This package only reads or draws images. Who may look at them, and how
often, is decided in train.py, and the Poisson sampler of the private stage lives in dp_sgd.py.

    registry.py   what a data set is; a new one is a decorated loader
    arrays.py     idx and npz files          photos.py    folders of image files, CelebA's layout
    strokes.py    handwriting, drawn         garments.py  garments and shapes, drawn
    portraits.py  faces, drawn               drawing.py   what drawers share
    pixels.py     padding, sizes, ranges, grids

An own set (folder:PATH, npz:PATH) is split by a checksum of each image's content: of its file, or of its
pixels in an npz whose arrays are not split already (x_train, x_test). About one in ten is "test". No image's
side depends on its name or on the others, so adding, removing or renaming one changes nothing else: the
neighbouring relation of the guarantee. The list of classes is released, so a private set declares it and
nothing is counted: by class folders, empty or not, by the array class_names, or by --classes.

The data root is --data-root, else the environment variable DPLDM_DATA, else ~/.cache/dpldm, or dpldm-data
here where there is no home directory. Decoded photographs are kept in its folder cache if it may be written
to: they are as private as the originals.

Alone: `python -m datasets NAME [SPLIT]` prints shape, mean and classes of a set and writes its first hundred
images to NAME.png.
"""
import hashlib
import os
import sys
import unicodedata
from dataclasses import replace
from pathlib import Path

import torch

from extensions import captions
from support import files

# Their loaders enter the registry.
from . import arrays, garments, photos, pixels, portraits, strokes  # noqa: F401
from .registry import REGISTRY, DataError, ImageSet, Request, checked, kind_of, numbered, parts

__all__ = ["REGISTRY", "DataError", "ImageSet", "kind_of", "load", "describe", "digests", "same_images",
           "enlarged", "class_list", "data_root", "names", "numbered", "parts", "resolved", "refuse_seen",
           "is_drawn", "unlimited"]
MOST_CLASSES = 10_000
FURTHER = "photograph"  # the class of all images of B in a mix A+B


def names(role):
    """Names of the sets that may play a role, "public" or "private"."""
    return [key for key, entry in REGISTRY.items() if entry.role in (role, "either")]


def is_drawn(name):
    """Are all images of the set drawn by a program, so that nothing private can be in it? Else False, also
    for what is no name of a set.
    """
    if len(both := parts(name)) == 2:
        return all(map(is_drawn, both))
    return name in REGISTRY and REGISTRY[name].drawn  # an own set "name:PATH" is no key, and never drawn


def unlimited(name):
    """Are the images of the set, or those of A in a mix A+B, drawn? Then there are as many as wanted."""
    return is_drawn(parts(name)[0])


def load(name, split="train", root=None, size=32, n=None, seed=0, channels=3, cache=None, decode=True,
         **request):
    """Read (or draw) an image set.

    name      a key of REGISTRY; "folder:PATH" and "npz:PATH" for own images, PATH also relative to the data
              root; "A+B" for a mix of two public sets, see `mix`
    split     "train" or "test"; sets of the role "public" have no split, every call gives the whole set
    root      data root as str or Path; None: DPLDM_DATA, else ~/.cache/dpldm
    size      side of the returned images in pixels; grey arrays are padded with background on all sides,
              colour arrays resized; photographs are cut to the central square (CelebA: 178 x 178) and resized
    n         number of images; a seeded subset in the set's order, or how many to draw (default 60,000)
    seed      rules the drawing and the subset; never the private stage
    channels  1: colour images and photographs become grey; 3: photographs become RGB, grey arrays stay grey
    cache     folder of decoded photographs; None: "cache" in the data root if that may be written to
    decode    False: photographs are only listed (the files of a folder are read for their checksums), images
              is an empty shape on the meta device; nothing is downloaded
    request   further fields of `registry.Request`; None stands for its default
    Returns ImageSet. Raises DataError, a ValueError, if a file is missing or damaged or a side is empty, and
    ValueError for all else.
    """
    entry = REGISTRY[kind_of(name)]
    if split not in ("train", "test"):
        raise ValueError(f"split must be 'train' or 'test', not {split!r}")
    if len(parts(name)) == 2:
        return mix(name, n, request, split=split, root=root, size=size, seed=seed, channels=channels,
                   cache=cache, decode=decode)
    if request.get("public_classes") is not None and entry.name != "strokes":
        raise ValueError(f"public_classes only applies to strokes, not to {name!r}")
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    if channels not in (1, 3):
        raise ValueError(f"channels must be 1 or 3, not {channels}")
    root, classes = data_root(root), request.get("classes")
    given = {key: value for key, value in {**request, "n": n}.items() if value is not None}
    ask = Request(entry.name, root, split, name.partition(":")[2], seed=seed, size=size, download=decode,
                  **given)
    whole = checked(entry.load(ask), entry, n if entry.drawn else None)
    refuse_others(name, whole.classes, classes)
    part = whole if entry.drawn else subset(whole, n, seed, f"{name} {split}")
    try:
        images, side = prepared(part.images, size, channels, cache, root, decode)
    except ValueError as error:
        if entry.name == "folder" and split == "train":  # what else is wrong is said now, not after the run
            try:
                load(name, "test", root, size, channels=channels, cache=cache, **request)
            except DataError:
                pass  # nothing is held out
            except ValueError as held_out:
                raise ValueError(f"{error}; and held out: {held_out}") from None
        raise
    listed = isinstance(part.images, list)
    if decode and not entry.drawn and (blank := pixels.one_colour(images if listed else part.images)):
        where = part.images[blank[0]] if listed else f"{name}, image {blank[0]} of {split}"
        print(f"warning: of one colour, and perhaps not read as it should be: {where}", file=sys.stderr)
    return replace(part, name=name, images=images, side=side)


def refuse_others(name, classes, declared):
    """ValueError if other classes were declared (--classes) than the set `name` has; None: none were."""
    if declared and list(declared) != list(classes):
        raise ValueError(f"{name} has the classes {', '.join(classes)}; others were asked for, leave out "
                         "--classes")


def mix(name, n, request, **common):
    """A mix "A+B": n images of A (None: all), then at most half as many of B as one further class.

    `request` is about A. If A has attributes, the captions of its images are sentences about them. The mix
    has no attributes, because those of B's images are unknown. B's own captions are not used.
    """
    a, b = parts(name)
    first = load(a, n=n, **request, **common)
    other = load(b, n=max(1, len(first) // 2) if is_drawn(b) else None, **common)
    other = subset(other, min(len(first) // 2, len(other)), common["seed"], b)
    if first.images.shape[1] != other.images.shape[1]:
        raise ValueError(f"{name}: one has {first.images.shape[1]} colour channels, the other "
                         f"{other.images.shape[1]}")
    sentences, generator = first.captions, torch.Generator().manual_seed(common["seed"])
    if first.attributes:
        columns = {key: value.tolist() for key, value in first.attributes.items()}
        people = (dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True))
        sentences = [captions.caption(person, generator) for person in people]
    further = torch.full((len(other),), len(first.classes))
    images = first.images.to(other.images.device)  # "meta" where photographs are only listed
    return ImageSet(torch.cat([images, other.images]), torch.cat([first.labels, further]),
                    [*first.classes, FURTHER], sentences and sentences + [f"a {FURTHER}"] * len(other),
                    side=first.side, name=name)


def prepared(images, size, channels, cache, root, decode):
    """Images as a loader found them -> (tensor (N,C,size,size) uint8, side before padding)."""
    if isinstance(images, list):  # of photographs
        if not decode:
            return torch.empty(len(images), channels, size, size, dtype=torch.uint8, device="meta"), size
        cache = cache or cache_folder(root)
        if cache is None and len(images) >= photos.CACHE_FROM:
            print(f"note: there is no folder {root} that may be written to, so decoded images are not kept; "
                  "--cache FOLDER keeps them", file=sys.stderr)
        return photos.decode(images, size, channels, cache), size
    if images.shape[1] == 1:
        return pixels.pad(images, size), images.shape[-1]
    images = pixels.resize(images, size)
    if channels == 1:
        from torchvision.transforms.functional import rgb_to_grayscale
        images = rgb_to_grayscale(images)
    return images, size


def describe(name, root=None, size=32, channels=3, label_attribute="Male", classes=None):
    """An ImageSet without images: names of classes and attributes, channels, side. No image is read.

    It asks as for a private set: DataError if an own set's list of classes is not declared, ValueError if its
    images do not fit the size.
    """
    entry, root = REGISTRY[kind_of(name)], data_root(root)
    if entry.facts:
        ask = Request(entry.name, root, where=str(name).partition(":")[2], classes=classes, private=True,
                      label_attribute=label_attribute, download=False)
        entry = replace(entry, **entry.facts(ask))
    if entry.classes:
        refuse_others(name, entry.classes, classes)
    colour = entry.channels == 3
    images = torch.empty(0, channels if colour else 1, size, size, dtype=torch.uint8)
    if not colour:  # what `load` would refuse
        pixels.pad(torch.empty(1, 1, entry.side, entry.side, device="meta"), size)
    attributes = entry.attributes and dict.fromkeys(entry.attributes, torch.zeros(0).bool())
    return ImageSet(images, torch.zeros(0, dtype=torch.int64), list(entry.classes), None, attributes,
                    size if colour else entry.side, name)


def enlarged(name, size):
    """What to say where a known set's images are smaller than the networks see them, else ""."""
    entry = REGISTRY[kind_of(name)]
    if len(both := parts(name)) == 2:
        return "; ".join(filter(None, (enlarged(part, size) for part in both if part in REGISTRY)))
    small = entry.channels == 3 and 0 < entry.side < size
    return f"{entry.name}'s images of {entry.side} pixels, enlarged to {size}" if small else ""


# ---- the same images twice? --------------------------------------------------------------------------------


def same_images(a, b, root=None):
    """Do two names of sets, as in --public and --private, mean the same images, wholly or in part?

    Judged by names and by where the sets lie, a folder within another included; no image is read. Copies
    elsewhere are found by their digests.
    """
    pairs = [(one, two) for one in parts(a) for two in parts(b)]
    if len(pairs) > 1:
        return any(same_images(one, two, root) for one, two in pairs)
    first, second = place(a, root), place(b, root)
    if first and second and (first == second or first in second.parents or second in first.parents):
        return True
    # An own set may be a known set's file: npz:ROOT/public32.npz.
    known = {place(name, root): name for name, entry in REGISTRY.items() if not (entry.own or entry.drawn)}
    known.pop(None, None)  # those without a place
    both = {known.get(first, a), known.get(second, b)}
    return len(both) == 1 or any(entry.name in both and both.intersection(entry.overlaps)
                                 for entry in REGISTRY.values())


def place(name, root):
    """The file or folder with a set's images, links resolved; None for drawn sets and names without one."""
    kind, _, where = str(name).partition(":")
    root = data_root(root)
    entry = REGISTRY.get(kind)
    if entry is None or entry.drawn or entry.own and not where:
        return None
    if entry.own:
        found = arrays.there(files.expanded(where), root / where)
    elif kind in ("celeba", "faces"):
        found = photos.celeba_list(root, kind).parent / "img_align_celeba"
    elif kind == "mnist10k":
        found = arrays.EMBEDDED
    elif entry.files:
        found = root / entry.files
    else:  # made by a loader of one's own, which has no place
        return None
    return found.resolve()


def resolved(name, root=None):
    """An own set's name, also as B of a mix, with its whole path, for a run resumed from another folder."""
    if len(both := parts(name)) == 2:
        return "+".join(resolved(part, root) for part in both)
    kind, _, where = str(name).partition(":")
    return f"{kind}:{place(name, root)}" if where and kind in REGISTRY and REGISTRY[kind].own else name


def refuse_seen(trained, held_out, title):
    """ValueError if held-out images were trained on.

    trained, held_out: (M,) int64 of `digests`. title: what the message begins with.
    """
    if shared := int(torch.isin(trained, held_out).sum()):
        raise ValueError(f"{title}: {shared} of the images that would be held out are among those trained "
                         "on, so nothing may be called held out; train again, or evaluate on other images")


def digests(images):
    """Images (N,C,H,W) uint8, as the networks see them -> (M,) int64, M different ones, sorted.

    The digest of an image is 8 bytes of BLAKE2b.

    They travel with the public checkpoints: a private set that holds one of the public images is refused,
    whatever its name and place. An image compressed or resized in another way has another digest.
    """
    found = {hashlib.blake2b(image, digest_size=8).digest() for image in images.contiguous().numpy()}
    numbers = [int.from_bytes(digest, "little", signed=True) for digest in found]
    return torch.tensor(numbers, dtype=torch.int64).sort().values


# ---- parts of a set, places --------------------------------------------------------------------------------


def class_list(text):
    """--classes: "a,b,c" -> ["a", "b", "c"]; a number N -> ["0", ..., str(N - 1)]. ValueError for others."""
    names = [unicodedata.normalize("NFC", name.strip()) for name in text.split(",")]
    if len(names) == 1 and names[0].isdecimal():
        count = int(names[0].lstrip("0")[:6] or 0)  # of a number with thousands of digits the first will do
        names = [str(i) for i in range(min(count, MOST_CLASSES + 1))]  # one too many is refused below
    if not names or "" in names or len(set(names)) < len(names) or len(names) > MOST_CLASSES:
        raise ValueError(f"--classes must be distinct names with commas, or a number in 1 to {MOST_CLASSES}")
    return names


def subset(whole, n, seed, title):
    """n images of a set, chosen at random by the seed, in the set's order; None: all."""
    if n is None:
        return whole
    if n > len(whole):
        raise ValueError(f"{title} has {len(whole)} images, fewer than the {n} asked for")
    chosen = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))[:n].sort().values
    return whole[chosen.tolist()]


def data_root(root=None):
    """The folder of the full sets: the argument, else $DPLDM_DATA, else ~/.cache/dpldm, else dpldm-data."""
    if said := root or os.environ.get("DPLDM_DATA"):
        return files.expanded(said)
    place = files.expanded("~/.cache/dpldm")
    return Path("dpldm-data") if str(place).startswith("~") else place  # there is no home directory


def cache_folder(root):
    """ROOT/cache if it may be written to, else None: data roots are often shared and read-only."""
    # os.access says yes to the superuser whatever the mode, so look at the mode as well.
    allowed = root.is_dir() and os.access(root, os.W_OK) and root.stat().st_mode & 0o222
    return root / "cache" if allowed else None
