"""How real is the procedural handwriting? A small CNN learns strokes alone and reads real MNIST digits.

    python -m bench.strokes_realism [--data-root DIR] [--n 40000] [--epochs 4] [--seed 0]

Prints the accuracy on the 2,000 held-out digits of datasets/mnist10k.npz, and on the official 10,000 test
digits when the data root has them; which digits are taken for which; the drawing speed. No real image is used
in training. The held-out digits guided the hand that wrote the skeletons (their confusions showed which ways
of writing were missing). So the figure on the official test digits, first looked at when the skeletons were
done, is the fairer one. About 90 s on one core.
"""

import argparse
import os
import time

import torch

import datasets
import metrics
from support import command_line


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default=None, help="folder with MNIST/raw (default: DPLDM_DATA)")
    parser.add_argument("--n", type=int, default=40_000, help="images drawn for training (default 40000)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and training (default 0)")
    args = parser.parse_args()

    start = time.time()
    drawn = datasets.load("strokes", size=28, public_classes="digits", n=args.n, seed=args.seed)
    print(f"drawing: {args.n / (time.time() - start):.0f} images/s on {torch.get_num_threads()} thread(s)")
    start = time.time()
    model = metrics.train_classifier(images=drawn.images, labels=drawn.labels, num_classes=10,
                                     generator=torch.Generator().manual_seed(args.seed),
                                     **{**metrics.STRONG, "epochs": args.epochs})
    fresh = datasets.load("strokes", size=28, public_classes="digits", n=2000, seed=args.seed + 1)
    seen = 100 * metrics.accuracy(model, fresh.images, fresh.labels)
    print(f"training: {time.time() - start:.0f} s, {seen:.1f} % of fresh strokes recognised")

    held_out = datasets.load("mnist10k", "test", size=28)
    sets = [("2,000 held-out digits of mnist10k", held_out)]
    if args.data_root or os.environ.get("DPLDM_DATA"):
        sets.append(("10,000 MNIST test digits", datasets.load("mnist", "test", args.data_root, size=28)))
    for title, real in sets:
        answer = metrics.predict(model, real.images).argmax(1)
        print(f"{title}: {100 * (answer == real.labels).float().mean().item():.2f} %")
        if real is held_out:
            confusion = (real.labels * 10 + answer).bincount(minlength=100).view(10, 10)
            print("true digit (row) taken for (column):")
            for digit, row in enumerate(confusion.tolist()):
                print(f"  {digit}  " + "".join(f"{count:5d}" for count in row))


if __name__ == "__main__":
    command_line.run_cli(main)
