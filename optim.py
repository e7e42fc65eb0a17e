"""How the weights move: learning rate, moving average (EMA), and the optimizers of the three stages.

An optimizer of the private stage gets the noisy gradient as if it were any gradient. Whatever it does with it
is post-processing, so the choice costs no privacy. The authors' code has AdamW for the diffusion model, in
the private stage too. Here the private stage has Adam without weight decay, which would pull the weights away
from those of the public stages.

To add an optimizer, enter a function (model, learning rate) -> list of optimizers in PUBLIC or PRIVATE. Its
name is then a value of `--public-optimizer` or `--private-optimizer`.
"""
import math

import torch
from torch import nn

from extensions.muon import Muon


def learning_rate(step, steps, peak):
    """Public stages: linear warm-up over the first 5 %, then half a cosine down to zero.

    In the private stage the learning rate is constant.
    """
    return peak * min((step + 1) / max(1, steps // 20), 0.5 * (1 + math.cos(math.pi * step / steps)))


@torch.no_grad()
def update_ema(average, parameters, decay, step):
    """average <- d average + (1 - d) parameters, in place, once per step.

    d = min(decay, (1 + step) / (10 + step)) grows from 1/10 (in Rombach's code from 2/11). So the initial
    weights soon fade, and a short stage does not reach the decay: d is 0.77 after 30 steps, 0.95 after 160.
    """
    torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - min(decay, (1 + step) / (10 + step)))


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def adamw(parameters, lr):
    fused = parameters[0].is_cuda
    return torch.optim.AdamW(parameters, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)


def with_muon(model, lr, adam, **options):
    """[adam(...) of all others, Muon]; one of the two is missing if nothing is left for it.

    Muon gets the weights of linear layers and convolutions, those of the first and the last layer included.
    The others are embeddings, biases and the scales of norm layers.
    """
    weights = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))}
    matrices = [p for p in trainable(model) if id(p) in weights]
    others = [p for p in trainable(model) if id(p) not in weights]
    return ([adam(others, lr)] if others else []) + ([Muon(matrices, lr, **options)] if matrices else [])


# Name -> function (model, learning rate) -> optimizers, which together hold every trainable parameter once.
PUBLIC = {"muon": lambda model, lr: with_muon(model, lr, adamw),
          "adamw": lambda model, lr: [adamw(trainable(model), lr)]}
PRIVATE = {"adam": lambda model, lr: [torch.optim.Adam(trainable(model), lr)],
           # scale=1: the root mean square of a step's entries is about lr, as with Adam in its first steps.
           "muon": lambda model, lr: with_muon(model, lr, torch.optim.Adam, momentum=0.9, weight_decay=0.0,
                                               scale=1.0)}


# Tensors that an optimizer keeps for each parameter, and without which its next step would fail.
STATE = {torch.optim.Adam: {"step", "exp_avg", "exp_avg_sq"}, Muon: {"momentum_buffer"},
         torch.optim.AdamW: {"step", "exp_avg", "exp_avg_sq"}}


def load_state(optimizer, state):
    """Moments from a checkpoint; the learning rate stays that of the settings.

    ValueError if those of an optimizer in STATE are there in part, or have other shapes: such a state would
    fail only in the next step, when its epsilon is spent. None at all is the state before the first step.
    Other optimizers are not checked.
    """
    optimizer.load_state_dict({"state": state["state"],
                               "param_groups": optimizer.state_dict()["param_groups"]})
    for p in (p for group in optimizer.param_groups for p in group["params"]):
        found, needed = optimizer.state[p], STATE.get(type(optimizer), set())
        if found and not all(torch.is_tensor(found.get(name))
                             and found[name].shape == (() if name == "step" else p.shape) for name in needed):
            raise ValueError("the optimizer's state does not fit the parameters")
