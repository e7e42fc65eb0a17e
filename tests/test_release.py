"""release/ is clean: no private pixel, latent, loss, norm, path or name. Its card says what it promises."""
import json
import re
import zlib

import pytest
import torch
import torchvision

import accountant
import datasets
import sample
import train
import vae
from datasets import arrays, pixels
from extensions import pld
from support import checkpoints, files, guarantee, release, settings
from support.rounding import round_up

TINY = ["--preset", "smoke", "--public-n", "40", "--private-n", "100", "--vae-steps", "2", "--ldm-steps", "2",
        "--vae-batch",
        "8", "--ldm-batch", "8", "--batch-size", "10", "--steps", "2", "--accountant", "rdp",
        "--sample-steps", "1",
        "--precision", "float32", "--micro-batch", "32", "--watch", "1"]
FILES = {"model.pt", "privacy.json", "samples.png", "comparison.png", "progress.png", "MODEL_CARD.md"}
MODEL_KEYS = {"format", "vae", "scale", "unet", "shift", "embedder", "schedule", "classes", "crop", "prompts",
              "data", "privacy", "model"}
MARKER = "marker-of-a-private-path"
ASKED = []  # the labels of all images that the run drew


def marked_pictures():
    """100 private images that no network draws by chance: checkerboards of two grey levels, all different."""
    y, x = torch.meshgrid(torch.arange(28), torch.arange(28), indexing="ij")
    grey = torch.stack([40 + torch.arange(100), 255 - torch.arange(100)], 1)  # (100, 2)
    return grey[:, (x + y) % 2].to(torch.uint8)[:, None]  # (100, 1, 28, 28)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the marked pictures below a marked path, by a user with a marked name."""
    place = tmp_path_factory.mktemp(MARKER) / "run"
    with pytest.MonkeyPatch.context() as patch:
        for name in ("USER", "LOGNAME", "HOSTNAME", "DPLDM_DATA"):
            patch.setenv(name, MARKER)
        labels = torch.where(torch.arange(100) < 60, 3, torch.arange(100) % 10)  # most are threes
        marked = datasets.ImageSet(marked_pictures(), labels, arrays.DIGITS)
        honest = sample.generate

        def generate(release, labels, *args, **named):
            ASKED.append([int(label) for label in labels])
            return honest(release, labels, *args, **named)

        patch.setattr(sample, "generate", generate)
        patch.setattr(datasets.REGISTRY["mnist10k"], "load", lambda ask: marked)
        train.main([*TINY, "--data-root", str(place / MARKER), "--out", str(place)])
    return place


def tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors(part)


def tiles(path, columns):
    """Pictures (N, 28, 28) of a grid as pixels.save_grid draws it."""
    image = torchvision.io.read_image(str(path), torchvision.io.ImageReadMode.GRAY)[0]
    enlarge = max(1, min(3, 900 // (columns * 28)))
    side = 29 * enlarge
    return torch.stack([image[y + enlarge:y + side:enlarge, x + enlarge:x + side:enlarge]
                        for y in range(0, image.shape[0] - side + 1, side)
                        for x in range(0, image.shape[1] - side + 1, side)])


def test_nothing_but_the_documented_files(run):
    assert {path.name for path in (run / "release").iterdir()} == FILES
    model = files.load(run / "release" / "model.pt")
    assert model.keys() == MODEL_KEYS and model["vae"].keys() == {"config", "state"}
    networks = (
        checkpoints.build_model(model)[0].state_dict(),
        checkpoints.build_vae(model["vae"]).state_dict(),
    )
    assert (model["model"].keys(), model["vae"]["state"].keys()) == tuple(network.keys()
                                                                          for network in networks)


def test_the_pictures_show_each_class_equally_often_whatever_the_private_labels(run):
    assert len(ASKED) == 5  # --watch three times, after and before tuning
    assert all(labels.count(c) == len(labels) / 10 for labels in ASKED for c in range(10))


def test_no_private_picture_in_the_pictures(run):
    private = marked_pictures()[:, 0].float()
    for name, columns, n in (("samples.png", 10, 100), ("comparison.png", 18, 100), ("progress.png", 10, 30)):
        shown = tiles(run / "release" / name, columns).float()
        assert len(shown) >= n and shown.std() > 0
        distance = (shown.flatten(1)[:, None] - private.flatten(1)).abs().mean(2)  # (tiles, private pictures)
        assert distance.min() > 20, name
    found = tiles(run / "release" / "samples.png", 10)  # the ruler itself: it finds a picture that is there
    pixels.save_grid(torch.cat([found[:30, None], marked_pictures()[7:8]]), run.parent / "with.png", 10)
    planted = tiles(run.parent / "with.png", 10).float().flatten(1)[:, None]
    assert (planted - private.flatten(1)).abs().mean(2).min() == 0


def test_no_pixel_row_and_no_latent_in_any_file(run):
    pictures = marked_pictures()
    stage_1 = files.load(run / "public" / "vae.pt")
    autoencoder, scale = checkpoints.build_vae(stage_1), stage_1["scale"]
    with torch.no_grad():
        latents = autoencoder.encode(pixels.to_float(pixels.pad(pictures, 32))).mean * scale  # (100, 4, 4, 4)
    for path in (run / "release").iterdir():
        raw = path.read_bytes()
        assert not any(picture[0, row].numpy().tobytes() in raw for picture in pictures
                       for row in (0, 1)), path.name
        assert not any(latent.numpy().tobytes()[:16] in raw for latent in latents), path.name
    for tensor in tensors(files.load(run / "release" / "model.pt")):
        for shape in (latents.shape, latents[0].shape, pictures.shape, pictures[0].shape):
            assert tensor.shape != shape


def test_no_path_no_name_no_loss_in_any_byte(run):
    log = [json.loads(line) for line in (run / "internal" / "log.jsonl").read_text().splitlines()]
    figures = [row["loss"] for row in log] + [norm for row in log for norm in row["norm_quantiles"]]
    words = [MARKER, str(run), str(run.parent), "norm_quantiles", "clipped_fraction", "private_pictures",
             "data_root"]
    for path in (run / "release").iterdir():
        raw = path.read_bytes()
        for word in (*words, *map(repr, figures)):
            assert word.encode() not in raw, (path.name, word)
        assert not re.search(rb"/(home|root|tmp|Users|var|usr|mnt|work)/", raw), path.name
    numbers = re.findall(r"-?\d+\.\d+(?:e-?\d+)?", (run / "release" / "privacy.json").read_text())
    assert not set(map(float, numbers)) & set(figures)
    assert len(figures) == 12 and all(f > 0 for f in figures)


def test_png_files_hold_pixels_only(run):
    for path in (run / "release").glob("*.png"):
        raw, kinds, at = path.read_bytes(), [], 8
        while at < len(raw):
            length, kind = int.from_bytes(raw[at:at + 4], "big"), raw[at + 4:at + 8]
            assert zlib.crc32(raw[at + 4:at + 8
                                  + length]) == int.from_bytes(raw[at + 8 + length:at + 12 + length], "big")
            kinds.append(kind)
            at += 12 + length
        assert set(kinds) == {b"IHDR", b"IDAT", b"IEND"}  # no text, no time, no EXIF


def test_the_privacy_statement_is_complete(run):
    privacy = files.read_json(run / "release" / "privacy.json")
    spent = (0.1, privacy["sigma"], 2)
    assert privacy["epsilon"] == privacy["epsilon_rdp"] == accountant.epsilon(*spent, 1e-5) <= 10
    assert privacy["epsilon_pld"] == accountant.epsilon(*spent, 1e-5, "pld") < privacy["epsilon_rdp"]
    group = privacy["epsilon_for_20_pictures_of_one_person"]
    assert float(group) == pld.group_epsilon(20, *spent, 1e-5) > privacy["epsilon"]
    assert privacy["attacker_true_positive_rates"] == dict(
        zip(("0.001", "0.01", "0.1"), pld.attacker_tpr(*spent, (0.001, 0.01, 0.1)).tolist(), strict=True))
    assert privacy["adjacency"] == "add or remove one image" and privacy["unit"] == "one image"
    assert (privacy["n"], privacy["q"], privacy["steps"], privacy["expected_batch_size"]) == (100, 0.1, 2, 10)
    text = " ".join(privacy["does_not_cover"])
    for word in ("number n", "hyper-parameters", "other runs", "add up", "internal/", "one person"):
        assert word in text
    assert files.load(run / "release" / "model.pt")["privacy"] == privacy


def test_no_printed_epsilon_is_below_the_true_one(run, capsys):
    """epsilon 2.00001: rounded to the nearest, four digits would be understated."""
    from types import SimpleNamespace
    s = SimpleNamespace(**vars(settings.parse([*TINY, "--sigma", "1"])))
    plan = {"n": 100, "q": 0.1, "sigma": 1.0, "steps": 2, "epsilon": 2.00001, "delta": 1e-5, "before": [],
            "numbers": {"epsilon_rdp": 2.00001, "epsilon_pld": 2.00001, guarantee.GROUP: 30.00001,
                        guarantee.ATTACKER: {
                "0.001": 0.2, "0.01": 0.3, "0.1": 0.4}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(guarantee, "privacy_numbers", lambda reach, rows, delta: plan["numbers"])
        privacy = guarantee.privacy_statement(s, plan, [{}, {}], 7)
    assert privacy["statement"].startswith("(2.001, 1e-05)-")
    card = release.model_card(privacy, ["a", "b"], "run")
    assert "epsilon 2.001 at" in card and "30.01" in card
    guarantee.print_plan(s, plan, checkpoints.build_model(files.load(run / "release" / "model.pt"))[0])
    assert "epsilon 2.001 at" in capsys.readouterr().out


def test_the_statement_keeps_the_plans_numbers_and_never_lowers_one():
    # another machine's rounding
    assert guarantee.settled(2.0, 2.0 + 1e-7) == 2.0 and guarantee.settled(2.0, 2.0 - 1e-7) == 2.0
    assert guarantee.settled(2.0, 2.1) == 2.1 and guarantee.settled(2.0, 1.9) == 2.0
    assert guarantee.settled({"a": 1.0, "b": float("inf")},
                             {"a": 3.0, "b": float("inf")}) == {"a": 3.0, "b": float("inf")}


def test_the_card_says_what_the_statement_says(run, monkeypatch):
    card, privacy = (
        (run / "release" / "MODEL_CARD.md").read_text(),
        files.read_json(run / "release" / "privacy.json"),
    )
    assert "![samples](samples.png)" in card and privacy["statement"] in card and "at most" in card
    for item in (*privacy["does_not_cover"], privacy["adjacency"], privacy["unit"],
                 round_up(privacy["epsilon"]),
                 round_up(float(privacy["epsilon_for_20_pictures_of_one_person"]))):
        assert item in card
    assert not re.search(r"\b(nan|None|True|False)\b", card)
    shown = [float(x) for x in re.findall(r"^\| [\d.]+% \| ([\d.]+) % \|$", card, re.MULTILINE)]
    rates = [100 * rate for rate in privacy["attacker_true_positive_rates"].values()]
    assert len(shown) == 3 and all(rate <= s <= rate + 0.0101 for s, rate in zip(shown, rates, strict=True))


@pytest.mark.parametrize("change, said, unsaid", [
    ({"private": False, "epsilon": "inf", "statement": "NOT PRIVATE: no noise"}, "Do not publish it",
     "An attacker who"),
    ({"steps": 0, "n": 0}, "No private image was read", "An attacker who"),
    ({"epsilon_for_20_pictures_of_one_person": "inf"}, "epsilon is\ninf", "Do not publish")])
def test_the_card_of_other_runs(run, change, said, unsaid):
    privacy = files.read_json(run / "release" / "privacy.json") | change
    card = release.model_card(privacy, ["a", "b"], "run")
    assert said in card and unsaid not in card


def test_public_files_do_not_depend_on_the_private_pictures(run, tmp_path):
    """The scale of the latents above all (pitfall 13): found on public pictures."""
    first = files.load(run / "public" / "vae.pt")
    model = checkpoints.build_vae(first)
    public = datasets.load("strokes", n=40, seed=0, size=32, channels=1, public_classes="all").images
    assert first["scale"] == pytest.approx(float(vae.latent_scale(model, pixels.to_float(public))), rel=1e-5)
