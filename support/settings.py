"""Settings of a run: presets, the command line of train.py, and the refusal of what cannot be.

One flat namespace: a preset overrides the defaults of `digits`, a flag overrides both. The authors' settings
(DP-LDM, Liu et al. 2024, appendix) are the presets mnist-paper, cifar10 and celeba*. `python train.py --help`
shows the flags that a first run may want, `--help-all` all of them.
"""
import argparse
import math
from dataclasses import is_dataclass, replace
from pathlib import Path

import torch

import accountant
import datasets
import dp_sgd
import optim
import tuning
from extensions.bookkeeping import bookkeeping
from support import checkpoints, command_line, files, hardware, presets, randomness, run_folder
from support.files import plain

METHODS = {"bookkeeping": bookkeeping, "loop": dp_sgd.loop, "vmap": dp_sgd.vmap}  # --method
# Of this command alone. The guarantee does not depend on them, and the results only by rounding; --resume
# looks at `init` by itself.
FREE = {"given", "out", "init", "resume", "dry_run", "device", "precision", "show_private"}
LARGEST_RANK = 1024  # of LoRA
VAE_FLAGS = {"vae_steps", "vae_batch", "vae_lr", "kl_weight", "perceptual_weight", "adversarial_weight",
             "adversarial_start"}
LDM_FLAGS = {"ldm_steps", "ldm_batch", "ldm_lr", "public_optimizer", "text_length", "text_width",
             "text_layers"}
# What --help leaves out, and --help-all shows.
RARE = {"precision", "insecure_seed", "fast_noise", "show_private", "cache", "public_classes", "flips",
        "public_optimizer", "private_optimizer", "text_length", "text_width", "text_layers", "factor",
        "latent_channels", "width", "depth", "prediction", "vae_batch", "vae_lr", "kl_weight",
        "perceptual_weight", "adversarial_weight", "adversarial_start", "ldm_batch", "ldm_lr", "cond_drop",
        "sigma", "noise_multiplicity", "from_block", "ema", "method", "micro_batch", "sample_steps",
        "sample_eta"}


def yes_or_no(word):
    """argparse's type of a flag that is yes or no."""
    if word not in ("yes", "no"):
        raise argparse.ArgumentTypeError(f"must be yes or no, got {word!r}")
    return word == "yes"


def flag(key):
    """A setting's flag: "vae_lr" -> "--vae-lr"."""
    return "--" + key.replace("_", "-")


def parse(argv):
    """Command line -> settings: the preset's values, overridden by flags. ValueError for impossible ones."""
    p = command_line.Parser(description="Train DP-LDM: two public stages, one private stage.",
                            argument_default=argparse.SUPPRESS,
                            epilog="Defaults in brackets are those of the preset `digits`. --help-all shows "
                                   "the flags that are left out here.")
    p.add_argument("--help-all", action="help", help="show all flags and exit")

    def flags(title, *rows):
        group = p.add_argument_group(title)
        for key, kind, meaning, *choices in rows:
            group.add_argument(flag(key), type=kind,
                               choices=choices[0] if choices else None,
                               help=f"{meaning} [{presets.DIGITS[key]}]")

    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=presets.PRESETS,
                   help="data sets, networks and defaults [digits]")
    g.add_argument("--out", type=Path, help="run folder to write [runs/PRESET]")
    g.add_argument("--init", type=Path, default=None,
                   help="run folder whose public networks are reused; where it has no diffusion model, or "
                        "one with another --condition, only its autoencoder [train them]")
    g.add_argument("--resume", nargs="?", const="yes", choices=("yes", "auto"), default=False,
                   help="go on with the run in --out; auto: begin it if it never began (for a scheduler that "
                        "restarts one command) [off]")
    g.add_argument("--dry-run", action="store_true", default=False,
                   help="print plan, sizes and times, then stop")
    g.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                   help="cpu, cuda or cuda:i [cuda where present]")
    g.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                   help="of the networks; norms, sums and noise never in bf16 [auto: the faster, "
                        "measured]")
    g.add_argument("--seed", type=int, default=0,
                   help="of the PUBLIC stages only; the private stage has none [0]")
    g.add_argument("--insecure-seed", type=int, default=None,
                   help="debugging: seed the private stage too, which VOIDS the guarantee [none]")
    g.add_argument("--fast-noise", action="store_true", default=False,
                   help="experiments only: noise and Poisson batches from torch's generator instead of the "
                        "operating system's CSPRNG; whoever sees enough of the release can compute the "
                        "noise, and epsilon is then infinite [off]")
    g.add_argument("--watch", type=int, default=None, metavar="N",
                   help="every N private steps, images of one noise into internal/progress.png; 0: never "
                   "[ten times in a terminal, else never]")
    g.add_argument("--show-private", action="store_true", default=False,
                   help="for a course: loss, clipped share and examples/s of the private batches in the bar; "
                        "private numbers on the terminal and in whatever keeps its output, NOT covered by "
                        "epsilon [off]")
    g.add_argument("--data-root", default=None,
                   help="folder of the full data sets [$DPLDM_DATA or ~/.cache/dpldm]")
    g.add_argument("--cache", default=None,
                   help="folder for decoded photographs, as private as they are [DATA_ROOT/cache]")
    flags("data",
          ("public", str, f"public set: {', '.join(datasets.names('public'))} (folder:PATH, npz:PATH)"),
          ("public_classes", str, "classes of the set strokes", ("digits", "letters", "all")),
          ("public_n", int, "public images to use or draw"),
          ("private", str, f"private set: {', '.join(datasets.names('private'))}"),
          ("private_n", int, "private images to use, a random choice"),
          ("classes", str, "classes of an own private set: names with commas, in their order, or a number N "
           "for 0 to N-1; None: its class folders or its array class_names"),
          ("label_attribute", str, "attribute of celeba and faces that gives the two classes"),
          ("size", int, "side of the images the networks see, in pixels; None: the preset's"),
          ("condition", str,
           "what an image is made from: its class, a text (captions, or sentences about attributes or "
           "classes), nothing", ("class", "text", "none")),
          ("text_length", int, "tokens of a prompt: its words and one"),
          ("text_width", int, "width of the text encoder"),
          ("text_layers", int, "transformer blocks of the text encoder"),
          ("flips", yes_or_no, "mirror images at random, yes or no"),
          ("public_optimizer", str, "optimizer of stages 1 and 2; learning rates and steps stay as they are",
           [*optim.PUBLIC]))
    flags("stage 1, autoencoder (public)",
          ("factor", int, "f, side of an image over that of its latent; None: the preset's"),
          ("latent_channels", int, "channels of a latent; None: the preset's"),
          ("vae_steps", int, "steps"), ("vae_batch", int, "images per step"),
          ("vae_lr", float, "peak learning rate"),
          ("kl_weight", float, "weight of the KL term against the sum of |error| over an image's pixels"),
          ("perceptual_weight", float, "weight of the distance in VGG16's features, per pixel; 0: off"),
          ("adversarial_weight", float, "weight of the patch discriminator's term; 0: off"),
          ("adversarial_start", int, "steps before the discriminator begins"))
    flags("stage 2, latent diffusion (public)",
          ("width", int, "channels of the UNet's first level; None: the preset's"),
          ("depth", int, "ResBlocks per level of the UNet; None: the preset's"),
          ("prediction", str, "what the UNet predicts, noise or velocity; None: the preset's", ("eps", "v")),
          ("ldm_steps", int, "steps"), ("ldm_batch", int, "latents per step"),
          ("ldm_lr", float, "peak learning rate"),
          ("cond_drop", float, "probability of dropping the condition, for guidance; 0: no null class"))
    flags("stage 3, privacy", ("epsilon", float, "privacy budget; inf: no noise, NOT private"),
          ("delta", float, "what may be added to the probability of an outcome, below 1/n"),
          ("sigma", float,
           "noise multiplier in units of the clip norm, instead of calibrating it to --epsilon"),
          ("accountant", str, "calibrates sigma and gives the headline epsilon", [*accountant.ACCOUNTANTS]),
          ("batch_size", int, "EXPECTED images per Poisson batch, B = q*n"),
          ("steps", int, "private steps; 0 releases the public model, private images unread"),
          ("clip_norm", float, "clip norm C of a per-example gradient"),
          ("clipping", str, "how gradients are clipped", [*dp_sgd.CLIPPING]))
    flags("stage 3, tuning", ("noise_multiplicity", int,
                              "K: (t, noise) draws averaged per example before clipping"),
          ("tune", str, f"what is tuned: {', '.join(tuning.TUNE)}, lora:RANK; with +shift behind it also "
           "a shift of the latents for each condition, or shift: this alone"),
          ("from_block", int, "leave out the first attention modules in forward order"),
          ("private_optimizer", str, "optimizer of stage 3; Muon wants another --lr: its steps are longer",
           [*optim.PRIVATE]),
          ("lr", float, "learning rate"),
          ("ema", float, "largest decay of the average of the tuned parameters; that of step t is at most "
           "(1 + t) / (10 + t)"),
          ("method", str, "how per-example gradients are found, same result", [*METHODS]),
          ("micro_batch", int, "images at a time: memory and speed only; a GPU without it: up to 8,192"))
    flags("images at the end", ("sample_steps", int, "DDIM steps"), ("sample_eta", float, "DDIM eta, 0..1"),
          ("guidance", float, "guidance weight, 1: none"))
    for action in p._actions:
        if action.dest in RARE and "--help-all" not in argv:
            action.help = argparse.SUPPRESS
    defaults = {a.dest: a.default for a in p._actions if a.default is not argparse.SUPPRESS}
    for action in p._actions:  # given: what was typed, a default's value too
        action.default = argparse.SUPPRESS
    given = vars(p.parse_args(argv))
    for key in {"public", "private"} & given.keys():  # with the whole path: a resumed run may begin elsewhere
        given[key] = datasets.resolved(given[key], given.get("data_root"))
    for key in {"cache", "data_root"} & given.keys():
        given[key] = str(files.expanded(given[key]).absolute()) if given[key] else None
    preset = presets.DIGITS | presets.PRESETS[given.get("preset", "digits")]
    if "public" in given and not datasets.unlimited(given["public"]):
        preset["public_n"] = None  # a preset's number is how many to draw; of other sets all are used
    s = argparse.Namespace(**{**defaults, "preset": "digits", **preset, **given})
    if "micro_batch" not in given:
        s.micro_batch = usual_micro_batch(s)
    s.out = given.get("out", Path("runs") / s.preset)
    # f = 2^(levels - 1): each level but the last halves the side.
    levels = int(s.factor).bit_length() if s.factor else len(s.vae.ch_mult)
    s.vae = replace(s.vae, resolution=s.size or s.vae.resolution,
                    z_channels=s.latent_channels or s.vae.z_channels,
                    embed_dim=s.latent_channels or s.vae.embed_dim,
                    ch_mult=(*s.vae.ch_mult, *s.vae.ch_mult[-1:] * levels)[:levels])
    s.unet = replace(s.unet, model_channels=s.width or s.unet.model_channels,
                     num_res_blocks=s.depth or s.unet.num_res_blocks,
                     in_channels=s.latent_channels or s.unet.in_channels,
                     out_channels=s.latent_channels or s.unet.out_channels)
    s.schedule = replace(s.schedule, prediction=s.prediction or s.schedule.prediction)
    s.given = sorted(given)
    if s.resume == "auto" and not (s.out / "internal" / "settings.json").exists():
        s.resume = False
    if s.resume:
        adopt_settings(s, given)
    if s.condition == "none":  # without a context, cross-attention becomes self-attention
        s.unet, s.cond_drop = replace(s.unet, context_dim=None), 0.0
    elif not (s.unet.use_spatial_transformer and s.unet.context_dim):
        # The authors' faces have no condition: give it a way in.
        s.unet = replace(s.unet, use_spatial_transformer=True, context_dim=512)
    try:
        check(s)
    except (TypeError, AttributeError) as error:  # of a resumed run: the flags have their types
        raise ValueError(f"{s.out / 'internal' / 'settings.json'} is damaged ({error})") from None
    return s


def adopt_settings(s, given):
    """A resumed run goes on with its own settings; a flag that contradicts them is refused by name."""
    path = s.out / "internal" / "settings.json"
    stored = files.read_json(path)
    with files.understanding(path, "file"):
        stored.setdefault("public_optimizer", "adamw")  # older versions knew no others
        stored.setdefault("private_optimizer", "adam")
        stored.setdefault("fast_noise", randomness.can_be_computed(stored))
        for key in ("data_root", "cache"):  # older versions stored it as it was typed: nobody knows where
            stored[key] = stored.get(key) if Path(stored.get(key) or "").is_absolute() else None
        for key in {"public", "private"} & stored.keys():  # older versions stored a mix as it was typed
            stored[key] = datasets.resolved(stored[key], given.get("data_root", stored.get("data_root")))
    no_null_class = stored.get("cond_drop") == 0.0 and (stored.get("condition") == "none"
                                                        or stored.get("init") is not None)
    if s.resume == "yes" and "init" in given and plain(given["init"]) != stored.get("init"):
        raise ValueError(f"--resume: this run has its own public networks (begun with --init "
                         f"{stored.get('init')}); leave --init out")
    for key, value in stored.items():
        if key in FREE or key in run_folder.KEPT and (key in given or value is None):
            continue
        overruled = key == "cond_drop" and no_null_class  # then it is 0 whatever the flag was
        if key in given and plain(given[key]) != value and not overruled:
            raise ValueError(f"--resume: this run began with {key} = {value}, not {given[key]}; leave the "
                             f"flag out ({run_folder.ADD_UP})")
        with files.understanding(path, "file"):
            default = {"seed": 0, "data_root": "", "cache": "", **presets.DIGITS}.get(key)
            setattr(s, key, restored(default, value))
    if unknown := sorted(given.keys() - stored.keys() - FREE - {*run_folder.KEPT}):
        raise ValueError(f"--resume: the version that began this run had no {flag(unknown[0])}; leave it out")
    with files.understanding(path, "file"):
        if "micro_batch" not in [*given, *stored.get("given", ())]:
            s.micro_batch = usual_micro_batch(s)


def usual_micro_batch(s):
    """Images at a time where --micro-batch is not given; None: what fits (hardware.micro_batch).

    The presets' numbers are for a CPU's cache; a GPU takes many at a time. But with --insecure-seed the
    number must not depend on the memory that is free: it decides which image gets which draws.
    """
    if "cuda" in s.device and s.insecure_seed is None:
        return None
    return (presets.DIGITS | presets.PRESETS[s.preset])["micro_batch"]


def restored(default, value):
    """A setting as JSON gave it back -> its default's type. default None: None or any type.

    TypeError or ValueError if it does not convert.
    """
    if is_dataclass(default):
        return type(default)(**value)
    if isinstance(default, float):
        return float(value)  # also "inf"
    known = value is not None and default is not None
    if known and type(value) is not type(default) or isinstance(value, (dict, list)):
        raise ValueError(f"{value!r:.40} where {default!r} might be")
    return value


def check(s):
    """Refuse impossible settings before any work is done: ValueError, one line each."""
    def demand(keys, good, text):
        for key in keys.split():
            if getattr(s, key) is not None and not good(getattr(s, key)):
                raise ValueError(f"{flag(key)} must {text}, got {getattr(s, key)}")

    for keys, low, high in (  # the upper ends are far beyond any use, and keep sizes within 64 bits
            ("vae_steps ldm_steps vae_batch ldm_batch batch_size micro_batch public_n private_n", 1, 10 ** 9),
            ("steps watch", 0, 10 ** 6), ("from_block adversarial_start", 0, 10 ** 9),
            ("noise_multiplicity", 1, 1000),
            ("text_length width latent_channels", 1, 10 ** 4), ("text_layers depth", 1, 100),
            ("seed insecure_seed", 0, 2 ** 62)):
        demand(keys, lambda v, low=low, high=high: low <= v <= high, f"lie in {low}..{high}")
    demand("vae_lr ldm_lr lr", lambda v: 0 < v <= 1000, "be positive and at most 1000")
    # The noise has deviation sigma C in float32, and Adam squares sigma C / B: between these bounds both stay
    # finite and above zero, for every sigma that is allowed and B up to a million.
    low, high = dp_sgd.SMALLEST_CLIP_NORM, dp_sgd.LARGEST_CLIP_NORM
    demand("clip_norm", lambda v: low <= v <= high, f"lie in {low:g}..{high:g}")
    demand("sigma", lambda v: v == 0 or 1e-3 <= v <= 1e6, "be 0 (NOT private) or lie in 1e-3..1e6")
    demand("kl_weight perceptual_weight adversarial_weight", lambda v: 0 <= v <= 1e6, "lie in 0..1e6")
    demand("epsilon", lambda v: 0 < v <= 1e5 or v == math.inf, "be positive, up to 1e5, or inf (no privacy)")
    demand("delta", lambda v: 0 < v < 1, "lie between 0 and 1")
    demand("size", lambda v: v in (32, 64, 128, 256), "be 32, 64, 128 or 256")
    demand("factor", lambda v: v in (2, 4, 8, 16), "be 2, 4, 8 or 16")
    for key, table in (("public_optimizer", optim.PUBLIC), ("private_optimizer", optim.PRIVATE),
                       ("clipping", dp_sgd.CLIPPING), ("method", METHODS)):  # readers may add entries
        demand(key, table.__contains__, f"be one of {', '.join(table)}")
    demand("cond_drop ema", lambda v: 0 <= v < 1, "lie in [0, 1)")
    demand("guidance", lambda v: abs(v) <= 1000, "be a number, at most 1000")
    demand("sample_eta", lambda v: 0 <= v <= 1, "lie in [0, 1]")
    if not s.resume and datasets.REGISTRY[datasets.kind_of(s.public)].role == "private":
        raise ValueError(f"--public {s.public}: this set is for private images only")
    if datasets.REGISTRY[datasets.kind_of(s.private)].role == "public":
        raise ValueError(f"--private {s.private}: this set is public only, nothing of it is held out")
    if s.classes is not None:
        datasets.class_list(s.classes)
    demand("text_width", lambda v: 0 < v <= 10 ** 4 and v % 8 == 0, "be a multiple of 8, at most 10,000")
    tune = s.tune.removesuffix("+shift")
    rank = tune.removeprefix("lora:")
    if rank != tune and rank.isdecimal() and (len(rank) > 9 or int(rank) > LARGEST_RANK):
        raise ValueError(f"--tune lora:RANK: the rank must be at most {LARGEST_RANK}, got {rank[:20]}")
    if {"epsilon", "sigma"} <= {*s.given}:
        raise ValueError("--sigma sets the noise instead of --epsilon: give one of the two")
    if s.fast_noise and s.insecure_seed is not None:
        raise ValueError("--fast-noise and --insecure-seed exclude each other")
    checkpoints.check_schedule(s.schedule)
    check_sampling(s)
    hardware.check_device(s.device)


def check_sampling(s):
    """ValueError for settings of the images at the end that cannot be followed. Nothing is spent yet."""
    if not 1 <= s.sample_steps <= s.schedule.T:
        raise ValueError(f"--sample-steps must lie in 1..{s.schedule.T}, the steps of the noise schedule, "
                         f"got {s.sample_steps}")
    if s.guidance != 1 and s.condition == "none":
        raise ValueError("--guidance other than 1 needs a condition, --condition class or text")
    if s.guidance != 1 and s.cond_drop == 0:
        raise ValueError("--guidance other than 1 needs --cond-drop above 0, here or in the run of --init")
