"""The private stage when memory runs out: smaller pieces, the same result, every example counted once."""
from functools import partial

import pytest
import torch

import diffusion
import dp_sgd
import train
import unet
from extensions.bookkeeping import bookkeeping
from support import files, settings

LOSS = partial(diffusion.loss, schedule=diffusion.PAPER)


def limited(limit, calls):
    """diffusion.loss on a machine with room for `limit` examples: it gives up in the middle of the forward pass."""
    loss = LOSS

    def fake(model, z0, *args, **kwargs):
        calls.append(len(z0))
        losses = loss(model, z0, *args, **kwargs)
        if len(z0) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate ...")
        return losses

    return fake


def engine_and_draws():
    torch.manual_seed(0)
    config = unet.UNetConfig(2, 2, 32, num_heads=4, context_dim=6, num_groups=8)
    model = unet.LatentModel(unet.UNet(config), unet.ClassEmbedder(3, 6))
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    unet.select_trainable(model)
    engine = dp_sgd.DPSGD(model, 0.5, 0.0, 10, gradients=bookkeeping)
    return engine, diffusion.draw(torch.randn(13, 2, 4, 4), torch.arange(13) % 3, 1, torch.Generator().manual_seed(1),
                                  diffusion.PAPER)


def chosen():
    s = settings.parse(["--device", "cpu"])
    s.bf16 = False
    return s


def test_pieces_give_the_sum_of_the_whole_and_count_each_example_once():
    whole, drawn = engine_and_draws()
    whole.accumulate(LOSS, *drawn)
    engine, _ = engine_and_draws()
    calls = []
    assert train.accumulate_in_pieces(chosen(), engine, limited(4, calls), drawn, 100) == 3
    assert calls == [13, 6, 3, 3, 3, 3, 1]
    for a, b in zip(engine.sums, whole.sums, strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-6)
    engine.step(torch.optim.SGD(engine.parameters, 0.0))
    assert engine.last["examples"] == 13


def test_one_example_too_much_is_one_line():
    engine, drawn = engine_and_draws()
    with pytest.raises(ValueError, match="out of memory") as refused:
        train.accumulate_in_pieces(chosen(), engine, limited(0, []), drawn, 4)
    assert "\n" not in str(refused.value) and not any(a.any() for a in engine.sums)


def test_a_run_that_runs_out_of_memory_releases_the_same_model(tmp_path, monkeypatch):
    flags = ["--preset", "smoke", "--vae-steps", "1", "--ldm-steps", "1", "--steps", "2", "--insecure-seed", "3",
             "--public-n", "60", "--private-n", "200", "--batch-size", "40", "--delta", "1e-3", "--sample-steps", "1",
             "--precision", "float32", "--accountant", "rdp", "--device", "cpu"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    calls = []
    monkeypatch.setattr(diffusion, "loss", limited(7, calls))
    train.main([*flags, "--out", str(tmp_path / "pieces"), "--init", str(tmp_path / "whole")])
    # The first micro-batch of 32 is halved until it fits; from then on pieces of 4, of the same draws.
    assert calls[:4] == [1, 1, 1, 3]  # the engine's check against the loop
    assert calls[4:8] == [32, 16, 8, 4] and max(calls[8:]) == 4
    before, a, b = (files.load(tmp_path / x)["model"] for x in ("whole/public/ldm.pt", "whole/release/model.pt",
                                                                  "pieces/release/model.pt"))
    # The released embedder has the private classes' rows only: it is left out of the scale, not of the comparison.
    moved = max((a[k] - before[k]).abs().max() for k in a if a[k].shape == before[k].shape)
    assert moved > 1e-3 and all(torch.allclose(a[k], b[k], atol=1e-3 * moved) for k in a)
