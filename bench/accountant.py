"""Time and accuracy of the accountant, the table of docs/speed.md (about 10 s).

    OMP_NUM_THREADS=1 python -m bench.accountant

Measured elsewhere, on other machines, for one epsilon at (q 0.0333, sigma 1.5, 6000 steps): Opacus RDP 0.011
s, dp_accounting RDP 0.020 s, dp_accounting PLD 0.33 s (interval 1e-4), Opacus PRV 0.42 s.  Magnitudes, not
digits.
"""

import time

import accountant
from extensions import pld

# q, sigma, steps, delta and the exact epsilon where two PLD programs (or a closed form) agree on it
CASES = [
    (0.0333, 1.5, 6000, 1e-5, 9.691652578555427),
    (0.01, 1.0, 10000, 1e-5, 6.187713704150723),
    (0.01, 4.0, 10000, 1e-5, 0.9468676308626676),
    (0.001, 0.8, 60000, 1e-6, 2.225025966596803),
    (0.004, 0.6, 1000, 1e-5, 3.6506993568735058),
    (0.2, 3.0, 300, 1e-8, 7.2494776531541865),
    (0.01, 8.0, 500, 1e-6, 0.10310978805765594),
    (1.0, 20.0, 200, 1e-5, 2.943225239801364),
    (0.001, 2.0, 1000000, 1e-5, None),
]


def timed(call):
    """(result, best of three wall times in seconds), caches cleared before each."""
    times = []
    for _ in range(3):
        accountant.log_moment.cache_clear()
        pld._pld_epsilon.cache_clear()
        start = time.perf_counter()
        result = call()
        times.append(time.perf_counter() - start)
    return result, min(times)


def main():
    print("     q sigma   steps delta |  RDP eps      s |  PLD eps      s     gap  above exact | noise PLD "
          "saves")
    for q, sigma, steps, delta, exact in CASES:
        by_rdp, rdp_time = timed(lambda a=(q, sigma, steps, delta): accountant.epsilon(*a))
        (lower, upper), pld_time = timed(lambda a=(q, sigma, steps, delta): pld.pld_epsilon(*a))
        gap, above = (upper - lower) / upper, "-" if exact is None else f"{upper / exact - 1:.1e}"
        # RDP's sigma for the same epsilon
        saved = 1 - sigma / accountant.noise_multiplier(upper, delta, q, steps)
        case = f"{q:6.4g} {sigma:5.3g} {steps:7d} {delta:5.0e}"
        by_pld = f"{upper:8.5f} {pld_time:6.3f} {gap:7.1e} {above:>12}"
        print(f"{case} | {by_rdp:8.5f} {rdp_time:6.3f} | {by_pld} | {saved:15.1%}")
    target = {"epsilon": 10, "delta": 1e-5, "q": 1 / 30, "steps": 6000}
    for method in ("rdp", "pld"):
        sigma, seconds = timed(lambda m=method: accountant.noise_multiplier(**target, method=m))
        print(f"noise_multiplier(10, 1e-5, 1/30, 6000, {method!r}): {sigma:.5f} in {seconds:.3f} s")
    accountant.epsilon(1 / 30, 1.5, 1, 1e-5)
    start = time.perf_counter()
    for step in range(1000, 1100):
        accountant.epsilon(1 / 30, 1.5, step, 1e-5)
    print(f"epsilon so far (rdp), one more step of a run: {10 * (time.perf_counter() - start):.2f} ms")


if __name__ == "__main__":
    main()
