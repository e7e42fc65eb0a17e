"""Privacy accountant of DP-SGD: what do T noisy steps cost?  Stands alone (numpy, scipy); never understates epsilon.

One step adds N(0, sigma^2) noise (unit: the clip norm C) to the sum of the clipped gradients of a Poisson batch, to
which each example belongs with probability q.  Neighbouring data sets differ by one example, added or removed; seen
along the gradient of that example:

    Q = N(0, sigma^2) without it,     P = (1-q) N(0, sigma^2) + q N(1, sigma^2) with it.

Two roads lead from (q, sigma, T) to (epsilon, delta):
  rdp   Renyi moments: exact for one step, they add over steps; turning them into epsilon is 5 to 10 % loose.
        (Mironov, Talwar, Zhang 2019; Balle et al. 2020; Canonne, Kamath, Steinke 2020)
  pld   the distribution of the privacy loss log P/Q, composed by FFT: tight, with a certified lower bound beside it.
        (Doroshenko et al. 2022 for the upper bound, Gopi et al. 2021 for the idea of the lower one)
Names: q sampling probability, sigma noise multiplier, alpha order, theta = alpha - 1, T = steps = noise additions.

    python accountant.py --n 60000 --batch 2000 --epochs 200 --delta 1e-5 --sigma 1.47     (or --epsilon 10)
    python accountant.py runs/a runs/b                                        (recompute, alone and composed)
"""

import argparse
import json
import math
import sys
from collections import Counter
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache
from pathlib import Path

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import comb, erfcx, gammainc, gammaln, logsumexp, ndtr, ndtri, xlog1py

# Inside this file a mechanism is `groups`: a tuple of ((q, sigma, k), steps); k examples come and go together (1).
MOST_KINDS = 64  # of steps (q, sigma).  More are merged, neighbours in sigma, each pair with its larger q and smaller sigma


def _check(q=0.0, sigma=1.0, steps=0, delta=0.5, method="rdp"):
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q}: the sampling probability must lie in [0, 1]; it is batch / n")
    if not sigma >= 0:
        raise ValueError(f"sigma = {sigma}: the noise multiplier must be >= 0; it is noise std / clip norm")
    if not 0 <= steps < math.inf or steps != int(steps):
        raise ValueError(f"steps = {steps}: give a whole number >= 0 of logical steps")
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: must lie strictly between 0 and 1, usually below 1 / n")
    if method not in ACCOUNTANTS:
        raise ValueError(f"method = {method!r}: choose {' or '.join(map(repr, ACCOUNTANTS))}")
    if method == "pld" and delta < PLD_DELTA:
        raise ValueError(f"delta = {delta}: below 1e-10 the pld certificate drowns in float64 rounding; use the method rdp "
                         "(train.py: --accountant rdp)")


def _one(q, sigma, steps, k=1):
    """One kind of step as `groups`.  What float64 cannot account for becomes something that costs more, never less."""
    if q <= 0 or steps <= 0 or sigma == math.inf:
        return ()
    if sigma < 1e-60 or steps > 1e18:
        sigma = 0.0
    return (((max(float(q), 1e-60), float(min(sigma, 1e60)), int(k)), int(min(steps, 10**18))),)


def _silent(groups):
    return any(sigma == 0 for (_, sigma, _), _ in groups)


def _weights(q, k):
    """How many of the k examples are in the batch: shifts 0..k and their binomial weights."""
    j = np.arange(k + 1)
    return j, comb(k, j) * q**j * (1 - q) ** (k - j)


def _ratio(x, q, sigma, k=1):
    """P/Q = 1 + u = e^L at outputs x (n,): u without cancellation where it is small, the loss L at any size."""
    j, b = (v[1:] for v in _weights(q, k))
    if len(x) > 1 and len(x) * k > 1 << 23:  # in pieces: the table (n, k) of a large group would not fit into memory
        return tuple(map(np.concatenate, zip(*(_ratio(half, q, sigma, k) for half in np.array_split(x, 2)), strict=True)))
    w = (np.outer(x, j) - j * j / 2) / sigma**2  # (n, k), log N(j, sigma^2) / N(0, sigma^2)
    u = np.maximum(np.expm1(np.minimum(w, 600.0)) @ b, -1.0)
    with np.errstate(divide="ignore"):
        loss = np.log1p(u)
    big = w.max(axis=1) > 600
    if big.any():
        loss[big] = logsumexp(w[big], axis=1, b=b)
    return u, loss


# ---- Renyi DP: one step exactly, addition, conversion --------------------------------------------------------------


@lru_cache(maxsize=1 << 14)
def _log_moment(q, sigma, alpha, k=1, binomial=True):
    """log A = log E_Q[(P/Q)^alpha] = (alpha - 1) R(alpha) of one step; derived in rdp()."""
    if q == 1:
        return alpha * (alpha - 1) * (k / sigma) ** 2 / 2
    if k == 1 and binomial and alpha == int(alpha) and alpha <= 1e5:
        j = np.arange(2, int(alpha) + 1)
        s = j * (j - 1) / (2 * sigma**2)
        log_binomial = gammaln(alpha + 1) - gammaln(j + 1) - gammaln(alpha - j + 1)
        log_expm1 = s + np.log(-np.expm1(-s))
        excess = logsumexp(log_binomial + j * math.log(q) + xlog1py(alpha - j, -q) + log_expm1)
        return float(np.logaddexp(0.0, excess))
    # Trapezoid sum over z = x / sigma.  The integrand is analytic until |Im z| = pi sigma (where P = 0), so the error
    # is about exp(-2 pi^2 sigma / h); the factor (P/Q)^alpha moves the bell by at most alpha k / sigma.
    h, top = min(0.5, sigma / (2 * k)), alpha * k / sigma + 10.0
    if top / h * k > 2e5:  # hardly any noise: convexity, (1-q+qr)^alpha <= 1-q + q r^alpha, sound and cheap
        none = k * math.log1p(-q)  # log P[none of the k is in the batch]; else as if all were
        return float(np.logaddexp(none, math.log(-math.expm1(none)) + alpha * (alpha - 1) * (k / sigma) ** 2 / 2))
    z = np.arange(-10.0, top + h, h)
    u, loss = _ratio(z * sigma, q, sigma, k)
    a, y = alpha, alpha * loss
    with np.errstate(all="ignore"):
        log_g = np.where(y > 1, y + np.log1p(-(1 + a * u) * np.exp(-y)), np.log(np.expm1(y) - a * u))
        taylor = a * (a - 1) / 2 * u * u * (1 + (a - 2) / 3 * u * (1 + (a - 3) / 4 * u * (1 + (a - 4) / 5 * u)))
        log_g = np.where(a * np.abs(u) < 1e-2, np.log(taylor), log_g)
    excess = logsumexp(log_g - z * z / 2) + math.log(h / math.sqrt(2 * math.pi))
    return float(np.logaddexp(0.0, excess))


def rdp(q, sigma, alphas):
    """Renyi DP of ONE step at every order: array shaped like alphas, any order above 1, fractional too.

    Relative error <= 1e-9 for orders in [1.01, 1000], q in [1e-5, 1], sigma in [0.3, 100].  ValueError for bad input.
    From the definition (Mironov 2017, Def. 3), with x drawn from Q:

        R(alpha) = D_alpha(P || Q) = log A / (alpha - 1),     A = E_Q[(P/Q)^alpha] = E[(1 + u)^alpha]
        u(x)     = P/Q - 1 = q (e^{(2x-1)/(2 sigma^2)} - 1),  E[u] = 0 as P and Q both integrate to 1

    1. The other direction, D_alpha(Q || P), is never larger (Mironov, Talwar, Zhang 2019, Theorem 5: a reflection swaps
       the two Gaussians).  "Removed" therefore covers "added".
    2. A is hardly above 1, and 1 + 1e-12 has lost its digits in float64: compute A - 1, as a sum of positive terms.
    3. Integer alpha: expand the power.  E[e^{j(2x-1)/(2 sigma^2)}] = e^{j(j-1)/(2 sigma^2)}; binomial weights add to 1:
           A - 1 = sum_{j=2..alpha} C(alpha, j) (1-q)^{alpha-j} q^j (e^{j(j-1)/(2 sigma^2)} - 1),   in log space.
    4. Fractional alpha: that series alternates in sign and cancels.  But E[u] = 0 lets us subtract the tangent at 0:
           A - 1 = E[g(u)],   g(u) = (1+u)^alpha - 1 - alpha u >= 0   (Bernoulli's inequality),
       a smooth positive integral over one Gaussian: a plain trapezoid sum in log space, g by Taylor for small u.
    """
    _check(q, sigma)
    alphas = np.asarray(alphas, dtype=float)
    if not ((alphas > 1) & (alphas < np.inf)).all():
        raise ValueError("alphas: Renyi orders must be above 1 and finite; use 1.01 or more")
    if q == 0 or sigma in (0, math.inf):
        return np.full(alphas.shape, np.inf if q > 0 and sigma == 0 else 0.0)
    values = [_log_moment(float(q), float(sigma), a) / (a - 1) for a in alphas.ravel().tolist()]
    return np.array(values).reshape(alphas.shape)


@np.errstate(all="ignore")
def _minimise(f):
    """(best order, minimum) of f over all real orders alpha > 1.

    What is minimised here has one valley: log A and (alpha-1) log(1-1/alpha) - log(alpha) are convex in alpha, and a
    convex function over the positive line alpha - 1 is quasi-convex.  So: walk downhill in log(alpha - 1), then Brent.
    There is no grid of orders and no edge of a grid; and whatever order comes out, its bound is valid."""
    g = lru_cache(maxsize=None)(lambda t: f(1 + math.exp(t)))
    t = math.log(7.0)
    step = 1.0 if g(t + 1) < g(t) else -1.0
    while -12 < t < 40 and g(t + step) < g(t):
        t += step
    best = minimize_scalar(g, bounds=(t - 1, t + 1), method="bounded", options={"xatol": 1e-4})
    t = min(t, float(best.x), key=g)
    return 1 + math.exp(t), g(t)


def _bound(groups, alpha, eps):
    """log delta at eps by order alpha: Markov's inequality on the privacy loss with its sharp constant, the maximum of
    e^{-theta (l-eps)} (1 - e^{eps-l}) over losses l (Canonne, Kamath, Steinke 2020, Prop. 12).  Steps add up."""
    moment = sum(steps * _log_moment(q, sigma, alpha, k) for (q, sigma, k), steps in groups)
    return moment - (alpha - 1) * eps + (alpha - 1) * math.log1p(-1 / alpha) - math.log(alpha)


def _rdp_epsilon(groups, delta):
    if not groups or _silent(groups):
        return (math.inf if groups else 0.0), math.nan
    order, eps = _minimise(lambda a: (_bound(groups, a, 0.0) - math.log(delta)) / (a - 1))
    return max(0.0, eps), order


def _rdp_delta(groups, eps):
    if not groups or _silent(groups):
        return (1.0 if groups else 0.0), math.nan
    order, log_delta = _minimise(lambda a: _bound(groups, a, eps))
    return math.exp(min(0.0, log_delta)), order


# ---- privacy loss distributions: certified bounds from both sides --------------------------------------------------
#
# delta(eps) = E_P[(1 - e^{eps-Y})_+], Y the sum over steps of the loss L = log P/Q.  The loss of one step is put on the
# grid h Z; T steps are a T-fold convolution.  Every error is inside the bounds:
#  grid, up    Connect the dots (Doroshenko et al. 2022): the mass of a cell moves to its two ends so that its P- and
#              its Q-mass stay.  The result dominates the true pair, and dominating pairs compose: no drift.
#  grid, down  The same move is a randomised rounding of Y to Y' = Y + D with |D| < h and mean in [0, h^2/8] given Y.
#              Over T steps D is sub-Gaussian, variance tau^2 = T h^2/4 (Hoeffding), about a mean <= tau^2/2.  As
#              (1 - e^{eps-y})_+ is concave but for its kink, rounding raises its mean only there, by at most
#              E[B(Y')] + eta tau, B(y) = tau/(2E^2) (E^2 + tau^2 - (y-eps)^2)_+, E = tau sqrt(2 log 1/eta).  Hence,
#              with eps' = eps + tau^2/2, delta(eps) >= E[(1 - e^{eps'-Y'})_+ - B(Y')] - eta tau.  (The idea is that
#              of Gopi et al. 2021, who shift eps by all of E; the kink costs only about tau E.)
#  tails       A step's mass beyond `tail` counts as infinite loss (up), or not at all (down); mass that leaves the
#              circle of the FFT is bounded by Chernoff.
#  rounding    Masses are tilted by e^{theta l}, theta = best order - 1, which moves the tail of interest into the
#              middle: FFT noise (Higham 2002, Theorem 24.2) is then small beside delta.  Cell masses err upwards by
#              their own rounding error; downwards, `pushed` and `surplus` take it back.

FFT_NOISE, MASS_NOISE, LEAK = 1e-15, 4e-15, 1e-10  # per FFT level; of a normal tail, relative; mass outside the circle
PLD_DELTA, PLD_Q, PLD_SIGMA, PLD_STEPS = 1e-10, 1e-7, 1e3, 1e7  # smallest, smallest, largest, most: inside, it is tested
# What is raised where float64, memory or those limits end.  Then a proven bound takes the place: Renyi's, or that of
# full batches.
BEYOND = (ArithmeticError, ValueError, MemoryError)


def _span(q, sigma, k, tail):
    """What matters of one step: outputs (x_low, x_high) with mass <= tail outside on either side, their losses."""
    j, b = _weights(q, k)
    x_low = sigma * float(ndtri(tail))
    x_high = brentq(lambda x: ndtr((j - x) / sigma) @ b - tail, 0.0, k - 2 * x_low) + 1e-9
    if (k - x_low) / sigma > 36:
        raise OverflowError("the privacy losses of one step leave the range of float64")
    return x_low, x_high, *_ratio(np.array([x_low, x_high]), q, sigma, k)[1]


def _masses(tails, sign):
    """(masses between edges, their rounding errors, mass before, mass after) from the smaller tail at each edge."""
    left, right = tails[:-1], tails[1:]
    mass = np.where(sign[1:] > 0, right - left, np.where(sign[:-1] < 0, left - right, 1 - left - right))
    return np.maximum(mass, 0.0), MASS_NOISE * np.maximum(left, right), tails[0], tails[-1]


def _cells(q, sigma, k, h, span):
    """One step cut at grid losses (n+1,): (losses, masses of P, masses of Q, slack: how far the cuts miss the grid)."""
    j, b = _weights(q, k)
    x_low, x_high, first, last = span
    loss = h * np.arange(math.floor(first / h), math.ceil(last / h) + 1)
    with np.errstate(all="ignore"):  # x(loss), the inverse of _ratio
        if k == 1:
            far = loss - math.log(q) + np.log1p((q - 1) * np.exp(-loss))
            x = sigma**2 * np.where(loss < 30, np.log1p(np.expm1(np.minimum(loss, 30)) / q), far) + 0.5
        else:  # table, then one Newton step
            table = np.linspace(x_low * 1.1 - 1, x_high * 1.1 + 1, 1 << 15)
            known, keep = np.unique(_ratio(table, q, sigma, k)[1], return_index=True)
            x, slope = np.interp(loss, known, table[keep]), np.gradient(table[keep], known)
            newton = (loss - _ratio(x, q, sigma, k)[1]) * np.interp(loss, known, slope)
            x = np.maximum.accumulate(x + np.where(np.abs(newton) < 0.1, newton, 0.0))
    if q < 1:
        x[loss <= k * math.log1p(-q)] = -np.inf  # the loss never falls that low
    finite = np.isfinite(x)
    miss = np.zeros(len(x))
    miss[finite] = _ratio(x[finite], q, sigma, k)[1] - loss[finite]
    slack = max(np.abs(miss[1:-1]).max(initial=0.0), -miss[0], miss[-1]) + 1e-15 * (1 + np.abs(loss).max())
    sign = np.where(x < 0, 1.0, -1.0)
    tails = ndtr(sign[:, None] * (x[:, None] - j) / sigma)  # (n+1, k+1)
    return loss, _masses(tails @ b, sign), _masses(tails[:, 0], sign), slack


def _connect_dots(loss, p, p_error, q, q_error, before, infinite, slack):
    """Cell masses (n,) -> (pmf (n+1,) on the grid, its surplus, P[pushed up by rounding], P[infinite loss])."""
    cell, scale = -np.expm1(loss[0] - loss[1]), np.exp(loss[:-1])
    safety = (p_error + scale * q_error) / cell + 3 * slack / cell * (p + p_error)
    up = np.minimum(np.clip((p - scale * q) / cell, 0.0, p) + safety, p + p_error)
    pmf, surplus = np.append(p + p_error - up, 0.0), np.append(2 * p_error, 0.0)
    pmf[1:] += up
    pmf[1] += before
    return pmf, surplus, 2 * safety.sum(), infinite


def _compose(parts, h, theta, eta, tail):
    """T-fold convolution: (upper, lower, grid), two functions eps -> bound on delta(eps), for eps within the grid.

    parts: [(losses, pmf, surplus, pushed, infinite, steps)] per kind of step; eta: what the lower bound may neglect."""
    steps = sum(part[-1] for part in parts)
    with np.errstate(divide="ignore"):
        parts = [(part[0], np.log(part[1]), *part[2:]) for part in parts]

    def cgf(s):  # log E[e^{s Y'}]
        exponents = [(log_p + s * loss, t) for loss, log_p, *_, t in parts]
        return sum(t * (e.max() + math.log(np.exp(e - e.max()).sum())) for e, t in exponents)

    base, middle, variance, surplus, tilted = cgf(theta), 0.0, 0.0, 0.0, []
    for loss, log_p, extra, *_, t in parts:
        top = (log_p + theta * loss).max()
        p = np.exp(log_p + theta * loss - top)
        surplus += t * (extra @ np.exp(theta * loss - top)) / p.sum()
        tilted.append(p / p.sum())
        mean = tilted[-1] @ loss
        middle, variance = middle + t * mean, variance + t * (tilted[-1] @ (loss - mean) ** 2)

    def edge(sign):  # Chernoff: tilted mass beyond it <= LEAK.  Any rate s is valid; walk to a good one
        reach = lru_cache(lambda s: (cgf(theta + sign * s) - base - math.log(LEAK)) / s)
        s = math.sqrt(-2 * math.log(LEAK) / variance)
        factor = 2.0 if reach(2 * s) < reach(s) else 0.5
        while reach(factor * s) < reach(s):
            s *= factor
        return sign * reach(s)

    low, high = edge(-1), edge(1)
    size = 1 << max(4, math.ceil(math.log2((high - low) / h + 2)))
    if size > 1 << 21:
        raise MemoryError("the grid is too fine")
    spectrum = np.ones(size // 2 + 1, complex)
    for (loss, *_, t), p in zip(parts, tilted, strict=True):
        f = np.fft.rfft(np.bincount(np.rint(loss / h).astype(np.int64) % size, p, size))
        with np.errstate(divide="ignore"):
            alive = t * np.log(np.abs(f)) > -75
        f[alive] = np.exp(t * np.log(f[alive]))
        spectrum *= np.where(alive, f, 0.0)
    shift = math.floor(low / h)
    grid = h * (shift + np.arange(size))
    bell = np.maximum(np.roll(np.fft.irfft(spectrum, size), -(shift % size)), 0.0)  # tilted P[Y' = grid]
    noise = 1.1 * (steps + 1) * FFT_NOISE * (1 + math.log2(size)) * max(math.sqrt(p @ p) for p in tilted)  # its 2-norm
    # 2-norm on the grid of e^{-theta y} (1 - e^-y), y > 0: what turns the noise of the bell into an error of delta
    width = math.sqrt(min(size, 1 + 1 / (h * theta * (2 * theta + 1) * (2 * theta + 2) + 1e-99)))

    log_scale = base - theta * middle  # P[Y' = grid] = weight * e^log_scale
    with np.errstate(over="ignore", invalid="ignore"):
        weight = bell * np.exp(-theta * (grid - middle))
        tail0, tail1 = (np.append(np.cumsum(w[::-1])[::-1], 0.0) for w in (weight, weight * np.exp(middle - grid)))

    def sharp(eps):
        """E[(1 - e^{eps-Y'})_+] on the grid; how far FFT, circle and summation may be off; Markov's bound."""
        i = np.searchsorted(grid, eps, side="right")
        markov = np.exp(log_scale - theta * (eps - middle))
        value = math.exp(log_scale) * (tail0[i] - np.exp(np.minimum(eps - middle, 700.0)) * tail1[i])
        return value, markov * (2 * LEAK + noise * width) + 3e-16 * size * math.exp(log_scale) * tail0[i], markov

    def upper(eps):
        with np.errstate(over="ignore", invalid="ignore"):
            value, error, _ = sharp(eps)
        known = (eps >= grid[0]) & np.isfinite(value)  # not where e^(y - middle) has left float64
        value = (np.maximum(value, 0.0) + error) * math.exp(1e-14 * steps) + sum(t * infinite for *_, infinite, t in parts)
        return np.where(known, np.fmin(value, 1.0), 1.0)

    tau = h * math.sqrt(steps) / 2
    reach = tau * math.sqrt(-2 * math.log(eta))
    jumps, rate = 0, sum(t * pushed for *_, pushed, _, t in parts)
    while gammainc(jumps + 1, rate) > eta:  # P[Poisson(rate) > jumps]: so many steps were pushed up by rounding
        jumps += 1 + jumps // 8

    def lower(eps):
        eps, outer = eps + tau**2 / 2 + jumps * h, math.hypot(reach, tau)
        i, j = np.searchsorted(grid, [eps - outer, eps + outer])
        if i == 0:
            return 0.0
        value, error, markov = sharp(eps)
        kink = tau / (2 * reach**2) * (outer**2 - (grid[i:j] - eps) ** 2)  # B
        cost = math.exp(log_scale) * weight[i:j] @ kink
        error += markov * (surplus + noise * math.exp(theta * outer) * tau * math.sqrt(j - i))
        return (value - error - cost) * math.exp(-1e-14 * steps) - eta * (2 + tau) - steps * tail

    return upper, lower, grid


def _curves(groups, theta, eps, small):
    """[(upper, lower, grid)] for example removed, example added.  The grid makes the gap about 2e-4 of eps."""
    steps = sum(t for _, t in groups)
    if steps > PLD_STEPS or any(q < PLD_Q or sigma > PLD_SIGMA for (q, sigma, _), _ in groups):
        raise OverflowError("outside what the certificate is tested for")
    spread = math.sqrt(sum(t * _log_moment(q, sigma, 1.5, k) / 0.375 for (q, sigma, k), t in groups))  # of the loss
    tail = 1e-6 * small / steps
    spans = [_span(*mechanism, tail) for mechanism, _ in groups]
    h = math.sqrt(1.5e-4 * max(1, steps / 1e6) * max(eps, spread) / ((1 + max(theta, 1 / spread)) * steps))
    h = max(h, *((s[3] - s[2]) * (k + 1) / 2**21 for s, ((_, _, k), _) in zip(spans, groups, strict=True)))
    while True:
        removed, added = [], []
        for (mechanism, t), span in zip(groups, spans, strict=True):
            loss, (p, dp, p_low, p_high), (q, dq, q_low, q_high), slack = _cells(*mechanism, h, span)
            removed.append((loss, *_connect_dots(loss, p, dp, q, dq, p_low, p_high, slack), t))
            back = -loss[::-1]
            dots = _connect_dots(back, q[::-1], dq[::-1], p[::-1], dp[::-1], q_high, q_low, slack)
            added.append((back, *dots, t))
        try:
            return [_compose(parts, h, theta, 1e-6 * small, tail) for parts in (removed, added)]
        except MemoryError:
            h *= 2


def _full_batches(groups):
    """mu of the one Gaussian mechanism that these steps would be with full batches (q = 1).

    It dominates them, and with them any k examples of a group: by convexity the mixture costs at most its worst part."""
    return math.sqrt(sum(t * (k / sigma) ** 2 for (_, sigma, k), t in groups))


def _subsampled(groups):
    return any(q < 1 for (q, _, _), _ in groups)


def _gaussian_delta(mu, eps):
    """(lower, upper) of delta: Balle, Wang 2018, Theorem 8, Phi(-y) - e^eps Phi(-y-mu) with y = eps/mu - mu/2.

    e^eps Phi(-y-mu) = phi(y) Phi(-y-mu) / phi(y+mu): nothing overflows, and rounding is inside the bounds."""
    y, off = eps / mu - mu / 2, 4e-16 * (eps / mu + mu)

    def at(y):  # delta, its rounding error
        tail = float(ndtr(-y))
        return tail - math.exp(-y * y / 2) * float(erfcx(max(0.0, y + mu) / math.sqrt(2))) / 2, 1e-12 * tail

    (low, low_error), (high, high_error) = at(y + off), at(y - off)
    return max(0.0, low - low_error), min(1.0, high + high_error)


def _gaussian_epsilon(mu, delta):
    """(lower, upper) of epsilon.  Phi(-y) <= delta is enough: that gives the end to search from."""
    end = max(0.0, mu * (mu / 2 - float(ndtri(delta)))) * (1 + 1e-9)
    low = _halve(lambda e: _gaussian_delta(mu, e)[0] <= delta, 0.0, end)[0]
    high = 0.0 if _gaussian_delta(mu, 0.0)[1] <= delta else _halve(lambda e: _gaussian_delta(mu, e)[1] <= delta, 0.0, end)[1]
    return low, high


def _halve(holds, lo, hi):
    """Narrow bracket of the switch of `holds` from False at lo to True at hi."""
    while hi - lo > 1e-9 * abs(hi) + 1e-12:
        mid = (lo + hi) / 2
        lo, hi = (lo, mid) if holds(mid) else (mid, hi)
    return lo, hi


def _invert(upper, lower, grid, delta):
    """(lower, upper) bound of the epsilon that belongs to delta."""
    start, end = max(0.0, float(grid[0])), float(grid[-1])
    if upper(end) > delta:
        return 0.0, math.inf
    up = start if upper(start) <= delta else _halve(lambda e: upper(e) <= delta, start, end)[1]
    gap = 1e-4 * up
    while gap < up - start and lower(up - gap) < delta:
        gap *= 2
    low = max(start, up - gap)  # lower(e) >= delta proves that e is needed; 0 needs no proof
    return (_halve(lambda e: lower(e) < delta, low, up)[0] if lower(low) >= delta else 0.0), up


@lru_cache(maxsize=256)
@np.errstate(all="ignore")
def _pld_epsilon(groups, delta):
    """(lower, upper).  Where the distribution cannot be certified, upper is the smallest of the bounds known otherwise."""
    rdp_eps, order = _rdp_epsilon(groups, delta)
    if not groups or _silent(groups):
        return rdp_eps, rdp_eps
    if not _subsampled(groups):
        return _gaussian_epsilon(_full_batches(groups), delta)
    proven = _gaussian_epsilon(_full_batches(groups), delta)[1]
    if all(k == 1 for (_, _, k), _ in groups):  # with k > 1, rdp covers "removed" only
        proven = min(rdp_eps, proven)
    elif proven > 700:
        proven = math.inf  # e^epsilon leaves float64: as good as no promise
    if delta < PLD_DELTA or proven == 0 or not rdp_eps < math.inf:
        return 0.0, proven
    guess = max(rdp_eps, 1e-12)
    try:
        for _ in range(3):  # usually once; again where RDP is far off and its order a poor tilt
            bounds = [_invert(*curve, delta) for curve in _curves(groups, order - 1, guess, delta)]
            lowest, highest = (max(side) for side in zip(*bounds, strict=True))
            if not 0 < highest < 0.7 * guess:
                break
            guess, order = highest, _rdp_delta(groups, highest)[1]
    except BEYOND:
        return 0.0, proven
    return lowest, highest if highest < proven else proven


@np.errstate(all="ignore")
def _pld_delta(groups, eps):
    """(lower, upper)."""
    rdp_delta, order = _rdp_delta(groups, eps)
    if not groups or _silent(groups):
        return rdp_delta, rdp_delta
    if not _subsampled(groups):
        return _gaussian_delta(_full_batches(groups), eps)
    try:
        curves = _curves(groups, order - 1, eps, min(0.1, max(rdp_delta, 1e-10)))
        lowest, highest = (max(float(c[side](eps)) for c in curves) for side in (1, 0))
    except BEYOND:
        return 0.0, rdp_delta
    return max(0.0, lowest), highest if highest < rdp_delta else rdp_delta


# ---- questions people ask ------------------------------------------------------------------------------------------


ACCOUNTANTS = {"rdp": lambda groups, delta: _rdp_epsilon(groups, delta)[0],
               "pld": lambda groups, delta: _pld_epsilon(groups, delta)[1]}


def _epsilon(groups, delta, method):
    return float(ACCOUNTANTS[method](groups, delta))


def round_up(x, digits=4):
    """x as text with so many significant digits, rounded towards +inf: what is printed never understates.

    A float is taken for the shortest decimal that it is printed as: 10 -> "10", 1e-05 -> "1e-05", 9.99999999 -> "10"."""
    x = float(x)
    if not math.isfinite(x):
        return str(x)
    return f"{float(Context(prec=digits, rounding=ROUND_CEILING).plus(Decimal(repr(x)))):.{digits}g}"


def epsilon(q, sigma, steps, delta, method="rdp"):
    """epsilon of `steps` steps at delta, never understated: "rdp", or "pld" (the certified upper bound).

    The larger of "example added" and "example removed".  sigma = 0 gives inf; q = 0 or steps = 0 gives 0.
    ValueError for q outside [0, 1], sigma < 0, steps < 0, delta outside (0, 1), and for delta < 1e-10 with "pld"."""
    _check(q, sigma, steps, delta, method)
    return _epsilon(_one(q, sigma, steps), delta, method)


def rdp_epsilon(q, sigma, steps, delta):
    """(epsilon, the Renyi order that gave it); the order is nan where none was needed."""
    _check(q, sigma, steps, delta)
    return _rdp_epsilon(_one(q, sigma, steps), delta)


def pld_epsilon(q, sigma, steps, delta):
    """(lower, upper): certified bounds of the exact epsilon; epsilon(..., "pld") is the upper one."""
    _check(q, sigma, steps, delta, "pld")
    return _pld_epsilon(_one(q, sigma, steps), delta)


def delta(q, sigma, steps, epsilon, method="rdp"):
    """delta of `steps` steps at epsilon >= 0, never understated."""
    return _check(q, sigma, steps, method=method) or _delta(_one(q, sigma, steps), epsilon, method)[1]


def pld_delta(q, sigma, steps, epsilon):
    """(lower, upper): certified bounds of the exact delta at epsilon >= 0."""
    return _check(q, sigma, steps) or _delta(_one(q, sigma, steps), epsilon, "pld")


def _delta(groups, eps, method):
    if not 0 <= eps <= 1e308:
        raise ValueError(f"epsilon = {eps}: must be >= 0 and finite")
    return (0.0, _rdp_delta(groups, eps)[0]) if method == "rdp" else _pld_delta(groups, eps)


def _groups(steps):
    """Rows of a ledger, or (q, sigma, steps) of a plan -> groups; equal steps are counted: 60,000 cost as much as one."""
    counts = Counter()
    try:
        for row in steps:
            q, sigma, count = row if isinstance(row, (tuple, list)) else (row["q"], row["sigma"], 1)
            _check(steps=count)
            counts[float(q), float(sigma)] += int(count)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"ledger: every row needs the numbers q and sigma ({error!r})") from None
    for q, sigma in counts:
        _check(q, sigma)
    kinds = [_one(*step, count) for step, count in sorted(counts.items())]
    while len(kinds := sorted(filter(None, kinds), key=lambda kind: kind[0][0][1])) > MOST_KINDS:
        pairs = [kinds[i] + (kinds[i + 1] if i + 1 < len(kinds) else ()) for i in range(0, len(kinds), 2)]
        kinds = [_one(max(m[0] for m, _ in pair), pair[0][0][1], sum(t for _, t in pair)) for pair in pairs]
    return tuple(sorted(kind[0] for kind in kinds))


def ledger_rows(text, *known):
    """Text of a ledger -> its rows, one per line; the one rule for a crash while writing, used by train.py as well.

    What is not a complete row counts as one step for every row that was begun on the line, with the largest q and the
    smallest sigma of the complete rows and of `known` (dicts with q and sigma: the plan), so never understated.
    Raises ValueError if there is a damaged line and nothing to count it by."""

    def read(line):
        try:
            row = json.loads(line)
            return row if complete(row) else None
        except (ValueError, RecursionError):
            return None

    def complete(row):
        q, sigma = (row.get(key) for key in ("q", "sigma")) if isinstance(row, dict) else ("", "")
        return all(type(x) in (int, float) for x in (q, sigma)) and 0 <= q <= 1 and 0 <= sigma < math.inf

    lines = text.removesuffix("\n").split("\n") if text else []
    rows = [read(line) for line in lines]
    whole = [row for row in (*rows, *known) if complete(row)]
    if None in rows and not whole:
        raise ValueError(f"row {rows.index(None) + 1} of the ledger is damaged, and no other row or plan tells its q and sigma")
    for number, line in enumerate(lines):
        if rows[number] is None:
            worst = {"q": max(row["q"] for row in whole), "sigma": min(row["sigma"] for row in whole), "torn": True}
            rows[number] = worst
            rows += [worst] * (line.count("{") - 1)
    return rows


def epsilon_of_ledger(rows, delta, method="rdp"):
    """epsilon of heterogeneous steps, and of several runs on the same private data (concatenate their rows).

    rows: iterable of dicts with at least "q" and "sigma", one per logical step (noise addition)."""
    _check(delta=delta, method=method)
    return _epsilon(_groups(rows), delta, method)


def group_epsilon(k, q, sigma, steps, delta):
    """epsilon of k pictures that are added or removed together (one person), certified upper bound by pld.

    Not k times epsilon: recomputed with Binomial(k, q) of the pictures in a batch, P = sum_j Bin(j) N(j, sigma^2),
    which dominates any k clipped gradients (Ganesh 2024, mixture of Gaussians mechanism).  inf where float64 ends."""
    _check(q, sigma, steps, delta, "pld")
    if not 0 <= k <= 1000 or k != int(k):
        raise ValueError(f"k = {k}: the group size is a whole number from 0 to 1000")
    return _pld_epsilon(_one(q, sigma, steps, k) if k else (), delta)[1]


def attacker_tpr(q, sigma, steps, fprs=(0.001, 0.01, 0.1)):
    """Best true-positive rate of ANY membership attacker at each false-positive rate: array shaped like fprs.

    Neyman-Pearson for the composed loss distribution, so tight, not the looser line of one (eps, delta): the minimum
    over all eps of e^eps FPR + delta(eps), with the certified upper delta of the direction "example removed"."""
    _check(q, sigma, steps)
    return _attacker(_one(q, sigma, steps), _rates(fprs))


def _rates(fprs):
    fprs = np.asarray(fprs)
    if not ((fprs > 0) & (fprs < 1)).all():
        raise ValueError("fprs: false-positive rates must lie strictly between 0 and 1")
    return fprs.astype(float)


@np.errstate(all="ignore")
def _attacker(groups, fprs):
    if not groups or _silent(groups):
        return np.ones(fprs.shape) if groups else fprs.copy()
    proven = ndtr(ndtri(fprs) + _full_batches(groups))
    if not _subsampled(groups):
        return proven
    try:
        upper, _, grid = _curves(groups, 0.0, 0.0, float(fprs.min()))[0]
    except BEYOND:
        return proven
    deltas, slopes = upper(grid), np.exp(grid)
    best = np.array([min(1.0, np.nanmin(slopes * f + deltas)) for f in fprs.ravel()])
    return np.minimum(best.reshape(fprs.shape), proven)


def statement_numbers(steps, delta, group=20, fprs=(0.001, 0.01, 0.1)):
    """All that a privacy statement says of `steps`: rows of a ledger, or a plan [(q, sigma, steps), ...]; kinds may differ.

    A dict of upper bounds, for any q in [0, 1], sigma >= 0, number of steps and delta in (0, 1):
    epsilon_rdp        by Renyi moments
    epsilon_pld        tight; Renyi's (or that of full batches, if smaller) where the tight one cannot be certified:
                       delta below 1e-10, q below 1e-7, sigma above 1e3 or below about 1/35 (of groups: more)
    epsilon_for_group  `group` examples added or removed together, tight; there that of full batches; inf beyond 700
    attacker           {fpr: best true-positive rate of any membership attacker}, tight; there that of full batches
    """
    _check(delta=delta)
    groups, fprs = _groups(steps), _rates(fprs)
    rates = _attacker(groups, fprs)
    together = tuple(((q, sigma, group), t) for (q, sigma, _), t in groups)
    return {"epsilon_rdp": _epsilon(groups, delta, "rdp"), "epsilon_pld": _epsilon(groups, delta, "pld"),
            "epsilon_for_group": _epsilon(together, delta, "pld"),
            "attacker": dict(zip(fprs.tolist(), rates.tolist(), strict=True))}


def noise_multiplier(epsilon, delta, q, steps, method="rdp"):
    """Smallest sigma (>= 1e-3) whose epsilon does not exceed the target; found on the safe side and asserted."""
    _check(q, 1.0, steps, delta, method)
    if not 0 < epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: the target must be positive and finite")
    if q == 0 or steps == 0:
        return 0.0

    def excess(log_sigma):
        return _epsilon(_one(q, math.exp(log_sigma), steps), delta, method) - epsilon

    start, step = (0.0, 1.0) if method == "rdp" else (math.log(noise_multiplier(epsilon, delta, q, steps)), 0.08)
    high = low = start
    while excess(high) > 0:
        low, high = high, high + step
        if high > math.log(1e6):
            raise ValueError(f"epsilon = {epsilon}: out of reach with sigma up to 1e6; fewer steps, or more epsilon")
    while excess(low) <= 0 and low > math.log(1e-3):
        low, high = max(low - step, math.log(1e-3)), low
    tolerance = 1e-8 if method == "rdp" else 1e-6
    log_sigma = brentq(excess, low, high, xtol=tolerance) if excess(low) > 0 else low
    while excess(log_sigma) > 0:
        log_sigma, tolerance = log_sigma + tolerance, 2 * tolerance
    sigma = math.exp(log_sigma)
    assert _epsilon(_one(q, sigma, steps), delta, method) <= epsilon
    return sigma


def max_steps(epsilon, delta, q, sigma, method="rdp"):
    """Largest number of steps whose epsilon does not exceed the target; inf when steps cost nothing (q = 0).

    Beyond 1e12 the search ends: so many fit."""
    _check(q, sigma, 0, delta, method)
    if not 0 <= epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: the target must be >= 0 and finite")
    if not _one(q, sigma, 1):
        return math.inf

    def fits(steps):
        return _epsilon(_one(q, sigma, steps), delta, method) <= epsilon

    low = 0 if method == "rdp" else max_steps(epsilon, delta, q, sigma)  # rdp never allows more steps than pld
    step = max(1, low // 16)
    while low <= 1e12 and fits(low + step):
        low, step = low + step, 2 * step
    high = low + step if low <= 1e12 else low + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


# ---- command line ----------------------------------------------------------------------------------------------------


def read_run(path):
    """(groups, privacy) of a run directory: the steps that it counts as, and what its privacy.json states.

    Ledger and statement are both believed: of each kind of step the larger number counts, so that neither a truncated
    ledger nor a statement made before a later resume hides a step.  A run that is not private (no noise, or a seed that
    is known) counts as steps without noise.  privacy: the numbers q, sigma, steps, delta, epsilon as far as stated, and
    "notes", a list of remarks for the reader.  ValueError, one line, names the run."""
    parts = (("internal", "ledger.jsonl"), ("release", "privacy.json"), ("internal", "plan.json"), ("internal", "settings.json"))
    ledger, *others = (Path(path, *part) for part in parts)
    try:
        stated, planned, chosen = (json.loads(file.read_bytes()) if file.exists() else {} for file in others)
        privacy = {key: float(stated[key]) for key in ("q", "sigma", "steps", "delta", "epsilon") if key in stated}
        if not ledger.exists() and not stated:
            raise ValueError("neither internal/ledger.jsonl nor release/privacy.json is there")
        notes, counts = [], Counter()
        if ledger.exists():
            rows = ledger_rows(ledger.read_bytes().decode(errors="replace"), planned)
            counts = Counter(dict(_groups(rows)))
        if stated:
            _check(privacy["q"], privacy["sigma"], privacy["steps"], privacy.get("delta", 0.5))
            if not privacy.get("epsilon", 0.0) >= 0:
                raise ValueError(f"privacy.json states epsilon {privacy['epsilon']}")
            by_statement = Counter(dict(_one(privacy["q"], privacy["sigma"], privacy["steps"])))
            if ledger.exists() and counts != by_statement:
                spent, said = sum(counts.values()), sum(by_statement.values())
                notes.append(f"{spent} steps in the ledger and {said} in the statement: the larger counts"
                             if counts.keys() <= by_statement.keys() or by_statement.keys() <= counts.keys() else
                             "ledger and statement differ in q or sigma; the steps of both count")
            counts |= by_statement
        else:
            notes.append("a run without a statement yet: the steps of its ledger")
        groups = tuple(sorted(counts.items()))
        known_seed = stated.get("insecure_seed", False) is not False or chosen.get("insecure_seed") is not None
        if known_seed or stated.get("private", True) is not True:
            groups = tuple(((q, 0.0, k), t) for (q, _, k), t in groups) or _one(1.0, 0.0, 1)
            notes.append("NOT PRIVATE: counts as without noise")
        return groups, {**privacy, "notes": notes}
    except KeyError as error:
        raise ValueError(f"{path}: privacy.json lacks {error}") from None
    except (TypeError, AttributeError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


HEADER = f"{'':<20} {'sigma':>8} {'steps':>8} {'RDP eps':>9} {'order':>7} {'PLD eps':>9} {'gap':>8}   attacker's rates*"
FOOTNOTE = "* best true-positive % of any membership attacker at false-positive rates 0.1, 1 and 10 % (pld, tight)"


def _line(name, groups, delta, least=0.0, stated=None):
    """One row of the table; epsilons are at least `least`; gap is PLD's upper minus lower bound; epsilons and rates are
    rounded up; sigma is shown where all steps share it."""
    sigmas, steps = {sigma for (_, sigma, _), _ in groups}, sum(t for _, t in groups)
    (eps, order), (lower, upper) = _rdp_epsilon(groups, delta), _pld_epsilon(groups, delta)
    gap = upper - lower if upper < math.inf else 0.0
    sigma = f"{sigmas.pop():.5g}" if len(sigmas) == 1 else "mixed" if sigmas else "-"
    eps, upper = (round_up(max(least, e), 6) for e in (eps, upper))
    rates = " ".join(f"{round_up(100 * rate):>7}" for rate in _attacker(groups, np.array([0.001, 0.01, 0.1])))
    order = f"{order:.2f}" if order == order else "-"
    row = f"{name:<20} {sigma:>8} {steps:>8} {eps:>9} {order:>7} {upper:>9} {gap:>8.1e} {rates}"
    return row if stated is None else f"{row}   (stated: {round_up(stated)})"


def _compare(paths, delta):
    runs = [(Path(path).name[-20:], *read_run(path)) for path in paths]
    if delta is None:
        delta = max((privacy["delta"] for *_, privacy in runs if "delta" in privacy), default=None)
    if delta is None:
        raise ValueError("no run states a delta: give --delta")
    _check(delta=delta)
    lines, total = [], Counter()
    for name, groups, privacy in runs:
        total.update(dict(groups))
        notes, least, stated, at = privacy["notes"], 0.0, privacy.get("epsilon"), privacy.get("delta", delta)
        # A statement is rounded up to four digits.  What exceeds that was not computed from these steps.
        if stated is not None and stated > 1.002 * _rdp_epsilon(groups, at)[0] + 1e-9:
            least = stated if at <= delta else math.inf  # (epsilon, delta) says nothing at a smaller delta
            total[1.0, 0.0, 1] += 1
            notes.append("it states more than its q, sigma and steps cost: that counts, and as inf in a sum")
        lines.append("; ".join([_line(name, groups, delta, least, stated), *notes]))
    if len(runs) > 1:
        lines.append(_line("all runs together", tuple(sorted(total.items())), delta))
    return [f"recomputed at delta {round_up(delta)}", HEADER, *lines, FOOTNOTE]


def _plan(q, steps, sigma, epsilon, delta, group):
    _check(q, 1.0 if sigma is None else sigma, 0 if steps is None else steps, delta)
    if [steps, sigma, epsilon].count(None) != 1:
        raise ValueError("give two of --steps (or --epochs), --sigma, --epsilon: the third is computed")
    methods = ("rdp", "pld") if delta >= PLD_DELTA else ("rdp",)
    if epsilon is None:
        plans = {"given": (sigma, steps)}
    elif steps is None:
        plans = {f"by {m}": (sigma, max_steps(epsilon, delta, q, sigma, m)) for m in methods}
    else:  # rounded up, so that the line is about the sigma that it shows
        plans = {f"by {m}": (float(round_up(noise_multiplier(epsilon, delta, q, steps, m), 5)), steps) for m in methods}
    lines = [f"q {q:.6g}   delta {round_up(delta)}   Poisson sampling, one example added or removed", HEADER]
    for name, (s, t) in plans.items():
        if t == math.inf:
            raise ValueError("q = 0 costs nothing: any number of steps fits")
        lines.append(_line(name, _one(q, s, t), delta))
        bound = round_up(_pld_epsilon(_one(q, s, t, group), delta)[1])
        lines.append(f"{'':<20} {group} pictures of one person: epsilon <= {bound}")
    return [*lines, FOOTNOTE]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(message)


def main(argv=None):
    parser = _Parser(description="epsilon of DP-SGD (Poisson sampling, one example added or removed)")
    add = parser.add_argument
    add("runs", nargs="*", help="run directories: recompute epsilon from the ledger, else from privacy.json")
    add("--n", type=int, help="number of private examples")
    add("--batch", type=float, help="expected batch size; q = batch / n")
    add("--q", type=float, help="sampling probability, instead of --n and --batch")
    add("--steps", type=int, help="logical steps (noise additions)")
    add("--epochs", type=float, help="passes over the data, instead of --steps; rounded up to whole steps")
    add("--delta", type=float, help="failure probability, below 1 / n (default 1e-5; of runs: the largest they state)")
    add("--sigma", type=float, help="noise multiplier: noise std / clip norm")
    add("--epsilon", type=float, help="target: computes the smallest sigma or, with --sigma, the most steps")
    add("--group", type=int, default=20, help="pictures of one person, for the group line (default 20)")
    try:
        args = parser.parse_args(argv)
        if args.runs:
            lines = _compare(args.runs, args.delta)
        else:
            if args.q is None and (args.n is None or args.batch is None):
                raise ValueError("give run directories, or --n and --batch, or --q")
            if args.n is not None and not 1 <= args.n <= 1e18:
                raise ValueError("--n, the number of private examples, must be from 1 to 1e18")
            if not 1 <= args.group <= 1000:
                raise ValueError(f"--group must be from 1 to 1000 pictures, got {args.group}")
            if args.epochs is not None and not 0 <= args.epochs < math.inf:
                raise ValueError(f"--epochs must be >= 0 and finite, got {args.epochs}")
            q, steps = args.batch / args.n if args.q is None else args.q, args.steps
            if not 0 <= q <= 1:
                raise ValueError(f"q = {q}: the sampling probability must lie in [0, 1]; it is batch / n")
            if steps is None and args.epochs is not None and q > 0:
                steps = min(args.epochs / q, 1e18)
                steps = math.ceil(steps - 1e-6)
            delta = 1e-5 if args.delta is None else args.delta
            lines = _plan(q, steps, args.sigma, args.epsilon, delta, args.group)
            if args.n is not None and delta >= 1 / args.n:
                print(f"note: delta {round_up(delta)} is not below 1/n = {1 / args.n:.3g}: publishing one random example in the "
                      "clear would satisfy it", file=sys.stderr)
    except ValueError as error:
        print(f"accountant.py: {error}", file=sys.stderr)
        return 2
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
