"""What cryptographic noise costs: CPU time per step to draw and add it, by the number of tuned parameters.

    python -m bench.noise [--parameters 401248] [--rounds 7]

One step draws one normal per tuned parameter, whatever the batch size; 401,248 is the default run's. Process
CPU time, median over the rounds after the first, the two generators taking turns; the Poisson draw for 8,000
images is timed as well.
"""
import argparse
import statistics
import time

import torch

import dp_sgd
from support import command_line, randomness


def main(argv=None):
    parser = argparse.ArgumentParser(description="Cost of the secure noise generator per private step.")
    parser.add_argument("--parameters", type=int, default=401_248,
                        help="tuned parameters [401,248, the default run]")
    parser.add_argument("--rounds", type=int, default=7, help="repeats, of which the median counts [7]")
    args = parser.parse_args(argv)
    if args.parameters < 1 or args.rounds < 1:
        raise ValueError("--parameters and --rounds must be at least 1")
    sums = [torch.zeros(args.parameters)]
    generators = {"secure": dp_sgd.SecureGenerator(), "fast": randomness.fresh_generator()}
    work = {"noise": lambda g: dp_sgd.privatise(sums, 0.1, 1.5, 4000, g),
            "sample": lambda g: dp_sgd.poisson_sample(8000, 0.5, g)}
    seconds = {(name, what): [] for name in generators for what in work}
    for _ in range(args.rounds + 1):
        for (name, what), times in seconds.items():
            start = time.process_time()
            work[what](generators[name])
            times.append(time.process_time() - start)
    print(f"{args.parameters:,} parameters, {torch.get_num_threads()} threads, CPU milliseconds per step")
    for name in generators:
        noise, draw = (1000 * statistics.median(seconds[name, what][1:]) for what in work)
        print(f"{name:8} noise {noise:8.2f}   Poisson draw of 8,000 {draw:6.3f}")


if __name__ == "__main__":
    command_line.run_cli(main)
