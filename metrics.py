"""Metrics of generated samples: classifiers that learn from them, Frechet distance, precision and recall.

The evaluation of DP-LDM (Liu et al. 2024, experiments) trains a classifier on generated images only and tests
it on real ones. `evaluate.py` is the program that does so; this file has its metrics and reads no release.

    classifiers    train_classifier, accuracy
    distances      features of a small CNN trained on PUBLIC images; frechet, share_covered, compare

The Frechet distance is no "FID", whose features come from Inception. Only distances in the features of the
same network can be compared.
"""
import hashlib
import math

import torch
import torch.nn.functional as F

import datasets
from datasets import pixels
from support import files, scored
from support.bars import tqdm
from support.classifiers import network

# Arguments of train_classifier. augment: shifts and rotations. anneal: the learning rate falls to 0.
STRONG = {"kind": "small-cnn", "epochs": 12, "lr": 2e-3, "anneal": True, "augment": True, "smoothing": 0.1}
FEATURES = {**STRONG, "epochs": 4}  # of the feature network; the same in all protocols, so that runs compare
FEATURE_IMAGES = 12_000  # at most so many public images train it
NEIGHBOURS = 3  # k of precision and recall
MANIFOLD = 2_000  # precision and recall use at most so many generated and so many real images

# ----------------------------------------------------------------------------------------------- classifiers

def train_classifier(kind, images, labels, num_classes, epochs, lr, batch=128, anneal=False, augment=False,
                     smoothing=0.0, generator=None, device="cpu", progress=True, bf16=False):
    """A network trained on the given images and nothing else, after the LAST step, in eval mode.

    kind: see `network`. images (N,C,S,S) uint8, labels (N,) int64. Adam with learning rate lr; with anneal it
    falls to 0 as a cosine. augment: see `random_affine`. smoothing: of the labels. One number from generator
    (on the CPU; None: from torch's global generator) seeds everything. Otherwise torch's global state stays
    as it is. ValueError if labels or sizes do not fit.
    """
    if not len(images) == len(labels) > 0 or not 0 <= int(labels.min()) <= int(labels.max()) < num_classes:
        raise ValueError(f"a classifier needs images, each with one label in 0..{num_classes - 1}")
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
                    x = (random_affine(x) if augment else x).contiguous(memory_format=torch.channels_last)
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


def random_affine(x, shift=2.0, degrees=10.0):
    """Images (N,C,S,S), each shifted by up to +-shift pixels along both axes, rotated by up to +-degrees."""
    angle = (2 * torch.rand(len(x), device=x.device) - 1) * math.radians(degrees)
    # affine_grid counts positions from -1 to 1, so a pixel is 2 / S wide.
    move = (2 * torch.rand(len(x), 2, 1, device=x.device) - 1) * shift * 2 / x.shape[-1]
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    grid = F.affine_grid(torch.cat([turn, move], dim=2), x.shape, align_corners=False)  # (N,S,S,2)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def predict(model, images):
    """uint8 (N,C,S,S) -> the model's output (N,D), on the CPU, in batches."""
    first = next(model.parameters(), None)  # None: logreg[:-1] is a Flatten
    device = images.device if first is None else first.device
    return torch.cat([model(pixels.to_float(part.to(device))).cpu() for part in images.split(500)])


def accuracy(model, images, labels):
    """Share, 0..1, of images (N,C,S,S) uint8 whose most likely class is their label (N,)."""
    return (predict(model, images).argmax(1) == labels).double().mean().item()


# ---------------------------------------------------------------------------------- distances in features

def features(model, images):
    """What the last linear layer of model (a Sequential) receives: uint8 (N,C,S,S) -> (N,D) float64."""
    return predict(model[:-1], images).double()


def symmetric_root(matrix):
    """Square root of a positive semi-definite (D,D); eigenvalues that rounding made negative count as 0."""
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def frechet(a, b):
    """Squared Frechet distance of the Gaussians fitted to a (N,D) and b (M,D): Heusel et al. 2017, Eq. 6.

    The square is what FID is, too. Reports call it the Frechet distance for short. It is |mu_a - mu_b|^2 +
    tr A + tr B - 2 tr (AB)^(1/2), with A and B the covariances. The last trace is the sum of the singular
    values of A^(1/2) B^(1/2), also where a covariance is singular (fewer images than features). Few images
    bias the distance upwards, so compare at equal N and M. ValueError for fewer than two rows or unequal D.
    """
    if a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"frechet: needs 2 rows or more and equal widths, got {tuple(a.shape)} and "
                         f"{tuple(b.shape)}")
    mean_a, mean_b = a.double().mean(0), b.double().mean(0)
    cov_a, cov_b = (x.double().T.cov().view(x.shape[1], -1) for x in (a, b))  # for D = 1 cov gives a scalar
    overlap = torch.linalg.svdvals(symmetric_root(cov_a) @ symmetric_root(cov_b)).sum()
    squared = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * overlap
    return squared.clamp(min=0).item()


def share_covered(points, centres, k=NEIGHBOURS):
    """Share, 0..1, of points (N,D) in the union of balls around the centres (M,D).

    The radius of a ball is the distance to the k-th nearest other centre. Precision is
    share_covered(generated, real), recall is share_covered(real, generated) (Kynkaanniemi et al. 2019, Eqs. 1
    and 2). ValueError for k centres or fewer.
    """
    if len(centres) <= k:
        raise ValueError(f"precision and recall need more than {k} images of each kind, got {len(centres)}")
    exact = {"compute_mode": "donot_use_mm_for_euclid_dist"}  # |x|^2 - 2xy + |y|^2 would cancel
    # k + 1, because each centre is its own nearest.
    radius = torch.cdist(centres, centres, **exact).kthvalue(k + 1, dim=1).values
    return (torch.cdist(points, centres, **exact) <= radius).any(dim=1).double().mean().item()


def kept_network(path, settings):
    """The network in features.pt; None if the file is missing, damaged or made with other settings."""
    try:
        saved = files.load(path)
        if saved["settings"] != settings:
            return None
        _, channels, size, *_ = settings
        model = network(FEATURES["kind"], channels, size, saved["classes"])
        model.load_state_dict(saved["state"])
        return model
    except (ValueError, KeyError, TypeError, RuntimeError, AttributeError):
        return None


def feature_network(run, public, channels, size, root=None, device="cpu", progress=True, frame=None,
                    keep=True):
    """(model, name) of the feature network: a small CNN, trained on the PUBLIC set.

    run: its folder, a Path, or None. It keeps the network as public/features.pt, unless keep is False, and it
    knows digests of the private images. A network is trained anew if the file is missing, damaged or made
    with other settings. public: name of the set. Omniglot is read without labels, so its runs use the network
    of "strokes". Runs with a part of the strokes (--public-classes) use the network of all strokes, so that
    their distances compare. frame: the side of the networks' images, and the side to which grey samples are
    cut; the public images are cut alike. ValueError if the set is absent, has one class only, does not fit or
    has a private image: since the run, somebody may have put one there.
    """
    public = "strokes" if public == "omniglot" else public
    kind = datasets.kind_of(public)
    path = run / "public" / "features.pt" if run and keep else None
    settings = [kind, channels, size, FEATURE_IMAGES, FEATURES]
    model = kept_network(path, settings) if path else None
    if model is None:
        # Sets drawn by a program: draw only as many images as are used. Other sets are read whole (None).
        n = FEATURE_IMAGES if datasets.unlimited(public) else None
        whole, cut = frame or (size, size)
        found = datasets.load(public, "train", root, whole, n=n, channels=channels,
                              cache=scored.cache_of(run) if run else None)
        seen = scored.private_digests(run)
        if seen is not None and torch.isin(datasets.digests(found.images), seen).any():
            raise datasets.DataError(f"the public set {public} has private images of this run by now, which "
                                     "the feature network would learn; take them out")
        found.images = scored.shrink(pixels.crop(found.images, cut))  # grey ones are padded
        classes = len(found.classes)
        if classes < 2:
            raise datasets.DataError(f"the public set {kind} has one class only, a feature network needs two")
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(len(found), generator=generator)[:FEATURE_IMAGES]
        kept = f"kept in {path}" if path else "not kept"
        print(f"feature network: a CNN learns {len(chosen):,} images of {kind}; {kept}")
        model = train_classifier(images=found.images[chosen], labels=found.labels[chosen],
                                 num_classes=classes, generator=generator, device=device,
                                 progress=progress, **FEATURES)
        if path:
            files.save({"settings": settings, "classes": classes, "state": model.cpu().state_dict()}, path)
    weights = b"".join(value.cpu().numpy().tobytes() for value in model.state_dict().values())
    digest = hashlib.sha256(weights).hexdigest()[:8]
    name = f"CNN trained on {kind} ({model[-1].out_features} classes, weights {digest})"
    return model.to(device).eval(), name


def compare(model, samples, real, seed=0):
    """A dict: Frechet distance, Frechet distance between two halves of the real images, precision, recall.

    The distance of the halves shows roughly what chance alone gives. They have fewer images than the sets,
    which biases it upwards.
    """
    # In random order: samples come in turns of the classes, and the halves and parts should be alike.
    generator = torch.Generator().manual_seed(seed)
    a, b = (features(model, x[torch.randperm(len(x), generator=generator)]) for x in (samples, real))
    half, subset_a, subset_b = len(b) // 2, a[:MANIFOLD], b[:MANIFOLD]
    return {"frechet": frechet(a, b), "n": [len(a), len(b)],
            "halves": frechet(b[:half], b[half:]), "halves_n": half,
            "precision": share_covered(subset_a, subset_b), "recall": share_covered(subset_b, subset_a),
            "k": NEIGHBOURS, "manifold_n": [len(subset_a), len(subset_b)]}
