"""Drawn portraits, and mixes of public sets: format, determinism, what each attribute changes. About 10 s."""

import numpy as np
import pytest
import torch

import datasets
from datasets import photos, portraits
from extensions import captions

N = 24


def draw(size=32, seed=0, **changed):
    """The same N adults, light-haired and bare-faced, with some attributes changed for all of them."""
    has = dict.fromkeys(portraits.ATTRIBUTES, torch.zeros(N).bool())
    has |= {name: torch.ones(N).bool() for name in ("Male", "Young", "No_Beard", "Blond_Hair")}
    has |= {name: torch.full((N,), value) for name, value in changed.items()}
    return portraits.draw(has, torch.Generator().manual_seed(seed), size).float()


@pytest.mark.parametrize("size", [32, 64, 100, 128])
def test_shape_type_and_range_at_any_size(size):
    generator = torch.Generator().manual_seed(1)
    images = portraits.draw(portraits.people(20, generator), generator, size)
    assert images.shape == (20, 3, size, size) and images.dtype == torch.uint8
    assert len(images.unique()) > 200, "many tones"
    assert (images.flatten(1).float().std(1) > 8).all(), "no image is empty"
    assert len(images.flatten(1).unique(dim=0)) == 20


def test_same_seed_same_images_and_global_random_state_plays_no_part():
    state = torch.random.get_rng_state()
    first, again, other = draw(seed=5), draw(seed=5), draw(seed=6)
    assert torch.equal(state, torch.random.get_rng_state()), "nothing was drawn from it"
    assert torch.equal(first, again)
    assert (first != other).flatten(1).any(1).all()
    assert portraits.draw({name: torch.zeros(0) for name in portraits.ATTRIBUTES}).shape == (0, 3, 32, 32)


def test_a_batch_may_be_cut_anywhere():
    """The memory of a batch is bounded; its images are made in parts, whose seam leaves no mark."""
    n = portraits.BATCH + 1
    images = portraits.draw(portraits.people(n), torch.Generator().manual_seed(0))
    assert images.shape[0] == n and (images[-1] != images[0]).any()


def test_portraits_of_another_size_show_the_same_people():
    small, large = draw(32), draw(64)
    shrunk = datasets.pixels.resize(large.to(torch.uint8), 32).float()
    same = (shrunk - small).abs().mean((1, 2, 3))
    others = (shrunk - small.roll(1, 0)).abs().mean((1, 2, 3))
    assert (same < others).double().mean() > 0.9 and same.mean() < 0.5 * others.mean()


# Where an attribute is seen: rows from..to (of 1, the top at 0) that hold most of what it changes.
PLACES = {
    "Eyeglasses": (0.25, 0.65), "Bushy_Eyebrows": (0.1, 0.55), "Bangs": (0.0, 0.5),
    "Receding_Hairline": (0.0, 0.4), "Smiling": (0.3, 1.0),
    "Mouth_Slightly_Open": (0.6, 1.0), "Wearing_Hat": (0.0, 0.55)}


@pytest.mark.parametrize("name", PLACES)
def test_an_attribute_changes_the_picture_where_it_is_worn(name):
    changed = (draw(64, **{name: True}) - draw(64)).abs().mean(1)  # (N,64,64)
    rows = changed.mean((0, 2))
    low, high = (round(64 * share) for share in PLACES[name])
    assert rows[low:high].sum() > 0.75 * rows.sum(), (name, rows)
    assert (changed.amax((1, 2)) > 15).double().mean() > 0.75, "and in most pictures"


@pytest.mark.parametrize("name", ["Mustache", "Goatee"])
def test_beards_grow_on_the_lower_face(name):
    changed = (draw(64, **{name: True, "No_Beard": False}) - draw(64)).abs().mean((0, 1, 3))
    assert changed[35:].sum() > 0.9 * changed.sum()


@pytest.mark.parametrize("name", sorted(set(portraits.ATTRIBUTES) - {"No_Beard"}))
def test_every_attribute_is_seen(name):
    """Either way, in most pictures; lipstick and earrings are drawn for women as for men."""
    absent, present = draw(64, **{name: False}), draw(64, **{name: True})
    assert ((absent - present).abs().amax((1, 2, 3)) > 8).double().mean() > 0.8, "some pictures are dark"


def test_hair_has_the_colour_that_is_said():
    """At the top, black is darker than brown, brown than blond; gray has least colour. Of the same people."""
    hair = {name: draw(32, **({"Blond_Hair": False} | {name: True}))[:, :, :3, 8:24].mean((2, 3))
            for name in ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair")}
    value = {name: colour.mean().item() for name, colour in hair.items()}
    assert value["Black_Hair"] < value["Brown_Hair"] < value["Blond_Hair"]
    chroma = {name: (colour[:, 0] - colour[:, 2]).mean().item() for name, colour in hair.items()}
    assert chroma["Gray_Hair"] < chroma["Blond_Hair"] - 10


def test_pale_skin_is_lighter_and_skins_differ():
    cheeks = {pale: draw(64, Pale_Skin=pale)[:, :, 32:44, 26:38].mean((1, 2, 3)) for pale in (False, True)}
    assert cheeks[True].mean() > 1.2 * cheeks[False].mean()
    assert cheeks[False].std() > 15, "from light to dark"


def test_people_are_diverse_and_their_attributes_agree():
    has = portraits.people(4000, torch.Generator().manual_seed(0))
    assert tuple(has) == portraits.ATTRIBUTES and all(column.dtype == torch.bool for column in has.values())
    share = {name: column.double().mean().item() for name, column in has.items()}
    assert 0.45 < share["Male"] < 0.55 and 0.45 < share["Smiling"] < 0.55
    assert all(0.01 < share[name] < 0.99 for name in portraits.ATTRIBUTES), share
    colours = ("Black_Hair", "Brown_Hair", "Blond_Hair", "Gray_Hair", "Bald")
    assert torch.stack([has[name] for name in colours]).sum(0).max() == 1
    assert not (has["Mustache"] & has["No_Beard"]).any() and not (has["Goatee"] & has["No_Beard"]).any()
    assert not (~has["No_Beard"] & ~has["Male"]).any() and not (has["Child"] & has["Senior"]).any()
    assert not (has["Senior"] & has["Young"]).any() and (has["Young"] | ~has["Child"]).all()


def test_no_turban_hides_what_the_attributes_say():
    has = {name: torch.zeros(400, 1) for name in portraits.ATTRIBUTES}
    has["Male"] += 1
    hidden = portraits.Portrait(has, torch.Generator().manual_seed(0), 8).turban
    assert 0.4 < hidden.mean() < 0.7, "nothing is said of this hair"
    has["Receding_Hairline"] += 1
    assert not portraits.Portrait(has, torch.Generator().manual_seed(0), 8).turban.any()


def test_missing_attributes_are_refused():
    with pytest.raises(ValueError, match="lack Bald"):
        portraits.draw({})


# ---- as a data set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("attribute", ["Male", "Young", "Smiling", "Eyeglasses"])
def test_classes_and_attributes_have_celebas_form(attribute):
    found = datasets.load("portraits", n=12, size=32, label_attribute=attribute, seed=3)
    assert found.classes == photos.attribute_classes(attribute, found.attributes, "")
    assert torch.equal(found.labels, found.attributes[attribute].long()) and found.labels.dtype == torch.int64
    assert all(column.shape == (12,) and column.dtype == torch.bool for column in found.attributes.values())
    described = datasets.describe("portraits", label_attribute=attribute)
    assert described.classes == found.classes and list(described.attributes) == list(found.attributes)
    known = set().union(*captions.SLOTS) | {"Male", "Child"}
    assert set(found.attributes) <= known, "the grammar has words for all of them"


def test_size_channels_and_unknown_attributes():
    found = datasets.load("portraits", n=3, size=64)
    assert found.images.shape == (3, 3, 64, 64) and found.side == 64
    assert datasets.load("portraits", n=3, size=32, channels=1).images.shape == (3, 1, 32, 32)
    assert not datasets.enlarged("portraits", 256)
    with pytest.raises(ValueError, match="Attractive: the set portraits has Bald"):
        datasets.load("portraits", n=3, label_attribute="Attractive")


def test_captions_name_what_is_drawn():
    found = datasets.load("portraits", n=30)
    generator = torch.Generator().manual_seed(0)
    for i in range(30):
        said = captions.caption({k: v[i] for k, v in found.attributes.items()}, generator, omit=0, deny=0)
        assert any(said.find(word) >= 0 for word in ("man", "guy", "boy", "lady", "girl")), said
        assert ("glasses" in said) == bool(found.attributes["Eyeglasses"][i])
        assert ("smiling" in said or "cheerful" in said) == bool(found.attributes["Smiling"][i])


# ---- mixes ------------------------------------------------------------------------------------------------


@pytest.fixture
def root(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (10, 32, 32, 3), dtype=np.uint8)
    np.savez(tmp_path / "public32.npz", images=pixels, labels=np.arange(10) % 2, class_names=["cat", "dog"])
    (tmp_path / "a+b").mkdir()
    return tmp_path


def test_a_mix_is_the_first_set_and_the_second_as_one_further_class(root):
    found = datasets.load("portraits+public32", root=root, n=12, size=32)
    alone = datasets.load("portraits", n=12, size=32)
    assert found.classes == ["female", "male", "photograph"] and found.name == "portraits+public32"
    assert torch.equal(found.images[:12], alone.images) and torch.equal(found.labels[:12], alone.labels)
    assert len(found) == 18 and (found.labels[12:] == 2).all(), "half as many"
    photographs = {bytes(image.numpy()) for image in datasets.load("public32", root=root, size=32).images}
    assert {bytes(image.numpy()) for image in found.images[12:]} < photographs
    assert found.attributes is None, "nobody knows them of the photographs"
    assert found.captions[12:] == ["a photograph"] * 6 and len(found.captions) == 18
    assert found.captions == datasets.load("portraits+public32", root=root, n=12, size=32).captions
    more = datasets.load("portraits+public32", root=root, n=40, size=32, label_attribute="Young")
    assert len(more) == 50 and more.classes == ["not young", "young", "photograph"], "there are only ten"


def test_what_is_known_of_a_mix_is_known_of_its_parts(root):
    entry = datasets.REGISTRY[datasets.kind_of("portraits+public32")]
    assert entry.role == "public" and not entry.drawn and not entry.own, "so its photographs are digested"
    assert datasets.REGISTRY[datasets.kind_of("portraits+garments")].drawn
    assert datasets.REGISTRY[datasets.kind_of("portraits+npz:mine.npz")].own
    assert "portraits+public32" not in datasets.names("public")
    assert datasets.same_images("portraits+cifar10", "cifar10", root)
    assert datasets.same_images("portraits+public32", f"npz:{root / 'public32.npz'}", root)
    assert not datasets.same_images("portraits+public32", "celeba", root)
    assert datasets.enlarged("portraits+cifar10", 64) == datasets.enlarged("cifar10", 64) != ""


@pytest.mark.parametrize("name, message", [
    ("portraits+celeba", "celeba is a private set"), ("portraits+nothing", "unknown data set"),
    ("nothing+portraits", "unknown data set"), ("portraits+", "unknown data set"),
    ("portraits+folder", "unknown data set")])
def test_mixes_that_make_no_sense_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        datasets.load(name, n=3)


def test_a_mix_of_few_or_of_three():
    assert len(datasets.load("strokes+garments", n=1)) == 1
    assert datasets.REGISTRY["strokes+public32"].n == 60_000 + 12_000
    assert datasets.REGISTRY["public32+strokes"].n == 12_000 + 6_000
    assert datasets.is_drawn("strokes+garments+shapes") and not datasets.is_drawn("strokes+garments+mnist")
    assert not datasets.is_drawn("strokes:x")
    assert datasets.unlimited("strokes+public32") and not datasets.unlimited("public32+strokes")


def test_grey_and_colour_do_not_mix(root):
    with pytest.raises(ValueError, match="colour channels"):
        datasets.load("portraits+garments", root=root, n=3)


def test_a_path_may_have_a_plus_in_it(root):
    assert datasets.kind_of(f"folder:{root}/a+b") == "folder"
    assert datasets.kind_of(f"portraits+folder:{root}/a+b") == "portraits+folder"
