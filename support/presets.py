"""Presets: the settings of `digits`, the default, and what the others change.

Every key is a flag of train.py (with _ for -) or the shape of a network or of the noise schedule. A preset
overrides settings of the default. The command line overrides both. The lines of a preset are in the order of
the method: data sets, stage 1 (vae), stage 2 (ldm), stage 3 (private), images at the end. The authors'
settings (DP-LDM, Liu et al. 2024, appendix) are the presets mnist-paper, cifar10 and celeba*; celeba256-text
has a smaller text encoder.
"""
from dataclasses import replace

import diffusion
from support.paper_networks import AUTOENCODERS, UNETS
from unet import UNetConfig
from vae import VAEConfig

# The first arguments of UNetConfig and of VAEConfig are input channels, output channels and width.
DIGITS = dict(
    public="strokes", public_classes="all", public_n=36_000,
    private="mnist10k", private_n=None, classes=None, label_attribute="Male", size=None, flips=False,
    condition="class", text_length=32, text_width=64, text_layers=2,
    public_optimizer="muon",  # of stages 1 and 2
    # stage 1
    vae=VAEConfig(ch=8, ch_mult=(1, 2, 4, 8)), factor=None, latent_channels=None,
    vae_steps=700, vae_batch=64, vae_lr=4e-3, kl_weight=1e-6,
    perceptual_weight=0.0, adversarial_weight=0.0, adversarial_start=0,
    # stage 2
    unet=UNetConfig(4, 4, 32, num_heads=4, context_dim=64, num_groups=8), width=None, depth=None,
    schedule=diffusion.Schedule("cosine", "v"), prediction=None,
    ldm_steps=1200, ldm_batch=256, ldm_lr=6e-3, cond_drop=0.1,
    # stage 3: the guarantee, then the rest
    epsilon=10.0, delta=1e-5, sigma=None, accountant="pld",
    batch_size=4000, steps=30, clip_norm=0.1, clipping="flat",
    tune="attention", from_block=0, private_optimizer="adam", lr=5e-3, ema=0.9999, noise_multiplicity=1,
    method="bookkeeping", micro_batch=256,
    # images at the end
    sample_steps=30, sample_eta=0.0, guidance=1.0,
)
# For 60,000 private images. A batch is then a smaller share of them, so the same epsilon allows more private
# steps. What limits the result then is the public model, so it is larger and trained longer.
LARGE = dict(
    public_optimizer="adamw", vae_steps=1500, vae_lr=3e-3,
    unet=replace(DIGITS["unet"], model_channels=48), ldm_steps=3500, ldm_lr=1.5e-3,
    batch_size=6000, steps=150, lr=3e-3)
# Larger still: worth half a point on MNIST at epsilon 10 (docs/lab-notebook.md).
WIDE = LARGE | dict(
    vae_steps=2500,
    unet=replace(DIGITS["unet"], model_channels=64), ldm_steps=5000, ldm_lr=1.2e-3,
    batch_size=10_000)
# The authors' settings for faces; large, for GPUs. Their epochs are turned into steps: epochs * n / batch,
# with n = 162,770 (CelebA), and n = 50,000 (CIFAR-10) for the preset cifar10.
CELEBA = dict(
    public="folder:imagenet/train", public_n=None, private="celeba", public_optimizer="adamw",
    vae_steps=200_000, vae_batch=16, vae_lr=1.6e-5,
    perceptual_weight=1.0, adversarial_weight=0.5, adversarial_start=50_000,
    schedule=diffusion.Schedule(beta_end=0.0195), ldm_steps=500_000, cond_drop=0.0,
    delta=1e-6, clip_norm=5e-4, micro_batch=64,
    sample_steps=200, sample_eta=1.0)
# An autoencoder that also encodes images of another kind than its public ones well (docs/results.md). For
# that it has latents of 8x8, batches of 16 and one normalisation group. It is slower, because the UNet has
# 64 tokens instead of 16. The UNet is that of DIGITS, narrower than LARGE's.
CAREFUL = dict(vae=VAEConfig(ch=8, ch_mult=(1, 2, 4), num_groups=1), vae_steps=10_000, vae_batch=16,
               unet=DIGITS["unet"])

PRESETS = {
    "digits": {},
    "mnist": dict(public="emnist", public_n=None, private="mnist", **WIDE),
    "mnist-strokes": dict(public_n=72_000, private="mnist", **WIDE),
    "mnist-letters": dict(public_n=72_000, public_classes="letters", private="mnist", **WIDE),
    "fashion": dict(public="mnist", public_n=None, private="fashion",
                    latent_channels=16, **LARGE),  # more channels than for strokes
    "fashion-8x8": dict(public="mnist", public_n=None, private="fashion", **LARGE | CAREFUL),
    "garments": dict(  # drawn garments: nothing is downloaded for the public stages
        public="garments", public_n=60_000, private="fashion",
        **LARGE | CAREFUL | dict(public_optimizer="muon", vae_steps=5000, vae_lr=6e-3,
                                 ldm_steps=4000, ldm_batch=96, ldm_lr=6e-3,
                                 # --batch-size 10000 is better and slower (docs/results.md)
                                 batch_size=3000, steps=160, private_optimizer="muon", lr=6e-3)),
    "mnist-paper": dict(  # the authors' networks and settings, but with one image channel; large, for a GPU
        public="emnist", public_n=None, private="mnist", public_optimizer="adamw",
        vae=replace(AUTOENCODERS["mnist"], in_channels=1, out_ch=1),
        vae_steps=60_000, vae_batch=100, vae_lr=4.5e-4,
        perceptual_weight=1.0, adversarial_weight=0.5, adversarial_start=50_000,
        unet=UNETS["mnist"], schedule=diffusion.PAPER,
        ldm_steps=50_000, ldm_batch=512, ldm_lr=2.5e-3, cond_drop=0.0,
        batch_size=2000, steps=6000, clip_norm=1e-3, lr=1e-3,
        sample_steps=200, sample_eta=1.0),
    "faces": dict(  # colour, 32 pixels, two CPU cores; an image of 3,072 numbers has a latent of 4x4x16 = 256
        public="public32", public_n=None, private="faces", flips=True, public_optimizer="adamw",
        vae=VAEConfig(3, 3, 16, (1, 2, 4, 8), z_channels=16, embed_dim=16),
        vae_steps=5000, vae_batch=64, vae_lr=2e-3,
        unet=UNetConfig(16, 16, 64, num_heads=4, context_dim=64, num_groups=16),
        ldm_steps=3000, ldm_batch=256, ldm_lr=1.2e-3,
        batch_size=2500, steps=40),
    "portraits": dict(  # the same with drawn faces as public images: 8x8x8 latents
        public="portraits+public32", public_n=40_000, private="faces", flips=True,
        vae=VAEConfig(3, 3, 16, (1, 2, 4), z_channels=8, embed_dim=8, num_groups=1),
        vae_steps=8000, vae_batch=8, vae_lr=5e-3,
        unet=UNetConfig(8, 8, 48, num_heads=4, context_dim=64, num_groups=8),
        ldm_steps=5000, ldm_batch=64, ldm_lr=6e-3,
        batch_size=5000, steps=20, lr=5e-4),  # larger steps undo the order of faces (docs/lab-notebook.md)
    "cifar10": CELEBA | dict(
        private="cifar10",
        vae=AUTOENCODERS["cifar10"],
        unet=UNETS["cifar10"], schedule=diffusion.PAPER, ldm_batch=200, ldm_lr=2e-4, cond_drop=0.1,
        # sigma * C / B is about 5e-10, below Adam's eps of 1e-8: the steps are far smaller than lr
        delta=1e-5, batch_size=2000, steps=750, clip_norm=1e-6, lr=2e-3, from_block=8),
    "celeba32": CELEBA | dict(
        condition="none",
        vae=AUTOENCODERS["cifar10"],
        unet=UNETS["celeba32"], ldm_batch=384, ldm_lr=1.9e-4,
        batch_size=2048, steps=5563, lr=1e-3),
    "celeba64": CELEBA | dict(
        condition="none",
        vae=AUTOENCODERS["celeba64"],
        unet=UNETS["celeba64"], ldm_batch=75, ldm_lr=7.5e-5,
        batch_size=8192, steps=1391, lr=8.2e-4),
    "celeba256-text": CELEBA | dict(  # on all of CelebA; the authors used 30,000 images of CelebA-HQ
        public="folder:laion",
        condition="text", text_length=56, text_width=512, text_layers=4,  # theirs: 32 layers of width 1280
        vae=AUTOENCODERS["celeba256-text"], vae_batch=4,
        unet=UNETS["celeba256-text"], schedule=diffusion.Schedule(beta_start=0.00085, beta_end=0.012),
        ldm_batch=16, ldm_lr=5e-5, cond_drop=0.1,
        batch_size=256, steps=6358, clip_norm=1e-3, lr=2.6e-7),
    "smoke": dict(  # tiny, for tests
        public_n=400, private_n=1000,
        vae=VAEConfig(ch=8, ch_mult=(1, 1, 2, 2)), vae_steps=20, vae_batch=32,
        unet=UNetConfig(4, 4, 32, attention_resolutions=(2,), context_dim=8, num_groups=8),
        ldm_steps=20, ldm_batch=64,
        batch_size=100, steps=4, micro_batch=32,
        sample_steps=4),
}
