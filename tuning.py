"""The choice of what is tuned on private images: DP-LDM's central idea (Liu et al. 2024, section 3).

On private images only the attention modules (with their norms and feed-forward) and the condition embedder
change. The fewer weights change, the smaller the norm of the noise: it grows with the root of their number.
"""
import re

from torch import nn

import unet


def of_type(model, *types):
    """The modules of these types, in forward order. ValueError if there is none: they could not be tuned."""
    modules = [m for m in model.modules() if isinstance(m, types)]
    if not modules:
        names = " or ".join(kind.__name__ for kind in types)
        raise ValueError(f"the network has no {names}, which this choice tunes; choose another (--tune), or "
                         "enter the network's own modules in tuning.py")
    return modules


def attention_modules(model, from_block=0):
    """The attention modules in forward order, without the first from_block of them.

    from_block is max(0, the authors' `ablation_blocks` - 1). ValueError if it leaves out all, or is negative.
    """
    modules = of_type(model, unet.SpatialTransformer, unet.AttentionBlock)
    if not 0 <= from_block < len(modules):
        raise ValueError(f"from_block must lie in 0..{len(modules) - 1} (the network has {len(modules)} "
                         f"attention modules), got {from_block}")
    return modules[from_block:]


def finest_attention(model):
    """The attention modules with the fewest channels: those at full resolution, if coarser levels are wider.

    In the network of `garments` they have 17 % of the attention's parameters and 99 % of the gradient's
    signal. Yet tuning them alone, without the embedder, costs two points of accuracy (docs/lab-notebook.md).
    """
    modules = attention_modules(model)
    fewest = min(m.norm.num_channels for m in modules)
    return [m for m in modules if m.norm.num_channels == fewest]


def embedder_of(model):
    """[condition embedder], or [] for an unconditional model or a bare UNet."""
    embedder = getattr(model, "embedder", None)
    return [] if embedder is None else [embedder]


# What `--tune NAME` tunes: name -> function(model) -> modules. `train_only` drops what gets no gradient.
# A new choice is a new line. `--tune lora:RANK` is not here: it inserts layers first (extensions/lora.py).
TUNE = {
    # The paper's choice (section 3): the attention and the condition embedder.
    "attention": lambda model: attention_modules(model) + embedder_of(model),
    "attention-only": attention_modules,
    "attention-finest": finest_attention,
    "all": lambda model: [model],
    "resblocks": lambda model: of_type(model, unet.ResBlock) + embedder_of(model),
    "norm": lambda model: of_type(model, nn.GroupNorm, nn.LayerNorm) + embedder_of(model),
    "embedder": embedder_of,
}


def select_trainable(model, tune="attention", from_block=0):
    """Make the modules that TUNE[tune] chooses trainable, freeze the rest -> names of trainable parameters.

    model: a LatentModel or a bare UNet. The first from_block attention modules stay frozen. ValueError for an
    unknown name, an empty selection, or from_block > 0 where TUNE[tune] does not list the attention modules.
    """
    if tune not in TUNE:
        raise ValueError(f"unknown tune={tune!r}; choose one of {', '.join(TUNE)}")
    modules = TUNE[tune](model)
    if from_block != 0:
        kept = attention_modules(model, from_block)  # ValueError if there are not as many
        skipped = [m for m in attention_modules(model) if m not in kept]
        if not all(m in modules for m in skipped):  # from_block would change nothing
            raise ValueError(f"from_block only applies to attention and lora tuning, not to tune={tune!r}")
        modules = [m for m in modules if m not in skipped]
    return train_only(model, modules)


def train_only(model, modules):
    """Make the parameters inside `modules` trainable and freeze the others -> names of the trainable ones.

    Parameters that `without_gradient` names stay frozen. Their update would be pure noise, which reveals the
    state of an ordinary random-number generator (tests/test_noise_attack.py). ValueError if nothing is left.
    """
    chosen = {id(p) for module in modules for p in module.parameters()}  # by identity
    no_gradient = set(without_gradient(model))
    for name, p in model.named_parameters():
        p.requires_grad_(id(p) in chosen and name not in no_gradient)
    names = [n for n, p in model.named_parameters() if p.requires_grad]
    if not names:
        raise ValueError("this choice selects no parameter of the model (does it have an embedder?)")
    return names


def without_gradient(model):
    """Names of what has no gradient where the context is one token: to_q, to_k of cross-attention, norm2."""
    embedder = getattr(model, "embedder", None)
    # One token: a class, or a text of length 1. With more tokens these three have a gradient.
    # Not listed: biases of keys, rows of words that no caption has, query and key of a level of one pixel.
    # They are trained, so a release shows their bare noise (docs/privacy.md, "The noise").
    one_token = isinstance(embedder, unet.ClassEmbedder) or getattr(embedder, "length", None) == 1
    pattern = r"attn2\.to_[qk]\.|\d\.blocks\.\d+\.norm2\."  # norm2 of a TransformerBlock and nothing else
    return [n for n, _ in model.named_parameters() if one_token and re.search(pattern, n)]
