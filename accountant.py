"""Privacy accountant of DP-SGD: what do T noisy steps cost? Only pld bounds every error.

Symbols: q sampling probability, sigma noise multiplier, T number of noisy steps, alpha Renyi order. The clip
norm C is 1, so sigma is the standard deviation of the noise.

One step sums the clipped gradients of a Poisson batch and adds Gaussian noise. Neighbouring data sets differ
by one example, added or removed. At worst its gradient has length 1. The worst attacker knows the gradients
of all other examples in the batch. This attacker subtracts them from the noisy sum and keeps only the
component along the one unknown gradient (Mironov, Talwar, Zhang 2019). What is left is distributed as

    Q = N(0, sigma^2) without it,     P = (1-q) N(0, sigma^2) + q N(1, sigma^2) with it.

An accountant is one function of (kinds, delta) that returns epsilon. kinds is {(q, sigma): T}: how many steps
of each kind were made.
  rdp   Renyi moments, in this file (Mironov, Talwar, Zhang 2019). They are exact for one step and add up over
        steps. Turning them into epsilon (Canonne, Kamath, Steinke 2020) mostly loses 5 to 15 % against "pld",
        and more where q is small and sigma below 1. Its sums are float64, exact to about 1e-9.
  pld   The distribution of the privacy loss log P/Q, in extensions/pld.py. Tight, with bounds on every error.
        Where float64 ends (sigma far below 0.1, say), it is the bound of "rdp" or one as loose.
The argument `method` takes one of these names, or a function of your own. Here its default is "rdp", which
needs this file only. Runs state "pld", the default of `train.py --accountant`.

    python accountant.py --n 60000 --batch 2000 --epochs 200 --delta 1e-5 --sigma 1.47   # or --epsilon 10
    python accountant.py runs/a runs/b                        # what runs have spent, alone and together
"""
import math
from collections import Counter
from functools import lru_cache

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.special import logsumexp

MAX_KINDS = 64  # if there are more pairs (q, sigma), similar ones are merged, to save time


# ----------------------------------------------------------------------------------- steps: what is counted

def check(q=0.0, sigma=1.0, steps=0, delta=0.5):
    """ValueError for numbers out of range. Every default is in range, so pass only what is to be checked."""
    if not 0 <= q <= 1:  # nan fails every comparison, so it is refused as well
        raise ValueError(f"q = {q}: the sampling probability must lie in [0, 1]; it is batch / n")
    if not sigma >= 0:
        raise ValueError(f"sigma = {sigma}: the noise multiplier must be >= 0; it is noise std / clip norm")
    if not 0 <= steps < math.inf or steps != int(steps):
        raise ValueError(f"steps = {steps}: give a whole number >= 0 of noisy steps")
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: must lie strictly between 0 and 1, usually below 1 / n")


def one_kind(q, sigma, steps):
    """One kind of step as {(q, sigma): steps}, {} if free.

    Numbers that would overflow further on are replaced by ones that cost more.
    """
    if q <= 0 or steps <= 0 or sigma == math.inf:
        return {}
    if sigma < 1e-60 or steps > 1e18:
        sigma = 0.0
    return {(max(float(q), 1e-60), float(min(sigma, 1e60))): int(min(steps, 10**18))}


def count_steps(rows):
    """A ledger's dicts, tuples (q, sigma, T), or {(q, sigma): T} -> {(q, sigma): T}, without free steps.

    Equal steps are counted together, so their cost is computed once. If there are more than MAX_KINDS kinds,
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
    while len(kinds) > MAX_KINDS:
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
    """log A = (alpha - 1) R(alpha) of ONE step, for any real order alpha > 1. R is the Renyi divergence.

    From the definition (Mironov 2017, Def. 3), with x drawn from Q:

        R(alpha) = D_alpha(P || Q) = log A / (alpha - 1),     A = E_Q[(P/Q)^alpha] = E[(1 + u)^alpha]
        u(x)     = P/Q - 1 = q (e^{(2x-1)/(2 sigma^2)} - 1),  E[u] = 0 as P and Q both integrate to 1

    1. D_alpha(Q || P) is never larger (Mironov, Talwar, Zhang 2019, Theorem 5). So this one direction holds
       for an example that is added and for one that is removed.
    2. A is often so close to 1 that float64 loses the difference: 1 + 1e-17 is 1. So A - 1 is computed.
    3. As E[u] = 0, alpha u may be subtracted within the expectation. Then no term is negative:
           A - 1 = E[g(u)],   g(u) = (1+u)^alpha - 1 - alpha u >= 0   (Bernoulli's inequality)
       This is a smooth integral over one Gaussian, which a trapezoid sum finds.

    For whole alpha the power can be expanded instead, into the better known binomial sum (Mironov, Talwar,
    Zhang 2019, Sec. 3.3). tests/test_accountant.py computes it and finds the same.
    """
    if q == 1:  # every example is in every batch: the plain Gaussian mechanism
        return alpha * (alpha - 1) * (1 / sigma) ** 2 / 2
    return moment_by_integral(q, sigma, alpha, excess_and_loss)


def excess_and_loss(x, q, sigma):
    """(u, log P/Q) at outputs x (n,), where u = P/Q - 1 is computed without cancellation."""
    w = (x - 0.5) / sigma**2  # log N(1, sigma^2) / N(0, sigma^2) at x
    u = q * np.expm1(np.minimum(w, 600.0))  # 600: e^w must not overflow
    return u, np.where(w > 600, math.log(q) + w, np.log1p(u))  # beyond 600, P/Q is q e^w


def moment_by_integral(q, sigma, alpha, likelihood_ratio, k=1):
    """log A by the integral of `log_moment`, or an upper bound where the sum would have too many points.

    likelihood_ratio: function (x, q, sigma) -> (u, log P/Q), as `excess_and_loss`. k: how many examples
    come and go together. They shift the mean under P by k at most. It is above 1 in extensions/pld.py only.
    """
    # Trapezoid sum over z = x / sigma with spacing h. With this h its relative error is about 1e-15 at most
    # (Trefethen and Weideman 2014, section 5). The error is e^(c^2/2 - 2 pi c / h) for any c up to
    # pi sigma: so far from the real axis the integrand is analytic (P = 0 at |Im z| = pi sigma), and there
    # the Gaussian has grown by e^(c^2/2). Take the c that makes it smallest.
    # The range: (P/Q)^alpha moves the centre of the integrand to alpha k / sigma at most. The sum ends 10
    # standard deviations beyond it.
    h, top = min(0.5, sigma / (2 * k)), alpha * k / sigma + 10.0
    if top / h * k > 2e5:  # for k examples each of the top / h points takes k times as long
        # Too many points, as there is little noise or a huge alpha. Use a bound instead. For k = 1, with
        # r = N(1, .)/N(0, .): (1-q+qr)^alpha <= 1-q + q r^alpha, by convexity. For larger k: if any of them
        # is in the batch, count all of them.
        none = k * math.log1p(-q)  # log of the probability that none of the k is in the batch
        full = alpha * (alpha - 1) * (k / sigma) ** 2 / 2  # log E[r^alpha], r = N(k, .)/N(0, .)
        return float(np.logaddexp(none, math.log(-math.expm1(none)) + full))
    z = np.arange(-10.0, top + h, h)  # outputs in units of sigma
    u, loss = likelihood_ratio(z * sigma, q, sigma)
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

    Relative error <= 1e-9 for orders in [1.01, 1000], q in [1e-5, 1], sigma in [0.3, 100]. `log_moment` has
    the derivation. ValueError for orders that are not above 1 and finite, and as `check`.
    """
    check(q, sigma)
    alphas = np.asarray(alphas, dtype=float)
    if not ((alphas > 1) & (alphas < np.inf)).all():
        raise ValueError("alphas: Renyi orders must be above 1 and finite; use 1.01 or more")
    if not (kind := one_kind(q, sigma, 1)):  # free
        return np.zeros(alphas.shape)
    [(q, sigma)] = kind
    if sigma == 0:
        return np.full(alphas.shape, math.inf)
    orders = alphas.ravel().tolist()
    return np.array([log_moment(q, sigma, a) / (a - 1) for a in orders]).reshape(alphas.shape)


# ------------------------------------------------------------------------------- from moments to epsilon

@np.errstate(all="ignore")
def best_order(f):
    """(minimum, best order) of f over all real orders alpha > 1. Any order gives a valid bound.

    log A and the terms that `log_delta` adds are convex in alpha. f is such a function, or one divided by
    alpha - 1; either has one minimum. Walk downhill in t = log(alpha - 1), then refine by Brent's method.
    """
    g = lru_cache(maxsize=None)(lambda t: f(1 + math.exp(t)))
    t = math.log(7.0)  # begin at order 8
    step = 1.0 if g(t + 1) < g(t) else -1.0
    while -12 < t < 40 and g(t + step) < g(t):  # orders from 1 + 6e-6 to 2e17
        t += step
    # The valley lies within one step of t, on either side.
    best = minimize_scalar(g, bounds=(t - 1, t + 1), method="bounded", options={"xatol": 1e-4})
    t = min(t, float(best.x), key=g)  # in case the refinement is no better
    return g(t), 1 + math.exp(t)


def log_delta(moment, alpha, eps):
    """log of the delta that order alpha proves at eps; moment(alpha) is log A of all steps together.

    It is Prop. 12 of Canonne, Kamath, Steinke 2020, rearranged: their alpha log(1-1/alpha) - log(alpha-1) is
    (alpha-1) log(1-1/alpha) - log(alpha). The older conversion (Mironov 2017, Prop. 3) is weaker:
    epsilon = R(alpha) + log(1/delta) / (alpha - 1).
    """
    return moment(alpha) - (alpha - 1) * eps + (alpha - 1) * math.log1p(-1 / alpha) - math.log(alpha)


def epsilon_by_moments(moment, delta):
    """(epsilon, the order that gave it): the smallest bound over all orders."""
    # log_delta falls by a - 1 for each unit of eps. Solve log_delta = log(delta) for eps.
    eps, order = best_order(lambda a: (log_delta(moment, a, 0.0) - math.log(delta)) / (a - 1))
    return max(0.0, eps), order


def composed(kinds):
    """The function alpha -> log A of all steps {(q, sigma): T}. The A of the steps multiply, so logs add."""
    return lambda alpha: sum(T * log_moment(q, sigma, alpha) for (q, sigma), T in kinds.items())


def renyi(kinds, delta):
    """(epsilon, its order) of steps {(q, sigma): T}. The order is nan if all are free or one has no noise."""
    check(delta=delta)
    kinds = count_steps(kinds)
    if not kinds or min(sigma for _, sigma in kinds) == 0:
        return (math.inf if kinds else 0.0), math.nan
    return epsilon_by_moments(composed(kinds), delta)


# --------------------------------------------------------------------------------------------- accountants

def by_rdp(kinds, delta):
    """The accountant "rdp": epsilon of steps {(q, sigma): T} at delta, the first result of `renyi`."""
    return renyi(kinds, delta)[0]


def by_pld(kinds, delta):
    """The accountant "pld": an upper bound on epsilon, all errors included; tight but where float64 ends."""
    from extensions import pld  # here, because this file stands alone without it
    return pld.epsilon_of(kinds, delta)


ACCOUNTANTS = {"rdp": by_rdp, "pld": by_pld}


def accountant(method):
    """The function that `method` names, or method itself if it is a function. ValueError for other names."""
    if not callable(method) and method not in ACCOUNTANTS:
        names = " or ".join(map(repr, ACCOUNTANTS))
        raise ValueError(f"method = {method!r}: choose {names}, or give a function of (kinds, delta)")
    return method if callable(method) else ACCOUNTANTS[method]


def cost(kinds, delta, method):
    """epsilon of steps {(q, sigma): T} by the accountant `method`. ValueError if its result is no epsilon."""
    value = float(accountant(method)(kinds, delta))
    if not value >= 0:  # "nan > target" is False, so a nan would look like an epsilon within the target
        raise ValueError(f"the accountant {method} gives epsilon {value}")
    return value


def epsilon(q, sigma, steps, delta, method="rdp"):
    """epsilon of `steps` equal steps at delta, for one example added or removed. See above for `method`.

    sigma = 0 gives inf; q = 0 or steps = 0 gives 0. ValueError as `check`; "pld" needs delta >= 1e-10.
    """
    check(q, sigma, steps, delta)
    return cost(one_kind(q, sigma, steps), delta, method)


def epsilon_of_ledger(rows, delta, method="rdp"):
    """epsilon of steps that may differ, as a ledger lists them: dicts with "q" and "sigma", one per step.

    Several runs on the same private images: concatenate their rows.
    """
    check(delta=delta)
    return cost(count_steps(rows), delta, method)


def noise_multiplier(epsilon, delta, q, steps, method="rdp", before=()):
    """A sigma in [1e-3, 1e6] whose epsilon is at most the target. One smaller by 1 part in 10^7 is too small.

    before: steps that the same images took part in before, as for `count_steps`; the target is for all.
    1e-3 is taken to be too small without a trial. 0 if q = 0 or steps = 0. ValueError if even sigma = 1e6 is
    not enough, for a target that is not positive and finite, and as `check`.
    """
    check(q, 1.0, steps, delta)
    if not 0 < epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: the target must be positive and finite")
    if q == 0 or steps == 0:
        return 0.0

    def enough(sigma):
        return cost(count_steps([*before, (q, sigma, steps)]), delta, method) <= epsilon

    # Bisection on a log scale: sigma = low is taken to be too little noise, sigma = high is enough.
    low, high = 1e-3, 1e6
    if not enough(high):
        raise ValueError(f"epsilon = {epsilon}: out of reach with sigma up to {high:g}; take fewer steps"
                         + ", the steps before have spent a part of it" * bool(before))
    while high / low > 1 + 1e-7:
        middle = math.sqrt(low * high)
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high  # not low: this very sigma was found to be enough


if __name__ == "__main__":
    from support import calculator, command_line
    command_line.run_cli(calculator.main)
