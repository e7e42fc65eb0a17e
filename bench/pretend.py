"""Pretend-private sets to choose recipes on without spending anyone's privacy: drawings in another style.

    python -m bench.pretend FILE.npz [garments]     60,000 and a tenth more, for --private npz:FILE.npz

Digits: strokes in another hand. Each image is bent by a smooth random field, leant by a further slant, and
its pen made bolder or finer. Garments: bent and stretched, with other light, prints and contrast. A CNN that
learned plain drawings reads about as many of these as of real images (printed), so that the step from public
to pretend-private is about as wide as that to MNIST or Fashion-MNIST. No real image is used for them.
"""
import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import datasets
import metrics
from datasets import garments, pixels, strokes
from support import command_line

N = 66_700  # evaluate.py holds out about one in ten of an own set


def normals(n, generator):
    """A function: shape -> (n, *shape) normal numbers."""
    return lambda *shape: torch.randn(n, *shape, generator=generator)


def smooth(field):
    """A coarse random field (N,C,s,s), interpolated to (N,C,28,28)."""
    return F.interpolate(field, size=28, mode="bicubic", align_corners=True)


def bent(x, normal, bend, slant, angle, size):
    """Images (N,1,28,28), warped by a smooth field, slanted, turned and stretched, each by so much at random.

    bend is in half images, angle in radians, size a logarithm.
    """
    field = smooth(normal(2, 4, 4) * bend)
    slant, angle, size = slant * normal(1), angle * normal(1), (size * normal(2)).exp()
    zero = torch.zeros(len(x), 1)
    matrix = torch.stack([torch.cat([size[:, :1], slant + angle, zero], 1),
                          torch.cat([-angle, size[:, 1:], zero], 1)], 1)
    grid = F.affine_grid(matrix, x.shape, align_corners=False) + field.permute(0, 2, 3, 1)
    return F.grid_sample(x, grid, align_corners=False)


def rewrite(images, generator):
    """Images (N,1,28,28) uint8 in another hand, same shape; digits stay upright and in the frame."""
    normal = normals(len(images), generator)
    x = pixels.to_float(images) / 2 + 0.5  # 0..1, background 0
    bolder = F.max_pool2d(x, 3, 1, 1)
    finer = -F.max_pool2d(-x, 3, 1, 1)
    pen = 0.5 * normal(1, 1, 1)
    x = torch.where(pen > 0, x.lerp(bolder, pen.clamp(0, 1)), x.lerp(finer, (-pen).clamp(0, 0.5)))
    return pixels.to_uint8(2 * bent(x, normal, bend=0.06, slant=0.15, angle=0.08, size=0.06) - 1)


def restyle(images, generator):
    """Garments (N,1,28,28) uint8 in another style, same shape; the background stays black."""
    normal = normals(len(images), generator)
    x = pixels.to_float(images) / 2 + 0.5  # 0..1, background 0
    x = bent(x, normal, bend=0.06, slant=0.07, angle=0.04, size=0.1).clamp(0, 1)
    cloth = (x > 0.03).float()
    mean = (x * cloth).sum((2, 3), keepdim=True) / cloth.sum((2, 3), keepdim=True).clamp(min=1)
    gamma, contrast = (0.4 * normal(1, 1, 1)).exp(), (0.3 * normal(1, 1, 1)).exp()
    printed = (torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5) * 0.3 * smooth(normal(1, 10, 10))
    x = mean + (x.clamp(min=1e-4) ** gamma - mean) * contrast
    x = (x * (1 + 0.3 * smooth(normal(1, 3, 3))) + printed) * cloth  # light, then prints
    return pixels.to_uint8(2 * x.clamp(0, 1) - 1)


# Kind -> (draws labels, changes the style, names of the classes, the real set)
KINDS = {"digits": (strokes.draw, rewrite, [str(i) for i in range(10)], "mnist10k"),
         "garments": (garments.draw, restyle, garments.CLASSES, "fashion")}


def main(argv=None):
    parser = argparse.ArgumentParser(description="A pretend-private set: drawings in another style.")
    parser.add_argument("file", help="npz file to write; a .png of 100 images stands beside it")
    parser.add_argument("kind", nargs="?", choices=KINDS, default="digits", help="what is drawn [digits]")
    args = parser.parse_args(argv)
    if not args.file.endswith(".npz"):
        raise ValueError(f"{args.file}: the name of the file must end in .npz")
    draw, change, names, real_set = KINDS[args.kind]
    path = args.file
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(N) % 10
    images = torch.cat([change(draw(part, generator), generator) for part in labels.split(1000)])
    np.savez_compressed(path, images=images[:, 0].numpy(), labels=labels.numpy().astype(np.uint8),
                        class_names=np.array(names))
    pixels.save_grid(images[:100], path.removesuffix(".npz") + ".png", columns=10)
    plain = torch.arange(10_000) % 10
    reader = metrics.train_classifier(images=draw(plain, generator), labels=plain, num_classes=10,
                                      generator=generator, **metrics.STRONG
                                      | {"augment": datasets.REGISTRY[real_set].augmented})
    print(f"{path}: a CNN trained on 10,000 plain drawings reads "
          f"{metrics.accuracy(reader, images[:10_000], labels[:10_000]):.2%} of 10,000 of them")
    try:
        real = datasets.load(real_set, "test", size=28)
    except datasets.DataError as error:
        print(f"real ones skipped: {error}")
    else:
        print(f"and {metrics.accuracy(reader, real.images, real.labels):.2%} of {len(real):,} real ones")


if __name__ == "__main__":
    command_line.run_cli(main)
