"""The KL-regularised autoencoder of latent diffusion: images x to latents z and back.

Implements the first stage of *High-Resolution Image Synthesis with Latent Diffusion Models* (Rombach et al.
2022, section 3.1 and appendix G). An encoder gives a Gaussian posterior q(z|x), and a decoder gives x back.
The loss is the reconstruction error plus a very small KL term. In DP-LDM (Liu et al. 2024, section 3)
the autoencoder is trained on PUBLIC images only and then frozen, so it costs no privacy. Attributes have the
names of Rombach's code, so that weights made there can be loaded. The file imports nothing of the project.

Symbols: x image (N, C, H, W) in [-1, 1]. z latent (N, embed_dim, H/f, W/f) with f = 2^(levels-1). mu and
sigma^2 mean and variance of q(z|x).
"""
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class VAEConfig:
    """Shape of an autoencoder; field names of the original code, num_groups added. Defaults: for digits."""
    in_channels: int = 1
    out_ch: int = 1
    ch: int = 16  # width: number of channels before the first level
    ch_mult: tuple = (1, 2, 4, 4)  # width of each level in units of ch; between two levels the size is halved
    num_res_blocks: int = 1  # per level of the encoder
    # Sizes in pixels (UNetConfig has factors) of the levels with self-attention. The middle always has it.
    attn_resolutions: tuple = ()
    resolution: int = 32  # height and width of an image
    z_channels: int = 4  # width of the decoder's input; the encoder's output has twice as many
    embed_dim: int = 4  # channels of a latent
    num_groups: int = 8  # of GroupNorm; 32 in the paper's networks

    @property
    def latent_shape(self):
        """(embed_dim, h, w) of one latent."""
        side = self.resolution // 2 ** (len(self.ch_mult) - 1)
        return self.embed_dim, side, side


class Posterior:
    """The Gaussian q(z|x) = N(mean, exp(logvar)), both (N, embed_dim, h, w)."""

    def __init__(self, mean, logvar):
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)  # keeps exp() finite in float32

    def sample(self, generator=None):
        """z = mu + sigma * noise, noise ~ N(0, I): the reparametrisation of Kingma and Welling (2014)."""
        like = {"device": self.mean.device, "dtype": self.mean.dtype}
        noise = torch.randn(self.mean.shape, generator=generator, **like)
        return self.mean + torch.exp(0.5 * self.logvar) * noise

    def kl(self):
        """KL(q(z|x) || N(0, I)) per example, in nats, summed over the latent: (N,)."""
        # Each number of the latent: (mu^2 + sigma^2 - 1 - ln sigma^2) / 2 (Kingma and Welling 2014, app. B).
        return 0.5 * (self.mean.square() + self.logvar.exp() - 1.0 - self.logvar).sum(dim=(1, 2, 3))


class ResnetBlock(nn.Module):
    """skip(x) + conv(silu(norm(conv(silu(norm(x)))))): (N, in_channels, H, W) -> (N, out_channels, H, W)."""

    def __init__(self, in_channels, out_channels, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, in_channels, eps=1e-6)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-6)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        # "network in network": a 1x1 convolution of x to the new width
        same = in_channels == out_channels
        self.nin_shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + self.nin_shortcut(x)


class AttnBlock(nn.Module):
    """x + self-attention over all pixels of norm(x), with a single head."""

    def __init__(self, channels, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x):
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2) for f in (self.q, self.k, self.v))  # (N, H*W, C)
        # One head, with an axis of its own: torch's fused kernels take four axes only.
        h = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        # Tokens back to an image: (N, H*W, C) -> (N, C, H, W).
        return x + self.proj_out(h.transpose(1, 2).reshape(x.shape))


class Downsample(nn.Module):
    """Halve height and width by a convolution with stride 2."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        # Padding is on the right and at the bottom only, as in the original.
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Middle(nn.Module):
    """After the encoder's levels, before the decoder's: residual block, attention, residual block."""

    def __init__(self, channels, groups):
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, groups)
        self.attn_1 = AttnBlock(channels, groups)
        self.block_2 = ResnetBlock(channels, channels, groups)

    def forward(self, x):
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks at one resolution, with self-attention after each if `attention` is true."""

    def __init__(self, in_channels, out_channels, num_blocks, attention, groups):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(out_channels if i else in_channels, out_channels, groups) for i in range(num_blocks))
        attentions = num_blocks if attention else 0
        self.attn = nn.ModuleList(AttnBlock(out_channels, groups) for _ in range(attentions))
        # `Encoder` sets `downsample` of all levels but the coarsest, `Decoder` `upsample` of all but the
        # finest.
        self.downsample, self.upsample = nn.Identity(), nn.Identity()

    def forward(self, h):
        for i, block in enumerate(self.block):
            h = block(h)
            if len(self.attn):
                h = self.attn[i](h)
        return self.upsample(self.downsample(h))


class Encoder(nn.Module):
    """x (N, in_channels, H, W) -> (N, 2 * z_channels, H/f, W/f), for mean and log variance of q(z|x)."""

    def __init__(self, c):
        super().__init__()
        # Level i goes from widths[i] to widths[i + 1] channels.
        widths, size = [c.ch * mult for mult in (1, *c.ch_mult)], c.resolution
        self.conv_in = nn.Conv2d(c.in_channels, c.ch, 3, padding=1)
        self.down = nn.ModuleList()
        for level, (a, b) in enumerate(itertools.pairwise(widths)):
            self.down.append(Level(a, b, c.num_res_blocks, size in c.attn_resolutions, c.num_groups))
            if level < len(c.ch_mult) - 1:
                self.down[-1].downsample = Downsample(b)
                size //= 2
        self.mid = Middle(widths[-1], c.num_groups)
        self.norm_out = nn.GroupNorm(c.num_groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * c.z_channels, 3, padding=1)

    def forward(self, x):
        h = self.conv_in(x)  # (N, ch, H, W)
        for level in self.down:  # from fine to coarse
            h = level(h)
        # h has ch * ch_mult[-1] channels of H/f x W/f.
        return self.conv_out(F.silu(self.norm_out(self.mid(h))))


class Decoder(nn.Module):
    """z (N, z_channels, H/f, W/f) -> x (N, out_ch, H, W). One block more per level than in the encoder."""

    def __init__(self, c):
        super().__init__()
        widths = [c.ch * mult for mult in c.ch_mult]
        size = c.resolution // 2 ** (len(widths) - 1)
        self.conv_in = nn.Conv2d(c.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], c.num_groups)
        levels, width = [], widths[-1]
        for level in reversed(range(len(widths))):
            attention = size in c.attn_resolutions
            levels.append(Level(width, widths[level], c.num_res_blocks + 1, attention, c.num_groups))
            width = widths[level]
            if level > 0:
                levels[-1].upsample = Upsample(width)
                size *= 2
        # Stored from fine to coarse, as in the original; `forward` runs them backwards.
        self.up = nn.ModuleList(reversed(levels))
        self.norm_out = nn.GroupNorm(c.num_groups, width, eps=1e-6)
        self.conv_out = nn.Conv2d(width, c.out_ch, 3, padding=1)

    def forward(self, z):
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Encoder, decoder and the 1x1 convolutions between them. ValueError for sizes that do not divide."""

    def __init__(self, config):
        super().__init__()
        c = self.config = config
        widths, factor = [c.ch * mult for mult in c.ch_mult], 2 ** (len(c.ch_mult) - 1)
        if c.resolution % factor or any(width % c.num_groups for width in widths):
            raise ValueError(f"VAE: resolution {c.resolution} must be divisible by {factor} and every width "
                             f"{widths} by num_groups {c.num_groups}")
        self.encoder, self.decoder = Encoder(c), Decoder(c)
        # "quant": names from the original's vector-quantised variant. Nothing is quantised here.
        self.quant_conv = nn.Conv2d(2 * c.z_channels, 2 * c.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(c.embed_dim, c.z_channels, 1)
        # Lower the initial log variance to about -6: standard deviation 0.05. At 1 noise would hide the mean
        # from the decoder for hundreds of steps. This is not in the original; it shortens training.
        with torch.no_grad():
            self.quant_conv.bias[c.embed_dim:] -= 6.0

    @property
    def latent_shape(self):
        return self.config.latent_shape

    def encode(self, x):
        """x (N, C, H, W) in [-1, 1] -> Posterior over z (N, embed_dim, H/f, W/f)."""
        # The first half of the channels is the mean, the second the log variance.
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return Posterior(mean, logvar)

    def decode(self, z):
        """z (N, embed_dim, h, w), in the scale of `encode` -> x (N, C, H, W), about [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(z))


def loss(model, x, kl_weight=1e-6, generator=None, perceptual=None, perceptual_weight=1.0, adversary=None):
    """Training loss of the first stage (Rombach et al. 2022, appendix G), the mean over the batch.

    x: images (N, C, H, W) in [-1, 1]. Per image it is the sum over pixels and channels of |x - decode(z)|
    with z ~ q(z|x), plus kl_weight * KL. Large images may use two more terms of extensions/perceptual.py:
    perceptual, a function (x, y) -> (N,) such as LPIPS, and adversary, a patch discriminator (`Adversary`).
    Returns scalars: the loss, with gradient; the mean absolute error over pixels and channels; the mean KL of
    an image, in nats, unweighted.
    """
    posterior = model.encode(x)
    y = model.decode(posterior.sample(generator))  # the reconstruction
    error, kl = (x - y).abs(), posterior.kl().mean()
    reconstruction = error.sum(dim=(1, 2, 3)).mean()
    if perceptual is not None:  # times C*H*W, because the error above is a sum over so many numbers
        reconstruction = reconstruction + perceptual_weight * x[0].numel() * perceptual(x, y).mean()
    total = reconstruction + kl_weight * kl
    if adversary is not None:  # weighted by comparing the gradients at the decoder's last layer
        total = total + adversary(x, y, reconstruction, model.decoder.conv_out.weight)
    return total, error.mean().detach(), kl.detach()


@torch.no_grad()
def latent_scale(model, x):
    """1 / (standard deviation of the latents of x), a float. x: PUBLIC images (N, C, H, W) in [-1, 1].

    The scale is published, so private images would leak through it. The diffusion model sees z * scale,
    because its noise schedule assumes unit variance.
    """
    at_a_time = max(1, 262_144 // x[0, 0].numel())  # 256 images of 32 x 32 pixels
    # One scale for all channels and pixels. A latent is the posterior's mean here. The original draws a
    # sample, but at a KL weight of 1e-6 that is almost the same, and the mean is computed once.
    z = torch.cat([model.encode(part).mean for part in x.split(at_a_time)])
    return 1.0 / z.double().std().item()
