"""The authors' networks, which the presets mnist-paper, cifar10 and celeba* use (DP-LDM, appendix).

`python -m support.paper_networks` prints their sizes. extensions/original_weights.py reads weights that were
trained for them.
"""
import math

import torch

import tuning
from support.hardware import count
from unet import UNet, UNetConfig
from vae import AutoencoderKL, VAEConfig

AUTOENCODERS = {  # the fields in the order of VAEConfig
    "mnist": VAEConfig(3, 3, 128, (1, 2, 3, 5), 2, (32, 16, 8), 32, 3, 3, 32),
    "cifar10": VAEConfig(3, 3, 128, (1, 2), 2, (16, 8), 32, 3, 3, 32),
    "celeba64": VAEConfig(3, 3, 192, (1, 2), 2, (16, 8), 64, 3, 3, 32),
    "celeba256-text": VAEConfig(3, 3, 128, (1, 2, 4, 4), 2, (), 256, 4, 4, 32),
}
DEEP, PLAIN = dict(num_res_blocks=2, num_heads=8), dict(use_scale_shift_norm=False, resblock_updown=False)
FACES = dict(channel_mult=(1, 2, 4), attention_resolutions=(4, 2, 1), use_spatial_transformer=False,
             context_dim=None)
UNETS = {
    "mnist": UNetConfig(num_heads=4),  # pre-trained with 2 heads, tuned with 4: the weights' shapes agree
    "cifar10": UNetConfig(3, 3, 128, channel_mult=(1, 2, 2, 4), attention_resolutions=(1, 2, 4),
                          context_dim=512, **DEEP, **PLAIN),
    "celeba32": UNetConfig(3, 3, 192, num_head_channels=32, **DEEP, **FACES),
    "celeba64": UNetConfig(3, 3, 128, **DEEP, **FACES),
    "celeba256-text": UNetConfig(4, 4, 320, channel_mult=(1, 2, 4, 4), attention_resolutions=(4, 2, 1),
                                 context_dim=1280, **DEEP, **PLAIN),
}


def main():
    """Print parameter counts and latents of all of them."""
    for name, config in AUTOENCODERS.items():
        with torch.device("meta"):
            model = AutoencoderKL(config)
        print(f"{name:16} autoencoder {count(model.parameters()):>12,}   latents {model.latent_shape} = "
              f"{math.prod(model.latent_shape)} numbers")
    for name, config in UNETS.items():
        with torch.device("meta"):
            model = UNet(config)
        modules = tuning.attention_modules(model)
        attention = count(p for module in modules for p in module.parameters())
        total = count(model.parameters())
        print(f"{name:16} UNet        {total:>12,}   attention {attention:>12,} ({attention / total:.2%}) "
              f"in {len(modules)} modules")


if __name__ == "__main__":
    main()
