"""The recipe, by measurement on a pretend-private set (`bench.pretend`): `python -m bench.recipes`. See `bench.runs`.

Sixty thousand stroke digits in another hand take the place of MNIST, so nobody's privacy pays for the search. All rows but
those that say otherwise reuse the public stages of `python train.py`; first: python -m bench.pretend runs/pretend.npz
"""
from bench.runs import Row, main

PRETEND = "--preset mnist-strokes --private npz:runs/pretend.npz"
EPS1 = "--epsilon 1 --batch-size 10000 --steps 30 --lr 5e-3 --ema 0.9"
CHANGES = {  # name: (label, flags)
    "base": ("150 steps of 6,000, lr 3e-3", ""),
    "inf": ("the same without noise", "--epsilon inf"),
    "lr6": ("lr 6e-3", "--lr 6e-3"),
    "lr12": ("lr 1.2e-2", "--lr 1.2e-2"),
    "large": ("60 steps of 15,000, lr 6e-3, EMA 0.9", "--batch-size 15000 --steps 60 --lr 6e-3 --ema 0.9"),
    "long": ("400 steps of 6,000, EMA 0.98", "--steps 400 --ema 0.98"),
    "all": ("all parameters", "--tune all"),
    "resblocks": ("ResBlocks", "--tune resblocks"),
    "K2": ("K = 2, half the batch", "--noise-multiplicity 2 --batch-size 3000"),
    "K4": ("K = 4, a quarter of the batch", "--noise-multiplicity 4 --batch-size 1500"),
    "automatic": ("automatic clipping", "--clipping automatic --clip-norm 1"),
    "ema99": ("EMA 0.99", "--ema 0.99"),
    "eps1": ("epsilon 1: 30 steps of 10,000, lr 5e-3", EPS1),
    "eps1-large": ("epsilon 1: 30 steps of 30,000, lr 1e-2", "--epsilon 1 --batch-size 30000 --steps 30 --lr 1e-2 --ema 0.9"),
    "eps1-all": ("epsilon 1, all parameters", f"{EPS1} --tune all"),
}
# Public stages of their own, each one change of those of `python train.py`, which the rows above reuse: (label, flags)
DEFAULT = "--width 32 --vae-steps 900 --ldm-steps 1600 --ldm-lr 2e-3 --public-n 36000"  # the preset's are larger
PUBLIC = {
    "wide": ("64 channels, 3,000 public steps", "--width 64 --ldm-steps 3000 --ldm-lr 1e-3"),
    "longer": ("5,000 public steps", "--ldm-steps 5000"),
    "eps": ("predicts the noise, not v", "--prediction eps"),
}
SCORE = "--n 10000 --classifiers cnn,logreg"
ROWS = {name: Row(label, f"{PRETEND} {flags} --init runs/digits --out runs/pretend-{name}".replace("  ", " "),
                  f"runs/pretend-{name}", SCORE) for name, (label, flags) in CHANGES.items()}
ROWS |= {name: Row(label, f"{PRETEND} {DEFAULT} {flags} --out runs/pretend-{name}", f"runs/pretend-{name}", SCORE)
         for name, (label, flags) in PUBLIC.items()}

if __name__ == "__main__":
    main("recipes", ROWS)
