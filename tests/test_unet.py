"""The UNet: parameter counts of the paper's networks, shapes, conditioning, what is tuned, LoRA, weights."""
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import tuning
import unet
from extensions import lora, text
from support import paper_networks, trainable


def tiny(**changes):
    torch.manual_seed(0)
    config = dict(in_channels=2, out_channels=2, model_channels=32, num_heads=4, context_dim=6) | changes
    network = unet.UNet(unet.UNetConfig(**config))
    for p in network.parameters():  # zero-initialised layers would hide mistakes
        torch.nn.init.normal_(p, std=0.1)
    embedder = unet.ClassEmbedder(3, 6, null_class=True) if config["context_dim"] else None
    return unet.LatentModel(network, embedder)


def tuned(model, tune, from_block=0):
    return trainable.choose(model, SimpleNamespace(tune=tune, from_block=from_block))


def count(parameters):
    return sum(p.numel() for p in parameters)


# Exact counts of the authors' networks, measured by building them: UNet, in attention, attention modules,
# arguments of the condition embedder, its parameters.
COUNTS = {
    "mnist": (4_606_467, 1_578_304, 7, (26, 5, False), 130),
    "cifar10": (90_290_563, 23_867_520, 16, (1000, 512, True), 512_512),
    "celeba64": (72_172_803, 7_959_808, 16, None, 0),
    "celeba32": (162_314_115, 17_887_104, 16, None, 0),
    "celeba256-text": (872_300_484, 280_018_880, 16, None, 0),
}


def paper_count(model, from_block=0):
    """Number of parameters that the paper says it tunes; it counts those `without_gradient` as well."""
    modules = [*tuning.attention_modules(model, from_block), *tuning.embedder_of(model)]
    return count(p for module in modules for p in module.parameters())


@pytest.mark.parametrize("name", COUNTS)
def test_parameter_counts_equal_the_papers(name):
    total, attention, modules, embedder, embedded = COUNTS[name]
    with torch.device("meta"):  # shapes only: the largest would need 3.5 GB
        network = unet.UNet(paper_networks.UNETS[name])
        model = unet.LatentModel(network, unet.ClassEmbedder(*embedder) if embedder else None)
    assert count(network.parameters()) == total
    assert len(tuning.attention_modules(model)) == modules
    assert paper_count(model) == attention + embedded
    tuning.select_trainable(model, "attention")
    silent = count(dict(model.named_parameters())[n] for n in tuning.without_gradient(model))
    assert count(p for p in model.parameters() if p.requires_grad) == attention + embedded - silent


def test_later_blocks_of_the_cifar_network():
    with torch.device("meta"):
        network = unet.UNet(paper_networks.UNETS["cifar10"])
        model = unet.LatentModel(network, unet.ClassEmbedder(1000, 512, True))
    assert paper_count(model, from_block=8) == 9_788_032  # the authors' ablation_blocks = 9


@pytest.mark.parametrize("tune", ["attention", "all", "norm", "lora:2"])
def test_weights_without_a_gradient_are_not_trained(tune):
    """They would see nothing but noise, and a release would show it: clean equations to compute it from."""
    model = unet.LatentModel(unet.UNet(paper_networks.UNETS["mnist"]), unet.ClassEmbedder(26, 5))
    names = tuning.without_gradient(model)
    assert count(dict(model.named_parameters())[n] for n in names) == 82_752
    trained = set(tuned(model, tune))
    assert not trained & set(tuning.without_gradient(model))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    model(torch.randn(2, 3, 4, 4), torch.tensor([1, 500]), torch.tensor([0, 1])).sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()} == trained
    model.requires_grad_(True)
    model.zero_grad()
    model(torch.randn(2, 3, 4, 4), torch.tensor([1, 500]), torch.tensor([0, 1])).sum().backward()
    silent = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert silent == set(tuning.without_gradient(model))  # nothing else is left out


def test_a_text_of_one_token_leaves_its_encoder_s_norms_trained():
    """Both have a `blocks.0.norm2`; only the UNet's stands before a cross-attention."""
    model = unet.LatentModel(unet.UNet(paper_networks.UNETS["mnist"]), text.TextEncoder(20, 5, length=1))
    frozen = tuning.without_gradient(model)
    assert frozen and not [name for name in frozen if name.startswith("embedder.")]
    assert [name for name, _ in model.named_parameters() if name == "embedder.blocks.0.norm2.weight"]


@pytest.mark.parametrize("changes", [
    {}, {"use_scale_shift_norm": False}, {"resblock_updown": False}, {"attention_resolutions": (2,)},
    {"transformer_depth": 2}, {"num_res_blocks": 2}, {"use_spatial_transformer": False, "context_dim": None},
    {"context_dim": None}, {"num_head_channels": 8}, {"channel_mult": (1, 1, 2)}])
def test_every_variant_keeps_the_shape_and_uses_every_parameter(changes):
    model = tiny(**changes)
    x = torch.randn(2, 2, 8, 8)
    cond = torch.tensor([0, 2]) if model.embedder else None
    out = model(x, torch.tensor([1, 999]), cond)
    assert out.shape == x.shape
    tuning.select_trainable(model, "all")
    out.square().sum().backward()
    out = model(x, torch.tensor([1, 999]), cond)
    out.square().sum().backward()
    unused = {n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert unused <= set(tuning.without_gradient(model))


@pytest.mark.parametrize("tune", ["attention", "attention-only", "resblocks"])
def test_a_network_without_the_modules_that_are_asked_for_is_refused(tune):
    """Else a denoiser of one's own would tune its embedder only, and nobody would notice."""
    network = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    network.config = SimpleNamespace(context_dim=8)
    model = unet.LatentModel(network, unet.ClassEmbedder(10, 8))
    with pytest.raises(ValueError, match="the network has no (SpatialTransformer|ResBlock)"):
        tuning.select_trainable(model, tune)
    assert tuning.select_trainable(model, "embedder") == ["embedder.embedding.weight"]
    assert len(tuning.select_trainable(model, "all")) == 5


def test_a_forgotten_condition_is_refused_in_one_line():
    with pytest.raises(ValueError, match="needs a condition for each example"):
        tiny()(torch.randn(1, 2, 4, 4), torch.tensor([5]))


def test_the_class_and_the_time_matter():
    model, x = tiny(), torch.randn(1, 2, 4, 4)
    one = model(x, torch.tensor([5]), torch.tensor([0]))
    assert not torch.allclose(one, model(x, torch.tensor([5]), torch.tensor([1])))
    assert not torch.allclose(one, model(x, torch.tensor([600]), torch.tensor([0])))


def test_one_token_shortcut_is_exact():
    # A context of two equal tokens has the same answer as one token, and takes the full path.
    network = tiny().unet.double()
    x, t, token = torch.randn(2, 2, 4, 4).double(), torch.tensor([3, 700]), torch.randn(2, 1, 6).double()
    assert torch.allclose(network(x, t, token), network(x, t, token.expand(-1, 2, -1)), rtol=1e-10,
                          atol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_for_bfloat16_equals_the_fused_kernel(masked, monkeypatch):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 2, length, 8).bfloat16() for length in (5, 7, 7))
    # (3, 1, 1, 7)
    mask = (torch.arange(7) < torch.tensor([[7], [2], [1]]))[:, None, None] if masked else None
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # not used here
    assert torch.allclose(unet.attend(q, k, v, mask).double(), expected, atol=0.03)
    if masked:
        # one token left: its value
        assert torch.equal(unet.attend(q, k, v, mask)[2], v[2, :, :1].expand(-1, 5, -1))


def test_multiplicity_repeats_each_condition_in_place():
    model, z = tiny(), torch.randn(6, 2, 4, 4)
    t, cond = torch.arange(6) * 100, torch.tensor([0, 2])
    assert torch.allclose(model(z, t, cond), model(z, t, cond.repeat_interleave(3)), atol=1e-6)
    calls = []
    model.embedder.embedding.register_forward_hook(lambda m, i, o: calls.append(len(i[0])))
    model(z, t, cond)
    assert calls == [2]


def test_time_embedding_is_cos_then_sin():
    e = unet.timestep_embedding(torch.tensor([7]), 8)[0].double()
    angles = 7 * 10000 ** (-torch.arange(4, dtype=torch.float64) / 4)
    assert torch.allclose(e, torch.cat([angles.cos(), angles.sin()]), atol=1e-6)


def test_null_class():
    embedder = unet.ClassEmbedder(3, 4, null_class=True)
    assert embedder.null(torch.tensor([0, 1])).tolist() == [3, 3]
    with pytest.raises(ValueError, match="null class"):
        unet.ClassEmbedder(3, 4).null(torch.tensor([0]))


def test_select_trainable():
    def names(tune, from_block=0):
        return set(tuning.select_trainable(tiny(), tune, from_block))

    attention, only = names("attention"), names("attention-only")
    assert attention - only == {"embedder.embedding.weight"} == names("embedder")
    silent = set(tuning.without_gradient(tiny()))
    model = tiny()
    inside = {id(p) for m in tuning.attention_modules(model) for p in m.parameters()}
    assert only == {n for n, p in model.named_parameters() if id(p) in inside} - silent
    assert names("all") == {n for n, _ in tiny().named_parameters()} - silent
    assert not (names("resblocks") & only) and any("conv1" in n for n in names("resblocks"))
    assert all("norm" in n or "out.0" in n or "embedder" in n for n in names("norm"))
    finest = {n for n in only if n.split(".")[1:3] in (["input_blocks", "1"], ["output_blocks", "2"],
                                                       ["output_blocks", "3"])}
    assert names("attention-finest") == finest < only
    assert names("attention-only", 6) == {n for n in only if n.startswith("unet.output_blocks.3")}
    model = tiny()
    chosen = tuning.select_trainable(model, "attention")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(chosen)


@pytest.mark.parametrize("tune, from_block, message", [
    ("attn", 0, "unknown tune"), ("attention", 7, "from_block"), ("all", 1, "from_block"),
    ("lora:0", 0, "rank"),
    ("lora:x", 0, "rank")])
def test_select_trainable_refuses(tune, from_block, message):
    with pytest.raises(ValueError, match=message):
        tuned(tiny(), tune, from_block)


def test_lora_starts_as_identity_trains_few_and_merges_exactly():
    model = tiny().double()
    x, t, cond = torch.randn(2, 2, 4, 4).double(), torch.tensor([3, 700]), torch.tensor([0, 1])
    plain, keys = model(x, t, cond), set(model.state_dict())
    full = count(p for m in tuning.attention_modules(model) for p in m.parameters())
    names = tuned(model, "lora:2")
    assert torch.allclose(model(x, t, cond), plain)
    assert all("up" in n or "down" in n or "embedder" in n for n in names)
    assert count(p for p in model.parameters() if p.requires_grad) < full / 4
    with pytest.raises(ValueError, match="merge"):
        tuned(model, "lora:2")
    for n, p in model.named_parameters():
        if ".up." in n:
            torch.nn.init.normal_(p)
    after = model(x, t, cond)
    assert not torch.allclose(after, plain)
    lora.merge(model)
    assert set(model.state_dict()) == keys and torch.allclose(model(x, t, cond), after)


def test_bad_width_is_refused():
    with pytest.raises(ValueError, match="divisible"):
        unet.UNet(unet.UNetConfig(model_channels=48))
