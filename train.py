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
import hashlib
import math
import os
import shutil
import sys
import time
from dataclasses import asdict
from functools import partial

import torch
import torch.distributed as dist
from tqdm import tqdm

import accountant
import datasets
import diffusion
import dp_sgd
import unet
import vae
from accountant import round_up
from datasets import pixels, strokes
from extensions import captions, lora, original_weights, perceptual, text
from support import checkpoints, files, guarantee, hardware, run_folder, team
from support.dry_run import estimate, fastest_micro_batch, print_memory, stand_in
from support.hardware import autocast, count, select
from support.release import write_release
from support.settings import GRADIENTS, VAE_FLAGS, check_sampling, parse, plain
from support.team import agreed, join, once, own_device, own_part, rank, shard, share, world

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
        state = files.load(state_path)
        with files.understanding(state_path):
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
            team.collective(lambda flat: dist.all_reduce(flat.div_(world())), together)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        update_ema(average, parameters, decay, step)
        if step % 10 == 0:
            bar.set_postfix({k: f"{float(v):.4g}" for k, v in figures.items()}, refresh=False)
        leaving = agreed(stop.asked)
        if leaving or time.monotonic() - saved > 60:
            files.save({"model": model.state_dict(), "average": average, "optimizer": optimizer.state_dict(),
                         "generator": generator.get_state(), "step": step + 1,
                         "also": None if also is None else also.state_dict()}, state_path)
            saved = time.monotonic()
        if leaving:
            stop.leave(s.out)
    torch._foreach_copy_([p.data for p in parameters], average)
    if world() > 1:
        team.broadcast(parameters)  # the same anyway, but for what different machines round
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
    checkpoint = files.load(path)
    files.refuse_release(checkpoint, path)
    with files.understanding(path):
        if path.name == "vae.pt":
            checkpoints.build_vae(checkpoint), float(checkpoint["scale"])
        else:
            checkpoints.build_model(checkpoint)
    return checkpoint


def public_digests(s, images):
    """datasets.digests of the public images (N, C, H, W); none of drawn ones: nothing private is in them."""
    return datasets.digests(images[:0] if datasets.REGISTRY[datasets.kind_of(s.public)].drawn else images)


def refuse_known(s, private, digests, checkpoints):
    """Refuse private images (N, C, H, W) uint8 that a public network was trained on, wherever they came from.

    digests: of the public set at hand; checkpoints: the public stages that exist already, with their digests.
    """
    known = [digests]
    for checkpoint in checkpoints:
        own, origin = checkpoint.get("digests"), str(checkpoint.get("trained_on"))
        if isinstance(own, torch.Tensor) and own.dtype == torch.int64:
            known.append(own.flatten())
        elif not (origin in datasets.REGISTRY and datasets.REGISTRY[origin].drawn):
            raise ValueError(f"the public networks (trained on {origin}) were made before digests of their "
                             "images were recorded, so private images may be among them: train the public "
                             "stages again")
    if shared := int(torch.isin(datasets.digests(private), torch.cat(known)).sum()):
        raise ValueError(f"--private {s.private}: {shared} of its images are among the images that the "
                         "public networks were trained on, so nothing would be private; choose another private or "
                         "public set")


def train_autoencoder(s, images, stop):
    """Stage 1 (Rombach et al. 2022, section 3.1): public pictures (N, C, H, W) uint8 -> dict, written to public/vae.pt."""
    torch.manual_seed(s.seed)
    model = hardware.laid_out(vae.AutoencoderKL(s.vae), s.device)
    looks, distance, adversary = "", None, None
    if s.perceptual_weight:
        looks, distance = perceptual.perceptual_distance(s.device)
        if looks != "vgg16":
            print(f"note: VGG16's weights cannot be had here; the perceptual term compares {looks} instead", file=sys.stderr)
    if s.adversarial_weight:
        adversary = perceptual.Adversary(s.vae.out_ch, s.adversarial_weight, s.adversarial_start).to(s.device)

    def loss_fn(generator):
        index = torch.randint(len(images), (share(s.vae_batch),), generator=generator, device=s.device)
        loss, error, kl = vae.loss(model, pictures(images[index.cpu()], s.device), s.kl_weight, generator, distance,
                                   s.perceptual_weight, adversary)
        # Divided by the number of pixels only to bring the gradient to the scale of `fit`'s leash; Adam does not mind.
        return loss / images[0].numel(), {"error": error, "kl": kl}

    fit(s, "1/3 autoencoder", model, loss_fn, s.vae_steps, s.vae_lr, 0.99, s.out / "internal" / "vae_state.pt", stop, adversary)
    model.eval()
    area = s.vae.resolution ** 2
    shown = pictures(images[:min(4000, 8_000_000 // area)], s.device)
    scale = agreed(vae.latent_scale(model, shown, max(1, 262_144 // area)))
    checkpoint = {"config": asdict(s.vae), "state": model.state_dict(), "scale": scale,
                  "trained_on": datasets.kind_of(s.public), "public_classes": s.public_classes, "steps": s.vae_steps,
                  "perceptual": looks, "digests": public_digests(s, images)}
    files.save(checkpoint, s.out / "public" / "vae.pt")
    with torch.no_grad():
        pairs = torch.stack([shown[:32], model.decode(model.encode(shown[:32]).mean)], 1).flatten(0, 1)
    pixels.save_grid(pixels.to_uint8(pairs), s.out / "public" / "autoencoder.png", 8)  # original, reconstruction, ...
    return checkpoint


def train_diffusion(s, latents, conditions, embedder, stop, facts):
    """Stage 2 (Liu et al. 2024, section 3): public latents (N, F, C, h, w), N conditions -> dict, also public/ldm.pt.

    embedder: what the conditions are (`embedder_entry`); facts: what else the checkpoint says of the public set, the names
    of its classes and the digests of its images.
    """
    torch.manual_seed(s.seed)
    model = hardware.laid_out(unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder)), s.device)
    null = null_condition(s, model, conditions)

    def loss_fn(generator):
        index = torch.randint(len(latents), (share(s.ldm_batch),), generator=generator, device=s.device)
        batch = diffusion.draw(latents[index], select(conditions, index), 1, generator, s.schedule, null, s.cond_drop)
        loss = diffusion.loss(model, *batch, schedule=s.schedule).mean()
        return loss, {"loss": loss.detach()}

    fit(s, "2/3 latent diffusion", model, loss_fn, s.ldm_steps, s.ldm_lr, 0.995, s.out / "internal" / "ldm_state.pt", stop)
    checkpoint = {"unet": asdict(s.unet), "embedder": embedder, "schedule": asdict(s.schedule), "model": model.state_dict(),
                  "trained_on": datasets.kind_of(s.public), "public_classes": s.public_classes,
                  "steps": s.ldm_steps, **facts}
    files.save(checkpoint, s.out / "public" / "ldm.pt")
    return checkpoint


def pictures(images, device):
    """uint8 pictures -> what the autoencoder eats: float in [-1, 1] on the device."""
    return pixels.to_float(images.to(device))


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
    if checkpoints.condition_kind(embedder) != "text":
        return pictures.labels.to(s.device) if embedder else None
    sentences = pictures.captions
    if sentences is None:
        sentences = []
        for i, image in enumerate(tqdm(pictures.images.numpy(), desc="    captions", unit="picture", leave=False)):
            seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "little")
            generator = torch.Generator().manual_seed(seed)
            if pictures.attributes:
                sentences.append(captions.caption({k: v[i] for k, v in pictures.attributes.items()}, generator))
            else:
                sentences.append(captions.class_caption(pictures.classes[pictures.labels[i]], generator))
    return checkpoints.build_tokenizer(embedder).encode(sentences).to(s.device)


def for_private_classes(checkpoint, names):
    """Stage 2's checkpoint with one embedder row per private class, in the order of `names`, and the null row.

    A class of the same name keeps its row, "7" that of the public sevens, wherever it stood. The others get the rows that
    are left, in order. Rows of other public classes are dropped: nothing private could train them, only noise.
    Raises ValueError if there are more private classes than rows.
    """
    entry = checkpoint["embedder"]
    if checkpoints.condition_kind(entry) != "class":
        return checkpoint
    public = checkpoint.get("classes") or (  # the first checkpoints did not keep the names
        list(strokes.GROUPS[checkpoint["public_classes"]]) if checkpoint.get("trained_on") == "strokes" else [])
    total = entry["num_classes"]
    if total < len(names):
        raise ValueError(f"the public model has {total} classes, fewer than the {len(names)} private ones")
    rows = {name: public.index(name) for name in names if name in public}
    free = (row for row in range(total) if row not in rows.values())
    index = [rows[name] if name in rows else next(free) for name in names]
    if rank() == 0:
        print(f"classes        {len(rows)} of {len(names)} private classes have the name of a public one and begin with its "
              "embedding")
    key = "embedder.embedding.weight"
    table = checkpoint["model"][key][index + [total] * entry["null_class"]].clone()
    return {**checkpoint, "embedder": {**entry, "num_classes": len(names)}, "model": {**checkpoint["model"], key: table}}


def class_prompts(s, private, n=10):
    """Prompts that mean a class, a list per class, made from names only: so a text model can be sampled by label."""
    generator = torch.Generator().manual_seed(0)
    name = s.label_attribute
    if name in (private.attributes or {}) and len(private.classes) == 2:
        makers = [partial(captions.caption, {name: value}, generator, omit=0, deny=1) for value in (False, True)]
    else:
        makers = [partial(captions.class_caption, name, generator) for name in private.classes]
    return [list(dict.fromkeys(make() for _ in range(n))) for make in makers]


def null_condition(s, model, conditions):
    """The condition that stands for a dropped one, (1,) or (1, L), or None where conditions are never dropped."""
    return model.embedder.null(conditions[:1]) if conditions is not None and s.cond_drop > 0 else None


@torch.no_grad()
def encode(s, autoencoder, images, scale):
    """Pictures (N, C, H, W) uint8 -> scaled latents (N, F, embed_dim, h, w), F = 2 with the mirror images; once for all.

    The mean of the posterior is used: at a KL weight of 1e-6 its standard deviation is tiny.
    """
    autoencoder = hardware.laid_out(autoencoder, s.device)
    latents = []
    for part in tqdm(images.split(max(1, 512_000 // s.vae.resolution ** 2)), desc="    encoding", unit="batch", leave=False,
                     disable=rank() > 0):
        x = pictures(part, s.device)
        views = [x, x.flip(-1)] if s.flips else [x]
        latents.append(torch.stack([autoencoder.encode(view).mean * scale for view in views], 1))
    return torch.cat(latents).contiguous()


# ------------------------------------------------------------------------------------------------- the private stage

# Steps, epsilon and the time left; no rate, which would tell the size of each private batch.
QUIET_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def tune_privately(s, model, latents, conditions, plan, stop):
    """Stage 3, Algorithm 1 of the paper: DP-SGD on the parameters of `model` that require grad, in place -> ledger rows.

    latents (n, F, C, h, w) of the private pictures, n conditions or None: of this process's shard, if there are several. On
    return the tuned parameters hold their EMA (on rank 0). The order within a step is what makes it crash-safe: draw,
    accumulate, ledger row on the disk, noise and update, save.
    """
    ledger, state_path = s.out / "internal" / "ledger.jsonl", s.out / "internal" / "state.pt"
    # `generator` draws t and the diffusion noise: no secrets of the mechanism, whose secrets are the noise and the batches.
    generator = dp_sgd.fresh_generator(s.device)
    noise = sampler = dp_sgd.SecureGenerator()
    if s.fast_noise:
        noise, sampler = dp_sgd.fresh_generator(s.device), dp_sgd.fresh_generator()
    if s.insecure_seed is not None:
        noise = generator = torch.Generator(s.device).manual_seed(s.insecure_seed + 2 * rank())
        sampler = torch.Generator().manual_seed(s.insecure_seed + 1 + 2 * rank())
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, dp_sgd.CLIPPING[s.clipping], GRADIENTS[s.method],
                          noise)
    optimizer = torch.optim.Adam(engine.parameters, s.lr)
    average = [p.detach().clone() for p in engine.parameters]
    loss_fn, null = partial(diffusion.loss, schedule=s.schedule), null_condition(s, model, conditions)
    rows = accountant.ledger_rows(files.read_ledger(ledger), plan)
    done = resume(state_path, engine, average, optimizer)  # updates contained in the weights
    z, y = torch.randn(3, *latents.shape[2:], device=s.device), stand_in(model, 3, s.device)  # random: nothing private is seen
    dp_sgd.check_against_loop(engine, loss_fn, *diffusion.draw(z, y, s.noise_multiplicity, None, s.schedule))
    # A run with --insecure-seed is to be repeatable, and the draws depend on how a batch is cut.
    micro_batch = s.micro_batch or (256 if s.insecure_seed is not None else fastest_micro_batch(s, model, latents.shape[2:]))
    agreed(None)  # nobody writes before all have read
    if world() > 1:
        team.broadcast(engine.parameters)  # LoRA pairs start at random
    # A step in the ledger is spent, also one whose result a crash has lost: the run ends when the budget is spent.
    fits = micro_batch  # examples that fit into memory at a time
    bar = tqdm(range(len(rows), plan["steps"]), desc="3/3 private tuning", unit="step", initial=len(rows), total=plan["steps"],
               disable=rank() > 0, bar_format=None if s.show_private else QUIET_BAR)
    begin, examples = time.monotonic(), 0
    covered, every = len(rows), max(1, plan["steps"] // 100)  # tight accounting takes a tenth of a second
    so_far = epsilon_after(s, plan, covered)
    bar.set_postfix(epsilon=round_up(so_far))
    for step in bar:
        # ---- one private step ----------------------------------------------------------------------------------------
        batch = dp_sgd.poisson_sample(len(latents), plan["q"], sampler)  # may be empty: then noise only, and it counts
        for part in batch.to(s.device).split(micro_batch):
            drawn = diffusion.draw(latents[part], select(conditions, part), s.noise_multiplicity, generator, s.schedule, null,
                                   s.cond_drop)
            fits = accumulate_in_pieces(s, engine, loss_fn, drawn, fits)
        if world() > 1:
            team.reduce_sums(engine)
        rows.append({"step": step, "q": plan["q"], "sigma": plan["sigma"], "clip_norm": s.clip_norm, "batch_size": s.batch_size})
        files.append_row(rows[-1], ledger)
        if rank() == 0:
            engine.step(optimizer)
            update_ema(average, engine.parameters, s.ema, done)
        if world() > 1:
            team.broadcast(engine.parameters)
        # ---- end of the private step: from here on everything is post-processing -----------------------------------
        done, examples = done + 1, examples + engine.last["examples"]
        leaving = agreed(stop.asked) and len(rows) < plan["steps"]
        files.save({"tuned": dict(zip(engine.names, engine.parameters, strict=True)), "average": average,
                     "optimizer": optimizer.state_dict(), "done": done}, state_path)
        if len(rows) > covered:  # of the last step that the bar will show it for, so it is never too small
            covered = min(len(rows) + every - 1, plan["steps"])
            so_far = epsilon_after(s, plan, covered)
        files.append_row({"step": step, "epsilon": plain(so_far), **engine.last}, s.out / "internal" / "log.jsonl")
        shown = {"epsilon": round_up(so_far)}
        if s.show_private:  # exact numbers of private batches: epsilon does not cover them
            shown |= {"loss": f"{engine.last['loss']:.4f}",
                      "clipped": f"{engine.last['clipped_fraction']:.0%}",
                      "examples_per_s": f"{examples / (time.monotonic() - begin):.0f}"}
        bar.set_postfix(shown)
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


def check_finite(title, tensors):
    """Refuse a public network whose training has diverged; nothing is spent on it yet. ValueError."""
    if not all(bool(a.isfinite().all()) for a in tensors):
        raise ValueError(f"the public {title} holds numbers that are not finite: its training has diverged; "
                         "train it anew with a smaller learning rate")


def epsilon_after(s, plan, steps):
    """epsilon of the first `steps` steps of the plan."""
    return float(accountant.epsilon(plan["q"], plan["sigma"], steps, s.delta, s.accountant)) if steps else 0.0


def resume(path, engine, average, optimizer):
    """Load tuned parameters, EMA and optimiser, if there is a state -> updates they contain.

    Not more than the ledger has rows: run_folder.check_spent.
    """
    if not path.exists():
        return 0
    state = files.load(path)
    with files.understanding(path), torch.no_grad():
        done = state["done"] + 0
        torch._foreach_copy_(engine.parameters, [state["tuned"][name].to(engine.parameters[0]) for name in engine.names])
        torch._foreach_copy_(average, [a.to(average[0]) for a in state["average"]])
        load_optimizer(optimizer, state["optimizer"])
    return done


# ------------------------------------------------------------------------------------------------------------ the run


ASSUMED = {"folder:imagenet/train": (1_281_167, 1000), "folder:laion": (1_000_000, 1)}  # the authors' public sets


def find_set(s, name, split="train", **kwargs):
    """datasets.load as the settings ask; for --dry-run photographs are only listed, and a full set that is absent assumed."""
    try:
        return datasets.load(name, split, s.data_root, s.vae.resolution, channels=s.vae.in_channels, cache=s.cache,
                         decode=not s.dry_run, **kwargs)
    except datasets.DataError as error:
        entry = datasets.REGISTRY[datasets.kind_of(name)]
        n, classes = ASSUMED.get(name, (entry.n, len(entry.classes) or 2))
        n = kwargs.get("n") or n
        if not s.dry_run or not n:
            raise
        print(f"ASSUMED        n {n:,} and {classes} classes: {error}")
        shape = (n, s.vae.in_channels, s.vae.resolution, s.vae.resolution)
        return datasets.ImageSet(torch.empty(shape, dtype=torch.uint8, device="meta"), torch.zeros(n, dtype=torch.int64),
                                 list(map(str, range(classes))), side=s.vae.resolution, name=name)


def main(argv=None):
    begin = time.monotonic()
    join()
    s = once(parse, sys.argv[1:] if argv is None else argv)
    s.device = own_device(s.device)
    first = second = None
    if s.init and not s.resume:  # networks of an earlier run are taken as they are: their checkpoints say what they are
        first, second = (load_public(s.init / "public" / name) for name in ("vae.pt", "ldm.pt"))
        s.vae = vae.VAEConfig(**first["config"])
        if (made := checkpoints.condition_kind(second["embedder"])) == s.condition:
            s.unet, s.schedule = unet.UNetConfig(**second["unet"]), diffusion.Schedule(**second["schedule"])
            s.cond_drop *= second["embedder"]["null_class"] if second["embedder"] else 0
        else:  # another condition needs another diffusion model, but not another autoencoder
            print(f"note: {s.init} was trained with --condition {made}; only its autoencoder is reused")
            second = None
        for key in s.given:
            if key in VAE_FLAGS or second and key in ("ldm_steps", "ldm_batch", "ldm_lr"):
                print(f"note: --{key.replace('_', '-')} has no effect, the networks of {s.init} are taken as they are")
        for checkpoint in filter(None, (first, second)):
            classes = checkpoint.get("public_classes", s.public_classes)
            if checkpoint.get("trained_on") == s.public == "strokes" and classes != s.public_classes:
                raise ValueError(f"--public-classes {s.public_classes}: {s.init} was trained on {classes}; say --public-classes "
                                 f"{classes}, or leave out --init")
    public_stages = [c for c in (first, second) if c]
    if s.resume:
        paths = [s.out / "public" / name for name in ("vae.pt", "ldm.pt")]
        public_stages = [files.load(path) for path in paths if path.exists()]
    origins = {s.public, *(str(c.get("trained_on")) for c in public_stages)}
    # With --steps 0 too: the statement then says that no private image was read.
    if any(datasets.same_images(origin, s.private, s.data_root) for origin in origins):
        raise ValueError(f"--private {s.private}: the public networks know these pictures ({', '.join(sorted(origins))}), so "
                         "nothing would be private; choose another private or public set")
    s.bf16 = agreed(hardware.choose_bf16(s.precision, s.device))
    for key, value in (("size", s.vae.resolution), ("factor", 2 ** (len(s.vae.ch_mult) - 1)),
                       ("latent_channels", s.vae.embed_dim), ("width", s.unet.model_channels),
                       ("depth", s.unet.num_res_blocks), ("prediction", s.schedule.prediction)):
        if getattr(s, key) not in (None, value):
            flag = f"--{key.replace('_', '-')}"
            raise ValueError(f"{flag} {getattr(s, key)}: the network of {s.init} has {value}; leave out {flag}, or --init")
    # Both sets are read before the first long loop: nobody waits an hour to learn that a file is missing.
    # With --steps 0 no private picture is read at all.
    drawn = datasets.REGISTRY[datasets.kind_of(s.public)].drawn
    declared = s.classes and datasets.class_list(s.classes)
    if s.steps:
        find_private = partial(find_set, s, s.private, n=s.private_n, label_attribute=s.label_attribute, private=True,
                               classes=declared)
    else:  # names of classes and attributes only
        find_private = partial(datasets.describe, s.private, s.data_root, s.vae.resolution, s.vae.in_channels,
                               s.label_attribute, declared)
    find_public = partial(find_set, s, s.public, public_classes=s.public_classes if s.public == "strokes" else None,
                          n=200 if drawn and s.dry_run else s.public_n, seed=s.seed)
    if world() > 1:  # one process downloads what is missing, and tells what is wrong with it
        once(lambda: (find_private(), None)[1])
        once(lambda: (drawn or find_public(), None)[1])
    private, public = find_private(), find_public()
    for title, found in (("--public", public), ("--private", private)):
        if found.images.shape[1] != s.vae.in_channels:
            raise ValueError(f"{title} {found.name} has {found.images.shape[1]} colour channels, the autoencoder of preset "
                             f"{s.preset} takes {s.vae.in_channels}: choose another preset or set")
    if s.unet.in_channels != s.vae.embed_dim:
        raise ValueError(f"the UNet of preset {s.preset} takes {s.unet.in_channels} latent channels, the autoencoder makes "
                         f"{s.vae.embed_dim}: use --init with runs of this preset only")
    for found in (public, private):
        if note := datasets.enlarged(found.name, s.vae.resolution):
            print(f"note: {note}", file=sys.stderr)
    s.crop = private.side  # samples look like private pictures, whose padding is cut off again
    check_sampling(s)  # again: the noise schedule may be that of --init now
    plan = once(guarantee.privacy_plan, s, len(private) if s.steps else 0)
    embedder = second["embedder"] if second else embedder_entry(s, public, private)
    with torch.device("meta"):  # no memory; refuses a wrong --tune before any work
        model = unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder))
        lora.tuned(model, s)
    if s.condition == "text" and public.captions:
        words = [word for caption in public.captions for word in text.split(caption)]
        unknown = sum(map(len, map(checkpoints.build_tokenizer(embedder).unknown, public.captions)))
        print(f"captions       {unknown / max(1, len(words)):.0%} of the public captions' {len(words):,} words are not in the "
              "vocabulary, which is made from names of classes and attributes", file=sys.stderr)
    if s.dry_run:
        guarantee.print_plan(s, plan, model)
        needed = print_memory(s, model, public, private)
        with torch.device("meta"):
            size = count(model.parameters()) + count(vae.AutoencoderKL(s.vae).parameters())
        if size > 5e7 and s.device == "cpu":
            return print("time           not measured: networks of this size are for a GPU; run --dry-run there")
        if s.device == "cpu" and needed > (have := os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9):
            return print(f"time           not measured: a public step needs {needed:.0f} GB, this machine has {have:.0f}; choose "
                         "a smaller --vae-batch or --ldm-batch, or a larger --factor")
        return estimate(s, plan, embedder, [name for name, made in (("vae", first or s.init_ldm or s.init_vae),
                                                                    ("ldm", second or s.init_ldm)) if made])

    digests = public_digests(s, public.images)
    if s.steps:
        once(refuse_known, s, private.images, digests, public_stages)
    if (s.init_ldm or s.init_vae) and not s.resume:
        first, second = original_weights.convert(s, s.init_ldm, s.init_vae, s.init_scale, public.images, digests,
                                                 embedder, len(private.classes))
        check_sampling(s)
    stop = run_folder.Stop()
    once(run_folder.prepare, s.out, s.resume)
    once(run_folder.check_spent, s.out, plan)
    if not s.resume:
        for name, checkpoint in (("vae.pt", first), ("ldm.pt", second)):
            if checkpoint:
                files.save(checkpoint, s.out / "public" / name)
        if rank() == 0 and s.init and (s.init / "public" / "features.pt").exists():  # evaluate.py's: runs are judged alike
            shutil.copy(s.init / "public" / "features.pt", s.out / "public")
        files.write_json({k: plain(v) for k, v in vars(s).items()}, s.out / "internal" / "settings.json")
    agreed(None)  # nobody looks before all is written
    have = {name: (s.out / "public" / name).exists() for name in ("vae.pt", "ldm.pt")}
    first = load_public(s.out / "public" / "vae.pt") if have["vae.pt"] else train_autoencoder(s, public.images, stop)
    autoencoder, scale = checkpoints.build_vae(first), first["scale"]
    check_finite("autoencoder", [*autoencoder.parameters(), torch.tensor(float(scale))])
    second = load_public(s.out / "public" / "ldm.pt") if have["ldm.pt"] else train_diffusion(
        s, encode(s, autoencoder, shard(public.images), scale),
        find_conditions(s, own_part(public), embedder), embedder, stop, {"digests": digests, "classes": public.classes})
    s.trained_on = sorted({first["trained_on"], second["trained_on"]})
    s.public_weights = sorted({name for stage in (first, second) for name in stage.get("public_weights", ())})
    second = for_private_classes(second, private.classes)
    embedder = second["embedder"]

    model = hardware.laid_out(checkpoints.build_model(second)[0], s.device)
    check_finite("diffusion model", model.parameters())
    names = lora.tuned(model, s)
    guarantee.print_plan(s, plan, model)
    trained, rows = count(p for p in model.parameters() if p.requires_grad), []
    prompts = class_prompts(s, private) if s.condition == "text" else None
    for options in prompts or ():
        if (unknown := checkpoints.build_tokenizer(embedder).unknown(" ".join(options))) and rank() == 0:
            print(f"WARNING: the public model does not know {', '.join(unknown)}: train it anew, without "
                  "--init",
                  file=sys.stderr)
    if s.steps:
        facts = {**plan, "clip_norm": s.clip_norm, "clipping": s.clipping, "tuned": names,
                 "private_pictures": hashlib.sha256(private.images.numpy()).hexdigest()}
        once(run_folder.check_unchanged, plain(facts), s.out / "internal" / "plan.json")
        rows = tune_privately(s, model, encode(s, autoencoder, shard(private.images), scale),
                              find_conditions(s, own_part(private), embedder), plan, stop)
    if world() > 1:  # the rest is for one process
        done = rank() > 0
        agreed(None)
        dist.destroy_process_group()
        if done:
            return
    privacy = guarantee.privacy_statement(s, plan, rows, trained)
    write_release(s, first, second, model, private.classes, prompts, privacy, public)
    print(f"{s.out}/release: {privacy['statement']}; {(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    run_folder.run_cli(main)
