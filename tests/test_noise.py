"""The noise of the mechanism: exact recipe, distribution, tail, where it is used."""
import math
from argparse import Namespace

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import accountant
import dp_sgd
from support import randomness
from support.presets import DIGITS, PRESETS

SECURE, FAST = Namespace(fast_noise=False, insecure_seed=None), Namespace(fast_noise=True)

# 5.768: torch's float32 normals on a CPU, from uniforms of 24 bits
FLOAT32_LIMIT = math.sqrt(48 * math.log(2))


@pytest.fixture
def entropy(monkeypatch):
    """os.urandom made repeatable: call it to start over. entropy.taken counts the bytes."""
    def start(fill=None):
        rng, start.taken = np.random.default_rng(0), 0

        def urandom(n):
            start.taken += n
            return rng.bytes(n) if fill is None else bytes([fill]) * n

        monkeypatch.setattr(dp_sgd.os, "urandom", urandom)

    start()
    return start


def test_normals_are_normal_and_independent(entropy):
    z = dp_sgd.SecureGenerator().normals((401, 999))  # an odd number
    assert z.shape == (401, 999) and z.dtype == torch.float64
    z = z.flatten().numpy()
    n = len(z)
    assert stats.kstest(z[:dp_sgd.CHUNK], "norm").pvalue > 1e-3  # one chunk, and all of them
    assert (
        stats.kstest(z, "norm").pvalue > 1e-3
        and abs(z.mean()) < 4 / n**0.5
        and abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    )
    half = dp_sgd.CHUNK // 2
    # neighbours; cosine and sine of the same four pairs
    for a, b in ((z[1:], z[:-1]), (z[half:], z[:-half])):
        for f in (lambda v: v, np.square):
            assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 5 / len(a) ** 0.5


def test_every_normal_takes_four_pairs_and_none_is_wasted(entropy):
    g = dp_sgd.SecureGenerator()
    z = g.normals((6,)).numpy()
    assert entropy.taken == 3 * 8 * 8  # two normals from eight uniforms of eight bytes
    entropy()
    u = np.array([int.from_bytes(dp_sgd.os.urandom(8), "little") >> 11
                  for _ in range(24)]).reshape(2, 4, 3) / 2 ** 53
    polar = np.sqrt(-2 * np.log(u[0])) * np.exp(2j * np.pi * u[1])  # Box-Muller as one complex number
    expected = polar.sum(0) / 2
    assert np.allclose(z, [*expected.real, *expected.imag], rtol=1e-12)
    assert g.normals((0,)).shape == (0,) and g.normals(()).shape == ()
    for fill in (0, 255):
        entropy(fill)
        assert g.normals((4,)).isfinite().all() and (g.uniforms(4) >= 0).all() and (g.uniforms(4) < 1).all()


def test_noise_is_added_in_double_and_rounded_once(entropy):
    sums, C, sigma, B = [torch.full((1000,), 1.1), torch.zeros(3, 5)], 0.5, 3.0, 7.0
    noisy = dp_sgd.privatise(sums, C, sigma, B, dp_sgd.SecureGenerator())
    entropy()
    g = dp_sgd.SecureGenerator()
    for s, got in zip(sums, noisy, strict=True):
        z = g.normals(s.shape)
        exact = s.double() + sigma * C * z
        grid = 2.0 ** -15  # 1.5 lies between 1 and 2: 2^1 / 2^16
        assert got.dtype == torch.float32 and torch.equal(got, ((exact / grid).round() * grid).float() / B)
        assert float((got * B - exact).abs().max()) <= grid / 2 + 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_low_bit_of_the_noise_tells_which_sum_it_was(dtype, monkeypatch):
    """Near 0 the noise has few bits, and a float32 that is near 0 would show all of them."""
    normals = dp_sgd.SecureGenerator.normals
    monkeypatch.setattr(dp_sgd.SecureGenerator, "normals", lambda g, *args: normals(g, *args) * 2.0 ** -20)
    for value in (0.0, 2e-5, 0.37, 1234.5):
        s = torch.full((2000,), value, dtype=dtype)
        noisy, = dp_sgd.privatise([s], 0.5, 3.0, 1.0, None)
        multiples = noisy.double() * 2 ** 15  # the deviation is 1.5, so the grid 2^1 / 2^16
        assert torch.equal(multiples, multiples.round())
    got, = dp_sgd.privatise([torch.full((5,), 2e-5)], 0.5, 0.0, 1.0, None)
    assert torch.equal(got, torch.full((5,), 2e-5))  # without noise nothing is rounded


def test_only_what_is_below_the_threshold_is_drawn_anew_and_its_angle_stays(monkeypatch):
    """Of two normals one has radii below 2^-32, one has radii at it; all angles are an eighth of a turn."""
    words = np.zeros((2, 4, 2), dtype=np.uint64)
    words[0, :, 0], words[0, :, 1], words[1] = 2 ** 21 - 1, 2 ** 21, 2 ** 50

    def urandom(size):
        if size == 8 * words.size:
            return (words << np.uint64(11)).tobytes()
        assert size == 8 * 4  # the four that were below
        return np.full(4, 2 ** 52 << 11, dtype=np.uint64).tobytes()

    monkeypatch.setattr(dp_sgd.os, "urandom", urandom)
    a, b = (2 * math.sqrt(math.log(2) * bits) for bits in (33, 32))  # times cos = sin = sqrt(1/2)
    assert np.allclose(dp_sgd.SecureGenerator().normals((4,)).numpy(), [a, b, a, b], rtol=1e-12)


def test_the_engine_and_the_sampler_draw_from_it_alone(entropy, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("an ordinary generator was used")

    for name in ("randn", "rand"):
        monkeypatch.setattr(torch, name, forbidden)
    model, C, sigma, B = nn.Linear(200, 100), 0.5, 2.0, 4.0
    before = model.weight.detach().clone()
    dp_sgd.DPSGD(model, C, sigma, B).step(torch.optim.SGD(model.parameters(), lr=1.0))
    moved = (model.weight.detach() - before).double().flatten() / (sigma * C / B)
    assert abs(float(moved.std()) - 1) < 4 / (2 * moved.numel()) ** 0.5
    sizes = np.array([len(dp_sgd.poisson_sample(500, 0.3)) for _ in range(400)])
    assert (
        abs(sizes.mean() - 150) < 4 * (500 * 0.21 / 400) ** 0.5
        and abs(sizes.std() / (500 * 0.21) ** 0.5 - 1) < 0.15
    )
    assert dp_sgd.poisson_sample(4, 1.0).tolist() == [0, 1, 2,
                                                      3] and dp_sgd.poisson_sample(0, 0.5).tolist() == []


# ------------------------------------------------------------------------------------------------------- tail


def one_step(generator, dtype=torch.float32, n=64, C=0.5, sigma=0.5):
    """A step of the real engine without any example -> the noise alone, in standard deviations (n,)."""
    model = nn.Linear(n, 1, bias=False, dtype=dtype)
    gradients = []
    optimizer = Namespace(step=lambda: gradients.append(model.weight.grad))
    dp_sgd.DPSGD(model, C, sigma, 1.0, generator=generator).step(optimizer)
    return gradients[0].double().flatten() / (sigma * C * (1 + dp_sgd.ROUNDING))


def test_outputs_beyond_float32_s_last_normal_are_possible_without_an_example(monkeypatch):
    """The event that gave examples away, output > 5.768 sigma C: 8e-5 with the example at sigma 0.5.

    The sampler's own map is inverted: four radii of 2.95, each of which one draw in 77 exceeds, all with
    angle 0.
    """
    u, real = math.exp(-2.95 ** 2 / 2), dp_sgd.os.urandom

    def urandom(n):
        words = np.frombuffer(real(n), dtype=np.uint64).copy().reshape(2, 4, -1)
        words[0, :, 0], words[1, :, 0] = int(u * 2 ** 53) << 11, 0  # the first normal of the chunk
        return words.tobytes()

    monkeypatch.setattr(dp_sgd.os, "urandom", urandom)
    noise = one_step(None)
    assert float(noise[0]) == pytest.approx(2 * 2.95, abs=2e-5) and float(noise[0]) > FLOAT32_LIMIT


@pytest.fixture
def refined(monkeypatch):
    """First uniforms that are all 0, so that all radii are drawn anew below 2^-32 and all angles are 0.

    The words of refined.bits come next, 53 bits each; then real ones.
    """
    real = dp_sgd.os.urandom

    def set_up(n, bits=()):
        first, bits = 8 * 8 * ((n + 1) // 2), list(bits)

        def urandom(size):
            if size == first:
                return bytes(size)
            return np.full(size // 8, bits.pop(0) << 11, dtype=np.uint64).tobytes() if bits else real(size)

        monkeypatch.setattr(dp_sgd.os, "urandom", urandom)

    return set_up


def test_the_tail_goes_on_far_beyond_the_reach(refined):
    """The radius sqrt(-2 ln u), as -log2(u) grows; four of them, halved, are one normal."""
    half, most = 2 ** 52, 2 ** 53 - 1
    for bits, exponent in (([half], 33), ([most, half], 65), ([most] * 30, 30 * 32 + 53)):
        refined(1, bits)
        normal = float(dp_sgd.SecureGenerator().normals((1,)))
        assert normal == pytest.approx(2 * math.sqrt(2 * exponent * math.log(2)), rel=1e-12)
    assert 74.9 < normal < 75 and normal > dp_sgd.SecureGenerator.reach
    refined(1, [most] * 30)
    assert float(one_step(None, n=1)) == pytest.approx(normal, rel=1e-6)


def test_what_is_drawn_anew_is_distributed_as_the_tail_that_it_replaces(refined):
    """Given u < 2^-32, -ln u is 32 ln 2 plus a standard exponential."""
    refined(8000)
    found = dp_sgd.SecureGenerator().normals((8000,))[:4000]
    exponentials = np.random.default_rng(0).exponential(size=(4, 100_000))
    expected = np.sqrt(2 * (32 * math.log(2) + exponentials)).sum(0) / 2
    assert stats.ks_2samp(found.numpy(), expected).pvalue > 1e-6
    assert abs(float(found.mean()) - expected.mean()) < 6 * expected.std() / len(found) ** 0.5


@pytest.mark.parametrize("draws, bits, reach", [(4, 30 * 32 + 53, dp_sgd.SecureGenerator.reach),
                                                (1, 53, randomness.reach(FAST))])
def test_the_density_within_reach_is_a_normal_s(draws, bits, reach):
    """Of a normal z made from several draws: how likely is one that misses, as no radius goes so far?

    Given z each draw is z / sqrt(draws), with variance 1 - 1 / draws. Its other coordinate, y, is a normal.
    """
    radius = math.sqrt(2 * bits * math.log(2))
    y, step = np.linspace(-radius, radius, 40_001, retstep=True)
    room = np.sqrt(np.maximum(radius ** 2 - y ** 2, 0)) - reach / math.sqrt(draws)
    misses = stats.norm.sf(room / math.sqrt(1 - 1 / draws)) if draws > 1 else room < 0
    assert draws * ((misses * stats.norm.pdf(y)).sum() * step + 2 * stats.norm.sf(radius)) < 1e-3


def test_fast_noise_is_drawn_in_float64_as_well(monkeypatch):
    asked, randn = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *args,
                        **kwargs: asked.append(kwargs["dtype"]) or randn(*args, **kwargs))
    noise = one_step(randomness.fresh_generator(), n=10_000)
    assert asked == [torch.float64] and stats.kstest(noise.numpy(), "norm").pvalue > 1e-6
    z = randn(16_000, dtype=torch.float64, generator=randomness.fresh_generator()).view(-1, 2, 8)
    # Box-Muller inverted: the uniforms; whole numbers if of 24 bits
    grid = torch.exp(-z.square().sum(1) / 2) * 2 ** 24
    assert float((grid - grid.round()).abs().median()) > 0.2


SIZES = {"mnist10k": 8_000, "mnist": 60_000, "fashion": 60_000, "cifar10": 50_000, "celeba": 162_770,
         "faces": 5_000}


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_reaches_beyond_its_noise(preset):
    """T q P(N > reach - 1/sigma), 1 image and 20: what truncated normals add to the accountant's delta."""
    s = DIGITS | PRESETS[preset]
    n = s["private_n"] or SIZES[s["private"]]
    q, steps, delta = s["batch_size"] / n, s["steps"], s["delta"]
    for epsilon in (10.0, 1.0):
        sigma = accountant.noise_multiplier(epsilon, delta, q, steps, s["accountant"])  # what a run takes
        for k in (1, 20):
            assert randomness.beyond_the_noise(randomness.reach(SECURE), q, sigma, steps, k) < 1e-3 * delta
        if preset != "celeba256-text":  # at epsilon 10 its noise is too little for --fast-noise: refused
            assert randomness.beyond_the_noise(randomness.reach(FAST), q, sigma, steps) < 1e-3 * delta


def test_the_bound_sees_what_float32_noise_cost(monkeypatch):
    """Published lower bounds on delta with float32 noise: default 1.2e-5 of 1e-5, celeba64 2.4e-5 of 1e-6."""
    monkeypatch.setattr(dp_sgd.SecureGenerator, "reach", FLOAT32_LIMIT)
    reach, s = randomness.reach(SECURE), DIGITS | PRESETS["celeba64"]
    q = s["batch_size"] / SIZES["celeba"]
    sigma = accountant.noise_multiplier(s["epsilon"], s["delta"], q, s["steps"], "pld")
    assert randomness.beyond_the_noise(reach, q, sigma, s["steps"]) > s["delta"]
    once = stats.norm.sf(FLOAT32_LIMIT - 2)
    assert randomness.beyond_the_noise(reach, 1.0, 0.5, 1) == pytest.approx(once, rel=1e-9)
    assert randomness.beyond_the_noise(reach, 0.3, 0.0, 1) == 1
    pair = 2 * 0.3 * 0.7 * stats.norm.sf(FLOAT32_LIMIT - 2) + 0.09 * stats.norm.sf(FLOAT32_LIMIT - 4)
    assert randomness.beyond_the_noise(reach, 0.3, 0.5, 7, 2) == pytest.approx(7 * pair, rel=1e-9)
