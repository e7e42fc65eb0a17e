"""Why the noise is cryptographic: with torch's own generator it follows from the release.

One private step with Adam moves every weight by the learning rate, up or down: the release shows the sign of
each noisy gradient, and where a weight has no gradient, the sign of its noise. The Mersenne twister is linear
over GF(2): each bit of its outputs, also when only every 32nd output is seen, obeys one linear recurrence of
length 19,937. Signs of noise are such bits. Berlekamp and Massey's algorithm finds the recurrence from twice
as many signs, and then the noise of all further weights has no secret sign, theirs included that hold the
example.

The attack on a default run of this program, whose 42,688 weights without a gradient were too few for that,
solved the 27,968 linear equations for the state itself instead, and got back all noise values bit for bit.
Both ways end at a cryptographic generator, and such weights are not trained now (`tuning.without_gradient`).
"""
import math

import torch
from torch import nn

import dp_sgd
from support import randomness

LENGTH = 19_937  # bits of state of the Mersenne twister
LEARNED, PREDICTED = 2 * LENGTH + 64, 512


def signs_of_a_release(generator):
    """A step of the real engine on one example -> what all see: is block i's noise negative? (blocks,) bool.

    The weights are blocks of 16, as torch's float64 normals are made from uniforms: number 8 of a block is
    radius * sin(2 pi u), negative where the first bit of u is 1. The example trains the last block, all
    others see noise. In about every second release the grid of `privatise` makes some noisy sum 0, which has
    no sign. One wrong sign would hide the recurrence, so the attacker waits for a release without any.
    """
    blocks = LEARNED + PREDICTED
    model = nn.Embedding(blocks, 16)
    public = model.weight.detach().clone()
    engine = dp_sgd.DPSGD(model, 1.0, 1.0, 1.0, generator=generator)
    engine.accumulate(lambda m, token: m(token).sum(-1), torch.tensor([blocks - 1]))
    engine.step(torch.optim.Adam(engine.parameters, lr=1e-3))
    step = (model.weight.detach() - public)[:, 8]  # goes against the gradient
    return step > 0 if step.all() else signs_of_a_release(generator)


def shortest_recurrence(bits):
    """Berlekamp and Massey (1969) over GF(2): (length L, coefficients as bits of an int: k for k-th last)."""
    connection, previous, length, since, window = 1, 1, 0, 1, 0
    for n, bit in enumerate(bits):
        window = window << 1 | bit  # bit k: the k-th last one
        if (connection & window).bit_count() % 2 == 0:  # the recurrence foretold this bit
            since += 1
        elif 2 * length <= n:
            connection, previous, length, since = (
                connection ^ previous << since, connection, n + 1 - length, 1
            )
        else:
            connection, since = connection ^ previous << since, since + 1
    return length, connection


def right_predictions(signs):
    """(length of the recurrence in the first LEARNED signs, share of the other signs that it foretells)."""
    bits = signs.int().tolist()
    length, connection = shortest_recurrence(bits[:LEARNED])
    right, window = 0, int("".join(map(str, bits[:LEARNED])), 2)
    for bit in bits[LEARNED:]:
        guess = (connection >> 1 & window).bit_count() % 2
        right += guess == bit
        window = window << 1 | bit
    return length, right / PREDICTED


def test_fast_noise_is_foretold():
    length, right = right_predictions(signs_of_a_release(randomness.fresh_generator()))
    assert length == LENGTH and right >= 1 - 1 / PREDICTED  # but for the block in which the example stands


def test_the_default_noise_is_not():
    length, right = right_predictions(signs_of_a_release(None))
    assert abs(length - LEARNED / 2) < 20  # as of coin flips: no recurrence shorter than half of them
    assert abs(right - 0.5) < 5 / (2 * math.sqrt(PREDICTED))
