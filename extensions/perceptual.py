"""Two further terms of the autoencoder's loss for large images: how an image looks, and if it looks real.

Rombach et al. (2022, appendix G) train their first stage with both, as Esser et al. (2021) did before. With
|x - y| alone large images stay blurred. Many sharp images fit a latent, and the safest answer is their median
at each pixel, which is blurred. `vae.loss` takes both terms as arguments; train.py's flags are
--perceptual-weight and --adversarial-weight.
"""
import sys

import torch
import torch.nn.functional as F
from torch import nn


def perceptual_distance(device="cpu"):
    """(name, distance): distance(x, y) -> (N,) says how different images (N, 1 or 3, H, W) in [-1, 1] look.

    "vgg16": LPIPS (Zhang et al. 2018, Eq. 1) with equal weights. The features at five depths of torchvision's
    VGG16 (relu1_2 to relu5_3) are scaled to unit length at every pixel; squared distance, mean over pixels
    and over the five depths. "image gradients", where its weights (528 MB) are neither in torch hub's cache
    nor downloadable: `gradient_distance`.
    """
    from torchvision.models import vgg16
    try:
        network = vgg16(weights="IMAGENET1K_V1", progress=False).features[:30]
    except (OSError, RuntimeError):  # no network, or a damaged download
        return "image gradients", gradient_distance
    network.eval().requires_grad_(False).to(device)
    # Mean and deviation of ImageNet's colours, (3, 1, 1) each.
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=device)[..., None, None]

    def distance(x, y):
        h, total = (torch.cat([x, y]).expand(-1, 3, -1, -1) * 0.5 + 0.5 - mean) / std, 0.0
        for i, layer in enumerate(network):
            h = layer(h)
            if i in (3, 8, 15, 22, 29):  # relu1_2, relu2_2, relu3_3, relu4_3, relu5_3
                a, b = F.normalize(h, dim=1).chunk(2)
                total = total + (a - b).square().sum(1).mean((1, 2)) / 5
        return total

    return "vgg16", distance


def gradient_distance(x, y):
    """Mean absolute difference of the horizontal and vertical gradients of x and y, (N,): punishes blur."""
    d = x - y
    return d.diff(dim=3).abs().mean((1, 2, 3)) + d.diff(dim=2).abs().mean((1, 2, 3))


class Adversary(nn.Module):
    """Patch discriminator with its own Adam; `adversary(x, y, reconstruction, last)` is its term of the loss.

    It judges overlapping 70-pixel patches (Isola et al. 2017, appendix 6.1.2), is trained by the hinge loss
    and starts after `start` steps, when images are good enough to be judged. GroupNorm stands for the
    original's BatchNorm: an image's score then depends on that image only, and there are no running
    statistics to go wrong. Discriminator step first, then the autoencoder's term by the updated weights.
    `state_dict()` holds all that resuming needs, Adam's state included.
    """

    def __init__(self, channels, weight=0.5, start=0, lr=4.5e-4, width=64):
        super().__init__()
        self.weight, self.start, self.step = weight, start, 0
        widths = [width, 2 * width, 4 * width, 8 * width]
        layers = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
        for a, b, stride in zip(widths, widths[1:], (2, 2, 1), strict=False):
            layers += [nn.Conv2d(a, b, 4, stride, 1, bias=False), nn.GroupNorm(32, b), nn.LeakyReLU(0.2)]
        # (N, C, H, W) -> (N, 1, H/8 - 2, W/8 - 2)
        self.net = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 4, 1, 1))
        for m in self.net:
            if isinstance(m, nn.Conv2d):
                nn.init.normal_(m.weight, std=0.02)
        self.optimizer = torch.optim.Adam(self.net.parameters(), lr, betas=(0.5, 0.9))

    def forward(self, x, y, reconstruction, last):
        """x real, y decoded (N, C, H, W); reconstruction loss (scalar); last weight of the decoder -> scalar.

        The term's weight is adaptive (Esser et al. 2021, Eq. 7): at `last` its gradient is `weight` times as
        long as that of the reconstruction.
        """
        self.step += 1
        if self.step <= self.start:
            return reconstruction.new_zeros(())
        self.net.requires_grad_(True)
        real, fake = self.net(torch.cat([x, y.detach()])).chunk(2)
        self.optimizer.zero_grad()
        (F.relu(1 - real).mean() + F.relu(1 + fake).mean()).mul(0.5).backward()
        self.optimizer.step()
        self.net.requires_grad_(False)  # the autoencoder's backward pass leaves no gradient here
        term = -self.net(y).mean()
        pull, push = (torch.autograd.grad(a, last, retain_graph=True)[0].norm()
                      for a in (reconstruction, term))
        return self.weight * (pull / (push + 1e-4)).clamp(max=1e4) * term

    def get_extra_state(self):
        return {"step": self.step, "optimizer": self.optimizer.state_dict()}

    def set_extra_state(self, state):
        self.step = state["step"]
        self.optimizer.load_state_dict(state["optimizer"])


def terms(s):
    """What the settings ask for: (distance or None, Adversary or None, a dict for the checkpoint).

    The dict names weights from elsewhere, as the privacy statement does. A note says so where VGG16's cannot
    be had.
    """
    distance, adversary, origin = None, None, {}
    if s.perceptual_weight:
        name, distance = perceptual_distance(s.device)
        if name == "vgg16":
            origin = {"public_weights": ["VGG16 of torchvision, trained on ImageNet"]}
        else:
            print(f"note: VGG16's weights cannot be had here; the perceptual term compares {name} instead",
                  file=sys.stderr)
    if s.adversarial_weight:
        adversary = Adversary(s.vae.out_ch, s.adversarial_weight, s.adversarial_start).to(s.device)
    return distance, adversary, origin
