"""accountant.py against closed forms, the definition integrated here, reference values, simulation (15 s)."""
import json
import math
import time
import warnings
from decimal import Decimal, localcontext

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.special import gammaln, logsumexp, ndtr, ndtri, xlog1py
from scipy.stats import binom, norm

import accountant
from extensions import pld
from support import calculator, command_line, files, rounding

# T-fold Poisson-subsampled Gaussian: q, sigma, steps, delta, exact epsilon (two PLD programs agreeing to
# 5e-6, or a closed form), epsilon of a perfect RDP accountant, its order.
EPSILON = [
    (0.01, 1.0, 10000, 1e-5, 6.187713704150723, 6.712271762509994, 4.135065062637973),
    (0.01, 4.0, 10000, 1e-5, 0.9468676308626676, 1.0353840019440974, 17.219882225772615),
    (0.001, 0.8, 60000, 1e-6, 2.225025966596803, 2.568689639877746, 7.729376750777652),
    (0.0333, 1.5, 6000, 1e-5, 9.691652578555427, 10.437419183830759, 3.2468226089510126),
    (0.0683, 2.0, 2200, 1e-5, 8.36219123253971, 9.01869570550743, 3.5244082692288687),
    (1.0, 5.0, 1, 1e-5, 0.7255217508577958, 0.7943147742740684, 21.545968849052617),
    (1.0, 20.0, 200, 1e-5, 2.943225239801364, 3.188971158883006, 7.177994938193768),
    (0.004, 0.6, 1000, 1e-5, 3.6506993568735058, 4.579629434977679, 3.5958290676539573),
    (0.2, 3.0, 300, 1e-8, 7.2494776531541865, 7.663888732604812, 5.459483611066377),
    (0.04, 1.0, 750, 1e-5, 7.2661823286804825, 7.9894623631761705, 3.445086370382531),
    (1 / 30, 5.0, 6000, 1e-5, 2.099176240339383, 2.2819525145446997, 9.176421351514907),
    (0.01, 8.0, 500, 1e-6, 0.10310978805765594, 0.11284868265652839, 147.23616330454084)]
ALPHAS = [1.25, 1.5, 2, 2.5, 3, 4, 7.3, 16, 32, 64, 256]
RDP = {  # one step at ALPHAS, 70-digit quadrature of the definition, the larger direction
    (0.01, 1.0): [
        0.00010539800509817623, 0.00012725374332744983, 0.00017181342207454794, 0.00021757533228188047,
        0.00026463757458466134, 0.0003631540489107567, 0.0007584451070574613, 3.0878507836962448,
        11.246275937048068, 27.32173187455178, 123.37677032308646],
    (0.1, 2.0): [
        0.0017376548494981814, 0.0020989345957101767, 0.002836228266263623, 0.0035940771994132283,
        0.004373658348577059, 0.006003282964489649, 0.012204206046469148, 0.045291839083621964,
        1.6272023010194359, 5.660867258415199, 29.688385161543234],
    (0.5, 5.0): [
        0.006296759008076031, 0.0075750621768063365, 0.010150997399574098, 0.01275302543498481,
        0.015381536839590202, 0.02071960305344124, 0.03913957860647934, 0.09444635581299195,
        0.2293931405608046, 0.66339328189197, 4.4241719178133225]}
# q, sigma, alpha, 50-digit quadrature: corners where float64 loses its digits if the code is careless
HARD = [
    (1e-05, 100.0, 1.01, 5.050252503416736e-15),
    (1e-05, 0.3, 1.01, 5.991892621995651e-07),
    (1e-05, 100.0, 999.5, 4.997754868957092e-12),
    (0.5, 5.0, 2.5, 0.01275302543498481),
    (0.3, 30.0, 777.7, 0.04793225122495489),
    (0.999, 0.3, 2.5, 13.88722138842931),
    (0.001, 1.0, 20.3, 2.8843343013620837)]
NOISE = [  # epsilon, delta, q, steps, exact sigma, sigma of a perfect RDP accountant
    (10, 1e-5, 1 / 30, 6000, 1.4708455664601252, 1.5444788898008395),
    (1, 1e-5, 1 / 30, 6000, 9.679061936403649, 10.49270064215043),
    (10, 1e-6, 0.05032868464704798, 1391, 1.2471787165366506, 1.302498179936951),
    (5, 1e-5, 0.01, 10000, 1.1240835513147007, 1.1792901401662146)]


# ---- independent oracles -----------------------------------------------------------------------------------


def renyi(q, sigma, alpha, added=False):
    """The definition, log(integral of P^alpha Q^(1-alpha)) / (alpha - 1), by adaptive quadrature."""

    def integrand(x):
        log_q = norm.logpdf(x, 0, sigma)
        log_p = np.logaddexp(math.log1p(-q) + log_q, math.log(q) + norm.logpdf(x, 1, sigma))
        a, b = (log_q, log_p) if added else (log_p, log_q)
        return math.exp(alpha * a + (1 - alpha) * b)

    edges = [-alpha - 12 * sigma, -4 * sigma, 0, 4 * sigma, alpha, alpha + 12 * sigma]
    parts = [quad(integrand, a, b, epsabs=0, epsrel=1e-11, limit=500)[0]
             for a, b in zip(edges, edges[1:], strict=False)]
    return math.log(sum(parts)) / (alpha - 1)


def exact_delta(groups, eps, theta, added):
    """delta(eps) = integral of M(s) e^{-s eps} / (s(s+1)) ds / (2 pi i) over Re s = theta; M(s) = E[e^{sY}].

    The inverse Laplace transform of the definition: no grid of losses, nothing shared with the FFT."""
    scale = math.sqrt(sum(t * q * q * math.expm1(1 / sigma**2) for (q, sigma), t in groups))
    w = (np.arange(3000) + 0.5) * 0.01 / min(scale, 1.0)
    log_m, base = np.zeros(len(w), complex), 0.0
    for (q, sigma), t in groups:
        step = min(0.05, sigma / 30)
        z = np.arange(-12 - (theta + 1) / sigma * added, 13 + (theta + 1) / sigma * (not added), step)
        loss = np.log1p(q * np.expm1((2 * z * sigma - 1) / (2 * sigma**2)))
        p = (np.exp(-z * z / 2 + (-theta * loss if added else (theta + 1) * loss))
             * step / math.sqrt(2 * math.pi))
        base += t * math.log(p.sum())
        keep = p > 1e-22 * p.sum()
        p, loss = p[keep] / p.sum(), loss[keep] * (-1 if added else 1)
        log_m += t * np.log(np.array([p @ np.exp(1j * s * loss) for s in w]))
    s = theta + 1j * w
    line = (np.exp(log_m - 1j * w * eps) / (s * (s + 1))).real
    return math.exp(base - theta * eps) * line.sum() * (w[1] - w[0]) / math.pi


def sample_losses(q, sigma, steps, n, rng, shifts=1):
    """n draws of the composed loss: (of outputs with the example, of outputs without it seen as "added")."""
    with_it, without = np.zeros(n), np.zeros(n)
    j = np.arange(shifts + 1)
    b = np.array([math.comb(shifts, i) * q**i * (1 - q) ** (shifts - i) for i in j])
    for _ in range(steps):
        for x, total, sign in ((rng.normal(rng.binomial(shifts, q, n), sigma), with_it, 1),
                               (rng.normal(0, sigma, n), without, -1)):
            total += sign * np.log(np.exp((2 * np.outer(x, j) - j**2) / (2 * sigma**2)) @ b)
    return with_it, without


# ---- Renyi -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q, sigma", RDP)
def test_rdp_reference(q, sigma):
    assert accountant.rdp(q, sigma, ALPHAS) == pytest.approx(RDP[q, sigma], rel=1e-9, abs=0)


@pytest.mark.parametrize("q, sigma, alpha, exact", HARD)
def test_rdp_corners(q, sigma, alpha, exact):
    assert accountant.rdp(q, sigma, alpha) == pytest.approx(exact, rel=1e-9, abs=0)


def binomial_moment(q, sigma, alpha):
    """log A of a whole order by the binomial sum (Mironov, Talwar, Zhang 2019, Sec. 3.3).

    Expand the power. E[e^{j(2x-1)/(2 sigma^2)}] = e^{j(j-1)/(2 sigma^2)}, and the binomial weights add to 1:

        A - 1 = sum_{j=2..alpha} C(alpha, j) (1-q)^{alpha-j} q^j (e^{j(j-1)/(2 sigma^2)} - 1)
    """
    j = np.arange(2, int(alpha) + 1)  # the terms j = 0 and 1 vanish
    s = j * (j - 1) / (2 * sigma**2)
    log_binomial = gammaln(alpha + 1) - gammaln(j + 1) - gammaln(alpha - j + 1)
    log_expm1 = s + np.log(-np.expm1(-s))  # log(e^s - 1) without overflow
    return np.logaddexp(0.0, logsumexp(log_binomial + j * math.log(q) + xlog1py(alpha - j, -q) + log_expm1))


def test_the_integral_equals_the_binomial_sum_at_whole_orders():
    rng = np.random.default_rng(0)
    for _ in range(150):
        q, sigma = 10 ** rng.uniform(-5, -0.01), 10 ** rng.uniform(math.log10(0.3), 2)
        alpha = float(rng.integers(2, 1001) if rng.random() < 0.5 else rng.integers(2, 20))
        integral = accountant.log_moment(q, sigma, alpha)
        assert integral == pytest.approx(binomial_moment(q, sigma, alpha), rel=1e-9, abs=0), (q, sigma, alpha)


@pytest.mark.parametrize("q, sigma, alpha", [(0.1, 1.0, 2.5), (0.5, 5.0, 2.5), (0.3, 0.7, 1.5),
                                             (0.9, 2.0, 6.3), (0.05, 1.0, 9.0)])
def test_rdp_is_the_definition_and_removed_covers_added(q, sigma, alpha):
    value = float(accountant.rdp(q, sigma, alpha))
    assert value == pytest.approx(renyi(q, sigma, alpha), rel=1e-7)
    assert renyi(q, sigma, alpha, added=True) <= value


def test_rdp_closed_forms_and_shapes():
    alphas = np.array([[1.01, 2.0], [33.3, 1000.0]])
    assert accountant.rdp(1.0, 3.0, alphas) == pytest.approx(alphas / 18)
    for q, sigma in [(1e-5, 100.0), (0.01, 0.3), (0.7, 2.0)]:
        exact = math.log1p(q * q * math.expm1(1 / sigma**2))
        assert accountant.rdp(q, sigma, 2) == pytest.approx(exact, rel=1e-12, abs=0)
    near = [accountant.rdp(0.02, 1.3, a) for a in (3 - 1e-9, 3, 3 + 1e-9)]  # the two routes meet
    assert near[0] == pytest.approx(near[1], rel=1e-8) and near[2] == pytest.approx(near[1], rel=1e-8)
    assert (accountant.rdp(0, 1.0, alphas) == 0).all() and np.isinf(accountant.rdp(0.1, 0, alphas)).all()
    assert (np.isinf(accountant.rdp(0.1, 1e-200, alphas)).all()
            and (accountant.rdp(0.1, 1e300, alphas) < 1e-99).all())
    # next to no noise: still finite, never above q = 1
    assert float(accountant.rdp(0.1, 1e-4, 1.5)) <= 1.5 / 2e-8


@pytest.mark.parametrize("q, sigma, steps, delta, exact, by_rdp, order", EPSILON)
def test_rdp_epsilon_over_all_orders(q, sigma, steps, delta, exact, by_rdp, order):
    eps, best = accountant.renyi({(q, sigma): steps}, delta)
    assert eps == pytest.approx(by_rdp, rel=1e-7) and best == pytest.approx(order, rel=1e-3)
    assert accountant.epsilon(q, sigma, steps, delta) == eps >= exact
    moment = accountant.composed({(q, sigma): steps})
    assert pld.delta_by_moments(moment, eps)[0] == pytest.approx(delta, rel=1e-5)  # the conversion inverts


# ---- privacy loss distributions ----------------------------------------------------------------------------


@pytest.mark.parametrize("q, sigma, steps, delta, exact, by_rdp, order", EPSILON)
def test_pld_brackets_exact(q, sigma, steps, delta, exact, by_rdp, order):
    lower, upper = pld.pld_epsilon(q, sigma, steps, delta)
    # 5e-6: of the references
    assert lower <= exact * (1 + 5e-6) and exact * (1 - 5e-6) <= upper <= exact * 1.0005
    assert upper - lower < 1e-3 * exact
    assert accountant.epsilon(q, sigma, steps, delta, "pld") == upper <= by_rdp


CONTOUR = [(((0.02, 1.0), 500),), (((0.1, 0.8), 60),), (((0.004, 2.0), 30000),),
           (((0.05, 1.1), 100), ((0.2, 3.0), 150))]


@pytest.mark.parametrize("groups", CONTOUR)
@pytest.mark.parametrize("coarse", [1, 20])
def test_pld_certificate_holds_on_every_grid(groups, coarse):
    """lower <= exact <= upper in each direction, also on grids so coarse that a missing term would show."""
    full = tuple(((q, sigma, 1), t) for (q, sigma), t in groups)
    eps, order = accountant.renyi(dict(groups), 1e-5)
    theta, steps = order - 1, sum(t for _, t in groups)
    for added, (upper, lower, _) in enumerate(pld._curves(full, theta, eps * coarse**2, 1e-5)):
        for e in (0.8 * eps, 0.93 * eps, eps):
            exact = exact_delta(groups, e, theta, added)
            assert lower(e) <= exact * (1 + 1e-7) and exact * (1 - 1e-7) <= float(upper(e)), (e, added, steps)
            if coarse == 1 and exact > 1e-7:
                assert 0 <= float(upper(e)) - lower(e) < 0.03 * exact


def test_pld_certificate_counts_cut_tails_and_rounding(monkeypatch):
    """The same with coarse tails (infinite losses of one percent), and cell masses rounded to 8 digits."""
    groups, eps = (((0.02, 1.0), 500),), 1.6
    full = (((0.02, 1.0, 1), 500),)
    exact = [exact_delta(groups, eps, 6.0, added) for added in (False, True)]
    for (upper, _, _), truth in zip(pld._curves(full, 6.0, 1.7, 1e4), exact, strict=True):
        assert truth <= float(upper(eps)) <= truth + 0.02
    monkeypatch.setattr(pld, "MASS_NOISE", 1e-8)
    for (upper, lower, _), truth in zip(pld._curves(full, 6.0, 1.7, 1e-5), exact, strict=True):
        assert lower(eps) <= truth <= float(upper(eps))


PI = Decimal("3.14159265358979323846264338327950288419716939937510582")


def exact_tail(z):
    """Phi(-z), z a Decimal: Mills' ratio as Laplace's continued fraction, 1/(z + 1/(z + 2/(z + ...)))."""
    ratio = z
    for k in range(1500, 0, -1):
        ratio = z + k / ratio
    return (-z**2 / 2).exp() / (2 * PI).sqrt() / ratio


@np.errstate(all="ignore")
def test_steps_that_were_rounded_up_too_often_are_taken_back():
    """"pushes" of extensions/pld.py: here a tenth of all steps ends one point of the grid too high."""
    q, sigma, steps, delta, eps = 0.5, 1.5, 30, 1e-5, 10.0
    tail = eta = 1e-6 * delta
    loss, (p, p_error, before, after), other, slack = pld._cells(
        q, sigma, 1, 0.01, pld._span(q, sigma, 1, tail / steps))
    part = pld._connect_dots(loss, p, p_error, *other[:2], before, after, slack, steps)
    mass = np.exp(part.log_pmf)
    moved = 0.1 * np.append(mass[:-1], 0.0)
    pushed = part._replace(log_pmf=np.log(mass - moved + np.roll(moved, 1)))
    exact = pld.pld_delta(q, sigma, steps, eps)

    def lower(part):
        return pld._compose([part], 0.01, 2.5, eta, tail / steps)[1](eps)

    assert lower(part) < exact[1] < lower(pushed)  # so it matters that pushes are counted
    assert 0.5 * exact[0] < lower(pushed._replace(pushed=part.pushed + 0.1)) < exact[0]


def test_the_stated_errors_of_normal_tails_and_of_cells_cover_the_rounding():
    rng = np.random.default_rng(0)
    with localcontext() as context:
        context.prec = 50
        for z in rng.uniform(3, 36, 80):
            tail, error = pld._tails(np.array([-z]))
            assert abs(Decimal(float(tail[0])) - exact_tail(Decimal(z))) < Decimal(float(error[0])) / 2, z
        # Cells between neighbouring outputs, whose distance to j is rounded as well; three constructed ones.
        cells = [(-15.647858057177457, -15.6478514469273, 1.8884070873625722),
                 (-63.008073121335734, -63.006334368173476, 1.820505953149065),
                 (-7.268477293538385, -7.268461231632526, 0.4589901105707329)]
        for _ in range(60):
            sigma = rng.uniform(0.4, 2.0)
            x = -sigma * rng.uniform(4, 35)
            cells.append((x, x + 1e-6, sigma))
        for low, high, sigma in cells:
            tails, errors = pld._tails((np.array([low, high]) - 1) / sigma)
            mass, error, _, _ = pld._masses(tails, errors, np.ones(2))
            below = [exact_tail((1 - Decimal(x)) / Decimal(sigma)) for x in (low, high)]
            assert abs(Decimal(float(mass[0])) - below[1] + below[0]) < Decimal(float(error[0])), (low, sigma)


def test_pld_delta_against_simulation():
    """The definition, E[(1 - e^{eps - Y})_+], over simulated outputs of all steps, both directions."""
    q, sigma, steps, n = 0.15, 1.2, 12, 300_000
    losses = sample_losses(q, sigma, steps, n, np.random.default_rng(1))
    for eps in (0.3, 1.0, 2.0):
        draws = [np.maximum(0, -np.expm1(eps - y)) for y in losses]
        worst = max(draws, key=np.mean)
        lower, upper = pld.pld_delta(q, sigma, steps, eps)
        noise = 4 * worst.std() / math.sqrt(n)
        assert lower - noise <= worst.mean() <= upper + noise
        assert upper - lower < 0.02 * upper


def test_pld_full_batch():
    """q = 1 is one Gaussian mechanism; the FFT route must meet the closed form as q -> 1."""
    for mu, eps in [(1.0, 0.5), (2.0, 6.0), (0.3, 0.0)]:
        exact = ndtr(mu / 2 - eps / mu) - math.exp(eps) * ndtr(-mu / 2 - eps / mu)
        lower, upper = pld.pld_delta(1, 4 / mu, 16, eps)
        assert lower <= exact * (1 + 1e-12) and exact * (1 - 1e-12) <= upper <= exact * 1.000001
        lower, upper = pld.pld_delta(1 - 1e-9, 4 / mu, 16, eps)
        assert lower <= exact * (1 + 1e-6) and exact * (1 - 1e-6) <= upper <= exact * 1.01


def test_pld_many_steps():
    """A million steps of tiny q: close to one Gaussian mechanism of the same variance, certified tightly."""
    lower, upper = pld.pld_epsilon(0.001, 3.0, 10**6, 1e-5)
    mu = 1e3 * 0.001 * math.sqrt(math.expm1(1 / 9))
    assert 0 < upper - lower < 5e-4 * upper < accountant.epsilon(0.001, 3.0, 10**6, 1e-5) * 5e-4
    assert upper == pytest.approx(accountant.epsilon(1, 1 / mu, 1, 1e-5, "pld"), rel=2e-2)


# ---- what holds for both -----------------------------------------------------------------------------------


@pytest.mark.parametrize("method, points", [("rdp", 40), ("pld", 12)])
def test_monotone(method, points):
    rng = np.random.default_rng(2)
    for _ in range(points):
        q, sigma = 10 ** rng.uniform(-3, -0.7), 10 ** rng.uniform(-0.1, 0.8)
        steps, delta = int(10 ** rng.uniform(1, 3.5)), 10 ** rng.uniform(-8, -3)
        eps = accountant.epsilon(q, sigma, steps, delta, method)
        worse = [(q * 1.1, sigma, steps, delta), (q, sigma / 1.1, steps, delta), (q, sigma, steps * 2, delta)]
        for other in [*worse, (q, sigma, steps, delta / 3)]:
            assert 0 <= eps <= accountant.epsilon(*other, method)
        lower, upper = pld.pld_epsilon(q, sigma, steps, delta)
        assert lower <= upper <= accountant.epsilon(q, sigma, steps, delta, "rdp") + (upper - lower)


def test_nothing_and_everything():
    for method in ("rdp", "pld"):
        assert accountant.epsilon(0.1, 0, 5, 1e-5, method) == math.inf
        assert accountant.epsilon(0, 1, 5, 1e-5, method) == accountant.epsilon(0.1, 1, 0, 1e-5, method) == 0
        assert (accountant.epsilon(0, 0, 5, 1e-5, method)
                == accountant.epsilon_of_ledger([], 1e-5, method) == 0)
        assert accountant.epsilon(1e-5, 100, 1, 1e-5, method) == 0  # never negative
        assert accountant.noise_multiplier(1, 1e-5, 0, 10, method) == 0
    assert pld.pld_delta(0.1, 1, 0, 1.0) == (0, 0) and pld.pld_delta(0.1, 0, 1, 1.0) == (0, 1)
    assert accountant.epsilon(0.1, 1, 5, 1e-12) > accountant.epsilon(0.1, 1, 5, 1e-10) > 0  # rdp has no floor


@pytest.mark.parametrize("eps, delta, q, steps, exact, by_rdp", NOISE)
def test_noise_multiplier_is_the_smallest_on_the_safe_side(eps, delta, q, steps, exact, by_rdp):
    for method, reference, tolerance in (("rdp", by_rdp, 1e-6), ("pld", exact, 2e-4)):
        sigma = accountant.noise_multiplier(eps, delta, q, steps, method)
        assert sigma == pytest.approx(reference, rel=tolerance)
        assert accountant.epsilon(q, sigma, steps, delta, method) <= eps
        assert accountant.epsilon(q, sigma * (1 - 1e-4), steps, delta, method) > eps
        assert sigma >= reference * (1 - 1e-6)


@pytest.mark.parametrize("method", ["rdp", "pld"])
def test_max_steps(method):
    steps = calculator.max_steps(3, 1e-5, 0.02, 1.5, method)
    eps = [accountant.epsilon(0.02, 1.5, t, 1e-5, method) for t in (steps, steps + 1)]
    assert eps[0] <= 3 < eps[1]
    assert calculator.max_steps(0.01, 1e-5, 0.5, 0.5, method) == 0
    assert calculator.max_steps(1, 1e-5, 0, 1, method) == math.inf


@pytest.mark.parametrize("method", ["rdp", "pld"])
def test_ledger(method):
    one = [{"step": i, "q": 0.02, "sigma": 1.1, "clip_norm": 1.0, "batch_size": 9} for i in range(400)]
    two = [{"q": 0.05, "sigma": 2.0}] * 300 + [{"q": 0, "sigma": 1.0}] * 5
    eps = accountant.epsilon_of_ledger(one, 1e-5, method)
    assert eps == accountant.epsilon(0.02, 1.1, 400, 1e-5, method)
    both = accountant.epsilon_of_ledger(one + two, 1e-5, method)
    assert both == accountant.epsilon_of_ledger(two + one, 1e-5, method)  # order does not matter
    assert (max(eps, accountant.epsilon_of_ledger(two, 1e-5, method)) < both
            < accountant.epsilon(0.05, 1.1, 700, 1e-5, method))
    assert accountant.epsilon_of_ledger([*one, {"q": 0.1, "sigma": 0}], 1e-5, method) == math.inf
    exact = exact_delta((((0.02, 1.1), 400), ((0.05, 2.0), 300)), both, 4.0, added=False)
    assert exact <= 1e-5 and (method == "rdp" or exact > 0.99e-5)


def simple(steps, delta):
    """An accountant of one's own: full batches, by the textbook bound of the Gaussian mechanism."""
    rho = sum(T / (2 * sigma**2) for (_, sigma), T in steps.items())
    return rho + 2 * math.sqrt(rho * math.log(1 / delta))


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(accountant.ACCOUNTANTS, "simple", simple)


@pytest.mark.parametrize("method", [simple, "simple"])
def test_an_accountant_of_ones_own_goes_everywhere(method, registered, capsys):
    q, sigma, T, delta = 0.02, 4.0, 60, 1e-5
    cost = simple({(q, sigma): T}, delta)
    assert accountant.epsilon(q, sigma, T, delta, method) == cost > accountant.epsilon(q, sigma, T, delta)
    assert accountant.epsilon_of_ledger([{"q": q, "sigma": sigma}] * T, delta, method) == cost
    assert calculator.max_steps(cost, delta, q, sigma, method) == T  # fewer than Renyi allows
    for target in (0.3 * cost, cost, 3000.0):
        found = accountant.noise_multiplier(target, delta, q, T, method)
        assert simple({(q, found): T}, delta) <= target < simple({(q, found * (1 - 1e-5)): T}, delta)
    assert accountant.noise_multiplier(cost, delta, q, T, method) == pytest.approx(sigma, rel=1e-5)
    known = pld.statement_numbers([(q, sigma, T)], delta, 2)
    assert list(known) == ["epsilon_rdp", "epsilon_pld", "epsilon_simple", "epsilon_for_group", "attacker"]
    assert known["epsilon_simple"] == cost and known["epsilon_pld"] == pld.epsilon_of({(q, sigma): T}, delta)
    assert command(f"--q {q} --steps {T} --epsilon {cost}") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("by simple"))
    assert float(row.split()[2]) == pytest.approx(sigma, rel=1e-3)


@pytest.mark.parametrize("value", [math.nan, -1.0])
def test_an_accountant_that_gives_no_epsilon_is_refused(value):
    for ask in (lambda by: accountant.epsilon(0.1, 1, 1, 1e-5, by),
                lambda by: calculator.max_steps(1, 1e-5, 0.1, 1, by),
                lambda by: accountant.noise_multiplier(1, 1e-5, 0.1, 10, by)):
        with pytest.raises(ValueError, match="gives epsilon"):
            ask(lambda steps, delta: value)


def test_an_accountant_may_be_infinite_where_there_is_little_noise():
    def stern(steps, delta):
        return simple(steps, delta) if all(sigma > 3 for _, sigma in steps) else math.inf

    assert accountant.noise_multiplier(1000.0, 1e-5, 0.02, 60, stern) == pytest.approx(3, rel=1e-5)


# ---- meaning -----------------------------------------------------------------------------------------------


def test_groups_of_pictures():
    def group(k, q=0.05, sigma=4.0, steps=100):
        return pld.group_epsilon(k, q, sigma, steps, 1e-5)

    assert group(1) == accountant.epsilon(0.05, 4.0, 100, 1e-5, "pld") and group(0) == 0
    assert group(1) < group(2) < group(3)
    # three pictures, always all there: three times the shift
    full = accountant.epsilon(1, 20 / 3, 10, 1e-5, "pld")
    assert group(3, 1, 20, 10) == pytest.approx(full, rel=1e-6)
    assert group(3, 1 - 1e-7, 20, 10) == pytest.approx(full, rel=2e-3)
    assert group(20, sigma=0.3) == math.inf  # float64 ends: never a number that is too small


def test_groups_of_pictures_by_simulation():
    n, eps = 200_000, 1.0
    draws = [np.maximum(0, -np.expm1(eps - y))
             for y in sample_losses(0.2, 3.0, 8, n, np.random.default_rng(3), shifts=3)]
    worst = max(draws, key=np.mean)
    upper, lower = zip(*[(c[0](eps), c[1](eps)) for c in pld._curves((((0.2, 3.0, 3), 8),), 2.0, eps, 1e-3)],
                       strict=True)
    noise = 4 * worst.std() / math.sqrt(n)
    assert max(lower) - noise <= worst.mean() <= max(upper) + noise and max(upper) < 1.01 * max(lower)


def test_attacker():
    fprs = np.array([0.001, 0.01, 0.1])
    gaussian = ndtr(ndtri(fprs) + math.sqrt(200) / 20)
    assert pld.attacker_tpr(1, 20, 200) == pytest.approx(gaussian)
    assert pld.attacker_tpr(1 - 1e-9, 20, 200) == pytest.approx(gaussian, rel=1e-3)
    rng, n = np.random.default_rng(4), 200_000
    with_it, without = sample_losses(0.15, 1.2, 12, n, rng)
    best = pld.attacker_tpr(0.15, 1.2, 12, fprs)
    # the likelihood-ratio attack reaches the bound and does not pass it
    for fpr, bound in zip(fprs, best, strict=True):
        rate = (with_it > np.quantile(-without, 1 - fpr)).mean()
        assert rate == pytest.approx(bound, abs=4 * math.sqrt(bound / n) + 4 * bound / math.sqrt(n * fpr))
    assert ((pld.attacker_tpr(0.1, 1, 0, fprs) == fprs).all()
            and (pld.attacker_tpr(0.1, 0, 1, fprs) == 1).all())


# ---- bad input and the command line ------------------------------------------------------------------------


@pytest.mark.parametrize("call, word", [
    (lambda: accountant.epsilon(1.1, 1, 1, 1e-5), "q ="),
    (lambda: accountant.epsilon(-0.1, 1, 1, 1e-5), "q ="),
    (lambda: accountant.epsilon(math.nan, 1, 1, 1e-5), "q ="),
    (lambda: accountant.epsilon(0.1, -1, 1, 1e-5), "sigma ="),
    (lambda: accountant.epsilon(0.1, 1, -1, 1e-5), "steps ="),
    (lambda: accountant.epsilon(0.1, 1, 1.5, 1e-5), "steps ="),
    (lambda: accountant.epsilon(0.1, 1, 1, 0), "delta ="),
    (lambda: accountant.epsilon(0.1, 1, 1, 1.0), "delta ="),
    (lambda: accountant.epsilon(0.1, 1, 1, 1e-11, "pld"), "1e-10"),
    (lambda: accountant.epsilon(0.1, 1, 1, 1e-5, "moments"), "method ="),
    (lambda: accountant.rdp(0.1, 1, [2, 1.0]), "orders"),
    (lambda: accountant.noise_multiplier(0, 1e-5, 0.1, 10), "epsilon ="),
    (lambda: accountant.noise_multiplier(1e-14, 1e-5, 1.0, 10**12), "out of reach"),
    (lambda: calculator.max_steps(-1, 1e-5, 0.1, 1), "epsilon ="),
    (lambda: pld.group_epsilon(1.5, 0.1, 1, 1, 1e-5), "k ="),
    (lambda: pld.attacker_tpr(0.1, 1, 1, [0]), "fprs"),
    (lambda: accountant.epsilon_of_ledger([{"q": 0.1}], 1e-5), "ledger"),
    (lambda: accountant.epsilon_of_ledger([{"q": 2, "sigma": 1}], 1e-5), "q =")])
def test_bad_input(call, word):
    with pytest.raises(ValueError, match=word):
        call()


def command(words):
    """The exit code of `python accountant.py WORDS`."""
    with pytest.raises(SystemExit) as end:
        command_line.run_cli(lambda: calculator.main(words.split()))
    return end.value.code or 0


def numbers(line):
    return [float(word) for word in line.replace("(stated:", " ").replace(")", " ").split()
            if word[0].isdigit()]


def test_command_line_plan(capsys):
    assert command("--n 60000 --batch 2000 --epochs 200 --delta 1e-5 --sigma 5") == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("given"))
    sigma, steps, by_rdp, order, by_pld, gap, *rates = numbers(row)
    assert ((sigma, steps) == (5, 6000) and by_rdp == pytest.approx(2.28195, abs=1e-4)
            and order == pytest.approx(9.18, abs=0.01))
    assert (by_pld == pytest.approx(2.0992, abs=2e-4) and 0 < gap < 1e-3
            and 0.1 < rates[0] < rates[1] < rates[2] < 100)
    assert command("--n 60000 --batch 2000 --steps 6000 --epsilon 10 --group 2") == 0
    out = capsys.readouterr().out
    assert "1.5445" in out and "1.4709" in out and out.count("2 images of one person") == 2
    assert command("--q 0.02 --sigma 1.5 --epsilon 3 --group 1") == 0
    assert str(calculator.max_steps(3, 1e-5, 0.02, 1.5, "pld")) in capsys.readouterr().out


def test_command_line_runs(tmp_path, capsys):
    for name, steps in (("a", {"q": 0.02, "steps": 400, "sigma": 1.1}),
                        ("b", {"q": 0.05, "steps": 200, "sigma": 2.0})):
        (tmp_path / name / "release").mkdir(parents=True)
        statement = {"epsilon": 1.5, "delta": 1e-6, "n": 1000, "fast_noise": False, **steps}
        (tmp_path / name / "release" / "privacy.json").write_text(json.dumps(statement))
    (tmp_path / "b" / "internal").mkdir()
    row = json.dumps({"step": 0, "q": 0.05, "sigma": 2.0, "clip_norm": 1.0, "batch_size": 50})
    # torn by a crash: the 300th step; the statement is older
    (tmp_path / "b" / "internal" / "ledger.jsonl").write_text(f"{row}\n" * 299 + row[:20])
    calculator.main([str(tmp_path / "a"), str(tmp_path / "b")])
    a, b, both = capsys.readouterr().out.splitlines()[2:5]
    rows = [{"q": 0.02, "sigma": 1.1}] * 400 + [{"q": 0.05, "sigma": 2.0}] * 300
    for line, part in ((a, rows[:400]), (b, rows[400:]), (both, rows)):
        eps = [accountant.epsilon_of_ledger(part, 1e-6, method) for method in ("rdp", "pld")]
        values = numbers(line)
        assert len(part) in values and all(any(v == pytest.approx(e, abs=6e-5) for v in values) for e in eps)
    assert "stated: 1.5" in a and "the larger counts" in b


def run_folder(place, statement=None, rows=0, settings=None):
    """A run of 400 steps as `statement` says, with `rows` ledger rows (None: no file).

    statement: a dict of changes; None as a value: not stated.
    """
    for part in ("release", "internal"):
        (place / part).mkdir(parents=True)
    if statement is not None:
        whole = {"private": True, "epsilon": 1.9, "delta": 1e-6, "q": 0.02, "steps": 400, "sigma": 1.1,
                 "insecure_seed": False, "fast_noise": False}
        stated = {key: value for key, value in (whole | statement).items() if value is not None}
        (place / "release" / "privacy.json").write_text(json.dumps(stated))
    if rows is not None:
        (place / "internal" / "ledger.jsonl").write_text('{"q": 0.02, "sigma": 1.1}\n' * rows)
    if settings:
        (place / "internal" / "settings.json").write_text(json.dumps(settings))
    return place


@pytest.mark.parametrize("statement, rows, settings", [
    ({"private": False}, None, None),
    ({"insecure_seed": True}, 400, None), ({"fast_noise": True}, 400, None),
    ({"fast_noise": None, "secure_noise": False}, 400, None),  # as older versions said it
    ({"fast_noise": None}, 400, None),  # the oldest did not say it: they had torch's generator
    ({"private": False, "epsilon": "inf", "sigma": 0.0}, 400, None),
    ({"private": False, "steps": 0, "q": 0.0, "sigma": 0.0, "epsilon": 0.0}, 0, None),
    (None, 7, {"insecure_seed": 0}), (None, 7, {"fast_noise": True})])  # still under way
def test_a_run_that_is_not_private_counts_as_infinite_alone_and_in_the_sum(
        statement, rows, settings, tmp_path, capsys):
    good, bad = (run_folder(tmp_path / "good", {}, 400),
                 run_folder(tmp_path / "bad", statement, rows, settings))
    calculator.main([str(good), str(bad)])
    _, _, kept, lost, both, _ = capsys.readouterr().out.splitlines()
    assert "inf" not in kept and "NOT PRIVATE" not in kept
    assert lost.split()[3:6:2] == ["inf", "inf"] and "NOT PRIVATE" in lost
    assert both.split()[5:8:2] == ["inf", "inf"]
    calculator.main([str(good), str(good)])
    assert "inf" not in capsys.readouterr().out


@pytest.mark.parametrize("settings", [{"fast_noise": True}, {"insecure_seed": 0}])
def test_a_run_that_read_no_private_image_costs_nothing(settings, tmp_path, capsys):
    nothing = {"steps": 0, "q": 0.0, "sigma": 0.0, "epsilon": 0.0, "fast_noise": True}
    run = run_folder(tmp_path / "x", nothing, None, settings)
    calculator.main([str(run)])
    assert "inf" not in capsys.readouterr().out.splitlines()[2]


def test_a_looser_accountant_of_one_s_own_makes_no_statement_false(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(accountant.ACCOUNTANTS, "loose", lambda *steps: 2 * accountant.by_rdp(*steps))
    probe = run_folder(tmp_path / "probe", {}, None)
    said = json.loads((probe / "release" / "privacy.json").read_text())
    twice = accountant.epsilon(said["q"], said["sigma"], said["steps"], said["delta"], "loose")
    for name, false in (("loose", False), ("rdp", True), ("unknown", True)):
        calculator.main([str(run_folder(tmp_path / name, {"epsilon": twice, "accountant": name}, None))])
        assert ("states more than its q" in capsys.readouterr().out) == false


def test_a_state_that_cannot_be_read_does_not_hide_the_ledger(tmp_path, capsys):
    run = run_folder(tmp_path / "x", {}, 400)
    (run / "internal" / "state.pt").write_bytes(b"garbage")
    calculator.main([str(run)])
    line = capsys.readouterr().out.splitlines()[2]
    assert " 400 " in line and "state.pt cannot be read" in line


@pytest.mark.parametrize("rows, logged, done, counted", [
    (0, 20, 0, 20), (7, 20, 0, 20), (7, 3, 9, 9), (20, 20, 20, 20), (20, 0, 0, 20)])
@pytest.mark.parametrize("planned", [True, False])
def test_a_run_without_statement_counts_the_steps_that_log_and_state_tell_of(rows, logged, done, counted,
                                                                             planned, tmp_path, capsys):
    """A ledger that was cut short hides nothing, as train.py --resume would refuse it."""
    internal = run_folder(tmp_path / "x", None, rows) / "internal"
    (internal / "log.jsonl").write_text("{}\n" * logged)
    files.save({"done": done}, internal / "state.pt")
    if planned:
        files.write_json({"q": 0.02, "sigma": 1.1, "steps": 400}, internal / "plan.json")
    calculator.main([str(tmp_path / "x"), "--delta", "1e-6"])
    line = capsys.readouterr().out.splitlines()[2]
    expected = accountant.epsilon(0.02, 1.1, counted, 1e-6) if planned or counted == rows else math.inf
    assert line.split()[3] == rounding.round_up(expected, 6) or math.isinf(expected) and " inf " in line
    assert ("larger counts" in line) == (counted > rows)


@pytest.mark.parametrize("rows, stated, counted", [
    (0, 400, 400), (7, 400, 400), (400, 400, 400), (450, 400, 450), (None, 400, 400), (33, None, 33),
    (0, None, 0)])
def test_the_larger_of_ledger_and_statement_counts(rows, stated, counted, tmp_path, capsys):
    place = run_folder(tmp_path / "x", None if stated is None else {"steps": stated}, rows)
    other = run_folder(tmp_path / "y", {"q": 0.1, "sigma": 3.0, "steps": 50, "epsilon": 1.2, "delta": 1e-7},
                       None)
    calculator.main([str(place), str(other)])
    head, _, line, _, both, _ = capsys.readouterr().out.splitlines()
    assert head.endswith(" 1e-06" if stated else " 1e-07")
    delta = 1e-6 if stated else 1e-7
    steps = [{"q": 0.02, "sigma": 1.1}] * counted
    for text, rows_of, column in ((line, steps, 3), (both, steps + [{"q": 0.1, "sigma": 3.0}] * 50, 5)):
        assert text.split()[column] == rounding.round_up(accountant.epsilon_of_ledger(rows_of, delta), 6)
    assert ("larger counts" in line) == (stated is not None and rows not in (None, stated))
    assert ("without a statement" in line) == (stated is None)


def test_ledger_and_statement_of_different_steps_both_count(tmp_path, capsys):
    place = run_folder(tmp_path / "x", {"q": 0.05}, 300)
    groups, privacy = calculator.read_run(place)
    assert dict(groups) == {(0.02, 1.1): 300, (0.05, 1.1): 400} and "both count" in privacy["notes"][0]


def test_a_statement_above_its_own_steps_counts_as_it_stands(tmp_path, capsys):
    place, other = run_folder(tmp_path / "x", {"epsilon": 9.5}, 400), run_folder(tmp_path / "y", {}, 400)
    for words, alone in (([], "9.5"), (["--delta", "1e-5"], "9.5"), (["--delta", "1e-7"], "inf")):
        calculator.main([str(place), str(other), *words])
        *_, line, _, both, _ = capsys.readouterr().out.splitlines()
        assert (line.split()[3:6:2] == [alone, alone] and "states more than" in line
                and both.split()[5:8:2] == ["inf", "inf"])


@pytest.mark.parametrize("statement", [{"epsilon": math.nan}, {"sigma": -1.0}, {"steps": 1.5}, {"delta": 0.0},
                                       {"q": "x"}])
def test_a_statement_that_means_nothing_is_refused_in_one_line(statement, tmp_path, capsys):
    assert command(str(run_folder(tmp_path / "x", statement, 400))) == 2
    assert capsys.readouterr().err.count("\n") == 1


WHOLE = json.dumps({"step": 0, "q": 0.05, "sigma": 2.0})
PLAN = {"q": 0.05, "sigma": 2.0}


@pytest.mark.parametrize("text, known, expected", [
    ("", (), []),
    (f"{WHOLE}\n{WHOLE}\n", (), [(0.05, 2.0)] * 2),
    (f"{WHOLE}\n{WHOLE}", (), [(0.05, 2.0)] * 2),  # only the line end was lost
    (f"{WHOLE}\n{WHOLE[:9]}", (), [(0.05, 2.0)] * 2),  # torn last
    (f"{WHOLE}\n{WHOLE[:9]}\n{WHOLE}\n", (), [(0.05, 2.0)] * 3),  # torn, then resumed
    (WHOLE[:9], (PLAN,), [(0.05, 2.0)]),  # only torn
    (f"{WHOLE[:9]}{WHOLE}\n", (PLAN,), [(0.05, 2.0)] * 2),  # two rows that ran into one line
    (f"{WHOLE}\n\n", (), [(0.05, 2.0)] * 2),  # empty line
    (f"{WHOLE}\r\n\r\r\n", (), [(0.05, 2.0)] * 2),
    (f"{WHOLE}\n\0\0\0", (), [(0.05, 2.0)] * 2),  # what a power cut may leave
    (f'[1]\n{WHOLE}\n{{"q": "0.1", "sigma": 9}}\n{{"q": 2, "sigma": NaN}}\n', (), [(0.05, 2.0)] * 4),
    (f'{WHOLE}\n{{"q": 0.01, "sigma": 1.5}}\n{"[" * 20000}\n', ({"q": 0.2},),
     [(0.05, 2.0), (0.01, 1.5), (0.05, 1.5)]),
    ("garbage\n", ({"sigma": "inf"}, {}), None)])
def test_a_damaged_ledger_is_read_alike_by_resume_and_calculator(text, known, expected, tmp_path):
    (tmp_path / "internal").mkdir()
    ledger = tmp_path / "internal" / "ledger.jsonl"
    ledger.write_bytes(text.encode())
    if known:
        (tmp_path / "internal" / "plan.json").write_text(json.dumps(known[0]))
    for reader in (lambda: calculator.read_run(tmp_path)[0],
                   lambda: accountant.count_steps(files.ledger_rows(files.read_ledger(ledger), *known)),
                   # again, after resume has added a missing line end
                   lambda: calculator.read_run(tmp_path)[0]):
        if expected is None:
            with pytest.raises(ValueError, match="row 1 of the ledger is damaged"):
                reader()
        else:
            assert reader() == accountant.count_steps([{"q": q, "sigma": sigma} for q, sigma in expected])
    with open(ledger, "a") as file:  # the next row of a resumed run stands on a line of its own
        file.write(WHOLE + "\n")
    assert sum(calculator.read_run(tmp_path)[0].values()) == len([0] if expected is None else expected) + 1


@pytest.mark.parametrize("words", [
    "", "--q 2 --sigma 1 --steps 1", "--q 0.1 --sigma 1", "--q 0.1 --steps 5 --epsilon 0", "--nonsense",
    "no/such/run", "--q 0.1 --sigma 1 --epochs inf", "--q 0.1 --sigma 1 --epochs nan",
    "--q 0.1 --sigma nan --steps 3", "--q nan --sigma 1 --steps 3", "--n 0 --batch 1 --sigma 1 --steps 3",
    "--n -5 --batch 1 --sigma 1 --steps 3",
    pytest.param(f"--n 1{'0' * 400} --batch 1 --sigma 1 --steps 3", id="n of 400 digits"),
    "--n 10 --batch inf --sigma 1 --steps 3", "--n 10 --batch nan --sigma 1 --steps 3",
    "--q 0.1 --sigma 1 --steps 3 --group 1000000000000", "--q 0.1 --sigma 1 --steps 3 --delta nan",
    "--q 0.1 --steps 3 --epsilon nan", "--q 0.1 --sigma 1 --epsilon inf",
    "--q 0.5 --n 100 --batch 10 --sigma 1 --steps 3", "--q 0.1 --sigma 1 --steps 3 --epochs 2"])
def test_command_line_errors_are_one_line(words, capsys):
    assert command(words) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1 and captured.err.startswith("error: ")


def test_flags_of_a_plan_are_not_ignored_beside_runs(capsys):
    assert command("runs/a --group 3") == 2 and command("runs/a --delta 1e-5 --sigma 1") == 2
    assert [line.split()[1] for line in capsys.readouterr().err.splitlines()] == ["--group", "--sigma"]


@pytest.mark.parametrize("words", [
    "--q 0.1 --sigma 1e-200 --steps 3", "--q 0.1 --sigma 1e300 --steps 3", "--q 1e-320 --sigma 1 --steps 3",
    "--q 0.1 --steps 3 --epsilon 1e-300",  # as much noise as makes delta enough
    "--q 0.1 --steps 3 --epsilon 1e300", "--q 0.1 --sigma 1e-5 --steps 3",
    "--q 0.1 --sigma 1e-5 --epsilon 1e300", "--q 0.1 --sigma 2 --steps 3 --delta 1e-11",
    "--q 0.1 --epsilon 3 --steps 3 --delta 1e-300",
    pytest.param(f"--q 0.1 --sigma 1 --steps 1{'0' * 400}", id="steps of 400 digits"),
    "--q 1e-9 --sigma 1 --epochs 1e300", "--q 0.1 --sigma 3 --steps 9 --group 1000"])
def test_command_line_at_the_ends_of_float64(words, capsys):
    assert command(words) == 0
    captured = capsys.readouterr()
    assert captured.err == "" and "nan" not in captured.out


def test_command_line_notes_a_delta_that_is_too_large(capsys):
    assert command("--n 100 --batch 10 --steps 3 --sigma 2 --delta 0.01") == 0
    assert capsys.readouterr().err.startswith("note: delta 0.01 is not below 1/n")
    assert command("--n 100 --batch 10 --steps 3 --sigma 2 --delta 0.0099") == 0
    assert capsys.readouterr().err == ""


# ---- rounding and robustness -------------------------------------------------------------------------------


def test_round_up():
    exact = {10: "10", 1e-05: "1e-05", 9.99999999: "10", 0.0: "0", math.inf: "inf", 2: "2", 0.25: "0.25",
             7.4501: "7.451", 1.0000001e-06: "1.001e-06", 123456: "1.235e+05", 9.9995: "10",
             1.7e308: "1.7e+308", 1.79761e308: "inf"}
    assert {x: rounding.round_up(x) for x in exact} == exact
    rng = np.random.default_rng(0)
    for _ in range(3000):
        x, digits = float(rng.uniform(1, 10) * 10.0 ** rng.integers(-300, 300)), int(rng.integers(1, 8))
        text = rounding.round_up(x, digits)
        unit = Decimal(10) ** (Decimal(repr(x)).adjusted() + 1 - digits)
        assert 0 <= Decimal(text) - Decimal(repr(x)) < unit and Decimal(text) % unit == 0, (x, digits, text)
        assert rounding.round_up(float(text), digits) == text  # what is exact stays


def test_printed_bounds_are_rounded_up(capsys):
    assert command("--q 0.02 --sigma 1.1 --steps 400 --delta 1.00001e-6") == 0
    head, _, row, group, _ = capsys.readouterr().out.splitlines()
    assert "delta 1.001e-06" in head
    numbers = row.split()
    known = pld.statement_numbers([(0.02, 1.1, 400)], 1.00001e-6)
    printed = [*map(float, (numbers[3], numbers[5], group.split()[-1])),
               *(float(word) / 100 for word in numbers[7:])]
    exact = [known["epsilon_rdp"], known["epsilon_pld"], known["epsilon_for_group"],
             *known["attacker"].values()]
    for shown, value in zip(printed, exact, strict=True):
        assert value <= shown <= value * 1.0011


def extreme_plan(rng):
    """(q, sigma, steps), log-uniform: often far outside of what float64 holds comfortably."""
    wide = rng.random() < 0.8
    q = 10 ** rng.uniform(-323, 0) if wide else 10 ** rng.uniform(-8, 0)
    sigma = 10 ** rng.uniform(-323, 308) if wide else 10 ** rng.uniform(-4, 4)
    steps = int(10 ** rng.uniform(0, 20 if wide else 7))
    special = rng.random()
    steps = 10**400 if 0.5 < special < 0.53 else steps
    return 1.0 if special < 0.1 else max(q, 5e-324), 0.0 if special > 0.95 else sigma, steps


def simple_attacks(q, sigma, steps):
    """(false alarms, detections) of attacks without accountant: thresholds on one output, largest, sum."""
    cuts = np.concatenate([sigma * np.linspace(-8, 30, 200), np.linspace(0, 1, 20)])
    quiet, heard = ndtr(-cuts / sigma), (1 - q) * ndtr(-cuts / sigma) + q * ndtr((1 - cuts) / sigma)
    pairs = [(quiet, heard),
             tuple(-np.expm1(steps * np.log1p(-np.minimum(p, 1 - 1e-16))) for p in (quiet, heard))]
    mean, width = steps * q, 9 * math.sqrt(steps * q)
    j = np.arange(max(0, int(mean - width)), int(mean + width + 25))
    weights, spread = binom.pmf(j, steps, q), sigma * math.sqrt(steps)
    cuts = np.concatenate([spread * np.linspace(-8, 30, 100),
                           np.linspace(j[0] - 6 * spread, j[-1] + 6 * spread, 100)])
    pairs.append((ndtr(-cuts / spread), ndtr((j - cuts[:, None]) / spread) @ weights))
    return pairs


def test_statement_numbers_are_total_and_above_what_simple_attacks_reach():
    """Some hundred plans at the ends of float64, also mixed steps: none raises, warns or is understated."""
    rng, start, plans = np.random.default_rng(0), time.process_time(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        while plans < 300 and (plans < 200 or time.process_time() - start < 8):
            plans += 1
            kinds = [extreme_plan(rng) for _ in range(rng.integers(1, 4))]
            delta = (max(10 ** rng.uniform(-323, -0.001), 5e-324) if rng.random() < 0.5
                     else 10 ** rng.uniform(-12, -0.3))
            known = pld.statement_numbers(kinds, delta, int(rng.choice([2, 20, 1000])))
            rdp, tight, group, rates = known.values()
            assert 0 <= tight <= rdp * (1 + 1e-9) + 1e-9 and group >= 0, (kinds, delta, known)
            assert (group >= tight * 0.99 - 1e-9
                    and all(f * (1 - 1e-9) <= r <= 1 for f, r in rates.items())), (kinds, delta, known)
            for q, sigma, steps in kinds:
                if sigma == 0:
                    assert rdp == tight == group == math.inf and set(rates.values()) == {1.0}
                elif 1e-8 < q < 1 and 1e-4 < sigma < 1e4 and steps < 1e7:
                    for quiet, heard in simple_attacks(q, sigma, steps):
                        if tight < 600:
                            assert ((heard - math.exp(tight) * quiet).max()
                                    <= delta * (1 + 1e-7) + 1e-14), (kinds, delta, known)
                        for f, r in rates.items():
                            assert (heard[quiet <= f].max(initial=0.0)
                                    <= r * (1 + 1e-9) + 1e-12), (kinds, known)
    assert time.process_time() - start < 60


@pytest.mark.parametrize("q, sigma, steps, delta", [
    (0.02, 1.0, 500, 1e-5), (0.5, 1.5523, 30, 1e-5), (1e-6, 0.5, 10**6, 1e-6), (0.3, 40.0, 1000, 1e-8),
    (0.9, 0.6, 2, 1e-4),
    (0.016628129644796995, 0.10013856882956686, 949, 1e-5)])  # the last one's rates were once -inf
def test_simple_attacks_stay_below_the_tight_numbers(q, sigma, steps, delta):
    known = pld.statement_numbers([(q, sigma, steps)], delta)
    for quiet, heard in simple_attacks(q, sigma, steps):
        if known["epsilon_pld"] < 600:
            assert (heard - math.exp(known["epsilon_pld"]) * quiet).max() <= delta * (1 + 1e-7)
        for f, r in known["attacker"].items():
            assert heard[quiet <= f].max(initial=0.0) <= r * (1 + 1e-9)


def test_statement_numbers_are_those_of_the_single_functions():
    rows = [{"q": 0.05, "sigma": 4.0}] * 100
    known = pld.statement_numbers(rows, 1e-5, 3)
    assert known == pld.statement_numbers([(0.05, 4.0, 60), (0.05, 4.0, 40)], 1e-5, 3)
    assert known["epsilon_rdp"] == accountant.epsilon(0.05, 4.0, 100, 1e-5)
    assert known["epsilon_pld"] == accountant.epsilon(0.05, 4.0, 100, 1e-5, "pld")
    assert known["epsilon_for_group"] == pld.group_epsilon(3, 0.05, 4.0, 100, 1e-5)
    assert list(known["attacker"].values()) == pld.attacker_tpr(0.05, 4.0, 100).tolist()
    assert pld.statement_numbers([], 1e-5) == {"epsilon_rdp": 0, "epsilon_pld": 0, "epsilon_for_group": 0,
                                               "attacker": {0.001: 0.001, 0.01: 0.01, 0.1: 0.1}}
    mixed = pld.statement_numbers([(0.05, 4.0, 60), (0.02, 3.0, 40)], 1e-5, 3)
    worst = pld.statement_numbers([(0.05, 3.0, 100)], 1e-5, 3)
    for key in ("epsilon_rdp", "epsilon_pld", "epsilon_for_group"):
        assert pld.statement_numbers([(0.05, 4.0, 60)], 1e-5, 3)[key] < mixed[key] < worst[key]
    below = pld.statement_numbers([(0.05, 4.0, 100)], 1e-11, 3)  # no dead end: Renyi's number takes the place
    assert below["epsilon_pld"] == below["epsilon_rdp"] == accountant.epsilon(0.05, 4.0, 100, 1e-11)
    assert below["epsilon_rdp"] < below["epsilon_for_group"] < math.inf


def test_many_kinds_of_steps_are_merged_soundly():
    rng = np.random.default_rng(0)
    rows = [{"q": 0.02 * rng.uniform(1, 1.05), "sigma": rng.uniform(1.1, 1.2)} for _ in range(500)]
    kinds = accountant.count_steps(rows)
    assert len(kinds) <= accountant.MAX_KINDS and sum(kinds.values()) == 500
    every = {(row["q"], row["sigma"]): 1 for row in rows}
    exact = accountant.epsilon_by_moments(accountant.composed(every), 1e-5)[0]
    assert exact <= accountant.epsilon_of_ledger(rows, 1e-5) <= 1.1 * exact


STRANGE = [math.nan, math.inf, -math.inf, -1.0, 0.0, 5e-324, 1e-320, 1e300, 10**400, 1, 2, 1e-200, 10000,
           1e-300, 1e-11]


def test_every_function_answers_or_refuses_in_one_line():
    rng, start = np.random.default_rng(1), time.process_time()

    def one_of(low, high, whole=False):
        x = STRANGE[rng.integers(len(STRANGE))] if rng.random() < 0.4 else 10 ** rng.uniform(low, high)
        return int(x) if whole and abs(x) < 1e300 else x

    tried = 0
    while tried < 150 and (tried < 60 or time.process_time() - start < 8):
        tried += 1
        q, sigma, steps, delta = one_of(-4, 0), one_of(-1, 300), one_of(0, 3, True), one_of(-9, -1)
        eps, k, method = one_of(-1, 3), one_of(0, 2, True), ("rdp", "pld")[tried % 2]
        for function, *arguments in (
                (accountant.epsilon, q, sigma, steps, delta, method),
                (calculator.max_steps, eps, delta, q, sigma),
                (accountant.noise_multiplier, eps, delta, q, steps),
                (pld.group_epsilon, k, q, sigma, steps, delta), (pld.attacker_tpr, q, sigma, steps, delta),
                (accountant.epsilon_of_ledger, [{"q": q, "sigma": sigma}] * 3, delta, method)):
            try:
                assert function(*arguments) >= 0, (function, arguments)  # not nan either
            except ValueError as error:
                assert "\n" not in str(error)


def test_calibration_at_the_ends():
    for method in ("rdp", "pld"):
        assert accountant.noise_multiplier(1e300, 1e-5, 0.1, 10, method) == pytest.approx(1e-3)
        assert accountant.epsilon(0.1, accountant.noise_multiplier(10000, 1e-5, 0.1, 10, method), 10, 1e-5,
                                  method) <= 10000
        with pytest.raises(ValueError, match="out of reach"):
            accountant.noise_multiplier(1e-300, 1e-10, 0.1, 10, method)
        target = accountant.epsilon(1.0, 9e5, 10**9, 1e-5, method)  # needs nearly the largest sigma
        assert accountant.noise_multiplier(target, 1e-5, 1.0, 10**9, method) == pytest.approx(9e5, rel=1e-5)
    # steps that cost a little are not free
    assert 1e12 <= calculator.max_steps(1.0, 1e-5, 1e-10, 1e4) < math.inf
    assert calculator.max_steps(1.0, 1e-5, 0.1, math.inf) == math.inf


@pytest.mark.parametrize("sigma, steps, k", [(3.0, 3, 20), (4.0, 2, 20), (0.5, 2, 1), (0.3, 1, 1),
                                             (12.0, 10, 1)])
def test_full_batches_beside_sampled_ones(sigma, steps, k):
    """A vote (q = 1) beside a step that costs next to nothing costs what it costs alone, which is known."""
    alone, _ = pld.bounds({(1.0, sigma): steps}, 1e-4, k)
    lower, upper = pld.bounds({(1.0, sigma): steps, (1e-7, 5.0): 1}, 1e-4, k)
    assert lower <= alone <= upper < alone * 1.003 and lower > alone * 0.99
    assert pld.bounds({(0.999, sigma): steps}, 1e-4, k)[1] <= upper
    assert pld.bounds({(1.0, sigma): steps, (0.1, 2.0): 2}, 1e-4, k)[1] > alone
