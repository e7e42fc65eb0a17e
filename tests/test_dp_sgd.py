"""The DP-SGD engine against an independent oracle, statistics, and neighbouring data sets.

The oracle below is the definition: one backward pass per example in float64, clip, add. Everything the engine
does faster must come to the same number.
"""
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import nn

import diffusion
import dp_sgd
import unet
import vae
from dp_sgd import CLIPPING
from extensions import bookkeeping
from support import randomness, settings, trainable

# vmap's fallback for fused attention
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")
METHODS = ("loop", "vmap", "bookkeeping")
LOSS = partial(diffusion.loss, schedule=diffusion.PAPER)
N = 4


def DPSGD(*args, method="bookkeeping", clipping="flat",
          **kwargs):  # noqa: N802 (the engine, its functions by name)
    return dp_sgd.DPSGD(*args, clipping=CLIPPING[clipping], method=settings.METHODS[method], **kwargs)


def oracle(model, loss_fn, batch, clip_norm=float("inf")):
    """Sum of min(1, C/|g_i|) g_i as one flat vector, and the norms |g_i|."""
    params, total, norms = [p for p in model.parameters() if p.requires_grad], 0.0, []
    for i in range(max(len(b) for b in batch if b is not None)):
        loss = loss_fn(model, *(None if b is None else b[i:i + 1] for b in batch)).sum()
        grads = torch.autograd.grad(loss, params, allow_unused=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for p,
                          g in zip(params, grads, strict=True)])
        norms.append(float(flat.norm()))
        total = total + flat * min(1.0, clip_norm / norms[-1]) if norms[-1] else total
    return total, norms


def clipped_sum(model, loss_fn, batch, clip_norm, method="bookkeeping", splits=None, **kwargs):
    engine = DPSGD(model, clip_norm, 0.0, N, method=method, **kwargs)
    start = 0
    for size in splits or [max(len(b) for b in batch if b is not None)]:
        engine.accumulate(loss_fn, *(None if b is None else b[start:start + size] for b in batch))
        start += size
    return torch.cat([s.flatten() for s in engine.sums])


def assert_close(got, expected, tolerance=1e-10):
    assert float((got - expected).norm()) <= tolerance * float(expected.norm()), float(
        (got - expected).norm() / expected.norm()
    )


class TokenEmbedder(nn.Module):
    """Captions: (N, L) tokens, some repeated, -> (N, L, D)."""

    def __init__(self, vocabulary, dim):
        super().__init__()
        self.table = nn.Embedding(vocabulary, dim, padding_idx=0)

    def forward(self, tokens):
        return self.table(tokens)


def latent_model(tune="attention", kind="class", dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    config = unet.UNetConfig(in_channels=4, out_channels=4, model_channels=32, channel_mult=(1, 2),
                             context_dim=None if kind == "none" else 5,
                             use_spatial_transformer=kind != "none",
                             # the others: stride-2 and nearest-neighbour resampling
                             resblock_updown=kind == "class")
    embedder = {"class": unet.ClassEmbedder(10, 5), "tokens": TokenEmbedder(7, 5), "none": None}[kind]
    model = unet.LatentModel(unet.UNet(config), embedder)
    trainable.choose(model, SimpleNamespace(tune=tune, from_block=0, vae=vae.VAEConfig(),
                                            schedule=diffusion.PAPER))
    for p in model.parameters():  # away from the zero initialisation, where most gradients vanish
        nn.init.normal_(p, mean=0.5 * (p.dim() == 1), std=0.2)
    return model.to(dtype)


def examples(kind="class", n=N, k=1, dtype=torch.float64, seed=1):
    g = torch.Generator().manual_seed(seed)
    cond = {"class": torch.tensor([3, 3, 1, 0] * n)[:n], "none": None,
            "tokens": torch.tensor([[2, 2, 5, 0], [1, 6, 6, 6], [3, 0, 0, 0], [1, 2, 3, 4]] * n)[:n]}[kind]
    return diffusion.draw(torch.randn(n, 4, 4, 4, generator=g, dtype=dtype), cond, k, g, diffusion.PAPER)


# -------------------------------------------------------------------------------- three ways, the same number


@pytest.mark.parametrize("kind,tune", [("class", t)
                                       for t in ("attention", "attention-only", "all", "resblocks", "norm",
                                                              "embedder", "lora:4", "attention+shift")]
                         + [(kind, tune) for kind in ("tokens", "none")
                            for tune in ("attention", "all", "attention+shift")])
@pytest.mark.parametrize("k", [1, 3])
def test_every_method_equals_the_loop_over_examples(kind, tune, k):
    model, batch = latent_model(tune, kind), examples(kind, k=k)
    _, norms = oracle(model, LOSS, batch)
    clip_norm = sum(sorted(norms)[1:3]) / 2  # half of them are clipped
    expected, _ = oracle(model, LOSS, batch, clip_norm)
    for method in METHODS:
        assert_close(clipped_sum(model, LOSS, batch, clip_norm, method), expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("splits", [(1, N - 1), (N - 1, 1), (1,) * N, (0, N, 0)])
def test_the_size_of_micro_batches_changes_nothing(method, splits):
    model, batch = latent_model(), examples(k=3)
    clip_norm = oracle(model, LOSS, batch)[1][0]
    expected, _ = oracle(model, LOSS, batch, clip_norm)
    assert_close(clipped_sum(model, LOSS, batch, clip_norm, method, splits), expected)


def squares(model, x):
    return model(x).flatten(1).square().sum(1)


class Twice(nn.Module):
    """One layer used twice, on different numbers of positions."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, x):
        return self.layer(torch.tanh(self.layer(x))[:, ::2])


def image(*shape):
    return torch.randn(N, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


LAYERS = {
    "linear": (nn.Linear(6, 5), image(7, 6)),
    "linear without bias": (nn.Linear(6, 5, bias=False), image(7, 6)),
    "linear on vectors": (nn.Linear(6, 5), image(6)), "linear on images": (nn.Linear(6, 5), image(3, 4, 6)),
    "conv": (nn.Conv2d(3, 5, 3, padding=1), image(3, 4, 5)),
    "conv without bias": (nn.Conv2d(3, 5, 3, bias=False), image(3, 4, 5)),
    "conv stride 2": (nn.Conv2d(3, 5, 3, stride=2, padding=1), image(3, 5, 4)),
    "conv 1x1": (nn.Conv2d(3, 5, 1), image(3, 4, 5)),
    "conv oblong": (nn.Conv2d(3, 5, (3, 2), stride=(1, 3), padding=(2, 1), dilation=(2, 1)), image(3, 6, 7)),
    "conv wide padding": (nn.Conv2d(3, 5, 3, stride=2, padding=4), image(3, 2, 3)),
    "group norm": (nn.GroupNorm(2, 6), image(6, 4, 3)),
    "group norm on vectors": (nn.GroupNorm(2, 6), image(6)),
    "layer norm": (nn.LayerNorm(6), image(5, 6)),
    "layer norm on two dimensions": (nn.LayerNorm((5, 6)), image(2, 5, 6)),
    "embedding": (nn.Embedding(4, 3), torch.tensor([[0, 1, 1], [2, 2, 2], [3, 0, 3], [1, 2, 3]])),
    "embedding with padding": (nn.Embedding(4, 3, padding_idx=2),
                               torch.tensor([[0, 1, 1], [2, 2, 1], [3, 2, 3], [1, 2, 3]])),
    "used twice": (Twice(), image(8, 6)),
}


@pytest.mark.parametrize("grams", [True, False, None], ids=["grams", "direct", "by count"])
@pytest.mark.parametrize("trained", ["both", "weight", "bias"])
@pytest.mark.parametrize("name", LAYERS)
def test_every_layer_by_either_route(name, trained, grams, monkeypatch):
    layer, x = LAYERS[name]
    model = nn.Sequential(layer, nn.Tanh()).double()  # tanh: not all output gradients alike
    for key, p in model.named_parameters():
        p.requires_grad_(trained == "both" or key.endswith(trained))
    if not any(p.requires_grad for p in model.parameters()):
        pytest.skip("no bias")
    if grams is not None and "norm" not in name and not (grams and trained == "bias"):
        monkeypatch.setattr(bookkeeping, "grams_are_cheaper", lambda *_: grams)
    clip_norm = oracle(model, squares, [x])[1][0]
    assert_close(clipped_sum(model, squares, [x], clip_norm), oracle(model, squares, [x], clip_norm)[0])


def test_the_route_follows_the_count_of_multiplications():
    def route(positions, width):
        layer = dp_sgd.Layer("", nn.Linear(width, width), {"weight": None})
        x = torch.zeros(N, positions, width)
        return bookkeeping.grams_are_cheaper(layer, x, x, N)
    assert route(4, 64) and not route(64, 64)  # 2 P^2 d against P d^2: equal at P = d/2


@pytest.mark.parametrize("clipping", CLIPPING)
@pytest.mark.parametrize("method", METHODS)
def test_clipping_modes_follow_their_formulas(method, clipping):
    model, batch, C = latent_model("norm"), examples(), 0.3
    params, expected = [p for p in model.parameters() if p.requires_grad], 0.0
    layers = [[p for p in m.parameters(recurse=False) if p.requires_grad] for m in model.modules()]
    layers = [layer for layer in layers if layer]
    for i in range(N):
        loss = LOSS(model, *(b[i:i + 1] for b in batch)).sum()
        grads = dict(zip(params, torch.autograd.grad(loss, params, allow_unused=True), strict=True))
        parts = [torch.cat([(torch.zeros_like(p) if grads[p] is None else grads[p]).flatten() for p in ps])
                 for ps in layers]
        norm = torch.cat(parts).norm()
        if clipping == "per-layer":
            parts = [v * min(1, C / len(layers) ** 0.5 / max(float(v.norm()), 1e-30)) for v in parts]
        else:
            parts = [v * (min(1, C / norm) if clipping == "flat" else C / (norm + 0.01)) for v in parts]
        assert torch.cat(parts).norm() <= C * (1 + 1e-12)
        expected = expected + torch.cat(parts)
    assert_close(clipped_sum(model, LOSS, batch, C, method, clipping=clipping), expected)


def test_one_forward_one_backward_and_no_weight_gradients():
    calls = []

    class Count(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            calls.append("forward")
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            calls.append("backward")
            return g

    frozen, first, second = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
    model = nn.Sequential(frozen, first, nn.Tanh(), second)
    frozen.requires_grad_(False)

    def loss_fn(model, x):
        h = model[1](model[0](x))
        assert h.is_leaf  # the graph starts here: nothing is kept for the frozen layer
        assert not any(p.requires_grad for p in model.parameters())  # autograd forms no weight gradient
        assert not frozen._forward_hooks
        return model[3](torch.tanh(Count.apply(h))).square().sum(1)

    engine = DPSGD(model, 1.0, 0.0, 1)
    engine.accumulate(loss_fn, torch.randn(5, 4))
    assert calls == ["forward", "backward"]
    assert first.weight.requires_grad and first.weight.grad is None and not first._forward_hooks


# -------------------------------------------------------------------------------------------- mixed precision


def test_bfloat16_autocast_keeps_norms_and_sums_in_float32():
    model, batch = latent_model("all", dtype=torch.float32), examples(dtype=torch.float32)

    def half(model, *batch):
        with torch.autocast("cpu", torch.bfloat16):
            return LOSS(model, *batch)

    full, inside = clipped_sum(model, LOSS, batch, 1.0), clipped_sum(model, half, batch, 1.0)
    with torch.autocast("cpu", torch.bfloat16):  # around the engine: its own arithmetic must not notice
        around = clipped_sum(model, LOSS, batch, 1.0)
        alone = [clipped_sum(model, LOSS, [b[i:i + 1] for b in batch], 1.0) for i in range(N)]
    assert inside.dtype == around.dtype == torch.float64
    assert_close(around, inside, 1e-6)
    assert_close(inside, full, 0.05)
    for v in alone:
        # all are clipped; bfloat16 arithmetic would be off by 1e-3 and more
        assert 1 - 5e-4 < v.norm() < 1 + 1e-5


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("layer,shape", [(nn.Linear(64, 64), (16, 64)),
                                         (nn.Conv2d(64, 64, 3, padding=1), (64, 4, 4))])
def test_cancelling_positions_never_exceed_the_clip_norm(layer, shape, autocast):
    torch.manual_seed(0)
    signs = torch.tensor([1.0, -1.0] * 8)

    def loss_fn(model, x, v):  # output gradients +v and -v at neighbouring positions, inputs nearly alike
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out = model(x).float()
        out = out.flatten(2).mT if out.dim() == 4 else out
        return (out * signs[:, None] * v[:, None]).sum((1, 2))

    for _ in range(20):
        base = 10 * torch.randn(1, 64,
                                *[1] * (len(shape) - 1)) if len(shape) == 3 else 10 * torch.randn(1, 1, 64)
        x = base + 1e-4 * torch.randn(1, *shape)
        C = 1e-3
        assert clipped_sum(layer, loss_fn, [x, torch.randn(1, 64)], C).norm() <= C * (1 + 1e-3)


def test_products_that_overflow_make_no_norm_smaller():
    """An off-diagonal product may overflow to -inf where both diagonals are finite; clamped it would be 0."""
    n, top, generator = 4000, torch.finfo(torch.float32).max, torch.Generator().manual_seed(0)
    unit = torch.linalg.qr(torch.randn(n, 16, 4, generator=generator, dtype=torch.float64)).Q
    u, w, v, r = unit.unbind(-1)  # orthogonal, of length 1
    sizes = top ** 0.25 * (1 + 3e-7 * (2 * torch.rand(4, n, 1, generator=generator, dtype=torch.float64) - 1))
    a, b, c, d = sizes.unbind(0)
    # The first two positions cancel, and one of their products overflows; the third is the gradient.
    x = torch.stack([a * u, b * u, 0.9 * a * w], 1).float()  # (n, 3 positions, 16)
    g = torch.stack([c * v, -d * v, 0.9 * c * r], 1).float()
    layer = dp_sgd.Layer("linear", nn.Linear(16, 16, bias=False), {"weight": torch.zeros(16, 16)})
    found = bookkeeping.gram_squared_norm(layer, x, g, n, {}).sqrt()
    exact = torch.einsum("npi,npj->nij", g.double(), x.double()).flatten(1).norm(dim=1)
    assert 0 < found.isfinite().sum() < n, "some overflow, some do not"
    assert (found[found.isfinite()] >= 0.9 * exact[found.isfinite()]).all()


# ----------------------------------------------------------------------- neighbouring data sets, bad examples


def scaled_loss(model, z0, cond, t, noise, scale):
    return scale * LOSS(model, z0, cond, t, noise)


def with_first(kind):
    """Three examples, the first of the given kind."""
    batch = [*examples(n=3, dtype=torch.float32), torch.ones(3)]
    batch[-1][0] = {"huge": 1e6, "overflow": 3e38, "zero": 0.0, "nan": float("nan"),
                    "inf": float("inf")}.get(kind, 1.0)
    batch[0][0, 0, 0, 0] = {"nan pixel": float("nan"), "inf pixel": float("inf"),
                            "huge pixel": 1e20}.get(kind, 0.3)
    return batch


@pytest.mark.parametrize("method,clipping",
                         [("loop", "flat"), ("vmap", "flat"), *(("bookkeeping", c) for c in CLIPPING)])
def test_one_more_example_moves_the_sum_by_at_most_the_sensitivity(method, clipping):
    model, C = latent_model(dtype=torch.float32), 1e-3
    without = clipped_sum(model, scaled_loss, [b[1:] for b in with_first("plain")], C, method,
                          clipping=clipping)
    assert without.norm() > 0
    for kind in ("plain", "huge", "huge pixel", "overflow", "zero", "nan", "inf", "nan pixel", "inf pixel"):
        with_it = clipped_sum(model, scaled_loss, with_first(kind), C, method, clipping=clipping)
        moved = float((with_it - without).norm())
        assert with_it.isfinite().all() and moved <= C * (1 + 1e-4), kind
        if kind in ("nan", "inf", "nan pixel", "inf pixel", "zero"):
            assert moved <= 1e-5 * C, kind  # contributes nothing, the others stay as they were
        if kind == "huge":
            assert moved > 0.5 * C  # the bound is not vacuous


@pytest.mark.parametrize("size", [256, 8192])  # the usual one on a CPU, and the largest on a GPU
@pytest.mark.parametrize("noise", [0.0, 0.3], ids=["parallel", "nearly parallel"])
@pytest.mark.parametrize("method", ["bookkeeping", "vmap"])  # two ways to a sum
def test_in_a_large_batch_rounding_moves_the_sum_by_less_than_the_noise_allows_for(noise, size, method):
    """Gradients of nearly one direction, the worst case: the sum of 10,000 is 10,000 C long."""
    generator, n, C, d = torch.Generator().manual_seed(0), 10_000, 0.1, 64
    model = nn.Linear(d, d, bias=False)
    x, v = (torch.randn(1, d, generator=generator) + noise * torch.randn(n + 1, d, generator=generator)
            for _ in range(2))

    def total(rows):
        engine = DPSGD(model, C, 1.0, n, method=method)
        for part in rows.split(size):
            engine.accumulate(lambda model, x, v: (model(x) * v).sum(1), x[part], v[part])
        return engine.sums[0]

    rows = torch.arange(n + 1)
    with_it, without, alone = total(rows), total(rows[1:]), total(rows[:1])
    assert without.norm() > 0.7 * n * C and alone.norm() > 0.99 * C
    assert (with_it - without - alone).norm() < 0.5 * dp_sgd.ROUNDING * C


def test_norms_and_sums_are_not_rounded_to_tf32():
    """Whatever the caller has set for the networks; afterwards it is as before."""
    seen, before = [], torch.get_float32_matmul_precision()

    def rule(norms, clip_norm):
        seen.append(torch.get_float32_matmul_precision())
        return dp_sgd.flat(norms, clip_norm)

    torch.set_float32_matmul_precision("medium")
    try:
        engine = dp_sgd.DPSGD(nn.Linear(4, 1), 1.0, 1.0, 1, rule)
        engine.accumulate(lambda model, x: model(x).sum(1), torch.ones(2, 4))
        assert seen == ["highest"] and torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("entry", [1e-23, 3e-22, 1e-30])
def test_a_rule_that_lengthens_tiny_gradients_cannot_break_the_sensitivity(entry, method):
    """The squares of such entries are 0 in float32."""
    def normalised(norms, clip_norm):
        return (clip_norm / (norms.square().sum(0).sqrt() + 1e-40)).expand_as(norms)

    engine = dp_sgd.DPSGD(nn.Linear(64, 1, bias=False), 0.1, 1.0, 1, normalised, settings.METHODS[method])
    engine.accumulate(lambda model, x: model(x).sum(1), torch.full((1, 64), entry))
    assert 0.099 < engine.sums[0].norm() < 0.1 * (1 + 1e-5)


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, x):
        return self.scale * x


@pytest.mark.parametrize("method", ["loop", "vmap"])
def test_a_parameter_may_be_a_single_number(method):
    engine = DPSGD(Scaled(), 1.0, 1.0, 3, method=method)
    engine.accumulate(lambda model, x: model(x).sum(1), torch.tensor([[0.25], [0.5], [7.0]]))
    assert engine.sums[0].shape == () and float(engine.sums[0]) == pytest.approx(1.75)  # 0.25 + 0.5 + 1


def test_a_clipping_rule_that_does_not_clip_cannot_break_the_sensitivity(monkeypatch):
    monkeypatch.setitem(CLIPPING, "none", lambda norms, clip_norm: torch.ones_like(norms))
    model, batch = latent_model(), examples()
    assert_close(clipped_sum(model, LOSS, batch, 1e-3, clipping="none"),
                 clipped_sum(model, LOSS, batch, 1e-3, clipping="flat"), 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_non_finite_examples_are_counted_and_kept_out_of_the_figures(method):
    engine = DPSGD(latent_model(dtype=torch.float32), 1e-3, 0.0, N, method=method)
    engine.accumulate(scaled_loss, *with_first("nan pixel"))
    engine.step(torch.optim.SGD(engine.parameters, 0.1))
    assert engine.last["examples"] == 3 and engine.last["nonfinite"] == 1
    assert engine.last["clipped_fraction"] == 1.0 and 0 < engine.last["loss"] < 100
    assert 1e-3 < engine.last["norm_quantiles"][0] <= engine.last["norm_quantiles"][4] < 100


@pytest.mark.parametrize("method", METHODS)
def test_a_non_finite_loss_with_finite_gradient_is_masked(method):
    def loss_fn(model, x, offset):
        return squares(model, x) + offset

    model, x, offset = two_layers(), torch.randn(N, 10), torch.zeros(N)
    expected = clipped_sum(model, loss_fn, [x[1:], offset[1:]], 1.0, method)
    for value in (float("nan"), float("inf")):
        offset[0] = value
        assert_close(clipped_sum(model, loss_fn, [x, offset], 1.0, method), expected, 1e-6)


def test_a_finite_loss_with_infinite_gradient_is_masked():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, x):
            return self.layer(x).abs().sqrt().sum(1)  # gradient of sqrt at 0: infinite

    model, x = Root(), torch.randn(N, 3)
    expected = [clipped_sum(model, lambda m, x: m(x), [x[1:]], 1.0, method) for method in METHODS]
    x[0] = 0.0
    for method, e in zip(METHODS, expected, strict=True):
        assert_close(clipped_sum(model, lambda m, x: m(x), [x], 1.0, method), e, 1e-6)


# ----------------------------------------------------------------------------------------- noise and sampling


def two_layers():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 10, bias=False))


def test_noise_has_the_stated_deviation_everywhere_and_is_independent():
    model, steps, C, sigma, B = two_layers(), 2000, 0.5, 3.0, 8.0
    engine = DPSGD(model, C, sigma, B, generator=torch.Generator().manual_seed(0))
    sgd, moves = torch.optim.SGD(model.parameters(), lr=1.0), []
    for _ in range(steps):
        before = torch.cat([p.detach().flatten() for p in engine.parameters])
        engine.step(sgd)  # an empty batch is a step of noise only
        moves.append(torch.cat([p.detach().flatten() for p in engine.parameters]) - before)
    z = torch.stack(moves).double() / (sigma * C / B)  # (steps, 210), standard normal if all is right
    assert z.shape[1] == 210
    assert (z.std(0) - 1).abs().max() < 5 / (2 * steps) ** 0.5  # every coordinate, five standard errors
    assert abs(float(z.std()) - 1) < 4 / (2 * z.numel()) ** 0.5
    assert stats.kstest(z.flatten().numpy(), "norm").pvalue > 1e-3
    correlation = torch.corrcoef(z.T) - torch.eye(210)
    assert correlation.abs().max() < 6 / steps ** 0.5  # between coordinates, so between layers
    assert (z[1:] * z[:-1]).mean(0).abs().max() < 5 / steps ** 0.5  # between steps


def test_the_sum_is_divided_by_the_expected_batch_size_and_cleared():
    model, x = two_layers(), torch.randn(3, 10)
    engine = DPSGD(model, 1e9, 0.0, expected_batch_size=7)
    expected, _ = oracle(model, squares, [x])
    before = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    engine.accumulate(squares, x[:1])
    engine.accumulate(squares, x[1:])
    engine.step(sgd)
    after = torch.cat([p.detach().flatten().clone() for p in model.parameters()])
    assert_close(before - after, expected / 7, 1e-5)
    assert engine.last["examples"] == 3 and engine.last["clipped_fraction"] == 0
    assert all(p.grad is None for p in model.parameters())
    engine.step(sgd)  # nothing left over
    assert torch.equal(after,
                       torch.cat([p.detach().flatten()
                                  for p in model.parameters()])) and engine.last["examples"] == 0


def test_a_failed_update_cannot_release_the_same_sums_twice():
    class Fails(torch.optim.SGD):
        def step(self):
            raise RuntimeError("no update")

    model = two_layers()
    engine = DPSGD(model, 1.0, 1.0, 1.0)
    engine.accumulate(lambda m, x: m(x).sum(1), torch.randn(3, 10))
    assert any(s.any() for s in engine.sums)
    with pytest.raises(RuntimeError, match="no update"):
        engine.step(Fails(model.parameters(), lr=1.0))
    assert not any(s.any() for s in engine.sums)


def test_unused_layers_get_noise_too():
    model = two_layers()
    # A seed: one in a thousand times the noise of one of 100 weights is rounded to exactly 0.
    engine = DPSGD(model, 1.0, 1.0, 1.0, generator=torch.Generator().manual_seed(0))
    engine.accumulate(lambda m, x: m[0](x).sum(1), torch.randn(3, 10))
    before = model[2].weight.detach().clone()
    engine.step(torch.optim.SGD(model.parameters(), lr=1.0))
    assert (model[2].weight != before).all()


def test_randomness_is_fresh_and_leaves_the_global_generator_alone():
    torch.manual_seed(0)
    state = torch.get_rng_state()
    draws = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Linear(50, 1)
        torch.set_rng_state(state)
        DPSGD(model, 1.0, 1.0, 1.0).step(torch.optim.SGD(model.parameters(), lr=1.0))
        draws.append((model.weight.detach(), dp_sgd.poisson_sample(1000, 0.5).tolist()))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(draws[0][0], draws[1][0]) and draws[0][1] != draws[1][1]
    # all that CUDA has
    assert randomness.fresh_generator().initial_seed() != randomness.fresh_generator().initial_seed()
    generator = randomness.fresh_generator()  # its stream is not the one that its 32-bit seed would give
    again = torch.Generator().manual_seed(generator.initial_seed())
    assert not torch.equal(torch.rand(700, generator=generator)[-10:], torch.rand(700, generator=again)[-10:])
    assert 0.45 < torch.rand(10_000, generator=generator).mean() < 0.55


def test_poisson_batches_are_binomial_and_examples_independent():
    n, q, rounds, generator = 50, 0.3, 4000, torch.Generator().manual_seed(0)
    included = torch.zeros(rounds, n, dtype=torch.float64)
    for row in included:
        row[dp_sgd.poisson_sample(n, q, generator)] = 1
    sizes = included.sum(1).numpy()
    expected = rounds * stats.binom.pmf(range(8, 23), n, q)
    observed = [(sizes == s).sum() for s in range(8, 23)]
    assert stats.chisquare([*observed, rounds - sum(observed)],
                           [*expected, rounds - expected.sum()]).pvalue > 1e-3
    assert (included.mean(0) - q).abs().max() < 5 * (q * (1 - q) / rounds) ** 0.5
    assert (torch.corrcoef(included.T) - torch.eye(n)).abs().max() < 6 / rounds ** 0.5
    assert dp_sgd.poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]
    assert dp_sgd.poisson_sample(0, 0.5).tolist() == [] and dp_sgd.poisson_sample(3, 1e-12).tolist() == []


# ----------------------------------------------------------------------------------- all or nothing, refusals


@pytest.mark.parametrize("method", METHODS)
def test_an_interrupted_micro_batch_leaves_no_trace(method):
    model, x = two_layers(), torch.randn(N, 10)
    expected = clipped_sum(model, squares, [x], 1.0, method)
    engine = DPSGD(model, 1.0, 0.0, 1.0, method=method)

    def out_of_memory(model, x):
        h = model[0](x)

        def fail(_):
            raise RuntimeError("out of memory")
        if h.requires_grad:
            h.register_hook(fail)  # in the middle of the backward pass
        else:
            fail(None)
        return model[2](torch.tanh(h)).square().sum(1)

    for _ in range(2):
        with pytest.raises(RuntimeError, match="out of memory"):
            engine.accumulate(out_of_memory, x)
        assert all(p.requires_grad for p in model.parameters()) and not model[0]._forward_hooks
        assert all((s == 0).all() for s in engine.sums)
    engine.accumulate(squares, x)
    assert_close(torch.cat([s.flatten() for s in engine.sums]), expected, 1e-6)
    engine.step(torch.optim.SGD(model.parameters(), 0.1))
    assert engine.last["examples"] == N


def refused(match, model, **kwargs):
    with pytest.raises(ValueError, match=match):
        DPSGD(model, **{"clip_norm": 1.0, "noise_multiplier": 1.0, "expected_batch_size": 1.0, **kwargs})


class Scale(nn.Module):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(3))


class OwnForward(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def test_layers_whose_gradient_would_be_wrong_are_refused_by_name():
    def model(layer):
        return nn.Sequential(nn.Linear(3, 3), nn.Sequential(layer))
    for method in METHODS:
        refused(r"1\.0.*BatchNorm.*mixes", model(nn.BatchNorm1d(3, track_running_stats=False)), method=method)
        refused(r"1\.0.*dropout 0\.1", model(nn.Dropout(0.1)), method=method)
    refused(r"1\.0.*mixes", model(nn.InstanceNorm1d(3, track_running_stats=True)))
    refused(r"1\.0.*dropout", model(nn.MultiheadAttention(4, 2, dropout=0.1).requires_grad_(False)))
    refused(r"1\.0.*Scale.*no rule.*gain", model(Scale()))
    refused(r"1\.0.*OwnForward.*no rule", model(OwnForward(3, 3)))
    refused(r"1\.0.*MultiheadAttention.*no rule", model(nn.MultiheadAttention(4, 2)))
    refused(r"1\.0.*without groups", model(nn.Conv2d(4, 4, 3, groups=2)))
    refused(r"1\.0.*zero padding", model(nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")))
    refused(r"1\.0.*zero padding", model(nn.Conv2d(4, 4, 3, padding="same")))
    refused(r"1\.0.*mix examples", model(nn.Embedding(4, 4, max_norm=1.0)))
    tied = model(nn.Linear(3, 3))
    tied[1][0].weight = tied[0].weight
    refused(r"1\.0.*shares a parameter with layer '0'", tied)
    DPSGD(model(nn.Dropout(0.0)), 1.0, 1.0, 1.0)
    DPSGD(model(Scale().requires_grad_(False)), 1.0, 1.0, 1.0)
    DPSGD(model(Scale()), 1.0, 1.0, 1.0, method="vmap")


def test_inputs_that_are_not_grouped_by_example_are_refused():
    class Root(nn.Module):
        def __init__(self, turn):
            super().__init__()
            self.layer, self.turn = nn.Linear(N, N), turn

        def forward(self, x):
            return self.turn(self.layer(x), self.layer)

    def losses(model, x):
        return model(x).sum((1, 2))

    x = torch.randn(N, 5, N)
    for turn in (lambda y, layer: layer(y.transpose(0, 1)).transpose(0, 1),  # second use with positions first
                 # one vector: its length N is not the number of examples
                 lambda y, layer: y + layer(y[0, 0])):
        engine = DPSGD(Root(turn), 1.0, 1.0, 1.0)
        with pytest.raises(ValueError, match="'layer' saw an input of shape"):
            engine.accumulate(losses, x)

    def in_place(model, x):
        y = model.layer(x)
        x.add_(1)
        return y.sum((1, 2))

    with pytest.raises(ValueError, match="'layer' was changed in place"):
        engine.accumulate(in_place, x)


class InOrder(nn.Module):
    """Two Linear layers on (N, 5, 4) and whatever `way` does with them."""

    def __init__(self, way):
        super().__init__()
        self.first, self.second, self.way = nn.Linear(4, 4), nn.Linear(4, 4), way

    def forward(self, x):
        return self.way(self, torch.tanh(self.first(x))).square().sum((1, 2))


def test_outputs_changed_in_place_are_refused_and_constants_are_none_of_the_layers_business():
    x = torch.randn(N, 5, 4)
    model = InOrder(lambda m, h: F.relu(m.second(h), inplace=True))
    with pytest.raises(ValueError, match="output of layer 'second' was changed in place"):
        DPSGD(model, 1.0, 1.0, 1.0).accumulate(lambda m, x: m(x), x)

    def constant(m, h):
        with torch.no_grad():
            shift = m.second(h)
        return m.second(h) + shift

    model = InOrder(constant)
    assert_close(clipped_sum(model, lambda m, x: m(x), [x], 1.0),
                 clipped_sum(model, lambda m, x: m(x), [x], 1.0, "loop"), 1e-5)


def test_an_input_changed_between_norm_and_sum_is_refused():
    class Shift(torch.autograd.Function):  # gives its buffer back to its own input in the backward pass
        @staticmethod
        def forward(ctx, x):
            ctx.x = x
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            ctx.x.mul_(1000)
            return g

    # one position: the norm is that of x times that of the gradient
    x = torch.randn(N, 1, 4, requires_grad=True)
    model = two_layers()
    model[0] = nn.Linear(4, 10)
    with pytest.raises(ValueError, match="input of layer '0' was changed in place"):
        DPSGD(model, 1.0, 1.0, 1.0).accumulate(lambda m,
                                               x: (Shift.apply(x).sum(2, keepdim=True)
                                                   + m(x)).square().sum((1, 2)), x)


def test_layers_of_two_kinds_on_one_input():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.linear = nn.Conv2d(2, 200, (2, 64)), nn.Linear(64, 64)

        def forward(self, x):
            return self.conv(x).square().sum((1, 2, 3)) + self.linear(x).square().sum((1, 2, 3))

    model, x = Both().double(), torch.randn(N, 2, 2, 64, dtype=torch.float64)
    assert_close(clipped_sum(model, lambda m, x: m(x), [x], 1.0),
                 clipped_sum(model, lambda m, x: m(x), [x], 1.0, "loop"))


@pytest.mark.parametrize("width", [64, 1280, 5120])
def test_rounding_in_wide_layers_never_exceeds_the_clip_norm(width):
    generator, C = torch.Generator().manual_seed(0), 1e-3
    layer, v = nn.Linear(width, 16, bias=False), torch.tensor([[1.0],
                                                               [-1.0]]) * F.one_hot(torch.tensor(0), 16)
    # two constant rows, nearly equal, opposite gradients: the worst for a sum's rounding that was found
    for _ in range(60):
        u = torch.rand(2, generator=generator)
        x = (1 + u[0]) * torch.tensor([1.0, 1 + 10 ** (-3.5 + 1.5 * u[1])])[None, :, None].expand(
            1, 2, width
        ).contiguous()
        assert clipped_sum(layer, lambda m, x: (m(x) * v).sum((1, 2)), [x], C).norm() <= C * (1 + 1e-3)


def test_the_check_against_the_loop_sees_what_hooks_do_not():
    x = torch.randn(6, 12, 4)

    def check(way):
        dp_sgd.check_against_loop(DPSGD(InOrder(way), 1.0, 1.0, 1.0), lambda m, x: m(x), x)

    check(lambda m, h: m.second(h))
    model = latent_model(dtype=torch.float32)
    dp_sgd.check_against_loop(DPSGD(model, 1.0, 1.0, 1.0), LOSS, *examples(k=3, dtype=torch.float32))
    for way in (lambda m, h: m.second(h) + F.linear(h, m.first.weight),  # a weight used outside its layer
                lambda m, h: m.second(h) * m.first.bias,
                lambda m, h: m.second(h) * torch.nan,  # every example would be dropped, and noise released
                lambda m, h: m.second(h.transpose(0, 1)).transpose(0, 1)):  # 12 positions before 6 examples
        with pytest.raises(ValueError, match="disagree about the gradients"):
            check(way)


def test_bad_arguments_are_refused_in_one_clear_line():
    model = two_layers()
    for value in (0.0, -1.0, float("nan"), float("inf")):
        refused("clip_norm C", model, clip_norm=value)
    refused("noise_multiplier sigma", model, noise_multiplier=-0.1)
    refused("noise_multiplier sigma", model, noise_multiplier=float("nan"))
    refused("expected_batch_size", model, expected_batch_size=0)
    refused("no trainable parameter", two_layers().requires_grad_(False))
    for q in (0.0, -0.1, 1.1, float("nan")):
        with pytest.raises(ValueError, match="q is the probability"):
            dp_sgd.poisson_sample(10, q)
    with pytest.raises(ValueError, match="n, the number"):
        dp_sgd.poisson_sample(-1, 0.5)


@pytest.mark.parametrize("method", METHODS)
def test_bad_losses_and_batches_are_refused(method):
    model, x = two_layers(), torch.randn(N, 10)
    engine = DPSGD(model, 1.0, 1.0, 1.0, method=method)
    for loss_fn in (lambda m, x: m(x).mean(), lambda m, x: m(x), lambda m,
                    x: m(x).sum(1).mean(0, keepdim=True)[:0]):
        with pytest.raises(ValueError, match="one loss per example"):
            engine.accumulate(loss_fn, x)
    with pytest.raises(ValueError, match="do not depend on any trainable"):
        engine.accumulate(lambda m, x: x.sum(1), x)
    for batch in ((x, x[:2]), (None,), ()):
        with pytest.raises(ValueError, match="one row per example"):
            engine.accumulate(lambda m, *b: m(b[0]).sum(1), *batch)
    model[0].requires_grad_(False)
    with pytest.raises(ValueError, match="trainable parameters changed"):
        engine.accumulate(squares, x)
    assert all((s == 0).all() for s in engine.sums)


def test_default_engine_learns_a_tiny_problem():
    """Twenty noiseless clipped steps with Adam fit a line: signs and scales are those of a gradient."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 1), torch.randn(200, 4)
    y = x @ torch.tensor([1.0, -2.0, 0.5, 0.0])
    engine, adam = DPSGD(model, 1e-3, 0.1, 200 * 0.5), torch.optim.Adam(model.parameters(), lr=0.2)

    def loss_fn(m, x, y):
        return F.mse_loss(m(x)[:, 0], y, reduction="none")

    losses = []
    for _ in range(40):
        part = dp_sgd.poisson_sample(200, 0.5)
        engine.accumulate(loss_fn, x[part], y[part])
        engine.step(adam)
        losses.append(engine.last["loss"])
    assert losses[-1] < 0.1 * losses[0]


@pytest.mark.parametrize("small,large", [
    (1e-23, 1e18), (1e18, 1e-23), (1e-22, 1e17), (1e-25, 1e25), (1e25, 1e-25), (1e-30, 1e18), (1e-3, 1e3)])
@pytest.mark.parametrize("bias", [True, False])
def test_tiny_inputs_and_huge_gradients_do_not_escape_the_clip(small, large, bias):
    """Squares below 1e-38 vanish in float32. A tiny input times a huge gradient may be any size."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 40, bias=bias))
    x = small * torch.randn(3, 4, 40)  # four positions: Gram matrices
    engine, C = DPSGD(model, 1e-6, 1.0, 1.0), 1e-6
    assert bookkeeping.grams_are_cheaper(engine.layers[0], x, x, 3)
    weight = torch.randn(3, 4, 40) * large
    for i in range(3):
        engine.sums = dp_sgd.zeros(engine.parameters)
        engine.accumulate(lambda m, x, w: (m(x) * w).sum((1, 2)), x[i:i + 1], weight[i:i + 1])
        assert float(torch.cat([s.double().flatten() for s in engine.sums]).norm()) <= C * (1 + 1e-5)


@pytest.mark.parametrize("clip_norm", [1e-320, 1e-11, 1e11, 1e300])
def test_clip_norms_that_float32_cannot_carry_are_refused(clip_norm):
    with pytest.raises(ValueError, match="between 1e-10 and 1e"):
        DPSGD(nn.Linear(2, 2), clip_norm, 1.0, 1.0)


def test_a_factor_that_float32_cannot_carry_is_zero():
    norms = torch.tensor([[1e27, 1e28, 1e38]], dtype=torch.float64)
    factors = dp_sgd.usable(dp_sgd.flat(norms, 1e-10), norms, torch.zeros(3))
    assert factors[0].tolist() == pytest.approx([1e-37, 0.0, 0.0])
