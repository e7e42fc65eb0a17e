"""AdamW and Muon in the public stages, at equal numbers of steps, on held-out public images.

    python -m bench.optimizers [PRESET ...] [--steps 200] [--lr 1.5e-3,3e-3,6e-3]

One line for each stage, optimizer and learning rate, which falls to zero within the steps as in a whole run.
Stage 1: PSNR of reconstructions in dB. Stage 2: the diffusion loss, in the latents of the best autoencoder
above. Seconds are CPU seconds of the training alone, of all threads together. It runs on the CPU.
"""
import argparse
import itertools
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch

import diffusion
import optim
import train
from datasets import pixels
from support import checkpoints, command_line, conditions, hardware, settings, start

HELD_OUT = 1000
NOBODY = SimpleNamespace(asked=False)  # nobody presses Ctrl-C


def psnr(checkpoint, images):
    """Peak signal-to-noise ratio of the reconstructions of images (N, C, H, W) uint8, in dB."""
    model, x = checkpoints.build_vae(checkpoint), pixels.to_float(images)
    with torch.no_grad():
        y = torch.cat([model.decode(model.encode(part).mean) for part in x.split(250)])
    return -10 * ((y.clamp(-1, 1) - x) / 2).square().mean().log10().item()


def loss(checkpoint, latents, cond, schedule):
    """Mean diffusion loss of latents (N, F, C, h, w) over two draws each, the same for every model."""
    model = checkpoints.build_model(checkpoint)[0]
    drawn = diffusion.draw(latents, cond, 2, torch.Generator().manual_seed(9), schedule)
    with torch.no_grad():
        return diffusion.loss(model, *drawn, schedule=schedule).mean().item()


def compare(preset, args, folder):
    """Print the lines of one preset."""
    runs = []  # (optimizer, learning rate, settings)
    for optimizer, lr in itertools.product(optim.PUBLIC, args.lr.split(",")):
        words = (f"--preset {preset} --public-optimizer {optimizer} --vae-lr {lr} --ldm-lr {lr} --vae-steps "
                 f"{args.steps} --ldm-steps {args.steps} --public-n {args.n + HELD_OUT} --device cpu")
        s = settings.parse([*words.split(), "--out", str(folder)])
        s.bf16 = hardware.choose_bf16(s.precision, s.device)
        runs.append((optimizer, lr, s))
    public, best, quality = start.public_set(runs[0][2]), None, 0.0
    # Shuffled, because of a mix the last images are all of its last set.
    public = public[torch.randperm(len(public), generator=torch.Generator().manual_seed(0)).tolist()]
    (folder / "public").mkdir()
    (folder / "internal").mkdir()

    def timed(learn, state):
        """(learn(), its process seconds). The stage's state is removed, else the next run goes on from it."""
        begin = time.process_time()
        made = learn()
        seconds = time.process_time() - begin
        (folder / "internal" / state).unlink(missing_ok=True)
        return made, seconds

    for optimizer, lr, s in runs:
        learn = partial(train.train_autoencoder, s, public.images[:-HELD_OUT], {}, NOBODY)
        made, seconds = timed(learn, "vae_state.pt")
        reached = psnr(made, public.images[-HELD_OUT:])
        print(f"| {preset} | 1, autoencoder | {optimizer} | {lr} | {seconds:.0f} | {reached:.1f} dB |",
              flush=True)
        if best is None or not quality >= reached:  # also after one that failed
            best, quality = made, reached
    embedder = conditions.embedder_entry(s, public, public)
    latents, cond = train.inputs(s, checkpoints.build_vae(best), best["scale"], public, embedder)
    for optimizer, lr, s in runs:
        learn = partial(train.train_diffusion, s, latents[:-HELD_OUT], cond[:-HELD_OUT], embedder, {}, NOBODY)
        made, seconds = timed(learn, "ldm_state.pt")
        reached = loss(made, latents[-HELD_OUT:], cond[-HELD_OUT:], s.schedule)
        print(f"| {preset} | 2, diffusion | {optimizer} | {lr} | {seconds:.0f} | {reached:.3f} |", flush=True)


def main(argv=None):
    parser = command_line.Parser(description="AdamW and Muon in the public stages.",
                                 formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("presets", nargs="*", default=["digits", "garments"], help="presets with classes")
    parser.add_argument("--steps", type=int, default=200, help="steps of each run")
    parser.add_argument("--n", type=int, default=20_000, help="public images to learn from")
    parser.add_argument("--lr", default="1.5e-3,3e-3,6e-3", help="learning rates")
    args = parser.parse_args(argv)
    print("| preset | stage | optimizer | learning rate | seconds | held out |\n|---|---|---|---|---|---|")
    for preset in args.presets:
        with tempfile.TemporaryDirectory() as folder:
            compare(preset, args, Path(folder))


if __name__ == "__main__":
    command_line.run_cli(main)
