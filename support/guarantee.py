"""The privacy plan before the first private step, and the privacy statement after the last one.

Both come from the same numbers. The plan (q = B/n, T, sigma) is that of Algorithm 1 of DP-LDM (Liu et al.
2024), sigma calibrated so that the whole run costs the epsilon asked for. Nothing here reads a private image,
a loss or a norm.
"""
import math
import sys

import accountant
import datasets
import dp_sgd
from extensions import pld
from support import files, randomness, run_folder
from support.files import plain
from support.hardware import count
from support.rounding import round_up
from support.team import rank

GROUP = "epsilon_for_20_pictures_of_one_person"
ATTACKER = "attacker_true_positive_rates"
FALSE_POSITIVES = (0.001, 0.01, 0.1)
NEGLIGIBLE = 1e-3  # the largest share of delta that the end of the noise may add to it
SAME = 1e-6  # relative: numbers of two machines that differ by less are the same number


def privacy_numbers(reach, steps, delta):
    """What the statement says about steps: both accountants, a group of 20 images, the attacker.

    reach: of the noise (`randomness.reach`). steps: ledger rows or [(q, sigma, T)]. Never raises for a plan
    that `privacy_plan` lets through: where a number cannot be computed, one that is never below it takes its
    place. The group's epsilon is infinite also if 20 images together can push an output further than the
    noise reaches.
    """
    found = pld.statement_numbers(steps, delta, 20, FALSE_POSITIVES)
    beyond = sum(randomness.beyond_the_noise(reach, *kind, count, 20)
                 for kind, count in accountant.count_steps(steps).items())
    return {**{f"epsilon_{name}": found[f"epsilon_{name}"] for name in accountant.ACCOUNTANTS},
            GROUP: math.inf if beyond > NEGLIGIBLE * delta else found["epsilon_for_group"],
            ATTACKER: {str(rate): float(found["attacker"][rate]) for rate in FALSE_POSITIVES}}


def settled(planned, found):
    """The planned number where the one found later is the same but for rounding, else the larger."""
    if isinstance(found, dict):
        return {key: settled(planned[key], found[key]) for key in found}
    return planned if abs(found - planned) <= SAME * planned else max(found, planned)


def privacy_plan(s, n, before=()):
    """What will be spent and stated, known before the first private step.

    before: votes on drawings (`start.votes`) from which the public images or networks came. Their steps are
    part of this run's epsilon.
    A dict of n, q, steps, sigma, epsilon, delta, before and numbers, those of the statement. A resumed run
    keeps the plan it began with. Raises ValueError for impossible plans.
    """
    before = plain(before)  # as it comes back from plan.json
    if largest := max((vote["n"] for vote in before), default=0):
        check_delta(s.delta, largest, "images that voted")
    if s.steps == 0:
        plan = {"n": n, "q": 0.0, "steps": 0, "sigma": 0.0, "delta": s.delta, "before": before}
        if before:
            return with_numbers(s, plan)
        return {**plan, "epsilon": 0.0, "numbers": privacy_numbers(randomness.reach(s), [], s.delta)}
    if s.batch_size > n:
        raise ValueError(f"--batch-size {s.batch_size} exceeds the {n} private images: q = B/n must be at "
                         "most 1")
    check_delta(s.delta, n, "private images")
    plan = {"n": n, "q": s.batch_size / n, "steps": s.steps, "delta": s.delta, "before": before}
    if s.resume and (path := s.out / "internal" / "plan.json").exists():
        return stored_plan(s, plan, path)
    sigma = 0.0 if s.sigma is None else s.sigma
    if s.sigma is None and s.epsilon < math.inf:
        spent = accountant.epsilon_of_ledger(vote_steps(before), s.delta, s.accountant)
        if spent >= s.epsilon:
            raise ValueError(f"--epsilon {s.epsilon:g}: the vote on the public drawings alone has cost "
                             f"{round_up(spent)} at this delta; choose a larger one, or other drawings")
        sigma = accountant.noise_multiplier(s.epsilon, s.delta, plan["q"], s.steps, s.accountant,
                                            vote_steps(before))
    return with_numbers(s, {**plan, "sigma": float(sigma)})


def check_delta(delta, n, what):
    """ValueError unless delta < 1 / n."""
    if delta >= 1 / n:
        raise ValueError(f"--delta {delta:g} is not below 1/n = {1 / n:.2g}, n being the number of {what}: "
                         "publishing one random image in the clear would satisfy it; choose a smaller delta")


def check_noise(limit, kinds, delta):
    """ValueError if steps {(q, sigma): T} have so little noise that its end is near. limit: its reach."""
    for (q, sigma), steps in kinds.items():
        if sigma and randomness.beyond_the_noise(limit, q, sigma, steps) > NEGLIGIBLE * delta:
            raise ValueError(f"sigma = {sigma:g} is so little noise that one example may move an output "
                             f"further than the noise is normal, {limit:g} standard deviations; choose a "
                             "smaller --epsilon or a larger --sigma")


def vote_steps(votes):
    """The steps of votes, as a statement or a plan lists them under "before": rows [q, sigma, T]."""
    return [row for vote in votes for row in vote["steps"]]


def with_numbers(s, plan):
    """The plan and its cost: epsilon by the chosen accountant, and the statement's other numbers."""
    q, sigma, steps, delta = (plan[key] for key in ("q", "sigma", "steps", "delta"))
    reach = randomness.reach(s)
    check_noise(reach, accountant.one_kind(q, sigma, steps), delta)
    voted = accountant.count_steps(vote_steps(plan["before"]))  # their noise is a SecureGenerator's
    check_noise(dp_sgd.SecureGenerator.reach, voted, delta)
    all_steps = accountant.count_steps([*vote_steps(plan["before"]), (q, sigma, steps)])
    epsilon = accountant.cost(all_steps, delta, s.accountant)
    if s.accountant not in ("rdp", "pld"):  # an accountant of one's own: at least not below what is certain
        least, _ = pld.bounds(all_steps, delta)
        if epsilon < least * (1 - SAME):
            raise ValueError(f"--accountant {s.accountant} gives epsilon {epsilon:.4g} for this plan, which "
                             f"is certainly at least {least:.4g}: it is wrong")
    return {**plan, "epsilon": epsilon, "numbers": privacy_numbers(reach, all_steps, delta)}


def stored_plan(s, asked, path):
    """The plan in plan.json, which rules when a run is resumed.

    Calibrated anew, by another CPU or numpy, sigma would have other last digits. asked: what must be equal.
    ValueError, one line, if anything differs, or if the epsilon in plan.json is not what it costs.
    """
    stored = files.read_json(path)
    with files.understanding(path, "plan"):
        stored = {"before": [], **stored}  # older versions knew none
        plan = {**{key: stored[key] for key in asked}, "sigma": float(stored["sigma"])}
        stated = float(stored["epsilon"])
        if not (plan["sigma"] == 0 or 1e-3 <= plan["sigma"] <= 1e6):
            raise ValueError("sigma is out of range")
    for key, value in (asked if s.sigma is None else {**asked, "sigma": s.sigma}).items():
        if plan[key] != value:
            raise ValueError(f"cannot resume: '{key}' is not what this run began with; {run_folder.ADD_UP}")
    plan = with_numbers(s, plan)
    found = plan["epsilon"]
    if found != stated and not -SAME * stated <= found - stated <= SAME * min(stated, 1.0):
        raise ValueError(f"cannot resume: plan.json states epsilon {stated:.9g}, recomputed it is "
                         f"{found:.9g}; resume with the program and libraries that this run began with; "
                         f"{run_folder.ADD_UP}")
    if s.sigma is None and stated > s.epsilon * (1 + SAME):
        raise ValueError(f"cannot resume: 'epsilon' is not what this run began with; {run_folder.ADD_UP}")
    with files.understanding(path, "plan"):
        known = {key: {k: float(v) for k, v in value.items()} if key == ATTACKER else float(value)
                 for key, value in stored["numbers"].items()}
        return {**plan, "epsilon": stated, "numbers": settled(known, plan["numbers"])}


def print_plan(s, plan, model):
    """Print the plan and the share of tuned parameters."""
    trained, total = count(p for p in model.parameters() if p.requires_grad), count(model.parameters())
    print(f"privacy plan   epsilon {round_up(plan['epsilon'])} at delta {round_up(plan['delta'])} "
          f"({s.accountant}); unit: one image, added or removed\n"
          f"               n {plan['n']}, Poisson sampling with q {plan['q']:.4g} "
          f"(expected batch {s.batch_size}), T {plan['steps']} steps, sigma {plan['sigma']:.4g}, "
          f"C {s.clip_norm:g} {s.clipping}, K {s.noise_multiplicity}\n"
          f"tuned          {s.tune}: {trained:,} of {total:,} parameters ({trained / total:.1%})")
    if plan["before"]:
        vote = accountant.epsilon_of_ledger(vote_steps(plan["before"]), s.delta, s.accountant)
        print(f"               a vote on the public drawings is part of it, alone epsilon {round_up(vote)}")
    if plan["steps"] and (plan["sigma"] == 0 or s.insecure_seed is not None) and rank() == 0:
        print("WARNING: no noise or a known noise seed: this run is NOT private", file=sys.stderr)
    elif plan["steps"] and s.fast_noise and rank() == 0:
        print("WARNING: --fast-noise: an attacker who computes can foretell the noise; for experiments only",
              file=sys.stderr)


# How the presets' hyper-parameters were chosen, where private results had a part in it (docs/privacy.md).
SEEN = ("partly by looking at results on private data: batch size, steps and learning rate of the private "
        "stage{} were compared by scores on held-out and on test digits of MNIST, and the public strokes "
        "were drawn while watching them; epsilon does not cover that choice")
LOOKED = {
    "mnist10k": SEEN.format(""),
    "mnist": SEEN.format(", the size of the networks and the length of the public stages"),
    "faces": ("partly by looking at results on private data: size of the latents and of the UNet and length "
              "of the public stages were changed after seeing how the autoencoder draws held-out faces, "
              "the frame of the drawn faces after looking at real ones, batch size, steps and learning rate "
              "of the private stage, and --tune shift, after scores on them; epsilon does not cover that "
              "choice"),
    "fashion": ("partly by looking at private data: photographs as a public set, and the shape and training "
                "of the autoencoder, were chosen after measuring how others draw garments, and the drawn "
                "garments were improved while watching how well they teach the classes of test images, and "
                "stage 2 was made longer, and batch size, steps, optimizer and learning rate of the private "
                "stage, and --tune attention+shift, were chosen after scores on them, and so were the "
                "candidates, the comparison and the generations of a vote on the drawings; epsilon does not "
                "cover that choice")}
# Of what epsilon does not cover: sentences that the statement of a vote has too.
NOT_COVERED = {
    "choice": "the choice of hyper-parameters: epsilon is computed as if they had been fixed beforehand",
    "subset": "the choice of these n images from a larger set: neighbours differ in a chosen image",
    "person": "several images of one person: the guarantee is for one image"}
BEFOREHAND = ("taken as chosen without results on these images; if other runs on them were compared to "
              "choose, their epsilons add up")


def privacy_statement(s, plan, rows, trained, stages=()):
    """Content of release/privacy.json: all that is needed to judge the guarantee (pitfalls 20, 24, 25).

    trained: number of tuned parameters; stages: the public checkpoints, which say what they were trained on.
    """
    trained_on = sorted({stage["trained_on"] for stage in stages})
    weights = sorted({name for stage in stages for name in stage.get("public_weights", ())})
    computed = sorted({str(row["computed"]) for row in rows if "computed" in row})  # older rows lack it
    # Known before the first private step. A step that the plan did not foresee would make them larger here.
    all_steps = [*vote_steps(plan["before"]), *rows]
    numbers = settled(plan["numbers"], privacy_numbers(randomness.reach(s), all_steps, s.delta))
    epsilon = numbers[f"epsilon_{s.accountant}"]
    known_noise = rows and (s.insecure_seed is not None or s.fast_noise)
    private = not known_noise and math.isfinite(epsilon)
    promise = f"({round_up(epsilon)}, {round_up(s.delta)})-differentially private with respect to one image"
    if not (rows or plan["before"]):
        promise = "no private image was read"
    elif rows and s.insecure_seed is not None or not math.isfinite(epsilon):
        promise = "NOT PRIVATE: no noise, or a known noise seed"
    elif known_noise:
        promise = f"NOT PRIVATE against an attacker who computes the noise (--fast-noise); else {promise}"
    return plain({
        "statement": promise,
        "private": private, "epsilon": epsilon, "delta": s.delta, "accountant": s.accountant,
        **{f"epsilon_{name}": numbers[f"epsilon_{name}"] for name in accountant.ACCOUNTANTS},
        GROUP: numbers[GROUP],  # of one person
        ATTACKER: numbers[ATTACKER],  # what an optimal membership test can do at most, per image
        "adjacency": "add or remove one image", "unit": "one image", "sampling": "Poisson",
        "n": plan["n"], "q": plan["q"],
        "expected_batch_size": s.batch_size, "steps": len(rows), "sigma": plan["sigma"],
        "before": plan["before"],  # votes on the public drawings; epsilon includes their steps [q, sigma, T]
        "clip_norm": s.clip_norm, "clipping": s.clipping, "noise_multiplicity": s.noise_multiplicity,
        "optimizer": s.private_optimizer, "learning_rate": s.lr,
        "tune": s.tune, "from_block": s.from_block, "condition": s.condition, "trained_parameters": trained,
        "public_set": " and ".join(trained_on), "private_set": datasets.kind_of(s.private),
        "enlarged": datasets.enlarged(s.private, s.vae.resolution),
        "hyper_parameters": LOOKED.get(datasets.kind_of(s.private), BEFOREHAND),
        "public_weights": weights,
        "insecure_seed": s.insecure_seed is not None, "fast_noise": s.fast_noise,
        "noise": "float64 from torch's generator (--fast-noise or --insecure-seed): Mersenne twister (CPU) "
                 "or Philox (CUDA), no cryptographic ones"
                 if s.fast_noise or s.insecure_seed is not None else
                 "float64 from the operating system's CSPRNG, four Box-Muller draws each "
                 "(dp_sgd.SecureGenerator)",
        "computed": computed,
        "covers": "everything in release/ and whatever is made from it",
        "does_not_cover": [
            "the number n of private images, their side in pixels, and the names of their classes and "
            "attributes, which are treated as public",
            NOT_COVERED["choice"],
            *([NOT_COVERED["subset"]]
              if s.private_n or any(vote["private_n"] for vote in plan["before"]) else []),
            "other runs on the same private images: their epsilons add up, and so do their deltas",
            "internal/ (losses, gradient norms), and what the terminal shows: messages that name private "
            "files, and --show-private",
            "that this release exists: its private files could all be read, and no private image was found "
            "among the public ones",
            NOT_COVERED["person"],
            "copies of the run folder: one that is resumed beside it spends the budget once more",
            "an attacker who learns the timesteps and the noise that the loss of the private images drew",
            "rounding of the sum of clipped gradients by more than a thousandth of the clip norm: on CPUs it "
            "was measured to be less, which is no proof",
            *(["rounding of the sum of clipped gradients on a GPU, which was not bounded"]
              if any(place.startswith("cuda") for place in computed) else []),
            "images that weights taken from elsewhere (public_weights) were trained on",
            *(["an attacker who computes the noise from the release: its generator is not a cryptographic "
               "one (--fast-noise), and epsilon is then infinite"] if s.fast_noise else []), "timing"],
    })
