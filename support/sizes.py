"""Sizes of the authors' networks: `python -m support.sizes` prints their parameter counts and latents."""
import math

import torch

import tuning
import unet
import vae
from support.hardware import count
from support.paper_networks import AUTOENCODERS, UNETS


def main():
    for name, config in AUTOENCODERS.items():
        with torch.device("meta"):
            model = vae.AutoencoderKL(config)
        print(f"{name:16} autoencoder {count(model.parameters()):>12,}   latents {model.latent_shape} = "
              f"{math.prod(model.latent_shape)} numbers")
    for name, config in UNETS.items():
        with torch.device("meta"):
            model = unet.UNet(config)
        modules = tuning.attention_modules(model)
        attention = count(p for module in modules for p in module.parameters())
        total = count(model.parameters())
        print(f"{name:16} UNet        {total:>12,}   attention {attention:>12,} ({attention / total:.2%}) "
              f"in {len(modules)} modules")


if __name__ == "__main__":
    main()
