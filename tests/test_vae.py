"""The autoencoder: the paper's parameter counts, closed forms of posterior and KL, shapes, scale, weights."""
from types import SimpleNamespace

import pytest
import torch
import torchvision
from torch.distributions import Normal, kl_divergence

import train
import vae
from extensions import perceptual
from support import paper_networks, settings

COUNTS = {"mnist": 102_553_535, "cifar10": 14_639_807, "celeba64": 29_935_359, "celeba256-text": 83_653_863}


def tiny():
    torch.manual_seed(0)
    return vae.AutoencoderKL(vae.VAEConfig(in_channels=2, out_ch=2, ch=8, ch_mult=(1, 2), resolution=8,
                                           attn_resolutions=(8,)))


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_papers(name):
    with torch.device("meta"):
        model = vae.AutoencoderKL(paper_networks.AUTOENCODERS[name])
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
    posterior = vae.Posterior(torch.full((200_000, 1, 1, 1), 2.0),
                              torch.full((200_000, 1, 1, 1), 2 * torch.tensor(0.3).log()))
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
    scale = vae.latent_scale(model, x)
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


# ------------------------------------------------------------------------------- the terms for large pictures


@pytest.fixture
def vgg(monkeypatch):
    """VGG16's convolutions with random weights in the place of the download; the classifier is not needed."""
    torch.manual_seed(0)
    layers = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])
    monkeypatch.setattr(torchvision.models, "vgg16", lambda weights,
                        progress: SimpleNamespace(features=layers))
    return layers


def test_perceptual_distance_is_that_of_unit_features_before_each_pooling(vgg):
    name, distance = perceptual.perceptual_distance()
    assert name == "vgg16"
    x, y = torch.rand(2, 2, 3, 32, 32) * 2 - 1
    expected = torch.zeros(2)
    for i, (layer, following) in enumerate(zip(vgg, vgg[1:], strict=False)):
        if isinstance(layer, torch.nn.ReLU) and isinstance(following, torch.nn.MaxPool2d):
            a, b = ((vgg[:i + 1](torchvision.transforms.functional.normalize(
                (z + 1) / 2, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]))) for z in (x, y))
            a, b = (z / z.square().sum(1, keepdim=True).sqrt() for z in (a, b))
            expected += (a - b).square().sum(1).mean((1, 2)) / 5
    assert expected.min() > 0 and torch.allclose(distance(x, y), expected, rtol=1e-4)
    assert torch.equal(distance(x, x), torch.zeros(2)) and torch.allclose(distance(x, y), distance(y, x))
    grey = x[:, :1], y[:, :1]
    assert torch.allclose(distance(*grey), distance(*(z.expand(-1, 3, -1, -1) for z in grey)))
    distance(x, y.requires_grad_()).sum().backward()
    assert y.grad.any() and all(p.grad is None for p in vgg.parameters())


def test_without_vgg_weights_image_gradients_are_compared(monkeypatch):
    def no_network(weights, progress):
        raise OSError("no network")

    monkeypatch.setattr(torchvision.models, "vgg16", no_network)
    name, distance = perceptual.perceptual_distance()
    assert name == "image gradients"
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)
    assert distance(2 * ramp, torch.zeros(1, 1, 4, 4)).item() == 2.0  # horizontal slope 2, vertical 0
    assert distance(3 * ramp.mT + 7, torch.ones(1, 1, 4, 4)).item() == 3.0


def test_loss_with_the_perceptual_term():
    model, x = tiny(), torch.randn(3, 2, 8, 8)
    seed = torch.Generator().manual_seed
    plain = vae.loss(model, x, 0.5, seed(3))[0]
    y = model.decode(model.encode(x).sample(seed(3)))
    total = vae.loss(model, x, 0.5, seed(3), perceptual.gradient_distance, 0.3)[0]
    assert torch.allclose(total - plain, 0.3 * 2 * 8 * 8 * perceptual.gradient_distance(x, y).mean(),
                          rtol=1e-3)


def two_pictures():
    """Real pictures (stripes), decoded ones that depend on a last weight, and a reconstruction loss."""
    torch.manual_seed(0)
    x = torch.tensor([1.0, -1.0]).repeat(16).expand(4, 1, 32, 32).clone()
    last = torch.nn.Parameter(torch.randn(1, 2, 3, 3))
    y = torch.nn.functional.conv2d(torch.randn(4, 2, 34, 34), last)
    return x, y, (x - y).abs().sum((1, 2, 3)).mean(), last


def test_discriminator_has_the_originals_size():
    # NLayerDiscriminator(3, 64, n_layers=3); BatchNorm and GroupNorm have equally many parameters
    assert sum(p.numel() for p in perceptual.Adversary(3).parameters()) == 2_765_633
    assert perceptual.Adversary(3).net(torch.zeros(2, 3, 64, 64)).shape == (2, 1, 6, 6)


def test_adversary_waits_then_learns_to_tell_real_from_decoded():
    x, y, reconstruction, last = two_pictures()
    adversary = perceptual.Adversary(1, start=2, width=32)
    begin = [p.clone() for p in adversary.parameters()]
    assert [adversary(x, y, reconstruction, last).item() for _ in range(2)] == [0.0, 0.0]
    assert all(torch.equal(a, b) for a, b in zip(begin, adversary.parameters(), strict=True))
    for _ in range(12):
        adversary(x, y, reconstruction, last)
    assert not torch.equal(begin[0], next(adversary.parameters()))
    assert last.grad is None  # its own steps leave the autoencoder alone
    real, fake = (adversary.net(z).mean().item() for z in (x, y))
    assert real > fake + 0.5


def test_adversarial_term_has_the_adaptive_length_and_pushes_towards_real():
    x, y, reconstruction, last = two_pictures()
    adversary = perceptual.Adversary(1, weight=0.25, width=32)
    for _ in range(5):
        term = adversary(x, y, reconstruction, last)
    push, pull = (torch.autograd.grad(a, last, retain_graph=True)[0] for a in (term, reconstruction))
    assert push.norm().item() == pytest.approx(0.25 * pull.norm().item(), rel=0.02)
    score = torch.autograd.grad(adversary.net(y).mean(), last)[0]
    assert (score * push).sum() < 0  # descending the loss raises the score


class Stop:
    """A Ctrl-C after some steps (`fit` asks twice per step)."""

    def __init__(self, steps):
        self.left = 2 * steps

    @property
    def asked(self):
        self.left -= 1
        return self.left < 0

    def leave(self, out):
        raise SystemExit(130)


def test_stopped_adversarial_training_ends_like_an_unstopped_one(tmp_path, monkeypatch):
    adversary = perceptual.Adversary
    monkeypatch.setattr(perceptual, "Adversary", lambda *args: adversary(*args, width=32))  # small and fast
    monkeypatch.setattr(perceptual, "perceptual_distance",
                        lambda device: ("vgg16", perceptual.gradient_distance))
    images = torch.randint(256, (20, 1, 32, 32), generator=torch.Generator().manual_seed(5),
                           dtype=torch.uint8)

    def train_six_steps(out, stop_after=1000):
        s = settings.parse(["--preset", "smoke", "--out", str(tmp_path / out), "--vae-steps", "6",
                            "--vae-batch", "4",
                         "--perceptual-weight", "1", "--adversarial-weight", "0.5", "--adversarial-start",
                         "1",
                         "--device", "cpu"])
        s.bf16 = False
        return train.train_autoencoder(s, images, {}, Stop(stop_after))["state"]

    whole = train_six_steps("a")
    with pytest.raises(SystemExit):
        train_six_steps("b", stop_after=2)
    resumed = train_six_steps("b")
    assert all(torch.equal(whole[k], resumed[k]) for k in whole)
