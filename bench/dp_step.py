"""Time and memory of one private micro-batch, against training the same parameters without privacy.

    python -m bench.dp_step [--threads 1] [--rounds 5] [--sizes 4 8] [--tune attention all] [--batches 64 256]
    [--network cifar10] [--profile]

The network is the paper's MNIST row with 4 latent channels at 4x4, and the same at 8x8. --network takes
another one of the paper's, at its own size (support/paper_networks.py). `none` is a forward
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
import tuning
import unet
from extensions import bookkeeping, text
from support import hardware, settings
from support.paper_networks import AUTOENCODERS, UNETS

METHODS = ("none", *settings.METHODS)
LOOP_EXAMPLES = 16


def own_size(name):
    """Height of the latents of one of the paper's networks."""
    autoencoder = AUTOENCODERS["cifar10" if name == "celeba32" else name]
    return autoencoder.resolution // 2 ** (len(autoencoder.ch_mult) - 1)


def network(args, tune, device):
    """The network with the parameters chosen that are trained: (model, parameters).

    Its conditions are those of its preset: ten classes, prompts, or none.
    """
    config = UNETS.get(args.network, unet.UNetConfig(in_channels=4, out_channels=4, num_heads=4))
    embedder = None
    with torch.device(device):
        if args.network == "celeba256-text":
            embedder = text.TextEncoder(1000, config.context_dim, 56, 512, 4)
        elif config.context_dim:
            embedder = unet.ClassEmbedder(10, config.context_dim)
        model = unet.LatentModel(unet.UNet(config), embedder)
    tuning.select_trainable(model, tune)
    return model, [p for p in model.parameters() if p.requires_grad]


def build(args, tune):
    """`network` on its device, weights as initialised except for the zeros."""
    torch.manual_seed(0)
    model, trained = network(args, tune, args.device)
    for p in model.parameters():
        if p.dim() > 1 and not p.any():
            torch.nn.init.normal_(p, std=0.02)  # zero-initialised layers would let no gradient through
    if args.channels_last:
        model.to(memory_format=torch.channels_last)
    return model, trained


def worker(args, size, tune, batch_size, method):
    """One cell: a function that runs a micro-batch, and the number of examples in it."""
    model, params = build(args, tune)
    n = min(batch_size, LOOP_EXAMPLES) if method == "loop" else batch_size
    z = torch.randn(n, model.unet.config.in_channels, size, size, device=args.device)
    batch = diffusion.draw(z, hardware.stand_in(model, n, args.device), 1, None, diffusion.PAPER)

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
        engine = dp_sgd.DPSGD(model, 1e-3, 1.0, n, method=settings.METHODS[method])

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
    if method != "vmap":
        return False
    # On the meta device: a process that has computed with several threads may not fork (`peak_memory`).
    return batch_size * sum(p.numel() for p in network(args, tune, "meta")[1]) * 4 > 2 * 2 ** 30


def memories(args, cell, methods):
    """{method: MiB} of a cell (size, tune, batch size), for those methods that are not too large."""
    return {m: peak_memory(args, *cell, m) for m in methods if not too_large(args, *cell[1:], m)}


def compare(args, cell, memory):
    """Rows {method, examples_per_s, time_ratio, peak_mib, memory_ratio} of a cell (size, tune, batch size).

    memory: result of `memories`, with `none`. The methods take turns within a round.
    """
    methods = list(memory)
    workers = {m: worker(args, *cell, m) for m in methods}
    times = {m: [] for m in methods}  # seconds per example
    for _ in range(args.rounds + 1):
        for m, (run, n) in workers.items():
            times[m].append(seconds(args, run) / n)
    rows = []
    for m in methods:
        ratio = statistics.median(a / b for a, b in zip(times[m][1:], times["none"][1:], strict=True))
        rows.append({"method": m, "examples_per_s": 1 / statistics.median(times[m][1:]), "time_ratio": ratio,
                     "peak_mib": None if m == "loop" else memory[m],
                     "memory_ratio": None if m == "loop" else memory[m] / memory["none"]})
    return rows


def profile(args, size, tune, batch_size):
    """Milliseconds of book-keeping's parts, fewest of all rounds; the rest is forward and backward."""
    parts = {"gram_squared_norm": "norms from Grams", "per_example": "small gradients formed",
             "squared_norm": "their norms",
             "weighted_product": "sums by product", "weighted_sum": "sums of formed"}
    spent, originals = dict.fromkeys(parts, 0.0), {name: getattr(bookkeeping, name) for name in parts}

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
            setattr(bookkeeping, name, timed(name))
        for _ in range(args.rounds + 1):
            spent.update(dict.fromkeys(parts, 0.0))
            rows.append({"none": seconds(args, plain), "total": seconds(args, run), **spent})
    finally:
        for name in parts:
            setattr(bookkeeping, name, originals[name])
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
    parser.add_argument("--network", choices=UNETS, help="of the paper's, at its own size [its MNIST row]")
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
    if args.network:
        args.sizes = [own_size(args.network)]
    cells = [(s, t, b) for s in args.sizes for t in args.tune for b in args.batches]
    if args.profile:
        for cell in cells:
            profile(args, *cell)
        return 0
    methods = ["none", *(m for m in args.methods if m != "none")]
    memory = {cell: memories(args, cell, methods) for cell in cells}  # before this process has grown

    print(f"torch {torch.__version__}, {args.device}, {args.threads} thread(s), channels-last "
          f"{args.channels_last}, bf16 {args.bf16}; medians of {args.rounds} rounds\n")
    print("| latents | trained | micro-batch | method | examples/s | time / none | peak MiB | memory / none "
          "|")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    for cell in cells:
        for row in compare(args, cell, memory[cell]):
            peak = " | " if row["peak_mib"] is None else f"{row['peak_mib']:.0f} | {row['memory_ratio']:.2f}"
            print(f"| {cell[0]}x{cell[0]} | {cell[1]} | {cell[2]} | {row['method']} | "
                  f"{row['examples_per_s']:.0f} | {row['time_ratio']:.2f} | {peak} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
