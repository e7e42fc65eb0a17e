"""Which release is scored, on which real images, where its scores may stand; NPZs of samples."""
from pathlib import Path

import numpy as np
import torch

import datasets
from datasets import arrays, pixels
from support import files

LARGEST = 64  # pixels; larger images are judged at this size


def find_run(path):
    """(the folder around a release, whether it is a run folder: one with internal/ or public/ beside it)."""
    run = Path(path).resolve()
    run = run.parent if run.is_file() else run
    if run.name == "release" and not (run / "release").is_dir():  # a run folder may be called release
        run = run.parent
    return run, (run / "release").is_dir() and any((run / part).is_dir() for part in ("internal", "public"))


def check_place(args, run, is_folder):
    """Epsilon does not cover scores: ValueError where they would be written beside a release.

    is_folder: run is a run folder, so that they have a place in its internal/.
    """
    if args.memorisation and args.out:
        raise ValueError("--memorisation writes into RUN/internal/ only: leave out --out")
    if not is_folder and args.memorisation:
        raise ValueError(f"--memorisation writes private images into a run folder's internal/, and {run} "
                         "is none (no internal/ or public/ beside release/)")
    if not is_folder and not args.out:
        raise ValueError(f"{run} is no run folder (no internal/ or public/ beside release/), and epsilon "
                         "does not cover scores: say where they go with --out FILE")
    if args.out and any((place / name).exists() for place in Path(args.out).resolve().parents
                        for name in ("model.pt", "privacy.json", "vae.pt", "ldm.pt")):
        raise ValueError(f"--out {args.out}: that is within a release or beside public networks, and epsilon "
                         "does not cover scores; choose another")


def settings_of(run):
    """The settings in a run folder, a dict; {} if there are none, as beside a release that was copied."""
    path = run / "internal" / "settings.json"
    return files.read_json(path) if path.exists() else {}


def sources(release, run):
    """[name of the public set, name of the private set], for datasets.load.

    A release never says where own images lie, so for those the settings in the run folder are read.
    ValueError if the private set is one's own and there are none.
    """
    names = [release.data.get(role) for role in ("public", "private")]
    settings = settings_of(run)
    if not all(isinstance(name, str) for name in names):
        raise ValueError("this release does not say which data sets it was made from")
    if unknown := [part for name in names for part in datasets.parts(name) if part not in datasets.REGISTRY]:
        raise ValueError(f"this release names the data set {unknown[0]!r}, which this program does not have")
    if datasets.REGISTRY[names[1]].own and not settings:
        raise ValueError(f"{run}: a release does not say where own images lie, the run folder's "
                         "internal/settings.json does; evaluate that folder")
    if any(datasets.REGISTRY[name].own for name in names) and settings:
        names = [settings["public"], settings["private"]]
    return names  # the public one may lack its place: then there is no feature network


def cache_of(run):
    """Where the run kept decoded photographs, which may be private: --cache, or that of its --data-root.

    None if it had neither. Older versions stored a relative one as it was typed: nobody knows where that was.
    """
    cache, root = (settings_of(run).get(key) for key in ("cache", "data_root"))
    if cache and Path(cache).is_absolute():
        return cache
    return datasets.cache_folder(Path(root)) if root and Path(root).is_absolute() else None


def private_n(release, run):
    """How many private images the run used; None: all. A release without its run folder says it too."""
    settings = settings_of(run)
    return settings["private_n"] if "private_n" in settings else release.privacy.get("n") or None


def private_digests(run):
    """Digests of the images that a run trained on, from its records; None without a run or records."""
    path = None if run is None else run / "internal" / "digests.pt"
    return files.load(path)["digests"] if path and path.exists() else None


def check_held_out(run, release, private, root=None):
    """ValueError if a set of one's own, or a drawn one, holds out images that this run trained on.

    What the run trained on is in its own records. A loader that draws images may forget `Request.split`.
    """
    entry = datasets.REGISTRY[datasets.kind_of(private)]
    if not (entry.own or entry.drawn) or not release.privacy.get("steps"):
        return
    if (trained := private_digests(run)) is None:
        raise ValueError(f"{run}: this run has no digests.pt, so nobody knows which images it trained on "
                         "and which were held out; train again, or evaluate on images of their own")
    config = release.vae.config
    held = datasets.load(private, "test", root, config.resolution, channels=config.in_channels,
                         classes=release.classes if entry.own else None, cache=cache_of(run),
                         label_attribute=release.data.get("label_attribute"))
    datasets.refuse_seen(trained, datasets.digests(held.images), private)


def shrink(images):
    """Images (N,C,S,S) at the size at which they are judged."""
    return pixels.resize(images, min(LARGEST, images.shape[-1]))


def held_out_sets(release, private, root=None, cache=None):
    """{name: ImageSet} of real images that no stage has seen, in the size of the samples.

    First the test split of the private set, then the official MNIST test digits if the data root has them.
    cache: as of `load_private`. ValueError if they do not fit the release.
    """
    real = load_private(release, private, "test", root, cache=cache)
    sets = {f"{len(real):,} held out of {datasets.kind_of(private)}": real}
    if private == "mnist10k":
        raw = datasets.data_root(root) / "MNIST" / "raw"
        if arrays.find([raw], "t10k"):  # no download just to evaluate
            official = datasets.load("mnist", "test", root, release.crop)
            sets[f"{len(official):,} MNIST test digits"] = official
        else:
            print(f"official MNIST test digits skipped: not in {raw} (see --data-root)")
    if real.images.shape[1] != release.vae.config.out_ch or list(real.classes) != list(release.classes):
        raise ValueError(f"{private} has other classes or channels than this release "
                         f"({', '.join(release.classes)})")
    return sets


def load_private(release, private, split, root=None, n=None, cache=None):
    """The private set as the release's samples look: their size (at most LARGEST), channels and classes.

    cache: the run's folder of decoded photographs (`cache_of`).
    """
    channels = release.vae.config.out_ch
    size = release.crop if channels == 1 else min(release.crop, LARGEST)
    classes = release.classes if datasets.REGISTRY[datasets.kind_of(private)].own else None
    real = datasets.load(private, split, root, size, n=n, channels=channels, classes=classes, cache=cache,
                         label_attribute=release.data.get("label_attribute"))
    real.images = shrink(real.images)
    return real


def public_images(release, public, n, seed=0, root=None, cache=None):
    """Up to n PUBLIC images of the private classes, as samples look: (n,C,S,S) uint8, labels (n,).

    A public class counts if it has the name of a private one. Drawn ones are drawn with the seed, in the
    style of the run's. ValueError if no class has such a name.
    """
    config, first = release.vae.config, datasets.parts(public)[0]  # the other part of a mix is a class apart
    asked = {"label_attribute": release.data.get("label_attribute")}
    if first == "strokes":
        asked["public_classes"] = release.data.get("public_classes")

    def load(n):
        return datasets.load(first, "train", root, config.resolution, n=n, seed=seed,
                             channels=config.in_channels, cache=cache, **asked)

    drawn = datasets.is_drawn(first)
    whole = load(1 if drawn else None)  # one drawing tells the classes
    shared = [name for name in whole.classes if name in release.classes]
    if not shared:
        raise ValueError(f"--public: no class of {public} has the name of a private one "
                         f"({', '.join(release.classes)[:200]})")
    if drawn:  # classes are about equally frequent, so this is enough
        whole = load((n // len(shared) + 1) * len(whole.classes))
    rows = torch.tensor([release.classes.index(name) if name in shared else -1 for name in whole.classes])
    labels = rows[whole.labels]
    chosen = (labels >= 0).nonzero()[:, 0]
    if not drawn:  # a folder is sorted by class
        generator = torch.Generator().manual_seed(seed)
        chosen = chosen[torch.randperm(len(chosen), generator=generator)]
    chosen = chosen[:n]
    return shrink(pixels.crop(whole.images[chosen], release.crop)), labels[chosen]


def write_samples(path, release, images, asked):
    """Images (N, C, H, W) uint8 and what was asked for, N labels or prompts -> an NPZ for others to use.

    images: (N, H, W, C), or (N, H, W) if grey; prompts or labels: (N,), neither of an unconditional model.
    """
    found = {"images": (images[:, 0] if images.shape[1] == 1 else images.permute(0, 2, 3, 1)).numpy()}
    if isinstance(asked[0], str):
        found["prompts"] = np.array(asked)
    elif release.model.embedder is not None:
        found["labels"] = np.array(asked, dtype=np.min_scalar_type(len(release.classes)))
    with files.replacing(path) as file:
        np.savez_compressed(file, **found)


def read_samples(path, release, n=None):
    """The first n images (None: all) of an NPZ of sample.py -> uint8 (n,C,crop,crop), labels (n,)."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"--samples: no file {path}; write one: python sample.py RUN --npz {path}")
    keys = ("images", "labels") if release.model.embedder else ("images",)
    found = arrays.read_npz(path, keys, "; samples of --prompt have no labels, and cannot be scored by class")
    # Samples of an unconditional model have no labels.
    labels = found.get("labels", np.zeros(len(found["images"]), np.uint8))
    images, labels = arrays.check(found["images"], labels, path, 0, len(release.classes) - 1)
    shape, wanted = (release.vae.config.out_ch, release.crop, release.crop), n or 1
    if images.shape[1:] != shape or len(images) < wanted:
        raise ValueError(f"{path} has {len(images)} images of {tuple(images.shape[1:])}, needed: {wanted} of "
                         f"{shape}")
    return images[:n], labels[:n]
