"""A pretend-private set to choose recipes on without spending anyone's privacy: strokes in another hand.

    python -m bench.pretend FILE.npz     60,000 and a tenth more, for --private npz:FILE.npz

The other hand: each image is bent by a smooth random field, leant by a further slant, and its pen made
bolder or finer. A CNN that learned plain strokes reads about as many of these as of real digits (printed), so
that the step from public to pretend-private is about as wide as that from strokes to MNIST. No real image
is used for them.
"""
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import datasets
import metrics
from datasets import pixels, strokes

N = 66_700  # evaluate.py holds out about one in ten of an own set


def rewrite(images, generator):
    """Images (N,1,28,28) uint8 in another hand, same shape; digits stay upright and in the frame."""
    n = len(images)

    def normal(*shape):
        return torch.randn(n, *shape, generator=generator)

    x = pixels.to_float(images) / 2 + 0.5  # 0..1, background 0
    bolder = F.max_pool2d(x, 3, 1, 1)
    finer = -F.max_pool2d(-x, 3, 1, 1)
    pen = 0.5 * normal(1, 1, 1)
    x = torch.where(pen > 0, x.lerp(bolder, pen.clamp(0, 1)), x.lerp(finer, (-pen).clamp(0, 0.5)))
    # in half images
    bend = F.interpolate(normal(2, 4, 4) * 0.06, size=28, mode="bicubic", align_corners=True)
    slant, angle, size = 0.15 * normal(1), 0.08 * normal(1), (0.06 * normal(2)).exp()
    zero = torch.zeros(n, 1)
    matrix = torch.stack([torch.cat([size[:, :1], slant + angle, zero], 1),
                          torch.cat([-angle, size[:, 1:], zero], 1)], 1)
    grid = F.affine_grid(matrix, x.shape, align_corners=False) + bend.permute(0, 2, 3, 1)
    return pixels.to_uint8(2 * F.grid_sample(x, grid, align_corners=False) - 1)


def main():
    if len(sys.argv) != 2 or not sys.argv[1].endswith(".npz"):
        sys.exit("usage: python -m bench.pretend FILE.npz")
    path = sys.argv[1]
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(1)
    labels = torch.arange(N) % 10
    images = torch.cat([rewrite(strokes.draw(part, generator), generator) for part in labels.split(1000)])
    np.savez_compressed(path, images=images[:, 0].numpy(), labels=labels.numpy().astype(np.uint8),
                        class_names=np.array([str(i) for i in range(10)]))
    pixels.save_grid(images[:100], path.removesuffix(".npz") + ".png", columns=10)
    plain = torch.arange(10_000) % 10
    reader = metrics.train_classifier(images=strokes.draw(plain, generator), labels=plain, num_classes=10,
                                      generator=generator, **metrics.STRONG)
    share = metrics.accuracy(reader, images[:10_000], labels[:10_000])
    real = datasets.load("mnist10k", "test", size=28)
    digits = metrics.accuracy(reader, real.images, real.labels)
    print(f"{path}: a CNN trained on 10,000 plain strokes reads {share:.2%} of 10,000 of them, {digits:.2%} "
          f"of {len(real):,} held-out MNIST digits")


if __name__ == "__main__":
    main()
