"""The authors' networks, which the presets mnist-paper, cifar10 and celeba* use (DP-LDM, appendix).

`python -m support.sizes` prints their sizes. extensions/original_weights.py reads weights trained for them.
"""
from unet import UNetConfig
from vae import VAEConfig

AUTOENCODERS = {  # the fields in the order of VAEConfig
    "mnist": VAEConfig(3, 3, 128, (1, 2, 3, 5), 2, (32, 16, 8), 32, 3, 3, 32),
    "cifar10": VAEConfig(3, 3, 128, (1, 2), 2, (16, 8), 32, 3, 3, 32),
    "celeba64": VAEConfig(3, 3, 192, (1, 2), 2, (16, 8), 64, 3, 3, 32),
    "celeba256-text": VAEConfig(3, 3, 128, (1, 2, 4, 4), 2, (), 256, 4, 4, 32),
}
UNETS = {  # the fields in the order of UNetConfig
    "mnist": UNetConfig(num_heads=4),  # pre-trained with 2 heads, tuned with 4: the weights' shapes agree
    "cifar10": UNetConfig(3, 3, 128, (1, 2, 2, 4), 2, (1, 2, 4), 8, None, True, 1, 512, False, False),
    "celeba32": UNetConfig(3, 3, 192, (1, 2, 4), 2, (4, 2, 1), 8, 32, False, 1, None, True, True),
    "celeba64": UNetConfig(3, 3, 128, (1, 2, 4), 2, (4, 2, 1), 8, None, False, 1, None, True, True),
    "celeba256-text": UNetConfig(4, 4, 320, (1, 2, 4, 4), 2, (4, 2, 1), 8, None, True, 1, 1280, False, False),
}
