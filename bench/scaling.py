"""Examples per second of the private step by one process and by several (gloo): python -m bench.scaling

    python -m bench.scaling [--processes 1 2] [--batch 2000] [--micro-batch 256] [--steps 5]

The networks are those of the preset `digits`, on random latents. A step is what train.py does: every process
samples its shard, accumulates, the sums go to rank 0, which adds the noise and hands out the parameters.
Every process has one thread, so OMP_NUM_THREADS=1 for one process and two of them compare one core with two;
more processes than cores only share them. The clock runs from the second step to the end of the slowest
process.
"""
import argparse
import multiprocessing
import os
import socket
import sys
import time
from functools import partial

import torch
import torch.distributed as dist

import diffusion
import dp_sgd
import tuning
import unet
from extensions.bookkeeping import bookkeeping
from support import presets, team


def worker(number, world, port, args, results):
    os.environ.update(RANK=str(number), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    team.join()
    torch.manual_seed(0)
    config = presets.DIGITS["unet"]
    model = unet.LatentModel(unet.UNet(config), unet.ClassEmbedder(10, config.context_dim))
    tuning.select_trainable(model)
    n, q = 4 * args.batch, 1 / 4
    latents, labels = team.shard(torch.randn(n, 1, config.in_channels, 4,
                                             4)), team.shard(torch.arange(n) % 10)
    engine = dp_sgd.DPSGD(model, 0.1, 1.0, args.batch, method=bookkeeping)
    optimizer = torch.optim.Adam(engine.parameters, 1e-3)
    schedule = presets.DIGITS["schedule"]
    loss_fn = partial(diffusion.loss, schedule=schedule)
    examples, spent = 0, []
    for step in range(args.steps + 1):
        if step == 1:
            team.from_rank0(None)
            begin = time.perf_counter()
        computed = time.perf_counter()
        for part in dp_sgd.poisson_sample(len(latents), q).split(args.micro_batch):
            engine.accumulate(loss_fn, *diffusion.draw(latents[part], labels[part], 1, None, schedule))
        computed = time.perf_counter() - computed
        if world > 1:
            team.reduce_sums(engine)
        if number == 0:
            engine.step(optimizer)
        if world > 1:
            team.broadcast(engine.parameters)
        if step:
            examples, spent = examples + engine.last["examples"], [*spent, computed]
    team.from_rank0(None)
    seconds = time.perf_counter() - begin
    if number == 0:
        results.put((examples / seconds, 1 - sum(spent) / seconds))
    if dist.is_initialized():
        dist.destroy_process_group()


def measure(world, args):
    """(examples per second, share of rank 0's time that is no gradient: noise, optimizer, waiting)."""
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    results = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(number, world, port, args, results))
                 for number in range(world)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise SystemExit("bench.scaling: a process failed")
    return results.get()


def main():
    parser = argparse.ArgumentParser(prog="bench.scaling", description=__doc__.splitlines()[0])
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="numbers of processes (1 2)")
    parser.add_argument("--batch", type=int, default=2000,
                        help="expected batch size of all processes together (2000)")
    parser.add_argument("--micro-batch", type=int, default=256, help="examples at a time in a process (256)")
    parser.add_argument("--steps", type=int, default=5, help="timed steps after one to warm up (5)")
    args = parser.parse_args()
    if min(*args.processes, args.batch, args.micro_batch, args.steps) < 1:
        parser.error("all numbers must be at least 1")
    print(f"torch {torch.__version__}, one thread per process, {os.cpu_count()} cores, B {args.batch}\n")
    print("| processes | examples/s | speed-up | rank 0 not computing gradients |\n|---|---|---|---|",
          flush=True)
    first = None
    for world in args.processes:
        rate, rest = measure(world, args)
        first = first or rate
        print(f"| {world} | {rate:.0f} | {rate / first:.2f} | {rest:.0%} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
