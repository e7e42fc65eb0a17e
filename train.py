"""DP-LDM from start to end: two public stages, one private stage, and a release folder that may be published.

Implements *Differentially Private Latent Diffusion Models* (Liu, Lyu, Vinaroz, Park; TMLR 2024), section 3 and
Algorithm 1; the only file that knows all the others:

    1  train_autoencoder   KL autoencoder on public pictures             -> public/vae.pt
    2  train_diffusion     latent diffusion model on public latents      -> public/ldm.pt
    3  tune_privately      attention modules and condition embedder on private latents, by DP-SGD -> release/

    python train.py                          the default preset `digits`: everything embedded, CPU, minutes
    python train.py --dry-run                privacy plan, parameter counts, time estimate; then stop
    python train.py --resume --out runs/x    go on where a stopped run was
    python train.py --epsilon 1 --init runs/digits --out runs/digits-eps1     only the private stage anew

"Step" always means a logical step: one Poisson batch, one ledger row, one noise addition, one optimiser and EMA update.
Nothing derived from private pictures is written outside internal/, except through the noisy gradient.
"""
import argparse
import hashlib
import math
import sys
import time
from dataclasses import asdict, is_dataclass, replace
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

import accountant
import data
import diffusion
import dp_sgd
import folder
import sample
import unet
import vae

# ------------------------------------------------------------------------------------------------------------ settings

DIGITS = dict(  # every key is a flag or a network; a preset overrides some of them, the command line overrides both
    public="strokes", public_classes="all", public_n=36_000, private="mnist10k", private_n=None,
    label_attribute="Male", size=None, flips=False,
    vae=vae.VAEConfig(ch=8, ch_mult=(1, 2, 4, 8)), vae_steps=900, vae_batch=64, vae_lr=3e-3, kl_weight=1e-6,
    unet=unet.UNetConfig(4, 4, 32, num_heads=4, context_dim=64, num_groups=8), schedule=diffusion.Schedule("cosine", "v"),
    ldm_steps=1600, ldm_batch=256, ldm_lr=2e-3, cond_drop=0.1,
    epsilon=10.0, delta=1e-5, sigma=None, accountant="pld", batch_size=4000, steps=30, clip_norm=0.1, clipping="flat",
    noise_multiplicity=1, tune="attention", from_block=0, lr=5e-3, ema=0.9, method="bookkeeping", micro_batch=None,
    sample_steps=30, sample_eta=0.0, guidance=1.0,
)
CELEBA = dict(  # the authors' settings for faces; large, for GPUs
    public="folder:imagenet/train", public_n=None, private="celeba", delta=1e-6, clip_norm=5e-4, ema=0.9999, cond_drop=0.0,
    schedule=diffusion.Schedule(beta_end=0.0195), vae_steps=200_000, vae_batch=16, vae_lr=1.6e-5, ldm_steps=500_000,
    sample_steps=200, sample_eta=1.0)
CLASSES = dict(use_spatial_transformer=True, context_dim=512)  # theirs are unconditional, with plain self-attention
PRESETS = {  # epochs are turned into steps: epochs * n / batch, with n = 50,000 (CIFAR-10) and 162,770 (CelebA)
    "digits": {},
    "mnist": dict(public="emnist", private="mnist", public_n=None),
    "mnist-strokes": dict(private="mnist", public_n=72_000),
    "mnist-letters": dict(private="mnist", public_n=72_000, public_classes="letters"),
    "fashion": dict(public="mnist", private="fashion", public_n=None),
    "mnist-paper": dict(  # the authors' networks and settings (theirs on grey pictures); large, for a GPU
        public="emnist", private="mnist", public_n=None,
        vae=replace(vae.PAPER["mnist"], in_channels=1, out_ch=1), vae_steps=60_000, vae_batch=100, vae_lr=4.5e-4,
        unet=unet.PAPER["mnist"], schedule=diffusion.PAPER, ldm_steps=50_000, ldm_batch=512, ldm_lr=2.5e-3, cond_drop=0.0,
        batch_size=2000, steps=6000, clip_norm=1e-3, lr=1e-3, ema=0.9999, sample_steps=200, sample_eta=1.0),
    "faces": dict(  # colour at 32 pixels on two CPU cores: 8x8x4 latents, a twelfth of a picture's numbers
        public="public32", public_n=None, private="faces", flips=True,
        vae=vae.VAEConfig(3, 3, 16, (1, 2, 4)), vae_steps=800, vae_batch=64, vae_lr=2e-3,
        unet=unet.UNetConfig(4, 4, 48, num_heads=4, context_dim=64, num_groups=16),
        ldm_steps=540, ldm_batch=256, ldm_lr=1.5e-3, batch_size=2500, steps=30),
    "cifar10": CELEBA | dict(
        private="cifar10", delta=1e-5, vae=vae.PAPER["cifar10"], unet=unet.PAPER["cifar10"], schedule=diffusion.PAPER,
        ldm_batch=200, ldm_lr=2e-4, cond_drop=0.1, batch_size=2000, steps=750, clip_norm=1e-6, lr=2e-3, from_block=8),
    "celeba32": CELEBA | dict(vae=vae.PAPER["cifar10"], unet=replace(unet.PAPER["celeba32"], **CLASSES),
                              ldm_batch=384, ldm_lr=1.9e-4, batch_size=2048, steps=5563, lr=1e-3),
    "celeba64": CELEBA | dict(vae=vae.PAPER["celeba64"], unet=replace(unet.PAPER["celeba64"], **CLASSES),
                              ldm_batch=75, ldm_lr=7.5e-5, batch_size=8192, steps=1391, lr=8.2e-4),
    "celeba256-text": CELEBA | dict(  # theirs: LAION, then 30,000 pictures of CelebA-HQ; here all of CelebA, 1/n < delta
        public="folder:laion", public_n=200_000, vae=vae.PAPER["celeba256-text"], unet=unet.PAPER["celeba256-text"],
        schedule=diffusion.Schedule(beta_start=0.00085, beta_end=0.012), vae_batch=4, ldm_batch=16, ldm_lr=5e-5,
        cond_drop=0.1, batch_size=256, steps=6358, clip_norm=1e-3, lr=2.6e-7),
    "smoke": dict(public_n=400, private_n=1000, vae=vae.VAEConfig(ch=8, ch_mult=(1, 1, 2, 2)), vae_steps=20, vae_batch=32,
                  unet=unet.UNetConfig(4, 4, 32, attention_resolutions=(2,), context_dim=8, num_groups=8), ldm_steps=20,
                  ldm_batch=64, batch_size=100, steps=4, micro_batch=32, sample_steps=4),
}
# These may differ when a run is resumed: they change where and how fast, not what is computed or guaranteed.
FREE = {"preset", "out", "init", "resume", "dry_run", "device", "precision", "data_root", "cache", "micro_batch",
        "method"}


def parse(argv):
    """Command line -> settings: the preset's values, overridden by the flags given. ValueError for impossible ones."""
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS,
                                epilog="Defaults in brackets are those of the preset `digits`.")

    def flags(title, *rows):
        group = p.add_argument_group(title)
        for key, kind, text, *choices in rows:
            group.add_argument("--" + key.replace("_", "-"), type=kind, choices=choices[0] if choices else None,
                               help=f"{text} [{DIGITS[key]}]")

    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="digits", help="data sets, networks and defaults [digits]")
    g.add_argument("--out", type=Path, help="run folder to write [runs/PRESET]")
    g.add_argument("--init", type=Path, default=None, help="run folder whose public stages are reused [train them]")
    g.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    g.add_argument("--dry-run", action="store_true", default=False, help="print plan, sizes and times, then stop")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or cuda:i [cuda where present]")
    g.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                   help="of the networks; norms, sums and noise are always float32 [auto: the faster, measured]")
    g.add_argument("--seed", type=int, default=0, help="of the PUBLIC stages only; the private stage has none [0]")
    g.add_argument("--insecure-seed", type=int, default=None,
                   help="debugging: seed the private stage too, which VOIDS the guarantee [none]")
    g.add_argument("--data-root", default=None, help="folder of the full data sets [$DPLDM_DATA or ~/.cache/dpldm]")
    g.add_argument("--cache", default=None, help="folder for decoded photographs, as private as they are [DATA_ROOT/cache]")
    flags("data", ("public", str, f"public set: {', '.join(data.LOADERS)} (folder:PATH, npz:PATH)"),
          ("public_classes", str, "classes of the set strokes", ("digits", "letters", "all")),
          ("public_n", int, "public pictures to use or draw"),
          ("private", str, f"private set, any of these but {', '.join(data.PUBLIC_ONLY)}"),
          ("private_n", int, "private pictures to use, a random choice"),
          ("label_attribute", str, "attribute of celeba and faces that gives the two classes"),
          ("size", int, "side of the pictures the networks see, in pixels; None: the preset's"),
          ("flips", lambda x: {"yes": True, "no": False}[x], "mirror pictures at random, yes or no"))
    flags("stage 1, autoencoder (public)", ("vae_steps", int, "steps"), ("vae_batch", int, "pictures per step"),
          ("vae_lr", float, "peak learning rate of AdamW"),
          ("kl_weight", float, "weight of the KL term against the sum of |error| over a picture's pixels"))
    flags("stage 2, latent diffusion (public)", ("ldm_steps", int, "steps"), ("ldm_batch", int, "latents per step"),
          ("ldm_lr", float, "peak learning rate of AdamW"),
          ("cond_drop", float, "probability of dropping the condition, for guidance; 0: no null class"))
    flags("stage 3, privacy", ("epsilon", float, "privacy budget; inf: no noise, NOT private"),
          ("delta", float, "probability of failure, below 1/n"),
          ("sigma", float, "noise multiplier in units of the clip norm, instead of calibrating it to --epsilon"),
          ("accountant", str, "calibrates sigma and gives the headline epsilon", ("rdp", "pld")),
          ("batch_size", int, "EXPECTED pictures per Poisson batch, B = q*n"),
          ("steps", int, "private steps; 0 releases the public model, private pictures unread"),
          ("clip_norm", float, "clip norm C of a per-example gradient"),
          ("clipping", str, "how gradients are clipped", dp_sgd.CLIPPING))
    flags("stage 3, tuning", ("noise_multiplicity", int, "K: (t, noise) draws averaged per example before clipping"),
          ("tune", str, f"what is tuned: {', '.join(unet.TUNE_CHOICES)}"),
          ("from_block", int, "leave out the first attention modules in forward order"),
          ("lr", float, "learning rate of Adam"), ("ema", float, "decay of the average of the tuned parameters, per step"),
          ("method", str, "how per-example gradients are found, same result", [*dp_sgd.METHODS]),
          ("micro_batch", int, "pictures at a time, memory and speed only; None: the fastest, by a short measurement"))
    flags("pictures at the end", ("sample_steps", int, "DDIM steps"), ("sample_eta", float, "DDIM eta, 0..1"),
          ("guidance", float, "guidance weight, 1: none"))
    defaults = {a.dest: a.default for a in p._actions if a.default is not argparse.SUPPRESS}
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if k not in defaults or v != defaults[k]}
    s = argparse.Namespace(**{**defaults, **DIGITS, **PRESETS[given.get("preset", "digits")], **given})
    s.out = given.get("out", Path("runs") / s.preset)
    s.vae = replace(s.vae, resolution=s.size or s.vae.resolution)
    if s.resume:
        adopt_settings(s, given)
    check(s)
    return s


def adopt_settings(s, given):
    """A resumed run goes on with its own settings; a flag that contradicts them is refused by name."""
    for key, value in folder.read_json(s.out / "internal" / "settings.json").items():
        if key in given and key not in FREE and plain(given[key]) != value:
            raise ValueError(f"--resume: this run began with {key} = {value}, not {given[key]}; leave the flag out, or start "
                             "a new run with another --out")
        if key not in FREE:
            old = getattr(s, key, None)
            setattr(s, key, type(old)(**value) if is_dataclass(old) else value)


def check(s):
    """Refuse impossible settings before any work is done: ValueError, one line each."""
    def demand(keys, good, text):
        for key in keys.split():
            if getattr(s, key) is not None and not good(getattr(s, key)):
                raise ValueError(f"--{key.replace('_', '-')} must {text}, got {getattr(s, key)}")

    demand("vae_steps vae_batch ldm_steps ldm_batch batch_size noise_multiplicity micro_batch sample_steps public_n private_n",
           lambda v: v >= 1, "be at least 1")
    demand("steps from_block", lambda v: v >= 0, "not be negative")
    demand("vae_lr ldm_lr lr clip_norm", lambda v: 0 < v < math.inf, "be a positive number")
    demand("sigma kl_weight", lambda v: 0 <= v < math.inf, "be 0 or a positive number")
    demand("epsilon", lambda v: v > 0, "be positive (inf: no privacy)")
    demand("delta", lambda v: 0 < v < 1, "lie between 0 and 1")
    demand("size", lambda v: v in (32, 64, 128, 256), "be 32, 64, 128 or 256")
    demand("cond_drop ema", lambda v: 0 <= v < 1, "lie in [0, 1)")
    demand("sample_eta", lambda v: 0 <= v <= 1, "lie in [0, 1]")
    for flag, name in (("--public", s.public), ("--private", s.private)):
        if data.kind_of(name) in data.PUBLIC_ONLY and flag == "--private":
            raise ValueError(f"--private {name}: this set is public only, nothing of it is held out")
    if s.guidance != 1 and s.cond_drop == 0:
        raise ValueError("--guidance other than 1 needs --cond-drop above 0")
    try:
        torch.empty(0, device=s.device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {s.device} is not usable here ({str(error).splitlines()[0][:80]})") from None


def plain(value):
    """A value as JSON gives it back: dataclasses as dicts, tuples as lists, numpy numbers as floats, infinity as text."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def count(parameters):
    return sum(p.numel() for p in parameters)


# ------------------------------------------------------------------------------------------------- the public stages


def learning_rate(step, steps, peak):
    """Public stages: linear warm-up over the first 5 %, then half a cosine down to zero."""
    return peak * min((step + 1) / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def update_ema(average, parameters, decay, step):
    """average <- d average + (1 - d) parameters, in place, once per logical step (pitfall 17).

    d = min(decay, (1 + step) / (10 + step)): early on the average follows quickly, so the start is soon forgotten.
    """
    torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(decay, (1 + step) / (10 + step)))


def fit(s, title, model, loss_fn, steps, peak, decay, state_path, stop):
    """The loop of stages 1 and 2: AdamW on public data. loss_fn(generator) -> (loss of one batch, figures for the bar).

    On return the model holds the EMA of its weights. Saves its state every minute and on Ctrl-C, goes on from it.
    """
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator(s.device).manual_seed(s.seed + 1)
    first = 0
    if state_path.exists():
        state = folder.load(state_path)
        model.load_state_dict(state["model"])
        torch._foreach_copy_(average, [a.to(s.device) for a in state["average"]])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        first = state["step"]
    saved = time.monotonic()
    for step in (bar := tqdm(range(first, steps), desc=title, unit="step", initial=first, total=steps)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with autocast(s):
            loss, figures = loss_fn(generator)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_ema(average, parameters, decay, step)
        if step % 10 == 0:
            bar.set_postfix({k: f"{float(v):.4g}" for k, v in figures.items()}, refresh=False)
        if stop.asked or time.monotonic() - saved > 60:
            folder.save({"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict(),
                         "generator": generator.get_state(), "step": step + 1}, state_path)
            saved = time.monotonic()
        if stop.asked:
            stop.leave(s.out)
    torch._foreach_copy_([p.data for p in parameters], average)
    state_path.unlink(missing_ok=True)


def train_autoencoder(s, images, stop):
    """Stage 1 (Rombach et al. 2022, section 3.1): public pictures (N, C, H, W) uint8 -> dict, written to public/vae.pt."""
    torch.manual_seed(s.seed)
    model = vae.AutoencoderKL(s.vae).to(s.device, memory_format=torch.channels_last)

    def loss_fn(generator):
        index = torch.randint(len(images), (s.vae_batch,), generator=generator, device=s.device)
        loss, error, kl = vae.loss(model, pictures(images[index.cpu()], s.device), s.kl_weight, generator)
        # Divided by the number of pixels only to bring the gradient to the scale of `fit`'s leash; Adam does not mind.
        return loss / images[0].numel(), {"error": error, "kl": kl}

    fit(s, "1/3 autoencoder", model, loss_fn, s.vae_steps, s.vae_lr, 0.99, s.out / "internal" / "vae_state.pt", stop)
    model.eval()
    area = s.vae.resolution ** 2
    shown = pictures(images[:min(4000, 8_000_000 // area)], s.device)
    scale = vae.latent_scale(model, shown, max(1, 262_144 // area))
    checkpoint = {"config": asdict(s.vae), "state": model.state_dict(), "scale": scale,
                  "trained_on": data.kind_of(s.public), "steps": s.vae_steps}
    folder.save(checkpoint, s.out / "public" / "vae.pt")
    with torch.no_grad():
        pairs = torch.stack([shown[:32], model.decode(model.encode(shown[:32]).mean)], 1).flatten(0, 1)
    data.save_grid(data.to_uint8(pairs), s.out / "public" / "autoencoder.png", 8)  # original, reconstruction, ...
    return checkpoint


def train_diffusion(s, latents, labels, num_classes, stop):
    """Stage 2 (Liu et al. 2024, section 3): public latents (N, F, C, h, w), labels (N,) -> dict, also public/ldm.pt."""
    torch.manual_seed(s.seed)
    shape = {"num_classes": num_classes, "dim": s.unet.context_dim, "null_class": s.cond_drop > 0}
    model = unet.LatentModel(unet.UNet(s.unet), unet.ClassEmbedder(**shape)).to(s.device, memory_format=torch.channels_last)
    null = null_condition(s, model, labels)

    def loss_fn(generator):
        index = torch.randint(len(latents), (s.ldm_batch,), generator=generator, device=s.device)
        batch = diffusion.draw(latents[index], labels[index], 1, generator, s.schedule, null, s.cond_drop)
        loss = diffusion.loss(model, *batch, schedule=s.schedule).mean()
        return loss, {"loss": loss.detach()}

    fit(s, "2/3 latent diffusion", model, loss_fn, s.ldm_steps, s.ldm_lr, 0.995, s.out / "internal" / "ldm_state.pt", stop)
    checkpoint = {"unet": asdict(s.unet), "embedder": shape, "schedule": asdict(s.schedule), "model": model.state_dict(),
                  "trained_on": data.kind_of(s.public), "steps": s.ldm_steps}
    folder.save(checkpoint, s.out / "public" / "ldm.pt")
    return checkpoint


def pictures(images, device):
    """uint8 pictures -> what the autoencoder eats: float in [-1, 1] on the device, channels last."""
    return data.to_float(images.to(device)).contiguous(memory_format=torch.channels_last)


def null_condition(s, model, labels):
    """The label that stands for a dropped condition, shape (1,), or None where conditions are never dropped."""
    return model.embedder.null(labels[:1]) if s.cond_drop > 0 else None


@torch.no_grad()
def encode(s, autoencoder, images, scale):
    """Pictures (N, C, H, W) uint8 -> scaled latents (N, F, embed_dim, h, w), F = 2 with the mirror images; once for all.

    The mean of the posterior is used: at a KL weight of 1e-6 its standard deviation is tiny.
    """
    autoencoder = autoencoder.to(s.device, memory_format=torch.channels_last)
    latents = []
    for part in tqdm(images.split(max(1, 512_000 // s.vae.resolution ** 2)), desc="    encoding", unit="batch", leave=False):
        x = pictures(part, s.device)
        views = [x, x.flip(-1)] if s.flips else [x]
        latents.append(torch.stack([autoencoder.encode(view).mean * scale for view in views], 1))
    return torch.cat(latents).contiguous()


def autocast(s):
    """bfloat16 for forward and backward where it is faster (decided once); needs no loss scaling."""
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.bf16)


def bf16_wins(device):
    """Time a convolution and a matrix product of the UNet's size in both precisions: some CPUs only emulate bfloat16."""
    def seconds(dtype):
        x, w, a = (torch.randn(shape, device=device, dtype=dtype) for shape in ((256, 128, 4, 4), (128, 128, 3, 3), (1024, 512)))
        times = []
        for _ in range(4):
            begin = time.perf_counter()
            (torch.nn.functional.conv2d(x, w, padding=1).sum() + (a @ a.T).sum()).item()
            times.append(time.perf_counter() - begin)
        return min(times)
    return seconds(torch.bfloat16) < 0.8 * seconds(torch.float32)


# ------------------------------------------------------------------------------------------------- the private stage


def privacy_plan(s, n):
    """What will be spent, known before the first private step. Raises ValueError for impossible plans."""
    if s.steps == 0:
        return {"n": n, "q": 0.0, "steps": 0, "sigma": 0.0, "epsilon": 0.0, "delta": s.delta}
    if s.batch_size > n:
        raise ValueError(f"--batch-size {s.batch_size} exceeds the {n} private pictures: q = B/n must be at most 1")
    if s.delta >= 1 / n:
        raise ValueError(f"--delta {s.delta:g} is not below 1/n = {1 / n:.2g}: publishing one random picture in the clear would "
                         "satisfy it; choose a smaller delta")
    q = s.batch_size / n
    sigma = s.sigma
    if sigma is None:
        sigma = 0.0 if math.isinf(s.epsilon) else accountant.noise_multiplier(s.epsilon, s.delta, q, s.steps, s.accountant)
    return {"n": n, "q": q, "steps": s.steps, "sigma": float(sigma), "delta": s.delta,
            "epsilon": float(accountant.epsilon(q, sigma, s.steps, s.delta, s.accountant))}


def print_plan(s, plan, model):
    trained, total = count(p for p in model.parameters() if p.requires_grad), count(model.parameters())
    idle = count(dict(model.named_parameters())[name] for name in unet.noise_only_names(model))
    print(f"privacy plan   epsilon {plan['epsilon']:.4g} at delta {plan['delta']:g} ({s.accountant}); unit: one picture, added "
          f"or removed\n               n {plan['n']}, Poisson sampling with q {plan['q']:.4g} (expected batch {s.batch_size}), "
          f"T {plan['steps']} steps, sigma {plan['sigma']:.4g}, C {s.clip_norm:g} {s.clipping}, K {s.noise_multiplicity}\n"
          f"tuned          {s.tune}: {trained:,} of {total:,} parameters ({trained / total:.1%}), of which {idle:,} see only "
          f"noise (query and key for a one-token condition)")
    if plan["steps"] and (plan["sigma"] == 0 or s.insecure_seed is not None):
        print("WARNING: no noise or a known noise seed: this run is NOT private", file=sys.stderr)


def tune_privately(s, model, latents, labels, plan, stop):
    """Stage 3, Algorithm 1 of the paper: DP-SGD on the parameters of `model` that require grad, in place -> ledger rows.

    latents (n, F, C, h, w) of the private pictures, labels (n,). On return the tuned parameters hold their EMA. The
    order within a step is what makes it crash-safe: draw, accumulate, ledger row on the disk, noise and update, save.
    """
    ledger, state_path = s.out / "internal" / "ledger.jsonl", s.out / "internal" / "state.pt"
    if s.insecure_seed is None:
        generator, sampler = dp_sgd.fresh_generator(s.device), dp_sgd.fresh_generator()
    else:
        generator = torch.Generator(s.device).manual_seed(s.insecure_seed)
        sampler = torch.Generator().manual_seed(s.insecure_seed + 1)
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, s.method, s.clipping, generator)
    optimizer = torch.optim.Adam(engine.parameters, s.lr)
    average = [p.detach().clone() for p in engine.parameters]
    loss_fn, null = partial(diffusion.loss, schedule=s.schedule), null_condition(s, model, labels)
    rows = folder.read_ledger(ledger, plan)
    done = resume(state_path, engine, average, optimizer, len(rows))  # updates contained in the weights
    # A run with --insecure-seed is to be repeatable, and the draws depend on how a batch is cut.
    micro_batch = s.micro_batch or (256 if s.insecure_seed is not None else fastest_micro_batch(s, model, latents.shape[2:]))
    # A step in the ledger is spent, also one whose result a crash has lost: the run ends when the budget is spent.
    bar = tqdm(range(len(rows), plan["steps"]), desc="3/3 private tuning", unit="step", initial=len(rows), total=plan["steps"])
    begin, examples, so_far = time.monotonic(), 0, 0.0
    for step in bar:
        # ---- one private step ----------------------------------------------------------------------------------------
        batch = dp_sgd.poisson_sample(plan["n"], plan["q"], sampler)  # may be empty: then noise only, and it counts
        for part in batch.to(s.device).split(micro_batch):
            drawn = diffusion.draw(latents[part], labels[part], s.noise_multiplicity, generator, s.schedule, null, s.cond_drop)
            with autocast(s):
                engine.accumulate(loss_fn, *drawn)
        rows.append({"step": step, "q": plan["q"], "sigma": plan["sigma"], "clip_norm": s.clip_norm, "batch_size": s.batch_size})
        folder.append_row(rows[-1], ledger)
        engine.step(optimizer)
        update_ema(average, engine.parameters, s.ema, done)
        # ---- end of the private step: from here on everything is post-processing -----------------------------------
        done, examples = done + 1, examples + len(batch)
        folder.save({"tuned": dict(zip(engine.names, engine.parameters, strict=True)), "average": average,
                     "optimizer": optimizer.state_dict(), "done": done}, state_path)
        if len(rows) % max(1, plan["steps"] // 100) == 0:  # tight accounting takes a tenth of a second
            so_far = float(accountant.epsilon(plan["q"], plan["sigma"], len(rows), s.delta, s.accountant))
        folder.append_row({"step": step, "epsilon": plain(so_far), **engine.last}, s.out / "internal" / "log.jsonl")
        last = engine.last
        bar.set_postfix(loss=f"{last['loss']:.4f}", epsilon=f"{so_far:.3f}", clipped=f"{last['clipped_fraction']:.0%}",
                        examples_per_s=f"{examples / (time.monotonic() - begin):.0f}")
        if stop.asked and len(rows) < plan["steps"]:
            stop.leave(s.out)
    torch._foreach_copy_([p.data for p in engine.parameters], average)
    return rows


def fastest_micro_batch(s, model, shape, sizes=(32, 64, 128, 256, 512, 1024)):
    """The micro-batch size with the most examples per second, tried on random latents of one example's `shape`.

    The size changes memory and speed only, never the result: dp_sgd sums clipped gradients over micro-batches.
    """
    engine = dp_sgd.DPSGD(model, s.clip_norm, 0.0, 1, s.method, s.clipping)  # a throw-away: nothing of it is released
    best, fastest = sizes[0], 0.0
    for size in sizes if s.method != "loop" else ():
        z, y = torch.randn(size, *shape, device=s.device), torch.zeros(size, dtype=torch.int64, device=s.device)
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


def resume(path, engine, average, optimizer, spent):
    """Load tuned parameters, EMA and optimiser, if there is a state -> updates they contain, at most `spent` ledger rows."""
    if not path.exists():
        return 0
    state = folder.load(path)
    if state["done"] > spent:
        raise ValueError(f"the ledger has {spent} rows, the checkpoint {state['done']} steps: rows are missing, so epsilon is "
                         "unknown; restore internal/ledger.jsonl, or start a new run")
    with torch.no_grad():
        torch._foreach_copy_(engine.parameters, [state["tuned"][name].to(engine.parameters[0]) for name in engine.names])
        torch._foreach_copy_(average, [a.to(average[0]) for a in state["average"]])
    optimizer.load_state_dict(state["optimizer"])
    return state["done"]


# -------------------------------------------------------------------------------------------------------- the release


def privacy_statement(s, plan, rows, trained):
    """Content of release/privacy.json: all that is needed to judge the guarantee (pitfalls 20, 24, 25)."""
    both = {m: accountant.epsilon_of_ledger(rows, s.delta, m) if rows else 0.0 for m in ("rdp", "pld")}
    epsilon = both[s.accountant]
    private = s.insecure_seed is None and math.isfinite(epsilon)
    spent = (plan["q"], plan["sigma"], len(rows))
    groups = accountant.group_epsilon(20, *spent, s.delta) if rows else 0.0
    false_positives = (0.001, 0.01, 0.1)  # what an optimal membership test can do at most, per picture
    attacker = dict(zip(map(str, false_positives), map(float, accountant.attacker_tpr(*spent, false_positives)), strict=True))
    return plain({
        "statement": f"({epsilon:.4g}, {s.delta:g})-differentially private with respect to one picture" if private else
                     "NOT PRIVATE: no noise, or a known noise seed",
        "private": private, "epsilon": epsilon, "delta": s.delta, "accountant": s.accountant,
        "epsilon_rdp": both["rdp"], "epsilon_pld": both["pld"],
        "epsilon_for_20_pictures_of_one_person": groups, "attacker_true_positive_rates": attacker,
        "adjacency": "add or remove one picture", "unit": "one picture", "sampling": "Poisson", "n": plan["n"], "q": plan["q"],
        "expected_batch_size": s.batch_size, "steps": len(rows), "sigma": plan["sigma"], "clip_norm": s.clip_norm,
        "clipping": s.clipping, "noise_multiplicity": s.noise_multiplicity, "tune": s.tune, "from_block": s.from_block,
        "trained_parameters": trained, "public_set": data.kind_of(s.public), "private_set": data.kind_of(s.private),
        "insecure_seed": s.insecure_seed is not None,
        "noise": "Mersenne twister with its whole state from the operating system (CPU) or Philox with 64 bits (CUDA)",
        "covers": "everything in release/ and whatever is made from it",
        "does_not_cover": [
            "the number n of private pictures, which is treated as public", "hyper-parameters, taken as chosen beforehand",
            "other runs on the same private pictures: their epsilons add up", "internal/ (losses, gradient norms)",
            "several pictures of one person: the guarantee is for one picture",
            "floating-point attacks on the Gaussian noise, and timing"],
    })


def write_release(s, vae_checkpoint, ldm_checkpoint, model, classes, privacy, public):
    """release/: model.pt, privacy.json, samples.png, comparison.png (real public | before | after tuning)."""
    unet.merge_lora(model)
    content = {"format": sample.FORMAT, "vae": {k: vae_checkpoint[k] for k in ("config", "state")},
               "scale": vae_checkpoint["scale"], **{k: ldm_checkpoint[k] for k in ("unet", "embedder", "schedule")},
               "classes": classes, "crop": s.crop,
               "data": {"public": data.kind_of(s.public), "public_classes": s.public_classes,
                        "private": data.kind_of(s.private), "label_attribute": s.label_attribute}, "privacy": privacy}
    folder.save({**content, "model": model.state_dict()}, s.out / "release" / "model.pt")
    folder.write_json(privacy, s.out / "release" / "privacy.json")
    lines = max(1, (6 if s.crop < 128 else 2) // len(classes))  # of ten pictures, for each class
    labels = torch.arange(len(classes)).repeat_interleave(10 * lines)
    draw = partial(sample.generate, labels=labels, steps=s.sample_steps, eta=s.sample_eta, guidance=s.guidance, seed=s.seed)
    released = sample.load_release(s.out, s.device)
    after = draw(released)
    public_model, _ = sample.build_model(ldm_checkpoint)
    before = draw(replace(released, model=public_model.eval().to(s.device)))
    data.save_grid(after, s.out / "release" / "samples.png", 10)
    rows, gap = [], torch.full((1, *after.shape[1:]), 96, dtype=torch.uint8)
    for i, label in enumerate(labels[::10].tolist()):
        alike = public.classes[label:label + 1] == classes[label:label + 1]  # else any public pictures stand on the left
        shown = public.images[public.labels == label] if alike else public.images
        real = data.crop(shown[4 * (i % lines if alike else i):][:4], s.crop)
        first = slice(10 * i, 10 * i + 6)
        rows += [real, gap.expand(5 - len(real), -1, -1, -1), before[first], gap, after[first]]
    data.save_grid(torch.cat(rows), s.out / "release" / "comparison.png", 18)


# ------------------------------------------------------------------------------------------------------------ the run


def find_set(s, name, split="train", **kwargs):
    """data.load as the settings ask; for --dry-run photographs are only listed, and a full set that is absent assumed."""
    try:
        return data.load(name, split, s.data_root, s.vae.resolution, channels=s.vae.in_channels, cache=s.cache,
                         decode=not s.dry_run, **kwargs)
    except data.DataError as error:
        n, classes = data.FULL.get(name, (0, 2))
        n = kwargs.get("n") or n
        if not s.dry_run or not n:
            raise
        print(f"ASSUMED        n {n:,} and {classes} classes: {error}")
        shape = (n, s.vae.in_channels, s.vae.resolution, s.vae.resolution)
        return data.ImageSet(name, torch.empty(shape, dtype=torch.uint8, device="meta"), torch.zeros(n, dtype=torch.int64),
                             list(map(str, range(classes))), side=s.vae.resolution)


def print_memory(s, model, public, private):
    """Print where the bytes go: weights with gradient, Adam and EMA, activations of one picture, pictures and latents.

    Runs the networks on the meta device, which computes shapes only: no memory, no time, however large they are. All that
    autograd keeps of one picture is counted; the private stage keeps about the same (bench/dp_step.py).
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
    second = kept(model, lambda: model(z, t, t))
    for name, p in model.named_parameters():
        p.requires_grad_(wanted[name])
    stored = (s.public_n or len(public)) + len(private)
    stored *= x.numel() + 4 * (1 + s.flips) * z.numel()
    # Weights, gradient, two moments, EMA; tuned ones: moments, EMA, clipped sum, a micro-batch's sum, noise.
    trained, total, big = count(p for p in model.parameters() if p.requires_grad), count(model.parameters()), 1e9
    print(f"memory, GB     autoencoder {20 * count(autoencoder.parameters()) / big:.2f} + {first / big:.3f} a picture, latent "
          f"diffusion {20 * total / big:.2f} + {second / big:.3f}, private tuning {(4 * total + 24 * trained) / big:.2f} + "
          f"{second / big:.3f}; pictures and latents {stored / big:.2f} in all")


def estimate(s, plan, num_classes):
    """Print the minutes of each stage, extrapolated from one step on random data."""
    with torch.device(s.device):
        autoencoder = vae.AutoencoderKL(s.vae).to(memory_format=torch.channels_last)
        model = unet.LatentModel(unet.UNet(s.unet), unet.ClassEmbedder(num_classes, s.unet.context_dim, s.cond_drop > 0))
    model = model.to(memory_format=torch.channels_last)
    unet.select_trainable(model, s.tune, s.from_block)
    x = torch.rand(s.vae_batch, s.vae.in_channels, s.vae.resolution, s.vae.resolution, device=s.device)
    z = torch.randn(s.ldm_batch, *autoencoder.latent_shape, device=s.device)
    y = torch.zeros(s.ldm_batch, dtype=torch.int64, device=s.device)
    loss_fn = partial(diffusion.loss, schedule=s.schedule)
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, s.method, s.clipping)
    size = s.micro_batch or fastest_micro_batch(s, model, z.shape[1:])
    few = slice(0, min(size, len(z)))

    def minutes(times, f):
        f()
        return 1.1 * times * seconds(s, f) / 60  # optimiser, data and checkpoints: about a tenth on top

    private = minutes(plan["steps"] * s.batch_size / len(z[few]),
                      lambda: engine.accumulate(loss_fn, *diffusion.draw(z[few], y[few], s.noise_multiplicity)))
    model.requires_grad_(True)
    first = minutes(s.vae_steps, lambda: vae.loss(autoencoder, x)[0].backward())
    second = minutes(s.ldm_steps, lambda: loss_fn(model, *diffusion.draw(z, y)).mean().backward())
    print(f"time           autoencoder {first:.1f}, latent diffusion {second:.1f}, private tuning {private:.1f} minutes "
          f"({'bf16' if s.bf16 else 'float32'} on {s.device}, {torch.get_num_threads()} threads)")


def main(argv=None):
    begin = time.monotonic()
    s = parse(sys.argv[1:] if argv is None else argv)
    if s.init and not s.resume:  # networks of an earlier run are taken as they are: their checkpoints say what they are
        first, second = (folder.load(s.init / "public" / name) for name in ("vae.pt", "ldm.pt"))
        s.vae, s.unet = vae.VAEConfig(**first["config"]), unet.UNetConfig(**second["unet"])
        s.schedule, s.cond_drop = diffusion.Schedule(**second["schedule"]), s.cond_drop * second["embedder"]["null_class"]
    s.bf16 = s.precision == "bf16" or (s.precision == "auto" and bf16_wins(s.device))
    if s.size and s.size != s.vae.resolution:
        raise ValueError(f"--size {s.size}: the networks of {s.init} are for {s.vae.resolution} pixels")
    # Both sets are read before the first long loop: nobody waits an hour to learn that a file is missing.
    # With --steps 0 no private picture is read at all.
    private = find_set(s, s.private, "train" if s.steps else "test", n=s.private_n if s.steps else None,
                       label_attribute=s.label_attribute)
    drawn = s.public == "strokes"
    public = find_set(s, s.public, public_classes=s.public_classes if drawn else None,
                      n=200 if drawn and s.dry_run else s.public_n, seed=s.seed)
    for title, found in (("--public", public), ("--private", private)):
        if found.images.shape[1] != s.vae.in_channels:
            raise ValueError(f"{title} {found.name} has {found.images.shape[1]} colour channels, the autoencoder of preset "
                             f"{s.preset} takes {s.vae.in_channels}: choose another preset or set")
    s.crop = private.side  # samples look like private pictures, whose padding is cut off again
    plan = privacy_plan(s, len(private) if s.steps else 0)
    num_classes = max(len(public.classes), len(private.classes))
    with torch.device("meta"):  # no memory; refuses a wrong --tune before any work
        model = unet.LatentModel(unet.UNet(s.unet), unet.ClassEmbedder(num_classes, s.unet.context_dim, s.cond_drop > 0))
        unet.select_trainable(model, s.tune, s.from_block)
    if s.dry_run:
        print_plan(s, plan, model)
        print_memory(s, model, public, private)
        with torch.device("meta"):
            size = count(model.parameters()) + count(vae.AutoencoderKL(s.vae).parameters())
        if size > 5e7 and s.device == "cpu":
            return print("time           not measured: networks of this size are for a GPU; run --dry-run there")
        return estimate(s, plan, num_classes)

    stop = folder.Stop()
    folder.prepare(s.out, s.resume)
    if not s.resume:
        folder.write_json({k: plain(v) for k, v in vars(s).items()}, s.out / "internal" / "settings.json")
        for name, checkpoint in (("vae.pt", first), ("ldm.pt", second)) if s.init else ():
            folder.save(checkpoint, s.out / "public" / name)
    have = {name: (s.out / "public" / name).exists() for name in ("vae.pt", "ldm.pt")}
    first = folder.load(s.out / "public" / "vae.pt") if have["vae.pt"] else train_autoencoder(s, public.images, stop)
    autoencoder, scale = sample.build_vae(first), first["scale"]
    second = folder.load(s.out / "public" / "ldm.pt") if have["ldm.pt"] else train_diffusion(
        s, encode(s, autoencoder, public.images, scale), public.labels.to(s.device), num_classes, stop)
    if second["embedder"]["num_classes"] < len(private.classes):
        raise ValueError(f"the public model has {second['embedder']['num_classes']} classes, fewer than {s.private}'s "
                         f"{len(private.classes)}")

    model = sample.build_model(second)[0].to(s.device, memory_format=torch.channels_last)
    names = unet.select_trainable(model, s.tune, s.from_block)
    print_plan(s, plan, model)
    trained, rows = count(p for p in model.parameters() if p.requires_grad), []
    if s.steps:
        facts = {**plan, "clip_norm": s.clip_norm, "clipping": s.clipping, "tuned": names,
                 "private_pictures": hashlib.sha256(private.images.numpy()).hexdigest()}
        folder.check_unchanged(plain(facts), s.out / "internal" / "plan.json")
        rows = tune_privately(s, model, encode(s, autoencoder, private.images, scale), private.labels.to(s.device), plan, stop)
    privacy = privacy_statement(s, plan, rows, trained)
    write_release(s, first, second, model, private.classes, privacy, public)
    print(f"{s.out}/release: {privacy['statement']}; {(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    folder.run_cli(main)
