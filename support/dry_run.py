"""What a run will spend, known before it begins: epsilon, memory, minutes. For `train.py --dry-run`."""
import math
import os
from functools import partial

import torch

import datasets
import diffusion
import dp_sgd
import optim
import unet
import vae
from support import checkpoints, conditions, guarantee, hardware, trainable
from support.hardware import count, select
from support.settings import METHODS


def report(s, plan, embedder, public, private, known):
    """Print the privacy plan, memory and minutes. known: public networks that exist already, by file name."""
    embedder = conditions.tuned_entry(embedder, private.classes)
    with torch.device("meta"):  # shapes only
        model = unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder))
        trainable.choose(model, s)
        size = count(model.parameters()) + count(vae.AutoencoderKL(s.vae).parameters())
    guarantee.print_plan(s, plan, model)
    needed = print_memory(s, model, public, private)
    if size > 5e7 and s.device == "cpu":
        return print("time           not measured: networks of this size are for a GPU; run --dry-run there")
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if s.device == "cpu" and needed > have and len(known) < 2:
        return print(f"time           not measured: a public step needs {needed:.0f} GB, this machine has "
                     f"{have:.0f}; choose a smaller --vae-batch or --ldm-batch, or a larger --factor")
    estimate(s, plan, embedder, known)


def print_memory(s, model, public, private):
    """Print where the bytes go: weights with gradient, moments and EMA, activations of one image, images and
    latents.

    Runs the networks on the meta device, which computes shapes only: no memory, no time, however large they
    are. All that autograd keeps of one image is counted; the private stage keeps about the same
    (bench/dp_step.py). Returns the GB of the larger of the two public steps, batch included.
    """
    with torch.device("meta"):
        autoencoder = vae.AutoencoderKL(s.vae)
        x = torch.empty(1, s.vae.in_channels, s.vae.resolution, s.vae.resolution)

    of_autoencoder = hardware.bytes_for_backward(
        autoencoder, lambda: autoencoder.decode(autoencoder.encode(x).mean))
    of_unet = hardware.bytes_of_one_latent(model, autoencoder.latent_shape)
    public_n = len(public)  # a dry run draws few
    if datasets.unlimited(s.public):
        public_n = s.public_n or datasets.REGISTRY[datasets.parts(s.public)[0]].n
        for part in datasets.parts(s.public)[1:]:  # of a mix; n 0: not known before it is read
            public_n += min(public_n // 2, datasets.REGISTRY[datasets.kind_of(part)].n or public_n)
    stored = public_n + len(private)
    stored *= x.numel() + 4 * (1 + s.flips) * math.prod(autoencoder.latent_shape)
    # Public stages: weights, gradient, two moments, EMA.
    trained = count(p for p in model.parameters() if p.requires_grad)
    total, gb = count(model.parameters()), 1e9
    if s.perceptual_weight or s.adversarial_weight:
        print("               not counted below: the perceptual and the adversarial term of stage 1")
    print(f"memory, GB     autoencoder {20 * count(autoencoder.parameters()) / gb:.2f} + "
          f"{of_autoencoder / gb:.3f} an image, latent diffusion {20 * total / gb:.2f} + {of_unet / gb:.3f}, "
          f"private tuning {(4 * total + hardware.TUNED * trained) / gb:.2f} + {of_unet / gb:.3f}; images "
          f"and latents {stored / gb:.2f} in all")
    if "cuda" in s.device:
        per_image = hardware.bytes_of_one_image(s, of_unet, trained)
        free = hardware.free_memory(s.device)
        taken = hardware.micro_batch(s, model, autoencoder.latent_shape)
        n = hardware.largest_batch(free, 4 * total + hardware.TUNED * trained + stored, per_image)
        said = f"--micro-batch at most {n}" if n else "too little for one image of private tuning"
        print(f"               {free / gb:.1f} free on {s.device}, about {taken} private images at a time; "
              f"{said}")
    return max(20 * count(autoencoder.parameters()) + s.vae_batch * of_autoencoder,
               20 * total + s.ldm_batch * of_unet) / gb


def estimate(s, plan, embedder, known=()):
    """Print the minutes of each stage, extrapolated from one step on random data; 0 for networks that are
    `known`. Returns (autoencoder, latent diffusion, private tuning).
    """
    with torch.device(s.device):
        autoencoder = vae.AutoencoderKL(s.vae)
        model = unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder))
    autoencoder, model = hardware.laid_out(autoencoder, s.device), hardware.laid_out(model, s.device)
    trainable.choose(model, s)
    x = torch.rand(s.vae_batch, s.vae.in_channels, s.vae.resolution, s.vae.resolution, device=s.device)
    at_a_time = min(s.batch_size, hardware.micro_batch(s, model, autoencoder.latent_shape))
    z = torch.randn(max(at_a_time, s.ldm_batch), *autoencoder.latent_shape, device=s.device)
    y = hardware.stand_in(model, len(z), s.device)
    loss_fn = partial(diffusion.loss, schedule=s.schedule)
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, dp_sgd.CLIPPING[s.clipping],
                          METHODS[s.method])

    generator = torch.Generator(s.device)

    def minutes(times, f):
        f()
        # data, checkpoints and what else is not timed: about a tenth on top
        return 1.1 * times * hardware.seconds(s, f) / 60

    def public_minutes(network, steps, loss, recorded=True):  # recorded as in `train.fit`
        def gradients():
            with hardware.autocast(s):
                loss().backward()

        def step():
            gradients()
            for optimizer in optimizers:
                optimizer.step()

        optimizers = optim.PUBLIC[s.public_optimizer](network, 0.0)
        gradients = hardware.recorded(gradients, generator) if recorded else gradients
        return minutes(steps, step)

    def private_step():
        part = slice(0, at_a_time)
        drawn = diffusion.draw(z[part], select(y, part), s.noise_multiplicity, generator, s.schedule)
        engine.accumulate(loss_fn, *drawn)

    private = minutes(plan["steps"] * math.ceil(s.batch_size / at_a_time), private_step) + minutes(
        plan["steps"], lambda: dp_sgd.privatise(engine.sums, s.clip_norm, plan["sigma"], s.batch_size, None))
    model.requires_grad_(True)
    several = z[:s.ldm_batch], select(y, slice(0, s.ldm_batch))
    first = 0.0 if "vae.pt" in known else public_minutes(
        autoencoder, s.vae_steps, lambda: vae.loss(autoencoder, x, generator=generator)[0],
        recorded=not s.adversarial_weight)
    second = 0.0 if "ldm.pt" in known else public_minutes(
        model, s.ldm_steps,
        lambda: loss_fn(model, *diffusion.draw(*several, 1, generator, s.schedule)).mean())
    print(f"time           autoencoder {first:.1f}, latent diffusion {second:.1f}, private tuning "
          f"{private:.1f} minutes ({'bf16' if s.bf16 else 'float32'} on {s.device}, "
          f"{torch.get_num_threads()} threads)")
    return first, second, private
