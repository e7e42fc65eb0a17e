"""Privacy accountant of DP-SGD: what do T noisy steps cost?  It never understates epsilon.

One step adds N(0, sigma^2) noise (unit: the clip norm C) to the sum of the clipped gradients of a Poisson
batch, to which each example belongs with probability q.  Neighbouring data sets differ by one example, added
or removed; seen along the gradient of that example:

    Q = N(0, sigma^2) without it,     P = (1-q) N(0, sigma^2) + q N(1, sigma^2) with it.

An accountant is one function, epsilon_of(steps, delta) -> epsilon, with steps = {(q, sigma): T}:
  rdp   Renyi moments, in this file: exact for one step, they add over steps; turning them into epsilon is
        5 to 10 % loose.  (Mironov, Talwar, Zhang 2019; Balle et al. 2020; Canonne, Kamath, Steinke 2020)
  pld   the distribution of the privacy loss log P/Q, in extensions/pld.py: tight, certified from both sides.
Wherever `method` is asked for, give one of these names or a function of your own.
Names: q sampling probability, sigma noise multiplier, alpha order, T = steps = noise additions.

    python accountant.py --n 60000 --batch 2000 --epochs 200 --delta 1e-5 --sigma 1.47     (or --epsilon 10)
    python accountant.py runs/a runs/b                                        (recompute, alone and composed)
"""

import json
import math
import sys
from collections import Counter
from decimal import ROUND_CEILING, Context, Decimal
from functools import lru_cache

import numpy as np
from scipy.optimize import brentq, minimize_scalar
from scipy.special import gammaln, logsumexp, xlog1py

MOST_KINDS = 64  # of steps (q, sigma).  More are merged: neighbours in sigma, larger q with smaller sigma


# ---- steps: what is counted ----------------------------------------------------------------------


def check(q=0.0, sigma=1.0, steps=0, delta=0.5):
    """ValueError, one line, for numbers that mean nothing; nan is refused as well."""
    if not 0 <= q <= 1:
        raise ValueError(f"q = {q}: the sampling probability must lie in [0, 1]; it is batch / n")
    if not sigma >= 0:
        raise ValueError(f"sigma = {sigma}: the noise multiplier must be >= 0; it is noise std / clip norm")
    if not 0 <= steps < math.inf or steps != int(steps):
        raise ValueError(f"steps = {steps}: give a whole number >= 0 of logical steps")
    if not 0 < delta < 1:
        raise ValueError(f"delta = {delta}: must lie strictly between 0 and 1, usually below 1 / n")


def one_kind(q, sigma, steps):
    """{(q, sigma): steps}, empty if they cost nothing.  What float64 cannot hold becomes what costs more."""
    if q <= 0 or steps <= 0 or sigma == math.inf:
        return {}
    if sigma < 1e-60 or steps > 1e18:
        sigma = 0.0
    return {(max(float(q), 1e-60), float(min(sigma, 1e60))): int(min(steps, 10**18))}


def count_steps(rows):
    """Rows of a ledger, (q, sigma, T) of a plan, or {(q, sigma): T} -> {(q, sigma): T}, without free steps.

    Equal steps are counted: 60,000 of them take as much time as one.  ValueError for rows without numbers."""
    counts, kinds = Counter(), Counter()
    try:
        for row in ((*kind, count) for kind, count in rows.items()) if isinstance(rows, dict) else rows:
            q, sigma, count = row if isinstance(row, (tuple, list)) else (row["q"], row["sigma"], 1)
            check(steps=count)
            counts[float(q), float(sigma)] += int(count)
    except (KeyError, TypeError, OverflowError) as error:
        raise ValueError(f"ledger: every row needs the numbers q and sigma ({error!r})") from None
    for q, sigma in counts:
        check(q, sigma)
    for (q, sigma), count in sorted(counts.items()):
        kinds.update(one_kind(q, sigma, count))
    while len(kinds) > MOST_KINDS:
        by_sigma = sorted(kinds.items(), key=lambda item: item[0][1])
        kinds = Counter()
        for i in range(0, len(by_sigma), 2):
            pair = by_sigma[i : i + 2]
            larger_q, smaller_sigma = max(q for (q, _), _ in pair), pair[0][0][1]
            kinds.update(one_kind(larger_q, smaller_sigma, sum(count for _, count in pair)))
    return dict(sorted(kinds.items()))


def ledger_rows(text, *known):
    """Text of a ledger -> its rows, one per line; the one rule for a crash while writing.

    What is not a complete row counts as one step for every row that was begun on the line, with the largest q
    and the smallest sigma of the complete rows and of `known` (dicts with q and sigma: the plan), so never
    understated.  Raises ValueError if there is a damaged line and nothing to count it by."""

    def complete(row):
        q, sigma = (row.get(key) for key in ("q", "sigma")) if isinstance(row, dict) else ("", "")
        return all(type(x) in (int, float) for x in (q, sigma)) and 0 <= q <= 1 and 0 <= sigma < math.inf

    def read(line):
        try:
            row = json.loads(line)
            return row if complete(row) else None
        except (ValueError, RecursionError):
            return None

    lines = text.removesuffix("\n").split("\n") if text else []
    rows = [read(line) for line in lines]
    whole = [row for row in (*rows, *known) if complete(row)]
    if None in rows and not whole:
        number = rows.index(None) + 1
        raise ValueError(f"row {number} of the ledger is damaged; no other row or plan tells its q and sigma")
    for number, line in enumerate(lines):
        if rows[number] is None:
            q, sigma = max(row["q"] for row in whole), min(row["sigma"] for row in whole)
            worst = {"q": q, "sigma": sigma, "torn": True}
            rows[number] = worst
            rows += [worst] * (line.count("{") - 1)  # rows that ran into one line
    return rows


# ---- Renyi DP: one step exactly, addition, conversion --------------------------------------------


@lru_cache(maxsize=1 << 14)
def log_moment(q, sigma, alpha):
    """log A = log E_Q[(P/Q)^alpha] = (alpha - 1) R(alpha) of one step; derived in rdp()."""
    if q == 1:
        return alpha * (alpha - 1) * (1 / sigma) ** 2 / 2
    if alpha == int(alpha) and alpha <= 1e5:
        return moment_by_series(q, sigma, alpha)
    return moment_by_integral(q, sigma, alpha, ratio)


def moment_by_series(q, sigma, alpha):
    """log A for an integer order: step 3 of the derivation."""
    j = np.arange(2, int(alpha) + 1)
    s = j * (j - 1) / (2 * sigma**2)
    log_binomial = gammaln(alpha + 1) - gammaln(j + 1) - gammaln(alpha - j + 1)
    log_expm1 = s + np.log(-np.expm1(-s))
    excess = logsumexp(log_binomial + j * math.log(q) + xlog1py(alpha - j, -q) + log_expm1)
    return float(np.logaddexp(0.0, excess))


def ratio(x, q, sigma):
    """P/Q = 1 + u = e^L at outputs x (n,) -> (u without cancellation where it is small, L at any size)."""
    w = (x - 0.5) / sigma**2  # (n,), log N(1, sigma^2) / N(0, sigma^2)
    u = np.maximum(q * np.expm1(np.minimum(w, 600.0)), -1.0)
    with np.errstate(divide="ignore"):
        return u, np.where(w > 600, math.log(q) + w, np.log1p(u))


def moment_by_integral(q, sigma, alpha, ratio, k=1):
    """log A for any order: step 4.  k: how far P is shifted at most (extensions/pld.py: k images at once)."""
    # Trapezoid sum over z = x / sigma.  The integrand is analytic until |Im z| = pi sigma (where P = 0), so
    # the error is about exp(-2 pi^2 sigma / h).  The factor (P/Q)^alpha moves the bell by at most
    # alpha k / sigma.
    h, top = min(0.5, sigma / (2 * k)), alpha * k / sigma + 10.0
    if top / h * k > 2e5:  # hardly any noise: convexity, (1-q+qr)^alpha <= 1-q + q r^alpha, sound and cheap
        none = k * math.log1p(-q)  # log P[none of the k is in the batch]; else as if all were
        full = alpha * (alpha - 1) * (k / sigma) ** 2 / 2
        return float(np.logaddexp(none, math.log(-math.expm1(none)) + full))
    z = np.arange(-10.0, top + h, h)
    u, loss = ratio(z * sigma, q, sigma)
    a, y = alpha, alpha * loss
    with np.errstate(all="ignore"):
        log_g = np.where(y > 1, y + np.log1p(-(1 + a * u) * np.exp(-y)), np.log(np.expm1(y) - a * u))
        series = 1 + (a - 2) / 3 * u * (1 + (a - 3) / 4 * u * (1 + (a - 4) / 5 * u))
        log_g = np.where(a * np.abs(u) < 1e-2, np.log(a * (a - 1) / 2 * u * u * series), log_g)
    excess = logsumexp(log_g - z * z / 2) + math.log(h / math.sqrt(2 * math.pi))
    return float(np.logaddexp(0.0, excess))


def rdp(q, sigma, alphas):
    """Renyi DP of ONE step at every order: array shaped like alphas, any order above 1, fractional too.

    Relative error <= 1e-9 for orders in [1.01, 1000], q in [1e-5, 1], sigma in [0.3, 100].
    From the definition (Mironov 2017, Def. 3), with x drawn from Q:

        R(alpha) = D_alpha(P || Q) = log A / (alpha - 1),     A = E_Q[(P/Q)^alpha] = E[(1 + u)^alpha]
        u(x)     = P/Q - 1 = q (e^{(2x-1)/(2 sigma^2)} - 1),  E[u] = 0 as P and Q both integrate to 1

    1. The other direction, D_alpha(Q || P), is never larger (Mironov, Talwar, Zhang 2019, Theorem 5: a
       reflection swaps the two Gaussians).  "Removed" therefore covers "added".
    2. A is hardly above 1, and 1 + 1e-12 has lost its digits in float64: compute A - 1, as a sum of positive
       terms.
    3. Integer alpha: expand the power.  E[e^{j(2x-1)/(2 sigma^2)}] = e^{j(j-1)/(2 sigma^2)}; binomial weights
       add to 1.  In log space:
           A - 1 = sum_{j=2..alpha} C(alpha, j) (1-q)^{alpha-j} q^j (e^{j(j-1)/(2 sigma^2)} - 1)
    4. Fractional alpha: that series alternates in sign and cancels.  But E[u] = 0 lets us subtract the
       tangent at 0:
           A - 1 = E[g(u)],   g(u) = (1+u)^alpha - 1 - alpha u >= 0   (Bernoulli's inequality),
       a smooth positive integral over one Gaussian: a plain trapezoid sum in log space, g by Taylor where u
       is small.
    """
    check(q, sigma)
    alphas = np.asarray(alphas, dtype=float)
    if not ((alphas > 1) & (alphas < np.inf)).all():
        raise ValueError("alphas: Renyi orders must be above 1 and finite; use 1.01 or more")
    steps = one_kind(q, sigma, 1)
    if not steps or min(steps)[1] == 0:
        return np.full(alphas.shape, math.inf if steps else 0.0)
    values = [composed(steps)(a) / (a - 1) for a in alphas.ravel().tolist()]
    return np.array(values).reshape(alphas.shape)


@np.errstate(all="ignore")
def best_order(f):
    """(best order, minimum) of f over all real orders alpha > 1.

    What is minimised here has one valley: log A and (alpha-1) log(1-1/alpha) - log(alpha) are convex in
    alpha, and a convex function over the positive line alpha - 1 is quasi-convex.  So: walk downhill in
    log(alpha - 1), then Brent.  There is no grid of orders and no edge of a grid; any order that comes out
    gives a valid bound."""
    g = lru_cache(maxsize=None)(lambda t: f(1 + math.exp(t)))
    t = math.log(7.0)
    step = 1.0 if g(t + 1) < g(t) else -1.0
    while -12 < t < 40 and g(t + step) < g(t):
        t += step
    best = minimize_scalar(g, bounds=(t - 1, t + 1), method="bounded", options={"xatol": 1e-4})
    t = min(t, float(best.x), key=g)
    return 1 + math.exp(t), g(t)


def log_delta(moment, alpha, eps):
    """log delta at eps by order alpha; moment(alpha) is log A of all steps together.

    Markov's inequality on the privacy loss with its sharp constant, the maximum of
    e^{-(alpha-1) (l-eps)} (1 - e^{eps-l}) over losses l (Canonne, Kamath, Steinke 2020, Prop. 12)."""
    return moment(alpha) - (alpha - 1) * eps + (alpha - 1) * math.log1p(-1 / alpha) - math.log(alpha)


def epsilon_by_moments(moment, delta):
    """(epsilon, the order that gave it): the smallest bound over all orders."""
    order, eps = best_order(lambda a: (log_delta(moment, a, 0.0) - math.log(delta)) / (a - 1))
    return max(0.0, eps), order


def delta_by_moments(moment, eps):
    """(delta, the order that gave it)."""
    order, bound = best_order(lambda a: log_delta(moment, a, eps))
    return math.exp(min(0.0, bound)), order


def composed(steps):
    """The function alpha -> log A of all steps {(q, sigma): T}: moments of independent steps multiply."""
    return lambda alpha: sum(T * log_moment(q, sigma, alpha) for (q, sigma), T in steps.items())


def renyi(steps, delta):
    """(epsilon, the order that gave it) of steps {(q, sigma): T}; the order is nan where none was needed."""
    check(delta=delta)
    steps = count_steps(steps)
    if not steps or min(sigma for _, sigma in steps) == 0:
        return (math.inf if steps else 0.0), math.nan
    return epsilon_by_moments(composed(steps), delta)


# ---- accountants ---------------------------------------------------------------------------------


def epsilon_of(steps, delta):
    """The accountant "rdp": epsilon of steps {(q, sigma): T} at delta, by Renyi moments."""
    return renyi(steps, delta)[0]


def _tight(steps, delta):
    from extensions import pld  # only where it is asked for: this file stands alone
    return pld.epsilon_of(steps, delta)


ACCOUNTANTS = {"rdp": epsilon_of, "pld": _tight}


def accountant(method):
    """The function that `method` names, or method itself if it is a function."""
    if not callable(method) and method not in ACCOUNTANTS:
        names = " or ".join(map(repr, ACCOUNTANTS))
        raise ValueError(f"method = {method!r}: choose {names}, or give a function of (steps, delta)")
    return method if callable(method) else ACCOUNTANTS[method]


def _epsilon(steps, delta, method):
    value = float(accountant(method)(steps, delta))
    if not value >= 0:  # nan would pass every comparison with a target
        raise ValueError(f"the accountant {method} gives epsilon {value}")
    return value


def epsilon(q, sigma, steps, delta, method="rdp"):
    """epsilon of `steps` steps at delta, never understated: "rdp", or "pld" (the certified upper bound).

    The larger of "example added" and "example removed".  sigma = 0 gives inf; q = 0 or steps = 0 gives 0.
    ValueError for q outside [0, 1], sigma < 0, steps < 0, delta outside (0, 1) ("pld": below 1e-10)."""
    check(q, sigma, steps, delta)
    return _epsilon(one_kind(q, sigma, steps), delta, method)


def epsilon_of_ledger(rows, delta, method="rdp"):
    """epsilon of heterogeneous steps, and of several runs on the same private data (concatenate their rows).

    rows: iterable of dicts with at least "q" and "sigma", one per logical step (noise addition)."""
    check(delta=delta)
    return _epsilon(count_steps(rows), delta, method)


def rdp_epsilon(q, sigma, steps, delta):
    """(epsilon, the Renyi order that gave it); the order is nan where none was needed."""
    check(q, sigma, steps, delta)
    return renyi(one_kind(q, sigma, steps), delta)


def delta(q, sigma, steps, epsilon):
    """delta of `steps` steps at epsilon >= 0 by Renyi moments (tight: extensions.pld.pld_delta)."""
    check(q, sigma, steps)
    if not 0 <= epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: must be >= 0 and finite")
    kind = one_kind(q, sigma, steps)
    if not kind or min(kind)[1] == 0:
        return 1.0 if kind else 0.0
    return delta_by_moments(composed(kind), epsilon)[0]


# ---- calibration ---------------------------------------------------------------------------------


def noise_multiplier(epsilon, delta, q, steps, method="rdp"):
    """Smallest sigma (>= 1e-3) whose epsilon does not exceed the target; on the safe side, and asserted."""
    check(q, 1.0, steps, delta)
    if not 0 < epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: the target must be positive and finite")
    if q == 0 or steps == 0:
        return 0.0

    def excess(log_sigma):  # falls with log sigma; finite, as brentq wants it
        return min(_epsilon(one_kind(q, math.exp(log_sigma), steps), delta, method), 1e308) - epsilon

    if accountant(method) is epsilon_of:
        start, step, tolerance = 0.0, 1.0, 1e-8
    else:  # Renyi's sigma is found quickly and is not far off
        start, step, tolerance = math.log(noise_multiplier(epsilon, delta, q, steps)), 0.08, 1e-6
    # A bracket: too much epsilon at low, not too much at high.
    high = low = start
    while excess(high) > 0:
        low, high = high, high + step
        if high > math.log(1e6):
            raise ValueError(f"epsilon = {epsilon}: out of reach with sigma up to 1e6; take fewer steps")
    while excess(low) <= 0 and low > math.log(1e-3):
        low, high = max(low - step, math.log(1e-3)), low
    log_sigma = brentq(excess, low, high, xtol=tolerance) if excess(low) > 0 else low
    # The root is known up to the tolerance: step to its safe side.
    while excess(log_sigma) > 0:
        log_sigma, tolerance = log_sigma + tolerance, 2 * tolerance
    sigma = math.exp(log_sigma)
    assert _epsilon(one_kind(q, sigma, steps), delta, method) <= epsilon
    return sigma


def max_steps(epsilon, delta, q, sigma, method="rdp"):
    """Largest number of steps whose epsilon does not exceed the target; inf when steps cost nothing (q = 0).

    Beyond 1e12 the search ends: so many fit."""
    check(q, sigma, 0, delta)
    if not 0 <= epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: the target must be >= 0 and finite")
    if not one_kind(q, sigma, 1):
        return math.inf

    def fits(steps):
        return _epsilon(one_kind(q, sigma, steps), delta, method) <= epsilon

    # Begin with what Renyi allows; an accountant that allows less begins anew.
    low = 0 if accountant(method) is epsilon_of else max_steps(epsilon, delta, q, sigma)
    low = low if fits(low) else 0
    step = max(1, low // 16)
    while low <= 1e12 and fits(low + step):
        low, step = low + step, 2 * step
    high = low + step if low <= 1e12 else low + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def round_up(x, digits=4):
    """x as text with so many significant digits, rounded towards +inf: what is printed never understates.

    A float is taken for the shortest decimal that it is printed as: 10 -> "10", 9.99999999 -> "10"."""
    x = float(x)
    if not math.isfinite(x):
        return str(x)
    return f"{float(Context(prec=digits, rounding=ROUND_CEILING).plus(Decimal(repr(x)))):.{digits}g}"


# ---- command line --------------------------------------------------------------------------------


def main(argv=None):
    from support import calculator  # its flags and its table; nothing above needs them
    return calculator.main(argv)


if __name__ == "__main__":
    sys.exit(main())
