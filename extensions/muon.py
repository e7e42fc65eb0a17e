"""Muon, an optimizer for weight matrices, for the public stages: `--public-optimizer muon`. Not in the paper.

AdamW scales each number of a gradient separately. Muon (Jordan et al. 2024, "Muon: An optimizer for hidden
layers in neural networks") takes the gradient of a weight as one matrix. G is the gradient, M its momentum:

    M <- mu M + (1 - mu) G        N = mu M + (1 - mu) G: Nesterov, the new gradient counts once more

With the singular values N = U S V^T, the step is along O = U V^T: all singular values that are not 0 become
1. A gradient usually has a few large ones, and a step along it would hardly move the weight in any other
direction. O moves it equally far in each. Diffusion UNets end at a lower loss that way (Schaipp 2025,
"Optimization benchmark for diffusion models on dynamical systems": 18 %). What it is worth here is measured
by `python -m bench.optimizers`.

O is found without a singular value decomposition. The polynomial p(x) = a x + b x^3 + c x^5 of a matrix,
p(X) = a X + b (X X^T) X + c (X X^T)^2 X, changes only the singular values: each x becomes p(x). Repeated, p
does not converge to 1, but it soon brings every x that is not tiny between 0.68 and 1.21. Five times are
usual. Three did as well in the UNet of the preset `garments`.

The private stage keeps Adam. There most of a gradient is noise, whose singular values are all of similar size
anyway. Muon was not tried for it.
"""
import torch
from torch import nn

OPTIMIZERS = ("muon", "adamw")  # of the public stages
COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al.: steep at 0, to raise small values fast


def orthogonal(g, steps=3):
    """Matrices g (N, rows, columns) -> the same matrices with singular values between 0.68 and 1.21.

    With three steps those below 1/56 of a matrix's Frobenius norm stay smaller. A matrix of zeros stays zero.
    """
    a, b, c = COEFFICIENTS
    tall = g.shape[1] > g.shape[2]
    x = g.mT if tall else g  # then X X^T is the smaller of the two products
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-20)  # largest singular value at most 1
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """W <- (1 - lr * weight_decay) W - lr * 0.2 sqrt(max(rows, columns)) O, for weights of two axes or more.

    Convolutions (out, in, h, w) count as matrices (out, in * h * w). The factor makes the mean square of a
    step's numbers at most about 0.04 lr^2, as with AdamW, so a learning rate fits both (Liu et al. 2025,
    "Muon is scalable for LLM training", section 2.2).
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One update of every weight that has a gradient."""
        for group in self.param_groups:
            weights = [p for p in group["params"] if p.grad is not None]
            if not weights:
                continue
            gradients = [p.grad for p in weights]
            for p in weights:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            momenta = [self.state[p]["momentum_buffer"] for p in weights]
            torch._foreach_lerp_(momenta, gradients, 1 - group["momentum"])
            ahead = torch._foreach_lerp(gradients, momenta, group["momentum"])  # Nesterov
            by_shape = {}  # matrices of one shape are made orthogonal together, which is faster
            for p, matrix in zip(weights, (direction.flatten(1) for direction in ahead), strict=True):
                by_shape.setdefault(matrix.shape, []).append((p, matrix))
            torch._foreach_mul_(weights, 1 - group["lr"] * group["weight_decay"])
            for shape, pairs in by_shape.items():
                o = orthogonal(torch.stack([matrix for _, matrix in pairs]))
                torch._foreach_add_([p for p, _ in pairs], [one.view_as(p) for (p, _), one in zip(
                    pairs, -group["lr"] * 0.2 * max(shape) ** 0.5 * o, strict=True)])


def optimizers(name, model, lr):
    """[AdamW] of all parameters for "adamw"; for "muon" [AdamW, Muon], each of its own part of the model.

    Muon gets the weights of linear layers and convolutions, the first and the last ones included. Embeddings
    stay with AdamW, and so do biases and the scales of norm layers.
    """
    weights = [m.weight for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    matrices = weights if name == "muon" else []
    taken = set(map(id, matrices))
    others = [p for p in model.parameters() if id(p) not in taken]
    fused = next(model.parameters()).is_cuda
    adamw = torch.optim.AdamW(others, lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    return [adamw, Muon(matrices, lr)] if matrices else [adamw]
