"""Images on the way: public/autoencoder.png, and private tuning as it happens, internal/progress.png.

The latter shows images of the same noise every few steps. The release gets a copy (release.py), together with
the statement that covers it. Nothing is spent by it. Every update is a result of the DP mechanism, whose
epsilon covers all of them together, and what is drawn from such weights is post-processing (Dwork and Roth
2014, proposition 2.1).
"""
import sys

import torch

import sample
from datasets import pixels
from support import checkpoints, conditions
from support.team import rank

MOST = 10  # images in a row, one of each class


@torch.no_grad()
def save_reconstructions(model, images, path):
    """Pairs of image and reconstruction, four in a row: images (N, C, H, W) in [-1, 1], public ones."""
    pairs = torch.stack([images, model.decode(model.encode(images).mean)], 1).flatten(0, 1)
    pixels.save_grid(pixels.to_uint8(pairs), path, 8)


def watcher(s, plan, model, autoencoder, scale, private, embedder):
    """A function to be called with the number of each step: every --watch steps it adds a row to the strip.

    --watch None means ten times in the run where stderr is a terminal, and never elsewhere. The first row is
    drawn here, by the untuned model. A resumed run begins a new strip.
    """
    every = s.watch
    if every is None:
        every = max(1, plan["steps"] // 10) if sys.stderr.isatty() else 0
    if every == 0 or rank() > 0:
        return lambda step: None
    release = sample.Release(autoencoder.to(s.device), model, scale, s.schedule, private.classes, s.crop, {},
                             {}, checkpoints.build_tokenizer(embedder), conditions.class_prompts(s, private),
                             s.bf16)
    labels = torch.arange(min(MOST, len(private.classes)))
    rows = []

    def draw(step):
        if (step + 1) % every == 0:
            rows.append(sample.generate(release, labels, s.sample_steps, s.sample_eta, s.guidance,
                                        seed=s.seed, progress=False))
            pixels.save_grid(torch.cat(rows), s.out / "internal" / "progress.png", len(labels))

    draw(-1)
    return draw
