"""What a run will spend, known before it begins: epsilon, memory, minutes. For `train.py --dry-run`."""
import os
from functools import partial

import torch

import datasets
import diffusion
import dp_sgd
import unet
import vae
from extensions import lora
from support import checkpoints, guarantee, hardware
from support.hardware import count, select
from support.settings import GRADIENTS


def report(s, plan, embedder, public, private, known):
    """Print the privacy plan, memory and minutes. known: public networks that exist already, by file name."""
    with torch.device("meta"):  # shapes only
        model = unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder))
        lora.tuned(model, s)
        size = count(model.parameters()) + count(vae.AutoencoderKL(s.vae).parameters())
    guarantee.print_plan(s, plan, model)
    needed = print_memory(s, model, public, private)
    if size > 5e7 and s.device == "cpu":
        return print("time           not measured: networks of this size are for a GPU; run --dry-run there")
    have = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    if s.device == "cpu" and needed > have:
        return print(f"time           not measured: a public step needs {needed:.0f} GB, this machine has "
                     f"{have:.0f}; choose a smaller --vae-batch or --ldm-batch, or a larger --factor")
    estimate(s, plan, embedder, known)


def print_memory(s, model, public, private):
    """Print where the bytes go: weights with gradient, Adam and EMA, activations of one image, images and
    latents.

    Runs the networks on the meta device, which computes shapes only: no memory, no time, however large they
    are. All that autograd keeps of one image is counted; the private stage keeps about the same
    (bench/dp_step.py). Returns the GB of the larger of the two public steps, batch included.
    """
    with torch.device("meta"):
        autoencoder = vae.AutoencoderKL(s.vae)
        x = torch.empty(1, s.vae.in_channels, s.vae.resolution, s.vae.resolution)
        z, t = torch.empty(1, *autoencoder.latent_shape), torch.zeros(1, dtype=torch.int64)

    def kept(network, f):
        weights, seen = {p.untyped_storage()._cdata for p in network.parameters()}, {}
        with torch.autograd.graph.saved_tensors_hooks(lambda a: seen.update({a.untyped_storage()._cdata: a})
                                                      or a, lambda a: a):
            out = f()  # keeps the graph, and with it the storages, until they are counted
        kept_alive = [a for key, a in seen.items() if key not in weights]
        return sum(a.untyped_storage().nbytes() for a in kept_alive) + 0 * len(out)

    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(True)
    first = kept(autoencoder, lambda: autoencoder.decode(autoencoder.encode(x).mean))
    second = kept(model, lambda: model(z, t, hardware.stand_in(model, 1, "meta")))
    for name, p in model.named_parameters():
        p.requires_grad_(wanted[name])
    many = len(public)  # a dry run draws few
    if datasets.unlimited(s.public):
        many = s.public_n or datasets.REGISTRY[datasets.parts(s.public)[0]].n
        for part in datasets.parts(s.public)[1:]:  # of a mix; n 0: not known before it is read
            many += min(many // 2, datasets.REGISTRY[datasets.kind_of(part)].n or many)
    stored = many + len(private)
    stored *= x.numel() + 4 * (1 + s.flips) * z.numel()
    # Weights, gradient, two moments, EMA; tuned ones: moments, EMA, clipped sum, a micro-batch's sum, noise.
    trained = count(p for p in model.parameters() if p.requires_grad)
    total, big = count(model.parameters()), 1e9
    if s.perceptual_weight or s.adversarial_weight:
        print("               not counted below: the perceptual and the adversarial term of stage 1")
    print(f"memory, GB     autoencoder {20 * count(autoencoder.parameters()) / big:.2f} + {first / big:.3f} "
          f"an image, latent diffusion {20 * total / big:.2f} + {second / big:.3f}, private tuning "
          f"{(4 * total + 24 * trained) / big:.2f} + {second / big:.3f}; images and latents "
          f"{stored / big:.2f} in all")
    if "cuda" in s.device:
        per_image = s.noise_multiplicity * second + 4 * trained * (s.method == "vmap")
        free, _ = torch.cuda.mem_get_info(s.device)
        n = largest_batch(free, 4 * total + 24 * trained + stored, per_image)
        said = f"--micro-batch at most {n}" if n else "too little for one image of private tuning"
        print(f"               {free / big:.1f} free on {s.device}: {said}")
    return max(20 * count(autoencoder.parameters()) + s.vae_batch * first,
               20 * total + s.ldm_batch * second) / big


def largest_batch(free, fixed, per_image):
    """Largest number of images at a time, from three numbers of bytes; 0 if not even one fits.

    A tenth of the free memory is left to the allocator, and an image takes a third more than what autograd
    keeps of it: gradients on their way, and the Gram matrices of book-keeping (bench/dp_step.py).
    """
    return max(0, int((0.9 * free - fixed) / (4 / 3 * per_image)))


def estimate(s, plan, embedder, known=()):
    """Print the minutes of each stage, extrapolated from one step on random data; 0 for networks that are
    `known`. Returns (autoencoder, latent diffusion, private tuning).
    """
    with torch.device(s.device):
        autoencoder = vae.AutoencoderKL(s.vae)
        model = unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder))
    autoencoder, model = hardware.laid_out(autoencoder, s.device), hardware.laid_out(model, s.device)
    lora.tuned(model, s)
    x = torch.rand(s.vae_batch, s.vae.in_channels, s.vae.resolution, s.vae.resolution, device=s.device)
    z = torch.randn(s.ldm_batch, *autoencoder.latent_shape, device=s.device)
    y = hardware.stand_in(model, s.ldm_batch, s.device)
    loss_fn = partial(diffusion.loss, schedule=s.schedule)
    engine = dp_sgd.DPSGD(model, s.clip_norm, plan["sigma"], s.batch_size, dp_sgd.CLIPPING[s.clipping],
                          GRADIENTS[s.method])
    size = s.micro_batch
    few = slice(0, min(size, len(z)))

    def minutes(times, f):
        f()
        # optimiser, data and checkpoints: about a tenth on top
        return 1.1 * times * hardware.seconds(s, f) / 60

    def private_step():
        drawn = diffusion.draw(z[few], select(y, few), s.noise_multiplicity, None, s.schedule)
        engine.accumulate(loss_fn, *drawn)

    private = minutes(plan["steps"] * s.batch_size / len(z[few]), private_step)
    model.requires_grad_(True)
    first = 0.0 if "vae.pt" in known else minutes(s.vae_steps, lambda: vae.loss(autoencoder, x)[0].backward())
    second = 0.0 if "ldm.pt" in known else minutes(
        s.ldm_steps, lambda: loss_fn(model, *diffusion.draw(z, y, 1, None, s.schedule)).mean().backward())
    print(f"time           autoencoder {first:.1f}, latent diffusion {second:.1f}, private tuning "
          f"{private:.1f} minutes ({'bf16' if s.bf16 else 'float32'} on {s.device}, "
          f"{torch.get_num_threads()} threads)")
    return first, second, private
