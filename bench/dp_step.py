"""Time and memory of one private micro-batch, against training the same parameters without privacy.

    python -m bench.dp_step [--threads 1] [--rounds 5] [--sizes 4 8] [--tune attention all] [--batches 64 256]
    [--profile]

The network is the paper's MNIST row with 4 latent channels at 4x4, and the same at 8x8. `none` is a forward
and backward pass of the mean loss, weight gradients of the same parameters included. The methods of a row
take turns within a round, so that another load on the machine hits all of them; a ratio is the median over
the rounds of (method / none in the same round). With one thread on the CPU the process's own CPU time is
taken, not the clock. Peak memory: each cell in a forked process of its own, growth of the resident set from
before the model is built; on CUDA the allocator's peak. The loop costs the same per example at any size, so
it is timed on 16 examples; vmap is left out where its per-example gradients alone would take more than 2 GB.

--profile tells what book-keeping spends its time on. --channels-last and --bf16 run everything that way.
"""
import argparse
import contextlib
import multiprocessing
import resource
import statistics
import sys
import time

import torch

import diffusion
import dp_sgd
import unet
from support.settings import GRADIENTS

METHODS = ("none", *GRADIENTS)
LOOP_EXAMPLES = 16


def build(args, tune):
    """The MNIST network with a ten-class embedder, weights as initialised except for the zeros: (model,
    parameters).
    """
    torch.manual_seed(0)
    config = unet.UNetConfig(in_channels=4, out_channels=4, num_heads=4)
    model = unet.LatentModel(unet.UNet(config), unet.ClassEmbedder(10, 5))
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)  # zero-initialised layers would let no gradient through
    unet.select_trainable(model, tune)
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return model.to(args.device), [p for p in model.parameters() if p.requires_grad]


def worker(args, size, tune, batch_size, method):
    """One cell: a function that runs a micro-batch, and the number of examples in it."""
    model, params = build(args, tune)
    n = min(batch_size, LOOP_EXAMPLES) if method == "loop" else batch_size
    batch = diffusion.draw(torch.randn(n, 4, size, size, device=args.device),
                           torch.arange(n, device=args.device) % 10, 1, None,
                           diffusion.PAPER)

    def loss_fn(model, *batch):
        autocast = torch.autocast(args.device, torch.bfloat16) if args.bf16 else contextlib.nullcontext()
        with autocast:
            return diffusion.loss(model, *batch, diffusion.PAPER)

    if method == "none":
        def run():
            loss_fn(model, *batch).mean().backward()
            for p in params:
                p.grad = None
    else:
        engine = dp_sgd.DPSGD(model, 1e-3, 1.0, n, gradients=GRADIENTS[method])

        def run():
            engine.accumulate(loss_fn, *batch)
    return run, n


def seconds(args, run):
    clock = time.process_time if args.device == "cpu" and args.threads == 1 else time.perf_counter
    if args.device == "cuda":
        torch.cuda.synchronize()
    start = clock()
    run()
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - start


def peak_memory(args, *cell):
    """MiB that a cell needs above the bare process."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        run, _ = worker(args, *cell)
        run(), run()
        return torch.cuda.max_memory_allocated() / 2 ** 20
    # a child starts from the resident set of this process, without the past
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child():
        torch.set_num_threads(args.threads)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run, _ = worker(args, *cell)
        run(), run()
        queue.put((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2 ** 10)

    process = context.Process(target=child)
    process.start()
    process.join()
    return queue.get() if process.exitcode == 0 else float("nan")


def too_large(args, tune, batch_size, method):
    return method == "vmap" and batch_size * sum(p.numel() for p in build(args, tune)[1]) * 4 > 2 * 2 ** 30


def profile(args, size, tune, batch_size):
    """Milliseconds of book-keeping's parts: the smallest over the rounds, the rest being forward and
    backward.
    """
    parts = {"gram_squared_norm": "norms from Grams", "per_example": "small gradients formed",
             "squared_norm": "their norms",
             "weighted_product": "sums by product", "weighted_sum": "sums of formed"}
    spent, originals = dict.fromkeys(parts, 0.0), {name: getattr(dp_sgd, name) for name in parts}

    def timed(name):
        def function(*arguments):
            start = time.perf_counter()
            result = originals[name](*arguments)
            spent[name] += time.perf_counter() - start
            return result
        return function

    run, _ = worker(args, size, tune, batch_size, "bookkeeping")
    plain, _ = worker(args, size, tune, batch_size, "none")
    rows = []
    try:
        for name in parts:
            setattr(dp_sgd, name, timed(name))
        for _ in range(args.rounds + 1):
            spent.update(dict.fromkeys(parts, 0.0))
            rows.append({"none": seconds(args, plain), "total": seconds(args, run), **spent})
    finally:
        for name in parts:
            setattr(dp_sgd, name, originals[name])
    best = {name: min(row[name] for row in rows[1:]) * 1e3 for name in rows[0]}
    print(f"\nbookkeeping {size}x{size} {tune} {batch_size}: {best['total']:.0f} ms (none "
          f"{best['none']:.0f} ms) = "
          + " + ".join(f"{label} {best[name]:.0f}" for name, label in parts.items())
          + f" + forward, backward and rest {best['total'] - sum(best[name] for name in parts):.0f}",
          flush=True)


def main():
    parser = argparse.ArgumentParser(prog="bench.dp_step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (1)")
    parser.add_argument("--rounds", type=int, default=5, help="timed repetitions after one to warm up (5)")
    parser.add_argument("--sizes", type=int, nargs="+", default=[4, 8], help="latent heights (4 8)")
    parser.add_argument("--tune", nargs="+", default=["attention", "all"],
                        help="trainable subsets (attention all)")
    parser.add_argument("--batches", type=int, nargs="+", default=[64, 256],
                        help="examples in a micro-batch (64 256)")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS,
                        help="besides none, which is always run")
    parser.add_argument("--channels-last", action="store_true", help="weights in channels-last layout")
    parser.add_argument("--bf16", action="store_true", help="forward and backward under bfloat16 autocast")
    parser.add_argument("--profile", action="store_true",
                        help="parts of the book-keeping time instead of the table")
    args = parser.parse_args()
    if args.rounds < 1 or args.threads < 1 or min(args.sizes + args.batches) < 1:
        parser.error("rounds, threads, sizes and batches must be at least 1")
    if any(size % 2 for size in args.sizes):
        parser.error("sizes must be even: the network halves them once")
    torch.set_num_threads(args.threads)
    cells = [(s, t, b) for s in args.sizes for t in args.tune for b in args.batches]
    if args.profile:
        for cell in cells:
            profile(args, *cell)
        return 0
    methods = ["none", *(m for m in args.methods if m != "none")]
    runnable = [(cell, m) for cell in cells for m in methods if not too_large(args, cell[1], cell[2], m)]
    memory = {key: peak_memory(args, *key[0], key[1]) for key in runnable}  # before this process has grown

    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s), channels-last "
          f"{args.channels_last}, bf16 {args.bf16}; medians of {args.rounds} rounds\n")
    print("| latents | trained | micro-batch | method | examples/s | time / none | peak MiB | memory / none "
          "|")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for cell in cells:
        names = [m for m in methods if (cell, m) in memory]
        workers = {m: worker(args, *cell, m) for m in names}
        times = {m: [] for m in names}  # seconds per example
        for _ in range(args.rounds + 1):
            for m, (run, n) in workers.items():
                times[m].append(seconds(args, run) / n)
        for m in names:
            ratio = statistics.median(a / b for a, b in zip(times[m][1:], times["none"][1:], strict=True))
            peak = (
                "" if m == "loop" else f"{memory[cell, m]:.0f} | {memory[cell, m] / memory[cell, 'none']:.2f}"
            )
            speed = 1 / statistics.median(times[m][1:])
            print(f"| {cell[0]}x{cell[0]} | {cell[1]} | {cell[2]} | {m} | {speed:.0f} | {ratio:.2f} | "
                  f"{peak or ' | '} |",
                  flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
