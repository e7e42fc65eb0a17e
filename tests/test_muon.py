"""extensions/muon.py against singular value decompositions in float64, and against torch's own Muon.

And the loop of the public stages with either optimizer, and what the private stage gives to it.
"""
import copy
import dataclasses
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import dp_sgd
import optim
import train
import unet
from extensions import muon, text
from support import files, progress, settings, trainable


def by_svd(g, steps=3):
    """What `orthogonal` should make of a matrix: p, applied `steps` times to its singular values."""
    a, b, c = muon.COEFFICIENTS
    u, s, v = torch.linalg.svd(g.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(steps):
        s = a * s + b * s ** 3 + c * s ** 5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16), (1, 5)])
def test_only_the_singular_values_change_and_all_are_about_one(shape):
    g = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    found = muon.orthogonal(g)
    for one, o in zip(g, found, strict=True):
        assert torch.allclose(o.double(), by_svd(one), atol=2e-5)
        assert torch.allclose(muon.orthogonal(1e-4 * one[None])[0], o, atol=1e-5)  # length does not matter
        if shape != (16, 16):  # a square random matrix may have a singular value near zero
            s = torch.linalg.svdvals(o)
            assert s.min() > 0.68 and s.max() < 1.21


def test_a_matrix_of_zeros_stays_zero():
    assert torch.equal(muon.orthogonal(torch.zeros(2, 4, 6)), torch.zeros(2, 4, 6))


@pytest.mark.parametrize("shape", [(8, 4, 3, 3), (40, 8, 1, 1)])
def test_steps_are_those_of_the_formula(shape):
    """Two steps of two convolutions in groups of their own and of a third, by hand."""
    generator = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape, generator=generator)) for _ in range(3)]
    optimizer = muon.Muon([{"params": weights[:2]}, {"params": weights[2:], "momentum": 0.8}],
                          lr=0.1, momentum=0.9, weight_decay=0.5)
    expected = [(w.detach().double().flatten(1), 0.0, mu)
                for w, mu in zip(weights, (0.9, 0.9, 0.8), strict=True)]
    for _ in range(2):
        for i, (w, m, mu) in enumerate(expected):
            weights[i].grad = torch.randn(shape, generator=generator)
            g = weights[i].grad.double().flatten(1)
            m = mu * m + (1 - mu) * g
            w = (1 - 0.1 * 0.5) * w - 0.1 * 0.2 * max(w.shape) ** 0.5 * by_svd((1 - mu) * g + mu * m)
            expected[i] = w, m, mu
        optimizer.step()
        for p, (w, *_) in zip(weights, expected, strict=True):
            assert torch.allclose(p.detach().double().flatten(1), w, atol=1e-4)


def test_the_usual_values_of_momentum_and_weight_decay():
    assert muon.Muon([nn.Parameter(torch.ones(2, 2))], 1.0).defaults == {
        "lr": 1.0, "momentum": 0.95, "weight_decay": 0.01, "scale": 0.2}


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="torch has Muon since 2.9")
def test_torch_takes_the_same_steps():
    """Its Newton-Schulz iteration runs in bfloat16, so steps agree to about 1 %."""
    generator = torch.Generator().manual_seed(2)
    ours = nn.Parameter(torch.randn(24, 60, generator=generator))
    theirs = nn.Parameter(ours.detach().clone())
    pairs = [(ours, muon.Muon([ours], 0.02)),
             (theirs, torch.optim.Muon([theirs], 0.02, weight_decay=0.01, ns_steps=3,
                                       adjust_lr_fn="match_rms_adamw"))]
    begin = ours.detach().clone()
    for _ in range(3):
        g = torch.randn(24, 60, generator=generator)
        for p, optimizer in pairs:
            p.grad = g.clone()
            optimizer.step()
    assert (ours - theirs).norm() < 0.02 * (ours - begin).norm()


def test_every_parameter_has_one_optimizer():
    model = nn.Sequential(nn.Embedding(5, 8), nn.Linear(8, 8), nn.LayerNorm(8), nn.Conv2d(8, 2, 3))
    by_muon = [model[1].weight, model[3].weight]
    adamw, found = optim.PUBLIC["muon"](model, 1e-3)
    sets = [{id(p) for group in o.param_groups for p in group["params"]} for o in (adamw, found)]
    assert isinstance(adamw, torch.optim.AdamW) and sets[1] == {id(p) for p in by_muon}
    assert not sets[0] & sets[1] and sets[0] | sets[1] == {id(p) for p in model.parameters()}
    [only] = optim.PUBLIC["adamw"](model, 1e-3)
    assert {id(p) for p in only.param_groups[0]["params"]} == {id(p) for p in model.parameters()}


def test_a_network_of_matrices_only_or_without_any_has_one_optimizer():
    [only] = optim.PUBLIC["muon"](nn.Linear(3, 3, bias=False), 1e-3)
    assert isinstance(only, muon.Muon)
    [only] = optim.PUBLIC["muon"](nn.LayerNorm(3), 1e-3)
    assert isinstance(only, torch.optim.AdamW)


def test_a_weight_without_gradient_stays_as_it_is():
    used, unused = nn.Parameter(torch.ones(3, 4)), nn.Parameter(torch.ones(3, 4))
    optimizer = muon.Muon([used, unused], 0.1)
    optimizer.step()  # none has a gradient
    used.grad = torch.randn(3, 4)
    optimizer.step()
    assert not torch.equal(used, torch.ones(3, 4)) and torch.equal(unused, torch.ones(3, 4))


class Stopped(Exception):
    pass


def fitted(tmp_path, optimizer, steps=4, stop_after=None):
    """A small network after `train.fit`, and the weights before. Raises Stopped after `stop_after` steps."""
    def leave(_):
        raise Stopped

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 3))
    before = [p.detach().clone() for p in model.parameters()]
    stop = SimpleNamespace(asked=False, leave=leave)
    s = SimpleNamespace(seed=0, device="cpu", bf16=False, public_optimizer=optimizer, out=tmp_path)
    done = []

    def loss_fn(generator):
        done.append(1)
        stop.asked = len(done) == stop_after
        x = torch.randn(5, 1, 4, 4, generator=generator)
        return (model(x) - 1).square().mean(), {}

    train.fit(s, "", model, loss_fn, steps, peak=0.01, decay=0.0, state_path=tmp_path / "state.pt", stop=stop)
    return list(model.parameters()), before


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_the_public_loop_moves_every_parameter_at_the_rate_of_the_schedule(name, tmp_path, monkeypatch):
    make, used = optim.PUBLIC[name], []
    monkeypatch.setitem(optim.PUBLIC, name, lambda *args: used.extend(make(*args)) or used)
    after, before = fitted(tmp_path, name)
    assert len(used) == (2 if name == "muon" else 1)
    for now, then in zip(after, before, strict=True):
        assert (now - then).norm() > 0.003 * then.norm() + 1e-4  # weight decay alone moves 0.0004 of it
    rates = {group["lr"] for optimizer in used for group in optimizer.param_groups}
    assert rates == {optim.learning_rate(3, 4, 0.01)}


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_a_stopped_public_stage_ends_like_an_uninterrupted_one(name, tmp_path):
    whole, _ = fitted(tmp_path, name)
    with pytest.raises(Stopped):
        fitted(tmp_path, name, stop_after=2)
    resumed, _ = fitted(tmp_path, name)
    assert all(map(torch.equal, whole, resumed))


def test_a_public_stage_goes_on_on_another_device(tmp_path):
    """A generator of CUDA has another state, so it begins anew from the seed."""
    with pytest.raises(Stopped):
        fitted(tmp_path, "muon", stop_after=2)
    state = files.load(tmp_path / "state.pt")
    files.save({**state, "device": "cuda", "generator": state["generator"][:16]}, tmp_path / "state.pt")
    resumed, before = fitted(tmp_path, "muon")
    assert not any(map(torch.equal, resumed, before))


def test_a_state_of_the_other_optimizer_is_refused(tmp_path):
    with pytest.raises(Stopped):
        fitted(tmp_path, "muon", stop_after=2)
    state = files.load(tmp_path / "state.pt")
    adamw, found = state["optimizers"]
    found["state"] = {key: {"exp_avg": value["momentum_buffer"]} for key, value in found["state"].items()}
    files.save({**state, "optimizers": [adamw, found]}, tmp_path / "state.pt")
    with pytest.raises(ValueError, match="state.pt.*does not fit"):
        fitted(tmp_path, "muon")


def small_pair(make, steps=1):
    """A weight and its optimizer after some steps."""
    p = nn.Parameter(torch.ones(3, 4))
    optimizer = make([p])
    for _ in range(steps):
        p.grad = torch.randn(3, 4, generator=torch.Generator().manual_seed(5))
        optimizer.step()
    return p, optimizer


@pytest.mark.parametrize("make", [
    lambda ps: torch.optim.Adam(ps, 0.1), lambda ps: torch.optim.AdamW(ps, 0.1, amsgrad=True),
    lambda ps: torch.optim.NAdam(ps, 0.1), lambda ps: torch.optim.SGD(ps, 0.1, momentum=0.9),
    lambda ps: torch.optim.Adafactor(ps, 0.1), lambda ps: muon.Muon(ps, 0.1)])
def test_an_optimizer_s_own_state_is_taken_and_its_next_step_is_the_same(make):
    (p, optimizer), (other, again) = small_pair(make), small_pair(make, steps=0)
    other.data.copy_(p.data)
    optim.load_state(again, copy.deepcopy(optimizer.state_dict()))
    for weight, one in ((p, optimizer), (other, again)):
        weight.grad = torch.full((3, 4), 0.3)
        one.step()
    assert torch.equal(p, other)


@pytest.mark.parametrize("make, name", [(lambda ps: torch.optim.Adam(ps, 0.1), "exp_avg"),
                                        (lambda ps: torch.optim.AdamW(ps, 0.1), "exp_avg_sq"),
                                        (lambda ps: muon.Muon(ps, 0.1), "momentum_buffer")])
@pytest.mark.parametrize("value", [None, torch.zeros(2, 2), "missing"])
def test_a_state_with_which_the_next_step_would_fail_is_refused(make, name, value):
    _, optimizer = small_pair(make)
    state = optimizer.state_dict()
    state["state"] = {0: {**state["state"][0], name: value}}
    if isinstance(value, str):
        del state["state"][0][name]
        state["state"][0]["other"] = torch.zeros(())
    with pytest.raises(ValueError, match="does not fit"):
        optim.load_state(small_pair(make, steps=0)[1], state)


def tuned_network():
    """A small network, of which DP-SGD trains a part, and its engine."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.LayerNorm(16), nn.Linear(16, 8, bias=False),
                          nn.Linear(8, 3))
    model[0].requires_grad_(False)
    return model, dp_sgd.DPSGD(model, 1.0, 1.0, 5, generator=torch.Generator().manual_seed(1))


def one_private_step(model, engine, optimizers, seed):
    x = torch.randn(5, 1, 4, 4, generator=torch.Generator().manual_seed(seed))
    engine.accumulate(lambda model, x: (model(x) - 1).square().mean(1), x)
    engine.step(*optimizers)


def test_in_the_private_stage_each_tuned_parameter_has_one_optimizer():
    model, engine = tuned_network()
    adam, found = optim.PRIVATE["muon"](model, 0.01)
    assert type(adam) is torch.optim.Adam and adam.defaults["lr"] == 0.01
    assert adam.param_groups[0]["params"] == [model[2].weight, model[2].bias, model[4].bias]
    assert found.param_groups[0]["params"] == [model[3].weight, model[4].weight]
    assert found.defaults == {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0, "scale": 1.0}
    [only] = optim.PRIVATE["adam"](model, 0.01)
    assert only.param_groups[0]["params"] == engine.parameters
    model[2].requires_grad_(False), model[4].requires_grad_(False)
    [only] = optim.PRIVATE["muon"](model, 0.01)  # nothing is left for Adam
    assert isinstance(only, muon.Muon)


def test_muon_sees_the_noisy_gradient_only(monkeypatch):
    """Its step from 0 is along the orthogonalised output of `privatise`, whatever the true sum was."""
    model, engine = tuned_network()
    noisy = [torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
             for i, p in enumerate(engine.parameters)]
    monkeypatch.setattr(dp_sgd, "privatise", lambda *args: noisy)
    before = model[3].weight.detach().clone()
    one_private_step(model, engine, optim.PRIVATE["muon"](model, 0.01), seed=2)
    expected = -0.01 * 16 ** 0.5 * by_svd(noisy[engine.names.index("3.weight")])
    assert torch.allclose((model[3].weight - before).double(), expected, atol=1e-6)
    other, engine = tuned_network()
    one_private_step(other, engine, optim.PRIVATE["muon"](other, 0.01), seed=3)
    assert all(map(torch.equal, model.parameters(), other.parameters()))  # another batch, the same noise


@pytest.mark.parametrize("name", ["muon", "adam"])
def test_a_private_stage_goes_on_with_the_moments_that_it_had(name, tmp_path):
    (model, engine), (other, resumed) = tuned_network(), tuned_network()
    optimizers, again = (optim.PRIVATE[name](network, 0.01) for network in (model, other))
    one_private_step(model, engine, optimizers, seed=2)
    average, kept = ([torch.full_like(p, x) for p in engine.parameters] for x in (7.0, 0.0))
    private = SimpleNamespace(engine=engine, average=average, optimizers=optimizers, done=1, folder=tmp_path)
    progress.Private.save(private)
    assert progress.resume(tmp_path / "state.pt", resumed, kept, again) == 1
    assert all(map(torch.equal, average, kept))
    for generator in (engine.generator, resumed.generator):
        generator.manual_seed(3)
    one_private_step(model, engine, optimizers, seed=4)
    one_private_step(other, resumed, again, seed=4)
    assert all(map(torch.equal, engine.parameters, resumed.parameters))


@pytest.mark.parametrize("tune, condition", [("attention", "none"), ("all", "class"), ("lora:2", "class"),
                                             ("embedder", "class"), ("shift", "class"),
                                             ("attention+shift", "class"), ("attention", "text")])
def test_muon_takes_a_step_whatever_is_tuned(tune, condition):
    """Every tuned parameter moves, and no other one does."""
    s = settings.parse(["--preset", "smoke", "--tune", tune, "--condition", condition])
    torch.manual_seed(0)
    embedder = {"class": unet.ClassEmbedder(10, 8, True), "none": None,
                "text": text.TextEncoder(20, 8, 6, width=8, layers=1)}[condition]
    config = dataclasses.replace(s.unet, context_dim=None if embedder is None else 8)
    model = unet.LatentModel(unet.UNet(config), embedder)
    names = trainable.choose(model, s)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():  # the frozen ones too: no optimizer may have them
        p.grad = torch.randn(p.shape)
    for optimizer in optim.PRIVATE["muon"](model, 0.01):
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == set(names)
