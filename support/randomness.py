"""The generators of the private stage, and how far out their noise is normal.

`dp_sgd.SecureGenerator` is the default for noise and batches. This file adds torch generators for three uses:
--fast-noise, --insecure-seed, and the draws of the diffusion loss. The draws stay unknown too (`Randomness`),
but no release shows a bit of them, so an ordinary generator with a full random state is enough.
"""
import math
import os
from typing import NamedTuple

import torch

import dp_sgd
from support.team import rank


class Randomness(NamedTuple):
    """Generators of the private stage. Except with --insecure-seed, their seeds are unknown and never saved.

    sampling   which images enter a batch; the accountant assumes that nobody can guess it
    noise      the noise of DP-SGD; whoever can compute it can subtract it
    diffusion  timesteps and noise of the diffusion loss. They are drawn in the order of the batch, so one
               more example shifts the draws of those after it. For an attacker who knew the stream the sum
               would move by more than C. For one who does not, the draws are random as before.
    """

    sampling: object
    noise: object
    diffusion: torch.Generator


def generators(s):
    """`Randomness` from the operating system, except with --fast-noise and --insecure-seed."""
    sampling = noise = dp_sgd.SecureGenerator()
    draws = fresh_generator(s.device)
    if s.fast_noise:
        sampling, noise = fresh_generator(), fresh_generator(s.device)
    if s.insecure_seed is not None:  # for debugging: NOT private; two seeds per process
        sampling = torch.Generator().manual_seed(s.insecure_seed + 1 + 2 * rank())
        noise = draws = torch.Generator(s.device).manual_seed(s.insecure_seed + 2 * rank())
    return Randomness(sampling, noise, draws)


def can_be_computed(facts):
    """Whether the noise of a run can be computed, by its privacy.json or settings.json, a dict.

    Older versions said secure_noise where today's say fast_noise. The oldest said neither, and had torch's
    generator.
    """
    return bool(facts["fast_noise"]) if "fast_noise" in facts else facts.get("secure_noise") is not True


def fresh_generator(device="cpu"):
    """A torch.Generator with an unknown seed, for the draws of the loss, or for --fast-noise."""
    generator = torch.Generator(device).manual_seed(int.from_bytes(os.urandom(8), "little"))
    if generator.device.type == "cpu":
        # manual_seed keeps 32 bits of a seed, few enough to try them all. So the whole state is filled. Its
        # bytes: seed (8), left (4), seeded (4), next (8), then 624 words of 32 bits, each in 8 bytes.
        state = generator.get_state()
        words = torch.frombuffer(bytearray(os.urandom(624 * 4)), dtype=torch.int32).to(torch.int64)
        state[24:24 + 624 * 8] = (words & 0xFFFFFFFF).view(torch.uint8)
        generator.set_state(state)
    return generator


def reach(s):
    """Up to how many standard deviations the noise of `dp_sgd.privatise` has a normal's density.

    Further out the density falls below it, and then to 0. Up to here it misses less than a thousandth.
    SecureGenerator adds four draws, of radius 37.47 at most. Of a normal z each holds z/2, give or take 0.87:
    that is 32 for z = 64, six deviations from the end. torch's float64 normals are single draws, of radius
    8.57: 7.9^2 + 3.3^2 = 8.57^2, and a normal exceeds 3.3 with a probability of a thousandth. (This is the
    average over a thousandth of a deviation: so far out a single draw takes few values.)
    """
    return 7.9 if s.fast_noise or s.insecure_seed is not None else dp_sgd.SecureGenerator.reach


def beyond_the_noise(limit, q, sigma, steps, k=1):
    """Bound on the probability that k examples push an output further than the reach of the noise.

    Such an output tells more of the examples than the accountant knows. So the result, in [0, 1], must be far
    below delta. In each step the number j of these examples in the batch is Binomial(k, q). They move the sum
    by at most j clip norms, which is j / sigma standard deviations of the noise. A normal above
    reach - j / sigma then suffices, where the whole shift is in one coordinate. 1 if sigma is 0.
    """
    if sigma == 0:
        return 1.0
    total = 0.0
    for j in range(1, k + 1):
        present = math.comb(k, j) * q ** j * (1 - q) ** (k - j)
        total += present * 0.5 * math.erfc((limit - j / sigma) / math.sqrt(2))
    return min(1.0, steps * total)
