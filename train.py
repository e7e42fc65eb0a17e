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
    torchrun --nproc_per_node=4 train.py     four processes, a part of every batch each, the same result

"Step" always means a logical step: one Poisson batch, one ledger row, one noise addition, one optimiser and EMA update.
Nothing derived from private pictures is written outside internal/, except through the noisy gradient.
"""
import argparse
import hashlib
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, is_dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

import accountant
import data
import diffusion
import dp_sgd
import folder
import sample
import text
import unet
import vae
from folder import rank

# ------------------------------------------------------------------------------------------------------------ settings

DIGITS = dict(  # every key is a flag or a network; a preset overrides some of them, the command line overrides both
    public="strokes", public_classes="all", public_n=36_000, private="mnist10k", private_n=None,
    label_attribute="Male", size=None, flips=False, condition="class", text_length=32, text_width=64, text_layers=2,
    vae=vae.VAEConfig(ch=8, ch_mult=(1, 2, 4, 8)), vae_steps=900, vae_batch=64, vae_lr=3e-3, kl_weight=1e-6,
    perceptual_weight=0.0, adversarial_weight=0.0, adversarial_start=0,
    unet=unet.UNetConfig(4, 4, 32, num_heads=4, context_dim=64, num_groups=8), schedule=diffusion.Schedule("cosine", "v"),
    ldm_steps=1600, ldm_batch=256, ldm_lr=2e-3, cond_drop=0.1,
    epsilon=10.0, delta=1e-5, sigma=None, accountant="pld", batch_size=4000, steps=30, clip_norm=0.1, clipping="flat",
    noise_multiplicity=1, tune="attention", from_block=0, lr=5e-3, ema=0.9, method="bookkeeping", micro_batch=None,
    sample_steps=30, sample_eta=0.0, guidance=1.0,
)
LARGE = dict(batch_size=6000, steps=150, lr=3e-3, ema=0.95)  # for 60,000 private pictures: the noise allows more steps
CELEBA = dict(  # the authors' settings for faces; large, for GPUs
    public="folder:imagenet/train", public_n=None, private="celeba", delta=1e-6, clip_norm=5e-4, ema=0.9999, cond_drop=0.0,
    schedule=diffusion.Schedule(beta_end=0.0195), vae_steps=200_000, vae_batch=16, vae_lr=1.6e-5, ldm_steps=500_000,
    sample_steps=200, sample_eta=1.0)
PRESETS = {  # epochs are turned into steps: epochs * n / batch, with n = 50,000 (CIFAR-10) and 162,770 (CelebA)
    "digits": {},
    "mnist": dict(public="emnist", private="mnist", public_n=None, **LARGE),
    "mnist-strokes": dict(private="mnist", public_n=72_000, **LARGE),
    "mnist-letters": dict(private="mnist", public_n=72_000, public_classes="letters", **LARGE),
    "fashion": dict(public="mnist", private="fashion", public_n=None, **LARGE),
    "mnist-paper": dict(  # the authors' networks and settings (theirs on grey pictures); large, for a GPU
        public="emnist", private="mnist", public_n=None,
        vae=replace(vae.PAPER["mnist"], in_channels=1, out_ch=1), vae_steps=60_000, vae_batch=100, vae_lr=4.5e-4,
        perceptual_weight=1.0, adversarial_weight=0.5, adversarial_start=50_000,
        unet=unet.PAPER["mnist"], schedule=diffusion.PAPER, ldm_steps=50_000, ldm_batch=512, ldm_lr=2.5e-3, cond_drop=0.0,
        batch_size=2000, steps=6000, clip_norm=1e-3, lr=1e-3, ema=0.9999, sample_steps=200, sample_eta=1.0),
    "faces": dict(  # colour at 32 pixels on two CPU cores: 4x4x8 latents, 128 numbers for 3,072
        public="public32", public_n=None, private="faces", flips=True,
        vae=vae.VAEConfig(3, 3, 16, (1, 2, 4, 8), z_channels=8, embed_dim=8), vae_steps=1000, vae_batch=64, vae_lr=2e-3,
        unet=unet.UNetConfig(8, 8, 48, num_heads=4, context_dim=64, num_groups=16),
        ldm_steps=1500, ldm_batch=256, ldm_lr=1.5e-3, batch_size=2500, steps=40),
    "cifar10": CELEBA | dict(
        private="cifar10", delta=1e-5, vae=vae.PAPER["cifar10"], unet=unet.PAPER["cifar10"], schedule=diffusion.PAPER,
        ldm_batch=200, ldm_lr=2e-4, cond_drop=0.1, batch_size=2000, steps=750, clip_norm=1e-6, lr=2e-3, from_block=8),
    "celeba32": CELEBA | dict(vae=vae.PAPER["cifar10"], unet=unet.PAPER["celeba32"], condition="none",
                              ldm_batch=384, ldm_lr=1.9e-4, batch_size=2048, steps=5563, lr=1e-3),
    "celeba64": CELEBA | dict(vae=vae.PAPER["celeba64"], unet=unet.PAPER["celeba64"], condition="none",
                              ldm_batch=75, ldm_lr=7.5e-5, batch_size=8192, steps=1391, lr=8.2e-4),
    "celeba256-text": CELEBA | dict(  # theirs: LAION, then 30,000 pictures of CelebA-HQ; here all of CelebA, 1/n < delta
        public="folder:laion", public_n=200_000, vae=vae.PAPER["celeba256-text"], unet=unet.PAPER["celeba256-text"],
        schedule=diffusion.Schedule(beta_start=0.00085, beta_end=0.012), vae_batch=4, ldm_batch=16, ldm_lr=5e-5,
        condition="text", text_width=512, text_layers=4,  # theirs: 32 layers of width 1280
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
        for key, kind, meaning, *choices in rows:
            group.add_argument("--" + key.replace("_", "-"), type=kind, choices=choices[0] if choices else None,
                               help=f"{meaning} [{DIGITS[key]}]")

    g = p.add_argument_group("run")
    g.add_argument("--preset", choices=PRESETS, default="digits", help="data sets, networks and defaults [digits]")
    g.add_argument("--out", type=Path, help="run folder to write [runs/PRESET]")
    g.add_argument("--init", type=Path, default=None, help="run folder whose public stages are reused [train them]")
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
    g.add_argument("--secure-noise", action="store_true", default=False,
                   help="draw noise and Poisson batches from the operating system's CSPRNG, in float64; slower [off]")
    g.add_argument("--data-root", default=None, help="folder of the full data sets [$DPLDM_DATA or ~/.cache/dpldm]")
    g.add_argument("--cache", default=None, help="folder for decoded photographs, as private as they are [DATA_ROOT/cache]")
    flags("data", ("public", str, f"public set: {', '.join(data.LOADERS)} (folder:PATH, npz:PATH)"),
          ("public_classes", str, "classes of the set strokes", ("digits", "letters", "all")),
          ("public_n", int, "public pictures to use or draw"),
          ("private", str, f"private set, any of these but {', '.join(data.PUBLIC_ONLY)}"),
          ("private_n", int, "private pictures to use, a random choice"),
          ("label_attribute", str, "attribute of celeba and faces that gives the two classes"),
          ("size", int, "side of the pictures the networks see, in pixels; None: the preset's"),
          ("condition", str, "what a picture is made from: its class, a text (captions, or sentences about attributes or "
           "classes), nothing", ("class", "text", "none")),
          ("text_length", int, "most words of a prompt, and one"), ("text_width", int, "width of the text encoder"),
          ("text_layers", int, "transformer blocks of the text encoder"),
          ("flips", lambda x: {"yes": True, "no": False}[x], "mirror pictures at random, yes or no"))
    flags("stage 1, autoencoder (public)", ("vae_steps", int, "steps"), ("vae_batch", int, "pictures per step"),
          ("vae_lr", float, "peak learning rate of AdamW"),
          ("kl_weight", float, "weight of the KL term against the sum of |error| over a picture's pixels"),
          ("perceptual_weight", float, "weight of the distance in VGG16's features, per pixel; 0: off"),
          ("adversarial_weight", float, "weight of the patch discriminator's term; 0: off"),
          ("adversarial_start", int, "steps before the discriminator begins"))
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
    if s.condition == "none":  # cross-attention then asks the pixels themselves
        s.unet, s.cond_drop = replace(s.unet, context_dim=None), 0.0
    try:
        check(s)
    except TypeError as error:  # of a resumed run: the flags have their types
        raise ValueError(f"{s.out / 'internal' / 'settings.json'} is damaged ({error})") from None
    return s


def adopt_settings(s, given):
    """A resumed run goes on with its own settings; a flag that contradicts them is refused by name."""
    path = s.out / "internal" / "settings.json"
    for key, value in folder.read_json(path).items():
        if key in given and key not in FREE and plain(given[key]) != value:
            raise ValueError(f"--resume: this run began with {key} = {value}, not {given[key]}; leave the flag out, or start "
                             "a new run with another --out")
        if key not in FREE:
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

    demand("vae_steps vae_batch ldm_steps ldm_batch batch_size noise_multiplicity micro_batch sample_steps public_n private_n "
           "text_length text_layers",
           lambda v: v >= 1, "be at least 1")
    demand("steps from_block adversarial_start", lambda v: v >= 0, "not be negative")
    demand("vae_lr ldm_lr lr clip_norm init_scale", lambda v: 0 < v < math.inf, "be a positive number")
    demand("sigma kl_weight perceptual_weight adversarial_weight", lambda v: 0 <= v < math.inf, "be 0 or a positive number")
    demand("epsilon", lambda v: v > 0, "be positive (inf: no privacy)")
    demand("delta", lambda v: 0 < v < 1, "lie between 0 and 1")
    demand("size", lambda v: v in (32, 64, 128, 256), "be 32, 64, 128 or 256")
    demand("cond_drop ema", lambda v: 0 <= v < 1, "lie in [0, 1)")
    demand("sample_eta", lambda v: 0 <= v <= 1, "lie in [0, 1]")
    for flag, name in (("--public", s.public), ("--private", s.private)):
        if data.kind_of(name) in data.PUBLIC_ONLY and flag == "--private":
            raise ValueError(f"--private {name}: this set is public only, nothing of it is held out")
    demand("text_width", lambda v: v > 0 and v % 8 == 0, "be a multiple of 8")
    if s.condition != "none" and not (s.unet.context_dim and s.unet.use_spatial_transformer):
        raise ValueError(f"--condition {s.condition}: the network of this preset is unconditional; use --condition none")
    if s.adversarial_weight and world() > 1:
        raise ValueError("--adversarial-weight: the discriminator learns in one process only; leave torchrun out")
    if s.guidance != 1 and s.condition == "none":
        raise ValueError("--guidance other than 1 needs a condition, --condition class or text")
    if s.init and (s.init_ldm or s.init_vae):
        raise ValueError("--init takes both public stages from a run; it cannot be combined with --init-ldm or --init-vae")
    if s.secure_noise and s.insecure_seed is not None:
        raise ValueError("--secure-noise and --insecure-seed exclude each other")
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


# ------------------------------------------------------------------------------------------------- several processes

PATIENCE = timedelta(minutes=10)  # a dead process is noticed at once, by its closed connection; a hanging one after this


def join():
    """Under torchrun: meet the other processes (gloo for tensors on the CPU, NCCL on CUDA). Only rank 0 prints and writes."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def world():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def agreed(value):
    """Rank 0's value, a small picklable one, for all; everybody waits for everybody."""
    box = [value]
    if world() > 1:
        dp_sgd.collective(lambda flag: (dist.all_reduce(flag), dist.broadcast_object_list(box)), [torch.zeros(1)])
    return box[0]


def once(f, *args):
    """f(*args) by rank 0 alone -> its result, for all. Where it raises, the error is told once: the others leave quietly."""
    result = error = None
    if rank() == 0:
        try:
            result = f(*args)
        except BaseException as raised:
            error = raised
    result, failed = agreed((result, error is not None))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return result


def share(batch):
    """This rank's part of a batch of the public stages; parts differ by one picture at most, add up to the batch."""
    return batch // world() + (rank() < batch % world())


def shard(tensor):
    """This rank's part of a data set: every world()-th picture."""
    return tensor[rank()::world()]


def own_part(found):
    """This rank's part of an ImageSet."""
    return replace(found, images=shard(found.images), labels=shard(found.labels),
                   captions=found.captions and shard(found.captions),
                   attributes=found.attributes and {k: shard(v) for k, v in found.attributes.items()})


def own_device(device):
    """cuda -> cuda:i, the i-th for the i-th process of this machine."""
    if world() > 1 and device == "cuda":
        local, needed = int(os.environ.get("LOCAL_RANK", rank())), int(os.environ.get("LOCAL_WORLD_SIZE", world()))
        if torch.cuda.device_count() < needed:
            raise ValueError(f"{needed} processes need as many CUDA devices, found {torch.cuda.device_count()}; or --device cpu")
        torch.cuda.set_device(local)
        return f"cuda:{local}"
    return device


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


def fit(s, title, model, loss_fn, steps, peak, decay, state_path, stop, also=None):
    """The loop of stages 1 and 2: AdamW on public data. loss_fn(generator) -> (loss of one batch, figures for the bar).

    On return the model holds the EMA of its weights. Saves its state every minute and on Ctrl-C, goes on from it; also: a
    module that loss_fn trains by itself and whose state is to be saved as well. Several processes: each draws its share of
    the batch with a seed of its own, and all apply the mean of their gradients.
    """
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, peak, betas=(0.9, 0.99), weight_decay=0.01)
    generator = torch.Generator(s.device).manual_seed(s.seed + 1 + 1_000_000 * rank())
    first = 0
    if state_path.exists():
        state = folder.load(state_path)
        with folder.understanding(state_path):
            model.load_state_dict(state["model"])
            torch._foreach_copy_(average, [a.to(s.device) for a in state["average"]])
            load_optimizer(optimizer, state["optimizer"])
            if also is not None:
                also.load_state_dict(state["also"])
            first = state["step"] + 0
            if rank() == 0:
                generator.set_state(state["generator"])
            else:  # only rank 0's is stored
                generator.manual_seed(s.seed + 1 + 1_000_000 * rank() + first)
    agreed(None)  # nobody writes before all have read
    saved = time.monotonic()
    for step in (bar := tqdm(range(first, steps), desc=title, unit="step", initial=first, total=steps, disable=rank() > 0)):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        with autocast(s):
            loss, figures = loss_fn(generator)
        optimizer.zero_grad()
        loss.backward()
        if world() > 1:
            together = [p.grad for p in parameters if p.grad is not None] + list(() if also is None else also.parameters())
            dp_sgd.collective(lambda flat: dist.all_reduce(flat.div_(world())), together)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_ema(average, parameters, decay, step)
        if step % 10 == 0:
            bar.set_postfix({k: f"{float(v):.4g}" for k, v in figures.items()}, refresh=False)
        leaving = agreed(stop.asked)
        if leaving or time.monotonic() - saved > 60:
            folder.save({"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict(),
                         "generator": generator.get_state(), "step": step + 1,
                         "also": None if also is None else also.state_dict()}, state_path)
            saved = time.monotonic()
        if leaving:
            stop.leave(s.out)
    torch._foreach_copy_([p.data for p in parameters], average)
    if world() > 1:
        dp_sgd.broadcast(parameters)  # the same anyway, but for what different machines round
    if rank() == 0:
        state_path.unlink(missing_ok=True)


def load_optimizer(optimizer, state):
    """Adam's moments from a checkpoint, their shapes checked; learning rate and the like are those of the settings."""
    optimizer.load_state_dict({"state": state["state"], "param_groups": optimizer.state_dict()["param_groups"]})
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        shapes = {key: value.shape for key, value in optimizer.state[p].items()}
        if shapes not in ({}, {"step": (), "exp_avg": p.shape, "exp_avg_sq": p.shape}):
            raise ValueError("the optimiser's state does not fit the parameters")


def load_public(path):
    """A checkpoint of stage 1 or 2, known to hold a network. ValueError, one line, if missing or damaged."""
    checkpoint = folder.load(path)
    with folder.understanding(path):
        if path.name == "vae.pt":
            sample.build_vae(checkpoint), float(checkpoint["scale"])
        else:
            sample.build_model(checkpoint)
    return checkpoint


def train_autoencoder(s, images, stop):
    """Stage 1 (Rombach et al. 2022, section 3.1): public pictures (N, C, H, W) uint8 -> dict, written to public/vae.pt."""
    torch.manual_seed(s.seed)
    model = vae.AutoencoderKL(s.vae).to(s.device, memory_format=torch.channels_last)
    looks, perceptual, adversary = "", None, None
    if s.perceptual_weight:
        looks, perceptual = vae.perceptual_distance(s.device)
        if looks != "vgg16":
            print(f"note: VGG16's weights cannot be had here; the perceptual term compares {looks} instead", file=sys.stderr)
    if s.adversarial_weight:
        adversary = vae.Adversary(s.vae.out_ch, s.adversarial_weight, s.adversarial_start).to(s.device)

    def loss_fn(generator):
        index = torch.randint(len(images), (share(s.vae_batch),), generator=generator, device=s.device)
        loss, error, kl = vae.loss(model, pictures(images[index.cpu()], s.device), s.kl_weight, generator, perceptual,
                                   s.perceptual_weight, adversary)
        # Divided by the number of pixels only to bring the gradient to the scale of `fit`'s leash; Adam does not mind.
        return loss / images[0].numel(), {"error": error, "kl": kl}

    fit(s, "1/3 autoencoder", model, loss_fn, s.vae_steps, s.vae_lr, 0.99, s.out / "internal" / "vae_state.pt", stop, adversary)
    model.eval()
    area = s.vae.resolution ** 2
    shown = pictures(images[:min(4000, 8_000_000 // area)], s.device)
    scale = agreed(vae.latent_scale(model, shown, max(1, 262_144 // area)))
    checkpoint = {"config": asdict(s.vae), "state": model.state_dict(), "scale": scale,
                  "trained_on": data.kind_of(s.public), "steps": s.vae_steps, "perceptual": looks}
    folder.save(checkpoint, s.out / "public" / "vae.pt")
    with torch.no_grad():
        pairs = torch.stack([shown[:32], model.decode(model.encode(shown[:32]).mean)], 1).flatten(0, 1)
    data.save_grid(data.to_uint8(pairs), s.out / "public" / "autoencoder.png", 8)  # original, reconstruction, ...
    return checkpoint


def train_diffusion(s, latents, conditions, embedder, stop):
    """Stage 2 (Liu et al. 2024, section 3): public latents (N, F, C, h, w), N conditions -> dict, also public/ldm.pt.

    embedder: what the conditions are (`embedder_entry`).
    """
    torch.manual_seed(s.seed)
    model = unet.LatentModel(unet.UNet(s.unet), sample.build_embedder(embedder)).to(
        s.device, memory_format=torch.channels_last)
    null = null_condition(s, model, conditions)

    def loss_fn(generator):
        index = torch.randint(len(latents), (share(s.ldm_batch),), generator=generator, device=s.device)
        batch = diffusion.draw(latents[index], select(conditions, index), 1, generator, s.schedule, null, s.cond_drop)
        loss = diffusion.loss(model, *batch, schedule=s.schedule).mean()
        return loss, {"loss": loss.detach()}

    fit(s, "2/3 latent diffusion", model, loss_fn, s.ldm_steps, s.ldm_lr, 0.995, s.out / "internal" / "ldm_state.pt", stop)
    checkpoint = {"unet": asdict(s.unet), "embedder": embedder, "schedule": asdict(s.schedule), "model": model.state_dict(),
                  "trained_on": data.kind_of(s.public), "steps": s.ldm_steps}
    folder.save(checkpoint, s.out / "public" / "ldm.pt")
    return checkpoint


def read_original(path):
    """Tensors of a checkpoint of the original code, by name. ValueError, one line, if it cannot be read without running code."""
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        checkpoint = folder.load(path)
        return {k: v for k, v in checkpoint.get("state_dict", checkpoint).items() if isinstance(v, torch.Tensor)}
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{path}: no tensors that can be read without running code ({str(error)[:120]}); if you trust the file, "
                         f"convert it once: python -c \"import torch; torch.save(torch.load('{path}', map_location='cpu', "
                         f"weights_only=False)['state_dict'], '{path}.pt')\"") from None


def adopt_original(s, images, embedder):
    """Weights of the original latent-diffusion code instead of training: (vae.pt's dict, ldm.pt's dict), either may be None.

    images: PUBLIC pictures, for the latent scale where only the autoencoder is given. The UNet was trained with one scale
    and one noise schedule: both come with it (buffers `scale_factor` and `betas`; a scale that is no buffer stands in its
    configuration, --init-scale). embedder: the entry of the condition embedder; its classes are read too if there are enough
    of the right width, otherwise it starts afresh, as our text encoder always does.
    """
    ldm = read_original(s.init_ldm) if s.init_ldm else {}
    kl = read_original(s.init_vae) if s.init_vae else ldm
    if s.vae.in_channels == 1 and any(k.endswith("encoder.conv_in.weight") and v.shape[1] == 3 for k, v in kl.items()):
        kl = vae.to_grey(kl)
    autoencoder = vae.AutoencoderKL(s.vae).eval()
    vae.load_ldm(autoencoder, kl)
    if not ldm:
        scale = vae.latent_scale(autoencoder.to(s.device), pictures(images[:4000], s.device))
    else:
        scale = float(ldm.get("scale_factor", s.init_scale or 1.0))
    first = {"config": asdict(s.vae), "state": autoencoder.cpu().state_dict(), "scale": scale,
             "trained_on": f"weights of {(s.init_vae or s.init_ldm).name}", "steps": 0}
    if not ldm:
        return first, None
    if "betas" in ldm:
        begin, end = (float(f"{b:.6g}") for b in ldm["betas"][[0, -1]].tolist())  # float32 in the file
        s.schedule = diffusion.Schedule("linear", "eps", len(ldm["betas"]), begin, end)
        if "alphas_cumprod" in ldm and not torch.allclose(
                diffusion.alphas_cumprod(s.schedule), ldm["alphas_cumprod"].double(), rtol=1e-3, atol=1e-6):
            raise ValueError(f"{s.init_ldm}: its noise schedule is not linear in sqrt(beta)")
    table, fits = ldm.get("cond_stage_model.embedding.weight"), False
    if table is not None and sample.condition_kind(embedder) == "class":
        rows = len(table) - embedder["null_class"]
        fits = table.shape[1:] == (embedder["dim"],) and rows >= embedder["num_classes"]
        embedder = {**embedder, "num_classes": rows} if fits else embedder
    torch.manual_seed(s.seed)
    model = unet.LatentModel(unet.UNet(s.unet), sample.build_embedder(embedder))
    unet.load_ldm(model.unet, ldm)
    if fits:
        model.embedder.embedding.load_state_dict({"weight": table})
    print(f"weights        {s.init_ldm.name}: UNet, autoencoder{'' if s.init_vae is None else ' of ' + s.init_vae.name}, "
          f"{'class embedder' if fits else 'a fresh embedder' if embedder else 'no condition'}; scale {scale:.5g}")
    return first, {"unet": asdict(s.unet), "embedder": embedder, "schedule": asdict(s.schedule), "model": model.state_dict(),
                   "trained_on": f"weights of {s.init_ldm.name}", "steps": 0}


def pictures(images, device):
    """uint8 pictures -> what the autoencoder eats: float in [-1, 1] on the device, channels last."""
    return data.to_float(images.to(device)).contiguous(memory_format=torch.channels_last)


def embedder_entry(s, public, private):
    """What the condition embedder is, as it stands in the checkpoints (`sample.build_embedder`); None: there is none.

    Of the private set only the schema is used, names of classes and attributes; never its captions or pictures.
    """
    if s.condition == "none":
        return None
    entry = {"kind": s.condition, "dim": s.unet.context_dim, "null_class": s.cond_drop > 0}
    if s.condition == "class":
        return {**entry, "num_classes": max(len(public.classes), len(private.classes))}
    words = text.vocabulary([*(public.attributes or {}), *(private.attributes or {})], public.classes + private.classes)
    return {**entry, "words": words, "length": s.text_length, "width": s.text_width,
            "layers": s.text_layers}


def find_conditions(s, pictures, embedder):
    """Conditions of an image set: None, labels (N,), or tokens (N, L) of one caption per picture; on the device.

    A caption is the picture's own, else a sentence about its attributes, else about its class. Its wording is drawn with a
    seed made from the picture itself: with one generator for all, leaving out one picture would reword those after it,
    and the guarantee is about sets that differ in one picture only.
    """
    if sample.condition_kind(embedder) != "text":
        return pictures.labels.to(s.device) if embedder else None
    captions = pictures.captions
    if captions is None:
        captions = []
        for i, image in enumerate(tqdm(pictures.images.numpy(), desc="    captions", unit="picture", leave=False)):
            seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "little")
            generator = torch.Generator().manual_seed(seed)
            if pictures.attributes:
                captions.append(text.caption({k: v[i] for k, v in pictures.attributes.items()}, generator))
            else:
                captions.append(text.class_caption(pictures.classes[pictures.labels[i]], generator))
    return sample.build_tokenizer(embedder).encode(captions).to(s.device)


def class_prompts(s, private, n=10):
    """Prompts that mean a class, a list per class, made from names only: so a text model can be sampled by label."""
    generator = torch.Generator().manual_seed(0)
    name = s.label_attribute
    if name in (private.attributes or {}) and len(private.classes) == 2:
        makers = [partial(text.caption, {name: value}, generator, omit=0, deny=1) for value in (False, True)]
    else:
        makers = [partial(text.class_caption, name, generator) for name in private.classes]
    return [list(dict.fromkeys(make() for _ in range(n))) for make in makers]


def select(conditions, index):
    """Rows of the conditions, None for none."""
    return None if conditions is None else conditions[index]


def stand_in(model, n, device):
    """n conditions of the model's kind for measuring times: None, label 0, or prompts of full length."""
    if isinstance(model.embedder, text.TextEncoder):
        return torch.full((n, model.embedder.length), text.BEGIN, device=device)
    return None if model.embedder is None else torch.zeros(n, dtype=torch.int64, device=device)


def null_condition(s, model, conditions):
    """The condition that stands for a dropped one, (1,) or (1, L), or None where conditions are never dropped."""
    return model.embedder.null(conditions[:1]) if conditions is not None and s.cond_drop > 0 else None


@torch.no_grad()
def encode(s, autoencoder, images, scale):
    """Pictures (N, C, H, W) uint8 -> scaled latents (N, F, embed_dim, h, w), F = 2 with the mirror images; once for all.

    The mean of the posterior is used: at a KL weight of 1e-6 its standard deviation is tiny.
    """
    autoencoder = autoencoder.to(s.device, memory_format=torch.channels_last)
    latents = []
    for part in tqdm(images.split(max(1, 512_000 // s.vae.resolution ** 2)), desc="    encoding", unit="batch", leave=False,
                     disable=rank() > 0):
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


def noise_only(model):
    """Number of trained weights that a one-token condition gives no gradient: under DP-SGD they see nothing but noise."""
    parameters = dict(model.named_parameters())
    return count(parameters[name] for name in unet.noise_only_names(model))


def print_plan(s, plan, model):
    trained, total = count(p for p in model.parameters() if p.requires_grad), count(model.parameters())
    idle = noise_only(model)
    print(f"privacy plan   epsilon {plan['epsilon']:.4g} at delta {plan['delta']:g} ({s.accountant}); unit: one picture, added "
          f"or removed\n               n {plan['n']}, Poisson sampling with q {plan['q']:.4g} (expected batch {s.batch_size}), "
          f"T {plan['steps']} steps, sigma {plan['sigma']:.4g}, C {s.clip_norm:g} {s.clipping}, K {s.noise_multiplicity}\n"
          f"tuned          {s.tune}: {trained:,} of {total:,} parameters ({trained / total:.1%})" + (
              f", of which {idle:,} see only noise (query and key for a one-token condition)" if idle else ""))
    if plan["steps"] and (plan["sigma"] == 0 or s.insecure_seed is not None) and rank() == 0:
        print("WARNING: no noise or a known noise seed: this run is NOT private", file=sys.stderr)


def tune_privately(s, model, latents, conditions, plan, stop):
    """Stage 3, Algorithm 1 of the paper: DP-SGD on the parameters of `model` that require grad, in place -> ledger rows.

    latents (n, F, C, h, w) of the private pictures, n conditions or None: of this process's shard, if there are several. On
    return the tuned parameters hold their EMA (on rank 0). The order within a step is what makes it crash-safe: draw,
    accumulate, ledger row on the disk, noise and update, save.
    """
    ledger, state_path = s.out / "internal" / "ledger.jsonl", s.out / "internal" / "state.pt"
    if s.insecure_seed is None:
        generator, sampler = dp_sgd.fresh_generator(s.device), dp_sgd.fresh_generator()
    else:
        generator = torch.Generator(s.device).manual_seed(s.insecure_seed + 2 * rank())
        sampler = torch.Generator().manual_seed(s.insecure_seed + 1 + 2 * rank())
    noise = generator  # `generator` also draws t and the diffusion noise, which are no secrets of the mechanism
    if s.secure_noise:
        noise = sampler = dp_sgd.SecureGenerator()
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, s.method, s.clipping, noise)
    optimizer = torch.optim.Adam(engine.parameters, s.lr)
    average = [p.detach().clone() for p in engine.parameters]
    loss_fn, null = partial(diffusion.loss, schedule=s.schedule), null_condition(s, model, conditions)
    rows = accountant.ledger_rows(folder.read_ledger(ledger), plan)
    done = resume(state_path, engine, average, optimizer, len(rows))  # updates contained in the weights
    # A run with --insecure-seed is to be repeatable, and the draws depend on how a batch is cut.
    micro_batch = s.micro_batch or (256 if s.insecure_seed is not None else fastest_micro_batch(s, model, latents.shape[2:]))
    agreed(None)  # nobody writes before all have read
    # A step in the ledger is spent, also one whose result a crash has lost: the run ends when the budget is spent.
    fits = micro_batch  # examples that fit into memory at a time
    bar = tqdm(range(len(rows), plan["steps"]), desc="3/3 private tuning", unit="step", initial=len(rows), total=plan["steps"],
               disable=rank() > 0)
    begin, examples, so_far = time.monotonic(), 0, 0.0
    for step in bar:
        # ---- one private step ----------------------------------------------------------------------------------------
        batch = dp_sgd.poisson_sample(len(latents), plan["q"], sampler)  # may be empty: then noise only, and it counts
        for part in batch.to(s.device).split(micro_batch):
            drawn = diffusion.draw(latents[part], select(conditions, part), s.noise_multiplicity, generator, s.schedule, null,
                                   s.cond_drop)
            fits = accumulate_in_pieces(s, engine, loss_fn, drawn, fits)
        if world() > 1:
            dp_sgd.reduce_sums(engine)
        rows.append({"step": step, "q": plan["q"], "sigma": plan["sigma"], "clip_norm": s.clip_norm, "batch_size": s.batch_size})
        folder.append_row(rows[-1], ledger)
        if rank() == 0:
            engine.step(optimizer)
            update_ema(average, engine.parameters, s.ema, done)
        if world() > 1:
            dp_sgd.broadcast(engine.parameters)
        # ---- end of the private step: from here on everything is post-processing -----------------------------------
        done, examples = done + 1, examples + engine.last["examples"]
        leaving = agreed(stop.asked) and len(rows) < plan["steps"]
        folder.save({"tuned": dict(zip(engine.names, engine.parameters, strict=True)), "average": average,
                     "optimizer": optimizer.state_dict(), "done": done}, state_path)
        if len(rows) % max(1, plan["steps"] // 100) == 0:  # tight accounting takes a tenth of a second
            so_far = float(accountant.epsilon(plan["q"], plan["sigma"], len(rows), s.delta, s.accountant))
        folder.append_row({"step": step, "epsilon": plain(so_far), **engine.last}, s.out / "internal" / "log.jsonl")
        last = engine.last
        bar.set_postfix(loss=f"{last['loss']:.4f}", epsilon=f"{so_far:.3f}", clipped=f"{last['clipped_fraction']:.0%}",
                        examples_per_s=f"{examples / (time.monotonic() - begin):.0f}")
        if leaving:
            stop.leave(s.out)
    torch._foreach_copy_([p.data for p in engine.parameters], average)
    return rows


def accumulate_in_pieces(s, engine, loss_fn, drawn, size):
    """engine.accumulate on at most `size` examples at a time; out of memory: half of that -> the size that fits.

    The result is the same whatever the pieces: all randomness is in `drawn` already, and `accumulate` commits a piece
    wholly or not at all, so an example of a piece tried again counts once. Raises ValueError if one example is too much.
    """
    done, n = 0, len(drawn[0])
    while done < n:
        piece = [d if d is None else d[done:done + size] for d in drawn]
        try:
            with autocast(s):
                engine.accumulate(loss_fn, *piece)
            done += size
            continue
        except torch.OutOfMemoryError:
            if size == 1:
                raise ValueError("the private stage runs out of memory with one example at a time; use a smaller network or "
                                 "--noise-multiplicity 1") from None
        size = max(1, min(size, len(piece[0])) // 2)
        torch.cuda.empty_cache()  # here the error is gone, and with it what it held on to; no effect without CUDA
    return size


def fastest_micro_batch(s, model, shape, sizes=(32, 64, 128, 256, 512, 1024)):
    """The micro-batch size with the most examples per second, tried on random latents of one example's `shape`.

    The size changes memory and speed only, never the result: dp_sgd sums clipped gradients over micro-batches.
    """
    engine = dp_sgd.DPSGD(model, s.clip_norm, 0.0, 1, s.method, s.clipping)  # a throw-away: nothing of it is released
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


def resume(path, engine, average, optimizer, spent):
    """Load tuned parameters, EMA and optimiser, if there is a state -> updates they contain, at most `spent` ledger rows."""
    if not path.exists():
        return 0
    state = folder.load(path)
    with folder.understanding(path), torch.no_grad():
        done = state["done"] + 0
        torch._foreach_copy_(engine.parameters, [state["tuned"][name].to(engine.parameters[0]) for name in engine.names])
        torch._foreach_copy_(average, [a.to(average[0]) for a in state["average"]])
        load_optimizer(optimizer, state["optimizer"])
    if not 0 <= done <= spent:
        raise ValueError(f"the ledger has {spent} rows, the checkpoint {done} steps: rows are missing, so epsilon is unknown; "
                         "restore internal/ledger.jsonl, or start a new run")
    return done


# -------------------------------------------------------------------------------------------------------- the release


def privacy_statement(s, plan, rows, trained):
    """Content of release/privacy.json: all that is needed to judge the guarantee (pitfalls 20, 24, 25)."""
    both = {m: accountant.epsilon_of_ledger(rows, s.delta, m) if rows else 0.0 for m in ("rdp", "pld")}
    epsilon = both[s.accountant]
    private = s.insecure_seed is None and math.isfinite(epsilon)
    spent = (max(r["q"] for r in rows), min(r["sigma"] for r in rows), len(rows)) if rows else (0.0, 1.0, 0)
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
        "condition": s.condition, "trained_parameters": trained[0], "of_these_see_only_noise": trained[1],
        "public_set": data.kind_of(s.public), "private_set": data.kind_of(s.private),
        "public_weights": [Path(p).name for p in (s.init_ldm, s.init_vae) if p],
        "insecure_seed": s.insecure_seed is not None, "secure_noise": s.secure_noise,
        "noise": "float64 from the operating system's CSPRNG, four Box-Muller draws each (dp_sgd.SecureGenerator)" if
                 s.secure_noise else
                 "Mersenne twister with its whole state from the operating system (CPU) or Philox with 64 bits (CUDA)",
        "covers": "everything in release/ and whatever is made from it",
        "does_not_cover": [
            "the number n of private pictures and the names of their classes and attributes, which are treated as public",
            "hyper-parameters, taken as chosen beforehand",
            "other runs on the same private pictures: their epsilons add up", "internal/ (losses, gradient norms)",
            "several pictures of one person: the guarantee is for one picture",
            "pictures that weights taken from elsewhere (public_weights) were trained on",
            "timing" if s.secure_noise else "floating-point attacks on the Gaussian noise, and timing"],
    })


def write_release(s, vae_checkpoint, ldm_checkpoint, model, classes, prompts, privacy, public):
    """release/: model.pt, privacy.json, samples.png, comparison.png (real public | before | after tuning).

    One row of pictures per class; with prompts (a list per class, None for models without text) per prompt: prompts.txt.
    """
    unet.merge_lora(model)
    content = {"format": sample.FORMAT, "vae": {k: vae_checkpoint[k] for k in ("config", "state")},
               "scale": vae_checkpoint["scale"], **{k: ldm_checkpoint[k] for k in ("unet", "embedder", "schedule")},
               "classes": classes, "crop": s.crop, "prompts": prompts,
               "data": {"public": data.kind_of(s.public), "public_classes": s.public_classes,
                        "private": data.kind_of(s.private), "label_attribute": s.label_attribute}, "privacy": privacy}
    folder.save({**content, "model": model.state_dict()}, s.out / "release" / "model.pt")
    folder.write_json(privacy, s.out / "release" / "privacy.json")
    lines = max(1, (6 if s.crop < 128 else 2) // len(classes))  # of ten pictures, for each class
    row_classes = [label for label in range(len(classes)) for _ in range(lines)]
    labels = torch.tensor(row_classes).repeat_interleave(10)
    if prompts:
        row_prompts = [prompt for options in prompts for prompt in options[:lines]]
        row_classes = [label for label, options in enumerate(prompts) for _ in options[:lines]]
        labels = [prompt for prompt in row_prompts for _ in range(10)]
        with folder.replacing(s.out / "release" / "prompts.txt") as file:
            file.write("".join(f"{prompt}\n" for prompt in row_prompts).encode())
    draw = partial(sample.generate, labels=labels, steps=s.sample_steps, eta=s.sample_eta, guidance=s.guidance, seed=s.seed)
    released = sample.load_release(s.out, s.device)
    after = draw(released)
    public_model, _ = sample.build_model(ldm_checkpoint)
    before = draw(replace(released, model=public_model.eval().to(s.device)))
    data.save_grid(after, s.out / "release" / "samples.png", 10)
    rows, gap = [], torch.full((1, *after.shape[1:]), 96, dtype=torch.uint8)
    for i, label in enumerate(row_classes):
        alike = public.classes[label:label + 1] == classes[label:label + 1]  # else any public pictures stand on the left
        shown = public.images[public.labels == label] if alike else public.images
        real = data.crop(shown[4 * (i % lines if alike else i):][:4], s.crop)
        first = slice(10 * i, 10 * i + 6)
        rows += [real, gap.expand(5 - len(real), -1, -1, -1), before[first], gap, after[first]]
    data.save_grid(torch.cat(rows), s.out / "release" / "comparison.png", 18)
    with folder.replacing(s.out / "release" / "MODEL_CARD.md") as file:
        file.write(model_card(privacy, classes, s.out.name).encode())


def model_card(privacy, classes, name):
    """release/MODEL_CARD.md: what the release is and promises, in plain words; every number is one of privacy.json's."""
    def at_most(rate):
        return f"{math.ceil(1e4 * float(rate)) / 100:g} %"  # rounded up: nothing is understated

    p, rates = privacy, privacy["attacker_true_positive_rates"]
    table = "\n".join(f"| {float(fpr):.1%} | {at_most(rate)} |" for fpr, rate in rates.items())
    limits = "\n".join(f"- {item}" for item in p["does_not_cover"])
    tuned = f"""Then {p["trained_parameters"]:,} of their parameters ({p["tune"]}) were
tuned in {p["steps"]} steps on {p["n"]:,} private pictures (`{p["private_set"]}`) with differential privacy (DP-SGD)."""
    promise = f"""An attacker who sees this release and knows everything but one picture, and who accepts 1 % false alarms,
detects that picture's presence in at most {at_most(rates["0.01"])} of the cases. (By guessing: 1 %.)

| false alarms | detected at most |
|---|---|
{table}

In figures: epsilon {float(p["epsilon"]):.4g} at delta {p["delta"]:g}; neighbours: {p["adjacency"]}; unit: {p["unit"]}.
The unit is a picture, not a person: for someone who has 20 of the pictures, epsilon is
{float(p["epsilon_for_20_pictures_of_one_person"]):.4g}."""
    if not p["steps"]:
        tuned, promise = "", "No private picture was read: this is the public model."
    elif not p["private"]:
        promise = "Nothing: this model was trained without noise, or with noise that can be repeated. Do not publish it."
    return f"""# Model card: {name}

![samples](samples.png)

A latent diffusion model that draws pictures of {len(classes)} classes: {", ".join(classes)}. Its networks were trained on the
public set `{p["public_set"]}`. {tuned}
The method is that of Liu, Lyu, Vinaroz, Park: Differentially Private Latent Diffusion Models (TMLR 2024). Above: pictures
drawn by the model. In comparison.png, from left to right: public pictures, drawn before and after the private tuning.

## What is promised

{p["statement"]}.

{promise}

Covered: {p["covers"]}. Not covered:

{limits}

All figures, and how they were found: privacy.json.

## Use

    python sample.py FOLDER --n 100 --out grid.png

with the folder that holds this file. Drawing more pictures costs no privacy. What the model draws shows how the private
set looks as a whole, its faults and prejudices included.

## Licence and terms

To be filled in by the holder of the private pictures: licence of the weights, terms of use, contact. The terms of the
public set apply as well.
"""


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


def estimate(s, plan, embedder):
    """Print the minutes of each stage, extrapolated from one step on random data."""
    with torch.device(s.device):
        autoencoder = vae.AutoencoderKL(s.vae).to(memory_format=torch.channels_last)
        model = unet.LatentModel(unet.UNet(s.unet), sample.build_embedder(embedder))
    model = model.to(memory_format=torch.channels_last)
    unet.select_trainable(model, s.tune, s.from_block)
    x = torch.rand(s.vae_batch, s.vae.in_channels, s.vae.resolution, s.vae.resolution, device=s.device)
    z = torch.randn(s.ldm_batch, *autoencoder.latent_shape, device=s.device)
    y = stand_in(model, s.ldm_batch, s.device)
    loss_fn = partial(diffusion.loss, schedule=s.schedule)
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, s.method, s.clipping)
    size = s.micro_batch or fastest_micro_batch(s, model, z.shape[1:])
    few = slice(0, min(size, len(z)))

    def minutes(times, f):
        f()
        return 1.1 * times * seconds(s, f) / 60  # optimiser, data and checkpoints: about a tenth on top

    private = minutes(plan["steps"] * s.batch_size / len(z[few]),
                      lambda: engine.accumulate(loss_fn, *diffusion.draw(z[few], select(y, few), s.noise_multiplicity)))
    model.requires_grad_(True)
    first = minutes(s.vae_steps, lambda: vae.loss(autoencoder, x)[0].backward())
    second = minutes(s.ldm_steps, lambda: loss_fn(model, *diffusion.draw(z, y)).mean().backward())
    print(f"time           autoencoder {first:.1f}, latent diffusion {second:.1f}, private tuning {private:.1f} minutes "
          f"({'bf16' if s.bf16 else 'float32'} on {s.device}, {torch.get_num_threads()} threads)")


def main(argv=None):
    begin = time.monotonic()
    join()
    s = once(parse, sys.argv[1:] if argv is None else argv)
    s.device = own_device(s.device)
    first = second = None
    if s.init and not s.resume:  # networks of an earlier run are taken as they are: their checkpoints say what they are
        first, second = (load_public(s.init / "public" / name) for name in ("vae.pt", "ldm.pt"))
        s.vae, s.unet = vae.VAEConfig(**first["config"]), unet.UNetConfig(**second["unet"])
        if (made := sample.condition_kind(second["embedder"])) != s.condition:
            raise ValueError(f"--condition {s.condition}: the model of --init {s.init} was made with --condition {made}; "
                             "use that, or train anew")
        s.schedule = diffusion.Schedule(**second["schedule"])
        s.cond_drop *= second["embedder"]["null_class"] if second["embedder"] else 0
    s.bf16 = agreed(s.precision == "bf16" or (s.precision == "auto" and bf16_wins(s.device)))
    if s.size and s.size != s.vae.resolution:
        raise ValueError(f"--size {s.size}: the networks of {s.init} are for {s.vae.resolution} pixels")
    # Both sets are read before the first long loop: nobody waits an hour to learn that a file is missing.
    # With --steps 0 no private picture is read at all.
    drawn = s.public == "strokes"
    find_private = partial(find_set, s, s.private, "train" if s.steps else "test", n=s.private_n if s.steps else None,
                           label_attribute=s.label_attribute)
    find_public = partial(find_set, s, s.public, public_classes=s.public_classes if drawn else None,
                          n=200 if drawn and s.dry_run else s.public_n, seed=s.seed)
    if world() > 1:  # one process downloads what is missing, and tells what is wrong with it
        once(lambda: (find_private(), None)[1])
        once(lambda: (drawn or find_public(), None)[1])
    private, public = find_private(), find_public()
    for title, found in (("--public", public), ("--private", private)):
        if found.images.shape[1] != s.vae.in_channels:
            raise ValueError(f"{title} {found.name} has {found.images.shape[1]} colour channels, the autoencoder of preset "
                             f"{s.preset} takes {s.vae.in_channels}: choose another preset or set")
    s.crop = private.side  # samples look like private pictures, whose padding is cut off again
    plan = once(privacy_plan, s, len(private) if s.steps else 0)
    embedder = second["embedder"] if s.init and not s.resume else embedder_entry(s, public, private)
    with torch.device("meta"):  # no memory; refuses a wrong --tune before any work
        model = unet.LatentModel(unet.UNet(s.unet), sample.build_embedder(embedder))
        unet.select_trainable(model, s.tune, s.from_block)
    if s.dry_run:
        print_plan(s, plan, model)
        print_memory(s, model, public, private)
        if count(model.parameters()) > 5e7 and s.device == "cpu":
            return print("time           not measured: networks of this size are for a GPU; run --dry-run there")
        return estimate(s, plan, embedder)

    if (s.init_ldm or s.init_vae) and not s.resume:
        first, second = adopt_original(s, public.images, embedder)
    stop = folder.Stop()
    once(folder.prepare, s.out, s.resume)
    if not s.resume:
        for name, checkpoint in (("vae.pt", first), ("ldm.pt", second)):
            if checkpoint:
                folder.save(checkpoint, s.out / "public" / name)
        if rank() == 0 and s.init and (s.init / "public" / "features.pt").exists():  # evaluate.py's: runs are judged alike
            shutil.copy(s.init / "public" / "features.pt", s.out / "public")
        folder.write_json({k: plain(v) for k, v in vars(s).items()}, s.out / "internal" / "settings.json")
    agreed(None)  # nobody looks before all is written
    have = {name: (s.out / "public" / name).exists() for name in ("vae.pt", "ldm.pt")}
    first = load_public(s.out / "public" / "vae.pt") if have["vae.pt"] else train_autoencoder(s, public.images, stop)
    autoencoder, scale = sample.build_vae(first), first["scale"]
    second = load_public(s.out / "public" / "ldm.pt") if have["ldm.pt"] else train_diffusion(
        s, encode(s, autoencoder, shard(public.images), scale), find_conditions(s, own_part(public), embedder), embedder, stop)
    embedder = second["embedder"]
    if s.condition == "class" and embedder["num_classes"] < len(private.classes):
        raise ValueError(f"the public model has {embedder['num_classes']} classes, fewer than {s.private}'s "
                         f"{len(private.classes)}")

    model = sample.build_model(second)[0].to(s.device, memory_format=torch.channels_last)
    names = unet.select_trainable(model, s.tune, s.from_block)
    print_plan(s, plan, model)
    trained, rows = (count(p for p in model.parameters() if p.requires_grad), noise_only(model)), []
    if s.steps:
        facts = {**plan, "clip_norm": s.clip_norm, "clipping": s.clipping, "tuned": names,
                 "private_pictures": hashlib.sha256(private.images.numpy()).hexdigest()}
        once(folder.check_unchanged, plain(facts), s.out / "internal" / "plan.json")
        rows = tune_privately(s, model, encode(s, autoencoder, shard(private.images), scale),
                              find_conditions(s, own_part(private), embedder), plan, stop)
    if world() > 1:  # the rest is for one process
        done = rank() > 0
        agreed(None)
        dist.destroy_process_group()
        if done:
            return
    privacy = privacy_statement(s, plan, rows, trained)
    prompts = class_prompts(s, private) if s.condition == "text" else None
    for options in prompts or ():
        if unknown := sample.build_tokenizer(embedder).unknown(" ".join(options)):
            print(f"WARNING: the public model does not know {', '.join(unknown)}: train it anew, without --init", file=sys.stderr)
    write_release(s, first, second, model, private.classes, prompts, privacy, public)
    print(f"{s.out}/release: {privacy['statement']}; {(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    folder.run_cli(main)
