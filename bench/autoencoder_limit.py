"""What a run's autoencoder loses, before any diffusion.

    python -m bench.autoencoder_limit RUN [--data-root DIR]

Real images are encoded and decoded by the run's autoencoder, no diffusion model involved. Held-out ones are
compared with themselves: mean absolute error (0..1) and the Frechet distance of `metrics.py`. And the
classifier of `evaluate.py --protocol quick`, for every data set with its augmentation, learns from 10,000
real *training* images so passed through and reads the held-out ones as they are. No diffusion model in these
latents can be expected to do better. Beside it the best linear code of as many numbers, principal components
of the public images, and the images as they are. The figures tell about private images and no epsilon covers
them.
"""
import argparse
from pathlib import Path

import torch

import datasets
import metrics
import sample
from datasets import pixels
from support import command_line, scored


def main(argv=None):
    parser = argparse.ArgumentParser(description="What an autoencoder loses: distance, and classes that can "
                                                 "be told apart.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--n", type=int, default=10_000, help="training images for the classifier [10,000]")
    parser.add_argument("--data-root", help="folder of the data sets [$DPLDM_DATA, else ~/.cache/dpldm]")
    args = parser.parse_args(argv)
    release = sample.load_release(args.run)
    public, private = scored.sources(release, Path(args.run))
    real = next(iter(scored.held_out_sets(release, private, args.data_root).values()))
    train = scored.load_private(release, private, "train", args.data_root)
    chosen = torch.randperm(len(train), generator=torch.Generator().manual_seed(0))[:args.n]
    size, channels = release.vae.config.resolution, real.images.shape[1]
    judge, name = metrics.feature_network(Path(args.run), public, channels, release.crop, args.data_root,
                                          frame=(size, release.crop))
    most = None if datasets.REGISTRY[datasets.kind_of(public)].own else 12_000  # an own set may have fewer
    seen = datasets.load(public, "train", args.data_root, size, most, channels=channels).images[:12_000]
    numbers = torch.Size(release.vae.latent_shape).numel()
    x = pixels.to_float(pixels.crop(seen, release.crop)).flatten(1)
    mean = x.mean(0)
    components = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors[:, -numbers:]  # (pixels, numbers)

    @torch.no_grad()
    def autoencoded(images):
        decoded = [release.vae.decode(release.vae.encode(pixels.to_float(x)).mean)
                   for x in pixels.pad(images, size).split(250)]
        return torch.cat([pixels.to_uint8(pixels.crop(x, release.crop)) for x in decoded])

    def projected(images):
        y = pixels.to_float(images).flatten(1) - mean
        return pixels.to_uint8((y @ components @ components.T + mean).view(images.shape))

    print(f"{len(real):,} held-out images, {real.images[0].numel()} values as {numbers} numbers; features of "
          f"a {name}; a CNN trained on {len(chosen):,} training images, read on the held-out ones as they "
          "are")
    for title, code in (("images as they are", lambda images: images), ("autoencoder", autoencoded),
                        ("principal components", projected)):
        made = code(real.images)
        error = (made.float() - real.images.float()).abs().mean() / 255
        distance = metrics.frechet(metrics.features(judge, made), metrics.features(judge, real.images))
        model = metrics.train_classifier(images=code(train.images[chosen]), labels=train.labels[chosen],
                                         num_classes=len(real.classes),
                                         generator=torch.Generator().manual_seed(0), **metrics.STRONG)
        print(f"{title:22} mean absolute error {error:.4f}   Frechet distance {distance:.1f}   "
              f"CNN {metrics.accuracy(model, real.images, real.labels):.1%}", flush=True)


if __name__ == "__main__":
    command_line.run_cli(main)
