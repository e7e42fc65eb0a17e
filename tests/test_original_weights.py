"""Weights of the original latent-diffusion code, and `python -m extensions.original_weights`.

Names, shapes and values are those of the original classes. The program makes a run folder of such weights
for train.py --init.

`unet_shapes` and `vae_shapes` restate from scratch which tensors the original classes UNetModel
(openaimodel.py), Encoder and Decoder (model.py) and AutoencoderKL (autoencoder.py) have. Their output was
compared with the state_dict of those classes for every network of the paper, and the numbers in EXPECTED were
computed by them (CompVis/latent-diffusion; AttentionBlock with the legacy head order) from the weights that
`waves` makes.
"""
import dataclasses
import math

import pytest
import torch

import datasets
import diffusion
import train
import tuning
import unet
import vae
from datasets import pixels
from extensions import original_weights
from support import checkpoints, files, paper_networks, presets


def affine(name, *shape):
    """A layer's weight and its bias."""
    return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}


def unet_shapes(c):
    """{name: shape} of the original UNetModel, without prefix."""
    def res(name, a, b):
        out = affine(f"{name}.in_layers.0", a) | affine(f"{name}.in_layers.2", b, a, 3, 3)
        out |= affine(f"{name}.emb_layers.1", (2 if c.use_scale_shift_norm else 1) * b, 4 * c.model_channels)
        out |= affine(f"{name}.out_layers.0", b) | affine(f"{name}.out_layers.3", b, b, 3, 3)
        return out | (affine(f"{name}.skip_connection", b, a, 1, 1) if a != b else {})

    def attention(name, w):
        if not c.use_spatial_transformer:
            return affine(f"{name}.norm", w) | affine(f"{name}.qkv", 3 * w, w,
                                                      1) | affine(f"{name}.proj_out", w, w, 1)
        out = affine(f"{name}.norm", w) | affine(f"{name}.proj_in", w, w, 1,
                                                 1) | affine(f"{name}.proj_out", w, w, 1, 1)
        for block in (f"{name}.transformer_blocks.{i}" for i in range(c.transformer_depth)):
            for kind, d in (("attn1", w), ("attn2", c.context_dim)):
                out |= {f"{block}.{kind}.to_{x}.weight": (w, w if x == "q" else d) for x in "qkv"}
                out |= affine(f"{block}.{kind}.to_out.0", w, w)
            out |= affine(f"{block}.ff.net.0.proj", 8 * w, w) | affine(f"{block}.ff.net.2", w, 4 * w)
            out |= affine(f"{block}.norm1", w) | affine(f"{block}.norm2", w) | affine(f"{block}.norm3", w)
        return out

    w = c.model_channels
    out = affine("time_embed.0", 4 * w, w) | affine("time_embed.2", 4 * w, 4 * w)
    out |= affine("input_blocks.0.0", w, c.in_channels, 3, 3)
    skips, ds, n = [w], 1, 1
    for level, mult in enumerate(c.channel_mult):
        for _ in range(c.num_res_blocks):
            out |= res(f"input_blocks.{n}.0", w, mult * c.model_channels)
            w = mult * c.model_channels
            out |= attention(f"input_blocks.{n}.1", w) if ds in c.attention_resolutions else {}
            skips, n = [*skips, w], n + 1
        if level < len(c.channel_mult) - 1:
            name = f"input_blocks.{n}.0"
            out |= res(name, w, w) if c.resblock_updown else affine(f"{name}.op", w, w, 3, 3)
            skips, n, ds = [*skips, w], n + 1, 2 * ds
    out |= res("middle_block.0", w, w) | attention("middle_block.1", w) | res("middle_block.2", w, w)
    n = 0
    for level, mult in reversed(list(enumerate(c.channel_mult))):
        for i in range(c.num_res_blocks + 1):
            out |= res(f"output_blocks.{n}.0", w + skips.pop(), mult * c.model_channels)
            w, at = mult * c.model_channels, 1
            if ds in c.attention_resolutions:
                out, at = out | attention(f"output_blocks.{n}.1", w), 2
            if level and i == c.num_res_blocks:
                name, ds = f"output_blocks.{n}.{at}", ds // 2
                out |= res(name, w, w) if c.resblock_updown else affine(f"{name}.conv", w, w, 3, 3)
            n += 1
    return out | affine("out.0", w) | affine("out.2", c.out_channels, w, 3, 3)


def vae_shapes(c):
    """{name: shape} of the original AutoencoderKL, without its training loss."""
    def res(name, a, b):
        out = affine(f"{name}.norm1", a) | affine(f"{name}.conv1", b, a, 3, 3)
        out |= affine(f"{name}.norm2", b) | affine(f"{name}.conv2", b, b, 3, 3)
        return out | (affine(f"{name}.nin_shortcut", b, a, 1, 1) if a != b else {})

    def attention(name, w):
        out = affine(f"{name}.norm", w)
        for part in ("q", "k", "v", "proj_out"):
            out |= affine(f"{name}.{part}", w, w, 1, 1)
        return out

    def middle(name, w):
        return res(f"{name}.block_1", w, w) | attention(f"{name}.attn_1", w) | res(f"{name}.block_2", w, w)

    widths, side = [c.ch * m for m in c.ch_mult], c.resolution
    deepest = len(widths) - 1
    out, w = affine("encoder.conv_in", c.ch, c.in_channels, 3, 3), c.ch
    for level, width in enumerate(widths):
        for i in range(c.num_res_blocks):
            out |= res(f"encoder.down.{level}.block.{i}", w, width)
            w = width
            out |= attention(f"encoder.down.{level}.attn.{i}", w) if side in c.attn_resolutions else {}
        if level < deepest:
            out |= affine(f"encoder.down.{level}.downsample.conv", w, w, 3, 3)
            side //= 2
    out |= middle("encoder.mid", w) | affine("encoder.norm_out", w) | affine("encoder.conv_out",
                                                                             2 * c.z_channels, w, 3, 3)
    out |= affine("quant_conv", 2 * c.embed_dim, 2 * c.z_channels, 1, 1)
    out |= affine("post_quant_conv", c.z_channels, c.embed_dim, 1, 1)
    out |= affine("decoder.conv_in", w, c.z_channels, 3, 3) | middle("decoder.mid", w)
    for level in range(deepest, -1, -1):
        for i in range(c.num_res_blocks + 1):
            out |= res(f"decoder.up.{level}.block.{i}", w, widths[level])
            w = widths[level]
            out |= attention(f"decoder.up.{level}.attn.{i}", w) if side in c.attn_resolutions else {}
        if level:
            out |= affine(f"decoder.up.{level}.upsample.conv", w, w, 3, 3)
            side *= 2
    return out | affine("decoder.norm_out", w) | affine("decoder.conv_out", c.out_ch, w, 3, 3)


def wave(shape, phase):
    """sin(0.3 i^2 + phase), i = 0, 1, ..., in a tensor of this shape: not of low rank as a plain wave."""
    return torch.sin(0.3 * torch.arange(math.prod(shape), dtype=torch.float64) ** 2
                     + phase).float().view(shape)


def waves(shapes, prefix=""):
    """Weights without random numbers: waves of length about 1 per output (1 +- 0.3 where a norm scales)."""
    return {prefix + name: 1 + 0.3 * wave(shape, i) if len(shape) == 1 and name.endswith("weight") else
            wave(shape, i) * (2 / max(1, math.prod(shape[1:]))) ** 0.5 for i,
            (name, shape) in enumerate(sorted(shapes.items()))}


# Small networks with every part that the paper's have.
UNETS = {
    "mnist": unet.UNetConfig(3, 3, 32, (1, 2), 1, (1, 2), 4, context_dim=5),
    "cifar10": unet.UNetConfig(3, 3, 32, (1, 2, 2), 2, (1, 2, 4), 8, None, True, 1, 12, False, False),
    "celeba32": unet.UNetConfig(3, 3, 32, (1, 2), 2, (2, 1), 8, 16, False, 1, None, True, True),
    "celeba64": unet.UNetConfig(3, 3, 32, (1, 2), 1, (2, 1), 4, None, False, 1, None, True, True),
    # no attention deepest, depth 2
    "text": unet.UNetConfig(4, 4, 32, (1, 2, 2), 1, (2, 1), 8, None, True, 2, 20, False, False),
}
VAES = {
    "mnist": vae.VAEConfig(3, 3, 32, (1, 2, 3), 2, (16, 8), 16, 3, 3, 32),
    "celeba256-text": vae.VAEConfig(3, 3, 32, (1, 2), 1, (), 16, 4, 4, 32),
}


def unet_values(forward, c):
    """Four numbers of forward(x, t, context) on fixed input: corner pixels and the mean square."""
    context = None if c.context_dim is None else wave((2, 7 if c.context_dim == 20 else 1, c.context_dim),
                                                      1.0)
    out = forward(wave((2, c.in_channels, 8, 8), 0.5), torch.tensor([3, 700]), context).double()
    return [out[0, 0, 0, 0].item(), out[1, -1, -1, -1].item(), out[1, 0, 3, 4].item(),
            out.square().mean().item()]


def vae_values(encode, decode, c):
    """Numbers of the posterior's mean and log-variance of a fixed picture and of the mean's decoding."""
    mean, logvar = encode(wave((2, 3, c.resolution, c.resolution), 0.5))
    y = decode(mean).double()
    return [mean[0, 0, 0, 0].item(), mean[1, -1, -1, -1].item(), logvar.double().square().mean().item(),
            y[0, 0, 0, 0].item(), y[1, -1, -1, -1].item(), y.square().mean().item()]


EXPECTED = {  # from the original classes
    ("unet", "mnist"): [0.72660834, 0.2751309, 2.1735737, 1.5790965],
    ("unet", "cifar10"): [1.661744, 0.079086415, 2.0364947, 2.0204448],
    ("unet", "celeba32"): [-1.5892311, -0.048049528, -0.38410091, 0.50919071],
    ("unet", "celeba64"): [-1.3143697, -0.69945645, -1.6534859, 0.88839585],
    ("unet", "text"): [-2.2273037, -1.1969006, -1.0613976, 1.5622477],
    ("vae", "mnist"): [-1.9109125, -0.078702688, 0.76357084, 2.1309307, 0.68156338, 1.6520054],
    ("vae", "celeba256-text"): [-2.152962, -1.9170082, 1.5518847, 1.8625689, 0.28557557, 1.5173687],
}


@pytest.mark.parametrize("name", UNETS)
def test_unet_computes_what_the_original_computes(name):
    network = unet.UNet(UNETS[name])
    original_weights.load_unet(network, waves(unet_shapes(UNETS[name]), "model.diffusion_model."))
    with torch.no_grad():
        assert unet_values(network, UNETS[name]) == pytest.approx(EXPECTED["unet", name], rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("name", VAES)
def test_autoencoder_computes_what_the_original_computes(name):
    model = vae.AutoencoderKL(VAES[name])
    original_weights.load_autoencoder(model, waves(vae_shapes(VAES[name]), "first_stage_model."))

    def encode(x):
        posterior = model.encode(x)
        return posterior.mean, posterior.logvar

    with torch.no_grad():
        assert vae_values(encode, model.decode, VAES[name]) == pytest.approx(EXPECTED["vae", name], rel=1e-4,
                                                                             abs=1e-5)


def test_names_and_shapes_cover_the_papers_networks():
    """The rule above gives exactly the tensors that our networks read, at the authors' sizes."""
    for c in paper_networks.UNETS.values():
        with torch.device("meta"):
            network = unet.UNet(c)
            original_weights.load_unet(network,
                                       {k: torch.empty(shape) for k, shape in unet_shapes(c).items()})
    for c in paper_networks.AUTOENCODERS.values():
        with torch.device("meta"):
            original_weights.load_autoencoder(vae.AutoencoderKL(c),
                                              {k: torch.empty(shape) for k, shape in vae_shapes(c).items()})


@pytest.mark.parametrize("load, network, shapes, prefix, name", [
    (original_weights.load_unet, unet.UNet(UNETS["mnist"]), unet_shapes(UNETS["mnist"]),
     "model.diffusion_model.",
     "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"),
    (original_weights.load_unet, unet.UNet(UNETS["celeba64"]), unet_shapes(UNETS["celeba64"]),
     "model.diffusion_model.",
     "middle_block.1.qkv.weight"),
    (original_weights.load_autoencoder, vae.AutoencoderKL(VAES["mnist"]), vae_shapes(VAES["mnist"]),
     "first_stage_model.",
     "encoder.mid.attn_1.q.weight")])
def test_loading_is_strict_and_all_or_nothing(load, network, shapes, prefix, name):
    weights = {prefix + k: torch.ones(shape) for k, shape in shapes.items()}
    others = {"cond_stage_model.embedding.weight": torch.zeros(26, 5), "model_ema.decay": torch.zeros(()),
              "betas": torch.zeros(9), "loss.logvar": torch.zeros(()), "model.diffusion_model.x": 0,
              "first_stage_model.loss.logvar": torch.zeros(()),
              "first_stage_model.x": 0}
    others.pop(prefix + "x")  # one of the other network is no business of this one
    load(network, {"epoch": 3, "state_dict": weights | others, "callbacks": {}})
    assert all((p == 1).all() for p in network.parameters())
    load(network, {k.removeprefix(prefix): torch.full_like(v, 2.0) for k, v in weights.items()})
    assert all((p == 2).all() for p in network.parameters())
    ours = name.replace("transformer_blocks", "blocks")
    without = {k: v for k, v in weights.items() if k != prefix + name}
    for broken, message in ((without, f"missing {ours}"),
                            (weights | {prefix + "extra": torch.ones(1)}, "unexpected extra"),
                            (weights | {prefix + name: torch.ones(3, 3)}, rf"{ours} is \(3, 3\)"),
                            (weights | {prefix + name: torch.ones(())}, rf"{ours} is \(\)"), ({}, "missing")):
        with pytest.raises(ValueError, match=message) as refused:
            load(network, broken)
        assert "\n" not in str(refused.value)
    assert all((p == 2).all() for p in network.parameters())


def test_colour_weights_on_grey_pictures():
    c = dataclasses.replace(VAES["celeba256-text"], ch_mult=(1, 1))
    colour, grey = vae.AutoencoderKL(c), vae.AutoencoderKL(dataclasses.replace(c, in_channels=1, out_ch=1))
    weights = waves(vae_shapes(c), "first_stage_model.")
    original_weights.load_autoencoder(colour, weights)
    original_weights.load_autoencoder(grey, original_weights.to_grey({"state_dict": weights}))
    x = wave((2, 1, 16, 16), 0.3)
    with torch.no_grad():
        z = grey.encode(x).mean
        assert torch.allclose(z, colour.encode(x.expand(-1, 3, -1, -1)).mean, rtol=1e-4, atol=1e-5)
        assert torch.allclose(grey.decode(z), colour.decode(z).mean(1, keepdim=True), rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------- python -m extensions.original_weights

# 8 groups, where the original has 32: the conversion sets them.
TINY = dict(vae=vae.VAEConfig(1, 1, 32, (1, 1, 1, 1), 1, (), 32, 3, 3, 8),
            unet=unet.UNetConfig(3, 3, 32, (1, 2), context_dim=5, num_groups=8),
            cond_drop=0.0, public_n=60, private_n=200, batch_size=20, steps=1, delta=1e-3, sample_steps=1)
COLOUR = dataclasses.replace(TINY["vae"], in_channels=3, out_ch=3)


def checkpoint(**changes):
    """What the original code saves, for networks of the size TINY, with 26 classes."""
    betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 1000, dtype=torch.float64) ** 2
    state = waves(unet_shapes(TINY["unet"]), "model.diffusion_model.") | waves(vae_shapes(COLOUR),
                                                                               "first_stage_model.")
    state |= {"cond_stage_model.embedding.weight": wave((26, 5), 0.2), "model_ema.decay": torch.tensor(0.9),
              "betas": betas.float(), "alphas_cumprod": (1 - betas).cumprod(0).float(),
              "scale_factor": torch.tensor(0.7)}
    return {"epoch": 7, "global_step": 9,
            "state_dict": {k: v for k, v in (state | changes).items() if v is not None}}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setitem(presets.PRESETS, "smoke", presets.PRESETS["smoke"] | TINY)


FLAGS = ["--preset", "smoke", "--precision", "float32", "--accountant", "rdp", "--device", "cpu"]


def convert(*flags):
    return original_weights.main([*map(str, flags), "--preset", "smoke", "--device", "cpu"])


def both(run):
    """The contents of public/vae.pt and public/ldm.pt of a run folder."""
    return [files.load(run / "public" / name) for name in ("vae.pt", "ldm.pt")]


def test_a_checkpoint_takes_the_place_of_the_public_stages(tmp_path, monkeypatch):
    torch.save(checkpoint(), tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", "--out", tmp_path / "original")
    monkeypatch.setattr(train, "fit", None)  # a TypeError if a public stage began
    train.main([*FLAGS, "--out", str(tmp_path / "r"), "--init", str(tmp_path / "original")])
    first, second = both(tmp_path / "r")
    assert first["scale"] == pytest.approx(0.7) and second["schedule"] == {
        "kind": "linear", "prediction": "eps", "T": 1000, "beta_start": 0.0015, "beta_end": 0.0195}
    assert second["embedder"] == {"kind": "class", "num_classes": 26, "dim": 5, "null_class": False}
    model, schedule = checkpoints.build_model(second)
    assert torch.equal(model.embedder.embedding.weight, wave((26, 5), 0.2))
    weights = checkpoint()["state_dict"]
    assert torch.equal(model.unet.input_blocks[1][1].proj_in.weight,
                       weights["model.diffusion_model.input_blocks.1.1.proj_in.weight"][:, :, 0, 0])
    assert torch.allclose(diffusion.alphas_cumprod(schedule).float(), weights["alphas_cumprod"], rtol=1e-4)
    assert first["config"]["num_groups"] == second["unet"]["num_groups"] == 32  # the preset has 8
    assert torch.equal(first["state"]["encoder.conv_in.weight"],
                       original_weights.to_grey(weights)["first_stage_model.encoder.conv_in.weight"])
    privacy = files.read_json(tmp_path / "r" / "release" / "privacy.json")
    assert privacy["public_weights"] == ["x.ckpt"] and privacy["steps"] == 1 and 9 < privacy["epsilon"] <= 10
    released = files.load(tmp_path / "r" / "release" / "model.pt")
    changed = {k for k, v in second["model"].items() if not torch.equal(v, released["model"][k])}
    assert changed == set(tuning.select_trainable(model, "attention"))
    with pytest.raises(ValueError, match="holds files but no internal.settings.json"):
        convert(tmp_path / "x.ckpt", "--out", tmp_path / "original")
    for path in (tmp_path / "original").rglob("*.pt"):
        path.unlink()
    train.main(["--resume", "--out", str(tmp_path / "r")])  # everything needed is in the run folder
    assert files.read_json(tmp_path / "r" / "release" / "privacy.json") == privacy
    train.main([*FLAGS, "--out", str(tmp_path / "again"), "--init", str(tmp_path / "r"), "--steps", "0"])
    train.main([*FLAGS, "--out", str(tmp_path / "third"), "--init", str(tmp_path / "again"), "--steps", "0"])
    chain = files.read_json(tmp_path / "third" / "release" / "privacy.json")
    assert chain["public_weights"] == ["x.ckpt"]  # said of every run whose networks began with these weights


def test_what_the_checkpoint_does_not_hold(tmp_path):
    few = {"scale_factor": None, "betas": None, "cond_stage_model.embedding.weight": wave((8, 5), 0.2)}
    torch.save(checkpoint(**few), tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", "--out", tmp_path / "a")
    first, second = both(tmp_path / "a")  # too few classes: a fresh embedder; scale: the original's default
    assert first["scale"] == 1.0 and second["embedder"]["num_classes"] == 10
    assert second["schedule"]["kind"] == presets.DIGITS["schedule"].kind
    convert(tmp_path / "x.ckpt", "--out", tmp_path / "b", "--scale", "0.18215")
    assert both(tmp_path / "b")[0]["scale"] == 0.18215


def test_the_words_of_a_text_model_are_those_of_the_private_sets_classes(tmp_path, monkeypatch):
    torch.save(checkpoint(), tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", "--out", tmp_path / "a", "--condition", "text", "--private", "fashion")
    words = both(tmp_path / "a")[1]["embedder"]["words"]
    assert "sneaker" in words and "pullover" in words and "seven" not in words


def test_autoencoder_from_a_file_of_its_own(tmp_path):
    state = checkpoint()["state_dict"]
    torch.save({k: v for k, v in state.items() if not k.startswith("first_stage_model.")},
               tmp_path / "unet.ckpt")
    torch.save({"state_dict": {k.removeprefix("first_stage_model."): v for k,
                               v in state.items() if k.startswith("first")}
                | {"loss.discriminator.main.0.weight": torch.zeros(3)}}, tmp_path / "vae.ckpt")
    convert(tmp_path / "unet.ckpt", "--autoencoder", tmp_path / "vae.ckpt", "--out", tmp_path / "a")
    first, _ = both(tmp_path / "a")
    assert first["trained_on"] == "weights of vae.ckpt" and first["scale"] == pytest.approx(0.7)


def test_only_the_autoencoder_from_elsewhere(tmp_path, monkeypatch, capsys):
    state = {k: v for k, v in checkpoint()["state_dict"].items() if k.startswith("first_stage_model.")}
    torch.save(state, tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="--autoencoder"):
        convert("--out", tmp_path / "a")
    convert("--autoencoder", tmp_path / "x.ckpt", "--out", tmp_path / "a")
    assert [path.name for path in (tmp_path / "a" / "public").iterdir()] == ["vae.pt"]
    began = []

    def enough(s, title, *args, **named):
        began.append(title)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "fit", enough)
    with pytest.raises(KeyboardInterrupt):
        train.main([*FLAGS, "--out", str(tmp_path / "r"), "--init", str(tmp_path / "a")])
    assert began == ["2/3 latent diffusion"] and "only its autoencoder is reused" in capsys.readouterr().out
    first = files.load(tmp_path / "r" / "public" / "vae.pt")
    public = datasets.load("strokes", size=32, public_classes="all", n=60, seed=0).images
    with torch.no_grad():
        z = checkpoints.build_vae(first).encode(pixels.to_float(public)).mean * first["scale"]
    assert z.std().item() == pytest.approx(1.0, abs=1e-4)  # the scale is that of public latents


def test_bad_checkpoints_are_refused_in_one_line(tmp_path):
    path = tmp_path / "x.ckpt"

    def refused():
        with pytest.raises(ValueError) as error:
            convert(path, "--out", tmp_path / "a")
        assert "\n" not in str(error.value) and not (tmp_path / "a").exists()
        return str(error.value)

    assert "there is no" in refused()
    path.write_bytes(b"no checkpoint")
    assert "x.ckpt" in refused()
    torch.save(checkpoint() | {"callbacks": {pytest.Item: 1}}, path)  # a class: reading it would need code
    message = refused()
    assert "without running code" in message and "weights_only=False" in message
    torch.save([1, 2], path)
    assert "x.ckpt" in refused()
    torch.save(checkpoint(**{"model.diffusion_model.out.2.weight": None}), path)
    assert "missing out.2.weight" in refused()
    torch.save({k: v for k, v in checkpoint()["state_dict"].items() if not k.startswith("first")}, path)
    assert "autoencoder" in refused() and "missing" in refused()
    torch.save(checkpoint(alphas_cumprod=torch.linspace(1, 0, 1000)), path)
    assert "schedule" in refused()
    for name in ("model.diffusion_model.out.2.bias", "first_stage_model.quant_conv.bias", "scale_factor",
                 "cond_stage_model.embedding.weight"):
        for bad in (math.nan, math.inf):
            torch.save(checkpoint(**{name: torch.full_like(checkpoint()["state_dict"][name], bad)}), path)
            assert f"{name} holds numbers that are not finite" in refused()
    torch.save(checkpoint(**{"loss.logvar": torch.tensor(math.nan), "model_ema.x": torch.tensor(math.nan)}),
               path)
    convert(path, "--out", tmp_path / "b")  # nothing of these is read


@pytest.mark.parametrize("load, network, weights", [
    (original_weights.load_unet, unet.UNet(dataclasses.replace(UNETS["mnist"], num_groups=8)),
     waves(unet_shapes(UNETS["mnist"]))),
    (original_weights.load_autoencoder, vae.AutoencoderKL(dataclasses.replace(VAES["mnist"], num_groups=8)),
     waves(vae_shapes(VAES["mnist"])))])
def test_other_groups_than_the_original_s_are_refused(load, network, weights):
    """Every shape fits, and every output would be wrong."""
    before = [p.clone() for p in network.parameters()]
    with pytest.raises(ValueError, match="num_groups = 32, this .* has num_groups = 8"):
        load(network, weights)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_the_moving_average_is_named_or_used(tmp_path, capsys):
    state = checkpoint()["state_dict"]
    names = [k for k in state if k.startswith("model.diffusion_model.")]
    average = {"model_ema." + k.removeprefix("model.").replace(".", ""): state[k] + 1 for k in names}
    torch.save(checkpoint(**average), tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", "--out", tmp_path / "plain")
    assert capsys.readouterr().out.count("moving average") == 1
    convert(tmp_path / "x.ckpt", "--out", tmp_path / "average", "--average")
    assert "moving average" not in capsys.readouterr().out
    plain, averaged = (both(tmp_path / name)[1]["model"] for name in ("plain", "average"))
    assert all(torch.equal(averaged[k], v + 1 if k.startswith("unet.") else v) for k, v in plain.items())
    average.popitem()
    torch.save(checkpoint(**average), tmp_path / "x.ckpt")
    with pytest.raises(ValueError, match="no moving average of model.diffusion_model"):
        convert(tmp_path / "x.ckpt", "--out", tmp_path / "b", "--average")


# ------------------------------------------------------------------------------------------ T other than 1000


def test_a_schedule_of_250_steps_runs_from_start_to_end(tmp_path, monkeypatch):
    """Every draw of the program asks for the schedule's T: more, and abar_t is read out of range."""
    monkeypatch.setitem(presets.PRESETS, "smoke", presets.PRESETS["smoke"] | dict(
        schedule=diffusion.Schedule("cosine", "v", T=250), vae_steps=1, ldm_steps=1, ldm_batch=16,
        vae_batch=4, micro_batch=16))
    train.main([*FLAGS, "--dry-run"])
    train.main([*FLAGS, "--out", str(tmp_path / "r")])
    assert files.load(tmp_path / "r" / "release" / "model.pt")["schedule"]["T"] == 250


def test_an_adopted_schedule_of_250_steps_rules_the_private_stage(tmp_path):
    betas = torch.linspace(0.0015 ** 0.5, 0.0195 ** 0.5, 250, dtype=torch.float64) ** 2
    torch.save(checkpoint(betas=betas.float(), alphas_cumprod=(1 - betas).cumprod(0).float()),
               tmp_path / "x.ckpt")
    convert(tmp_path / "x.ckpt", "--out", tmp_path / "original")
    train.main([*FLAGS, "--out", str(tmp_path / "r"), "--init", str(tmp_path / "original")])
    assert files.load(tmp_path / "r" / "release" / "model.pt")["schedule"]["T"] == 250
