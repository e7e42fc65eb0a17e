"""Privacy accountant of DP-SGD: what do T noisy steps cost? It never understates epsilon.

One step sums the clipped gradients of a Poisson batch and adds Gaussian noise of deviation sigma. The unit is
the clip norm C = 1. Neighbouring data sets differ by one example, added or removed. At worst its gradient has
length 1. Subtract what the others add and project on that gradient: the output of a step is distributed as

    Q = N(0, sigma^2) without it,     P = (1-q) N(0, sigma^2) + q N(1, sigma^2) with it.

An accountant is one function of (steps, delta) that returns epsilon, where steps is {(q, sigma): T}.
  rdp   Renyi moments, in this file. They are exact for one step and add up over steps. Turning them into
        epsilon loses 5 to 15 % (Mironov, Talwar, Zhang 2019; Canonne, Kamath, Steinke 2020).
  pld   The distribution of the privacy loss log P/Q, in extensions/pld.py. Tight, with certified bounds.
The argument `method` takes one of these names, or a function of your own.
Symbols: q sampling probability, sigma noise multiplier, T number of noise additions, alpha Renyi order.

    python accountant.py --n 60000 --batch 2000 --epochs 200 --delta 1e-5 --sigma 1.47   # or --epsilon 10
    python accountant.py runs/a runs/b                        # what runs have spent, alone and together
"""
import math
from collections import Counter
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import gammaln, logsumexp, xlog1py

MOST_KINDS = 64  # so many different (q, sigma) are counted; if there are more, similar ones are merged


# ----------------------------------------------------------------------------------- steps: what is counted

def check(q=0.0, sigma=1.0, steps=0, delta=0.5):
    """ValueError for numbers out of range; the defaults pass. nan fails every comparison: refused as well."""
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q}: the sampling probability must lie in [0, 1]; it is batch / n")
    if not sigma >= 0:
        raise ValueError(f"sigma = {sigma}: the noise multiplier must be >= 0; it is noise std / clip norm")
    if not 0 <= steps < math.inf or steps != int(steps):
        raise ValueError(f"steps = {steps}: give a whole number >= 0 of logical steps")
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: must lie strictly between 0 and 1, usually below 1 / n")


def one_kind(q, sigma, steps):
    """One kind of step as {(q, sigma): steps}, {} if free. Extreme numbers become ones that cost more."""
    if q <= 0 or steps <= 0 or sigma == math.inf:
        return {}
    if sigma < 1e-60 or steps > 1e18:
        sigma = 0.0
    return {(max(float(q), 1e-60), float(min(sigma, 1e60))): int(min(steps, 10**18))}


def count_steps(rows):
    """A ledger's dicts, tuples (q, sigma, T), or {(q, sigma): T} -> {(q, sigma): T}, without free steps.

    Equal steps are counted together, so their cost is computed once. If there are more than MOST_KINDS kinds,
    similar ones are merged into one that costs at least as much. ValueError for rows without numbers.
    """
    counts, kinds = Counter(), Counter()
    try:
        if isinstance(rows, dict):
            rows = [(*kind, count) for kind, count in rows.items()]
        for row in rows:  # a tuple, or a ledger's dict, which is one step
            q, sigma, count = row if isinstance(row, (tuple, list)) else (row["q"], row["sigma"], 1)
            check(steps=count)
            counts[float(q), float(sigma)] += int(count)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"ledger: every row needs the numbers q and sigma ({error!r})") from None
    for (q, sigma), count in sorted(counts.items()):
        check(q, sigma)
        kinds.update(one_kind(q, sigma, count))
    # Merge neighbours in sigma: the larger q with the smaller sigma costs at least as much as either.
    while len(kinds) > MOST_KINDS:
        by_sigma = sorted(kinds.items(), key=lambda item: item[0][1])
        kinds = Counter()
        for i in range(0, len(by_sigma), 2):
            pair = by_sigma[i : i + 2]
            larger_q, smaller_sigma = max(q for (q, _), _ in pair), pair[0][0][1]
            kinds.update(one_kind(larger_q, smaller_sigma, sum(count for _, count in pair)))
    return dict(sorted(kinds.items()))


# ------------------------------------------------------------------------------------- Renyi DP of one step

@lru_cache(maxsize=1 << 14)
def log_moment(q, sigma, alpha):
    """log A = log E_Q[(P/Q)^alpha] = (alpha - 1) R(alpha) of one step. `rdp` derives it."""
    if q == 1:  # no sampling: the plain Gaussian mechanism
        return alpha * (alpha - 1) * (1 / sigma) ** 2 / 2
    if alpha == int(alpha) and alpha <= 1e5:  # the series has alpha terms
        return moment_by_series(q, sigma, alpha)
    return moment_by_integral(q, sigma, alpha, ratio)


def moment_by_series(q, sigma, alpha):
    """log A for an integer order alpha: step 3 of the derivation in `rdp`."""
    j = np.arange(2, int(alpha) + 1)  # the terms j = 0 and 1 vanish
    s = j * (j - 1) / (2 * sigma**2)
    log_binomial = gammaln(alpha + 1) - gammaln(j + 1) - gammaln(alpha - j + 1)
    log_expm1 = s + np.log(-np.expm1(-s))  # log(e^s - 1) without overflow
    # log(A - 1): the binomial weights C(alpha, j) q^j (1-q)^(alpha-j), times e^s - 1, summed.
    excess = logsumexp(log_binomial + j * math.log(q) + xlog1py(alpha - j, -q) + log_expm1)
    return float(np.logaddexp(0.0, excess))  # log A = log(1 + (A - 1))


def ratio(x, q, sigma):
    """(u, log P/Q) at outputs x (n,), where u = P/Q - 1 is computed without cancellation."""
    w = (x - 0.5) / sigma**2  # log N(1, sigma^2) / N(0, sigma^2) at x
    u = np.maximum(q * np.expm1(np.minimum(w, 600.0)), -1.0)  # 600: e^w must not overflow
    with np.errstate(divide="ignore"):
        return u, np.where(w > 600, math.log(q) + w, np.log1p(u))  # beyond 600, P/Q is q e^w


def moment_by_integral(q, sigma, alpha, ratio, k=1):
    """log A for any order alpha: step 4 of the derivation in `rdp`.

    ratio: function (x, q, sigma) -> (u, log P/Q), as `ratio`. k: how many examples come and go together. They
    shift the mean under P by k at most. It is above 1 in extensions/pld.py only.
    """
    # Trapezoid sum over z = x / sigma with spacing h. The integrand is analytic up to |Im z| = pi sigma,
    # where P = 0. So the error is about exp(-2 pi^2 sigma / h) of the sum, at most e^-39. (P/Q)^alpha moves
    # the centre of the integrand to alpha k / sigma at most. The sum ends 10 standard deviations beyond it.
    h, top = min(0.5, sigma / (2 * k)), alpha * k / sigma + 10.0
    if top / h * k > 2e5:
        # Too many points, as there is little noise or a huge alpha. Use a bound instead, by convexity (k = 1:
        # (1-q+qr)^alpha <= 1-q + q r^alpha with r = N(1, .)/N(0, .)); if any of the k are in, count all of k.
        none = k * math.log1p(-q)  # log of the probability that none of the k is in the batch
        full = alpha * (alpha - 1) * (k / sigma) ** 2 / 2  # log E[r^alpha], r = N(k, .)/N(0, .)
        return float(np.logaddexp(none, math.log(-math.expm1(none)) + full))
    z = np.arange(-10.0, top + h, h)  # outputs in units of sigma
    u, loss = ratio(z * sigma, q, sigma)
    a, y = alpha, alpha * loss
    with np.errstate(all="ignore"):
        # log g(u), g(u) = (1+u)^alpha - 1 - alpha u, with e^y = (1+u)^alpha. Three forms avoid overflow and
        # cancellation: for y > 1, for other y, and Taylor's for small u.
        log_g = np.where(y > 1, y + np.log1p(-(1 + a * u) * np.exp(-y)), np.log(np.expm1(y) - a * u))
        series = 1 + (a - 2) / 3 * u * (1 + (a - 3) / 4 * u * (1 + (a - 4) / 5 * u))
        log_g = np.where(a * np.abs(u) < 1e-2, np.log(a * (a - 1) / 2 * u * u * series), log_g)
    # The sum of g times the density of a standard normal, times the spacing.
    excess = logsumexp(log_g - z * z / 2) + math.log(h / math.sqrt(2 * math.pi))
    return float(np.logaddexp(0.0, excess))


def rdp(q, sigma, alphas):
    """Renyi DP of ONE step at every order alpha > 1, fractional ones too: an array shaped like alphas.

    Relative error <= 1e-9 for orders in [1.01, 1000], q in [1e-5, 1], sigma in [0.3, 100].
    From the definition (Mironov 2017, Def. 3), with x drawn from Q:

        R(alpha) = D_alpha(P || Q) = log A / (alpha - 1),     A = E_Q[(P/Q)^alpha] = E[(1 + u)^alpha]
        u(x)     = P/Q - 1 = q (e^{(2x-1)/(2 sigma^2)} - 1),  E[u] = 0 as P and Q both integrate to 1

    1. D_alpha(Q || P) is never larger (Mironov, Talwar, Zhang 2019, Theorem 5). So this one direction holds
       for an example that is added and for one that is removed.
    2. A is often so close to 1 that float64 loses the difference: 1 + 1e-17 is 1. So A - 1 is computed, as a
       sum of positive terms.
    3. Integer alpha: expand the power. E[e^{j(2x-1)/(2 sigma^2)}] = e^{j(j-1)/(2 sigma^2)}, and the binomial
       weights add to 1. In log space:
           A - 1 = sum_{j=2..alpha} C(alpha, j) (1-q)^{alpha-j} q^j (e^{j(j-1)/(2 sigma^2)} - 1)
    4. Fractional alpha: that series would alternate in sign. But E[u] = 0, so alpha u may be subtracted
       within the expectation:
           A - 1 = E[g(u)],   g(u) = (1+u)^alpha - 1 - alpha u >= 0   (Bernoulli's inequality)
       This is a smooth positive integral over one Gaussian, which a trapezoid sum finds.
    """
    check(q, sigma)
    alphas = np.asarray(alphas, dtype=float)
    if not ((alphas > 1) & (alphas < np.inf)).all():
        raise ValueError("alphas: Renyi orders must be above 1 and finite; use 1.01 or more")
    steps = one_kind(q, sigma, 1)
    if not steps or any(sigma == 0 for _, sigma in steps):  # free, or without noise
        return np.full(alphas.shape, math.inf if steps else 0.0)
    values = [composed(steps)(a) / (a - 1) for a in alphas.ravel().tolist()]
    return np.array(values).reshape(alphas.shape)


# ------------------------------------------------------------------------------- from moments to epsilon

@np.errstate(all="ignore")
def best_order(f):
    """(best order, minimum) of f over all real orders alpha > 1. Any order gives a valid bound.

    log A and the terms that `log_delta` adds are convex in alpha. f is such a function divided by alpha - 1,
    so it has one minimum. Walk downhill in t = log(alpha - 1), then refine by Brent's method.
    """
    g = lru_cache(maxsize=None)(lambda t: f(1 + math.exp(t)))
    t = math.log(7.0)  # begin at order 8
    step = 1.0 if g(t + 1) < g(t) else -1.0
    while -12 < t < 40 and g(t + step) < g(t):  # orders from 1 + 6e-6 to 2e17
        t += step
    # The valley lies within one step of t, on either side.
    best = minimize_scalar(g, bounds=(t - 1, t + 1), method="bounded", options={"xatol": 1e-4})
    t = min(t, float(best.x), key=g)  # in case the refinement is no better
    return 1 + math.exp(t), g(t)


def log_delta(moment, alpha, eps):
    """log of the delta that order alpha proves at eps; moment(alpha) is log A of all steps together.

    It is Prop. 12 of Canonne, Kamath, Steinke 2020. Markov's inequality on (P/Q)^(alpha-1) under P is weaker.
    """
    return moment(alpha) - (alpha - 1) * eps + (alpha - 1) * math.log1p(-1 / alpha) - math.log(alpha)


def epsilon_by_moments(moment, delta):
    """(epsilon, the order that gave it): the smallest bound over all orders."""
    # log_delta falls by a - 1 for each unit of eps. Solve log_delta = log(delta) for eps.
    order, eps = best_order(lambda a: (log_delta(moment, a, 0.0) - math.log(delta)) / (a - 1))
    return max(0.0, eps), order


def composed(steps):
    """The function alpha -> log A of all steps {(q, sigma): T}. The A of the steps multiply, so logs add."""
    return lambda alpha: sum(T * log_moment(q, sigma, alpha) for (q, sigma), T in steps.items())


def renyi(steps, delta):
    """(epsilon, its order) of steps {(q, sigma): T}. The order is nan if all are free or one has no noise."""
    check(delta=delta)
    steps = count_steps(steps)
    if not steps or min(sigma for _, sigma in steps) == 0:
        return (math.inf if steps else 0.0), math.nan
    return epsilon_by_moments(composed(steps), delta)


# --------------------------------------------------------------------------------------------- accountants

def epsilon_of(steps, delta):
    """The accountant "rdp": epsilon of steps {(q, sigma): T} at delta, the first result of `renyi`."""
    return renyi(steps, delta)[0]


def tight(steps, delta):
    """The accountant "pld": an upper bound on epsilon that is certified and tight."""
    from extensions import pld  # here, because this file stands alone without it
    return pld.epsilon_of(steps, delta)


ACCOUNTANTS = {"rdp": epsilon_of, "pld": tight}


def accountant(method):
    """The function that `method` names, or method itself if it is a function. ValueError for other names."""
    if not callable(method) and method not in ACCOUNTANTS:
        names = " or ".join(map(repr, ACCOUNTANTS))
        raise ValueError(f"method = {method!r}: choose {names}, or give a function of (steps, delta)")
    return method if callable(method) else ACCOUNTANTS[method]


def cost(steps, delta, method):
    """epsilon of steps {(q, sigma): T} by the accountant `method`. ValueError if its result is no epsilon."""
    value = float(accountant(method)(steps, delta))
    if not value >= 0:  # "nan > target" is False, so a nan would look like an epsilon within the target
        raise ValueError(f"the accountant {method} gives epsilon {value}")
    return value


def epsilon(q, sigma, steps, delta, method="rdp"):
    """epsilon of `steps` equal steps at delta, never understated, for one example added or removed.

    sigma = 0 gives inf; q = 0 or steps = 0 gives 0. ValueError for q outside [0, 1], sigma < 0, steps < 0, or
    delta outside (0, 1); "pld" needs delta >= 1e-10.
    """
    check(q, sigma, steps, delta)
    return cost(one_kind(q, sigma, steps), delta, method)


def epsilon_of_ledger(rows, delta, method="rdp"):
    """epsilon of steps that may differ, as a ledger lists them: dicts with "q" and "sigma", one per step.

    Several runs on the same private images: concatenate their rows.
    """
    check(delta=delta)
    return cost(count_steps(rows), delta, method)


def noise_multiplier(epsilon, delta, q, steps, method="rdp"):
    """Smallest sigma, within rounding and at least 1e-3, whose epsilon does not exceed the target.

    Rounding errs towards more noise. 0 if q = 0 or steps = 0. ValueError if even sigma = 1e6 is not enough.
    """
    check(q, 1.0, steps, delta)
    if not 0 < epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: the target must be positive and finite")
    if q == 0 or steps == 0:
        return 0.0

    def excess(log_sigma):  # epsilon above the target; falls as sigma grows; finite, as brentq wants it
        return min(cost(one_kind(q, math.exp(log_sigma), steps), delta, method), 1e308) - epsilon

    # Start, step and tolerance of the search, in log sigma. Accountants other than "rdp" are slow. So their
    # search begins near the sigma that "rdp" finds, with small steps.
    if accountant(method) is epsilon_of:
        start, step, tolerance = 0.0, 1.0, 1e-8
    else:
        start, step, tolerance = math.log(noise_multiplier(epsilon, delta, q, steps)), 0.08, 1e-6
    # A bracket: epsilon is too large at low, and not too large at high.
    high = low = start
    while excess(high) > 0:
        if high == math.log(1e6):
            raise ValueError(f"epsilon = {epsilon}: out of reach with sigma up to 1e6; take fewer steps")
        low, high = high, min(high + step, math.log(1e6))
    while excess(low) <= 0 and low > math.log(1e-3):
        low, high = max(low - step, math.log(1e-3)), low
    log_sigma = brentq(excess, low, high, xtol=tolerance) if excess(low) > 0 else low
    # The root is known up to the tolerance. Enlarge sigma until epsilon is on the safe side.
    while excess(log_sigma) > 0:
        log_sigma, tolerance = log_sigma + tolerance, 2 * tolerance
    sigma = math.exp(log_sigma)
    assert cost(one_kind(q, sigma, steps), delta, method) <= epsilon
    return sigma


if __name__ == "__main__":
    from support import calculator  # the command line
    raise SystemExit(calculator.main())
