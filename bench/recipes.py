"""The recipe, measured on a pretend-private set: `python -m bench.recipes`, see `bench.pretend` and `.runs`.

Stroke digits in another hand take the place of MNIST, so nobody's privacy pays for the search: 8,000 of them
with the default recipe and one change, at equal numbers of images seen unless the row says otherwise. The
rows of CHANGES reuse the public stages of `python train.py`; first: python -m bench.pretend runs/pretend.npz
"""
from bench.runs import Row, main

PRETEND = "--private npz:runs/pretend.npz"
CHANGES = {  # name: (label, flags)
    "default": ("the default: 30 steps of 4,000, lr 5e-3", ""),
    "default-again": ("the same once more", ""),
    "no-noise": ("the same without noise", "--epsilon inf"),
    "batch1000": ("120 steps of 1,000", "--batch-size 1000 --steps 120 --ema 0.974"),
    "batch8000": ("15 steps of 8,000", "--batch-size 8000 --steps 15 --ema 0.81"),
    "steps90": ("90 steps of 4,000: three times as many", "--steps 90 --ema 0.966"),
    "lr2": ("lr 2e-3", "--lr 2e-3"),
    "lr12": ("lr 1.2e-2", "--lr 1.2e-2"),
    "ema0": ("no EMA", "--ema 0"),
    "ema97": ("the same a third time (30 steps do not reach its EMA of 0.97)", "--ema 0.97"),
    "K2": ("K = 2, half the batch", "--noise-multiplicity 2 --batch-size 2000"),
    "K4": ("K = 4, a quarter of the batch", "--noise-multiplicity 4 --batch-size 1000"),
    "automatic": ("automatic clipping", "--clipping automatic --clip-norm 1"),
    "per-layer": ("per-layer clipping", "--clipping per-layer"),
    "all": ("all parameters", "--tune all"),
    "default-anew": ("the default on public stages made anew, which the rows of 59,000 share", ""),
    "clip001": ("the same with clip norm 0.01 instead of 0.1", "--clip-norm 0.01"),
    # nearly all there are: which images are held out is chosen by a checksum, about 60,000 remain
    "many": ("59,000 images: 150 steps of 6,000, lr 3e-3",
             "--private-n 59000 --batch-size 6000 --steps 150 --lr 3e-3 --ema 0.95"),
    "many-long": ("59,000 images: 150 steps of 10,000",
                  "--private-n 59000 --batch-size 10000 --steps 150 --lr 3e-3 --ema 0.95"),
}
PUBLIC = {  # public stages of their own: (label, flags)
    "wide": ("UNet of 48 channels", "--width 48"),
    "longer": ("5,000 public steps", "--ldm-steps 5000"),
    "deep": ("two ResBlocks per level", "--depth 2"),
    "8x8": ("latents of 8x8x4 instead of 4x4x4: slower", "--factor 4"),
    "eps": ("predicts the noise, not v", "--prediction eps"),
}
SCORE = "--n 10000 --steps 15 --classifiers cnn,logreg"


def row(name, label, flags, reuse):
    count = "" if "--private-n" in flags else "--private-n 8000"
    out = f"runs/pretend-{name}"
    return Row(label, " ".join(f"{PRETEND} {count} {flags} {reuse} --out {out}".split()), out, SCORE)


ROWS = {name: row(name, label, flags, "--init runs/digits") for name, (label, flags) in CHANGES.items()}
ROWS |= {name: row(name, label, flags, "") for name, (label, flags) in PUBLIC.items()}

if __name__ == "__main__":
    main("recipes", ROWS)
