"""What a run will spend, known before its first private step: epsilon, memory, minutes; and how fast this machine is.

`train.py --dry-run` prints all of it and stops. The privacy plan (q = B/n, T, sigma) is the one of Algorithm 1 of DP-LDM (Liu et
al. 2024), sigma calibrated by accountant.py so that the whole run costs the epsilon asked for.
"""
import math
import sys
import time
from collections import Counter
from functools import partial

import torch

import accountant
import diffusion
import dp_sgd
import folder
import sample
import text
import unet
import vae
from accountant import round_up
from extensions import pld
from folder import rank
from settings import GRADIENTS

GROUP = "epsilon_for_20_pictures_of_one_person"
ATTACKER = "attacker_true_positive_rates"
FALSE_POSITIVES = (0.001, 0.01, 0.1)
NEGLIGIBLE = 1e-3  # of delta: what the end of the noise may add to it
SAME = 1e-6  # relative: numbers of two machines that differ by less are the same number


def privacy_numbers(s, steps, delta):
    """What the statement says about steps, ledger rows or [(q, sigma, T)]: both accountants, a group of 20, the attacker.

    Never raises for a plan that `privacy_plan` lets through: what cannot be computed is replaced by what is never below
    it. The group's epsilon is infinite as well where 20 images together reach beyond the largest noise.
    """
    found = pld.statement_numbers(steps, delta, 20, FALSE_POSITIVES)
    kinds = Counter()
    for step in steps:
        q, sigma, count = (step["q"], step["sigma"], 1) if isinstance(step, dict) else step
        kinds[q, sigma] += count
    beyond = sum(dp_sgd.beyond_the_noise(noise_of(s), *kind, count, 20) for kind, count in kinds.items())
    return {**{f"epsilon_{name}": found[f"epsilon_{name}"] for name in accountant.ACCOUNTANTS},
            GROUP: math.inf if beyond > NEGLIGIBLE * delta else found["epsilon_for_group"],
            ATTACKER: {str(rate): float(found["attacker"][rate]) for rate in FALSE_POSITIVES}}


def noise_of(s):
    """The generator whose largest normal counts."""
    ordinary = s.fast_noise or s.insecure_seed is not None
    return dp_sgd.fresh_generator() if ordinary else dp_sgd.SecureGenerator()


def settled(planned, found):
    """The planned number where the one found later is the same up to rounding, else the larger; of dicts, by key."""
    if isinstance(found, dict):
        return {key: settled(planned[key], found[key]) for key in found}
    return planned if abs(found - planned) <= SAME * planned else max(found, planned)


def privacy_plan(s, n):
    """What will be spent and stated, known before the first private step: a dict of n, q, steps, sigma, epsilon, delta
    and the statement's numbers.

    A resumed run keeps the plan it began with. Raises ValueError for impossible plans.
    """
    if s.steps == 0:
        return {"n": n, "q": 0.0, "steps": 0, "sigma": 0.0, "epsilon": 0.0, "delta": s.delta,
                "numbers": privacy_numbers(s, [], s.delta)}
    if s.batch_size > n:
        raise ValueError(f"--batch-size {s.batch_size} exceeds the {n} private pictures: q = B/n must be at most 1")
    if s.delta >= 1 / n:
        raise ValueError(f"--delta {s.delta:g} is not below 1/n = {1 / n:.2g}: publishing one random picture in the clear would "
                         "satisfy it; choose a smaller delta")
    plan = {"n": n, "q": s.batch_size / n, "steps": s.steps, "delta": s.delta}
    if s.resume and (path := s.out / "internal" / "plan.json").exists():
        return stored_plan(s, plan, path)
    sigma = 0.0 if s.sigma is None else s.sigma
    if s.sigma is None and s.epsilon < math.inf:
        sigma = accountant.noise_multiplier(s.epsilon, s.delta, plan["q"], s.steps, s.accountant)
    return with_numbers(s, {**plan, "sigma": float(sigma)})


def with_numbers(s, plan):
    """The plan and what it costs: epsilon by the chosen accountant, and the other numbers of the statement."""
    q, sigma, steps, delta = (plan[key] for key in ("q", "sigma", "steps", "delta"))
    generator = noise_of(s)
    if sigma and dp_sgd.beyond_the_noise(generator, q, sigma, steps) > NEGLIGIBLE * delta:
        raise ValueError(f"sigma = {sigma:g} is so little noise that its largest value, {dp_sgd.largest_normal(generator):.1f} "
                         "standard deviations, would give examples away; choose a smaller --epsilon or a larger --sigma")
    epsilon = float(accountant.epsilon(q, sigma, steps, delta, s.accountant))
    return {**plan, "epsilon": epsilon, "numbers": privacy_numbers(s, [(q, sigma, steps)], delta)}


def stored_plan(s, asked, path):
    """The plan in plan.json, which rules when a run is resumed: another CPU or numpy would calibrate sigma to other
    last digits.

    asked: what must be equal. ValueError, one line, if anything differs, or if epsilon is not what plan.json says.
    """
    with folder.understanding(path, "plan"):
        stored = folder.read_json(path)
        plan = {**{key: stored[key] for key in asked}, "sigma": float(stored["sigma"])}
        stated = float(stored["epsilon"])
        if not (plan["sigma"] == 0 or 1e-3 <= plan["sigma"] <= 1e6):
            raise ValueError("sigma is out of range")
    for key, value in (asked if s.sigma is None else {**asked, "sigma": s.sigma}).items():
        if plan[key] != value:
            raise ValueError(f"cannot resume: '{key}' is not what this run began with; {folder.ADD_UP}")
    plan = with_numbers(s, plan)
    if plan["epsilon"] != stated and not -SAME * stated <= plan["epsilon"] - stated <= SAME * min(stated, 1.0):
        raise ValueError(f"cannot resume: plan.json states epsilon {round_up(stated)}, recomputed it is "
                         f"{round_up(plan['epsilon'])}; resume with the program and libraries that this run began "
                         f"with; {folder.ADD_UP}")
    if s.sigma is None and stated > s.epsilon * (1 + SAME):
        raise ValueError(f"cannot resume: 'epsilon' is not what this run began with; {folder.ADD_UP}")
    with folder.understanding(path, "plan"):  # the first programs did not write them
        numbers = stored.get("numbers", plan["numbers"])
        known = {key: {k: float(v) for k, v in value.items()} if key == ATTACKER else float(value)
                 for key, value in numbers.items()}
        return {**plan, "epsilon": stated, "numbers": settled(known, plan["numbers"])}


def print_plan(s, plan, model):
    trained, total = count(p for p in model.parameters() if p.requires_grad), count(model.parameters())
    print(f"privacy plan   epsilon {round_up(plan['epsilon'])} at delta {round_up(plan['delta'])} ({s.accountant}); "
          f"unit: one picture, added or removed\n               n {plan['n']}, Poisson sampling with q {plan['q']:.4g} "
          f"(expected batch {s.batch_size}), T {plan['steps']} steps, sigma {plan['sigma']:.4g}, C {s.clip_norm:g} "
          f"{s.clipping}, K {s.noise_multiplicity}\n"
          f"tuned          {s.tune}: {trained:,} of {total:,} parameters ({trained / total:.1%})")
    if plan["steps"] and (plan["sigma"] == 0 or s.insecure_seed is not None) and rank() == 0:
        print("WARNING: no noise or a known noise seed: this run is NOT private", file=sys.stderr)


def print_memory(s, model, public, private):
    """Print where the bytes go: weights with gradient, Adam and EMA, activations of one picture, pictures and latents.

    Runs the networks on the meta device, which computes shapes only: no memory, no time, however large they are. All that
    autograd keeps of one picture is counted; the private stage keeps about the same (bench/dp_step.py). Returns the GB of
    the larger of the two public steps, batch included.
    """
    with torch.device("meta"):
        autoencoder = vae.AutoencoderKL(s.vae)
        x = torch.empty(1, s.vae.in_channels, s.vae.resolution, s.vae.resolution)
        z, t = torch.empty(1, *autoencoder.latent_shape), torch.zeros(1, dtype=torch.int64)

    def kept(network, f):
        weights, seen = {p.untyped_storage()._cdata for p in network.parameters()}, {}
        with torch.autograd.graph.saved_tensors_hooks(lambda a: seen.update({a.untyped_storage()._cdata: a}) or a, lambda a: a):
            out = f()  # keeps the graph, and with it the storages, until they are counted
        return sum(a.untyped_storage().nbytes() for key, a in seen.items() if key not in weights) + 0 * len(out)

    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)
    first = kept(autoencoder, lambda: autoencoder.decode(autoencoder.encode(x).mean))
    second = kept(model, lambda: model(z, t, stand_in(model, 1, "meta")))
    for name, p in model.named_parameters():
        p.requires_grad_(wanted[name])
    stored = (s.public_n or len(public)) + len(private)
    stored *= x.numel() + 4 * (1 + s.flips) * z.numel()
    # Weights, gradient, two moments, EMA; tuned ones: moments, EMA, clipped sum, a micro-batch's sum, noise.
    trained, total, big = count(p for p in model.parameters() if p.requires_grad), count(model.parameters()), 1e9
    print(f"memory, GB     autoencoder {20 * count(autoencoder.parameters()) / big:.2f} + {first / big:.3f} a picture, latent "
          f"diffusion {20 * total / big:.2f} + {second / big:.3f}, private tuning {(4 * total + 24 * trained) / big:.2f} + "
          f"{second / big:.3f}; pictures and latents {stored / big:.2f} in all")
    return max(20 * count(autoencoder.parameters()) + s.vae_batch * first, 20 * total + s.ldm_batch * second) / big


def estimate(s, plan, embedder, reused=()):
    """Print the minutes of each stage, extrapolated from one step on random data; 0 for what is `reused`, "vae" and "ldm"."""
    with torch.device(s.device):
        autoencoder = vae.AutoencoderKL(s.vae)
        model = unet.LatentModel(unet.UNet(s.unet), sample.build_embedder(embedder))
    autoencoder, model = sample.laid_out(autoencoder, s.device), sample.laid_out(model, s.device)
    unet.select_trainable(model, s.tune, s.from_block)
    x = torch.rand(s.vae_batch, s.vae.in_channels, s.vae.resolution, s.vae.resolution, device=s.device)
    z = torch.randn(s.ldm_batch, *autoencoder.latent_shape, device=s.device)
    y = stand_in(model, s.ldm_batch, s.device)
    loss_fn = partial(diffusion.loss, schedule=s.schedule)
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, dp_sgd.CLIPPING[s.clipping], GRADIENTS[s.method])
    size = s.micro_batch or fastest_micro_batch(s, model, z.shape[1:])
    few = slice(0, min(size, len(z)))

    def minutes(times, f):
        f()
        return 1.1 * times * seconds(s, f) / 60  # optimiser, data and checkpoints: about a tenth on top

    private = minutes(plan["steps"] * s.batch_size / len(z[few]),
                      lambda: engine.accumulate(loss_fn, *diffusion.draw(z[few], select(y, few), s.noise_multiplicity)))
    model.requires_grad_(True)
    first = 0.0 if "vae" in reused else minutes(s.vae_steps, lambda: vae.loss(autoencoder, x)[0].backward())
    second = 0.0 if "ldm" in reused else minutes(s.ldm_steps, lambda: loss_fn(model, *diffusion.draw(z, y)).mean().backward())
    print(f"time           autoencoder {first:.1f}, latent diffusion {second:.1f}, private tuning {private:.1f} minutes "
          f"({'bf16' if s.bf16 else 'float32'} on {s.device}, {torch.get_num_threads()} threads)")


def fastest_micro_batch(s, model, shape, sizes=(32, 64, 128, 256, 512, 1024)):
    """The micro-batch size with the most examples per second, tried on random latents of one example's `shape`.

    The size changes memory and speed only, never the result: dp_sgd sums clipped gradients over micro-batches.
    """
    # a throw-away engine: nothing of it is released
    engine = dp_sgd.DPSGD(model, s.clip_norm, 0.0, 1, dp_sgd.CLIPPING[s.clipping], GRADIENTS[s.method])
    best, fastest = sizes[0], 0.0
    for size in sizes if s.method != "loop" else ():
        z, y = torch.randn(size, *shape, device=s.device), stand_in(model, size, s.device)
        try:
            rate = size / min(seconds(s, lambda z=z, y=y: engine.accumulate(
                partial(diffusion.loss, schedule=s.schedule), *diffusion.draw(z, y, s.noise_multiplicity))) for _ in range(2))
        except torch.OutOfMemoryError:
            break
        if rate > 1.03 * fastest:
            best, fastest = size, rate
    return best


def seconds(s, f):
    """Wall time of one call of f under the run's precision."""
    with autocast(s):
        if "cuda" in s.device:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        f()
        if "cuda" in s.device:
            torch.cuda.synchronize()
    return time.perf_counter() - begin


def autocast(s):
    """bfloat16 for forward and backward where it is faster (decided once); needs no loss scaling."""
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.bf16)


def stand_in(model, n, device):
    """n conditions of the model's kind for measuring times: None, label 0, or prompts of full length."""
    if isinstance(model.embedder, text.TextEncoder):
        return torch.full((n, model.embedder.length), text.BEGIN, device=device)
    return None if model.embedder is None else torch.zeros(n, dtype=torch.int64, device=device)


def select(conditions, index):
    """Rows of the conditions, None for none."""
    return None if conditions is None else conditions[index]


def count(parameters):
    return sum(p.numel() for p in parameters)
