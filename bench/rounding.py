"""How far one image more moves a sum of clipped gradients beyond C, by rounding: `python -m bench.rounding`.

The worst case that was found: gradients of nearly one direction, so that the sum of n is nearly n C long. One
image more moves all others to other micro-batches. Printed is |S(all) - S(all but the first) - its share|
divided by C, for sums as the engine makes them, and for sums in float32 throughout, as up to 386bb18. On a
CPU, with one thread.
"""
from support import threads  # noqa: F401, I001 (first: before torch)

from unittest import mock

import torch

import dp_sgd
from extensions import bookkeeping as book

C = 0.1


def moved(n, micro_batch, spread=0.3, width=64):
    """|S(all) - S(all but the first) - its share| / C of n + 1 images."""
    generator = torch.Generator().manual_seed(0)
    model = torch.nn.Linear(width, width, bias=False)
    x, v = (torch.randn(1, width, generator=generator)
            + spread * torch.randn(n + 1, width, generator=generator) for _ in range(2))

    def sums(rows):
        engine = dp_sgd.DPSGD(model, C, 1.0, n, method=book.bookkeeping)
        for part in rows.split(micro_batch):
            engine.accumulate(lambda model, x, v: (model(x) * v).sum(1), x[part], v[part])
        return engine.sums[0].double()

    rows = torch.arange(n + 1)
    return float((sums(rows) - sums(rows[1:]) - sums(rows[:1])).norm()) / C


def main():
    torch.set_num_threads(1)
    def in_float32(params):
        return [torch.zeros_like(p, requires_grad=False) for p in params]

    print("images   micro-batch   moved beyond C, in units of C   float32 throughout")
    for n, micro_batch in ((4_000, 256), (10_000, 256), (60_000, 256), (10_000, 8192), (60_000, 8192)):
        now = moved(n, micro_batch)
        with mock.patch.object(dp_sgd, "zeros", in_float32), mock.patch.object(book, "AT_ONCE", 10 ** 9):
            before = moved(n, micro_batch)
        print(f"{n:6,} {micro_batch:13,} {now:31.1e} {before:20.1e}")


if __name__ == "__main__":
    main()
