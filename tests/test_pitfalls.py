"""Pitfalls that no other file tests, on the private stage alone, and the table of docs/pitfalls.md.

`python -m tests.mutations` puts the mistakes back one at a time and demands that the test named in the table
goes red.
"""
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import accountant
import datasets
import diffusion
import dp_sgd
import evaluate
import optim
import sample
import train
import tuning
import unet
import vae
from datasets import arrays, pixels
from extensions import pld
from support import files, guarantee, randomness, settings
from tests import mutations

ROOT = Path(__file__).parent.parent
N = 60  # private examples


def tiny_model():
    torch.manual_seed(0)
    config = unet.UNetConfig(4, 4, 32, channel_mult=(1,), context_dim=8, num_groups=8)
    return unet.LatentModel(unet.UNet(config), unet.ClassEmbedder(10, 8, True))


def private_stage(out, *flags, model=None, latents=None):
    """Stage 3 alone on random latents, four steps of about six examples -> settings, plan, model, ledger.

    Only the embedder is tuned: nothing here depends on how much is, and it is quick.
    """
    s = settings.parse(["--preset", "smoke", "--out", str(out), "--batch-size", "6", "--micro-batch", "2",
                        "--accountant",
                     "rdp", "--tune", "embedder", *flags])
    s.bf16 = False
    (out / "internal").mkdir(parents=True)
    model = tiny_model() if model is None else model
    tuning.select_trainable(model, s.tune, s.from_block)
    latents = torch.randn(N, 1, 4, 4, 4,
                          generator=torch.Generator().manual_seed(1)) if latents is None else latents
    plan = guarantee.privacy_plan(s, N)
    rows = train.tune_privately(s, model, latents, torch.arange(N) % 10, plan, SimpleNamespace(asked=False))
    return s, plan, model, rows


def tuned(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def test_empty_batches_are_steps_of_noise_and_count(tmp_path, monkeypatch):  # 3
    monkeypatch.setattr(dp_sgd, "poisson_sample", lambda n, q,
                        generator=None: torch.empty(0, dtype=torch.int64))
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    # A seed: one in some thousand runs would end with a weight exactly where it began.
    _, plan, model, rows = private_stage(tmp_path, "--insecure-seed", "1", model=model)
    assert len(rows) == plan["steps"] == 4
    for name, p in model.named_parameters():
        assert (p != before[name]).all() == p.requires_grad, name
    log = [json.loads(line) for line in (tmp_path / "internal" / "log.jsonl").read_text().splitlines()]
    assert [row["examples"] for row in log] == [0] * 4


def test_noise_is_added_once_whatever_the_number_of_micro_batches():  # 4
    model = torch.nn.Linear(100, 200, bias=False)
    for parts in (1, 20):
        engine = dp_sgd.DPSGD(model, 1.0, 3.0, 1.0, generator=torch.Generator().manual_seed(0))
        before = model.weight.detach().clone()
        for _ in range(parts):
            engine.accumulate(lambda m, x: 0 * m(x).sum(1), torch.ones(2, 100))
        engine.step(torch.optim.SGD(model.parameters(), lr=1.0))
        assert float((model.weight.detach() - before).std()) == pytest.approx(3.0, rel=0.03)


def test_the_ledger_has_one_row_per_step_with_the_rate_that_drew_the_batch(tmp_path, monkeypatch):  # 5
    drawn, honest = [], dp_sgd.poisson_sample
    monkeypatch.setattr(dp_sgd, "poisson_sample", lambda n, q,
                        g=None: drawn.append((n, q)) or honest(n, q, g))
    s, plan, _, _ = private_stage(tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "internal" / "ledger.jsonl").read_text().splitlines()]
    assert len(rows) == s.steps == 4 and drawn == [(N, 6 / N)] * 4  # about three micro-batches each
    assert all(row["q"] == 6 / N and row["sigma"] == plan["sigma"] for row in rows)
    assert 9.9 < accountant.epsilon_of_ledger(rows, s.delta, s.accountant) <= 10


def test_the_drawn_examples_enter_the_gradient_once_with_the_noise_of_the_plan(tmp_path, monkeypatch):
    """Not the first ones of the set, say: all amplification by sampling would be lost (1)."""
    drawn, entered, noise, sizes = [], [], [], []
    sampled, accumulate, privatise = dp_sgd.poisson_sample, dp_sgd.DPSGD.accumulate, dp_sgd.privatise

    def draw(*args):
        batch = sampled(*args)
        drawn.extend(batch.tolist())
        sizes.append(len(batch))
        return batch

    def add(engine, loss_fn, z0, *rest):
        entered.extend(z0[:, 0, 0, 0].long().tolist())
        return accumulate(engine, loss_fn, z0, *rest)

    monkeypatch.setattr(dp_sgd, "poisson_sample", draw)
    monkeypatch.setattr(dp_sgd.DPSGD, "accumulate", add)
    monkeypatch.setattr(dp_sgd, "privatise",
                        lambda sums, *rest: noise.append(rest[:3]) or privatise(sums, *rest))
    numbered = torch.arange(N).float().view(N, 1, 1, 1, 1).expand(N, 1, 4, 4, 4).contiguous()
    s, plan, *_ = private_stage(tmp_path, latents=numbered)
    assert entered == drawn
    assert noise == [(s.clip_norm * (1 + dp_sgd.ROUNDING), plan["sigma"], s.batch_size)] * 4
    log = [json.loads(line) for line in (tmp_path / "internal" / "log.jsonl").read_text().splitlines()]
    assert [row["examples"] for row in log] == sizes


def test_the_draws_of_the_loss_are_unknown(tmp_path, monkeypatch):  # 12
    """Whoever knew them could tell an example that is there from its shift of all later draws."""
    seen, honest = [], diffusion.draw

    def draw(z0, cond, K, generator, schedule, **more):
        found = honest(z0, cond, K, generator, schedule, **more)
        seen.append((generator, found[2].flatten().tolist()))
        return found

    monkeypatch.setattr(diffusion, "draw", draw)
    monkeypatch.setattr(dp_sgd, "poisson_sample", lambda *args: torch.arange(6))
    timesteps = {}
    for name in ("a", "b", "c", "d"):
        seen.clear()
        private_stage(tmp_path / name, *(["--insecure-seed", "1"] if name in "cd" else []))  # same torch seed
        _, *private = seen  # the first ones are of the check against the loop
        assert all(generator is not None for generator, _ in private)
        timesteps[name] = [t for _, t in private]
    assert timesteps["a"] != timesteps["b"] and timesteps["c"] == timesteps["d"]


def test_two_private_runs_never_share_noise_or_batches(tmp_path, monkeypatch):  # 12
    sizes, honest = [], dp_sgd.poisson_sample
    monkeypatch.setattr(dp_sgd, "poisson_sample",
                        lambda *args: [batch := honest(*args), sizes.append(batch.tolist())][0])
    first, second = (tuned(private_stage(tmp_path / name)[2]) for name in "ab")
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True)) and sizes[:4] != sizes[4:]
    third, fourth = (tuned(private_stage(tmp_path / name, "--insecure-seed", "1")[2]) for name in "cd")
    assert all(torch.equal(a, b) for a, b in zip(third, fourth, strict=True))  # the test can tell


# 26
def test_noise_and_batches_come_from_the_secure_generator_unless_fast_and_are_stated(tmp_path, monkeypatch):
    seen = []
    for name in ("poisson_sample", "privatise"):
        honest = getattr(dp_sgd, name)
        monkeypatch.setattr(dp_sgd, name, lambda *args, honest=honest: seen.append(args[-1]) or honest(*args))
    for flags, secure in (([], True), (["--fast-noise"], False)):
        seen.clear()
        s, plan, _, rows = private_stage(tmp_path / str(secure), *flags)
        assert len(seen) == 8 and all(isinstance(g, dp_sgd.SecureGenerator) == secure for g in seen)
        privacy = guarantee.privacy_statement(s, plan, rows, 1)
        assert ("CSPRNG" in privacy["noise"]) == secure == (not privacy["fast_noise"])
        assert any("computes the noise" in text for text in privacy["does_not_cover"]) != secure
        assert privacy["private"] == secure == ("NOT PRIVATE" not in privacy["statement"])
    with pytest.raises(ValueError, match="exclude each other"):
        settings.parse(["--fast-noise", "--insecure-seed", "1"])


def test_public_stages_see_public_pictures_only(tmp_path, monkeypatch):  # 13
    class Enough(Exception):
        pass

    sets = {name: datasets.ImageSet(torch.full((1000, 1, 32, 32), grey, dtype=torch.uint8),
                                torch.zeros(1000, dtype=torch.int64), arrays.DIGITS, name=name)
            for name, grey in (("strokes", 50), ("mnist10k", 200))}

    honest, seen = train.train_autoencoder, []

    def first_stage(s, images, facts, stop):
        assert images is sets["strokes"].images
        return honest(s, images, facts, stop)

    def encode(s, autoencoder, images, scale):
        seen.append(images)
        return torch.zeros(len(images), 1, *autoencoder.latent_shape)

    def second_stage(*args):
        raise Enough

    monkeypatch.setattr(datasets, "load", lambda name, *args, **kwargs: sets[name])
    monkeypatch.setattr(train, "train_autoencoder", first_stage)
    monkeypatch.setattr(train, "encode", encode)
    monkeypatch.setattr(train, "train_diffusion", second_stage)
    with pytest.raises(Enough):
        train.main(["--preset", "smoke", "--out", str(tmp_path), "--precision", "float32", "--vae-steps",
                    "1"])
    assert len(seen) == 1 and torch.equal(seen[0], sets["strokes"].images)


def test_the_latent_of_a_picture_depends_on_no_other_picture():  # 13
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(vae.VAEConfig(ch=8, ch_mult=(1, 1), num_groups=4)).eval()
    s = SimpleNamespace(device="cpu", flips=False, vae=autoencoder.config)
    images = torch.randint(256, (37, 1, 32, 32), dtype=torch.uint8)
    together = train.encode(s, autoencoder, images, 2.0)
    alone = train.encode(s, autoencoder, images[:1], 2.0)
    # Not even by rounding: batches of one size, also where one image more makes another last batch.
    assert torch.equal(together[:1], alone)
    assert torch.equal(together[:36], train.encode(s, autoencoder, images[:36], 2.0))
    assert torch.equal(together[1:], train.encode(s, autoencoder, images[1:], 2.0))
    with torch.no_grad():
        expected = 2.0 * autoencoder.encode(pixels.to_float(images[:1])).mean
    assert torch.allclose(alone[:, 0], expected, atol=1e-5)


def test_the_private_stage_writes_into_internal_only(tmp_path):  # 14
    private_stage(tmp_path)
    written = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert written == {f"internal/{name}" for name in ("ledger.jsonl", "log.jsonl", "state.pt")}


def test_the_last_average_is_released_and_nothing_is_chosen(tmp_path, monkeypatch):  # 15
    losses = iter([0.1, 5.0, 5.0, 5.0])
    honest = dp_sgd.summary
    monkeypatch.setattr(dp_sgd, "summary", lambda figures: honest(figures) | {"loss": next(losses)})
    _, _, model, _ = private_stage(tmp_path)
    state = files.load(tmp_path / "internal" / "state.pt")
    assert state["done"] == 4
    assert all(torch.equal(p, a) for p, a in zip(tuned(model), state["average"], strict=True))
    assert not any(torch.equal(p, a) for p, a in zip(state["tuned"].values(), state["average"], strict=True))


def test_labels_are_drawn_uniformly_and_not_from_the_private_histogram():  # 16
    assert sample.uniform_labels(1000, 10).bincount().tolist() == [100] * 10
    assert sample.uniform_labels(13, 10).bincount(minlength=10).max() == 2


def test_the_average_holds_tuned_parameters_only_and_moves_once_per_step(tmp_path, monkeypatch):  # 17
    calls, honest = [], optim.update_ema
    monkeypatch.setattr(optim, "update_ema", lambda average,
                        *rest: calls.append(len(average)) or honest(average, *rest))
    _, _, model, _ = private_stage(tmp_path)
    assert calls == [len(tuned(model))] * 4 and calls[0] < len(list(model.parameters()))


def test_the_statement_carries_what_a_guarantee_needs(tmp_path, monkeypatch):  # 20, 24, 25
    s = settings.parse(["--preset", "smoke", "--out", str(tmp_path), "--epsilon", "2"])
    with pytest.raises(ValueError, match="below 1/n"):
        guarantee.privacy_plan(s, 100_000)
    plan, stages = guarantee.privacy_plan(s, 1000), [{"trained_on": "strokes"}]
    rows = [{"q": plan["q"], "sigma": plan["sigma"], "computed": "cpu, float32"}] * 4
    privacy = guarantee.privacy_statement(s, plan, rows, 7, stages)
    assert "(2, 1e-05)" in privacy["statement"] and privacy["delta"] == 1e-5 < 1 / privacy["n"]
    assert privacy["adjacency"] == "add or remove one image" and privacy["sampling"] == "Poisson"
    assert privacy["unit"] == "one image" and "one image" in privacy["statement"]
    group = privacy["epsilon_for_20_pictures_of_one_person"]
    assert group == pld.group_epsilon(20, plan["q"], plan["sigma"], 4, 1e-5) > 5 * privacy["epsilon"]
    assert any("other runs" in text and "add up" in text for text in privacy["does_not_cover"])
    assert privacy["public_set"] == "strokes" and any("from a larger set" in text
                                                      for text in privacy["does_not_cover"])
    assert privacy["computed"] == ["cpu, float32"] and not any("on a GPU" in text
                                                               for text in privacy["does_not_cover"])
    # Steps that the plan did not foresee count: the ledger rules.
    longer = guarantee.privacy_statement(s, plan, [*rows, *rows[:2]], 7, stages)
    assert longer["steps"] == 6 and longer["epsilon"] >= accountant.epsilon(plan["q"], plan["sigma"], 6, 1e-5,
                                                                            s.accountant) > plan["epsilon"]
    assert longer["epsilon_for_20_pictures_of_one_person"] > group
    # Where 20 images together reach beyond the noise, no epsilon holds for them.
    monkeypatch.setattr(guarantee.randomness, "beyond_the_noise",
                        lambda limit, q, sigma, steps, k=1: float(k == 20))
    beyond = guarantee.privacy_numbers(randomness.reach(s), rows, 1e-5)
    assert beyond["epsilon_for_20_pictures_of_one_person"] == math.inf > beyond["epsilon_pld"]
    # A run that was stopped on one device and went on with another; a damaged ledger stops no statement.
    moved = [*rows[2:], rows[0] | {"computed": "cuda, bf16"}, rows[1] | {"computed": 7}]
    elsewhere = guarantee.privacy_statement(s, plan, moved, 7, stages)
    assert elsewhere["computed"] == ["7", "cpu, float32", "cuda, bf16"]
    assert any("on a GPU, which was not bounded" in text for text in elsewhere["does_not_cover"])
    s.private_n = None  # all of them: nothing was chosen
    assert not any("from a larger set" in t
                   for t in guarantee.privacy_statement(s, plan, rows, 7, stages)["does_not_cover"])
    # mnist10k's presets were
    assert "partly by looking at results on private data" in privacy["hyper_parameters"]
    s.private = "folder:mine"
    assert "without results on these images" in guarantee.privacy_statement(s, plan, rows, 7,
                                                                              stages)["hyper_parameters"]


def test_every_distance_is_printed_with_what_it_depends_on():  # 22
    result = {"protocol": "quick", "n": 4321, "sampler": "DDIM, 30 steps, eta 0, guidance 1, seed 0",
              "held_out": {"2,000 of x": 2000}, "accuracy": {"cnn": {"2,000 of x": 0.5}},
              "recipes": {"cnn": {"kind": "small-cnn", "epochs": 12}}, "seconds": {},
              "distance": {"features": "CNN trained on strokes", "split": "2,000 of x",
                           "resize": "28 pixels, not resized",
                           "frechet": 1.5, "n": [4321, 2000], "halves": 0.5, "halves_n": 1000,
                           "precision": 0.5, "recall": 0.5,
                           "k": 3, "manifold_n": [2000, 2000]}}
    text = evaluate.report(result)
    for part in ("4,321 samples", "DDIM, 30 steps, eta 0, guidance 1, seed 0", "CNN trained on strokes",
                 "2,000 of x",
                 "28 pixels, not resized", "quick"):
        assert part in text, part
    assert "FID" not in text


# ------------------------------------------------------------------------------ the table of docs/pitfalls.md


def table():
    """Rows (number, mistake, our line, test); rows in a comment wait for their line and test."""
    text = re.sub("<!--.*?-->", "", (ROOT / "docs" / "pitfalls.md").read_text(), flags=re.S)
    lines = [line for line in text.splitlines() if re.match(r"\| \d+ \|", line)]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_the_table_has_all_pitfalls_and_every_test_it_names_exists():
    rows = table()
    assert [int(row[0]) for row in rows] == list(range(1, 39)) and all(len(row) == 4 for row in rows)
    for number, _, _, tests in rows:
        named = re.findall(r"`([a-z_/]+\.py)::(\w+)`", tests)
        assert named, f"row {number} names no test"
        for file, name in named:
            assert re.search(rf"^def {name}\(", (ROOT / file).read_text(),
                             re.M), f"row {number}: {file} has no {name}"


def test_every_mutation_finds_its_line_and_its_test_stands_in_the_table():
    tests = {int(number): named for number, _, _, named in table()}
    for m in mutations.MUTATIONS:
        mutations.changed(m, (ROOT / m.file).read_text())  # ValueError if the line is not there once
        if m.row:  # row 0 is not in the table
            assert f"`{m.test.partition('[')[0]}`" in tests[m.row], f"row {m.row}: {m.mistake}"
