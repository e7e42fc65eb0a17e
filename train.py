"""DP-LDM from start to end: two public stages, one private stage, and a release folder that may be published.

Implements *Differentially Private Latent Diffusion Models* (Liu, Lyu, Vinaroz, Park; TMLR 2024), section 3
and Algorithm 1. It puts the other files together:

    1  train_autoencoder   KL autoencoder on public images               -> public/vae.pt
    2  train_diffusion     latent diffusion model on public latents      -> public/ldm.pt
    3  tune_privately      attention modules and condition embedder on private latents, by DP-SGD -> release/

    python train.py                          the default preset `digits`: no download, no GPU needed, minutes
    python train.py --dry-run                privacy plan, parameter counts, time estimate; then stop
    python train.py --resume --out runs/x    go on where a stopped run was
    python train.py --epsilon 1 --lr 2e-3 --init runs/digits --out runs/digits-eps1     the private stage anew
    torchrun --nproc_per_node=4 train.py     four processes share every batch; the guarantee stays the same

In all functions s is the settings (support/settings.py), and stop.asked tells of Ctrl-C. A run
folder has public/, internal/ (never publish it) and release/. The ledger is a file in internal/ with one row
for every private step. A private step is one Poisson batch, one ledger row, one noise addition, one update of
the weights and of their exponential moving average (EMA), which is the result of a stage. Files outside
internal/ depend on private images only through noisy gradients, and through noisy counts of votes where the
public set is `voted:RUN` (extensions/vote.py). Three facts count as public: the number of
private images, their side in pixels, and the names of their classes and attributes.
"""
from support import threads  # noqa: F401, I001 (first: sets OpenMP variables, which torch reads when loaded)

import time
from dataclasses import asdict
from functools import partial

import torch

import diffusion
import dp_sgd
import optim
import unet
import vae
from datasets import pixels
from extensions import perceptual
from support import (
    checkpoints, command_line, conditions, dry_run, guarantee, hardware, progress, run_folder, start, team,
    trainable)
from support.bars import tqdm
from support.hardware import autocast, select
from support.randomness import generators
from support.release import write_release
from support.settings import METHODS
from support.team import rank, share
from support.watch import save_reconstructions, watcher

# ------------------------------------------------------------------------------------------ the public stages


def fit(s, title, model, loss_fn, steps, peak, decay, state_path, stop, adversary=None):
    """The loop of stages 1 and 2, on public data. On return the model holds the EMA of its weights.

    loss_fn(generator) -> (loss of one batch, {name: metric} for the bar). peak: the largest learning rate.
    decay: that of the EMA. adversary: a module that trains itself within loss_fn, or None; its state is saved
    with the model's. With several processes, each draws its share of the batch with its own seed, and all
    apply the mean gradient.
    """
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizers = optim.PUBLIC[s.public_optimizer](model, peak)
    generator = torch.Generator(s.device).manual_seed(s.seed + 1 + 1_000_000 * rank())
    state = progress.Public(s, state_path, model, average, optimizers, generator, adversary, stop)

    def backward():  # gradients of the loss of one batch; returns its metrics
        model.zero_grad()
        with autocast(s):
            loss, metrics = loss_fn(generator)
        loss.backward()
        return metrics

    # On a GPU `backward` becomes a CUDA graph; zero_grad is in it, so that replays do not add up. With an
    # adversary that is not possible: it counts its steps and runs its own optimizer.
    if adversary is None:
        backward = hardware.recorded(backward, generator)
    for step in state.steps(title, steps):
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = optim.learning_rate(step, steps, peak)
        metrics = backward()
        team.mean_gradients(parameters, adversary)  # over the processes
        # Clip the norm of the mean gradient, for stability. Both losses are scaled to begin at about 1, so
        # one limit fits both. This is not DP.
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for optimizer in optimizers:
            optimizer.step()
        optim.update_ema(average, parameters, decay, step)
        state.show(step, metrics)
        state.keep(step + 1)  # for --resume, once a minute; leaves here after Ctrl-C
    torch._foreach_copy_([p.data for p in parameters], average)
    team.broadcast(parameters)  # machines may round differently: all go on with rank 0's


def train_autoencoder(s, images, public_facts, stop):
    """Stage 1 (Rombach et al. 2022, section 3.1): images (N, C, H, W) uint8 -> content of public/vae.pt.

    public_facts: what the checkpoint says of the public set (`start.read_sets`). The perceptual and the
    adversarial term of Rombach et al. are used where their weights are above 0 (extensions/perceptual.py).
    """
    torch.manual_seed(s.seed)
    model = hardware.laid_out(vae.AutoencoderKL(s.vae), s.device)
    distance, adversary, origin = perceptual.terms(s)
    images = hardware.kept_on(images, s.device)

    def loss_fn(generator):
        index = torch.randint(len(images), (share(s.vae_batch),), generator=generator, device=s.device)
        x = pixels.to_float(images[index.to(images.device)].to(s.device))  # [-1, 1]
        loss, error, kl = vae.loss(model, x, s.kl_weight, generator, distance, s.perceptual_weight, adversary)
        # vae.loss is a sum over pixels and channels. Their mean begins at about 1, as `fit` expects.
        return loss / images[0].numel(), {"error": error, "kl": kl}

    state_path = s.out / "internal" / "vae_state.pt"
    fit(s, "1/3 autoencoder", model, loss_fn, s.vae_steps, s.vae_lr, decay=0.99,  # EMA over about 100 steps
        state_path=state_path, stop=stop, adversary=adversary)
    model.eval()
    shown = pixels.to_float(pixels.some(images).to(s.device))
    # The scale of PUBLIC images: that of private images would leak (docs/pitfalls.md, row 13).
    scale = team.from_rank0(vae.latent_scale(model, shown))
    save_reconstructions(model, shown[:32], s.out / "public" / "autoencoder.png")
    return {"config": asdict(s.vae), "state": model.state_dict(), "scale": scale, "steps": s.vae_steps,
            **origin, **public_facts}


def train_diffusion(s, latents, cond, embedder_entry, public_facts, stop):
    """Stage 2 (Liu et al. 2024, section 3): public latents (N, F, C, h, w) -> content of public/ldm.pt.

    F orientations: the image and maybe its mirror image. cond: N classes, N rows of tokens, or None.
    embedder_entry: the description of the condition embedder (`conditions.embedder_entry`).
    """
    torch.manual_seed(s.seed)
    network = unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder_entry))
    model = hardware.laid_out(network, s.device)
    null = conditions.null(s, model, cond)  # "no condition", or None if conditions are never dropped

    def loss_fn(generator):
        index = torch.randint(len(latents), (share(s.ldm_batch),), generator=generator, device=s.device)
        batch = diffusion.draw(latents[index], select(cond, index), K=1, generator=generator,
                               schedule=s.schedule, null=null, drop=s.cond_drop)
        loss = diffusion.loss(model, *batch, schedule=s.schedule).mean()
        return loss, {"loss": loss.detach()}

    state_path = s.out / "internal" / "ldm_state.pt"
    fit(s, "2/3 latent diffusion", model, loss_fn, s.ldm_steps, s.ldm_lr, decay=0.995,  # EMA over about 200
        state_path=state_path, stop=stop)
    return {"unet": asdict(s.unet), "embedder": embedder_entry, "schedule": asdict(s.schedule),
            "model": model.state_dict(), "steps": s.ldm_steps, **public_facts}


@torch.no_grad()
def encode(s, autoencoder, images, scale):
    """Images (N, C, H, W) uint8 -> scaled latents (N, F, embed_dim, h, w), F = 2 with mirror images, else 1.

    Done once, before training. A latent is the mean of the posterior, whose standard deviation is tiny at a
    KL weight of 1e-6. Each latent depends on its own image only. So clipping per example bounds what one
    image can do.
    """
    autoencoder = hardware.laid_out(autoencoder, s.device)
    latents = []
    # As many images at a time as have 512,000 pixels: 500 of 32 x 32. The last part is filled up, because a
    # batch of another size may round differently. Then one image more would change latents of others.
    at_a_time = max(1, 512_000 // s.vae.resolution ** 2)
    for part in tqdm(images.split(at_a_time), desc="    encoding", unit="batch", leave=False,
                     disable=rank() > 0):
        x = pixels.to_float(part.to(s.device))
        x = torch.cat([x, x.new_zeros(at_a_time - len(part), *x.shape[1:])])
        views = [x, x.flip(-1)] if s.flips else [x]
        z = torch.stack([autoencoder.encode(view).mean * scale for view in views], 1)
        latents.append(z[:len(part)])
    return torch.cat(latents).contiguous()


# ------------------------------------------------------------------------------------------ the private stage


def tune_privately(s, model, latents, cond, plan, stop, watch=None):
    """Stage 3, Algorithm 1 of the paper: DP-SGD on the trainable parameters of `model` -> ledger rows.

    latents (n, F, C, h, w) of the private images; cond: n conditions or None. Each of several processes
    gets its own part of both. On return the tuned parameters hold their EMA (with several, on rank 0).
    """
    rng = generators(s)  # seeds unknown and never saved, except with --insecure-seed
    clipping, method = dp_sgd.CLIPPING[s.clipping], METHODS[s.method]
    engine = dp_sgd.DPSGD(model, s.clip_norm, noise_multiplier=plan["sigma"],
                          expected_batch_size=s.batch_size, clipping=clipping, method=method,
                          generator=rng.noise)
    optimizers = optim.PRIVATE[s.private_optimizer](model, s.lr)
    average = [p.detach().clone() for p in engine.parameters]
    state = progress.Private(s, plan, engine, average, optimizers, stop)
    loss_fn, null = partial(diffusion.loss, schedule=s.schedule), conditions.null(s, model, cond)
    # Does the fast method find this network's gradients? Tried on three random latents: nothing private is
    # seen, and examples that get mixed up would show.
    z, y = torch.randn(3, *latents.shape[2:], device=s.device), hardware.stand_in(model, 3, s.device)
    dp_sgd.check_against_loop(engine, loss_fn, *diffusion.draw(z, y, s.noise_multiplicity, None, s.schedule))
    team.broadcast(engine.parameters)  # all start from rank 0's: LoRA matrices are drawn at random
    size = hardware.micro_batch(s, model, latents.shape[2:])  # images at a time

    for step in state.steps():
        # A Poisson batch: every image independently with probability q. An empty one is a step too.
        batch = dp_sgd.poisson_sample(len(latents), plan["q"], rng.sampling)
        for part in batch.to(s.device).split(size):
            # K draws of timestep and noise for each image; its loss is their mean.
            drawn = diffusion.draw(latents[part], select(cond, part), K=s.noise_multiplicity,
                                   generator=rng.diffusion, schedule=s.schedule, null=null, drop=s.cond_drop)
            # One gradient per image, clipped to length C, all summed. The size of the parts decides which
            # draws an image gets. For given draws the sum is the same up to rounding, for which the noise
            # allows (dp_sgd.ROUNDING).
            with autocast(s):
                engine.accumulate(loss_fn, *drawn)
        team.reduce_sums(engine)
        # The step is spent BEFORE its result exists: a crash may lose a result, never a ledger row.
        state.spend(step)
        if rank() == 0:
            engine.step(*optimizers)  # noise once, division by the EXPECTED batch size, update
            # state.done: updates before this one, fewer than `step` if a crash has lost a spent step.
            optim.update_ema(average, engine.parameters, s.ema, state.done)
        team.broadcast(engine.parameters)
        # The weights are now covered by epsilon. The metrics that `keep` logs in internal/ are not.
        state.keep(step)
        if watch:  # --watch: images drawn from the present weights, into internal/progress.png
            watch(step)

    torch._foreach_copy_([p.data for p in engine.parameters], average)
    return state.finished()


# ---------------------------------------------------------------------------------------------------- the run


def inputs(s, autoencoder, scale, image_set, embedder_entry):
    """What the diffusion model sees of this process's part of an ImageSet: (latents, conditions)."""
    part = team.shard(image_set)
    return encode(s, autoencoder, part.images, scale), conditions.of(s, part, embedder_entry)


@run_folder.handlers_restored
def main(argv=None):
    """The whole method. Raises ValueError, one line, for anything that cannot be done."""
    begin = time.monotonic()
    s, known = start.settings_of(argv)  # preset and flags; `known`: public networks that exist already
    # ValueError if a private image is a public one too.
    public, private, public_facts = start.read_sets(s, known)
    votes = [*public_facts["before"].values()]  # on drawings (extensions/vote.py): part of the plan
    plan = team.once(guarantee.privacy_plan, s, len(private), votes)  # q, sigma, T; delta < 1/n
    embedder_entry = start.embedder(s, known, public, private)  # from names and public captions only
    if s.dry_run:
        return dry_run.report(s, plan, embedder_entry, public, private, known)
    run = run_folder.RunFolder(s, plan, known, public_facts)  # locked; resumed without loss

    # ---- public stages: they cost no privacy (but for a vote on the drawings, which the plan includes)
    vae_checkpoint = run.cached("vae.pt", lambda: train_autoencoder(s, public.images, public_facts, run.stop))
    autoencoder, scale = checkpoints.build_vae(vae_checkpoint), vae_checkpoint["scale"]

    def trained_on_public_latents():
        latents, cond = inputs(s, autoencoder, scale, public, embedder_entry)
        return train_diffusion(s, latents, cond, embedder_entry, public_facts, run.stop)

    ldm_checkpoint = run.cached("ldm.pt", trained_on_public_latents)

    # ---- private stage: the only block that learns from private images
    ldm_checkpoint = conditions.for_private_classes(ldm_checkpoint, private.classes)  # embeddings by name
    model = hardware.laid_out(checkpoints.build_model(ldm_checkpoint)[0], s.device)
    names = trainable.choose(model, s)  # as --tune says; by default attention and condition embedder
    guarantee.print_plan(s, plan, model)
    tuned_count = hardware.count(p for p in model.parameters() if p.requires_grad)
    rows = []  # of the ledger; none if --steps 0
    if plan["steps"]:
        run.check_unchanged(plan, names, private)
        latents, cond = inputs(s, autoencoder, scale, private, ldm_checkpoint["embedder"])
        watch = watcher(s, plan, model, autoencoder, scale, private, ldm_checkpoint["embedder"])
        rows = tune_privately(s, model, latents, cond, plan, run.stop, watch)

    # ---- release: post-processing costs no privacy. Of `private` only the three facts named above go in
    if team.dismiss_others():
        return
    privacy = guarantee.privacy_statement(s, plan, rows, tuned_count, (vae_checkpoint, ldm_checkpoint))
    write_release(s, vae_checkpoint, ldm_checkpoint, model, private, privacy, public)
    print(f"{s.out}/release: {privacy['statement']}; {(time.monotonic() - begin) / 60:.1f} minutes")


if __name__ == "__main__":
    command_line.run_cli(main)
