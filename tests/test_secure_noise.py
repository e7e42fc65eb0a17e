"""The generator behind --secure-noise: exact recipe, distribution, where it is used (`pytest tests/test_secure_noise.py`)."""
import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import dp_sgd


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
    assert stats.kstest(z, "norm").pvalue > 1e-3 and abs(z.mean()) < 4 / n ** 0.5 and abs(z.std() - 1) < 4 / (2 * n) ** 0.5
    half = (n + 1) // 2
    for a, b in ((z[1:], z[:-1]), (z[half:], z[:n - half])):  # neighbours; cosine and sine of the same four pairs
        for f in (lambda v: v, np.square):
            assert abs(np.corrcoef(f(a), f(b))[0, 1]) < 5 / len(a) ** 0.5


def test_every_normal_takes_four_pairs_and_none_is_wasted(entropy):
    g = dp_sgd.SecureGenerator()
    z = g.normals((6,)).numpy()
    assert entropy.taken == 3 * 8 * 8  # two normals from eight uniforms of eight bytes
    entropy()
    u = np.array([int.from_bytes(dp_sgd.os.urandom(8), "little") >> 11 for _ in range(24)]).reshape(2, 4, 3) / 2 ** 53
    polar = np.sqrt(-2 * np.log(1 - u[0])) * np.exp(2j * np.pi * u[1])  # Box-Muller as one complex number
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
        assert got.dtype == torch.float32 and torch.equal(got, (s.double() + sigma * C * z).float() / B)
    entropy()
    z = sigma * C * dp_sgd.SecureGenerator().normals((1000,))
    assert not torch.equal(sums[0] + z.float(), (sums[0].double() + z).float())  # noise rounded first is another number


def test_the_engine_and_the_sampler_draw_from_it_alone(entropy, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("an ordinary generator was used")

    for name in ("randn", "rand"):
        monkeypatch.setattr(torch, name, forbidden)
    model, C, sigma, B = nn.Linear(200, 100), 0.5, 2.0, 4.0
    g = dp_sgd.SecureGenerator()
    before = model.weight.detach().clone()
    dp_sgd.DPSGD(model, C, sigma, B, generator=g).step(torch.optim.SGD(model.parameters(), lr=1.0))
    moved = (model.weight.detach() - before).double().flatten() / (sigma * C / B)
    assert abs(float(moved.std()) - 1) < 4 / (2 * moved.numel()) ** 0.5
    sizes = np.array([len(dp_sgd.poisson_sample(500, 0.3, g)) for _ in range(400)])
    assert abs(sizes.mean() - 150) < 4 * (500 * 0.21 / 400) ** 0.5 and abs(sizes.std() / (500 * 0.21) ** 0.5 - 1) < 0.15
    assert dp_sgd.poisson_sample(4, 1.0, g).tolist() == [0, 1, 2, 3] and dp_sgd.poisson_sample(0, 0.5, g).tolist() == []


def test_two_of_them_share_nothing():
    a, b = (dp_sgd.SecureGenerator().normals((10,)) for _ in range(2))
    assert not torch.equal(a, b)
