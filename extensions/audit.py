"""An attack on the real engine: a measured lower bound on epsilon, to hold against the computed upper bound.

The worst case that DP-SGD (Liu et al. 2024, Algorithm 1) promises to withstand is built and attacked, once,
with the sampler, clipping, sum and noise that train.py uses (`dp_sgd.poisson_sample`, `DPSGD.accumulate`,
`DPSGD.step`):

  canaries   m examples, each in the data with probability 1/2 (a secret coin). The gradient of example j has
             length 10 C along a coordinate of its own. Clipping leaves C, the most that one example may do
             ("Dirac canaries", Nasr et al. 2023). The model is one number per example, an Embedding (m, 1),
             with a linear loss.
  attacker   sees every noisy gradient y_t (m,), in units of C. It gives canary j a score that is high if the
             canary seems to be in the data:
               sum           sum_t (q_t / sigma_t^2) y_t[j]; the weights matter only where steps differ
               differences   sum_t |y_t[j] - y_(t-1)[j]|: sees noise that is the same in every step
               regenerated   the sum, minus the noise that the same program draws when it is run again

The first command takes q, sigma and T from that run's ledger and privacy.json (runs/digits is the default).
The second needs no run:

    python -m extensions.audit runs/digits
    python -m extensions.audit --q 0.1 --sigma 1 --steps 300 --delta 1e-5

Two results, both at 95 % confidence
------------------------------------
RIGOROUS BOUND, whatever the mechanism does (Steinke, Nasr, Jagielski 2023, Theorem 5.2). The attacker guesses
"in" for the r/2 highest scores and "out" for the r/2 lowest. r is fixed before the run, from (q, sigma, T, m,
delta) by a simulation.

  delta = 0   Given the output and the other coins, epsilon-DP bounds the odds of a coin by e^epsilon. So a
              guess is right with probability at most p = e^epsilon / (1 + e^epsilon), and W, the number of
              right guesses, is stochastically at most V ~ Binomial(r, p).
  delta > 0   An (epsilon, delta)-DP mechanism does as an epsilon-DP one, but for a failure of probability
              delta; their proof makes this precise. Each of m coins compares two neighbouring data sets, and
              each of the two may fail. Then a guess may be right for free. So W is at most V + F. F >= 0
              comes with the output, and E[F] <= 2 m delta. Given the output, V is Binomial(r, p) whatever the
              output is. So V and F are independent. With v right guesses observed,

                  P[W >= v] <= sum_i P[F = i] P[V >= v - i]
                             = P[V >= v] + sum_(i > 0) P[F = i] P[v - i <= V < v]
                            <= P[V >= v] + 2 m delta max_(i = 1..m) P[v - i <= V < v] / i

              The last step holds because P[F = i] = i P[F = i] / i and sum_i i P[F = i] = E[F]. From i = v
              on the probability grows no more, but the divisor does. So i = 1..v is enough.

The bound is the first epsilon, coming from 0, at which this is not below 5 %. Even r = m right guesses happen
with probability p^m. So the bound never exceeds about ln(m / 3), which is 8.1 for m = 10,000. It is valid,
and far from tight. Each score has its own bound, at 95 % by itself. The verdict is about any of the three,
so its false alarms may be thrice 5 %.

ESTIMATE. The coordinates are independent, so m canaries are m independent trials. Clopper-Pearson bounds
(97.5 % each) on the false positives and negatives of "sum above its expected midpoint" give mu = z(1 - fpr) -
z(fnr), z being the quantile function of N(0, 1), and from mu the epsilon of that Gaussian mechanism at delta.
It is close to the truth. But it trusts that the whole trade-off curve is Gaussian, which subsampling (q < 1)
bends. A mechanism that is not the one claimed may break it: an estimate, no proof.

What this cannot see
--------------------
One linear layer and one kind of gradient go through the engine. Whether the per-example gradients of
attention, convolutions or norms are right (a wrong norm is a wrong sensitivity), whether examples mix inside
the network, whether train.py feeds the engine rightly: those are the subject of tests/test_dp_sgd.py (every
layer against a float64 loop, neighbouring data sets) and tests/test_pitfalls.py. The audit does not see leaks
outside the gradients (files, timing, floating point), nor a violation smaller than the gap between its bound
and the claim. Passing is no proof. Two faults of the noise that this repository once had passed this audit,
and would pass it again:

  predictable noise   torch's CPU generator is linear over the field of two elements: enough signs of
                      noise-only weights give its state, and with it all the noise. The attacker here adds
                      scores; it solves no equations. Its score "regenerated" only sees a program that starts
                      with the same seed.
  a tail that ends    float32 normals of torch end at 5.77 standard deviations, and what lies beyond is
                      impossible without the example. Where sigma = 1 and q = 1, that happens to about one
                      canary in a million per step, and more rarely where sigma is larger or q smaller. The
                      scores sum over all steps and the bounds count thousands of guesses, so a few such
                      events do not show.

Both are kept out by the generator (`dp_sgd.SecureGenerator`) and by tests of its own, not by this audit.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.special import expit
from scipy.stats import beta, binom, norm
from torch import nn

import accountant
import dp_sgd
from extensions.bookkeeping import bookkeeping
from support import arguments, command_line, files, randomness
from support.bars import tqdm
from support.calculator import read_run

CONFIDENCE = 0.95
LONGER = 10  # raw gradient of a canary, in units of C

# ------------------------------------------------------------------------------------------------- the attack


class Eavesdropper:
    """Stands in the optimizer's place: what an optimizer may see is exactly what the mechanism releases."""

    def __init__(self, model):
        self.parameter = model.weight

    def step(self):
        self.seen = self.parameter.grad[:, 0].double()


def attack(schedule, m, clip_norm=1.0, clipping="flat", fast=False, rng=None):
    """One run of the real engine on m canaries -> (in the data? (m,) bool, {name of score: (m,) float64}).

    Both results are numpy arrays.

    schedule: [(q, sigma, steps), ...], the order does not matter. fast: noise and sampling from an ordinary
    generator instead of SecureGenerator. rng (numpy) throws the secret coins; None: seeded by the operating
    system.
    """
    member = (np.random.default_rng() if rng is None else rng).random(m) < 0.5
    present = torch.from_numpy(member.nonzero()[0])
    new = randomness.fresh_generator if fast else dp_sgd.SecureGenerator
    noise, sampler, again = new(), new(), new()  # `again`: the attacker starts the same program, without data
    model = nn.Embedding(m, 1)
    listener = Eavesdropper(model)
    scores = {name: torch.zeros(m, dtype=torch.float64) for name in ("sum", "differences", "regenerated")}

    # linear: the gradient of each example is known, LONGER * C along its own coordinate
    def loss_fn(model, rows):
        return LONGER * clip_norm * model(rows)[:, 0]

    def released(engine):
        engine.step(listener)
        return listener.seen * (engine.expected_batch_size / clip_norm)  # (m,), unit C

    before = None
    total = sum(steps for *_, steps in schedule)
    with tqdm(total=total, desc="attack", unit="step", leave=False, disable=total < 1000) as bar:
        for q, sigma, steps in schedule:
            B = max(1.0, q * m / 2)  # the expected batch size, as always from public numbers only
            engine, rerun = (dp_sgd.DPSGD(model, clip_norm, sigma, B, clipping=dp_sgd.CLIPPING[clipping],
                                           method=bookkeeping, generator=g) for g in (noise, again))
            for _ in range(steps):
                batch = dp_sgd.poisson_sample(len(present), q, sampler)
                engine.accumulate(loss_fn, present[batch])
                y = released(engine)
                weight = q / sigma ** 2
                scores["sum"] += weight * y
                scores["regenerated"] += weight * (y - released(rerun))
                if before is not None:
                    scores["differences"] += (y - before).abs()
                before = y
                bar.update()
    return member, {name: score.numpy() for name, score in scores.items()}


# --------------------------------------------------------------------------------------------- the two bounds


def p_value(correct, guesses, m, epsilon, delta):
    """Bound on P[at least `correct` of `guesses` right] under (epsilon, delta)-DP; epsilon an array (E,).

    `correct` is v of the text at the top, `guesses` is r.
    """
    p = expit(np.asarray(epsilon, dtype=float))
    # (E, v): P[v - i <= V < v] for i = 1..v
    missing = binom.pmf(np.arange(correct - 1, -1, -1), guesses, p[:, None]).cumsum(1)
    worst = (missing / np.arange(1, correct + 1)).max(1, initial=0.0)
    return np.minimum(1.0, binom.sf(correct - 1, guesses, p) + 2 * m * delta * worst)


def rigorous_bound(correct, guesses, m, delta, confidence=CONFIDENCE):
    """Lower bound on epsilon from right guesses (Steinke et al. 2023, Thm. 5.2), rounded down to 0.01."""
    top = np.log(m) + 1  # above the largest possible answer
    for start in np.arange(0, top, 0.5):
        epsilons = start + 0.01 * np.arange(50)
        possible = p_value(correct, guesses, m, epsilons, delta) > 1 - confidence
        if possible.any():
            return max(0.0, float(epsilons[possible.argmax()]) - 0.01)
    return float(top)


def right_guesses(score, member, guesses):
    """Highest guesses/2 scores taken for members, lowest guesses/2 for the others: how many are right."""
    order, half = np.argsort(score), guesses // 2
    return int((~member[order[:half]]).sum() + member[order[len(order) - half:]].sum())


def estimate(score, member, threshold, delta, confidence=CONFIDENCE):
    """Estimated lower bound on epsilon: Clopper-Pearson rates of score > threshold, read as a Gaussian's."""
    def at_most(errors, trials):
        return beta.ppf((1 + confidence) / 2, errors + 1, trials - errors) if errors < trials else 1.0

    false_positive = at_most(int((score[~member] > threshold).sum()), int((~member).sum()))
    false_negative = at_most(int((score[member] <= threshold).sum()), int(member.sum()))
    mu = norm.isf(false_positive) - norm.ppf(false_negative)
    # one full batch with sigma = 1 / mu is the Gaussian mechanism of that mu
    return accountant.epsilon(1.0, 1 / mu, 1, delta, "pld") if mu > 1e-3 else 0.0


def plan_guesses(schedule, m, delta, rounds=4):
    """The number of guesses with the best mean rigorous bound, in a simulation that knows no secret coin."""
    rng, candidates = np.random.default_rng(0), np.unique(np.geomspace(10, m, 12).astype(int) // 2 * 2)
    bounds = np.zeros(len(candidates))
    for _ in range(rounds):
        member = rng.random(m) < 0.5
        score = sum(q / s ** 2 * (member * rng.binomial(t, q, m) + s * t ** 0.5 * rng.standard_normal(m))
                    for q, s, t in schedule)
        bounds += [rigorous_bound(right_guesses(score, member, r), r, m, delta) for r in candidates]
    return int(candidates[bounds.argmax()])


def audit(schedule, delta, m=10_000, guesses=None, **how):
    """Attack and bounds -> a dict. schedule: [(q, sigma, steps), ...]. how: see `attack`.

    guesses: how many; None: planned (`plan_guesses`). ValueError for a schedule without noise or m below 10.

    upper_rdp, upper_pld   what the accountant claims
    member, scores         what `attack` returned
    lower                  {score: rigorous lower bound}
    right, guesses         {score: right guesses}, out of how many
    estimate, threshold    of the score "sum", and the threshold of that estimate
    """
    if m < 10:
        raise ValueError(f"--canaries must be at least 10, got {m}")
    if not schedule or any(sigma <= 0 or not 0 < q <= 1 for q, sigma, _ in schedule):
        raise ValueError("nothing to audit: a private run has sigma > 0, q in (0, 1] and at least one step")
    upper = {f"upper_{name}": accountant.epsilon_of_ledger(schedule, delta, name) for name in ("rdp", "pld")}
    guesses = plan_guesses(schedule, m, delta) if guesses is None else guesses  # before any coin is thrown
    # half the mean of a member's score
    threshold = sum(steps * (q / sigma) ** 2 for q, sigma, steps in schedule) / 2
    member, scores = attack(schedule, m, **how)
    right = {name: right_guesses(score, member, guesses) for name, score in scores.items()}
    return {**upper, "guesses": guesses, "right": right, "member": member, "scores": scores,
            "threshold": threshold,
            "lower": {name: rigorous_bound(v, guesses, m, delta) for name, v in right.items()},
            "estimate": estimate(scores["sum"], member, threshold, delta)}


# ---------------------------------------------------------------------------------------------------- program


def histogram(result, caption, path, width=800, height=400):
    """PNG of the two score histograms: blue in the data, orange not, grey both; axes with numbers."""
    score, member = result["scores"]["sum"], result["member"]
    edges = np.linspace(score.min(), score.max(), 81)
    counts = [np.histogram(score[part], edges)[0] for part in (member, ~member)]
    top = max(c.max() for c in counts)
    image = Image.new("RGB", (width, height), "white")
    draw, (left, right, up, down) = ImageDraw.Draw(image), (60, width - 20, 60, height - 50)

    def x(score):
        return left + (right - left) * (score - edges[0]) / (edges[-1] - edges[0])

    def y(number):
        return down - (down - up) * number / top

    for a, b, n_in, n_out in zip(edges[:-1], edges[1:], *counts, strict=True):
        for n, colour in ((n_in, (70, 120, 220)), (n_out, (240, 150, 50)),
                          (min(n_in, n_out), (140, 140, 140))):
            if n > 0 and (n != min(n_in, n_out) or colour[0] == 140):
                draw.rectangle([x(a), y(n), x(b) - 1, down], fill=colour)
    draw.line([left, up, left, down, right, down], fill="black")
    for s in np.linspace(edges[0], edges[-1], 9):
        draw.line([x(s), down, x(s), down + 5], fill="black")
        draw.text((x(s), down + 8), f"{s:.3g}", fill="black", anchor="ma")
    for c in np.linspace(0, top, 5):
        draw.line([left - 5, y(c), left, y(c)], fill="black")
        draw.text((left - 8, y(c)), f"{c:.0f}", fill="black", anchor="rm")
    draw.line([x(result["threshold"]), up, x(result["threshold"]), down], fill="black")
    draw.text((left, 10), caption, fill="black")
    draw.text((left, 30), "canaries with that score: blue in the data, orange not, grey both; line: "
              "threshold of the estimate", fill="black")
    draw.text((right, height - 20), "score: weighted sum of the canary's noisy gradients", fill="black",
              anchor="ra")
    with files.replacing(path) as file:
        image.save(file, "PNG")


def main(argv=None):
    parser = command_line.Parser(description="Attack the DP-SGD engine; print lower and upper bounds on "
                                             "epsilon.")
    add = parser.add_argument
    add("run", nargs="?", help="run folder whose q, sigma, steps, C and clipping are audited [runs/digits]")
    add("--q", type=float, help="without a run: sampling probability, 0..1")
    add("--sigma", type=float, help="without a run: noise multiplier, in units of the clip norm")
    add("--steps", type=int, help="without a run: number of noise additions")
    add("--delta", type=float, help="delta of (epsilon, delta) [the run's, else 1e-5]")
    add("--canaries", type=int, default=10_000, help="examples whose membership is guessed [10,000]")
    add("--fast-noise", action="store_true", help="audit the ordinary generator of --fast-noise [as the run]")
    add("--out", type=Path, help="PNG of the scores [RUN/internal/audit.png; none without a run]")
    args = parser.parse_args(argv)
    given = [args.q, args.sigma, args.steps]
    if not args.run and given == [None] * 3:
        args.run = "runs/digits"
    if args.run and given != [None] * 3 or not args.run and None in given:
        raise ValueError("give either a run folder, or all of --q, --sigma and --steps")
    arguments.check_suffix("--out", args.out, ".png")
    privacy, out = {}, args.out
    if args.run:
        counted = read_run(args.run)[1]["spent"]
        places = [Path(args.run, *parts) for parts in (("release", "privacy.json"),
                                                       ("internal", "settings.json"))]  # of an unfinished run
        privacy = next((files.read_json(place) for place in places if place.exists()), {})
        schedule = [(q, sigma, steps) for (q, sigma), steps in counted.items()]
        out = out or Path(args.run, "internal", "audit.png")
        # settings.json has the seed itself, which may be 0.
        if privacy.get("insecure_seed") is not None and privacy["insecure_seed"] is not False:
            raise ValueError(f"{args.run} ran with a known noise seed: it is not private, there is nothing "
                             "to audit")
    else:
        if args.steps < 1:
            raise ValueError(f"--steps must be at least 1, got {args.steps}")
        schedule = [(args.q, args.sigma, args.steps)]
    delta = privacy.get("delta", 1e-5) if args.delta is None else args.delta
    fast = args.fast_noise or bool(privacy) and randomness.can_be_computed(privacy)
    result = audit(schedule, delta, args.canaries, fast=fast,
                   clip_norm=privacy.get("clip_norm", 1.0), clipping=privacy.get("clipping", "flat"))
    plan = "; ".join(f"q {q:.4g}, sigma {sigma:.4g}, {steps} steps" for q, sigma, steps in schedule[:3])
    best = max(result["lower"].values())
    print(f"{plan}{'; ...' if schedule[3:] else ''}; delta {delta:g}; {args.canaries:,} canaries, "
          f"{result['guesses']} guesses")
    print(f"epsilon at most     {result['upper_pld']:6.2f}   claimed: tight accountant (Renyi: "
          f"{result['upper_rdp']:.2f})")
    print(f"epsilon estimated   {result['estimate']:6.2f}   Gaussian trade-off, Clopper-Pearson "
          f"{CONFIDENCE:.0%}: no proof")
    for name, bound in result["lower"].items():
        print(f"epsilon at least    {bound:6.2f}   rigorous at {CONFIDENCE:.0%} (Steinke et al. 2023), score "
              f"{name}: {result['right'][name]} of {result['guesses']} guesses right")
    violated = best > result["upper_pld"]
    print("VIOLATED: the engine does not keep its promise" if violated else "no violation found")
    if out:
        caption = (f"{plan[:60]}: epsilon at least {result['lower']['sum']:.2f} (rigorous), about "
                   f"{result['estimate']:.2f} (estimate), at most {result['upper_pld']:.2f}")
        histogram(result, caption, out)
        print(f"{out}: histograms of the scores")
    return int(violated)


if __name__ == "__main__":
    command_line.run_cli(main)
