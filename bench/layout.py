"""Precision and memory layout, measured for each network: `python -m bench.layout [PRESET ...]`.

Examples per second of a training step of the autoencoder and of the UNet, of a private step (attention tuned,
book-keeping) and of one evaluation while sampling; float32 and bfloat16 autocast, images contiguous and
channels-last. All of a row in one run; the four ways take turns, and the best of the rounds counts. It is why
`support.hardware.laid_out` and `bf16_wins` are what they are.

    OMP_NUM_THREADS=1 python -m bench.layout digits mnist-strokes faces
"""
import argparse
import time
from functools import partial

import torch

import diffusion
import dp_sgd
import tuning
import unet
import vae
from extensions.bookkeeping import bookkeeping
from support import checkpoints, presets

WAYS = [(bf16, layout) for bf16 in (False, True) for layout in (torch.contiguous_format, torch.channels_last)]
ROUNDS = 3


def autoencoder_steps(s, layout):
    model = vae.AutoencoderKL(s["vae"]).to(memory_format=layout)
    x = torch.rand(64, s["vae"].in_channels, *2 * [s["vae"].resolution]) * 2 - 1
    return 64, {"autoencoder": lambda: vae.loss(model, x)[0].backward()}


def unet_steps(s, layout, n=256):
    entry = {"kind": "class", "dim": s["unet"].context_dim, "num_classes": 10, "null_class": True}
    shape = vae.AutoencoderKL(s["vae"]).latent_shape
    batch = diffusion.draw(torch.randn(n, *shape), torch.arange(n) % 10, 1, None, s["schedule"])

    def make(tune):
        model = unet.LatentModel(unet.UNet(s["unet"]),
                                 checkpoints.build_embedder(entry)).to(memory_format=layout)
        tuning.select_trainable(model, tune)
        return model

    public, private = make("all"), make("attention")
    engine = dp_sgd.DPSGD(private, 0.1, 0.0, n, method=bookkeeping)

    @torch.no_grad()
    def evaluate():
        public(batch[0], batch[2][:, 0], batch[1])

    loss = partial(diffusion.loss, schedule=s["schedule"])
    return n, {"diffusion": lambda: loss(public, *batch).mean().backward(),
               "private": lambda: engine.accumulate(loss, *batch), "sampling": evaluate}


def main():
    parser = argparse.ArgumentParser(prog="bench.layout", description=__doc__.splitlines()[0])
    parser.add_argument("presets", nargs="*", default=["digits", "mnist-strokes", "faces"], metavar="PRESET",
                        help="presets of train.py")
    names = parser.parse_args().presets
    if unknown := [name for name in names if name not in presets.PRESETS]:
        parser.error(f"no preset {unknown[0]!r}; choose among {', '.join(presets.PRESETS)}")
    # alone on a core, whatever else runs
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s); examples/s\n")
    print("| preset | step | float32 | float32, channels-last | bf16 | bf16, channels-last "
          "|\n|---|---|---|---|---|---|")
    for name in names:
        s = {**presets.DIGITS, **presets.PRESETS[name]}
        for build in (autoencoder_steps, unet_steps):
            made = [(bf16, build(s, layout)) for bf16, layout in WAYS]
            for step in made[0][1][1]:
                best = [float("inf")] * len(WAYS)
                for _ in range(ROUNDS + 1):  # the first warms up and can hardly be the best
                    for i, (bf16, (_, steps)) in enumerate(made):
                        begin = clock()
                        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                            steps[step]()
                        best[i] = min(best[i], clock() - begin)
                print(f"| {name} | {step} | " + " | ".join(f"{made[0][1][0] / b:,.0f}" for b in best) + " |",
                      flush=True)


if __name__ == "__main__":
    main()
