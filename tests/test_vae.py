"""The autoencoder: parameter counts of the paper's networks, closed forms of posterior and KL, shapes, scale, weights."""
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import vae

COUNTS = {"mnist": 102_553_535, "cifar10": 14_639_807, "celeba64": 29_935_359, "celeba256-text": 83_653_863}


def tiny():
    torch.manual_seed(0)
    return vae.AutoencoderKL(vae.VAEConfig(in_channels=2, out_ch=2, ch=8, ch_mult=(1, 2), resolution=8, attn_resolutions=(8,)))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_papers(name):
    with torch.device("meta"):
        model = vae.AutoencoderKL(vae.PAPER[name])
    assert sum(p.numel() for p in model.parameters()) == COUNTS[name]


def test_shapes():
    model = tiny()
    posterior = model.encode(torch.randn(3, 2, 8, 8))
    assert posterior.mean.shape == posterior.logvar.shape == (3, *model.latent_shape) == (3, 4, 4, 4)
    assert model.decode(posterior.mean).shape == (3, 2, 8, 8)


def test_kl_equals_torch_distributions():
    mean, logvar = torch.randn(5, 3, 2, 2), torch.randn(5, 3, 2, 2)
    expected = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).sum((1, 2, 3))
    assert torch.allclose(vae.Posterior(mean, logvar).kl(), expected, rtol=1e-5)


def test_posterior_sample_has_its_mean_and_deviation():
    generator = torch.Generator().manual_seed(1)
    posterior = vae.Posterior(torch.full((200_000, 1, 1, 1), 2.0), torch.full((200_000, 1, 1, 1), 2 * torch.tensor(0.3).log()))
    z = posterior.sample(generator)
    assert abs(z.mean() - 2.0) < 4 * 0.3 / 200_000 ** 0.5
    assert abs(z.std() - 0.3) < 4 * 0.3 / 400_000 ** 0.5
    assert vae.Posterior(torch.zeros(1, 1, 1, 1), torch.full((1, 1, 1, 1), 1e9)).logvar.item() == 20.0


def test_loss_is_sum_of_errors_plus_weighted_kl():
    model, x = tiny(), torch.randn(3, 2, 8, 8)
    g = torch.Generator()
    loss, error, kl = vae.loss(model, x, 0.5, g.manual_seed(3))
    posterior = model.encode(x)
    rec = (x - model.decode(posterior.sample(g.manual_seed(3)))).abs()
    assert torch.allclose(loss, rec.sum() / 3 + 0.5 * posterior.kl().mean())
    assert torch.allclose(error, rec.mean()) and torch.allclose(kl, posterior.kl().mean())


def test_latent_scale_gives_unit_deviation():
    model, x = tiny(), torch.randn(64, 2, 8, 8)
    scale = vae.latent_scale(model, x, batch=10)
    assert abs((model.encode(x).mean * scale).std().item() - 1) < 1e-5


def test_it_learns():
    model = tiny()
    x = (torch.rand(8, 2, 1, 1) * 2 - 1).expand(-1, -1, 8, 8)  # plain colours: compressible
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    first = vae.loss(model, x)[0].item()
    for _ in range(50):
        optimizer.zero_grad()
        loss = vae.loss(model, x)[0]
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.6 * first


def test_downsampling_pads_right_and_bottom_only():
    layer = vae.Downsample(1)
    torch.nn.init.ones_(layer.conv.weight)
    torch.nn.init.zeros_(layer.conv.bias)
    out = layer(torch.ones(1, 1, 4, 4))[0, 0]
    assert out.tolist() == [[9.0, 6.0], [6.0, 4.0]]  # with the usual padding of 1 all round: 4 stands first


def test_bad_config_is_refused():
    with pytest.raises(ValueError, match="divisible"):
        vae.AutoencoderKL(vae.VAEConfig(resolution=30))


def test_load_ldm_is_strict():
    source, target = tiny(), tiny()
    for p in target.parameters():
        torch.nn.init.zeros_(p)
    theirs = {"first_stage_model." + k: v for k, v in source.state_dict().items()}
    vae.load_ldm(target, theirs | {"first_stage_model.loss.logvar": torch.zeros(1), "model.diffusion_model.x": torch.zeros(1)})
    assert all(torch.equal(a, b) for a, b in zip(source.parameters(), target.parameters(), strict=True))
    vae.load_ldm(target, source.state_dict())
    theirs.popitem()
    with pytest.raises(ValueError, match="missing"):
        vae.load_ldm(target, theirs)
