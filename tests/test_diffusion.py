"""Diffusion: schedule, exactness of the loss, randomness of draw, DDIM on a Gaussian with a known score."""
import math

import pytest
import torch
from torch import nn

import diffusion
from diffusion import Schedule

SCHEDULES = [Schedule(kind, prediction) for kind in ("linear", "cosine") for prediction in ("eps", "v")]


def test_the_papers_schedule():
    abar = diffusion.alphas_cumprod(diffusion.PAPER)
    betas = [(0.0015 ** 0.5 + i / 999 * (0.0155 ** 0.5 - 0.0015 ** 0.5)) ** 2 for i in range(1000)]
    assert abs(abar[0].item() - (1 - 0.0015)) < 1e-12
    assert abs(abar[999].item() / math.prod(1 - b for b in betas) - 1) < 1e-9


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_fall_from_one_to_zero(schedule):
    abar = diffusion.alphas_cumprod(schedule)
    assert abar.shape == (1000,) and (abar.diff() <= 0).all() and abar[0] > 0.99 and 0 < abar[-1] < 0.01


def test_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="schedule"):
        Schedule("quadratic")


class Exact(nn.Module):
    """The optimal denoiser for latents N(mean_c, deviation^2) per condition: E[target | z_t], closed form."""

    def __init__(self, schedule, means, deviation):
        super().__init__()
        self.schedule, self.deviation = schedule, deviation
        self.means = nn.Parameter(means)

    def forward(self, z, t, cond):
        a = diffusion.alphas_cumprod(self.schedule)[t.long()].float()[:, None, None, None]
        mean = self.means[cond].view(-1, 1, 1, 1)
        variance = a * self.deviation ** 2 + 1 - a
        eps = (1 - a).sqrt() * (z - a.sqrt() * mean) / variance
        if self.schedule.prediction == "eps":
            return eps
        z0 = mean + a.sqrt() * self.deviation ** 2 * (z - a.sqrt() * mean) / variance
        return a.sqrt() * eps - (1 - a).sqrt() * z0


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_with_the_exact_score_draws_that_gaussian(schedule, eta):
    model = Exact(schedule, torch.tensor([-1.0, 1.0]), 0.5)
    cond = torch.arange(20_000) % 2
    z = diffusion.ddim(model, (20_000, 1, 1, 1), cond, 1000, eta, 1.0, torch.Generator().manual_seed(0),
                       schedule)
    for c, mean in ((0, -1.0), (1, 1.0)):
        part = z[cond == c]
        assert abs(part.mean().item() - mean) < 0.02
        assert abs(part.std().item() - 0.5) < 0.012


def test_ddim_is_deterministic_given_the_generator_and_eta_zero_adds_no_noise():
    model = Exact(diffusion.PAPER, torch.tensor([0.0]), 1.0)
    cond = torch.zeros(8, dtype=torch.int64)

    def run(eta):
        return diffusion.ddim(model, (8, 1, 2, 2), cond, 20, eta, 1.0, torch.Generator().manual_seed(5),
                              diffusion.PAPER)

    assert torch.equal(run(0.0), run(0.0)) and torch.equal(run(1.0),
                                                           run(1.0)) and not torch.equal(run(0.0), run(1.0))


def test_guidance_moves_away_from_the_unconditional():
    class Guided(Exact):
        embedder = type("Embedder", (), {"null": staticmethod(lambda labels: torch.zeros_like(labels))})

    schedule = Schedule("cosine", "eps")
    model = Guided(schedule, torch.tensor([0.0, 1.0]), 0.5)  # condition 0 plays "no condition"
    cond = torch.ones(4000, dtype=torch.int64)

    def mean(w):
        g = torch.Generator().manual_seed(0)
        return diffusion.ddim(model, (4000, 1, 1, 1), cond, 50, 0.0, w, g, schedule).mean().item()

    assert abs(mean(1.0) - 1.0) < 0.05 and abs(mean(0.0)) < 0.05 and mean(2.0) > 1.5


@pytest.mark.parametrize("bad", [{"steps": 0}, {"steps": 1001}, {"eta": -0.1}, {"eta": 1.5}])
def test_ddim_refuses(bad):
    with pytest.raises(ValueError, match="ddim"):
        given = {"steps": 50, "eta": 0.0} | bad
        diffusion.ddim(Exact(diffusion.PAPER, torch.zeros(1), 1.0), (1, 1, 1, 1),
                       torch.zeros(1, dtype=torch.int64), **given,
                       guidance=1.0, generator=None, schedule=diffusion.PAPER)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_loss_is_zero_for_the_truth_and_the_mean_over_k(schedule):
    torch.manual_seed(0)
    z0, cond, t, noise = diffusion.draw(torch.randn(4, 2, 3, 3), torch.arange(4), 3, None, schedule)

    class Truth(nn.Module):
        def forward(self, z_t, steps, cond):
            a = diffusion.alphas_cumprod(schedule)[t][..., None, None, None].float()
            assert torch.equal(steps, t.flatten())
            assert torch.allclose(z_t.view_as(noise), a.sqrt() * z0[:, None] + (1 - a).sqrt() * noise,
                                  atol=1e-6)
            target = (
                noise if schedule.prediction == "eps" else a.sqrt() * noise - (1 - a).sqrt() * z0[:, None]
            )
            # off by 0, 1, 2 for k = 0, 1, 2
            return (target + torch.arange(3.0)[None, :, None, None, None]).flatten(0, 1)

    loss = diffusion.loss(Truth(), z0, cond, t, noise, schedule)
    assert loss.shape == (4,) and torch.allclose(loss, torch.full((4,), 5 / 3), atol=1e-4)


def test_draw():
    g = torch.Generator().manual_seed(0)
    z = torch.stack([torch.zeros(4000, 1, 1, 1), torch.ones(4000, 1, 1, 1)], 1)  # two orientations
    z0, cond, t, noise = diffusion.draw(z, torch.ones(4000, dtype=torch.int64), 2, g, diffusion.PAPER,
                                        torch.tensor([7]),
                                        drop=0.25)
    assert z0.shape == (4000, 1, 1, 1) and t.shape == (4000, 2) and noise.shape == (4000, 2, 1, 1, 1)
    assert abs(z0.mean().item() - 0.5) < 0.04  # a fair coin picks the orientation
    assert set(cond.tolist()) == {1, 7} and abs((cond == 7).float().mean().item() - 0.25) < 0.03
    assert t.min() >= 0 and t.max() <= 999 and abs(t.float().mean().item() - 499.5) < 15
    assert abs(noise.std().item() - 1) < 0.04 and not torch.equal(noise[:, 0], noise[:, 1])
    again = diffusion.draw(z, torch.ones(4000, dtype=torch.int64), 2, torch.Generator().manual_seed(0),
                           diffusion.PAPER, torch.tensor([7]), drop=0.25)
    assert all(torch.equal(a, b) for a, b in zip((z0, cond, t, noise), again, strict=True))
