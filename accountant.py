"""Privacy accountant of DP-SGD: how much epsilon do T noisy steps cost?  (RDP part; PLD follows)"""

import math
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import comb, gammaln, logsumexp, xlog1py


def _check(q=0.0, sigma=1.0, steps=0, delta=0.5, method="rdp"):
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q}: the sampling probability must lie in [0, 1] (batch / n)")
    if not sigma >= 0:
        raise ValueError(f"sigma = {sigma}: the noise multiplier must be >= 0 (noise std / clip norm)")
    if not steps >= 0 or steps != int(steps):
        raise ValueError(f"steps = {steps}: give a whole number >= 0 of logical steps")
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: must lie strictly between 0 and 1 (usually below 1 / n)")
    if method not in ("rdp", "pld"):
        raise ValueError(f"method = {method!r}: choose 'rdp' or 'pld'")


def _ratio(x, q, sigma, k=1):
    """(u, L) at outputs x (n,): P(x)/Q(x) = 1 + u = exp(L)."""
    j = np.arange(1, k + 1)
    b = comb(k, j) * q**j * (1 - q) ** (k - j)
    w = (np.outer(x, j) - j * j / 2) / sigma**2  # (n, k)
    u = np.expm1(np.minimum(w, 600.0)) @ b
    with np.errstate(divide="ignore"):
        loss = np.log1p(np.maximum(u, -1.0))
    big = w.max(axis=1) > 600
    if big.any():
        loss[big] = logsumexp(w[big], axis=1, b=b)
    return u, loss


@lru_cache(maxsize=1 << 14)
def _log_moment(q, sigma, alpha, k=1, binomial=True):
    """log E_Q[(P/Q)^alpha] = (alpha - 1) R(alpha) of one step."""
    if k == 1 and q == 1:
        return alpha * (alpha - 1) / (2 * sigma**2)
    if k == 1 and binomial and alpha == int(alpha) and alpha <= 1e5:
        j = np.arange(2, int(alpha) + 1)
        s = j * (j - 1) / (2 * sigma**2)
        log_binomial = gammaln(alpha + 1) - gammaln(j + 1) - gammaln(alpha - j + 1)
        log_expm1 = s + np.log(-np.expm1(-s))
        excess = logsumexp(log_binomial + j * math.log(q) + xlog1py(alpha - j, -q) + log_expm1)
        return float(np.logaddexp(0.0, excess))
    h, top = min(0.5, sigma / (2 * k)), alpha * k / sigma + 10.0
    if k == 1 and top / h > 5e6:
        return float(np.logaddexp(math.log1p(-q), math.log(q) + alpha * (alpha - 1) / (2 * sigma**2)))
    z = np.arange(-10.0, top + h, h)
    u, loss = _ratio(z * sigma, q, sigma, k)
    y, a = alpha * loss, alpha
    series = a * (a - 1) / 2 * u * u * (1 + (a - 2) / 3 * u * (1 + (a - 3) / 4 * u * (1 + (a - 4) / 5 * u)))
    with np.errstate(all="ignore"):
        log_g = np.where(y > 1, y + np.log1p(-(1 + a * u) * np.exp(-y)), np.log(np.expm1(y) - a * u))
        log_g = np.where(a * np.abs(u) < 1e-2, np.log(series), log_g)
    excess = logsumexp(log_g - z * z / 2) + math.log(h / math.sqrt(2 * math.pi))
    return float(np.logaddexp(0.0, excess))


def rdp(q, sigma, alphas):
    """Renyi DP of one step at each order: array shaped like alphas (>= 1.01, fractional too)."""
    _check(q, sigma)
    alphas = np.asarray(alphas, dtype=float)
    if not (alphas > 1).all():
        raise ValueError("alphas: Renyi orders must be above 1 (use 1.01 or more)")
    if q == 0:
        return np.zeros(alphas.shape)
    if sigma == 0:
        return np.full(alphas.shape, np.inf)
    return np.array([_log_moment(q, sigma, a) / (a - 1) for a in alphas.ravel().tolist()]).reshape(alphas.shape)


def _minimise(f):
    """Order alpha > 1 minimising a quasi-convex f: gallop over log(alpha - 1), then Brent."""
    step, t = 1.0, math.log(7.0)
    g = lru_cache(maxsize=None)(lambda t: f(1 + math.exp(t)))
    step = 1.0 if g(t + 1) < g(t) else -1.0
    while g(t + step) < g(t) and -12 < t < 40:
        t += step
    best = minimize_scalar(g, bounds=(t - 1, t + 1), method="bounded", options={"xatol": 1e-5})
    return (1 + math.exp(best.x), best.fun) if best.fun < g(t) else (1 + math.exp(t), g(t))


def _convert(alpha):
    return (alpha - 1) * math.log1p(-1 / alpha) - math.log(alpha)


def _total(groups, alpha):
    return sum(steps * _log_moment(q, sigma, alpha, k) for (q, sigma, k), steps in groups)


def _rdp_epsilon(groups, delta):
    if not groups or any(sigma == 0 for (_, sigma, _), _ in groups):
        return (math.inf if groups else 0.0), math.nan
    order, eps = _minimise(lambda a: (_total(groups, a) + _convert(a) - math.log(delta)) / (a - 1))
    return max(0.0, eps), order


def _rdp_delta(groups, eps):
    if not groups or any(sigma == 0 for (_, sigma, _), _ in groups):
        return 1.0 if groups else 0.0
    return min(1.0, math.exp(min(0.0, _minimise(lambda a: _total(groups, a) + _convert(a) - (a - 1) * eps)[1])))


def _one(q, sigma, steps, k=1):
    return (((float(q), float(sigma), k), int(steps)),) if q > 0 and steps > 0 else ()


def _epsilon(groups, delta, method):
    return _rdp_epsilon(groups, delta)[0]


def rdp_epsilon(q, sigma, steps, delta):
    """(epsilon, best order) by RDP."""
    _check(q, sigma, steps, delta)
    return _rdp_epsilon(_one(q, sigma, steps), delta)


def epsilon(q, sigma, steps, delta, method="rdp"):
    """epsilon of `steps` steps at delta."""
    _check(q, sigma, steps, delta, method)
    return _epsilon(_one(q, sigma, steps), delta, method)


def delta(q, sigma, steps, epsilon, method="rdp"):
    """delta at epsilon."""
    _check(q, sigma, steps, method=method)
    return _rdp_delta(_one(q, sigma, steps), epsilon)


def epsilon_of_ledger(rows, delta, method="rdp"):
    """epsilon of heterogeneous steps: rows of dicts with "q" and "sigma", one per logical step."""
    _check(delta=delta, method=method)
    counts = {}
    for row in rows:
        _check(row["q"], row["sigma"])
        if row["q"] > 0:
            key = (float(row["q"]), float(row["sigma"]), 1)
            counts[key] = counts.get(key, 0) + 1
    return _epsilon(tuple(sorted(counts.items())), delta, method)


def noise_multiplier(epsilon, delta, q, steps, method="rdp"):
    """Smallest sigma with epsilon(sigma) <= epsilon."""
    _check(q, 1.0, steps, delta, method)
    if not epsilon > 0 or math.isinf(epsilon):
        raise ValueError(f"epsilon = {epsilon}: the target must be positive and finite")
    if q == 0 or steps == 0:
        return 0.0

    def excess(log_sigma):
        return _epsilon(_one(q, math.exp(log_sigma), steps), delta, method) - epsilon

    lo = hi = 0.0
    while excess(hi) > 0:
        hi += 1
        if hi > 20:
            raise ValueError(f"epsilon = {epsilon}: unreachable with delta = {delta}, q = {q}, {steps} steps")
    while excess(lo) <= 0 and lo > -9:
        lo -= 1
    sigma = math.exp(brentq(excess, lo, hi, xtol=1e-7)) if excess(lo) > 0 else math.exp(lo)
    while excess(math.log(sigma)) > 0:
        sigma *= 1 + 1e-7
    assert _epsilon(_one(q, sigma, steps), delta, method) <= epsilon
    return sigma
