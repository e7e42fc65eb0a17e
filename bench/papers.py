"""Rows on the full data sets, to stand beside the paper's figures: `python -m bench.papers`. See `bench.runs`.

Need the data root (--data-root or DPLDM_DATA), and the public stages of `bench.digits` rows eps10 and letters. Each run is scored
with several sampling seeds.
"""
from bench.runs import Row, main

EPS1 = "--epsilon 1 --batch-size 10000 --steps 30 --lr 5e-3 --ema 0.9"  # as much noise per step as the default run has at 10
RUNS = {  # name: (label, flags of train.py, run folder)
    "mnist-eps10": ("MNIST, public strokes", "--preset mnist-strokes --init runs/digits", "runs/mnist-strokes"),
    "mnist-eps1": ("MNIST, public strokes", f"--preset mnist-strokes {EPS1} --init runs/digits", "runs/mnist-strokes-eps1"),
    "mnist-public": ("MNIST, public strokes, before tuning", "--preset mnist-strokes --steps 0 --init runs/digits",
                     "runs/mnist-strokes-public"),
    "letters-eps10": ("MNIST, public stroke letters", "--preset mnist-letters --init runs/digits-letters", "runs/mnist-letters"),
    "letters-eps1": ("MNIST, public stroke letters", f"--preset mnist-letters {EPS1} --init runs/digits-letters",
                     "runs/mnist-letters-eps1"),
    "fashion-eps10": ("Fashion-MNIST, public MNIST", "--preset fashion", "runs/fashion"),
    "fashion-eps1": ("Fashion-MNIST, public MNIST", f"--preset fashion {EPS1} --init runs/fashion", "runs/fashion-eps1"),
}
SCORE = "--n 50000 --classifiers cnn"  # protocol quick, but with the paper's number of samples
ROWS = {name: Row(label, flags + ("" if out == "runs/fashion" else f" --out {out}"), out, SCORE)
        for name, (label, flags, out) in RUNS.items()}
ROWS |= {f"{name}-seed{seed}": Row(row.label, None, row.out,
                                   f"{SCORE} --seed {seed} --no-distance --out {row.out}/internal/seed{seed}.json")
         for name, row in list(ROWS.items()) for seed in (1, 2)}

if __name__ == "__main__":
    main("papers", ROWS)
