"""Settings of a run: presets, the command line of train.py, and the refusal of what cannot be.

One flat namespace: a preset overrides the defaults of `digits`, a flag overrides both. The authors' settings (DP-LDM, Liu et al.
2024, appendix) are the presets mnist-paper, cifar10 and celeba*. `python train.py --help` shows all flags.
"""
import argparse
import math
from dataclasses import asdict, is_dataclass, replace
from pathlib import Path

import torch

import accountant
import data
import diffusion
import dp_sgd
import folder
import sample
import unet
import vae
from extensions.bookkeeping import bookkeeping

DIGITS = dict(  # every key is a flag or a network; a preset overrides some of them, the command line overrides both
    public="strokes", public_classes="all", public_n=36_000, private="mnist10k", private_n=None,
    classes=None, label_attribute="Male", size=None, flips=False, condition="class",
    text_length=32, text_width=64, text_layers=2,
    vae=vae.VAEConfig(ch=8, ch_mult=(1, 2, 4, 8)), vae_steps=900, vae_batch=64, vae_lr=3e-3, kl_weight=1e-6,
    perceptual_weight=0.0, adversarial_weight=0.0, adversarial_start=0,
    unet=unet.UNetConfig(4, 4, 32, num_heads=4, context_dim=64, num_groups=8), schedule=diffusion.Schedule("cosine", "v"),
    factor=None, latent_channels=None, width=None, depth=None, prediction=None,
    ldm_steps=1600, ldm_batch=256, ldm_lr=2e-3, cond_drop=0.1,
    epsilon=10.0, delta=1e-5, sigma=None, accountant="pld", batch_size=4000, steps=30, clip_norm=0.1, clipping="flat",
    noise_multiplicity=1, tune="attention", from_block=0, lr=5e-3, ema=0.9, method="bookkeeping", micro_batch=None,
    sample_steps=30, sample_eta=0.0, guidance=1.0,
)
LARGE = dict(  # for 60,000 private pictures: the noise allows more steps, and the public model is what limits
    unet=replace(DIGITS["unet"], model_channels=48), vae_steps=1500, ldm_steps=3500, ldm_lr=1.5e-3,
    batch_size=6000, steps=150, lr=3e-3, ema=0.95)
WIDE = LARGE | dict(  # the same, larger still: 98.2 instead of 97.8 % (docs/results.md)
    unet=replace(DIGITS["unet"], model_channels=64), vae_steps=2500, ldm_steps=5000, ldm_lr=1.2e-3, batch_size=10_000)
CELEBA = dict(  # the authors' settings for faces; large, for GPUs
    public="folder:imagenet/train", public_n=None, private="celeba", delta=1e-6, clip_norm=5e-4, ema=0.9999, cond_drop=0.0,
    schedule=diffusion.Schedule(beta_end=0.0195), vae_steps=200_000, vae_batch=16, vae_lr=1.6e-5,
    perceptual_weight=1.0, adversarial_weight=0.5, adversarial_start=50_000, ldm_steps=500_000,
    sample_steps=200, sample_eta=1.0)
PRESETS = {  # epochs are turned into steps: epochs * n / batch, with n = 50,000 (CIFAR-10) and 162,770 (CelebA)
    "digits": {},
    "mnist": dict(public="emnist", private="mnist", public_n=None, **WIDE),
    "mnist-strokes": dict(private="mnist", public_n=72_000, **WIDE),
    "mnist-letters": dict(private="mnist", public_n=72_000, public_classes="letters", **WIDE),
    "fashion": dict(public="mnist", private="fashion", public_n=None, latent_channels=16, **LARGE),  # more than strokes
    "fashion-8x8": dict(  # an autoencoder that carries over to other images (docs/results.md), slower: 64 tokens instead of 16
        public="mnist", private="fashion", public_n=None, **LARGE | dict(
            vae=vae.VAEConfig(ch=8, ch_mult=(1, 2, 4), num_groups=1), vae_steps=10_000, vae_batch=16, unet=DIGITS["unet"])),
    "mnist-paper": dict(  # the authors' networks and settings (theirs on grey pictures); large, for a GPU
        public="emnist", private="mnist", public_n=None,
        vae=replace(vae.PAPER["mnist"], in_channels=1, out_ch=1), vae_steps=60_000, vae_batch=100, vae_lr=4.5e-4,
        perceptual_weight=1.0, adversarial_weight=0.5, adversarial_start=50_000,
        unet=unet.PAPER["mnist"], schedule=diffusion.PAPER, ldm_steps=50_000, ldm_batch=512, ldm_lr=2.5e-3, cond_drop=0.0,
        batch_size=2000, steps=6000, clip_norm=1e-3, lr=1e-3, ema=0.9999, sample_steps=200, sample_eta=1.0),
    "faces": dict(  # colour at 32 pixels on two CPU cores: 4x4x16 latents, 256 numbers for 3,072
        public="public32", public_n=None, private="faces", flips=True,
        vae=vae.VAEConfig(3, 3, 16, (1, 2, 4, 8), z_channels=16, embed_dim=16), vae_steps=5000, vae_batch=64, vae_lr=2e-3,
        unet=unet.UNetConfig(16, 16, 64, num_heads=4, context_dim=64, num_groups=16),
        ldm_steps=3000, ldm_batch=256, ldm_lr=1.2e-3, batch_size=2500, steps=40),
    "cifar10": CELEBA | dict(
        private="cifar10", delta=1e-5, vae=vae.PAPER["cifar10"], unet=unet.PAPER["cifar10"], schedule=diffusion.PAPER,
        ldm_batch=200, ldm_lr=2e-4, cond_drop=0.1, batch_size=2000, steps=750, clip_norm=1e-6, lr=2e-3, from_block=8),
    "celeba32": CELEBA | dict(vae=vae.PAPER["cifar10"], unet=unet.PAPER["celeba32"], condition="none",
                              ldm_batch=384, ldm_lr=1.9e-4, batch_size=2048, steps=5563, lr=1e-3),
    "celeba64": CELEBA | dict(vae=vae.PAPER["celeba64"], unet=unet.PAPER["celeba64"], condition="none",
                              ldm_batch=75, ldm_lr=7.5e-5, batch_size=8192, steps=1391, lr=8.2e-4),
    "celeba256-text": CELEBA | dict(  # theirs: LAION, then 30,000 pictures of CelebA-HQ; here all of CelebA, 1/n < delta
        public="folder:laion", vae=vae.PAPER["celeba256-text"], unet=unet.PAPER["celeba256-text"],
        schedule=diffusion.Schedule(beta_start=0.00085, beta_end=0.012), vae_batch=4, ldm_batch=16, ldm_lr=5e-5,
        condition="text", text_length=56, text_width=512, text_layers=4,  # theirs: 32 layers of width 1280
        cond_drop=0.1, batch_size=256, steps=6358, clip_norm=1e-3, lr=2.6e-7),
    "smoke": dict(public_n=400, private_n=1000, vae=vae.VAEConfig(ch=8, ch_mult=(1, 1, 2, 2)), vae_steps=20, vae_batch=32,
                  unet=unet.UNetConfig(4, 4, 32, attention_resolutions=(2,), context_dim=8, num_groups=8), ldm_steps=20,
                  ldm_batch=64, batch_size=100, steps=4, micro_batch=32, sample_steps=4),
}
GRADIENTS = {"bookkeeping": bookkeeping, "loop": dp_sgd.loop, "vmap": dp_sgd.vmap}  # --method
# These may differ when a run is resumed: they change where and how fast, not what is computed or guaranteed.
FREE = {"given", "preset", "out", "init", "resume", "dry_run", "device", "precision", "data_root", "cache", "micro_batch",
        "method", "show_private"}
# Post-processing: a resumed run keeps them, and may change them.
SAMPLING = {"sample_steps", "sample_eta", "guidance"}
LARGEST_RANK = 1024  # of LoRA
VAE_FLAGS = {"vae_steps", "vae_batch", "vae_lr", "kl_weight", "perceptual_weight", "adversarial_weight", "adversarial_start"}


def yes_or_no(word):
    """argparse's type of a flag that is yes or no."""
    if word not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"must be yes or no, got {word!r}")
    return word == "yes"


def parse(argv):
    """Command line -> settings: the preset's values, overridden by the flags given. ValueError for impossible ones."""
    p = folder.Parser(description=__doc__.split("\n")[0], argument_default=argparse.SUPPRESS,
                                epilog="Defaults in brackets are those of the preset `digits`.")

    def flags(title, *rows):
        group = p.add_argument_group(title)
        for key, kind, meaning, *choices in rows:
            group.add_argument("--" + key.replace("_", "-"), type=kind, choices=choices[0] if choices else None,
                               help=f"{meaning} [{DIGITS[key]}]")

    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="digits", help="data sets, networks and defaults [digits]")
    g.add_argument("--out", type=Path, help="run folder to write [runs/PRESET]")
    g.add_argument("--init", type=Path, default=None, help="run folder whose public stages are reused; with another "
                   "--condition only its autoencoder [train them]")
    g.add_argument("--init-ldm", type=Path, default=None, help="UNet, autoencoder and class embedder from a checkpoint of the "
                   "original latent-diffusion code, instead of stages 1 and 2 [train them]")
    g.add_argument("--init-vae", type=Path, default=None, help="autoencoder from such a checkpoint [--init-ldm's, or train it]")
    g.add_argument("--init-scale", type=float, default=None, help="scale_factor of --init-ldm's configuration, if the "
                   "checkpoint has no such buffer [1, the original code's default]")
    g.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out")
    g.add_argument("--dry-run", action="store_true", default=False, help="print plan, sizes and times, then stop")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or cuda:i [cuda where present]")
    g.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                   help="of the networks; norms, sums and noise are always float32 [auto: the faster, measured]")
    g.add_argument("--seed", type=int, default=0, help="of the PUBLIC stages only; the private stage has none [0]")
    g.add_argument("--insecure-seed", type=int, default=None,
                   help="debugging: seed the private stage too, which VOIDS the guarantee [none]")
    g.add_argument("--fast-noise", action="store_true", default=False,
                   help="experiments only: noise and Poisson batches from torch's generator instead of the operating system's "
                   "CSPRNG; whoever sees enough of the release can compute the noise, and epsilon is then infinite [off]")
    g.add_argument("--show-private", action="store_true", default=False,
                   help="for a course: loss, clipped share and examples/s of the private batches in the bar; private "
                   "numbers on the terminal and in whatever keeps its output, which epsilon does NOT cover [off]")
    g.add_argument("--data-root", default=None, help="folder of the full data sets [$DPLDM_DATA or ~/.cache/dpldm]")
    g.add_argument("--cache", default=None, help="folder for decoded photographs, as private as they are [DATA_ROOT/cache]")
    flags("data", ("public", str, f"public set: {', '.join(data.LOADERS)} (folder:PATH, npz:PATH)"),
          ("public_classes", str, "classes of the set strokes", ("digits", "letters", "all")),
          ("public_n", int, "public pictures to use or draw"),
          ("private", str, f"private set, any of these but {', '.join(data.PUBLIC_ONLY)}"),
          ("private_n", int, "private pictures to use, a random choice"),
          ("classes", str, "classes of an own private set: names with commas, in their order, or a number N "
           "for 0 to N-1; None: its class folders or its array class_names"),
          ("label_attribute", str, "attribute of celeba and faces that gives the two classes"),
          ("size", int, "side of the pictures the networks see, in pixels; None: the preset's"),
          ("condition", str, "what a picture is made from: its class, a text (captions, or sentences about attributes or "
           "classes), nothing", ("class", "text", "none")),
          ("text_length", int, "most words of a prompt, and one"), ("text_width", int, "width of the text encoder"),
          ("text_layers", int, "transformer blocks of the text encoder"),
          ("flips", yes_or_no, "mirror pictures at random, yes or no"))
    flags("stage 1, autoencoder (public)", ("factor", int, "f, side of a picture over that of its latent; None: the preset's"),
          ("latent_channels", int, "channels of a latent; None: the preset's"),
          ("vae_steps", int, "steps"), ("vae_batch", int, "pictures per step"),
          ("vae_lr", float, "peak learning rate of AdamW"),
          ("kl_weight", float, "weight of the KL term against the sum of |error| over a picture's pixels"),
          ("perceptual_weight", float, "weight of the distance in VGG16's features, per pixel; 0: off"),
          ("adversarial_weight", float, "weight of the patch discriminator's term; 0: off"),
          ("adversarial_start", int, "steps before the discriminator begins"))
    flags("stage 2, latent diffusion (public)", ("width", int, "channels of the UNet's first level; None: the preset's"),
          ("depth", int, "ResBlocks per level of the UNet; None: the preset's"),
          ("prediction", str, "what the UNet predicts, noise or velocity; None: the preset's", ("eps", "v")),
          ("ldm_steps", int, "steps"), ("ldm_batch", int, "latents per step"),
          ("ldm_lr", float, "peak learning rate of AdamW"),
          ("cond_drop", float, "probability of dropping the condition, for guidance; 0: no null class"))
    flags("stage 3, privacy", ("epsilon", float, "privacy budget; inf: no noise, NOT private"),
          ("delta", float, "probability of failure, below 1/n"),
          ("sigma", float, "noise multiplier in units of the clip norm, instead of calibrating it to --epsilon"),
          ("accountant", str, "calibrates sigma and gives the headline epsilon", [*accountant.ACCOUNTANTS]),
          ("batch_size", int, "EXPECTED pictures per Poisson batch, B = q*n"),
          ("steps", int, "private steps; 0 releases the public model, private pictures unread"),
          ("clip_norm", float, "clip norm C of a per-example gradient"),
          ("clipping", str, "how gradients are clipped", [*dp_sgd.CLIPPING]))
    flags("stage 3, tuning", ("noise_multiplicity", int, "K: (t, noise) draws averaged per example before clipping"),
          ("tune", str, f"what is tuned: {', '.join(unet.TUNE_CHOICES)}"),
          ("from_block", int, "leave out the first attention modules in forward order"),
          ("lr", float, "learning rate of Adam"), ("ema", float, "decay of the average of the tuned parameters, per step"),
          ("method", str, "how per-example gradients are found, same result", [*GRADIENTS]),
          ("micro_batch", int, "pictures at a time, memory and speed only; None: the fastest, by a short measurement"))
    flags("pictures at the end", ("sample_steps", int, "DDIM steps"), ("sample_eta", float, "DDIM eta, 0..1"),
          ("guidance", float, "guidance weight, 1: none"))
    defaults = {a.dest: a.default for a in p._actions if a.default is not argparse.SUPPRESS}
    given = {k: v for k, v in vars(p.parse_args(argv)).items() if k not in defaults or v != defaults[k]}
    s = argparse.Namespace(**{**defaults, **DIGITS, **PRESETS[given.get("preset", "digits")], **given})
    s.out = given.get("out", Path("runs") / s.preset)
    levels = int(s.factor).bit_length() if s.factor else len(s.vae.ch_mult)  # every level but the last halves the picture
    s.vae = replace(s.vae, resolution=s.size or s.vae.resolution, z_channels=s.latent_channels or s.vae.z_channels,
                    embed_dim=s.latent_channels or s.vae.embed_dim,
                    ch_mult=(*s.vae.ch_mult, *s.vae.ch_mult[-1:] * levels)[:levels])
    s.unet = replace(s.unet, model_channels=s.width or s.unet.model_channels, num_res_blocks=s.depth or s.unet.num_res_blocks,
                     in_channels=s.latent_channels or s.unet.in_channels, out_channels=s.latent_channels or s.unet.out_channels)
    s.schedule = replace(s.schedule, prediction=s.prediction or s.schedule.prediction)
    s.given = sorted(given)
    if s.resume:
        adopt_settings(s, given)
    if s.condition == "none":  # cross-attention then asks the pixels themselves
        s.unet, s.cond_drop = replace(s.unet, context_dim=None), 0.0
    elif not (s.unet.use_spatial_transformer and s.unet.context_dim):  # the authors' faces have no condition: give it a way in
        s.unet = replace(s.unet, use_spatial_transformer=True, context_dim=512)
    try:
        check(s)
    except TypeError as error:  # of a resumed run: the flags have their types
        raise ValueError(f"{s.out / 'internal' / 'settings.json'} is damaged ({error})") from None
    return s


def adopt_settings(s, given):
    """A resumed run goes on with its own settings; a flag that contradicts them is refused by name."""
    path = s.out / "internal" / "settings.json"
    for key, value in folder.read_json(path).items():
        if key in FREE or key in SAMPLING and key in given:
            continue
        if key in given and plain(given[key]) != value:
            raise ValueError(f"--resume: this run began with {key} = {value}, not {given[key]}; leave the flag out "
                             f"({folder.ADD_UP})")
        with folder.understanding(path, "file"):
            setattr(s, key, restored({"seed": 0, **DIGITS}.get(key), value))


def restored(default, value):
    """A setting as JSON gave it back -> of its default's type (None: none or any). TypeError, ValueError if it cannot be."""
    if is_dataclass(default):
        return type(default)(**value)
    if isinstance(default, float):
        return float(value)  # also "inf"
    if value is not None and default is not None and type(value) is not type(default) or isinstance(value, (dict, list)):
        raise ValueError(f"{value!r:.40} where {default!r} might be")
    return value


def check(s):
    """Refuse impossible settings before any work is done: ValueError, one line each."""
    def demand(keys, good, text):
        for key in keys.split():
            if getattr(s, key) is not None and not good(getattr(s, key)):
                raise ValueError(f"--{key.replace('_', '-')} must {text}, got {getattr(s, key)}")

    for keys, low, high in (  # the upper ends are far beyond any use, and keep sizes within 64 bits and memory
            ("vae_steps ldm_steps vae_batch ldm_batch batch_size micro_batch public_n private_n", 1, 10 ** 9),
            ("steps", 0, 10 ** 6), ("from_block adversarial_start", 0, 10 ** 9), ("noise_multiplicity", 1, 1000),
            ("text_length width latent_channels", 1, 10 ** 4), ("text_layers depth", 1, 100),
            ("seed insecure_seed", 0, 2 ** 62)):
        demand(keys, lambda v, low=low, high=high: low <= v <= high, f"lie in {low}..{high}")
    demand("vae_lr ldm_lr lr", lambda v: 0 < v <= 1000, "be positive and at most 1000")
    demand("init_scale", lambda v: 1e-6 <= v <= 1e6, "lie in 1e-6..1e6")
    # The noise has deviation sigma C in float32, and Adam squares sigma C / B: between these bounds both stay finite
    # and above zero, for every sigma that is allowed and B up to a million.
    demand("clip_norm", lambda v: 1e-12 <= v <= 1e12, "lie in 1e-12..1e12")
    demand("sigma", lambda v: v == 0 or 1e-3 <= v <= 1e6, "be 0 (NOT private) or lie in 1e-3..1e6")
    demand("kl_weight perceptual_weight adversarial_weight", lambda v: 0 <= v <= 1e6, "lie in 0..1e6")
    demand("epsilon", lambda v: 0 < v <= 1e5 or v == math.inf, "be positive and at most 1e5, or inf (no privacy)")
    demand("delta", lambda v: 0 < v < 1, "lie between 0 and 1")
    demand("size", lambda v: v in (32, 64, 128, 256), "be 32, 64, 128 or 256")
    demand("factor", lambda v: v in (2, 4, 8, 16), "be 2, 4, 8 or 16")
    demand("cond_drop ema", lambda v: 0 <= v < 1, "lie in [0, 1)")
    demand("guidance", lambda v: abs(v) <= 1000, "be a number, at most 1000")
    demand("sample_eta", lambda v: 0 <= v <= 1, "lie in [0, 1]")
    for flag, name in (("--public", s.public), ("--private", s.private)):
        if data.kind_of(name) in data.PUBLIC_ONLY and flag == "--private":
            raise ValueError(f"--private {name}: this set is public only, nothing of it is held out")
    if s.classes is not None:
        data.class_list(s.classes)
    demand("text_width", lambda v: 0 < v <= 10 ** 4 and v % 8 == 0, "be a multiple of 8, at most 10,000")
    rank = s.tune.removeprefix("lora:")
    if rank != s.tune and rank.isdecimal() and (len(rank) > 9 or int(rank) > LARGEST_RANK):
        raise ValueError(f"--tune lora:RANK: the rank must be at most {LARGEST_RANK}, got {rank[:20]}")
    if s.init and (s.init_ldm or s.init_vae):
        raise ValueError("--init takes both public stages from a run; it cannot be combined with --init-ldm or --init-vae")
    if {"epsilon", "sigma"} <= {*s.given} and s.sigma is not None:
        raise ValueError("--sigma sets the noise instead of --epsilon: give one of the two")
    for flag, path in (("--init-ldm", s.init_ldm), ("--init-vae", s.init_vae)):
        if path and not s.resume and not path.is_file():
            raise ValueError(f"{flag}: there is no {path}")
    if s.fast_noise and s.insecure_seed is not None:
        raise ValueError("--fast-noise and --insecure-seed exclude each other")
    sample.check_schedule(s.schedule)
    check_sampling(s)
    sample.check_device(s.device)


def check_sampling(s):
    """Refuse settings of the pictures at the end that cannot be followed, while nothing is spent: ValueError."""
    if not 1 <= s.sample_steps <= s.schedule.T:
        raise ValueError(f"--sample-steps must lie in 1..{s.schedule.T}, the noise schedule's, got {s.sample_steps}")
    if s.guidance != 1 and s.condition == "none":
        raise ValueError("--guidance other than 1 needs a condition, --condition class or text")
    if s.guidance != 1 and s.cond_drop == 0:
        raise ValueError("--guidance other than 1 needs --cond-drop above 0, here or in the run of --init")


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
