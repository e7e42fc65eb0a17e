"""Are samples copies of private images? `python evaluate.py RUN --memorisation` asks, with the code here.

Not in the paper. Differential privacy bounds what a release can tell about an image; this looks at
samples. It writes memorisation.png and memorisation.json into RUN/internal/. The PNG shows private images:
never publish it.
"""
import math

import torch

import metrics
from datasets import pixels
from support import files, scored


def nearest(a, b, k=1):
    """The k nearest rows of b (M,D) to each row of a (N,D), nearest first: distances and indices (N,k)."""
    found = [torch.cdist(part, b).topk(min(k, len(b)), largest=False) for part in a.split(256)]
    return torch.cat([f.values for f in found]), torch.cat([f.indices for f in found])


def memorised(samples, train, held_out, seed=0):
    """Are samples nearer to training images than to held-out ones? Features (N,D), (M,D), (L,D) -> dict.

    min(M, L) images of each kind are chosen at random. closer_to_training is the share of samples whose
    nearest one is a training image: 1/2 if nothing is copied and the two kinds are alike in all else. If all
    samples are copies it is 1, or 1/2 + L / (2 M) where M > L, as only a part of the training images is
    compared. The quantiles are of the distances to the nearest image of each kind; those to any_training look
    at all training images. standard_error is for the number of samples alone: which images are held out adds
    to it, much if they are few.
    """
    generator, count = torch.Generator().manual_seed(seed), min(len(train), len(held_out))
    distances = {"any_training": nearest(samples, train)[0][:, 0]}
    for name, x in (("training", train), ("held_out", held_out)):
        chosen = x[torch.randperm(len(x), generator=generator)[:count]]
        distances[name] = nearest(samples, chosen)[0][:, 0]
    equal = distances["training"] == distances["held_out"]  # counts as one half
    closer = (distances["training"] < distances["held_out"]).double() + 0.5 * equal
    share = closer.mean().item()
    points = torch.tensor([0.0, 0.01, 0.5], dtype=samples.dtype)
    quantiles = {f"distance_to_{kind}_min_1%_median": d.quantile(points).tolist()
                 for kind, d in distances.items()}
    return {"closer_to_training": share, "standard_error": math.sqrt(share * (1 - share) / len(samples)),
            "n": len(samples), "of_each": count, **quantiles}


def report(args, release, run, public, private, held_out, draw):
    """Samples beside their nearest training and held-out images: PNG and JSON in RUN/internal/.

    args: of evaluate.py. draw() -> samples (N, C, S, S) uint8. ValueError if the run used no private image.
    """
    if not release.privacy.get("steps"):
        raise ValueError("this run tuned nothing on private images, so there is nothing to memorise")
    train = scored.load_private(release, private, "train", args.data_root,
                                scored.private_n(release, run), scored.cache_of(run))
    samples = draw()
    three = (samples, train.images, held_out.images)
    try:
        judge, space = metrics.feature_network(
            run, args.features or public, samples.shape[1], samples.shape[-1], args.data_root, args.device,
            frame=(release.vae.config.resolution, release.crop), keep=not args.features)
        points = [metrics.features(judge, x) for x in three]
    except ValueError as error:
        print(f"no feature network ({error}): distances of pixels instead")
        space, points = "pixels", [x.flatten(1).double() / 255 for x in three]
    result = {"note": "about private images, not covered by epsilon", "space": space,
              **memorised(*points, args.seed)}
    image = run / "internal" / "memorisation.png"
    save_neighbours(image, three, points)
    files.write_json(result, run / "internal" / "memorisation.json")
    any_, training, held = (" ".join(f"{d:.3g}" for d in result[f"distance_to_{kind}_min_1%_median"])
                            for kind in ("any_training", "training", "held_out"))
    share, error = (f"{result[key]:.1%}" for key in ("closer_to_training", "standard_error"))
    print(f"{share} of {result['n']:,} samples are closer to a training image than to a held-out one, "
          f"{result['of_each']:,} of each (1/2 if nothing is copied and both kinds are alike); +- {error} "
          "for the samples, more for the choice of the images\n"
          f"distance to the nearest, {space}; minimum, 1 %, median: training {training}, held out {held}; "
          f"of all {len(train):,} training images {any_}\n"
          f"{image}: sample | 4 nearest training | 4 nearest held out; PRIVATE images, never publish it")
    return 0


def save_neighbours(path, images, points):
    """The 12 samples nearest to a training image, each with 4 training and 4 held-out images nearest to it.

    images: samples, training, held-out (N,C,S,S) uint8; points: their features (N,D).
    """
    (samples, train, held_out), (a, b, c) = images, points
    closest = nearest(a, b)[0][:, 0].argsort()[:12]
    near_training, near_held_out = train[nearest(a[closest], b, 4)[1]], held_out[nearest(a[closest], c, 4)[1]]
    gap = torch.full_like(samples[closest], 96)[:, None]  # (12, 1, C, S, S), grey
    grid = torch.cat([samples[closest][:, None], gap, near_training, gap, near_held_out], dim=1)
    pixels.save_grid(grid.flatten(0, 1), path, grid.shape[1])
