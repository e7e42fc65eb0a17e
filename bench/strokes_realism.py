"""How real is the procedural handwriting? A small CNN learns strokes alone and reads real MNIST digits.

    python -m bench.strokes_realism [--data-root DIR] [--n 40000] [--epochs 4] [--seed 0]

Prints the accuracy on the 2,000 held-out digits of data/mnist10k.npz, on the official 10,000 test digits when the data
root has them, which digits are taken for which, and the drawing speed. No real picture is used in training. The
held-out digits guided the hand that wrote the skeletons (their confusions showed which ways of writing were missing),
so the figure on the official test digits, first looked at when the skeletons were done, is the fairer one.
About 90 s on one core.
"""

import argparse
import os
import sys
import time

import torch
import torch.nn.functional as F
from torch import nn

import data


def small_cnn():
    """1x28x28 -> 10 logits, about 0.1 M parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(64 * 49, 10),
    )  # fmt: skip


def train(images, labels, epochs, batch=128):
    """Adam with a cosine schedule; each picture is shifted by up to one pixel, the whole batch alike."""
    model = small_cnn()
    optimizer = torch.optim.Adam(model.parameters(), 2e-3)
    steps = epochs * (len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for chosen in torch.randperm(len(images)).split(batch)[: len(images) // batch]:
            shift = torch.randint(-1, 2, (2,)).tolist()
            x = data.to_float(images[chosen]).roll(shift, (2, 3))
            loss = F.cross_entropy(model(x), labels[chosen], label_smoothing=0.1)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return model.eval()


@torch.no_grad()
def predict(model, images):
    return torch.cat([model(data.to_float(chunk)).argmax(1) for chunk in images.split(500)])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data-root", default=None, help="folder with MNIST/raw (default: DPLDM_DATA)")
    parser.add_argument("--n", type=int, default=40_000, help="pictures drawn for training (default 40000)")
    parser.add_argument("--epochs", type=int, default=4, help="passes over them (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of drawing and training (default 0)")
    args = parser.parse_args()
    torch.manual_seed(args.seed)

    start = time.time()
    drawn = data.load("strokes", size=28, public_classes="digits", n=args.n, seed=args.seed)
    print(f"drawing: {args.n / (time.time() - start):.0f} pictures/s on {torch.get_num_threads()} thread(s)")
    start = time.time()
    model = train(drawn.images, drawn.labels, args.epochs)
    fresh = data.load("strokes", size=28, public_classes="digits", n=2000, seed=args.seed + 1)
    seen = 100 * (predict(model, fresh.images) == fresh.labels).float().mean().item()
    print(f"training: {time.time() - start:.0f} s, {seen:.1f} % of fresh strokes recognised")

    held_out = data.load("mnist10k", "test", size=28)
    sets = [("2,000 held-out digits of mnist10k", held_out)]
    if args.data_root or os.environ.get("DPLDM_DATA"):
        sets.append(("10,000 MNIST test digits", data.load("mnist", "test", args.data_root, size=28)))
    for title, real in sets:
        answer = predict(model, real.images)
        print(f"{title}: {100 * (answer == real.labels).float().mean().item():.2f} %")
        if real is held_out:
            confusion = (real.labels * 10 + answer).bincount(minlength=100).view(10, 10)
            print("true digit (row) taken for (column):")
            for digit, row in enumerate(confusion.tolist()):
                print(f"  {digit}  " + "".join(f"{count:5d}" for count in row))


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        print(f"strokes_realism: {error}", file=sys.stderr)
        sys.exit(2)
