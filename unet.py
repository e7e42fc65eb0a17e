"""The latent UNet of latent diffusion and its class embedder.

Implements the denoiser epsilon_theta(z_t, t, c) of *High-Resolution Image Synthesis with Latent Diffusion
Models* (Rombach et al. 2022, sections 3.2 and 3.3), as DP-LDM uses it (Liu et al. 2024, section 3). The file
imports nothing of the project.

Symbols: z_t noisy latent (N, C, H, W). t timestep (N,). c condition, embedded as context (N, L, D).
K: draws per example (diffusion.py). A level is the part of the network at one resolution. Attention sees its
S = H * W pixels as tokens (N, S, C).

The paper's network for MNIST: 64 channels, multipliers 1 and 2, attention at every level::

    z_t -> conv -> [Res + ST] -> Res-down -> [Res + ST] -> middle: Res, ST, Res
              |        |             |            |                   |
              |        |             |            v                   v
              +--------+-------------+-----> skip connections -> 2x[Res + ST], Res-up -> 2x[Res + ST] -> conv

Each block on the way up takes one skip connection, the latest first. Res is a ResBlock: it is conditioned on
the timestep and mixes neighbouring pixels. ST is a SpatialTransformer: self-attention, cross-attention to the
condition (it enters nowhere else), feed-forward. ST and the embedder are tuned on private images (tuning.py).

All weights live in Linear, Conv2d, GroupNorm, LayerNorm and Embedding layers, because for these
extensions/bookkeeping.py knows the per-example gradient. So nn.MultiheadAttention is not used.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class UNetConfig:
    """Shape of a UNet. Field names of the original code and num_groups. Defaults: the paper's for MNIST."""
    in_channels: int = 3
    out_channels: int = 3
    model_channels: int = 64
    channel_mult: tuple = (1, 2)  # width of each level in units of model_channels
    num_res_blocks: int = 1  # per level on the way down; one more on the way up
    # *Downsampling factors* at which blocks have attention; the middle block always has it.
    attention_resolutions: tuple = (1, 2)
    # The authors pre-train with 2 heads and tune with 4; weights have the same shapes. Here both stages have
    # this number.
    num_heads: int = 2
    num_head_channels: int | None = None  # if given: width of a head, and num_heads is not used
    use_spatial_transformer: bool = True  # False: `AttentionBlock`, for networks without condition
    transformer_depth: int = 1
    context_dim: int | None = 5  # D of the context; None: there is no condition
    use_scale_shift_norm: bool = True  # how the timestep enters: see `ResBlock`
    resblock_updown: bool = True  # the size changes in ResBlocks; False: in plain convolutions
    num_groups: int = 32  # of every GroupNorm; fewer in narrow networks


def timestep_embedding(t, dim):
    """[cos, sin] of t * 10000^(-2i/dim), i = 0..dim/2-1 (Vaswani et al. 2017): (N,) -> (N, dim) float32."""
    half = dim // 2
    i = torch.arange(half, dtype=torch.float32, device=t.device)
    frequencies = torch.exp(-math.log(10000) * i / half)
    angles = t[:, None].float() * frequencies  # (N, half)
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zero_init(layer):
    """Set a last layer to zero. A residual branch then adds nothing at first, and the UNet predicts 0."""
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


# --------------------------------------------------------------------------------------- convolutional blocks

class Downsample(nn.Module):
    """Halve height and width by a stride-2 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x):
        return self.op(x)


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """x + two 3x3 convolutions that see the timestep; resample "down" halves the size, "up" doubles it."""

    def __init__(self, channels, time_dim, out_channels, scale_shift, groups, resample=None):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels, eps=1e-5)
        self.conv1 = nn.Conv2d(channels, out_channels, 3, padding=1)
        self.time_proj = nn.Linear(time_dim, 2 * out_channels if scale_shift else out_channels)
        self.norm2 = nn.GroupNorm(groups, out_channels, eps=1e-5)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = nn.Identity() if channels == out_channels else nn.Conv2d(channels, out_channels, 1)
        self.scale_shift = scale_shift
        self.resample = {"down": lambda x: F.avg_pool2d(x, 2),
                         "up": lambda x: F.interpolate(x, scale_factor=2.0, mode="nearest"),
                         None: lambda x: x}[resample]

    def forward(self, x, time):
        """x (N, C, H, W), time (N, time_dim) -> (N, out_channels, H', W')."""
        # Resampled before the first convolution, as in the original.
        h = self.conv1(self.resample(F.silu(self.norm1(x))))
        time = self.time_proj(F.silu(time))[:, :, None, None]  # (N, out or 2*out, 1, 1)
        if self.scale_shift:  # the timestep gives scale and shift of the second GroupNorm
            scale, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:  # the timestep is added before it
            h = self.norm2(h + time)
        return self.skip(self.resample(x)) + self.conv2(F.silu(h))


# ------------------------------------------------------------------------------------------- attention blocks

class Attention(nn.Module):
    """Multi-head attention softmax(Q K^T / sqrt(d)) V (Rombach et al. 2022, section 3.3)."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim, dim, bias=False)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x, context, mask=None):
        """Queries from x (N, S, C), keys and values from context (N, L, D) -> (N, S, C); (N, 1, C) for L = 1.

        mask (N, L) is False where the context is padding. None means no padding.
        """
        if context.shape[1] == 1:
            # A class is one token. A softmax over one token is 1 whatever Q and K are, so every pixel gets
            # the same V: cross-attention to a class adds one learned vector per class. The caller broadcasts
            # it. Q and K get no gradient (`tuning.without_gradient`).
            return self.to_out(self.to_v(context))
        q = split_heads(self.to_q(x), self.num_heads)  # (N, heads, S, d)
        k = split_heads(self.to_k(context), self.num_heads)  # (N, heads, L, d)
        v = split_heads(self.to_v(context), self.num_heads)
        if mask is not None:
            mask = mask[:, None, None]  # (N, 1, 1, L): the same for every head and pixel
        return self.to_out(attend(q, k, v, mask).transpose(1, 2).flatten(2))


def attend(q, k, v, mask=None):
    """softmax(q k^T / sqrt(d)) v: q (N, heads, S, d), k, v (N, heads, L, d), mask (N, 1, 1, L) -> like q."""
    # For bfloat16 on a CPU the plain formula is up to five times as fast as torch's fused kernel.
    if q.dtype != torch.bfloat16 or q.device.type != "cpu":
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    scores = (q * q.shape[-1] ** -0.5) @ k.mT  # (N, heads, S, L)
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    return scores.softmax(-1) @ v


def split_heads(x, heads):
    """(N, S, C) -> (N, heads, S, C/heads): heads are contiguous groups of channels."""
    return x.unflatten(2, (heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """GEGLU (Shazeer 2020): W' (a * gelu(b)) with (a, b) = W x, where a and b are 4 times as wide as x."""

    def __init__(self, dim):
        super().__init__()
        self.proj_in = nn.Linear(dim, 8 * dim)
        self.proj_out = nn.Linear(4 * dim, dim)

    def forward(self, x):
        value, gate = self.proj_in(x).chunk(2, dim=-1)  # a and b, each (N, S, 4 * dim)
        return self.proj_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward. Each is x + f(LayerNorm(x))."""

    def __init__(self, dim, context_dim, num_heads):
        super().__init__()
        self.attn1 = Attention(dim, dim, num_heads)
        self.attn2 = Attention(dim, dim if context_dim is None else context_dim, num_heads)
        self.ff = FeedForward(dim)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)

    def forward(self, x, context, mask=None):
        y = self.norm1(x)
        x = x + self.attn1(y, y)  # self-attention: queries, keys and values from the same tokens
        # With a context of one token the queries do not matter (`Attention`), so norm2 is skipped.
        y = self.norm2(x) if context is None or context.shape[1] > 1 else x
        # As in the original, attn2 is a second self-attention where there is no context.
        x = x + (self.attn2(y, y) if context is None else self.attn2(y, context, mask))
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """x + transformer blocks over the pixels of x as tokens; each block also attends to the condition."""

    def __init__(self, channels, num_heads, depth, context_dim, groups):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_dim, num_heads) for _ in range(depth))
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x, context, mask=None):
        """x (N, C, H, W), context (N, L, D) or None, mask (N, L) or None -> (N, C, H, W)."""
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))  # (N, S = H*W, C)
        for block in self.blocks:
            tokens = block(tokens, context, mask)
        return x + self.proj_out(tokens).transpose(1, 2).reshape(x.shape)  # at first exactly x (zero_init)


class AttentionBlock(nn.Module):
    """Self-attention over the pixels without condition, as in the paper's unconditional networks."""

    def __init__(self, channels, num_heads, groups):
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(groups, channels, eps=1e-5)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zero_init(nn.Linear(channels, channels))

    def forward(self, x, context=None, mask=None):
        qkv = self.qkv(self.norm(x).flatten(2).transpose(1, 2))  # (N, S, 3C)
        # Channel order of the original weights: heads first, then q, k, v within each head.
        q, k, v = split_heads(qkv, self.num_heads).chunk(3, dim=-1)  # each (N, heads, S, C/heads)
        y = attend(q, k, v).transpose(1, 2).flatten(2)  # (N, S, C)
        return x + self.proj_out(y).transpose(1, 2).reshape(x.shape)


# ------------------------------------------------------------------------------------------------ the network

class UNet(nn.Module):
    """The denoiser. ValueError if a level's width is not divisible by num_groups and by the heads."""

    def __init__(self, config):
        super().__init__()
        self.config, c, width = config, config, config.model_channels  # c: the config, not the condition
        widths = [width * mult for mult in c.channel_mult]
        if any(w % c.num_groups or w % (c.num_head_channels or c.num_heads) for w in widths):
            raise ValueError(f"UNet: every level's width {widths} must be divisible by num_groups "
                             f"({c.num_groups}) and by num_heads or num_head_channels "
                             f"({c.num_head_channels or c.num_heads})")
        time_dim = 4 * width
        self.time_embed = nn.Sequential(nn.Linear(width, time_dim), nn.SiLU(), nn.Linear(time_dim, time_dim))
        w = width  # channels of x at the point that is reached

        def res(in_width, out_width, resample=None):
            return ResBlock(in_width, time_dim, out_width, c.use_scale_shift_norm, c.num_groups, resample)

        def attention(w):
            heads = w // c.num_head_channels if c.num_head_channels else c.num_heads
            if c.use_spatial_transformer:
                return SpatialTransformer(w, heads, c.transformer_depth, c.context_dim, c.num_groups)
            return AttentionBlock(w, heads, c.num_groups)

        def block(in_width, out_width, level):
            attended = 2 ** level in c.attention_resolutions
            return [res(in_width, out_width)] + ([attention(out_width)] if attended else [])

        # Each input block makes a skip connection, each output block takes one. The order is the original's.
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(c.in_channels, width, 3, padding=1)])])
        skips = [width]  # widths of the skip connections
        for level, level_width in enumerate(widths):
            for _ in range(c.num_res_blocks):
                self.input_blocks.append(nn.ModuleList(block(w, level_width, level)))
                w = level_width
                skips.append(w)
            if level < len(widths) - 1:
                down = res(w, w, "down") if c.resblock_updown else Downsample(w)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(w)
        self.middle_block = nn.ModuleList([res(w, w), attention(w), res(w, w)])
        self.output_blocks = nn.ModuleList()
        for level, level_width in reversed(list(enumerate(widths))):
            for i in range(c.num_res_blocks + 1):  # one more: for the skip of the first conv or of Res-down
                layers = block(w + skips.pop(), level_width, level)
                w = level_width
                if level > 0 and i == c.num_res_blocks:
                    layers.append(res(w, w, "up") if c.resblock_updown else Upsample(w))
                self.output_blocks.append(nn.ModuleList(layers))
        self.out = nn.Sequential(nn.GroupNorm(c.num_groups, w, eps=1e-5), nn.SiLU(),
                                 zero_init(nn.Conv2d(w, c.out_channels, 3, padding=1)))

    def forward(self, x, t, context=None, mask=None):
        """Noisy latents x -> the prediction of the noise (or of v), in the shape of x.

        x (N, in_channels, H, W), H and W divisible by 2^(levels-1); t (N,) timesteps; context (N, L, D) or
        None; mask (N, L) bool, False where the context is padding, or None.
        """
        time = self.time_embed(timestep_embedding(t, self.config.model_channels).to(x.dtype))
        skips = []
        for layers in self.input_blocks:  # down: ever smaller and wider
            x = run(layers, x, time, context, mask)
            skips.append(x)
        x = run(self.middle_block, x, time, context, mask)
        for layers in self.output_blocks:  # up: the latest skip connection joins as further channels
            x = run(layers, torch.cat([x, skips.pop()], dim=1), time, context, mask)
        return self.out(x)


def run(layers, x, time, context, mask):
    """x through the layers. A ResBlock also gets the timestep, an attention block the context."""
    for layer in layers:
        if isinstance(layer, ResBlock):
            x = layer(x, time)
        elif isinstance(layer, (SpatialTransformer, AttentionBlock)):
            x = layer(x, context, mask)
        else:
            x = layer(x)
    return x


class ClassEmbedder(nn.Module):
    """Class labels (N,) in 0..num_classes-1 -> one context token each, (N, 1, dim).

    With null_class there is one more label, num_classes. It means "no condition" and is needed for
    classifier-free guidance (Ho and Salimans 2022).
    """

    def __init__(self, num_classes, dim, null_class=False):
        super().__init__()
        self.num_classes, self.null_class = num_classes, null_class
        self.embedding = nn.Embedding(num_classes + null_class, dim)  # a bool: one row more if True

    def forward(self, labels):
        return self.embedding(labels)[:, None]

    def null(self, labels):
        """Labels of the same shape that all mean "no condition". ValueError without a null class."""
        if not self.null_class:
            raise ValueError("this model has no null class, which guidance other than 1 needs; train with "
                             "--cond-drop above 0, or use guidance 1")
        return torch.full_like(labels, self.num_classes)


class LatentModel(nn.Module):
    """Condition embedder and UNet together: the model of the public and of the private stage.

    An embedder may have mask(cond) -> (N, L) bool, False where the context is padding; null(cond), "no
    condition", which guidance needs; and length, the L of its contexts.
    """

    def __init__(self, unet, embedder=None):
        super().__init__()
        self.unet, self.embedder = unet, embedder

    def forward(self, z_t, t, cond=None):
        """z_t (N*K, C, H, W), t (N*K,), cond N conditions or None -> (N*K, C, H, W).

        Rows n*K to n*K + K-1 belong to example n. Its condition is embedded once and repeated K times.
        ValueError if the model has an embedder and cond is None.
        """
        context = mask = None
        if self.embedder is not None:
            if cond is None:
                raise ValueError("this model needs a condition for each example: give cond")
            context = self.embedder(cond)  # (N, L, D)
            mask = self.embedder.mask(cond) if hasattr(self.embedder, "mask") else None  # (N, L)
            k = len(z_t) // len(context)
            context = context.repeat_interleave(k, dim=0)  # (N*K, L, D)
            mask = None if mask is None else mask.repeat_interleave(k, dim=0)  # (N*K, L)
        return self.unet(z_t, t, context, mask)
