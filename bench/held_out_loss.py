"""The diffusion loss of finished runs on held-out private images: `python -m bench.held_out_loss RUN ...`.

Each held-out image has four draws of timestep and noise, the same for every run. So runs on the same public
networks, which `--init` gives them, compare much more exactly than the standard error of their images says.
A run with `--steps 0` tells the loss before tuning. Losses of runs in other latents do not compare.

Meant for pretend-private images (`python -m bench.pretend`), on which recipes are chosen: no epsilon covers
what is printed. Not for text models.
"""
import argparse
from pathlib import Path

import torch

import diffusion
import sample
from datasets import pixels
from support import command_line, scored

K = 4  # draws for each image


@torch.no_grad()
def losses(run, n, root):
    """Losses of a run's release on the first n held-out images of its private set, (n,) or fewer."""
    release = sample.load_release(run)
    if release.tokenizer is not None:
        raise ValueError(f"{run} is a text model; this program knows classes only")
    found = next(iter(scored.held_out_sets(release, scored.sources(release, Path(run))[1], root).values()))
    images, labels = found.images[:n], found.labels[:n] if release.model.embedder else None
    generator, parts = torch.Generator().manual_seed(0), []
    for part in torch.arange(len(images)).split(250):
        x = pixels.to_float(pixels.pad(images[part], release.vae.config.resolution))
        z0 = release.vae.encode(x).mean * release.scale
        cond = None if labels is None else labels[part]
        drawn = diffusion.draw(z0, cond, K, generator, release.schedule)
        parts.append(diffusion.loss(release.model, *drawn, schedule=release.schedule))
    return torch.cat(parts)


def main(argv=None):
    parser = argparse.ArgumentParser(description="The diffusion loss of finished runs on held-out images.")
    parser.add_argument("runs", nargs="+", help="run folders")
    parser.add_argument("--n", type=int, default=2000, help="held-out images [2,000]")
    parser.add_argument("--data-root", help="folder of the data sets [$DPLDM_DATA, else ~/.cache/dpldm]")
    args = parser.parse_args(argv)
    for run in args.runs:
        found = losses(run, args.n, args.data_root)
        print(f"{run}: loss {found.mean():.4f} of {len(found):,} held-out images, standard error "
              f"{found.std() / len(found) ** 0.5:.4f}", flush=True)


if __name__ == "__main__":
    command_line.run_cli(main)
