"""The tight accountant: the distribution of the privacy loss, with certified bounds from both sides.

Read accountant.py first.  For one step with and without the example, P and Q, the privacy loss of an output
is L = log P/Q, and over T steps the losses add up to Y.  With the distribution of Y everything is known:

    delta(eps) = E_P[(1 - e^{eps-Y})_+]     (the hockey-stick divergence; Sommer, Meiser, Mohammadi 2019).

The loss of one step is rounded to multiples of h; T steps are a T-fold convolution, by FFT (Koskela, Jalko,
Honkela 2020).  A Renyi order only chooses the exponential tilt ("rounding", below); no Renyi epsilon enters
the result.  For plans like the presets' epsilon is 5 to 15 % smaller than by moments, sigma 4 to 8 %.  Where
q is small and sigma below 1 the difference is larger: 38 % of epsilon for delta = 1e-5 and `python
accountant.py --q 0.001 --sigma 0.7 --steps 10000`.  Direction "removed" takes the loss log P/Q under P,
"added" log Q/P under Q; the larger counts.

Every error is inside the bounds:
 grid, up    Connect the dots (Doroshenko et al. 2022): the mass of a cell moves to its two ends so that its
             P- and Q-mass stay.  The result dominates the true pair: its delta(eps) is as large or larger at
             every eps.  Pairs that dominate step by step also do so after composition (Zhu et al. 2022).  So
             the grid needs no correction that grows with T.
 grid, down  The same move rounds the loss of a step at random to one of two points h apart, on average up by
             0 to h^2/8.  (Done loss by loss, the Q-mass stays if a step's rounding d has E e^{-d} = 1, given
             its loss.  Then E d >= 0 by Jensen, and E d <= h^2/8 by Hoeffding's lemma.  Over a cell this adds
             up to the same masses.)  Over T steps Y becomes Y' = Y + D.  Given the losses, D is sub-Gaussian
             with variance proxy tau^2 = T h^2/4 (Hoeffding), about a mean m in [0, tau^2/2].  Let V = Y + m,
             Z = D - m and eps' = eps + tau^2/2.  Then delta(eps) >= E f(V) with f(y) = (1 - e^{eps'-y})_+.
             f is (eps'-y)_+ plus a concave function.  Z has mean 0, so by Jensen the concave part only
             loses, and E f(V + Z), given V, is larger than f(V) by at most gap(a) = E(s Z - a)_+, a = |V -
             eps'|, s = 1 if V < eps', else -1.  gap(0) = E|Z|/2 <= tau/2.  The sub-Gaussian tail gives
             gap(a) <= eta tau from a = R on, where eta = 1e-6 delta and R = tau sqrt(2 log 1/eta).  gap is
             convex, so on [0, R] it lies below the chord of these two points, and so below the parabola
             tau/2 (1 - a^2/R^2) + eta tau.  In terms of
             Y' = V + Z, the mean of (Y'-eps')^2 is at most tau^2 above a^2, so tau^2 is added to R^2:
                 B(y) = tau/(2 R^2) (R^2 + tau^2 - (y-eps')^2)_+,  and
                 delta(eps) >= E[(1 - e^{eps'-Y'})_+ - B(Y')] - eta tau.
             (Gopi et al. 2021 shift eps by all of R.  B costs about tau R times the density of Y' at eps'.)
 tails       At the upper end of a step a mass of `tail` counts as infinite loss (up), or not at all (down).
             At the lower end it moves up to the grid; for that the lower bound subtracts T times `tail`.
             The FFT convolves on a circle: what leaves it comes in at the other end.  Chernoff bounds that.
 rounding    Masses are tilted by e^{theta l}, theta = best order - 1 (0 for the attacker).  That moves the
             tail of interest into the middle, where FFT noise (Higham 2002, Theorem 24.2) is small beside
             delta.  Cell masses, and the parts of them that move up, are enlarged by their rounding
             errors.  The lower bound takes both back: fields `surplus` and `pushed` of Part.
 pushes      A part that is enlarged takes some steps to the upper point that exact numbers would leave at the
             lower one.  Let J of T steps be pushed so, h each.  Then the grid has Y'' = Y' + J h, which below
             is called Y' again.  The argument of "grid, down" holds without the pushes.  Where J <= j, two
             things follow.  The first term is at least (1 - e^{eps'+jh-Y''})_+, since Y' >= Y'' - j h.  And
             Y' is as far from eps' as Y'' is from eps' + j h, or nearer by at most j h; so B is evaluated at
             that smaller distance.  J is a sum of independent rare events.  Beyond its mean it exceeds j no
             more often than a Poisson number of that mean (Hoeffding 1956; Anderson, Samuels 1967).  j is
             such that this has a probability of at most eta.

Beyond one epsilon for one image, the same distribution answers two questions that people ask: what k images
of one person cost together (`group_epsilon`), and how often a membership attacker can be right
(`attacker_tpr`).  So a mechanism is (q, sigma, k) in this file: k examples come and go together, usually 1,
and P = sum_j Binomial(k, q)(j) N(j, sigma^2), a mixture of Gaussians.  `mechanisms` is a tuple of
(mechanism, T), one for each kind of step.

    from extensions import pld
    pld.epsilon_of({(0.0333, 1.5): 6000}, 1e-5)           the accountant "pld" of accountant.py
    pld.pld_epsilon(0.0333, 1.5, 6000, 1e-5)              (lower, upper)
"""

import math
from functools import lru_cache, partial
from typing import NamedTuple

import numpy as np
from scipy.optimize import brentq
from scipy.special import comb, erfcx, gammainc, logsumexp, ndtr, ndtri

import accountant
from accountant import best_order, check, count_steps, epsilon_by_moments, log_delta, one_kind

FFT_NOISE = 1e-15  # per level of the FFT
MASS_NOISE = 4e-15  # relative error of a normal tail; at z standard deviations 1 + z^2 / 4 times that
LEAK = 1e-10  # tilted mass beyond either end of the circle of the FFT
# The certificate is tested inside these limits: smallest delta and q, largest sigma, most steps.
PLD_DELTA, PLD_Q, PLD_SIGMA, PLD_STEPS = 1e-10, 1e-7, 1e3, 1e7
# What is raised where float64, memory or those limits end.  Then a proven bound takes the place: Renyi's, or
# that of full batches.
BEYOND = (ArithmeticError, ValueError, MemoryError)


def epsilon_of(kinds, delta):
    """The accountant "pld": epsilon of steps {(q, sigma): T} at delta, certified upper bound.

    ValueError for a delta below 1e-10, which the certificate does not reach."""
    _check_delta(delta)
    return bounds(kinds, delta)[1]


def _check_delta(delta):
    check(delta=delta)
    if delta < PLD_DELTA:
        raise ValueError(f"delta = {delta}: below 1e-10 the pld certificate drowns in float64 rounding; use "
                         "the method rdp (train.py: --accountant rdp)")


def _mechanisms(kinds, k=1):
    """Steps {(q, sigma): T} as a tuple of ((q, sigma, k), T); empty for k = 0, which costs nothing."""
    return tuple(((q, sigma, int(k)), T) for (q, sigma), T in kinds.items()) if k else ()


def _silent(mechanisms):
    return any(sigma == 0 for (_, sigma, _), _ in mechanisms)  # a step without noise


def _subsampled(mechanisms):
    return any(q < 1 for (q, _, _), _ in mechanisms)


# ---- one step: losses and their masses on a grid -------------------------------------------------


def _weights(q, k):
    """How many of the k examples are in the batch: shifts 0..k and their binomial weights."""
    j = np.arange(k + 1)
    return j, comb(k, j) * q**j * (1 - q) ** (k - j)


def _ratio(x, q, sigma, k=1):
    """accountant.excess_and_loss for k examples: outputs x (n,) -> (u = P/Q - 1, the loss L = log P/Q)."""
    every, share = _weights(q, k)
    j, b = every[1:], share[1:]  # without j = 0, which adds nothing to u
    if len(x) > 1 and len(x) * k > 1 << 23:  # the table (n, k) of a large group would not fit into memory
        halves = [_ratio(half, q, sigma, k) for half in np.array_split(x, 2)]
        return tuple(map(np.concatenate, zip(*halves, strict=True)))
    w = (np.outer(x, j) - j * j / 2) / sigma**2  # (n, k), log N(j, sigma^2) / N(0, sigma^2)
    u = np.maximum(np.expm1(np.minimum(w, 600.0)) @ b, -1.0)
    with np.errstate(divide="ignore"):
        loss = np.log1p(u)
    # Close to -1 u has no digits left of P/Q = 1 + u; with q = 1 it may round to -1, and the loss to -inf.
    small = u < -0.99
    if small.any():
        at = (np.outer(x[small], every) - every * every / 2) / sigma**2
        loss[small] = logsumexp(at, axis=1, b=share)
    big = w.max(axis=1) > 600
    if big.any():
        loss[big] = logsumexp(w[big], axis=1, b=b)
    return u, loss


@lru_cache(maxsize=1 << 14)
def _log_moment(q, sigma, alpha, k):
    """log E_Q[(P/Q)^alpha] of one step: for k = 1 that of accountant.py."""
    if k == 1:
        return accountant.log_moment(q, sigma, alpha)
    if q == 1:
        return alpha * (alpha - 1) * (k / sigma) ** 2 / 2
    return accountant.moment_by_integral(q, sigma, alpha, partial(_ratio, k=k), k)


def _composed(mechanisms):
    """alpha -> sum of log moments.  Its best order tells how to tilt, its epsilon where to look."""
    return lambda alpha: sum(T * _log_moment(q, sigma, alpha, k) for (q, sigma, k), T in mechanisms)


class Part(NamedTuple):
    """One step on the grid, seen in one direction; it is made `steps` times."""

    loss: np.ndarray  # (n,) points of the grid
    log_pmf: np.ndarray  # (n,) log of their masses
    surplus: np.ndarray  # (n,) by how much the masses may be too large
    pushed: float  # bound on P[a step's loss moved up because of rounding]
    infinite: float  # mass of infinite loss
    steps: int


def _span(q, sigma, k, tail):
    """(x_low, x_high, their losses): at most `tail` of P and Q lies below x_low, and above x_high."""
    j, b = _weights(q, k)
    x_low = sigma * float(ndtri(tail))
    x_high = brentq(lambda x: ndtr((j - x) / sigma) @ b - tail, 0.0, k - 2 * x_low) + 1e-9
    if (k - x_low) / sigma > 36:  # a loss is at most ((k - x_low) / sigma)^2 / 2 = 648; e^709 overflows
        raise OverflowError("the privacy losses of one step leave the range of float64")
    return x_low, x_high, *_ratio(np.array([x_low, x_high]), q, sigma, k)[1]


def _tails(z):
    """(normal tails below z, bounds of the errors of a difference of two of them).

    A relative error of z grows z^2 times in a tail: z is rounded, and z / sqrt(2) within ndtr."""
    tails = ndtr(z)
    return tails, MASS_NOISE * (1 + np.minimum(z * z, 1e4) / 4) * tails  # 1e4: z may be infinite


def _masses(tails, errors, sign):
    """Tails at n+1 edges -> (n masses between, rounding errors, mass before the first, after the last).

    tails (n+1,): the mass below the edge where sign is 1, above it where sign is -1; errors (n+1,): of tails.
    """
    left, right = tails[:-1], tails[1:]
    # cells of outputs above 0; and the one around 0, which is 1 minus both tails
    not_below = np.where(sign[:-1] < 0, left - right, 1 - left - right)
    mass = np.where(sign[1:] > 0, right - left, not_below)
    return np.maximum(mass, 0.0), np.maximum(errors[:-1], errors[1:]), tails[0], tails[-1]


def _cells(q, sigma, k, h, span):
    """One step cut at grid losses (n+1,): (losses, `_masses` of P, those of Q, slack).

    slack: how far the cuts miss the grid."""
    j, b = _weights(q, k)
    x_low, x_high, first, last = span
    loss = h * np.arange(math.floor(first / h), math.ceil(last / h) + 1)
    with np.errstate(all="ignore"):  # x(loss), the inverse of _ratio
        if k == 1:
            far = loss - math.log(q) + np.log1p((q - 1) * np.exp(-loss))
            x = sigma**2 * np.where(loss < 30, np.log1p(np.expm1(np.minimum(loss, 30)) / q), far) + 0.5
        else:  # table, then one Newton step if it is small; `slack` counts what still misses
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
    # At either end only a miss outwards counts. Inwards, what the cell leaves out joins the tail there.
    slack = max(np.abs(miss[1:-1]).max(initial=0.0), -miss[0], miss[-1]) + 1e-15 * (1 + np.abs(loss).max())
    sign = np.where(x < 0, 1.0, -1.0)
    tails, errors = _tails(sign[:, None] * (x[:, None] - j) / sigma)  # (n+1, k+1)
    return loss, _masses(tails @ b, errors @ b, sign), _masses(tails[:, 0], errors[:, 0], sign), slack


def _connect_dots(loss, p, p_error, q, q_error, before, infinite, slack, steps):
    """Cell masses (n,) -> Part with n+1 points.

    p: masses under the distribution of the outputs (P in direction "removed", Q in "added"); q: under the
    other one.  before, infinite: the mass p below the first loss, and above the last.

    Of a cell between the losses l0 and l1 the part `up` of its mass p moves to l1, the rest to l0.  Its mass
    q stays as well if (p - up) e^-l0 + up e^-l1 = q.  Hence up = (p - e^l0 q) / (1 - e^{l0-l1}).  `safety` is
    for rounding, and for cuts off the grid by `slack`: 1 slack for l0 in e^l0 q, 2 for both ends in
    1 - e^{l0-l1}."""
    width, scale = -np.expm1(loss[0] - loss[1]), np.exp(loss[:-1])  # 1 - e^{l0-l1}, the same for all cells
    safety = (p_error + scale * q_error) / width + 3 * slack / width * (p + p_error)
    up = np.minimum(np.clip((p - scale * q) / width, 0.0, p) + safety, p + p_error)
    pmf, surplus = np.append(p + p_error - up, 0.0), np.append(2 * p_error, 0.0)
    pmf[1:] += up
    pmf[1] += before  # not pmf[0]: if the first cut misses inwards, some of it has losses above loss[0]
    with np.errstate(divide="ignore"):
        # twice `safety`: `up` may be too large by its own error, and `safety` comes on top
        return Part(loss, np.log(pmf), surplus, 2 * safety.sum(), infinite, steps)


# ---- T steps: the convolution --------------------------------------------------------------------


def _cgf(parts, s):
    """log E[e^{s Y'}]."""
    exponents = [(part.log_pmf + s * part.loss, part.steps) for part in parts]
    return sum(t * (e.max() + math.log(np.exp(e - e.max()).sum())) for e, t in exponents)


def _tilt(parts, theta):
    """Masses times e^{theta l}, normalised: (one array per part; mean, variance, surplus of their sum Y')."""
    middle, variance, surplus, tilted = 0.0, 0.0, 0.0, []
    for part in parts:
        exponent = part.log_pmf + theta * part.loss
        p = np.exp(exponent - exponent.max())
        surplus += part.steps * (part.surplus @ np.exp(theta * part.loss - exponent.max())) / p.sum()
        tilted.append(p / p.sum())
        mean = tilted[-1] @ part.loss
        middle += part.steps * mean
        variance += part.steps * (tilted[-1] @ (part.loss - mean) ** 2)
    return tilted, middle, variance, surplus


def _edge(parts, theta, base, variance, sign):
    """Where the circle may be cut: tilted mass beyond it <= LEAK."""
    # Chernoff.  Any rate s is valid; walk to a good one.
    reach = lru_cache(lambda s: (_cgf(parts, theta + sign * s) - base - math.log(LEAK)) / s)
    s = math.sqrt(-2 * math.log(LEAK) / variance)
    factor = 2.0 if reach(2 * s) < reach(s) else 0.5
    while reach(factor * s) < reach(s):
        s *= factor
    return sign * reach(s)


def _convolve(parts, tilted, h, low, high):
    """(grid (size,), bell: tilted masses of Y' there) on the circle from low to high."""
    size = 1 << max(4, math.ceil(math.log2((high - low) / h + 2)))
    if size > 1 << 21:
        raise MemoryError("the grid is too fine")
    spectrum = np.ones(size // 2 + 1, complex)
    for part, p in zip(parts, tilted, strict=True):
        f = np.fft.rfft(np.bincount(np.rint(part.loss / h).astype(np.int64) % size, p, size))
        with np.errstate(divide="ignore"):
            alive = part.steps * np.log(np.abs(f)) > -75  # the others, below e^-75, are lost in rounding
        f[alive] = np.exp(part.steps * np.log(f[alive]))
        spectrum *= np.where(alive, f, 0.0)
    shift = math.floor(low / h)
    bell = np.maximum(np.roll(np.fft.irfft(spectrum, size), -(shift % size)), 0.0)
    return h * (shift + np.arange(size)), bell


def _compose(parts, h, theta, eta, tail):
    """T-fold convolution: (upper, lower, grid); upper and lower are functions eps -> bound on delta(eps).

    parts: a Part per kind of step; theta: the tilt; eta: small number, "grid, down"; tail: see `_span`."""
    steps = sum(part.steps for part in parts)
    base = _cgf(parts, theta)
    tilted, middle, variance, surplus = _tilt(parts, theta)
    low, high = (_edge(parts, theta, base, variance, sign) for sign in (-1, 1))
    grid, bell = _convolve(parts, tilted, h, low, high)
    size = len(grid)
    # FFT noise, 2-norm: the power T multiplies it by T (as |f| <= 1), the inverse FFT adds it once more
    noise = 1.1 * (steps + 1) * FFT_NOISE * (1 + math.log2(size)) * max(math.sqrt(p @ p) for p in tilted)
    # 2-norm on the grid of e^{-theta z} (1 - e^-z), z = y - eps > 0, whose square has the integral
    # 1 / (theta (2 theta + 1) (2 theta + 2)); 1e-99 as theta may be 0. Error of delta: markov * noise * norm
    norm = math.sqrt(min(size, 1 + 1 / (h * theta * (2 * theta + 1) * (2 * theta + 2) + 1e-99)))

    log_scale = base - theta * middle  # P[Y' = grid] = weight * e^log_scale
    with np.errstate(over="ignore", invalid="ignore"):
        weight = bell * np.exp(-theta * (grid - middle))
        weights = (weight, weight * np.exp(middle - grid))
        tail0, tail1 = (np.append(np.cumsum(w[::-1])[::-1], 0.0) for w in weights)

    def sharp(eps):
        """(E[(1 - e^{eps-Y'})_+] on the grid, its numerical error, Markov's bound on P[Y' > eps])."""
        i = np.searchsorted(grid, eps, side="right")
        markov = np.exp(log_scale - theta * (eps - middle))
        value = math.exp(log_scale) * (tail0[i] - np.exp(np.minimum(eps - middle, 700.0)) * tail1[i])
        error = markov * (2 * LEAK + noise * norm) + 3e-16 * size * math.exp(log_scale) * tail0[i]
        return value, error, markov

    def upper(eps):
        with np.errstate(over="ignore", invalid="ignore"):
            value, error, _ = sharp(eps)
        known = (eps >= grid[0]) & np.isfinite(value)  # not far below the middle, where weights overflow
        value = (np.maximum(value, 0.0) + error) * math.exp(1e-14 * steps)  # rounding, T times
        value = value + sum(part.steps * part.infinite for part in parts)
        return np.where(known, np.fmin(value, 1.0), 1.0)

    tau = h * math.sqrt(steps) / 2
    R = tau * math.sqrt(-2 * math.log(eta))
    jumps, rate = 0, sum(part.steps * part.pushed for part in parts)
    # j of "pushes" at the top: more than `jumps` steps are pushed with a probability of at most eta
    while gammainc(jumps + 1, rate) > eta:
        jumps += 1 + jumps // 8

    def lower(eps):
        moved, edge = jumps * h, math.hypot(R, tau)  # of pushed steps; B is 0 from `edge` on
        eps, outer = eps + tau**2 / 2 + moved, edge + moved  # eps' + j h
        i, j = np.searchsorted(grid, [eps - outer, eps + outer])
        if i == 0:
            return 0.0
        value, error, markov = sharp(eps)
        distance = np.maximum(np.abs(grid[i:j] - eps) - moved, 0.0)
        kink = tau / (2 * R**2) * (edge**2 - distance**2)  # B
        cost = math.exp(log_scale) * weight[i:j] @ kink
        # `surplus` is what value has too much; then FFT noise in `cost`, as B < tau at each of j - i points.
        error += markov * (surplus + noise * math.exp(theta * outer) * tau * math.sqrt(j - i))
        # eta (2 + tau): eta tau as at the top, eta for more than `jumps` pushed steps, and eta to spare
        return (value - error - cost) * math.exp(-1e-14 * steps) - eta * (2 + tau) - steps * tail

    return upper, lower, grid


def _curves(mechanisms, theta, eps, small):
    """[(upper, lower, grid)] for removed, added.

    theta: the tilt; eps: about where the curves will be read; small: the least delta (or false-positive
    rate).  eps and theta set h.  Upper and lower epsilon differ by 2e-4 to 1e-3 of max(eps, spread), and by
    more past 1e6 steps.  The lower one may be worthless where sigma is so small that h must be raised."""
    steps = sum(t for _, t in mechanisms)
    if steps > PLD_STEPS or any(q < PLD_Q or sigma > PLD_SIGMA for (q, sigma, _), _ in mechanisms):
        raise OverflowError("outside what the certificate is tested for")
    # standard deviation of Y, about: the log moment of order 1.5 is near 1.5 * 0.5 / 2 = 0.375 variances
    spread = math.sqrt(sum(t * _log_moment(q, sigma, 1.5, k) / 0.375 for (q, sigma, k), t in mechanisms))
    tail = 1e-6 * small / steps
    spans = [_span(*mechanism, tail) for mechanism, _ in mechanisms]
    # so that tau R (1 + theta), about the gap of the bounds, is as the docstring says
    h = math.sqrt(1.5e-4 * max(1, steps / 1e6) * max(eps, spread) / ((1 + max(theta, 1 / spread)) * steps))
    # at most 2^21 numbers in a step's tables
    sizes = ((s[3] - s[2]) * (k + 1) for s, ((_, _, k), _) in zip(spans, mechanisms, strict=True))
    h = max(h, max(sizes) / 2**21)
    while True:  # h is doubled until the FFT fits into memory
        removed, added = [], []
        for (mechanism, t), span in zip(mechanisms, spans, strict=True):
            loss, (p, dp, p_low, p_high), (q, dq, q_low, q_high), slack = _cells(*mechanism, h, span)
            removed.append(_connect_dots(loss, p, dp, q, dq, p_low, p_high, slack, t))
            # the other direction: P and Q change places, and losses their sign
            p, dp, q, dq = (cells[::-1] for cells in (p, dp, q, dq))
            added.append(_connect_dots(-loss[::-1], q, dq, p, dp, q_high, q_low, slack, t))
        try:
            return [_compose(parts, h, theta, 1e-6 * small, tail) for parts in (removed, added)]
        except MemoryError:
            h *= 2


# ---- full batches: one Gaussian mechanism --------------------------------------------------------


def _full_batches(mechanisms):
    """mu of the one Gaussian mechanism that these steps would be with full batches (q = 1).

    It dominates them, for k examples as well: by convexity the mixture costs at most its worst part."""
    return math.sqrt(sum(t * (k / sigma) ** 2 for (_, sigma, k), t in mechanisms))


def _gaussian_delta(mu, eps):
    """(lower, upper) of delta = Phi(-y) - e^eps Phi(-y-mu) with y = eps/mu - mu/2 (Balle, Wang 2018, Thm. 8).

    e^eps Phi(-y-mu) = phi(y) Phi(-y-mu) / phi(y+mu): nothing overflows, and rounding is inside the bounds."""
    y, off = eps / mu - mu / 2, 4e-16 * (eps / mu + mu)

    def at(y):  # delta, its rounding error
        tail = float(ndtr(-y))
        return tail - math.exp(-y * y / 2) * float(erfcx(max(0.0, y + mu) / math.sqrt(2))) / 2, 1e-12 * tail

    (low, low_error), (high, high_error) = at(y + off), at(y - off)
    return max(0.0, low - low_error), min(1.0, high + high_error)


def _gaussian_epsilon(mu, delta):
    """(lower, upper) of epsilon.  delta <= Phi(-y), so Phi(-y) = delta gives the upper end of the search."""
    end = max(0.0, mu * (mu / 2 - float(ndtri(delta)))) * (1 + 1e-9)
    low = _halve(lambda e: _gaussian_delta(mu, e)[0] <= delta, 0.0, end)[0]
    if _gaussian_delta(mu, 0.0)[1] <= delta:
        return low, 0.0
    return low, _halve(lambda e: _gaussian_delta(mu, e)[1] <= delta, 0.0, end)[1]


def _halve(holds, lo, hi):
    """(lo, hi) bisected until close; holds(hi) is True, and holds(lo) False unless lo never moved."""
    while hi - lo > 1e-9 * abs(hi) + 1e-12:
        mid = (lo + hi) / 2
        lo, hi = (lo, mid) if holds(mid) else (mid, hi)
    return lo, hi


# ---- epsilon and delta ---------------------------------------------------------------------------


def _invert(upper, lower, grid, delta):
    """(lower, upper) bound of the epsilon that belongs to delta."""
    start, end = max(0.0, float(grid[0])), float(grid[-1])
    if upper(end) > delta:
        return 0.0, math.inf
    up = start if upper(start) <= delta else _halve(lambda e: upper(e) <= delta, start, end)[1]
    gap = 1e-4 * up
    while gap < up - start and lower(up - gap) < delta:
        gap *= 2
    low = max(start, up - gap)  # lower(e) >= delta proves epsilon >= e; epsilon >= 0 needs no proof
    return (_halve(lambda e: lower(e) < delta, low, up)[0] if lower(low) >= delta else 0.0), up


def delta_by_moments(moment, eps):
    """(delta, the order that gave it): the smallest bound over all orders."""
    bound, order = best_order(lambda a: log_delta(moment, a, eps))
    return math.exp(min(0.0, bound)), order


@lru_cache(maxsize=256)
@np.errstate(all="ignore")
def _pld_epsilon(mechanisms, delta):
    """(lower, upper).  Without a certificate lower is 0 and upper the smallest other bound that is proven;
    inf for steps without noise."""
    if not mechanisms or _silent(mechanisms):
        return (0.0, math.inf) if mechanisms else (0.0, 0.0)
    rdp_eps, order = epsilon_by_moments(_composed(mechanisms), delta)
    full_batches = _gaussian_epsilon(_full_batches(mechanisms), delta)
    if not _subsampled(mechanisms):
        return full_batches
    proven = full_batches[1]
    if all(k == 1 for (_, _, k), _ in mechanisms):  # with k > 1, rdp covers "removed" only
        proven = min(rdp_eps, proven)
    elif proven > 700:
        proven = math.inf  # a group: e^epsilon leaves float64, as good as no promise
    if delta < PLD_DELTA or proven == 0 or not rdp_eps < math.inf:
        return 0.0, proven
    guess = max(rdp_eps, 1e-12)
    try:
        for _ in range(3):  # usually once; again where RDP is far off and its order a poor tilt
            brackets = [_invert(*curve, delta) for curve in _curves(mechanisms, order - 1, guess, delta)]
            lowest, highest = (max(side) for side in zip(*brackets, strict=True))
            if not 0 < highest < 0.7 * guess:
                break
            guess, order = highest, delta_by_moments(_composed(mechanisms), highest)[1]
    except BEYOND:
        return 0.0, proven
    return lowest, highest if highest < proven else proven


@np.errstate(all="ignore")
def _pld_delta(mechanisms, eps):
    """(lower, upper)."""
    if not mechanisms or _silent(mechanisms):
        return (0.0, 1.0) if mechanisms else (0.0, 0.0)
    if not _subsampled(mechanisms):
        return _gaussian_delta(_full_batches(mechanisms), eps)
    rdp_delta, order = delta_by_moments(_composed(mechanisms), eps)
    try:
        curves = _curves(mechanisms, order - 1, eps, min(0.1, max(rdp_delta, 1e-10)))
        lowest, highest = (max(float(c[side](eps)) for c in curves) for side in (1, 0))
    except BEYOND:
        return 0.0, rdp_delta
    return max(0.0, lowest), highest if highest < rdp_delta else rdp_delta


def bounds(kinds, delta, k=1):
    """(lower, upper) bound on epsilon of steps {(q, sigma): T}, for k images of one person together.

    For any delta in (0, 1).  If not certified: see `_pld_epsilon`.  More than 64 kinds are merged into dearer
    ones; then the lower bound is not one of the steps given."""
    return _pld_epsilon(_mechanisms(count_steps(kinds), k), delta)


def pld_epsilon(q, sigma, steps, delta):
    """(lower, upper) bounds of the exact epsilon, certified or as in `_pld_epsilon`; upper: `epsilon_of`."""
    check(q, sigma, steps)
    _check_delta(delta)
    return bounds(one_kind(q, sigma, steps), delta)


def pld_delta(q, sigma, steps, epsilon):
    """(lower, upper) bounds of the exact delta at epsilon >= 0; if not certified, 0 and Renyi's."""
    check(q, sigma, steps)
    if not 0 <= epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: must be >= 0 and finite")
    return _pld_delta(_mechanisms(one_kind(q, sigma, steps)), epsilon)


# ---- one person's images, and the attacker -------------------------------------------------------


def group_epsilon(k, q, sigma, steps, delta):
    """epsilon of k images that are added or removed together (one person), certified upper bound.

    Not k times epsilon: recomputed with Binomial(k, q) of the images in a batch.  The mixture of Gaussians
    P = sum_j Binomial(k, q)(j) N(j, sigma^2), against Q = N(0, sigma^2), dominates any k clipped gradients
    (Ganesh 2024).  Where this is not certified: the epsilon of full batches, inf if that is above 700.  With
    k = 1 it is then the smaller of that and Renyi's.
    """
    check(q, sigma, steps)
    _check_delta(delta)
    if not 0 <= k <= 1000 or k != int(k):
        raise ValueError(f"k = {k}: the group size is a whole number from 0 to 1000")
    return bounds(one_kind(q, sigma, steps), delta, k)[1]


def attacker_tpr(q, sigma, steps, fprs=(0.001, 0.01, 0.1)):
    """Bounds on the true-positive rate of ANY membership attacker: an array, one for each rate in fprs.

    For every real eps, negative ones too, TPR <= e^eps FPR + delta(eps), which is what delta(eps) says of a
    test.  The minimum over all eps is taken, with the certified upper delta of the direction "example
    removed".  By Neyman and Pearson this is tight for the composed loss distribution.  A single (eps, delta)
    would only give one of these lines, which is looser.
    """
    check(q, sigma, steps)
    return rates(one_kind(q, sigma, steps), fprs)


@np.errstate(all="ignore")
def rates(kinds, fprs):
    """attacker_tpr of steps {(q, sigma): T}."""
    mechanisms, fprs = _mechanisms(count_steps(kinds)), np.asarray(fprs)
    if not ((fprs > 0) & (fprs < 1)).all():
        raise ValueError("fprs: false-positive rates must lie strictly between 0 and 1")
    fprs = fprs.astype(float)
    if not mechanisms or _silent(mechanisms):
        return np.ones(fprs.shape) if mechanisms else fprs.copy()
    proven = ndtr(ndtri(fprs) + _full_batches(mechanisms))
    if not _subsampled(mechanisms):
        return proven
    try:
        upper, _, grid = _curves(mechanisms, 0.0, 0.0, float(fprs.min()))[0]
    except BEYOND:
        return proven
    deltas, slopes = upper(grid), np.exp(grid)
    best = np.array([min(1.0, np.nanmin(slopes * f + deltas)) for f in fprs.ravel()])
    return np.minimum(best.reshape(fprs.shape), proven)


def statement_numbers(steps, delta, group=20, fprs=(0.001, 0.01, 0.1)):
    """All that a privacy statement says of `steps`: rows of a ledger, or a plan [(q, sigma, T), ...].

    A dict of upper bounds, for any q in [0, 1], sigma >= 0, number of steps and delta in (0, 1):
    epsilon_NAME       one for each NAME in accountant.ACCOUNTANTS; epsilon_rdp is by Renyi moments
    epsilon_pld        tight; if not certified, Renyi's, or that of full batches if smaller
    epsilon_for_group  `group` examples added or removed together, tight; if not certified, the
                       epsilon of full batches, inf if that is above 700
    attacker           {fpr: best true-positive rate of any membership attacker}, tight; if not certified,
                       that of full batches
    Not certified are, where q < 1: delta below 1e-10 (not for the attacker), q below 1e-7, over 1e7 steps,
    sigma above 1e3 or below about k/28, where k is 1 or the size of the group.
    """
    check(delta=delta)
    steps, numbers = count_steps(steps), {}
    for name in accountant.ACCOUNTANTS:
        try:
            numbers[f"epsilon_{name}"] = accountant.epsilon_of_ledger(steps, delta, name)
        except ValueError:  # as pld refuses a small delta: a statement takes what is proven there
            numbers[f"epsilon_{name}"] = float(bounds(steps, delta)[1])
    attacker = rates(steps, fprs).tolist()
    return {
        **numbers,
        "epsilon_for_group": float(bounds(steps, delta, group)[1]),
        "attacker": dict(zip(map(float, fprs), attacker, strict=True)),
    }
