"""The shift of the latents (extensions/shift.py): exact algebra, nothing at first, sampling, release."""
import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import diffusion
import dp_sgd
import sample
import train
import unet
import vae
from extensions import shift, text
from support import files, trainable

SHAPE = vae.VAEConfig().latent_shape
COSINE = diffusion.Schedule("cosine", "v")


def tiny(schedule=COSINE, embedder=None):
    """A model with a shift, and its double without one."""
    torch.manual_seed(0)
    embedder = unet.ClassEmbedder(3, 6, null_class=True) if embedder is None else embedder
    plain = unet.LatentModel(unet.UNet(unet.UNetConfig(4, 4, 32, context_dim=6)), embedder).double()
    for p in plain.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model = copy.deepcopy(plain)
    shift.insert(model, SHAPE, schedule)
    return model, plain


def choose(model, tune, from_block=0):
    return trainable.choose(model, SimpleNamespace(tune=tune, from_block=from_block, vae=vae.VAEConfig(),
                                                   schedule=COSINE))


@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_of_a_shifted_model_is_that_of_latents_moved_back(prediction):
    schedule = replace(COSINE, prediction=prediction)
    model, plain = tiny(schedule)
    torch.nn.init.normal_(model.unet.matrix.weight)
    labels, g = torch.tensor([0, 2, 1]), torch.Generator().manual_seed(1)
    z0, _, t, noise = diffusion.draw(torch.randn(3, *SHAPE, generator=g).double(), None, 2, g, schedule)
    b = model.unet.shift(3, model.embedder(labels))
    assert b.shape == z0.shape and not torch.allclose(b[0], b[1])
    moved = diffusion.loss(model, z0 + b, labels, t, noise, schedule)
    torch.testing.assert_close(moved, diffusion.loss(plain, z0, labels, t, noise, schedule))


def test_at_first_it_changes_nothing_and_samples_move_by_it():
    model, plain = tiny()
    labels = torch.tensor([0, 2, 1])

    def samples(network):
        generator = torch.Generator().manual_seed(0)
        return diffusion.ddim(network.float(), (3, *SHAPE), labels, 20, 0.0, 1.0, generator, COSINE)
    before = samples(plain)
    assert torch.equal(samples(model), before)
    torch.nn.init.normal_(model.unet.matrix.weight)
    b = model.unet.shift(3, model.embedder(labels))
    # All but exactly: sampling begins with noise alone, which is z_T of both up to sqrt(abar_T) = 0.003.
    torch.testing.assert_close(samples(model), before + b, rtol=0, atol=0.1)
    assert b.abs().mean() > 0.5


def test_padding_of_a_prompt_does_not_move_it():
    model, _ = tiny(embedder=text.TextEncoder(9, 6, 8, width=16, layers=1))
    torch.nn.init.normal_(model.unet.matrix.weight)
    tokens = torch.tensor([[text.BEGIN, 5, 6, text.PAD, text.PAD]])

    def moved(tokens):
        return model.unet.shift(1, model.embedder(tokens), model.embedder.mask(tokens))
    torch.testing.assert_close(moved(tokens), moved(tokens[:, :3]))
    assert not torch.allclose(moved(tokens), moved(torch.tensor([[text.BEGIN, 5, 7]])))


def test_the_mean_of_a_class_is_learned_where_the_denoiser_is_frozen():
    """Of a denoiser that knows nothing (it predicts 0) the shift alone learns the mean of each class."""
    model = tiny()[1]
    torch.nn.init.normal_(model.embedder.embedding.weight)
    choose(model, "shift")
    torch.nn.init.zeros_(model.unet.unet.out[-1].weight)
    torch.nn.init.zeros_(model.unet.unet.out[-1].bias)
    model = model.float()
    labels, g = torch.arange(3).repeat(40), torch.Generator().manual_seed(0)
    target = torch.randn(3, *SHAPE, generator=g)
    z0 = target[labels] + 0.1 * torch.randn(120, *SHAPE, generator=g)
    optimizer = torch.optim.Adam(model.unet.matrix.parameters(), 0.02)
    for _ in range(150):
        optimizer.zero_grad()
        diffusion.loss(model, *diffusion.draw(z0, labels, 1, g, COSINE), COSINE).mean().backward()
        optimizer.step()
    found = model.unet.shift(3, model.embedder(torch.arange(3)))
    assert torch.corrcoef(torch.stack([found.flatten(), target.flatten()]))[0, 1] > 0.99


def test_an_empty_batch_is_a_step_of_noise_in_every_entry():
    model = tiny()[1].float()
    choose(model, "shift")
    # A seed: noise is rounded to a grid, and once in about 250 steps one of the 448 entries is exactly 0.
    engine = dp_sgd.DPSGD(model, 1.0, 1.0, 4, generator=torch.Generator().manual_seed(0))
    engine.step(torch.optim.SGD(engine.parameters, 1.0))
    assert model.unet.matrix.weight.abs().min() > 0


def test_what_cannot_be_chosen_is_refused():
    with pytest.raises(ValueError, match="already has a shift"):
        choose(tiny()[0], "attention+shift")
    for tune, from_block, message in (("attention+lora", 0, "unknown tune"), ("+shift+shift", 0, "unknown"),
                                      ("", 0, "unknown"), ("+shift", 0, "unknown"),
                                      ("shift", 2, "from_block only applies"), ("lora:0+shift", 0, "rank")):
        with pytest.raises(ValueError, match=message):
            choose(tiny()[1], tune, from_block)


# LoRA: two matrices beside each of the 4 + 2 projections with a gradient, in 7 modules; and the embedder.
@pytest.mark.parametrize("tune,others", [("shift", 0), ("embedder+shift", 1), ("lora:2+shift", 2 * 42 + 1)])
def test_what_is_chosen(tune, others):
    model = tiny()[1]
    names = choose(model, tune)
    assert "unet.matrix.weight" in names and len(names) == others + 1
    assert names == [name for name, p in model.named_parameters() if p.requires_grad]


def test_a_release_keeps_its_shift(tmp_path):
    train.main(["--preset", "smoke", "--tune", "lora:2+shift", "--steps", "2", "--out", str(tmp_path / "run"),
                "--sample-steps", "1", "--accountant", "rdp", "--precision", "float32"])
    release = sample.load_release(tmp_path / "run")
    assert release.privacy["tune"] == "lora:2+shift"
    images = sample.generate(release, torch.arange(4), steps=2, seed=0, progress=False)
    release.model.unet.matrix.weight.data.mul_(100)
    assert not torch.equal(sample.generate(release, torch.arange(4), steps=2, seed=0, progress=False), images)
    path = tmp_path / "run" / "release" / "model.pt"
    files.save({key: value for key, value in files.load(path).items() if key != "shift"}, path)
    with pytest.raises(ValueError, match="model.pt"):
        sample.load_release(tmp_path / "run")
    for damaged in ((4, 10 ** 6, 10 ** 6), (4, 4), "all", (4, -4, -4)):
        files.save({**files.load(path), "shift": damaged}, path)
        with pytest.raises(ValueError, match="model.pt"):
            sample.load_release(tmp_path / "run")
