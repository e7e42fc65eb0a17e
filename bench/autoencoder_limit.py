"""How much of the distance to real pictures is the autoencoder's: python -m bench.autoencoder_limit RUN [--data-root DIR]

Held-out pictures are encoded and decoded by the run's autoencoder, no diffusion involved, and compared with themselves: mean
absolute error (0..1) and the Frechet distance of `evaluate.py`. No diffusion model in these latents can be expected to
come closer. Beside it the best linear code of as many numbers: principal components of the public pictures.
"""
import argparse
from pathlib import Path

import torch

import data
import evaluate
import folder
import sample


def main(argv=None):
    parser = argparse.ArgumentParser(description="Distance of autoencoded held-out pictures to the pictures themselves.")
    parser.add_argument("run", help="run folder")
    parser.add_argument("--data-root", help="folder of the data sets [$DPLDM_DATA, else ~/.cache/dpldm]")
    args = parser.parse_args(argv)
    release = sample.load_release(args.run)
    real = next(iter(evaluate.held_out_sets(release, args.data_root).values())).images
    size = release.vae.config.resolution
    public = data.load(release.data["public"], "train", args.data_root, size, n=12_000).images
    judge, name = evaluate.public_features(Path(args.run) / "public", release.data["public"], real.shape[1], release.crop,
                                           args.data_root)
    with torch.no_grad():
        decoded = torch.cat([data.to_uint8(data.crop(release.vae.decode(release.vae.encode(data.to_float(x)).mean), release.crop))
                             for x in data.pad(real, size).split(250)])
    numbers = torch.Size(release.vae.latent_shape).numel()
    x = data.to_float(data.crop(public, release.crop)).flatten(1)
    mean = x.mean(0)
    components = torch.linalg.eigh((x - mean).T @ (x - mean)).eigenvectors[:, -numbers:]  # (pixels, numbers)
    y = data.to_float(real).flatten(1) - mean
    linear = data.to_uint8((y @ components @ components.T + mean).view(len(real), *real.shape[1:]))
    print(f"{len(real):,} held-out pictures, {real[0].numel()} values as {numbers} numbers; features of a {name}")
    for title, made in (("autoencoder", decoded), ("principal components", linear)):
        error = (made.float() - real.float()).abs().mean() / 255
        distance = evaluate.frechet(evaluate.features(judge, made), evaluate.features(judge, real))
        print(f"{title:22} mean absolute error {error:.4f}   Frechet distance {distance:.1f}")


if __name__ == "__main__":
    folder.run_cli(main)
