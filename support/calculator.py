"""The calculator behind `python accountant.py`: its flags, what runs have spent, and its table.

    python accountant.py --n 60000 --batch 2000 --epochs 200 --delta 1e-5 --sigma 1.47     (or --epsilon 10)
    python accountant.py runs/a runs/b                                        (recompute, alone and composed)
"""

import json
import math
import sys
from collections import Counter
from pathlib import Path

import numpy as np

import accountant
from accountant import ACCOUNTANTS, check, cost, count_steps, one_kind, renyi
from extensions import pld
from support import command_line, files, guarantee, randomness, run_folder
from support.rounding import round_up

STATED = ("q", "sigma", "steps", "delta", "epsilon")  # numbers of a privacy.json

# ---- what a run has spent -------------------------------------------------------------------------


def read_run(path):
    """(steps {(q, sigma): T} that the run counts as, what its privacy.json states).

    Ledger, log, state and statement are all believed: of each kind of step the largest number counts, so that
    neither a truncated ledger nor a statement made before a later resume hides a step. A run that is not
    private (no noise, or noise that can be computed) counts as steps without noise. What it states: the
    numbers q, sigma, steps, delta, epsilon as far as they are there; "notes", remarks for the reader;
    "spent", the steps with the noise that they had. ValueError, one line, names the run.
    """
    try:
        return _read_run(Path(path))
    except KeyError as error:
        raise ValueError(f"{path}: privacy.json lacks {error}") from None
    except (TypeError, AttributeError, ValueError, OverflowError, RecursionError, OSError) as error:
        raise ValueError(f"{path}: {error}") from None


def _read_run(path):
    ledger, internal = path / "internal" / "ledger.jsonl", path / "internal"
    places = (path / "release" / "privacy.json", internal / "plan.json", internal / "settings.json")
    stated, planned, chosen = (json.loads(file.read_bytes()) if file.exists() else {} for file in places)
    privacy = {key: float(stated[key]) for key in STATED if key in stated}
    if not ledger.exists() and not stated:
        raise ValueError("neither internal/ledger.jsonl nor release/privacy.json is there")
    notes, counts = [], Counter()
    if ledger.exists():
        rows = files.ledger_rows(ledger.read_bytes().decode(errors="replace"), planned)
        counts = Counter(count_steps(rows))
    try:
        done = run_folder.steps_done(internal)  # of the plan; never more than the ledger's if all is well
    except ValueError:
        done = run_folder.logged_steps(internal)
        notes.append("internal/state.pt cannot be read")
    if done > sum(counts.values()):
        notes.append(f"internal/ tells of {done} steps, the ledger of {sum(counts.values())}: the larger "
                     "counts")
        if "q" in planned and "sigma" in planned:
            counts |= Counter(one_kind(float(planned["q"]), float(planned["sigma"]), done))
        else:
            counts[1.0, 0.0] += 1  # nobody knows their noise
    if stated:
        check(privacy["q"], privacy["sigma"], privacy["steps"], privacy.get("delta", 0.5))
        if not privacy.get("epsilon", 0.0) >= 0:
            raise ValueError(f"privacy.json states epsilon {privacy['epsilon']}")
        by_statement = Counter(one_kind(privacy["q"], privacy["sigma"], privacy["steps"]))
        if ledger.exists() and counts != by_statement:
            notes.append(_difference(counts, by_statement))
        counts |= by_statement  # the larger of each kind
    else:
        notes.append("a run without a statement yet")
    before = Counter()  # of votes on the public drawings: statement and plan are both believed
    for told in (stated, planned):
        before |= Counter(count_steps(guarantee.vote_steps(told.get("before", []))))
    if not (stated or planned) and "voted:" in str(chosen.get("public")):
        before[1.0, 0.0] += 1  # nobody knows what the vote has cost
    spent = steps = dict(sorted((counts + before).items()))
    known_seed = stated.get("insecure_seed", False) is not False or chosen.get("insecure_seed") is not None
    fast_noise = any(randomness.can_be_computed(x) for x in (stated, chosen) if x)
    void = known_seed or fast_noise
    if spent and void or stated.get("private", True) is not True:
        steps = count_steps([(q, 0.0, T) for (q, _), T in steps.items()]) or one_kind(1.0, 0.0, 1)
        notes.append("NOT PRIVATE: counts as without noise" + " (the noise can be computed)" * fast_noise)
    return steps, {**privacy, "accountant": str(stated.get("accountant")), "notes": notes, "spent": spent}


def _difference(counts, by_statement):
    """The remark for a reader where ledger and statement count differently."""
    if counts.keys() <= by_statement.keys() or by_statement.keys() <= counts.keys():
        spent, said = sum(counts.values()), sum(by_statement.values())
        return f"{spent} steps in the ledger and {said} in the statement: the larger counts"
    return "ledger and statement differ in q or sigma; the steps of both count"


# ---- the table --------------------------------------------------------------------------------------

HEADER = (f"{'':<20} {'sigma':>8} {'steps':>8} {'RDP eps':>9} {'order':>7} {'PLD eps':>9} {'gap':>8}"
          "   attacker's rates*")
FOOTNOTE = ("* best true-positive % of any membership attacker at false-positive rates 0.1, 1 and 10 % "
            "(pld, tight)")


def line(name, steps, delta, least=0.0, stated=None):
    """One row: epsilons are at least `least`; gap is PLD's upper minus lower bound.

    Epsilons and rates are rounded up; sigma is shown where all steps share it."""
    sigmas, total = {sigma for _, sigma in steps}, sum(steps.values())
    (eps, order), (lower, upper) = renyi(steps, delta), pld.bounds(steps, delta)
    gap = upper - lower if upper < math.inf else 0.0
    sigma = f"{sigmas.pop():.5g}" if len(sigmas) == 1 else "mixed" if sigmas else "-"
    eps, upper = (round_up(max(least, e), 6) for e in (eps, upper))
    rates = " ".join(f"{round_up(100 * rate):>7}" for rate in pld.rates(steps, np.array([0.001, 0.01, 0.1])))
    order = f"{order:.2f}" if order == order else "-"
    row = f"{name:<20} {sigma:>8} {total:>8} {eps:>9} {order:>7} {upper:>9} {gap:>8.1e} {rates}"
    return row if stated is None else f"{row}   (stated: {round_up(stated)})"


def compare(paths, delta):
    """Lines of the table: each run by itself, and all of them together."""
    runs = [(Path(path).name[-20:], *read_run(path)) for path in paths]
    if delta is None:
        delta = max((privacy["delta"] for *_, privacy in runs if "delta" in privacy), default=None)
    if delta is None:
        raise ValueError("no run states a delta: give --delta")
    check(delta=delta)
    lines, total = [], Counter()
    for name, steps, privacy in runs:
        total.update(steps)
        notes, least, stated = privacy["notes"], 0.0, privacy.get("epsilon")
        at = privacy.get("delta", delta)
        # What exceeds the loosest accountant's epsilon was not computed from these steps.
        loosest, own = renyi(steps, at)[0], privacy.get("accountant")
        if own in set(ACCOUNTANTS) - {"rdp", "pld"}:  # of the user's own
            loosest = max(loosest, cost(steps, at, own))
        if stated is not None and stated > (1 + 1e-6) * loosest + 1e-9:
            least = stated if at <= delta else math.inf  # (epsilon, delta) says nothing at a smaller delta
            total[1.0, 0.0] += 1
            notes.append("it states more than its q, sigma and steps cost: that counts, and as inf in a sum")
        lines.append("; ".join([line(name, steps, delta, least, stated), *notes]))
    if len(runs) > 1:
        lines.append(line("all runs together", dict(sorted(total.items())), delta))
    return [f"recomputed at delta {round_up(delta)}", HEADER, *lines, FOOTNOTE]


def max_steps(epsilon, delta, q, sigma, method="rdp"):
    """Largest number of steps whose epsilon does not exceed the target; inf when steps cost nothing (q = 0).

    Beyond 1e12 the search ends: so many fit. ValueError for a negative or infinite target.
    """
    check(q, sigma, 0, delta)
    if not 0 <= epsilon <= 1e308:
        raise ValueError(f"epsilon = {epsilon}: the target must be >= 0 and finite")
    if not one_kind(q, sigma, 1):
        return math.inf

    def fits(steps):
        return accountant.cost(one_kind(q, sigma, steps), delta, method) <= epsilon

    # Begin with what Renyi allows; an accountant that allows less begins anew.
    by_renyi = accountant.accountant(method) is accountant.by_rdp
    low = 0 if by_renyi else max_steps(epsilon, delta, q, sigma)
    low = low if fits(low) else 0
    step = max(1, low // 16)
    while low <= 1e12 and fits(low + step):
        low, step = low + step, 2 * step
    high = low + step if low <= 1e12 else low + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def accepts(method, delta):
    """Whether the accountant has an answer at this delta; "pld" has none below 1e-10."""
    try:
        return accountant.epsilon(1.0, 1.0, 1, delta, method) >= 0
    except ValueError:
        return False


def plan(q, steps, sigma, epsilon, delta, group):
    """Lines of the table for a plan: of steps, sigma and epsilon, each accountant finds the missing one."""
    check(q, 1.0 if sigma is None else sigma, 0 if steps is None else steps, delta)
    if [steps, sigma, epsilon].count(None) != 1:
        raise ValueError("give two of --steps (or --epochs), --sigma, --epsilon: the third is computed")
    methods = [method for method in accountant.ACCOUNTANTS if accepts(method, delta)]
    plans = {"given": (sigma, steps)} if epsilon is None else {}
    for method in methods if epsilon is not None else ():
        if steps is None:
            plans[f"by {method}"] = sigma, max_steps(epsilon, delta, q, sigma, method)
        else:  # rounded up, so that the line is about the sigma that it shows
            exact = accountant.noise_multiplier(epsilon, delta, q, steps, method)
            plans[f"by {method}"] = float(round_up(exact, 5)), steps
    lines = [f"q {q:.6g}   delta {round_up(delta)}   Poisson sampling, one example added or removed", HEADER]
    for name, (s, t) in plans.items():
        if t == math.inf:
            raise ValueError("q = 0 costs nothing: any number of steps fits")
        lines.append(line(name, one_kind(q, s, t), delta))
        bound = round_up(pld.bounds(one_kind(q, s, t), delta, group)[1])
        lines.append(f"{'':<20} {group} images of one person: epsilon <= {bound}")
    return [*lines, FOOTNOTE]


# ---- command line -----------------------------------------------------------------------------------


def parse(argv):
    """The arguments, with q, steps and delta filled in for a plan.  ValueError for what cannot be."""
    parser = command_line.Parser(
        description="epsilon of DP-SGD (Poisson sampling, one example added or removed)")
    add = parser.add_argument
    add("runs", nargs="*", help="run directories: recompute epsilon from the ledger, else from privacy.json")
    add("--n", type=int, help="number of private examples")
    rate, length = parser.add_mutually_exclusive_group(), parser.add_mutually_exclusive_group()
    rate.add_argument("--batch", type=float, help="expected batch size; q = batch / n")
    rate.add_argument("--q", type=float, help="sampling probability, instead of --n and --batch")
    length.add_argument("--steps", type=int, help="noisy steps")
    length.add_argument("--epochs", type=float,
                        help="passes over the data, instead of --steps; rounded up to whole steps")
    add("--delta", type=float, help="what may be added to the "
        "probability of an outcome, below 1 / n (1e-5; of runs: the largest stated)")
    add("--sigma", type=float, help="noise multiplier: noise std / clip norm")
    add("--epsilon", type=float, help="target: computes the smallest sigma or, with --sigma, the most steps")
    add("--group", type=int, help="images of one person, for the group line (default 20)")
    args = parser.parse_args(argv)
    if args.runs:
        if given := [key for key, value in vars(args).items() if value is not None
                     and key not in ("runs", "delta")]:
            raise ValueError(f"--{given[0]} is for a plan; with run directories give --delta only")
        return args
    args.group = 20 if args.group is None else args.group
    if args.q is None and (args.n is None or args.batch is None):
        raise ValueError("give run directories, or --n and --batch, or --q")
    if args.n is not None and not 1 <= args.n <= 1e18:
        raise ValueError("--n, the number of private examples, must be from 1 to 1e18")
    if not 1 <= args.group <= 1000:
        raise ValueError(f"--group must be from 1 to 1000 images, got {args.group}")
    if args.epochs is not None and not 0 <= args.epochs < math.inf:
        raise ValueError(f"--epochs must be >= 0 and finite, got {args.epochs}")
    args.q = args.batch / args.n if args.q is None else args.q
    check(args.q)
    if args.steps is None and args.epochs is not None and args.q > 0:
        args.steps = math.ceil(min(args.epochs / args.q, 1e18) - 1e-6)
    args.delta = 1e-5 if args.delta is None else args.delta
    return args


def main(argv=None):
    """Print the table of runs or of a plan.  ValueError, one line, for what cannot be."""
    args = parse(argv)
    if args.runs:
        lines = compare(args.runs, args.delta)
    else:
        lines = plan(args.q, args.steps, args.sigma, args.epsilon, args.delta, args.group)
        if args.n is not None and args.delta >= 1 / args.n:
            print(f"note: delta {round_up(args.delta)} is not below 1/n = {1 / args.n:.3g}: publishing "
                  "one random example in the clear would satisfy it", file=sys.stderr)
    print("\n".join(lines))
