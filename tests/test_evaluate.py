"""evaluate.py: distances against closed forms, honest classifiers, the program on a tiny release."""
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import datasets
import evaluate
import metrics
import sample
import unet
import vae
from datasets import arrays, registry
from extensions import memorisation
from support import files, scored

RECIPE = {"kind": "small-cnn", "epochs": 1, "lr": 2e-3}
TINY = {"n": 40, "steps": 2, "eta": 0.0,
        "recipes": {"cnn": RECIPE, **{kind: {"kind": kind, "epochs": 1, "lr": 1e-3}
                                      for kind in ("mlp", "logreg")}}}


def bars(n, seed=0, size=20):
    """n pictures of four kinds: a bright bar at the top, bottom, left or right, on noise."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 120, (n, 1, size, size), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 4, (n,), generator=generator)
    rows = slice(2, 8), slice(size - 8, size - 2)
    for image, label in zip(images[:, 0], labels.tolist(), strict=True):
        (image if label < 2 else image.T)[rows[label % 2]] += 120
    return images, labels


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder whose release is tiny and knows nothing. Protocols and feature network take seconds."""
    config = {"ch": 8, "ch_mult": (1, 1, 1, 1), "num_groups": 4}
    net = {"in_channels": 4, "out_channels": 4, "model_channels": 32, "channel_mult": (1,),
           "attention_resolutions": (),
           "context_dim": 5}
    torch.manual_seed(0)
    autoencoder = vae.AutoencoderKL(vae.VAEConfig(**config))
    model = unet.LatentModel(unet.UNet(unet.UNetConfig(**net)), unet.ClassEmbedder(10, 5))
    checkpoint = {
        "format": sample.FORMAT, "vae": {"config": config, "state": autoencoder.state_dict()}, "unet": net,
        "embedder": {"kind": "class", "num_classes": 10, "dim": 5},
        "schedule": {"kind": "cosine", "prediction": "v"},
        "model": model.state_dict(), "scale": 1.0, "classes": arrays.DIGITS, "crop": 28,
        "data": {"public": "strokes", "public_classes": "digits", "private": "mnist10k"},
        "privacy": {"epsilon": 10.0, "delta": 1e-5, "statement": "(10, 1e-05)-differentially private"}}
    files.save(checkpoint, tmp_path / "run" / "release" / "model.pt")
    (tmp_path / "run" / "internal").mkdir()
    monkeypatch.setitem(evaluate.PROTOCOLS, "quick", TINY)
    monkeypatch.setattr(metrics, "FEATURES", RECIPE)
    monkeypatch.setattr(metrics, "FEATURE_IMAGES", 72)
    monkeypatch.setenv("DPLDM_DATA", str(tmp_path / "nothing"))
    return tmp_path / "run"


def change_release(run, **entries):
    path = run / "release" / "model.pt"
    checkpoint = files.load(path)
    files.save({**checkpoint, **entries}, path)


def read_result(run):
    return json.loads((run / "internal" / "evaluation.json").read_text())


# ---- Frechet distance, precision and recall against closed forms


def spread(mean, axes, repeats=1):
    """Points with exactly this mean and covariance sum_i axes_i axes_i^T (n - 1 in the denominator)."""
    axes = torch.as_tensor(axes, dtype=torch.float64)
    n = 2 * len(axes) * repeats
    points = torch.cat([axes, -axes]).repeat(repeats, 1) * ((n - 1) / (2 * repeats)) ** 0.5
    return points + torch.as_tensor(mean, dtype=torch.float64)


def test_frechet_of_commuting_gaussians():
    """Diagonal covariances: |mu_a - mu_b|^2 + sum (s_a - s_b)^2."""
    a = spread([1.0, 2.0, 0.0], torch.diag(torch.tensor([1.0, 2.0, 3.0])))
    b = spread([0.0, 2.0, 4.0], torch.diag(torch.tensor([2.0, 2.0, 0.5])), repeats=3)
    assert metrics.frechet(a, b) == pytest.approx(1 + 16 + 1 + 0 + 6.25, rel=1e-10)


def test_frechet_of_general_gaussians():
    """Covariances that do not commute, 2x2: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M)) with M = AB."""
    axes_a, axes_b = torch.tensor([[2.0, 1.0],
                                   [0.0, 1.0]]).double(), torch.tensor([[1.0, -1.0], [0.5, 3.0]]).double()
    cov_a, cov_b = axes_a.T @ axes_a, axes_b.T @ axes_b
    m = cov_a @ cov_b
    expected = 25 + cov_a.trace() + cov_b.trace() - 2 * (m.trace() + 2 * torch.linalg.det(m).sqrt()).sqrt()
    assert metrics.frechet(spread([3, 0], axes_a),
                            spread([0, 4], axes_b)) == pytest.approx(expected.item(), rel=1e-10)


def test_frechet_of_singular_covariances():
    """Two lines at 60 degrees in a space of five dimensions: 1 + 1 - 2 cos(60 degrees) = 1."""
    e = torch.eye(5, dtype=torch.float64)
    a, b = spread(torch.zeros(5), e[:1]), spread(torch.zeros(5), 0.5 * e[:1] + 0.75 ** 0.5 * e[1:2])
    assert metrics.frechet(a, b) == pytest.approx(1.0, abs=1e-7)
    # one dimension
    assert metrics.frechet(spread([0.0], [[2.0]]), spread([0.0], [[5.0]])) == pytest.approx(9.0)


def test_frechet_invariances():
    generator = torch.Generator().manual_seed(0)
    a, b = torch.randn(40, 64, generator=generator), torch.randn(90, 64, generator=generator) * 2 + 1
    value, turn = metrics.frechet(a, b), torch.linalg.qr(torch.randn(64, 64, generator=generator).double()).Q
    assert metrics.frechet(a, a) == pytest.approx(0, abs=1e-6)  # 40 points in 64 dimensions: singular
    assert metrics.frechet(b, a) == pytest.approx(value)
    assert metrics.frechet(a.double() @ turn + 7, b.double() @ turn + 7) == pytest.approx(value)
    assert metrics.frechet(3 * a, 3 * b) == pytest.approx(9 * value)
    with pytest.raises(ValueError, match="2 rows"):
        metrics.frechet(a[:1], b)


def test_precision_and_recall_on_a_line():
    """k = 1. Centres 0, 1, 3 have radii 1, 1, 2: together they cover [-1, 5]."""
    centres = torch.tensor([[0.0], [1.0], [3.0]])
    points = torch.tensor([[-1.5], [-0.5], [2.0], [5.0], [5.1]])
    assert metrics.share_covered(points, centres, k=1) == pytest.approx(3 / 5)
    assert metrics.share_covered(centres, centres, k=1) == 1.0
    with pytest.raises(ValueError, match="more than 3"):
        metrics.share_covered(points, centres)


# ---- classifiers


@pytest.mark.parametrize("kind", ["small-cnn", "paper-cnn", "mlp", "logreg"])
def test_classifiers_learn(kind):
    images, labels = bars(600)
    model = metrics.train_classifier(kind, images, labels, 4, epochs=8, lr=2e-3, anneal=True, progress=False)
    assert metrics.accuracy(model, *bars(200, seed=1)) > 0.95
    assert not model.training
    feature = metrics.features(model, images[:7])
    assert torch.allclose(model[-1](feature.float()), metrics.predict(model, images[:7]), atol=1e-4)


def test_paper_network_is_the_published_one():
    """DPDM: 28 pixels give 1152 features before the linear layers; the authors at 32 pixels: 2048."""
    assert [evaluate.network("paper-cnn", 1, s, 10)[-4].in_features for s in (28, 32)] == [1152, 2048]
    for recipe in evaluate.PROTOCOLS["table"]["recipes"].values():
        assert (recipe["epochs"], recipe["lr"]) == (50, 3e-4) and not recipe.get("augment")
    assert {k: evaluate.PROTOCOLS["table"][k]
            for k in ("n", "steps", "eta")} == {"n": 50_000, "steps": 200, "eta": 1.0}


@pytest.mark.parametrize("kind", evaluate.RESIDUAL)
def test_residual_networks_of_protocol_strict(kind):
    recipe = evaluate.PROTOCOLS["strict"]["recipes"][kind]
    images, labels = bars(8)
    model = metrics.train_classifier(images=images, labels=labels, num_classes=4, progress=False, batch=4,
                                     **{**recipe, "epochs": 1})
    assert metrics.predict(model, images[:2]).shape == (2, 4)
    blocks = [m for m in model.modules() if type(m).__name__ in ("BasicBlock", "Bottleneck")]
    assert len(blocks) == 8 and model.conv1.stride == (1, 1) and not model.training


def test_garments_are_not_shifted_and_turned(run, monkeypatch):
    assert [name for name, entry in datasets.REGISTRY.items() if not entry.augmented] == ["fashion"]
    seen = []
    monkeypatch.setattr(metrics, "train_classifier",
                        lambda augment=False, **rest: seen.append(augment) or torch.nn.Flatten())
    monkeypatch.setattr(metrics, "accuracy", lambda *args: 0.5)
    recipe = {**evaluate.PROTOCOLS["quick"]["recipes"]["cnn"], "augment": True}
    monkeypatch.setitem(evaluate.PROTOCOLS["quick"], "recipes", {"cnn": recipe})
    for augmented in (True, False):
        monkeypatch.setattr(datasets.REGISTRY["mnist10k"], "augmented", augmented)
        evaluate.main([str(run), "--no-distance"])
    assert seen == [True, False]


def test_last_step_is_returned(monkeypatch):
    """Every step's weights are written down: the returned network has the last ones, after all epochs."""
    seen, original = [], torch.optim.Adam.step

    def step(self, *args, **kwargs):
        original(self, *args, **kwargs)
        seen.append([p.detach().clone() for p in self.param_groups[0]["params"]])

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    images, labels = bars(50)
    # A rate this large makes the loss go up and down, so that the best epoch is not the last.
    model = metrics.train_classifier("mlp", images, labels, 4, epochs=6, lr=0.5, batch=20, progress=False)
    assert len(seen) == 6 * 3
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), seen[-1], strict=True))


def test_training_is_reproducible_and_leaves_the_global_generator():
    images, labels = bars(60)

    def train(seed):
        generator = torch.Generator().manual_seed(seed)
        return metrics.train_classifier("small-cnn", images, labels, 4, 1, 1e-3, augment=True,
                                        generator=generator,
                                        progress=False)

    before = torch.get_rng_state()
    first, same, other = (train(seed)[-1].weight for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_random_affine_moves_by_pixels():
    """The centre of ink moves, by at most `shift` pixels. Without shift and rotation nothing moves."""
    x = torch.full((64, 1, 28, 28), -1.0)
    x[:, :, 12:16, 12:16] = 1
    assert torch.allclose(metrics.random_affine(x, shift=0, degrees=0), x, atol=1e-5)
    ink = metrics.random_affine(x, shift=2, degrees=0)[:, 0] + 1
    centre = (ink.sum(1) * torch.arange(28)).sum(1) / ink.sum((1, 2)) - 13.5
    assert 1.5 < centre.abs().max() <= 2.001 and centre.min() < 0 < centre.max()


def test_bad_training_input():
    images, labels = bars(10)
    good = {"kind": "mlp", "images": images, "labels": labels, "num_classes": 4, "epochs": 1, "lr": 1e-3}
    for bad in ({"kind": "forest"}, {"labels": labels + 1}, {"labels": labels[:5]},
                {"kind": "paper-cnn", "images": images[..., :16, :16]}):
        with pytest.raises(ValueError, match="classifier"):
            metrics.train_classifier(**{**good, **bad})


# ---- the program


def test_program_scores_a_release(run, monkeypatch, capsys):
    """End to end. Every training set of the program is recorded: samples or strokes, never a real image."""
    trained, original = [], metrics.train_classifier

    def record(**arguments):
        trained.append((arguments["images"], arguments["labels"]))
        return original(**arguments)

    monkeypatch.setattr(metrics, "train_classifier", record)
    assert evaluate.main([str(run), "--classifiers", "cnn,logreg", "--precision", "float32"]) == 0
    result, text = read_result(run), capsys.readouterr().out
    labels = sample.uniform_labels(40, 10)
    generated = sample.generate(sample.load_release(run), labels, 2, 0.0, 1.0, 0, progress=False)
    strokes = {x.numpy().tobytes() for x in datasets.load("strokes", size=28, public_classes="all",
                                                          n=72).images}
    assert len(trained) == 3 and {x.numpy().tobytes() for x in trained[2][0]} == strokes
    assert all(torch.equal(x, generated) and torch.equal(y, labels) for x, y in trained[:2])
    assert labels.bincount().tolist() == [4] * 10  # uniform, not the private histogram

    assert set(result["accuracy"]) == {"cnn",
                                       "logreg"} and result["held_out"] == {"2,000 held out of "
                                                                            "mnist10k": 2000}
    assert all(0 <= p <= 1 for scores in result["accuracy"].values() for p in scores.values())
    assert result["privacy"]["epsilon"] == 10 and result["privacy"]["delta"] == 1e-5
    assert result["protocol"] == "quick" and result["recipes"]["cnn"] == RECIPE and result["n"] == 40
    distance = result["distance"]
    assert distance["n"] == [40, 2000] and distance["frechet"] > distance["halves"] > 0
    for part in ("protocol quick", "40 samples, DDIM, 2 steps, eta 0, guidance 1, seed 0", "last epoch",
                 "features of a CNN trained on strokes", "2,000 held out of mnist10k",
                 "28 pixels, not resized",
                 "official MNIST test digits skipped"):
        assert part in text
    assert "FID" not in text


def test_official_test_digits_are_used_when_present(run, tmp_path, capsys):
    raw = tmp_path / "root" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    header = np.array([2051, 5, 28, 28], ">u4").tobytes(), np.array([2049, 5], ">u4").tobytes()
    (raw / "t10k-images-idx3-ubyte").write_bytes(header[0] + bytes(5 * 784))
    (raw / "t10k-labels-idx1-ubyte").write_bytes(header[1] + bytes(range(5)))
    out = tmp_path / "scores.json"
    evaluate.main([str(run / "release"), "--classifiers", "logreg", "--no-distance", "--out", str(out),
                   "--data-root", str(tmp_path / "root")])
    result = json.loads(out.read_text())
    assert list(result["held_out"]) == ["2,000 held out of mnist10k", "5 MNIST test digits"]
    assert result["distance"] is None and "skipped" not in capsys.readouterr().out
    assert not (run / "public" / "features.pt").exists()


def test_public_images_of_the_private_classes_take_the_place_of_samples(run, tmp_path, monkeypatch):
    """Labels count in the release's order, whatever their order in the public set is."""
    release = sample.load_release(run)
    drawn = datasets.load("strokes", n=400, public_classes="digits", channels=1)
    release.data["public_classes"] = "digits"
    images, labels = scored.public_images(release, "strokes", 30)
    assert images.shape == (30, 1, 28, 28) and images.dtype == torch.uint8 and len(labels) == 30
    release.classes = release.classes[::-1]
    again, reversed_labels = scored.public_images(release, "strokes", 30)
    assert torch.equal(again, images) and torch.equal(9 - labels, reversed_labels)
    assert not torch.equal(scored.public_images(release, "strokes", 30, seed=1)[0], images)
    # Like the drawings of this class, and unlike those of others.
    means = torch.stack([drawn.images[drawn.labels == c, :, 2:30, 2:30].double().mean(0) for c in range(10)])
    near = torch.cdist(images.double().flatten(1), means.flatten(1)).argmin(1)
    assert (near == labels).double().mean() > 0.6
    release.data["public_classes"] = "all"  # 26 of 36 classes are no private ones
    assert scored.public_images(release, "strokes", 300)[1].unique().tolist() == list(range(10))
    release.data["public_classes"] = "letters"
    with pytest.raises(ValueError, match="no class of strokes has the name of a private one"):
        scored.public_images(release, "strokes", 30)
    evaluate.main([str(run), "--public", "--n", "40", "--classifiers", "logreg", "--no-distance"])
    assert "public images of strokes in place of samples" in read_result(run)["sampler"]


@pytest.mark.parametrize("arguments, message", [
    ("--public --steps 3", "leave out --steps"), ("--public --samples x.npz", "leave out --samples"),
    ("--memorisation --real", "leave out --real"), ("--memorisation --classifiers cnn", "leave out --real"),
    ("--features strokes --no-distance", "leave out --no-distance")])
def test_flags_that_would_have_no_effect_are_refused(arguments, message, run):
    with pytest.raises(ValueError, match=message):
        evaluate.main([str(run), *arguments.split()])


@pytest.mark.parametrize("arguments, message", [
    ([], "is no run folder.*--out"), (["--memorisation"], "--memorisation writes private images"),
    (["--memorisation", "--out", "x.json"], "leave out --out"),
    (["--out", "INSIDE"], "within a release"), (["--out", "DEEPER"], "within a release"),
    (["--out", "PUBLIC"], "beside public networks"),
    (["--out", "FOLDER"], "is a folder")])
@pytest.mark.parametrize("form", ["folder", "release", "model.pt"])
def test_nothing_uncovered_is_written_beside_a_copied_release(form, arguments, message, run, tmp_path,
                                                              monkeypatch):
    """Refused before the long work, and nothing is written."""
    copied = tmp_path / "copied"
    shutil.copytree(run / "release", copied / "release")
    path = {"folder": copied, "release": copied / "release",
            "model.pt": copied / "release" / "model.pt"}[form]
    monkeypatch.setattr(sample, "generate", None)  # would fail with a TypeError if the work began
    monkeypatch.setattr(scored, "held_out_sets", None)
    (run / "public").mkdir(exist_ok=True)
    (run / "public" / "ldm.pt").touch()
    places = {"INSIDE": copied / "release" / "x.json", "DEEPER": copied / "release" / "sub" / "x.json",
              "FOLDER": tmp_path, "PUBLIC": run / "public" / "x.json"}
    arguments = [str(places.get(a, a)) for a in arguments]
    with pytest.raises(ValueError, match=message):
        evaluate.main([str(path), *arguments])
    assert [p.relative_to(copied).as_posix() for p in copied.rglob("*")] == ["release", "release/model.pt"]


def test_a_copied_release_is_scored_elsewhere(run, tmp_path, capsys):
    copied = tmp_path / "copied"
    shutil.copytree(run / "release", copied / "release")
    evaluate.main([str(copied), "--classifiers", "logreg", "--out", str(tmp_path / "scores.json")])
    assert json.loads((tmp_path / "scores.json").read_text())["distance"]  # the feature network is not kept
    assert "not kept" in capsys.readouterr().out
    assert [p.relative_to(copied).as_posix() for p in copied.rglob("*")] == ["release", "release/model.pt"]


def test_a_classifier_of_real_images_gives_the_ceiling_and_judges_the_samples(run, tmp_path, monkeypatch,
                                                                              capsys):
    real = datasets.load("mnist10k", "train", size=28, n=1500)
    swapped = real.labels.clone()
    swapped[real.labels == 1], swapped[real.labels == 2] = 2, 1
    np.savez(tmp_path / "s.npz", images=real.images[:, 0].numpy(), labels=swapped.numpy().astype(np.uint8))
    monkeypatch.setattr(scored, "load_private", lambda release, private, split, root=None, n=None, cache=None:
                        real if split == "train" else datasets.load(private, split, root, 28))
    monkeypatch.setitem(evaluate.PROTOCOLS["quick"], "recipes", {"logreg": {"kind": "logreg",
                                                                            **evaluate.SIMPLE}})
    monkeypatch.setattr(metrics, "FEATURE_IMAGES", 200)
    evaluate.main([str(run), "--samples", str(tmp_path / "s.npz"), "--classifiers", "logreg", "--real",
                   "--features", "garments"])
    result, out = read_result(run), capsys.readouterr().out
    ceiling = next(iter(result["real"]["accuracy"].values()))
    assert ceiling > 0.8 > next(iter(result["accuracy"]["logreg"].values()))
    taken = result["real"]["samples"]
    assert taken["5"] > 0.8 and max(taken["1"], taken["2"]) < 0.2 and "on 1,500 real images" in out
    assert "garments" in result["distance"]["features"] and "not kept" in out
    assert "private training images" in result["note"] and "only if the private images" in out
    with pytest.raises(ValueError, match="--features: 'celeba' is none of"):
        evaluate.main([str(run), "--features", "celeba"])
    with pytest.raises(ValueError, match="--features mnist: the feature network would learn private images"):
        evaluate.main([str(run), "--features", "mnist"])


def test_the_ceiling_learns_as_many_private_images_as_the_run(run, monkeypatch):
    asked = []

    def load(release, private, split, root=None, n=None, cache=None):
        asked.append((split, n))
        return datasets.load(private, split, root, 28, n=n)

    monkeypatch.setattr(scored, "load_private", load)
    files.write_json({"private_n": 120}, run / "internal" / "settings.json")
    evaluate.main([str(run), "--classifiers", "logreg", "--real", "--no-distance"])
    assert ("train", 120) in asked and read_result(run)["real"]["n"] == 120


def test_samples_file_replaces_sampling(run, tmp_path):
    real = datasets.load("mnist10k", "train", size=28, n=30)
    np.savez(tmp_path / "s.npz", images=real.images[:, 0].numpy(),
             labels=real.labels.numpy().astype(np.uint8))
    common = ["--samples", str(tmp_path / "s.npz"), "--classifiers", "logreg", "--no-distance"]
    evaluate.main([str(run), *common])
    assert read_result(run)["n"] == 30
    evaluate.main([str(run), *common, "--n", "25"])
    result = read_result(run)
    assert result["n"] == 25 and "s.npz" in result["sampler"]


def test_feature_network_is_kept_and_replaced_if_damaged(run, monkeypatch, capsys):
    def get(**changes):
        arguments = {"run": run, "public": "strokes", "channels": 1, "size": 28, **changes}
        _, name = metrics.feature_network(**arguments, progress=False)
        return name, "learns" in capsys.readouterr().out

    path = run / "public" / "features.pt"
    name, learned = get()
    assert learned and "36 classes" in name and "strokes" in name
    assert get() == (name, False)  # read back, the same weights
    content = path.read_bytes()
    for damage in (content[:200], b"not a checkpoint"):
        path.write_bytes(damage)
        assert get() == (name, True)  # trained anew, from the same seed
    files.save({"settings": 0}, path)
    assert get() == (name, True)
    monkeypatch.setattr(metrics, "FEATURE_IMAGES", 36)
    assert get()[1] and get(size=32)[1]  # other settings


def test_a_run_folder_may_be_called_release(run):
    renamed = run.rename(run.parent / "release")
    assert scored.find_run(renamed) == (renamed.resolve(), True)
    assert scored.find_run(renamed / "release") == (renamed.resolve(), True)


def test_missing_public_set_costs_only_the_distance(run, monkeypatch, capsys):
    original = datasets.load

    def load(name, *args, **kwargs):
        if name == "emnist":
            raise datasets.DataError("no emnist here")
        return original(name, *args, **kwargs)

    monkeypatch.setattr(datasets, "load", load)
    change_release(run, data={"public": "emnist", "private": "mnist10k"})
    evaluate.main([str(run), "--classifiers", "logreg"])
    assert "skipped: no emnist here" in capsys.readouterr().out
    assert read_result(run)["distance"] is None and read_result(run)["accuracy"]["logreg"]


def test_a_drawn_private_set_that_forgets_the_split_is_refused(run, tmp_path, monkeypatch):
    def dots(ask):  # the same images for "train" and "test"
        generator = torch.Generator().manual_seed(0)
        return datasets.ImageSet(torch.randint(256, (40, 1, 28, 28), dtype=torch.uint8, generator=generator),
                                 torch.arange(40) % 2, ["a", "b"])

    entry = registry.DataSet("dots", dots, "dots", role="private", classes=("a", "b"), n=40, drawn=True)
    monkeypatch.setitem(datasets.REGISTRY, "dots", entry)
    release = sample.load_release(run)
    release.privacy["steps"] = 3
    trained = datasets.load("dots", "train", None, release.vae.config.resolution)
    (tmp_path / "internal").mkdir()
    files.save({"digests": datasets.digests(trained.images)}, tmp_path / "internal" / "digests.pt")
    with pytest.raises(ValueError, match="dots: 40 of the images that would be held out"):
        scored.check_held_out(tmp_path, release, "dots")


@pytest.mark.parametrize("private", [True, False])
def test_a_feature_network_learns_no_private_image(private, run, monkeypatch, capsys):
    """Since the run, somebody may have put private images into the public set."""
    strokes = datasets.load("strokes", "train", None, sample.load_release(run).vae.config.resolution,
                            n=metrics.FEATURE_IMAGES)
    (run / "internal").mkdir(exist_ok=True)
    seen = datasets.digests(strokes.images[-1:] if private else 255 - strokes.images[-1:])
    files.save({"digests": seen}, run / "internal" / "digests.pt")
    (run / "public" / "features.pt").unlink(missing_ok=True)
    for name in ("evaluate", "memorisation"):
        if name == "evaluate":
            evaluate.main([str(run), "--classifiers", "logreg", "--n", "50"])
        else:  # the other way to the same network
            monkeypatch.setattr(memorisation, "save_neighbours", lambda *args: None)
            release = sample.load_release(run)
            release.privacy["steps"] = 1
            files.write_json({"private_n": None}, run / "internal" / "settings.json")
            args = SimpleNamespace(data_root=None, features=None, device="cpu", seed=0)
            real = scored.load_private(release, "mnist10k", "test")[:20]
            memorisation.report(args, release, run, "strokes", "mnist10k", real,
                                lambda real=real: real.images)
        assert ("has private images of this run" in capsys.readouterr().out) == private, name
        assert (run / "public" / "features.pt").exists() != private
        (run / "public" / "features.pt").unlink(missing_ok=True)


def test_a_public_set_of_another_size_is_cut_as_samples_are(run, monkeypatch, tmp_path):
    """Digits of 16 pixels, padded to 32 and cut again: strokes of 28 pixels take the same way."""
    judge, _ = metrics.feature_network(None, "strokes", 1, 16, frame=(32, 16), progress=False)
    assert metrics.features(judge, torch.zeros(2, 1, 16, 16, dtype=torch.uint8)).shape[0] == 2
    (_, same), (_, before) = (metrics.feature_network(None, "strokes", 1, 28, progress=False, **frame)
                              for frame in ({"frame": (32, 28)}, {}))
    assert same == before
    np.savez(tmp_path / "wide.npz", images=np.zeros((72, 64, 64), np.uint8), labels=np.arange(72) % 2)
    large = f"npz:{tmp_path / 'wide.npz'}"
    evaluate.main([str(run), "--classifiers", "logreg", "--features", large])  # too large, which is said
    assert read_result(run)["distance"] is None and read_result(run)["accuracy"]["logreg"]


def test_a_set_of_ones_own_may_teach_the_feature_network(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (90, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(90) % 3)
    evaluate.main([str(run), "--classifiers", "logreg", "--features", f"npz:{tmp_path / 'own.npz'}"])
    assert "npz (3 classes" in read_result(run)["distance"]["features"]
    with pytest.raises(ValueError, match="unknown data set 'npz'"):
        evaluate.main([str(run), "--features", "npz"])


def test_the_ceiling_of_a_copied_release_learns_as_many_images_as_the_run_had(run, tmp_path, monkeypatch):
    asked = []

    def watched(release, private, split, root=None, n=None, cache=None):
        asked.append((split, n))
        return datasets.load(private, split, root, 28, n=n)

    monkeypatch.setattr(scored, "load_private", watched)
    release = files.load(run / "release" / "model.pt")
    change_release(run, privacy={**release["privacy"], "n": 300})
    shutil.copytree(run / "release", tmp_path / "copy")
    evaluate.main([str(tmp_path / "copy"), "--classifiers", "logreg", "--real", "--no-distance", "--out",
                   str(tmp_path / "s.json")])
    assert ("train", 300) in asked and json.loads((tmp_path / "s.json").read_text())["real"]["n"] == 300


@pytest.mark.parametrize("public", ["folder", "strokes+folder"])
def test_a_copied_release_needs_the_place_of_private_images_only(public, run, tmp_path, capsys):
    change_release(run, data={"public": public, "private": "mnist10k"})
    shutil.copytree(run / "release", tmp_path / "copy")
    evaluate.main([str(tmp_path / "copy"), "--classifiers", "logreg", "--out", str(tmp_path / "s.json")])
    assert json.loads((tmp_path / "s.json").read_text())["distance"] is None
    assert "skipped: a release does not say where its own public images lie" in capsys.readouterr().out
    change_release(run, data={"public": "strokes", "private": "folder"})
    shutil.copy(run / "release" / "model.pt", tmp_path / "copy" / "model.pt")
    with pytest.raises(ValueError, match="does not say where own images lie"):
        evaluate.main([str(tmp_path / "copy"), "--classifiers", "logreg", "--out", str(tmp_path / "s.json")])


def test_what_cannot_be_scored_is_said_before_the_long_work(run, monkeypatch, tmp_path):
    monkeypatch.setattr(sample, "generate", None)
    monkeypatch.setitem(TINY["recipes"], "cnn", {**RECIPE, "kind": "paper-cnn"})
    change_release(run, crop=16)
    monkeypatch.setattr(scored, "held_out_sets", lambda *a: {"none": datasets.load("mnist10k", n=5)})
    with pytest.raises(ValueError, match="no classifier 'paper-cnn' for images of 16 pixels"):
        evaluate.main([str(run)])
    np.savez(tmp_path / "p.npz", images=np.zeros((20, 16, 16), np.uint8), prompts=np.array(["a"] * 20))
    with pytest.raises(ValueError, match=r"^\S*p\.npz has no array labels; samples of --prompt.*class$"):
        evaluate.main([str(run), "--classifiers", "logreg", "--samples", str(tmp_path / "p.npz")])


def test_few_samples_and_one_class_cost_only_what_they_cannot_tell(run, tmp_path, monkeypatch, capsys):
    np.savez(tmp_path / "s.npz", images=np.zeros((3, 28, 28), np.uint8), labels=np.zeros(3, np.uint8))
    evaluate.main([str(run), "--classifiers", "logreg", "--samples", str(tmp_path / "s.npz")])
    assert "3 samples and" in capsys.readouterr().out and read_result(run)["distance"] is None
    monkeypatch.setattr(scored, "held_out_sets", lambda *a: {"none": datasets.load("mnist10k", size=28, n=5)})
    change_release(run, classes=["picture"])
    evaluate.main([str(run), "--classifiers", "logreg", "--no-distance"])
    assert read_result(run)["accuracy"] == {}, "100 % of one class would say nothing"
    out = capsys.readouterr().out
    assert "note: samples without labels, or of one class," in out and "trained on samples only" not in out


def test_decoded_private_photographs_stay_in_the_cache_of_the_run(run, monkeypatch):
    place = str(run / "elsewhere")
    files.write_json({"cache": place, "private_n": None}, run / "internal" / "settings.json")
    load, asked = datasets.load, []
    monkeypatch.setattr(datasets, "load", lambda name, *a, **k: asked.append((name, k.get("cache")))
                        or load(name, *a, **k))
    evaluate.main([str(run), "--classifiers", "logreg", "--real", "--no-distance"])
    assert [cache for name, cache in asked if name == "mnist10k"] == [place] * 2
    # Without --cache they lie beside the run's data root, if that may be written to.
    for root, cache in ((str(run), run / "cache"), (str(run / "none"), None), (None, None)):
        files.write_json({"cache": None, "data_root": root}, run / "internal" / "settings.json")
        assert scored.cache_of(run) == cache
    files.write_json({"cache": "elsewhere", "data_root": "x"}, run / "internal" / "settings.json")  # where?
    assert scored.cache_of(run) is None


def test_public_images_of_a_sorted_folder_are_of_all_its_classes(run, tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (600, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(600) // 60, class_names=list("0123456789"))
    release, name = sample.load_release(run), f"npz:{tmp_path / 'own.npz'}"
    labels = scored.public_images(release, name, 100)[1]
    assert len(labels) == 100 and labels.unique().tolist() == list(range(10))
    assert not torch.equal(scored.public_images(release, name, 100, seed=1)[1], labels)


def test_a_report_is_printed_even_if_it_cannot_be_written(run, monkeypatch, capsys):
    def full(*args):
        raise ValueError("no room")

    monkeypatch.setattr(files, "write_json", full)
    with pytest.raises(ValueError, match="no room"):
        evaluate.main([str(run), "--classifiers", "logreg", "--no-distance"])
    assert "trained on samples only" in capsys.readouterr().out


def test_memorisation_needs_no_settings_to_know_how_many_images_there_were(run, tmp_path):
    release = sample.load_release(run)
    release.privacy["n"] = 12
    assert scored.private_n(release, run) == 12
    files.write_json({"private_n": None}, run / "internal" / "settings.json")
    assert scored.private_n(release, run) is None  # the run folder says: all
    release.privacy["n"] = 0  # --steps 0: none was read
    assert scored.private_n(release, run / "elsewhere") is None


def test_bad_input_is_one_line(run, tmp_path):
    np.savez(tmp_path / "small.npz", images=np.zeros((20, 8, 8), np.uint8), labels=np.zeros(20, np.uint8))
    for arguments, message in [
        (["--classifiers", "cnn,forest"], "forest"), (["--n", "9"], "--n"), (["--n", "0"], "--n"),
        (["--steps", "0"], "steps"), (["--eta", "2"], "eta"), (["--guidance", "2"], "guidance"),
        (["--samples", str(tmp_path / "none.npz")], "none.npz"),
        (["--samples", str(tmp_path / "small.npz")], "small.npz"),
        (["--samples", "x.npz", "--steps", "3"], "--samples"),
    ]:
        with pytest.raises(ValueError, match=message) as caught:
            evaluate.main([str(run), *arguments])
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nowhere"):
        evaluate.main([str(tmp_path / "nowhere")])
    change_release(run, data={"public": "strokes", "private": "mnist10k"}, classes=arrays.LETTERS[:10])
    with pytest.raises(ValueError, match="classes"):
        evaluate.main([str(run)])
