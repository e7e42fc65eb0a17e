"""How good are the samples? Downstream accuracy, Frechet distance, precision and recall.

The evaluation of DP-LDM (Liu et al. 2024, experiments: train a classifier on generated pictures only, test it on real
ones), with classifiers as in DPDM (Dockhorn et al. 2023). Two protocols, whose name belongs to every figure:

    quick   10,000 samples, 30 DDIM steps, eta 0; small CNN, 12 epochs, shifts <= 2 pixels and rotations <= 10 degrees
    table   50,000 samples, 200 DDIM steps, eta 1; the authors' networks, 50 epochs of batch 128, Adam 3e-4

The LAST epoch counts: no held-out picture reaches the training loop, so none can choose an epoch (pitfall 15; the
authors' script reports the epoch that does best on a validation set). Deviation: MNIST stays at 28 pixels as in DPDM,
the authors enlarge it to 32. Pictures of more than 64 pixels are judged at 64, generated and real alike.

    python evaluate.py runs/digits                       table here, JSON in runs/digits/internal/evaluation.json
    python evaluate.py release --out scores.json         a release without its run folder
    python evaluate.py runs/digits --protocol table --data-root DIR
    python evaluate.py runs/digits --samples synthetic.npz --classifiers cnn
    python evaluate.py runs/digits --memorisation        are samples nearer to private pictures than to held-out ones?

Scores on real held-out pictures are NOT covered by epsilon, hence internal/: publish them only where those pictures are
public anyway, as MNIST's are. The Frechet distance is no "FID": its features come from a small CNN trained on PUBLIC
pictures, not from Inception; it compares runs of this project with one another and with nothing else.
"""
import hashlib
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import datasets
import sample
from datasets import arrays, pixels
from support import files, hardware, run_folder

# ------------------------------------------------------------------------------------------------------- classifiers


def network(kind, channels, size, classes):
    """An untrained classifier of (N, channels, size, size) in -1..1; the last layer is linear: `features` relies on it.

    small-cnn: 0.43 M parameters, fast on a CPU, 98 % after training on 8,000 real digits. The others are those of
    the authors' and DPDM's accuracy scripts: paper-cnn (from 18 pixels), mlp (100 hidden units), logreg on pixels.
    """
    side = size // 4 if kind == "small-cnn" else ((size - 2) // 2 - 2) // 2 - 2
    if kind == "small-cnn":
        return nn.Sequential(
            nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Dropout(0.3),
            nn.Linear(64 * side ** 2, 128), nn.ReLU(), nn.Linear(128, classes))
    if kind == "paper-cnn" and side > 0:
        return nn.Sequential(
            nn.Conv2d(channels, 32, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(32, 64, 3), nn.MaxPool2d(2), nn.ReLU(), nn.Dropout(0.5),
            nn.Conv2d(64, 128, 3), nn.ReLU(), nn.Flatten(),
            nn.Linear(128 * side ** 2, 128), nn.ReLU(), nn.Dropout(0.5), nn.Linear(128, classes))
    if kind == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size ** 2, 100), nn.ReLU(), nn.Linear(100, classes))
    if kind == "logreg":
        return nn.Sequential(nn.Flatten(), nn.Linear(channels * size ** 2, classes))
    raise ValueError(f"no classifier {kind!r} for pictures of {size} pixels: use small-cnn, paper-cnn, mlp, logreg")


STRONG = {"kind": "small-cnn", "epochs": 12, "lr": 2e-3, "anneal": True, "augment": True, "smoothing": 0.1}
SIMPLE = {"epochs": 20, "lr": 1e-3, "anneal": True}
PAPER = {"epochs": 50, "lr": 3e-4}
PROTOCOLS = {  # sampler, and for each classifier the arguments of train_classifier
    "quick": {"n": 10_000, "steps": 30, "eta": 0.0, "recipes": {
        "cnn": STRONG, "mlp": {"kind": "mlp", **SIMPLE}, "logreg": {"kind": "logreg", **SIMPLE}}},
    "table": {"n": 50_000, "steps": 200, "eta": 1.0, "recipes": {
        "cnn": {"kind": "paper-cnn", **PAPER}, "mlp": {"kind": "mlp", **PAPER}, "logreg": {"kind": "logreg", **PAPER}}},
}
FEATURES = {**STRONG, "epochs": 4}  # the feature network is the same in both protocols, so that runs compare
FEATURE_PICTURES = 12_000
NEIGHBOURS, MANIFOLD = 3, 2_000  # precision and recall: k, and at most so many pictures of each kind
LARGEST = 64  # pixels; larger pictures are judged at this size


def train_classifier(kind, images, labels, num_classes, epochs, lr, batch=128, anneal=False, augment=False,
                     smoothing=0.0, generator=None, device="cpu", progress=True, bf16=False):
    """Train on the given pictures and nothing else; the network after the LAST step is returned, in eval mode.

    kind: see `network`. images (N,C,S,S) uint8, labels (N,) int64. Adam at rate lr, with anneal falling to 0 as a
    cosine; augment: random shifts and rotations; smoothing: of labels. generator (CPU) rules weights, order, dropout
    and augmentation; torch's global state stays as it was. bf16: forward and backward pass in
    bfloat16. Raises ValueError if kind, images or labels do not fit.
    """
    if not len(images) == len(labels) > 0 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"a classifier needs pictures, each with one label in 0..{num_classes - 1}")
    seed = int(torch.randint(2 ** 62, (), generator=generator))
    with torch.random.fork_rng([torch.device(device)] if "cuda" in str(device) else []):
        torch.manual_seed(seed)
        model = network(kind, images.shape[1], images.shape[-1], num_classes)
        model.to(device).to(memory_format=torch.channels_last)  # about 1.4 times as fast on a CPU
        optimizer = torch.optim.Adam(model.parameters(), lr)
        steps = epochs * math.ceil(len(images) / batch)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps) if anneal else None
        with tqdm(total=steps, desc=f"training {kind}", unit="step", disable=not progress) as bar:
            for _ in range(epochs):
                for chosen in torch.randperm(len(images)).split(batch):
                    x = pixels.to_float(images[chosen].to(device))  # (B,C,S,S) in -1..1
                    x = (jiggle(x) if augment else x).contiguous(memory_format=torch.channels_last)
                    with torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
                        loss = F.cross_entropy(model(x), labels[chosen].to(device), label_smoothing=smoothing)
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    if schedule:
                        schedule.step()
                    bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return model.eval()


def jiggle(x, shift=2.0, degrees=10.0):
    """Each picture (N,C,S,S) shifted by up to `shift` pixels both ways and rotated by up to `degrees`, bilinear."""
    angle = (2 * torch.rand(len(x), device=x.device) - 1) * math.radians(degrees)
    move = (2 * torch.rand(len(x), 2, 1, device=x.device) - 1) * shift * 2 / x.shape[-1]  # on a grid of width 2
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn, move], dim=2), x.shape, align_corners=False)  # (N,S,S,2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def predict(model, images):
    """uint8 (N,C,S,S) -> the model's output (N,D), on the CPU, in batches."""
    device = next(model.parameters(), images).device  # a model without parameters hands the pixels on
    return torch.cat([model(pixels.to_float(part.to(device))).cpu() for part in images.split(500)])


def accuracy(model, images, labels):
    """Share, 0..1, of pictures (N,C,S,S) uint8 whose most likely class is their label (N,)."""
    return (predict(model, images).argmax(1) == labels).double().mean().item()


# ----------------------------------------------------------------------------------------------- distances in features


def features(model, images):
    """The input of the last linear layer: uint8 (N,C,S,S) -> (N,D) float64."""
    return predict(model[:-1], images).double()


def symmetric_root(matrix):
    """Square root of a positive semi-definite (D,D); eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return vectors * values.clamp(min=0).sqrt() @ vectors.T


def frechet(a, b):
    """Squared Frechet distance of the Gaussians fitted to a (N,D) and b (M,D): Heusel et al. 2017, Eq. 6.

    |mu_a - mu_b|^2 + tr A + tr B - 2 tr (AB)^(1/2); the last trace is the sum of the singular values of
    A^(1/2) B^(1/2), exact also for singular covariances (fewer pictures than features), where a general matrix root
    fails. Biased upwards for small N and M: compare at equal sizes. Raises ValueError under two rows or for unequal D.
    """
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet: needs 2 rows or more and equal widths, got {tuple(a.shape)} and {tuple(b.shape)}")
    mean_a, mean_b = a.double().mean(0), b.double().mean(0)
    cov_a, cov_b = (x.double().T.cov().view(x.shape[1], -1) for x in (a, b))  # view: with D = 1, cov gives a scalar
    overlap = torch.linalg.svdvals(symmetric_root(cov_a) @ symmetric_root(cov_b)).sum()
    return ((mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap).clamp(min=0).item()


def covered(points, centres, k=NEIGHBOURS):
    """Share of points (N,D) that lie in the ball of some centre (M,D), out to its k-th nearest other centre.

    Kynkaanniemi et al. 2019, Eqs. 1 and 2: precision = covered(generated, real), recall = covered(real, generated).
    """
    if len(centres) <= k:
        raise ValueError(f"precision and recall need more than {k} pictures of each kind, got {len(centres)}")
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}  # |x|^2 - 2xy + |y|^2 would cancel for near neighbours
    radius = torch.cdist(centres, centres, **exact).kthvalue(k + 1, dim=1).values  # + 1: each is its own nearest
    return (torch.cdist(points, centres, **exact) <= radius).any(dim=1).double().mean().item()


def public_features(public_folder, public, channels, size, root=None, device="cpu", progress=True):
    """The feature network, a small CNN trained on the PUBLIC set `public` and kept as features.pt: (model, name).

    A file that is missing, damaged or made with other settings is replaced; with public_folder None there is none and
    the network is not kept. "strokes" means all its 36 classes whatever the run used, so that runs with other
    --public-classes are measured alike; it stands in for omniglot, which has no labels. Raises datasets.DataError if the
    public set is needed and absent, or has no classes to tell apart.
    """
    public = "strokes" if public == "omniglot" else public
    kind = datasets.kind_of(public)
    path = Path(public_folder or "") / "features.pt"
    settings = [kind, channels, size, FEATURE_PICTURES, FEATURES]
    try:
        if public_folder is None:
            raise ValueError("there is no run folder")
        saved = files.load(path)
        if saved["settings"] != settings:
            raise ValueError("made with other settings")
        model = network(FEATURES["kind"], channels, size, saved["classes"])
        model.load_state_dict(saved["state"])
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        n = FEATURE_PICTURES if datasets.REGISTRY[kind].drawn else None
        pictures = datasets.load(public, "train", root, size, n=n, channels=channels)
        if len(pictures.classes) < 2:
            raise datasets.DataError(f"the public set {kind} has one class only, a feature network needs two") from None
        generator, classes = torch.Generator().manual_seed(0), len(pictures.classes)
        chosen = torch.randperm(len(pictures), generator=generator)[:FEATURE_PICTURES]
        kept = f"kept in {path}" if public_folder else "not kept, there is no run folder"
        print(f"feature network: a CNN learns {len(chosen):,} pictures of {kind}; {kept}")
        model = train_classifier(images=pictures.images[chosen], labels=pictures.labels[chosen], num_classes=classes,
                                 generator=generator, device=device, progress=progress, **FEATURES)
        if public_folder:
            files.save({"settings": settings, "classes": classes, "state": model.cpu().state_dict()}, path)
    weights = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    digest = hashlib.sha256(weights).hexdigest()
    return model.to(device).eval(), f"CNN trained on {kind} ({model[-1].out_features} classes, weights {digest[:8]})"


def compare(model, samples, real, seed=0):
    """Frechet distance, the same between two halves of the real pictures, precision and recall: a dict."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (features(model, x[torch.randperm(len(x), generator=generator)]) for x in (samples, real))
    half, few_a, few_b = len(b) // 2, a[:MANIFOLD], b[:MANIFOLD]
    return {"frechet": frechet(a, b), "n": [len(a), len(b)], "halves": frechet(b[:half], b[half:]), "halves_n": half,
            "precision": covered(few_a, few_b), "recall": covered(few_b, few_a), "k": NEIGHBOURS,
            "manifold_n": [len(few_a), len(few_b)]}


def nearest(a, b, k=1):
    """The k nearest rows of b (M,D) to each row of a (N,D): distances and indices, each (N,k), nearest first."""
    found = [torch.cdist(part, b).topk(min(k, len(b)), largest=False) for part in a.split(256)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def memorised(samples, train, held_out, seed=0):
    """Are samples nearer to private training pictures than to held-out ones? Features (N,D), (M,D), (L,D) -> dict.

    closer_to_training is the share of samples whose nearest neighbour among min(M, L) training pictures, chosen at
    random, is nearer than that among as many held-out ones: about 1/2 without memorisation, 1 for copies. The quantiles
    are of the distances to the nearest of these.
    """
    generator, count = torch.Generator().manual_seed(seed), min(len(train), len(held_out))
    distances = {name: nearest(samples, x[torch.randperm(len(x), generator=generator)[:count]])[0][:, 0]
                 for name, x in (("training", train), ("held_out", held_out))}
    closer = (distances["training"] < distances["held_out"]).double() + 0.5 * (distances["training"] == distances["held_out"])
    share = closer.mean().item()
    points = torch.tensor([0.0, 0.01, 0.5], dtype=samples.dtype)
    return {"closer_to_training": share, "standard_error": math.sqrt(share * (1 - share) / len(samples)), "n": len(samples),
            "of_each": count, **{f"distance_to_{k}_min_1%_median": v.quantile(points).tolist() for k, v in distances.items()}}


# ---------------------------------------------------------------------------------------------------------- a release


def find_run(path):
    """The folder around a release, and is it a run folder, with internal/ or public/ beside release/?"""
    run = Path(path).resolve()
    run = run.parent if run.is_file() else run
    run = run.parent if run.name == "release" else run
    return run, (run / "release").is_dir() and any((run / part).is_dir() for part in ("internal", "public"))


def check_place(args, run, whole):
    """Epsilon does not cover scores: ValueError where they would be written beside a release.

    whole: run is a run folder, so that they have a place in its internal/.
    """
    if args.memorisation and args.out:
        raise ValueError("--memorisation writes into RUN/internal/ only: leave out --out")
    if not whole and args.memorisation:
        raise ValueError(f"--memorisation writes private pictures into a run folder's internal/, and {run} "
                         "is none (no internal/ or public/ beside release/)")
    if not whole and not args.out:
        raise ValueError(f"{run} is no run folder (no internal/ or public/ beside release/), and epsilon "
                         "does not cover scores: say where they go with --out FILE")
    place = Path(args.out or run).resolve().parent
    if args.out and ((place / "model.pt").exists() or (place / "privacy.json").exists()):
        raise ValueError(f"--out {args.out}: that folder is a release, and epsilon does not cover scores; "
                         "choose another")


def sources(release, run):
    """Names of the public and the private set, for datasets.load. A release never says where own pictures lie: for those
    the run folder's settings are asked. Raises ValueError if there are none.
    """
    names = [release.data["public"], release.data["private"]]
    if any(datasets.REGISTRY[name].own for name in names):
        settings = files.read_json(run / "internal" / "settings.json")
        names = [settings["public"], settings["private"]]
    return names


def shrink(images):
    return pixels.resize(images, min(LARGEST, images.shape[-1]))


def held_out_sets(release, root=None, private=None):
    """{name: ImageSet} of real pictures no stage has seen, sized as the samples: the private set's test split, then
    the official MNIST test digits if the data root has them. Raises ValueError if they do not fit the release.
    """
    private, split = private or release.data["private"], release.data.get("private_split", "train")
    if split != "train":
        raise ValueError(f"nothing is held out: this release was trained on split {split!r} of {private}, not 'train'")
    real = load_private(release, private, "test", root)
    sets = {f"{len(real):,} held out of {datasets.kind_of(private)}": real}
    if private == "mnist10k":
        raw = datasets.data_root(root) / "MNIST" / "raw"
        if arrays.find([raw], "t10k"):  # no download just to evaluate
            official = datasets.load("mnist", "test", root, release.crop)
            sets[f"{len(official):,} MNIST test digits"] = official
        else:
            print(f"official MNIST test digits skipped: not in {raw} (see --data-root)")
    if real.images.shape[1] != release.vae.config.out_ch or list(real.classes) != list(release.classes):
        raise ValueError(f"{private} has other classes or channels than this release ({', '.join(release.classes)})")
    return sets


def load_private(release, private, split, root=None, n=None):
    """The private set as the release's samples look: their size (at most LARGEST), channels and classes."""
    channels, size = release.vae.config.out_ch, release.crop if release.vae.config.out_ch == 1 else min(release.crop, LARGEST)
    classes = release.classes if datasets.REGISTRY[datasets.kind_of(private)].own else None
    real = datasets.load(private, split, root, size, n=n, channels=channels, classes=classes,
                     label_attribute=release.data.get("label_attribute"))
    real.images = shrink(real.images)
    return real


def read_samples(path, release, n=None):
    """The first n (default: all) pictures of an NPZ as sample.py writes it -> uint8 (n,C,crop,crop), labels (n,)."""
    if not Path(path).is_file():
        raise ValueError(f"--samples: no file {path}; write one: python sample.py RUN --npz {path}")
    found = arrays.read_npz(path, ("images", "labels") if release.model.embedder else ("images",))
    labels = found.get("labels", np.zeros(len(found["images"]), np.uint8))  # an unconditional model's have none
    images, labels = arrays.check(found["images"], labels, path, 0, len(release.classes) - 1)
    shape, wanted = (release.vae.config.out_ch, release.crop, release.crop), n or 1
    if images.shape[1:] != shape or len(images) < wanted:
        raise ValueError(f"{path} has {len(images)} pictures of {tuple(images.shape[1:])}, needed: {wanted} of {shape}")
    return images[:n], labels[:n]


def table(result):
    """The result as text; each figure with the settings it belongs to (pitfall 22)."""
    sets, d = result["held_out"], result["distance"]
    lines = [f"protocol {result['protocol']}: {result['n']:,} samples, {result['sampler']}", "",
             f"{'trained on samples only, last epoch':36}" + "".join(f"{name:>28}" for name in sets)]
    for word, scores in result["accuracy"].items():
        cells = [f"{100 * p:.2f} +- {100 * math.sqrt(p * (1 - p) / sets[k]):.2f} %" for k, p in scores.items()]
        name = f"{word} ({result['recipes'][word]['kind']}, {result['recipes'][word]['epochs']} epochs)"
        lines.append(f"{name:36}" + "".join(f"{cell:>28}" for cell in cells))  # with the standard error
    if d:
        lines += ["", f"Frechet distance, features of a {d['features']}: {d['frechet']:.2f}",
                  f"  {d['n'][0]:,} samples against {d['split']}, {d['resize']}; "
                  f"real against real, {d['halves_n']:,} each (few read high): {d['halves']:.2f}",
                  f"precision {d['precision']:.3f}, recall {d['recall']:.3f} in the same features, k = {d['k']}, "
                  f"{d['manifold_n'][0]:,} samples and {d['manifold_n'][1]:,} real"]
    return "\n".join([*lines, "", "seconds: " + ", ".join(f"{k} {v:.0f}" for k, v in result["seconds"].items())])


def memorisation(args, release, run, public, private, held_out):
    """--memorisation: samples beside their nearest training and held-out neighbours, PNG and JSON in RUN/internal/.

    The picture shows private pictures. Only for runs on this machine: the settings say which private pictures were used.
    """
    settings, n = files.read_json(run / "internal" / "settings.json"), args.n or 1000
    train = load_private(release, private, "train", args.data_root, settings["private_n"])
    protocol = PROTOCOLS[args.protocol]
    if args.samples:
        samples, _ = read_samples(args.samples, release, args.n)
    else:
        samples = sample.generate(release, sample.uniform_labels(n, len(release.classes)), args.steps or protocol["steps"],
                                  protocol["eta"] if args.eta is None else args.eta, args.guidance or 1.0, args.seed)
    samples = shrink(samples)
    try:
        judge, space = public_features(run / "public", public, samples.shape[1], samples.shape[-1], args.data_root, args.device)
        points = [features(judge, x) for x in (samples, train.images, held_out.images)]
    except datasets.DataError as error:
        print(f"no feature network ({error}): distances of pixels instead")
        space, points = "pixels", [x.flatten(1).double() / 255 for x in (samples, train.images, held_out.images)]
    result = {"note": "about private pictures, not covered by epsilon", "space": space, **memorised(*points, args.seed)}
    closest = nearest(points[0], points[1])[0][:, 0].argsort()[:12]  # the samples most like a training picture
    sides = [x[nearest(points[0][closest], y, 4)[1]] for x, y in ((train.images, points[1]), (held_out.images, points[2]))]
    gap = torch.full_like(samples[closest], 96)[:, None]  # (12,1,C,S,S)
    grid = torch.cat([samples[closest][:, None], gap, sides[0], gap, sides[1]], dim=1)  # (12, 11, C, S, S)
    picture = run / "internal" / "memorisation.png"
    pixels.save_grid(grid.flatten(0, 1), picture, grid.shape[1])
    files.write_json(result, run / "internal" / "memorisation.json")
    figures = [" ".join(f"{d:.3g}" for d in result[f"distance_to_{key}_min_1%_median"]) for key in ("training", "held_out")]
    print(f"{result['closer_to_training']:.1%} +- {result['standard_error']:.1%} of {result['n']:,} samples are closer to a "
          f"training picture than to a held-out one, {result['of_each']:,} of each (1/2: no memorisation)\n"
          f"distance to the nearest, {space}; minimum, 1 %, median: training {figures[0]}, held out {figures[1]}\n"
          f"{picture}: sample | 4 nearest training | 4 nearest held out; shows PRIVATE pictures, never publish it")
    return 0


def main(argv=None):
    parser = run_folder.Parser(description="Score samples of a released DP-LDM model on real held-out pictures.")
    add = parser.add_argument
    add("run", help="run folder, release folder or model.pt")
    add("--protocol", choices=list(PROTOCOLS), default="quick", help="table is the paper's, hours on a CPU [quick]")
    add("--n", type=int, help="samples [10,000 quick, 50,000 table; all of --samples]")
    add("--steps", type=int, help="DDIM steps [30 quick, 200 table]")
    add("--eta", type=float, help="fresh noise per DDIM step, 0..1 [0 quick, 1 table]")
    add("--guidance", type=float, help="classifier-free guidance weight [1 = none]")
    add("--seed", type=int, default=0, help="of sampling and classifiers [0]")
    add("--samples", help="NPZ of sample.py to score instead of sampling")
    add("--classifiers", default="cnn,mlp,logreg", help="which to train, with commas [cnn,mlp,logreg]")
    add("--memorisation", action="store_true", help="only look for private pictures near to samples; picture in internal/")
    add("--no-distance", action="store_true", help="skip Frechet distance, precision and recall")
    add("--data-root", help="folder of the real data sets [$DPLDM_DATA, else ~/.cache/dpldm]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i] [cuda if present]")
    add("--precision", choices=("auto", "float32", "bf16"), default="auto", help="of sampling and classifiers [auto: the faster]")
    add("--out", help="JSON to write [RUN/internal/evaluation.json]")
    args = parser.parse_args(argv)
    protocol, recipes = PROTOCOLS[args.protocol], {}
    for word in args.classifiers.split(","):
        if word.strip() not in protocol["recipes"]:
            raise ValueError(f"--classifiers: {word.strip()!r} is none of {', '.join(protocol['recipes'])}")
        recipes[word.strip()] = protocol["recipes"][word.strip()]
    if args.samples and (args.steps, args.eta, args.guidance) != (None, None, None):
        raise ValueError("--samples takes finished pictures: leave out --steps, --eta and --guidance")
    sample.check_numbers(args, n=(1, 10 ** 7), steps=(1, 100_000), eta=(0, 1), guidance=(-1000, 1000),
                         seed=(0, 2 ** 62))
    hardware.check_device(args.device)
    release = sample.load_release(args.run, args.device, hardware.choose_bf16(args.precision, args.device))
    if release.model.embedder is None:
        recipes = {}  # an unconditional model's samples have no labels to learn from
    if args.n is not None and args.n < len(release.classes):
        raise ValueError(f"--n must be at least {len(release.classes)}, one sample of each class")
    run, whole = find_run(args.run)
    check_place(args, run, whole)
    public, private = sources(release, run)
    real_sets = held_out_sets(release, args.data_root, private)  # before the long work, so that missing data shows at once
    if args.memorisation:
        return memorisation(args, release, run, public, private, next(iter(real_sets.values())))
    print(release.privacy["statement"])

    clock, seconds = time.monotonic(), {}

    def lap(name):
        nonlocal clock
        seconds[name], clock = time.monotonic() - clock, time.monotonic()

    if args.samples:
        images, labels = read_samples(args.samples, release, args.n)
        sampler = f"read from {args.samples}"
    else:
        steps, eta, guidance = (given if given is not None else default for given, default in (
            (args.steps, protocol["steps"]), (args.eta, protocol["eta"]), (args.guidance, 1.0)))
        labels = sample.uniform_labels(args.n or protocol["n"], len(release.classes))  # not the private histogram (16)
        images = sample.generate(release, labels, steps, eta, guidance, args.seed)
        sampler = f"DDIM, {steps} steps, eta {eta:g}, guidance {guidance:g}, seed {args.seed}, uniform labels"
    images = shrink(images)
    lap("sampling")
    scores = {}
    for word, recipe in recipes.items():
        model = train_classifier(images=images, labels=labels, num_classes=len(release.classes), device=args.device,
                                 generator=torch.Generator().manual_seed(args.seed), bf16=release.bf16, **recipe)
        scores[word] = {name: accuracy(model, real.images, real.labels) for name, real in real_sets.items()}
        lap(word)
    distance, (split, real) = None, next(iter(real_sets.items()))
    if not args.no_distance:
        try:
            judge, name = public_features(run / "public" if whole else None, public, images.shape[1],
                                          images.shape[-1], args.data_root, args.device)
            lap("feature network")
            distance = {"features": name, "split": split, "resize": f"{images.shape[-1]} pixels, " + (
                            "not resized" if images.shape[-1] == release.crop else f"resized from {release.crop}"),
                        **compare(judge, images, real.images, args.seed)}
            lap("distance")
        except datasets.DataError as error:  # the public set is not on this machine; the accuracies stand without it
            print(f"Frechet distance skipped: {error}")
    result = {"note": "scores on real held-out pictures, not covered by epsilon", "protocol": args.protocol,
              "privacy": {key: release.privacy.get(key) for key in ("epsilon", "delta", "statement")},
              "n": len(images), "sampler": sampler, "seed": args.seed, "recipes": recipes, "accuracy": scores,
              "held_out": {name: len(real) for name, real in real_sets.items()}, "distance": distance,
              "precision": "bf16" if release.bf16 else "float32", "seconds": seconds}
    out = Path(args.out or run / "internal" / "evaluation.json")
    files.write_json(result, out)
    print(f"\n{table(result)}\n{out}: not covered by epsilon, to be published only if the held-out pictures are public")
    return 0


if __name__ == "__main__":
    run_folder.run_cli(main)
