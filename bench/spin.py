"""How long OpenMP's idle threads should spin: `python -m bench.spin [--seconds 6] [--rounds 3]`.

Examples per second of a step of each stage of the default run, with as many threads as the machine has cores:
one program alone, and each of two programs side by side. The values of GOMP_SPINCOUNT take turns, in
opposite order in every second round; the median of the rounds counts. Run it on a machine without other work.
It is why `support/threads.py` asks for the spin that it does.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import time

STAGES = ("autoencoder", "diffusion", "private")


def measure(seconds):
    """Examples per second {stage: rate} in this process, with the spin that its environment names."""
    import torch

    from bench import layout
    from support import presets
    rates = {}
    made = [build(presets.DIGITS, torch.contiguous_format)
            for build in (layout.autoencoder_steps, layout.unet_steps)]
    for n, steps in made:
        for stage in STAGES:
            if stage in steps:
                steps[stage]()  # the first one is slow
                done, begin = 0, time.perf_counter()
                while time.perf_counter() - begin < seconds:
                    steps[stage]()
                    done += n
                rates[stage] = done / (time.perf_counter() - begin)
    return rates


def start(spin, seconds):
    """A program of its own with this spin; "not set" leaves OpenMP its default."""
    environment = {key: value for key, value in os.environ.items()
                   if key not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    # threads.py would set its own value; an empty one counts as set, and OpenMP takes no notice of it
    environment["GOMP_SPINCOUNT"] = "" if spin == "not set" else spin
    return subprocess.Popen([sys.executable, "-m", "bench.spin", "--child", "--seconds", str(seconds)],
                            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)


def main():
    parser = argparse.ArgumentParser(prog="bench.spin", description=__doc__.splitlines()[0])
    parser.add_argument("spins", nargs="*", default=["not set", "1000", "10000", "100000"], metavar="SPIN",
                        help="values of GOMP_SPINCOUNT, or 'not set'")
    parser.add_argument("--seconds", type=float, default=6, help="for each stage [6]")
    parser.add_argument("--rounds", type=int, default=3, help="[3]")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(measure(args.seconds)))
    found = {}
    for number in range(args.rounds):
        for spin in args.spins[::1 if number % 2 == 0 else -1]:
            for programs in (1, 2):
                running = [start(spin, args.seconds) for _ in range(programs)]
                rates = [json.loads(child.communicate()[0]) for child in running]
                for stage in STAGES:
                    mean = statistics.mean(rate[stage] for rate in rates)
                    found.setdefault((spin, programs, stage), []).append(mean)
    print("| GOMP_SPINCOUNT | " + " | ".join(f"{stage}, {how}" for how in ("alone", "one of two")
                                             for stage in STAGES) + " |")
    print("|---" * (1 + 2 * len(STAGES)) + "|")
    for spin in args.spins:
        print(f"| {spin} | " + " | ".join(f"{statistics.median(found[spin, programs, stage]):,.0f}"
                                         for programs in (1, 2) for stage in STAGES) + " |")
    return None


if __name__ == "__main__":
    main()
