"""Diffusion in latent space: noise schedule, training loss per example, DDIM sampling with guidance.

Training is that of DDPM (Ho et al. 2020, Eqs. 4 and 14), as DP-LDM uses it (Liu et al. 2024, Algorithm 1).
Sampling is DDIM (Song et al. 2021, Eqs. 12 and 16) with classifier-free guidance (Ho and Salimans 2022).
The file imports nothing of the project.

Symbols
    z_0      clean latent (N, C, H, W), scaled to unit variance; never the latent at t = 0, which has noise
    t        timestep in 0..T-1. Ho et al. count 1..T, so t = 0 already has noise. In README.md and
             accountant.py T is the number of private steps instead
    eps      noise ~ N(0, I), not the epsilon of privacy
    beta_t   variance of the noise that timestep t adds
    abar_t   prod_{s<=t} (1 - beta_s), see `alphas_cumprod`
    z_t      noisy latent, sqrt(abar_t) z_0 + sqrt(1 - abar_t) eps
    K        noise multiplicity: draws of (t, eps) for one example, over which its loss is averaged

All randomness of a training example is in `draw`, and `loss` is a deterministic function of it. So the
gradient of one example is well defined, and different ways to compute it can be compared on the same draws.
"""
import math
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class Schedule:
    """The forward process, and what the network predicts. The defaults are the paper's for MNIST.

    kind: "linear" means that sqrt(beta) grows linearly, as in latent diffusion (the diffusers library calls
    it "scaled_linear"). With "cosine" abar_t falls as a squared cosine, so that fewer timesteps are pure
    noise (Nichol and Dhariwal 2021). prediction: "eps" is the noise, as in the paper. To get z_0 from it,
    `ddim` divides by sqrt(abar). At the first sampling step sqrt(abar) is 0.026 on the paper's schedule and
    0.003 on "cosine", so an error of the prediction is multiplied by 39 or 316. "v" is
    sqrt(abar) eps - sqrt(1 - abar) z_0. It gives z_0 without that division, so fewer sampling steps are
    needed (Salimans and Ho 2022). ValueError for any other kind or prediction.
    """
    kind: str = "linear"
    prediction: str = "eps"
    T: int = 1000
    beta_start: float = 0.0015  # beta at t = 0; the cosine schedule uses neither this nor beta_end
    beta_end: float = 0.0155  # beta at t = T - 1

    def __post_init__(self):
        if self.kind not in ("linear", "cosine") or self.prediction not in ("eps", "v"):
            raise ValueError(f"schedule must be linear or cosine and prediction eps or v, got {self}")


PAPER = Schedule()


@lru_cache(maxsize=32)
def alphas_cumprod(schedule, device="cpu"):
    """abar_t for t = 0..T-1, from almost 1 to almost 0: (T,) float64. Made once per schedule and device."""
    if schedule.kind == "linear":
        betas = torch.linspace(schedule.beta_start ** 0.5, schedule.beta_end ** 0.5, schedule.T,
                               dtype=torch.float64) ** 2
        return torch.cumprod(1.0 - betas, dim=0).to(device)
    # f(t + 1) / f(0) with f(t) = cos^2((t/T + s) / (1 + s) pi/2): Nichol and Dhariwal 2021, Eq. 17.
    s = 0.008  # their offset: even the first timestep has some noise
    angle = (torch.arange(1, schedule.T + 1, dtype=torch.float64) / schedule.T + s) / (1 + s) * math.pi / 2
    # Eq. 17 ends at 0, and with prediction "eps" `ddim` divides by sqrt(abar). So it is limited, for both
    # predictions: that changes the last 3 of 1000 timesteps. Nichol and Dhariwal limit beta to 0.999 instead.
    return (angle.cos() ** 2 / math.cos(s / (1 + s) * math.pi / 2) ** 2).clamp(min=1e-5).to(device)


def draw(z0, cond, K, generator, schedule, null=None, drop=0.0):
    """All randomness of N training examples, drawn from one generator on z0's device.

    z0: latents (N, C, H, W), or (N, F, C, H, W) with F orientations (the image and its mirror image). cond: N
    conditions or None. null: "no condition", (1, ...), one row like those of cond; it replaces a row of cond
    with probability `drop`, so that the network learns the unconditional prediction for guidance. Returns
    what `loss` takes: z0 (N, C, H, W), cond, t (N, K) int64 uniform in 0..T-1, noise (N, K, C, H, W).
    """
    n, device = len(z0), z0.device
    if z0.dim() == 5:  # one orientation per example
        orientation = torch.randint(z0.shape[1], (n,), generator=generator, device=device)
        z0 = z0[torch.arange(n, device=device), orientation]
    if cond is not None and drop > 0:
        coin = torch.rand(n, generator=generator, device=device) < drop
        cond = torch.where(coin.view(-1, *[1] * (cond.dim() - 1)), null, cond)  # coin (N, 1, ..., 1)
    t = torch.randint(schedule.T, (n, K), generator=generator, device=device)
    noise = torch.randn(n, K, *z0.shape[1:], generator=generator, device=device, dtype=z0.dtype)
    return z0, cond, t, noise


def loss(model, z0, cond, t, noise, schedule):
    """Diffusion loss of each example, (N,): mean squared error of the prediction over the latent's entries.

    With prediction "eps" it is Eq. 14 of Ho et al. 2020, divided by C*H*W.
    model: (z_t (N*K, C, H, W), t (N*K,), N conditions or None) -> prediction like z_t (unet.LatentModel).
    z0 (N, C, H, W), cond N conditions or None, t (N, K), noise (N, K, C, H, W): what `draw` returns. The mean
    over the K draws of an example makes its gradient vary less with t and noise. It is taken BEFORE the
    gradient is clipped, so it costs no privacy (Dockhorn et al. 2023).
    """
    signal, spread = signal_and_noise(t, schedule, z0.dtype)  # each (N, K, 1, 1, 1)
    z_t = signal * z0[:, None] + spread * noise  # (N, K, C, H, W)
    target = noise if schedule.prediction == "eps" else signal * noise - spread * z0[:, None]  # else v
    # (N*K, C, H, W): row n*K + k belongs to example n. The model repeats each of the N conditions K times.
    prediction = model(z_t.flatten(0, 1), t.flatten(), cond)
    # Back to full precision if the network ran in bfloat16.
    error = prediction.to(z0.dtype) - target.flatten(0, 1)
    return error.square().mean(dim=(1, 2, 3)).view(t.shape).mean(dim=1)  # (N*K,) -> (N, K) -> (N,)


def signal_and_noise(t, schedule, dtype):
    """sqrt(abar_t) and sqrt(1 - abar_t), in the shape of t with (1, 1, 1) appended for (C, H, W)."""
    abar = alphas_cumprod(schedule, t.device)[t][..., None, None, None]
    return abar.sqrt().to(dtype), (1.0 - abar).sqrt().to(dtype)


@torch.no_grad()
def ddim(model, shape, cond, steps, eta, guidance, generator, schedule):
    """Latents z_0 (N, C, H, W) float32, drawn from pure noise in `steps` steps (Song et al. 2021, Eq. 12).

    shape: (N, C, H, W). cond: N conditions or None. eta: 0 is deterministic DDIM, 1 adds as much fresh noise
    per step as DDPM (Eq. 16). guidance: weight of the condition, not used if cond is None. 1 is the plain
    prediction; above 1 samples are more typical and less varied. ValueError for steps outside 1..T, eta
    outside 0..1, and guidance other than 1 with conditions but no null condition.
    """
    if not 1 <= steps <= schedule.T or not 0.0 <= eta <= 1.0:
        raise ValueError(f"ddim: steps must lie in 1..{schedule.T} and eta in 0..1, got {steps=}, {eta=}")
    guided = guidance != 1.0 and cond is not None
    if guided:
        cond = torch.cat([cond, model.embedder.null(cond)])  # one batch for both halves
    device = next(model.parameters()).device
    abar_from_clean = [1.0, *alphas_cumprod(schedule).tolist()]  # [t + 1] is abar_t; [0] the clean latent's
    # Equal steps from T - 1, almost pure noise, down to -1, the clean latent ("trailing": Lin et al. 2024).
    times = [round(schedule.T * (1 - i / steps)) - 1 for i in range(steps + 1)]
    z = torch.randn(shape, generator=generator, device=device)
    for t, t_next in zip(times[:-1], times[1:], strict=True):
        a, a_next = abar_from_clean[t + 1], abar_from_clean[t_next + 1]
        inputs = torch.cat([z, z]) if guided else z
        out = model(inputs, torch.full((len(inputs),), t, device=device), cond).float()
        if guided:
            conditional, unconditional = out.chunk(2)
            # Eq. 6 of Ho and Salimans 2022, whose 1 + w is `guidance` here.
            out = unconditional + guidance * (conditional - unconditional)
        # z0 and eps follow from z = sqrt(a) z0 + sqrt(1 - a) eps and the prediction, which is eps or v.
        if schedule.prediction == "eps":
            eps = out
            z0 = (z - (1 - a) ** 0.5 * eps) / a ** 0.5
        else:
            z0 = a ** 0.5 * z - (1 - a) ** 0.5 * out
            eps = (1 - a) ** 0.5 * z + a ** 0.5 * out
        # Eq. 16. Of the noise variance 1 - a_next, sigma^2 is fresh and the rest is predicted noise.
        sigma = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)) ** 0.5
        z = a_next ** 0.5 * z0 + max(1 - a_next - sigma ** 2, 0.0) ** 0.5 * eps  # max: rounding below 0
        if sigma > 0:
            z = z + sigma * torch.randn(z.shape, generator=generator, device=device)
    return z
