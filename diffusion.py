"""Diffusion in latent space: noise schedule, training loss per example, DDIM sampling with guidance.

Implements *Denoising Diffusion Probabilistic Models* (Ho et al. 2020, Eqs. 4 and 14) with the settings of
latent diffusion (Rombach et al. 2022) and DP-LDM (Liu et al. 2024, Algorithm 1, lines "sample t, epsilon"),
the sampler of *Denoising Diffusion Implicit Models* (Song et al. 2021, Eqs. 12 and 16) and classifier-free
guidance (Ho and Salimans 2022, Eq. 6). The file stands alone: it imports nothing of the project.

Symbols: z_0 clean latent (N, C, H, W), unit variance · t timestep in 0..T-1 · epsilon noise ~ N(0, I) ·
abar_t = prod_{s<=t} (1 - beta_s), `alphas_cumprod` · z_t = sqrt(abar_t) z_0 + sqrt(1 - abar_t) epsilon ·
c condition · K noise multiplicity: (t, epsilon) draws averaged per example.

Randomness and loss are kept apart on purpose: `draw` holds ALL randomness of a training example, `loss` is a
deterministic function of it. So the per-example gradient of DP-SGD is the gradient of one well-defined
number, and three implementations of it can be compared to the last digit.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Schedule:
    """The forward process and what the network predicts. Defaults: the paper's MNIST configuration.

    kind: "linear" (linear in sqrt(beta) from beta_start to beta_end, latent diffusion's choice) or "cosine"
    (Nichol and Dhariwal 2021: almost no step is wasted on latents that are already pure noise). prediction:
    "eps" (the noise; the paper) or "v" = sqrt(abar) epsilon - sqrt(1 - abar) z_0 (Salimans and Ho 2022: keeps
    unit variance at every t, so that the noisiest steps teach as much as the others and few sampling steps
    suffice).
    """
    kind: str = "linear"
    prediction: str = "eps"
    T: int = 1000
    beta_start: float = 0.0015
    beta_end: float = 0.0155

    def __post_init__(self):
        if self.kind not in ("linear", "cosine") or self.prediction not in ("eps", "v"):
            raise ValueError(f"schedule must be linear or cosine and prediction eps or v, got {self}")


PAPER = Schedule()


@lru_cache(maxsize=32)
def alphas_cumprod(schedule, device="cpu"):
    """abar_t for t = 0..T-1: (T,) float64 (computed in float64: a product of a thousand factors)."""
    if schedule.kind == "linear":
        betas = torch.linspace(schedule.beta_start ** 0.5, schedule.beta_end ** 0.5, schedule.T,
                               dtype=torch.float64) ** 2
        return torch.cumprod(1.0 - betas, dim=0).to(device)
    s = 0.008  # keeps the first steps from being noiseless (Nichol and Dhariwal 2021, Eq. 17)
    angle = (torch.arange(1, schedule.T + 1, dtype=torch.float64) / schedule.T + s) / (1 + s) * math.pi / 2
    # Not quite 0 at the end: signal-to-noise ratios and sqrt stay finite.
    return (angle.cos() ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2).clamp(1e-5, 0.99999).to(device)


def draw(z0, cond, K, generator, schedule, null=None, drop=0.0):
    """All randomness of N training examples, drawn from one generator on z0's device.

    z0: latents (N, C, H, W), or (N, F, C, H, W) with F orientations (image and its mirror image), of which
    a coin picks one per example. cond: N conditions (or None). With drop > 0, a second coin replaces the
    condition by its row in `null` (same shape as cond) with that probability, which trains the unconditional
    model for guidance. Returns the batch (z0 (N, C, H, W), cond, t (N, K) int64 uniform in 0..T-1, noise (N,
    K, C, H, W)) for `loss`.
    """
    n, device = len(z0), z0.device
    if z0.dim() == 5:
        flip = torch.randint(z0.shape[1], (n,), generator=generator, device=device)
        z0 = z0[torch.arange(n, device=device), flip]
    if cond is not None and drop > 0:
        coin = torch.rand(n, generator=generator, device=device) < drop
        cond = torch.where(coin.view(-1, *[1] * (cond.dim() - 1)), null, cond)
    t = torch.randint(schedule.T, (n, K), generator=generator, device=device)
    noise = torch.randn(n, K, *z0.shape[1:], generator=generator, device=device, dtype=z0.dtype)
    return z0, cond, t, noise


def loss(model, z0, cond, t, noise, schedule):
    """Per-example diffusion loss (N,), DDPM Eq. 14; the mean over K draws, as in DPDM. Deterministic.

    z0 (N, C, H, W), cond N conditions or None, t (N, K), noise (N, K, C, H, W): what `draw` returns. The mean
    over K stands INSIDE the example, before clipping: it makes each gradient less noisy at no privacy cost.
    """
    signal, sigma = signal_and_noise(t, schedule, z0.dtype)  # each (N, K, 1, 1, 1)
    z_t = signal * z0[:, None] + sigma * noise  # (N, K, C, H, W)
    target = noise if schedule.prediction == "eps" else signal * noise - sigma * z0[:, None]
    # (N*K, C, H, W): row n*K + k belongs to example n.
    prediction = model(z_t.flatten(0, 1), t.flatten(), cond)
    # Back to full precision if the network ran in bfloat16.
    error = prediction.to(z0.dtype) - target.flatten(0, 1)
    return error.square().mean(dim=(1, 2, 3)).view(t.shape).mean(dim=1)  # (N*K,) -> (N, K) -> (N,)


def signal_and_noise(t, schedule, dtype):
    """sqrt(abar_t) and sqrt(1 - abar_t), with three trailing dimensions of size one."""
    abar = alphas_cumprod(schedule, t.device)[t][..., None, None, None]
    return abar.sqrt().to(dtype), (1.0 - abar).sqrt().to(dtype)


@torch.no_grad()
def ddim(model, shape, cond, steps, eta, guidance, generator, schedule):
    """Draw latents by DDIM (Song et al. 2021, Eq. 12), from pure noise in `steps` network evaluations.

    shape: (N, C, H, W). cond: N conditions or None. eta: 0 = deterministic given the first noise, 1 = as much
    fresh noise per step as DDPM. guidance w: prediction = unconditional + w * (conditional - unconditional);
    1 = plain conditional (one network evaluation per step), above 1 = more typical and less varied; needs
    model.embedder.null. Sampling is post-processing: it costs no privacy. Returns z_0 (N, C, H, W) float32.
    Raises ValueError for steps outside 1..T, eta outside 0..1, or guidance without a null condition.
    """
    if not 1 <= steps <= schedule.T or not 0.0 <= eta <= 1.0:
        raise ValueError(f"ddim: steps must lie in 1..{schedule.T} and eta in 0..1, "
                         f"got steps={steps}, eta={eta}")
    guided = guidance != 1.0 and cond is not None
    if guided:
        cond = torch.cat([cond, model.embedder.null(cond)])  # one batch for both halves
    device = next(model.parameters()).device
    abar = [1.0, *alphas_cumprod(schedule).tolist()]  # abar[t + 1] is abar_t; the first: no noise
    # Trailing spacing (Lin et al. 2024): begins at T-1, where z really is pure noise, and ends at z_0.
    times = [round(schedule.T * (1 - i / steps)) - 1 for i in range(steps + 1)]  # T-1, ..., -1: clean
    z = torch.randn(shape, generator=generator, device=device)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        a, a_next = abar[t + 1], abar[t_next + 1]
        both = torch.cat([z, z]) if guided else z
        out = model(both, torch.full((len(both),), t, device=device), cond).float()
        if guided:
            conditional, unconditional = out.chunk(2)
            out = unconditional + guidance * (conditional - unconditional)
        if schedule.prediction == "eps":
            eps = out
            z0 = (z - (1 - a) ** 0.5 * eps) / a ** 0.5
        else:
            z0 = a ** 0.5 * z - (1 - a) ** 0.5 * out
            eps = (1 - a) ** 0.5 * z + a ** 0.5 * out
        # Eq. 16: sigma is the fresh noise, the rest of the variance 1 - abar points along the predicted
        # noise.
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        z = a_next ** 0.5 * z0 + max(1 - a_next - sigma ** 2, 0.0) ** 0.5 * eps
        if sigma > 0:
            z = z + sigma * torch.randn(z.shape, generator=generator, device=device)
    return z
