"""Muon, an optimizer for weight matrices: `--public-optimizer muon`, `--private-optimizer muon`.

It is not in the paper. AdamW scales each number of a gradient separately. Muon (Jordan et al. 2024, "Muon: An
optimizer for hidden layers in neural networks") takes the gradient of a weight as one matrix. G is the
gradient, M its momentum:

    M <- mu M + (1 - mu) G        N = mu M + (1 - mu) G: Nesterov, the new gradient counts once more

mu is `momentum`. (Jordan et al. have no factor 1 - mu. It scales N, of which only the direction is used.)
With the singular values N = U S V^T, the step is along O = U V^T: all singular values that are not 0 become
1. A gradient usually has a few large ones, and a step along it would hardly move the weight in any other
direction. O moves it equally far in each. Diffusion UNets end at a lower loss that way (Schaipp 2025,
"Optimization benchmark for diffusion models on dynamical systems": 18 %). What it is worth here is measured
by `python -m bench.optimizers`.

O is found without a singular value decomposition, by a Newton-Schulz iteration. The polynomial p(x) = a x +
b x^3 + c x^5 of a matrix, p(X) = a X + b (X X^T) X + c (X X^T)^2 X, changes only the singular values: each x
becomes p(x). Repeated, p does not converge to 1, but it soon brings every x that is not tiny between 0.68 and
1.21. Five times are usual. Three gave as low a loss in the UNet of the preset `garments`.

In the private stage Muon sees the noisy gradient only, as Adam does, so the guarantee stays the same.
Directions that hold only noise get as long a step as the others. The EMA seems to average these moves out
again, while moves along the gradient add up. On pretend-private garments at epsilon 10 Muon's loss after 40
steps was that of Adam after 80. Digits gained nothing (docs/lab-notebook.md, "Muon in the private stage").
"""
import torch

COEFFICIENTS = 3.4445, -4.7750, 2.0315  # a, b, c of Jordan et al.: steep at 0, to raise small values fast


def orthogonal(g, steps=3):
    """Matrices g (M, rows, columns) -> the same matrices with singular values between 0.68 and 1.21.

    Only those below 1/56 of a matrix's Frobenius norm end smaller (three steps). A matrix of zeros stays
    zero.
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
    """W <- (1 - lr * weight_decay) W - lr * scale * sqrt(max(rows, columns)) O.

    Only for weights of at least two axes: `optim.with_muon` gives all others to Adam. Convolutions (out, in,
    h, w) count as matrices (out, in * h * w). The factor makes the root mean square of a step's entries about
    scale * lr; single entries may be larger. 0.2 is what AdamW's steps have, so a learning rate fits both
    (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2). The defaults are those of the public
    stages; `optim.PRIVATE` has others.
    """

    def __init__(self, parameters, lr, momentum=0.95, weight_decay=0.01, scale=0.2):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay,
                                      "scale": scale})

    @torch.no_grad()
    def step(self):
        """One update of every weight that has a gradient, from p.grad."""
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
                step = group["lr"] * group["scale"] * max(shape) ** 0.5
                directions = orthogonal(torch.stack([matrix for _, matrix in pairs]))
                torch._foreach_add_([p for p, _ in pairs], [
                    o.view_as(p) for (p, _), o in zip(pairs, directions, strict=True)], alpha=-step)
