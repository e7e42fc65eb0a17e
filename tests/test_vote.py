"""The vote on drawings: one image, one vote; noise on all counts; its cost travels with what it gave."""
import json
import shutil

import numpy as np
import pytest
import torch

import accountant
import datasets
import dp_sgd
import train
from datasets import garments
from extensions import vote
from support import calculator, files, guarantee, settings, start

TINY = ["--preset", "smoke", "--private-n", "100", "--vae-steps", "2", "--ldm-steps", "2", "--vae-batch", "8",
        "--ldm-batch", "8", "--batch-size", "10", "--steps", "2", "--sample-steps", "1", "--precision",
        "float32", "--micro-batch", "32"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ---- the mechanism -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [0, 1, 7, 4095, 4096, 9000])  # 4096 at a time
def test_one_image_more_is_one_vote_more_whatever_the_others(n):  # 37
    images = torch.randint(0, 256, (n + 1, 1, 28, 28), generator=seeded(), dtype=torch.uint8)
    candidates = torch.randint(0, 1021, (3, 40, 196), generator=seeded(1)).double()
    labels = torch.randint(0, 3, (n + 1,), generator=seeded(2))
    x = vote.seen(images)
    more = vote.count_votes(x, labels, candidates)
    for i in {0, n // 2, n}:  # all after it move, some from one part to the next
        others = torch.arange(n + 1) != i
        less = vote.count_votes(x[others], labels[others], candidates)
        assert less.sum() == n and more.dtype == torch.float64
        changed = (more - less).flatten()
        assert changed.abs().sum() == changed.max() == 1


def test_votes_are_exact():  # 37
    """Beside whole numbers: squares up to 2e8 are rounded in float32, and the nearest may be another."""
    images = torch.randint(250, 256, (300, 1, 28, 28), generator=seeded(), dtype=torch.uint8)
    x, candidates = vote.seen(images), vote.seen(images[:50].flip(3))
    exact = (x[:, None] - candidates[None]).long().square().sum(2)
    assert torch.equal(vote.nearest(x, candidates), exact.argmin(1))
    blocks = images[:, 0].long().view(300, 14, 2, 14, 2).sum((2, 4)).flatten(1)
    assert torch.equal(x.long(), blocks)
    twice = torch.cat([candidates, candidates])  # of equal ones the first
    assert torch.equal(vote.nearest(x, twice), exact.argmin(1))


def evolved(monkeypatch, x, labels, sigma=1.0, generations=1, cells=8, per_class=20, spend=lambda g: None,
            names=("trouser", "bag")):
    monkeypatch.setattr(vote, "CANDIDATES", cells)
    return vote.evolve(list(names), x, labels, sigma, generations, per_class, spend, seeded())


def test_every_count_gets_the_noise_of_the_plan(monkeypatch):  # 37
    handed, honest = [], dp_sgd.privatise

    def privatise(sums, *rest):
        out = honest(sums, *rest)
        handed.append((sums[0].clone(), out[0], rest))
        return out

    monkeypatch.setattr(dp_sgd, "privatise", privatise)
    x = vote.seen(torch.full((10, 1, 28, 28), 9, dtype=torch.uint8))
    evolved(monkeypatch, x, torch.arange(10) % 2, sigma=30.0, generations=30, cells=20)
    assert len(handed) == 30
    for counts, _, (sensitivity, sigma, divisor, generator) in handed:
        assert counts.shape == (2, 20) and counts.sum() == 10
        assert (sensitivity, sigma, divisor) == (1.0, 30.0, 1) and generator is None  # SecureGenerator
    noise = torch.stack([out - counts for counts, out, _ in handed]) / 30
    assert 0.93 < noise.std() < 1.07 and abs(float(noise.mean())) < 0.12  # 1,200 draws: 3.4 and 4 errors
    assert len(noise.unique()) > 1190  # each its own


def test_only_the_noisy_counts_go_on(monkeypatch):  # 37
    """Whoever they are that vote: with the same noisy counts the same is drawn."""
    monkeypatch.setattr(dp_sgd, "privatise", lambda sums, *rest: [torch.arange(16.0).view(2, 8).double()])
    dark, bright = (vote.seen(torch.full((9, 1, 28, 28), tone, dtype=torch.uint8)) for tone in (0, 255))
    one, _ = evolved(monkeypatch, dark, torch.arange(9) % 2, generations=2)
    other, _ = evolved(monkeypatch, bright[:5], torch.zeros(5, dtype=torch.long), generations=2)
    assert torch.equal(one, other)


def test_a_generation_is_spent_before_its_votes_are_used(monkeypatch):  # 37
    events, honest = [], dp_sgd.privatise
    monkeypatch.setattr(dp_sgd, "privatise", lambda *a: events.append("noise") or honest(*a))
    x = vote.seen(torch.zeros(4, 1, 28, 28, dtype=torch.uint8))
    evolved(monkeypatch, x, torch.arange(4) % 2, generations=3, spend=events.append)
    assert events == [0, "noise", 1, "noise", 2, "noise"]


# ---- drawings and their children ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*garments.CLASSES, garments.SHAPES[0]])
def test_children_repeat_their_parents_choices(name):
    first, choices = vote.draw(name, 70, seeded())  # 70: in two parts
    again, same = vote.draw(name, 70, seeded(1), choices, fresh=0.0)
    assert all(torch.equal(a, b) for a, b in zip(choices, same, strict=True))
    alike = (again.float() - first.float()).abs().mean()  # grain is new
    other = (vote.draw(name, 70, seeded(1), choices, fresh=1.0)[0].float() - first.float()).abs().mean()
    a_few = (vote.draw(name, 70, seeded(1), choices, fresh=0.05)[0].float() - first.float()).abs().mean()
    assert alike < 6 and alike < a_few < other
    assert first.shape == (70, 1, 28, 28) and first.dtype == torch.uint8


def test_inherited_dice_have_the_frequencies_of_dice():
    dice = vote.Inherited(20_000, seeded())
    picked = dice.pick("a b c", (1, 0, 3))
    assert picked["b"].sum() == 0 and abs(float(picked["c"].mean()) - 0.75) < 0.01
    assert abs(float(dice.chance(0.3).mean()) - 0.3) < 0.01
    assert abs(float(dice.uniform(2, 4).mean()) - 3) < 0.02
    assert abs(float(dice.normal(3).std()) - 1) < 0.01
    some = vote.Inherited(20_000, seeded(1), parents=dice.choices, fresh=0.25)
    some.pick("a b c", (1, 0, 3))
    assert abs(float((some.choices[0] != dice.choices[0]).float().mean()) - 0.25) < 0.01


def test_drawings_come_to_look_like_the_private_images(monkeypatch):
    """Private bags are dark, private trousers bright: so are the drawings after some votes with noise."""
    drawn = {name: vote.draw(name, 400, seeded(5))[0] for name in ("trouser", "bag")}
    light = {name: images.float().mean((1, 2, 3)).argsort() for name, images in drawn.items()}
    private = torch.cat([drawn["trouser"][light["trouser"][-100:]], drawn["bag"][light["bag"][:100]]])
    labels = torch.arange(2).repeat_interleave(100)
    images, of = evolved(monkeypatch, vote.seen(private), labels, sigma=1.0, generations=6, cells=40,
                         per_class=200)
    assert len(images) == 400 and of.tolist() == [0, 1] * 200
    for k, name in enumerate(drawn):
        mean, goal, before = (part.float().mean() for part in
                              (images[of == k], private[labels == k], drawn[name]))
        assert abs(mean - goal) < 0.5 * abs(before - goal), name


# ---- what it costs -----------------------------------------------------------------------------------------


HANDED = []  # what the fixture's vote gave to dp_sgd.privatise


@pytest.fixture(scope="module")
def voted(tmp_path_factory):
    """A vote of 200 digits, who do not look like garments: that does not matter here."""
    out, honest = tmp_path_factory.mktemp("vote") / "run", dp_sgd.privatise
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vote, "CANDIDATES", 6)
        patch.setattr(dp_sgd, "privatise", lambda *args: HANDED.append(args) or honest(*args))
        vote.main(["--private", "mnist10k", "--private-n", "200", "--per-class", "6", "--generations", "3",
                   "--epsilon", "2", "--delta", "1e-4", "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def tuned(voted, tmp_path_factory):
    """A run of train.py on these drawings, at epsilon 5."""
    out = tmp_path_factory.mktemp("tuned") / "run"
    train.main([*TINY, "--public", f"voted:{voted}", "--epsilon", "5", "--delta", "1e-4", "--out", str(out)])
    return out


def read(run):
    return json.loads((run / "release" / "privacy.json").read_text())


def test_a_vote_states_what_its_ledger_costs(voted):
    privacy, rows = read(voted), files.read_ledger(voted / "internal" / "ledger.jsonl").splitlines()
    rows = [json.loads(row) for row in rows]
    assert len(rows) == privacy["steps"] == 3
    assert {(row["q"], row["sigma"]) for row in rows} == {(1.0, privacy["sigma"])}
    assert accountant.epsilon_of_ledger(rows, 1e-4, "pld") == pytest.approx(privacy["epsilon"], rel=1e-9)
    assert 1.99 < privacy["epsilon"] <= 2
    assert {path.name for path in (voted / "release").iterdir()} == {"drawings.npz", "privacy.json",
                                                                     "comparison.png"}
    drawings = datasets.load(f"voted:{voted}", size=32, channels=1)
    assert drawings.images.shape == (60, 1, 32, 32) and drawings.classes == [str(i) for i in range(10)]


def test_the_noise_is_that_of_the_statement(voted):  # 37
    assert len(HANDED) == 3
    for [counts], sensitivity, sigma, divisor, generator in HANDED:
        assert counts.sum() == read(voted)["n"] == 200 and generator is None  # SecureGenerator
        assert (sensitivity, sigma, divisor) == (1.0, read(voted)["sigma"], 1)


def test_what_a_vote_cost_is_the_most_that_a_file_tells(voted, tmp_path):  # 38
    [(checksum, told)] = vote.cost(voted).items()
    sigma = read(voted)["sigma"]
    assert told == {"private_set": "mnist10k", "private_n": 200, "n": 200, "steps": [[1.0, sigma, 3]]}
    copy = tmp_path / "run"
    shutil.copytree(voted, copy)
    (copy / "release" / "privacy.json").unlink()
    (copy / "internal" / "ledger.jsonl").write_text('{"q": 1.0, "sigma": 50.0}\n')  # cut, and of another run
    assert vote.cost(copy)[checksum]["steps"] == [[1.0, sigma, 3], [1.0, 50.0, 1]]
    (copy / "internal" / "ledger.jsonl").write_text((voted / "internal" / "ledger.jsonl").read_text() * 2)
    assert vote.cost(copy)[checksum]["steps"] == [[1.0, sigma, 6]]
    (copy / "release" / "drawings.npz").write_bytes(b"no npz")
    with pytest.raises(ValueError, match="drawings.npz"):
        vote.cost(copy)


def test_the_cost_of_the_vote_is_part_of_the_run_that_takes_its_drawings(voted, tuned):  # 38
    privacy, [told] = read(tuned), vote.cost(voted).values()
    before = told["steps"]
    assert privacy["before"] == [told] and before == [[1.0, read(voted)["sigma"], 3]]
    assert 4.99 < privacy["epsilon"] <= 5
    own = (privacy["q"], privacy["sigma"], privacy["steps"])
    both = accountant.epsilon_of_ledger([*before, own], 1e-4, "pld")
    assert both == pytest.approx(privacy["epsilon"], rel=1e-6)
    assert accountant.epsilon_of_ledger([own], 1e-4, "pld") < 4.6  # there is more noise than without
    assert "Private images had voted" in (tuned / "release" / "MODEL_CARD.md").read_text()
    log = [json.loads(row) for row in (tuned / "internal" / "log.jsonl").read_text().splitlines()]
    first = accountant.epsilon_of_ledger([*before, (*own[:2], 1)], 1e-4, "pld")
    assert first <= log[0]["epsilon"] * (1 + 1e-6)


def test_the_calculator_counts_it_too(tuned, tmp_path, capsys):  # 38
    (tmp_path / "release").mkdir()  # a copy with the statement alone
    (tmp_path / "release" / "privacy.json").write_text((tuned / "release" / "privacy.json").read_text())
    for run in (tuned, tmp_path):
        steps, stated = calculator.read_run(run)
        assert accountant.epsilon_of_ledger(steps, 1e-4, "pld") == pytest.approx(stated["epsilon"], rel=1e-6)
        assert len(steps) == 2
    (tmp_path / "internal").mkdir()
    for name in ("plan.json", "ledger.jsonl", "settings.json"):
        shutil.copy(tuned / "internal" / name, tmp_path / "internal")
    stated = read(tmp_path)  # a statement that has lost it: the plan is believed
    (tmp_path / "release" / "privacy.json").write_text(json.dumps({**stated, "before": []}))
    assert len(calculator.read_run(tmp_path)[0]) == 2
    shutil.rmtree(tmp_path / "release")
    (tmp_path / "internal" / "plan.json").unlink()  # nobody knows the cost
    assert accountant.epsilon_of_ledger(calculator.read_run(tmp_path)[0], 1e-4, "pld") == float("inf")


@pytest.mark.parametrize("networks", ["both", "autoencoder"])
def test_networks_that_learned_from_the_vote_carry_its_cost(voted, tuned, tmp_path, networks):  # 38
    """Also where the public set is another one, and where only the autoencoder is taken."""
    init = tuned
    if networks == "autoencoder":
        init = tmp_path / "init"
        (init / "public").mkdir(parents=True)
        (init / "public" / "vae.pt").write_bytes((tuned / "public" / "vae.pt").read_bytes())
    out = tmp_path / "run"
    train.main([*TINY, "--public-n", "40", "--init", str(init), "--epsilon", "5", "--delta", "1e-4", "--out",
                str(out)])
    assert read(out)["before"] == [*vote.cost(voted).values()] and read(out)["epsilon"] <= 5
    for name in ("vae.pt", "ldm.pt"):
        assert files.load(out / "public" / name)["before"] == vote.cost(voted)


def test_the_same_vote_counts_once_and_two_votes_twice(voted, tuned, monkeypatch):
    def one(steps):
        return {"before": {"a": {"private_set": "mnist", "private_n": None, "n": 9, "steps": steps}}}

    known = {"vae.pt": one([[1.0, 9.0, 3]]), "ldm.pt": one([[1.0, 9.0, 1], [1.0, 8.0, 2]])}
    s = settings.parse([*TINY, "--delta", "1e-4", "--out", "none"])
    s.public = "garments"
    votes = start.votes(s, known)
    assert votes["a"]["steps"] == [[1.0, 8.0, 2], [1.0, 9.0, 3]]  # the most that either tells
    s.public = f"garments+voted:{voted}"
    votes = start.votes(s, known)
    assert votes == {**start.votes(type("S", (), {"public": "garments"}), known), **vote.cost(voted)}
    plan, own = guarantee.privacy_plan(s, 100, [*votes.values()]), (0.1, 2)
    rows = [(own[0], plan["sigma"], own[1]), (1.0, 8.0, 2), (1.0, 9.0, 3), (1.0, read(voted)["sigma"], 3)]
    assert accountant.epsilon_of_ledger(rows, 1e-4, "pld") == pytest.approx(plan["epsilon"], rel=1e-9)


@pytest.mark.parametrize("flags", [["--epsilon", "5", "--accountant", "rdp"], ["--sigma", "1"],
                                   ["--epsilon", "inf"], ["--epsilon", "5", "--delta", "5e-4"],
                                   ["--accountant", "rdp", "--steps", "0"]])
def test_plans_include_the_vote_however_they_are_made(voted, flags):  # 38
    s = settings.parse([*TINY, "--delta", "1e-4", "--out", "none", *flags])
    [told] = vote.cost(voted).values()
    plan = guarantee.privacy_plan(s, 100, [told])
    rows = [*told["steps"], (plan["q"], plan["sigma"], plan["steps"])]
    assert accountant.epsilon_of_ledger(rows, s.delta, s.accountant) == pytest.approx(plan["epsilon"])
    assert accountant.epsilon_of_ledger(rows, s.delta, "pld") == pytest.approx(
        plan["numbers"]["epsilon_pld"], rel=1e-6)
    assert plan["epsilon"] <= 5 or flags in (["--sigma", "1"], ["--epsilon", "inf"])


def test_deltas_too_large_for_those_who_voted_and_low_accountants_are_refused(voted, monkeypatch):  # 38
    [told] = vote.cost(voted).values()
    for steps in ("0", "2"):
        s = settings.parse([*TINY, "--steps", steps, "--delta", "6e-3", "--out", "none"])  # < 1/100, > 1/200
        with pytest.raises(ValueError, match="number of images that voted"):
            guarantee.privacy_plan(s, 100, [told])
        monkeypatch.setitem(accountant.ACCOUNTANTS, "mine", lambda kinds, delta: 0.01)
        s = settings.parse([*TINY, "--steps", steps, "--delta", "1e-4", "--out", "none", "--accountant",
                            "mine", "--sigma", "1"])
        with pytest.raises(ValueError, match="it is wrong"):
            guarantee.privacy_plan(s, 100, [told])


def test_a_run_is_resumed_with_its_vote_only(voted, tuned, tmp_path):
    s = settings.parse([*TINY, "--epsilon", "5", "--delta", "1e-4", "--out", str(tmp_path)])
    s.resume = True
    (tmp_path / "internal").mkdir()
    shutil.copy(tuned / "internal" / "plan.json", tmp_path / "internal")
    [told] = vote.cost(voted).values()
    assert guarantee.privacy_plan(s, 100, [told])["sigma"] == read(tuned)["sigma"]
    with pytest.raises(ValueError, match="cannot resume: 'before'"):
        guarantee.privacy_plan(s, 100)
    plan = json.loads((tmp_path / "internal" / "plan.json").read_text())
    del plan["before"]  # of an older version
    (tmp_path / "internal" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(ValueError, match="cannot resume: 'before'"):
        guarantee.privacy_plan(s, 100, [told])


@pytest.mark.parametrize("before", [[1], {"x": 5}, {"x": [5]}, {"x": {"steps": [[1]]}}, "voted",
                                    {"x": {"private_set": "a", "private_n": None, "n": 3, "steps": []}}])
def test_a_damaged_cost_in_a_network_is_one_line(before):
    s = type("S", (), {"public": "garments", "data_root": None})
    with pytest.raises(ValueError, match="public/vae.pt is damaged"):
        start.votes(s, {"vae.pt": {"before": before}})
    with pytest.raises(ValueError, match="does not say what that has cost"):
        start.votes(s, {"vae.pt": {"trained_on": "voted"}})


def test_without_private_steps_the_vote_is_stated(voted, tmp_path):  # 38
    train.main([*TINY, "--public", f"voted:{voted}", "--steps", "0", "--delta", "1e-4", "--out",
                str(tmp_path / "run")])
    privacy = read(tmp_path / "run")
    assert privacy["steps"] == 0 and privacy["private"] and 1.99 < privacy["epsilon"] <= 2
    assert privacy["statement"].startswith("(2, 0.0001)-differentially private")
    card = (tmp_path / "run" / "release" / "MODEL_CARD.md").read_text()
    assert "No private image was read" not in card and "epsilon 2 at delta" in card


@pytest.mark.parametrize("flags, said", [
    (["--epsilon", "1.9"], "vote on the public drawings alone has cost 2"),
    (["--private", "{npz}"], "the public networks know these images"),
    (["--private", "{copy}"], "Say voted:RUN"),
    (["--public", "{npz}"], "Say voted:RUN")])
def test_refused_in_one_line(voted, tmp_path, flags, said):
    shutil.copy(voted / "release" / "drawings.npz", tmp_path / "copy.npz")
    names = {"npz": f"npz:{voted}/release/drawings.npz", "copy": f"npz:{tmp_path}/copy.npz"}
    flags = [flag.format(**names) for flag in flags]
    with pytest.raises(ValueError, match=said):
        train.main([*TINY, "--public", f"voted:{voted}", "--delta", "1e-4", "--out", str(tmp_path / "run"),
                    *flags])


@pytest.mark.parametrize("flags, said", [
    (["--private", "mnist10k", "--per-class", "5"], "--per-class must be from 512"),
    (["--private", "mnist10k", "--generations", "0"], "--generations must be"),
    (["--private", "mnist10k", "--epsilon", "0"], "epsilon = 0"),
    (["--private", "mnist10k", "--delta", "1e-3"], "--delta 0.001 is not below 1/n"),
    (["--private", "nothing"], "unknown data set"),
    (["--private", "garments"], "has no vote"),
    (["--private", "voted:{npz}"], "has no vote"),
    (["--private", "strokes+garments"], "has no vote"),
    (["--private", "mnist10k", "--epsilon", "90000"], "so little noise"),
    (["--private", "{npz}"], "3 classes")])
def test_votes_that_cannot_be(tmp_path, flags, said):
    np.savez(tmp_path / "own.npz", images=np.zeros((99, 28, 28), np.uint8), labels=np.arange(99) % 3,
             class_names=np.array(["a", "b", "c"]))
    flags = [flag.format(npz=f"npz:{tmp_path}/own.npz") for flag in flags]
    with pytest.raises(ValueError, match=said):
        vote.main([*flags, "--out", str(tmp_path / "run")])
    assert not (tmp_path / "run").exists()


def test_classes_vote_on_the_kind_of_their_name():
    names = sorted(garments.CLASSES)
    assert vote.paired(names, garments.CLASSES) == names
    assert vote.paired(names, garments.SHAPES) == [*garments.SHAPES]


def test_an_interrupted_vote_has_spent_its_generations(tmp_path, monkeypatch):  # 37
    honest, calls = dp_sgd.privatise, []

    def privatise(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(vote, "CANDIDATES", 6)
    monkeypatch.setattr(dp_sgd, "privatise", privatise)
    flags = ["--private", "mnist10k", "--private-n", "200", "--per-class", "6", "--delta", "1e-4", "--out",
             str(tmp_path / "run")]
    with pytest.raises(KeyboardInterrupt):
        vote.main(flags)
    assert len(files.read_ledger(tmp_path / "run" / "internal" / "ledger.jsonl").splitlines()) == 2
    with pytest.raises(ValueError, match="already holds a run"):
        vote.main(flags)
