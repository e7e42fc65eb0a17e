"""A shift of the latents for each condition: `train.py --tune attention+shift`. Not in the paper.

The mean latent of a class differs between private and public images. The gradients of all images of the class
point towards this difference, so it can be learned in spite of much noise. But cross-attention to a class is
attention to one token: it adds one vector, the same at every pixel. A mean that differs from pixel to pixel
has to be learned by other weights. Let c (D,) be the vector that the embedder has for a condition, and z_0 a
private latent of it. z_0' is that latent moved to where the public model expects such latents. A matrix
S (C H W, 1 + D), zero at first, learns the difference:

    z_0 = z_0' + b(c),     b(c) = S [1; c]

[1; c] is a 1, followed by the numbers of c. Where the embedder is tuned too, b passes it a gradient through
c. The denoiser goes on seeing latents around the mean that it was trained on. `--tune NAME+shift` tunes S
beside what NAME tunes: together they make up the gradient of an example, which is clipped and gets noise.
`--tune shift` trains S alone.

With signal = sqrt(abar_t) and spread = sqrt(1 - abar_t) of diffusion.py, and the same noise eps for both:

    z_t = signal z_0 + spread eps = z_t' + signal b      v = signal eps - spread z_0 = v' - spread b
"""
import math

import torch
from torch import nn

import diffusion


class Shifted(nn.Module):
    """A UNet whose latents are shifted; its `forward` takes and returns what the UNet's does.

    shape: (C, H, W) of a latent. schedule: diffusion.Schedule. S is `matrix`, a Linear layer, whose gradients
    of each example extensions/bookkeeping.py can find. The c of a text is the mean of its context vectors,
    without padding. Without conditions [1; c] is the vector (1). The null condition has a c like any other,
    so with guidance w samples are moved by about b(null) + w (b(c) - b(null)), which is guidance applied to b
    (about, because the UNet's inputs are moved too).
    """

    def __init__(self, unet, shape, schedule):
        super().__init__()
        self.unet, self.shape, self.schedule = unet, tuple(shape), schedule
        self.matrix = nn.Linear(1 + (unet.config.context_dim or 0), math.prod(shape), bias=False)
        nn.init.zeros_(self.matrix.weight)

    @property
    def config(self):
        return self.unet.config

    def shift(self, n, context=None, mask=None):
        """b (N, C, H, W) of contexts (N, L, D), masks (N, L), each may be None. N rows: K an example."""
        inputs = torch.ones(n, 1, device=self.matrix.weight.device, dtype=self.matrix.weight.dtype)
        if context is not None:
            tokens = torch.ones_like(context[..., :1]) if mask is None else mask[..., None].to(context.dtype)
            inputs = torch.cat([inputs, (context * tokens).sum(1) / tokens.sum(1)], 1)  # (N, 1 + D)
        return self.matrix(inputs).view(n, *self.shape)

    def forward(self, z_t, t, context=None, mask=None):
        b = self.shift(len(z_t), context, mask).to(z_t.dtype)
        signal, spread = diffusion.signal_and_noise(t, self.schedule, z_t.dtype)  # each (N, 1, 1, 1)
        out = self.unet(z_t - signal * b, t, context, mask)
        return out if self.schedule.prediction == "eps" else out - spread * b


def insert(model, shape, schedule):
    """Put a shift before the UNet of a LatentModel, in place. ValueError if it has one."""
    if isinstance(model.unet, Shifted):
        raise ValueError("this model already has a shift")
    model.unet = Shifted(model.unet, shape, schedule).to(next(model.parameters()))


def shape_of(model):
    """The shape of the shifted latents, what a release must know to build the model; None without a shift."""
    return model.unet.shape if isinstance(model.unet, Shifted) else None
