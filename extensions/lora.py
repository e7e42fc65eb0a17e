"""LoRA (Hu et al. 2021): tune a product of two thin matrices beside each projection, not itself.

    y = W x + b + B A x        A (rank, d) random · B (p, rank) zero, so the network starts as it was

Not in the paper; `train.py --tune lora:4` uses it. Hu et al. scale B A x by alpha / rank, which is left out
here, so a learning rate does not carry over between ranks. DP-SGD adds the same noise to every tuned number,
so the fewer there are, the shorter the noise is as a whole. docs/results.md shows how far that carries. While
B is zero, A has no gradient: the first private step gives A noise only.
"""
import torch
from torch import nn

import tuning
import unet

PROJECTIONS = {unet.Attention: ("to_q", "to_k", "to_v", "to_out"), unet.AttentionBlock: ("qkv", "proj_out")}


class LoRALinear(nn.Module):
    """y = W x + b + B A x, where only A (`down`) and B (`up`) are to be tuned: (..., d) -> (..., p).

    `support/trainable.py` freezes the rest. Both are Linear layers without bias, so the per-example gradients
    need no rule of their own for them.
    """

    def __init__(self, base, rank):
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.zeros_(self.up.weight)
        self.to(base.weight)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def insert(model, rank, from_block=0):
    """Put a pair beside each of PROJECTIONS, not in the first from_block attention modules -> the new layers.

    Raises ValueError if the model has pairs already, or for a from_block that leaves nothing.
    """
    if any(isinstance(m, LoRALinear) for m in model.modules()):
        raise ValueError("this model already has LoRA pairs; lora.merge(model) first")
    pairs = []
    for attention in tuning.attention_modules(model, from_block):
        for parent in list(attention.modules()):
            for name in PROJECTIONS.get(type(parent), ()):
                wrapped = LoRALinear(getattr(parent, name), rank)
                setattr(parent, name, wrapped)
                pairs += [wrapped.down, wrapped.up]
    return pairs


def merge(model):
    """Fold every pair into its base layer, W + B A, in place: the release has the original layers."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, LoRALinear):
                with torch.no_grad():
                    child.base.weight += child.up.weight @ child.down.weight
                setattr(parent, name, child.base)
