"""Text as condition: grammar, tokenizer, encoder, per-example gradients, runs from start to end by prompt."""
import json
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import datasets
import diffusion
import dp_sgd
import evaluate
import sample
import train
import tuning
import unet
import vae
from extensions import captions, text
from support import command_line, conditions, files, presets, settings, trainable
from support.settings import METHODS

CELEBA = [
    "5_o_Clock_Shadow", "Arched_Eyebrows", "Attractive", "Bags_Under_Eyes", "Bald", "Bangs", "Big_Lips",
    "Big_Nose",
    "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Chubby", "Double_Chin",
    "Eyeglasses", "Goatee",
    "Gray_Hair", "Heavy_Makeup", "High_Cheekbones", "Male", "Mouth_Slightly_Open", "Mustache", "Narrow_Eyes",
    "No_Beard",
    "Oval_Face", "Pale_Skin", "Pointy_Nose", "Receding_Hairline", "Rosy_Cheeks", "Sideburns", "Smiling",
    "Straight_Hair",
    "Wavy_Hair", "Wearing_Earrings", "Wearing_Hat", "Wearing_Lipstick", "Wearing_Necklace", "Wearing_Necktie",
    "Young"]
LOSS = partial(diffusion.loss, schedule=diffusion.PAPER)
OTHERS = ["Blurry", "Child", "Dark_Photo", "Grayscale", "Male", "Senior", "Young"]
CLASSES = ["T-shirt", "ankle boot", "3", "a", "traffic_light"]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def random_attributes(names, generator, p=0.3):
    return {name: bool(torch.rand((), generator=generator) < p) for name in names}


# ---------------------------------------------------------------------------------------------------- grammar


def test_every_attribute_of_celeba_is_worded():
    known = {name for name, value in captions.PHRASES if value} | {"Male"}
    assert len(CELEBA) == 40 and set(CELEBA) <= known
    for name in CELEBA:  # alone and certain to be said, a true attribute changes the sentence
        said, unsaid = ({captions.caption({"Male": True, name: value}, seeded(i), omit=0, deny=0)
                         for i in range(20)}
                        for value in (True, False))
        assert said != unsaid, name
        assert "_" not in "".join(said)


def test_a_caption_says_what_is_true_in_many_ways():
    facts = dict.fromkeys(CELEBA, False) | dict.fromkeys(("Smiling", "Young", "Black_Hair", "Eyeglasses",
                                                          "No_Beard"), True)
    sentences = [captions.caption(facts, seeded(i)) for i in range(300)]
    assert len(set(sentences)) > 200 and captions.caption(facts, seeded(7)) == sentences[7]
    assert all(("woman" in c or "lady" in c) and "beard" not in c.replace("without a goatee beard", "")
               for c in sentences)
    # omitted in about a fifth
    for words in (("smiling", "cheerful"), ("young", "youthful"), ("black hair",), ("glasses",)):
        assert 200 < sum(any(word in c for word in words) for c in sentences) < 290, words
    assert sum("without" in c or "not" in c for c in sentences) > 30  # what is false is sometimes said
    certain = captions.caption(facts, seeded(), omit=0, deny=0)
    assert "hair" in certain and "glasses" in certain and "not" not in certain and "without" not in certain


def test_the_noun_follows_age_and_sex():
    def noun(**facts):
        return captions.caption(facts, seeded(), omit=0, deny=0).split()[-1]

    assert (
        noun(Male=True, Child=True) == "boy"
        and noun(Male=False, Child=True) == "girl"
        and noun(Child=False) == "adult"
    )
    assert noun(Male=True) in ("man", "guy") and noun(Male=False, Child=False) in ("woman", "lady")
    assert noun(Smiling=True) == "person"
    assert not {"older", "middle"} & {w for i in range(50) for w in text.split(
        captions.caption({"Male": True, "Child": True, "Young": False}, seeded(i), omit=0))}


def test_attributes_without_wording_are_said_by_name():
    assert captions.caption({"Male": True, "Dark_Photo": True}, seeded(), omit=0).endswith(", dark photo")
    assert captions.caption({"Striped": True, "Old_Barn": False}, seeded(), omit=0, deny=1) in (
        "a picture, striped, not old barn", "a picture, not old barn, striped")
    # any kind of truth value
    assert captions.caption({"Male": np.bool_(True), "Child": torch.tensor(False)}, seeded())


def test_captions_of_classes():
    sentences = {captions.class_caption("automobile", seeded(i)) for i in range(50)}
    assert "a photo of an automobile" in sentences and "an automobile" in sentences
    # not "an a"
    assert all(captions.class_caption("a", seeded(i)).endswith("the letter a") for i in range(9))
    assert captions.class_caption("traffic_light", seeded()).endswith("a traffic light")


@pytest.mark.parametrize("names", [CELEBA, OTHERS, ["Old_Barn"]])
def test_the_vocabulary_has_every_word_the_grammar_can_say(names):
    words = text.vocabulary(names, CLASSES)
    tokenizer, g = text.Tokenizer(words, 150), seeded()
    sentences = [captions.caption(random_attributes(names, g), g, deny=0.5) for _ in range(1000)]
    sentences += [captions.class_caption(name, g) for name in CLASSES for _ in range(20)]
    assert not [c for c in sentences if tokenizer.unknown(c)]
    assert words == sorted(set(words)) and {"dark", "photo"} <= set(text.vocabulary(OTHERS, []))
    names = [None, None, None, *words]  # of the tokens; the first three stand for no word
    read = [[names[i] for i in row if i > 1] for row in tokenizer.encode(sentences).tolist()]
    assert read == [text.split(c) for c in sentences]


# -------------------------------------------------------------------------------------------------- tokenizer


def test_tokenizer():
    tokenizer = text.Tokenizer(["a", "boot", "red"], 5)
    tokens = tokenizer.encode(["A red, RED boot!", "", "zebra-boot", "a a a a a a a"])
    assert tokens.tolist() == [[1, 3, 5, 5, 4], [1, 0, 0, 0, 0], [1, 2, 4, 0, 0], [1, 3, 3, 3, 3]]
    assert tokens.dtype == torch.int64 and len(tokenizer) == 6 and tokenizer.encode([]).shape == (0, 5)
    assert tokenizer.unknown("a zebra, a Lion and the zebra") == ["zebra", "lion", "and", "the"]
    for words, length in ((["Red"], 5), (["a", "a"], 5), (["a b"], 5), (["a"], 0)):
        with pytest.raises(ValueError, match="distinct words"):
            text.Tokenizer(words, length)


# ---------------------------------------------------------------------------------------- encoder and network


def text_model(tune="attention", dtype=torch.float64, length=6):
    torch.manual_seed(0)
    config = unet.UNetConfig(in_channels=4, out_channels=4, model_channels=32, context_dim=5)
    model = unet.LatentModel(unet.UNet(config), text.TextEncoder(9, 5, length, width=16, heads=2))
    for p in model.parameters():  # away from the zero initialisation, where most gradients vanish
        nn.init.normal_(p, mean=0.5 * (p.dim() == 1), std=0.2)
    trainable.choose(model, SimpleNamespace(tune=tune, from_block=0, vae=vae.VAEConfig(),
                                            schedule=diffusion.PAPER))
    return model.to(dtype)


TOKENS = torch.tensor([[1, 4, 4, 8, 0, 0], [1, 0, 0, 0, 0, 0], [1, 2, 3, 5, 6, 7], [1, 7, 6, 5, 0, 0]])


def examples(k, tokens=TOKENS):
    g = seeded(1)
    return diffusion.draw(torch.randn(len(tokens), 4, 4, 4, generator=g, dtype=torch.float64), tokens, k, g,
                          diffusion.PAPER)


def test_padding_never_changes_the_output():
    model, (z, tokens, t, _) = text_model(length=20), examples(1)
    longer = torch.cat([tokens, torch.zeros(4, 14, dtype=torch.int64)], 1)
    short, long = (model(z, t[:, 0], cond) for cond in (tokens, longer))
    assert torch.allclose(short, long, atol=1e-12, rtol=0)
    alone = model(z[:1], t[:1, 0], tokens[:1, :4])  # no padding at all
    assert torch.allclose(short[:1], alone, atol=1e-12, rtol=0)
    changed = tokens.clone()
    changed[0, 2] = 5
    assert not torch.allclose(model(z, t[:, 0], changed)[0], short[0], atol=1e-6)
    # order counts: the third example differs, the first has twice the same word
    swapped = tokens[:, [0, 2, 1, 3, 4, 5]]
    difference = (model(z, t[:, 0], swapped) - short).abs().amax((1, 2, 3))
    assert difference[0] < 1e-12 and difference[2] > 1e-6


def test_the_empty_prompt_is_finite_and_is_the_null_condition():
    tokenizer, model = text.Tokenizer(list("abcdef"), 6), text_model()
    empty = tokenizer.encode([""])
    assert torch.equal(model.embedder.null(TOKENS), empty.expand(4, 6))
    z = diffusion.ddim(model.float(), (4, 4, 4, 4), TOKENS, 2, 0.0, 2.0, seeded(), diffusion.PAPER)
    assert z.isfinite().all()
    assert model(z, torch.tensor([5] * 4), model.embedder.null(TOKENS)).isfinite().all()
    with pytest.raises(ValueError, match="cond-drop"):
        text.TextEncoder(9, 5, 6, 16, null_class=False).null(TOKENS)
    with pytest.raises(ValueError, match="6 positions"):
        model.embedder(torch.ones(1, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match="heads"):
        text.TextEncoder(9, 5, 6, 18)


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("tune", ["attention", "embedder", "attention-only", "lora:2", "shift",
                                  "attention+shift"])
def test_per_example_gradients_equal_the_loop(k, tune):
    model, batch = text_model(tune), examples(k)
    parameters = [p for p in model.parameters() if p.requires_grad]
    grads = []
    for i in range(4):
        loss = LOSS(model, *(b[i:i + 1] for b in batch)).sum()
        grads.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]))
    norms = [float(g.norm()) for g in grads]
    clip_norm = sum(sorted(norms)[1:3]) / 2  # half of them are clipped
    expected = sum(g * min(1, clip_norm / n) for g, n in zip(grads, norms, strict=True))
    for name, method in METHODS.items():
        engine = dp_sgd.DPSGD(model, clip_norm, 0.0, 4, method=method)
        engine.accumulate(LOSS, *batch)
        got = torch.cat([s.flatten() for s in engine.sums])
        assert float((got - expected).norm() / expected.norm()) < 1e-10, name


def test_the_text_is_encoded_once_per_example_and_everything_in_it_learns():
    model, seen = text_model(), []
    model.embedder.register_forward_hook(lambda _, args, out: seen.append(len(args[0])))
    LOSS(model, *examples(3)).sum().backward()
    assert seen == [4]
    assert tuning.without_gradient(model) == []  # query and key of the cross-attention included
    silent = [n for n, p in model.named_parameters() if p.requires_grad
              and (p.grad is None or not p.grad.any())]
    assert not silent
    assert not model.embedder.embedding.weight.grad[text.PAD].any()


# ------------------------------------------------------------------------------------------------- whole runs

TINY = {**presets.PRESETS["smoke"], "public_n": 80, "private_n": 80, "batch_size": 10, "steps": 2,
        "delta": 1e-3, "sigma": 1.0,
        "accountant": "rdp", "vae_steps": 2, "ldm_steps": 2, "sample_steps": 2, "text_width": 16,
        "vae": vae.VAEConfig(ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
        "unet": unet.UNetConfig(4, 4, 16, (1, 1), attention_resolutions=(2,), context_dim=8, num_groups=8)}
SECRET = "Zebediah"


@pytest.fixture(scope="module", autouse=True)
def tiny_preset():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(presets.PRESETS, "tiny", TINY)
        yield


def run_tiny(out, *flags):
    train.main(["--preset", "tiny", "--out", str(out), "--precision", "float32", *flags])


def faces(monkeypatch, captions=False):
    """The private digits pass for faces with attributes (the label is one), or for images with captions."""
    read = datasets.load

    def load(name, *args, **kwargs):
        pictures = read(name, *args, **kwargs)
        if name == "mnist10k":
            even = pictures.labels % 2 == 0
            if captions:
                pictures.captions = [f"a portrait of {SECRET}" for _ in pictures.labels]
            else:
                pictures.labels, pictures.classes = even.long(), ["not Odd_Thing", "Odd_Thing"]
                pictures.attributes = {"Male": even, "Odd_Thing": pictures.labels < 5, "Smiling": ~even}
        return pictures

    monkeypatch.setattr(datasets, "load", load)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "text"
    with pytest.MonkeyPatch.context() as patch:
        faces(patch)
        run_tiny(out, "--condition", "text")
    return out


def command(module, *args):
    with pytest.raises(SystemExit) as left:
        command_line.run_cli(lambda: module.main([str(a) for a in args]))
    return left.value.code


def test_a_text_run_from_start_to_end(run, tmp_path, capsys):
    release = sample.load_release(run)
    assert isinstance(release.model.embedder, text.TextEncoder) and release.tokenizer.length == 32
    assert {"odd", "thing", "smiling", "letter"} <= set(release.tokenizer.words)
    assert [set(p) <= set((run / "release" / "prompts.txt").read_text().splitlines())
            for p in release.prompts]
    # the label's prompts: Male is false, or true
    assert all("woman" in p or "lady" in p for p in release.prompts[0])
    assert all(" man" in p or " guy" in p for p in release.prompts[1])
    assert not any(release.tokenizer.unknown(p) for prompts in release.prompts for p in prompts)
    privacy = json.loads((run / "release" / "privacy.json").read_text())
    assert privacy["condition"] == "text" and privacy["private"]
    assert privacy["trained_parameters"] > sum(p.numel() for p in release.model.embedder.parameters())

    images = sample.generate(release, [0, 1, 1], steps=2, seed=3, progress=False)
    assert images.shape == (3, 1, 28, 28)
    assert torch.equal(images, sample.generate(release, [0, 1, 1], steps=2, seed=3, progress=False))
    out = tmp_path / "x.npz"
    assert command(sample, run, "--prompt", "a smiling zebra, a zebra", "--n", 3, "--steps", 2, "--guidance",
                   2,
                   "--npz", out) == 0
    error = capsys.readouterr().err
    assert "unknown" in error and error.count("zebra") == 1 and "smiling" not in error
    with np.load(out) as file:
        assert file["images"].shape == (3, 28,
                                        28) and file["prompts"].tolist() == ["a smiling zebra, a zebra"] * 3
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a man\n\na smiling woman\n")
    assert command(sample, run, "--prompts", prompts, "--n", 3, "--steps", 2, "--npz", out) == 0
    with np.load(out) as file:
        assert file["prompts"].tolist() == ["a man", "a smiling woman", "a man"]
    assert "unknown" not in capsys.readouterr().err
    assert command(sample, run, "--labels", "Odd_Thing", "--n", 3, "--steps", 2, "--npz", out) == 0
    with np.load(out) as file:
        assert file["labels"].tolist() == [1, 1, 1]


def test_every_private_step_changes_the_text_encoder(run):
    public, released = files.load(run / "public" / "ldm.pt"), files.load(run / "release" / "model.pt")
    assert public["embedder"] == released["embedder"] and public["embedder"]["kind"] == "text"
    names = [name for name in public["model"] if name.startswith("embedder.")]
    assert len(names) > 20 and not any(torch.equal(public["model"][name], released["model"][name])
                                       for name in names)


def test_private_captions_never_enter_the_vocabulary(run, tmp_path, monkeypatch):
    faces(monkeypatch, captions=True)
    seen, encode = [], text.Tokenizer.encode
    monkeypatch.setattr(text.Tokenizer, "encode", lambda self,
                        prompts: (seen.extend(prompts), encode(self, prompts))[1])
    run_tiny(tmp_path / "r", "--condition", "text", "--steps", "1")
    assert any(SECRET in prompt for prompt in seen)  # the captions were used
    for part in ("public", "release"):
        words = files.load(tmp_path / "r" / part / ("ldm.pt"
                                                    if part == "public" else "model.pt"))["embedder"]["words"]
        assert SECRET.lower() not in words and "portrait" in words
        for file in (tmp_path / "r" / part).iterdir():
            assert SECRET.lower().encode() not in file.read_bytes().lower(), file


def test_the_caption_of_a_picture_does_not_depend_on_the_others():
    g = seeded()
    images = torch.randint(256, (30, 1, 4, 4), generator=g, dtype=torch.uint8)
    pictures = datasets.ImageSet(images, torch.zeros(30).long(), ["x"],
                             attributes={name: torch.rand(30, generator=g) < 0.4 for name in CELEBA})
    s = settings.parse(["--condition", "text", "--device", "cpu"])
    entry = conditions.embedder_entry(s, pictures, pictures)
    tokens = conditions.of(s, pictures, entry)
    assert len(tokens.unique(dim=0)) > 25
    rest = datasets.ImageSet(pictures.images[1:], pictures.labels[1:], ["x"],
                         attributes={name: value[1:] for name, value in pictures.attributes.items()})
    assert torch.equal(conditions.of(s, rest, entry), tokens[1:])


def test_init_reuses_the_text_encoder(run, tmp_path, monkeypatch):
    faces(monkeypatch)
    run_tiny(tmp_path / "r", "--condition", "text", "--init", str(run), "--steps", "1", "--text-length", "5")
    old, new = (files.load(r / "release" / "model.pt")["embedder"] for r in (run, tmp_path / "r"))
    assert old == new and new["length"] == 32  # the checkpoint says what it is
    # by class: a new diffusion model, the same autoencoder
    run_tiny(tmp_path / "s", "--init", str(run), "--steps", "1")
    old, new = (files.load(r / "public" / "vae.pt")["state"] for r in (run, tmp_path / "s"))
    assert all(torch.equal(old[key], new[key]) for key in old)
    assert files.load(tmp_path / "s" / "release" / "model.pt")["embedder"]["kind"] == "class"


@pytest.fixture(scope="module", params=["none", "class"])
def other(request, tmp_path_factory):
    """A release without prompts."""
    out = tmp_path_factory.mktemp("runs") / request.param
    run_tiny(out, "--condition", request.param, "--steps", "1")
    return request.param, out


def test_runs_without_text(other, tmp_path, capsys):
    kind, out = other
    release = sample.load_release(out)
    assert (release.model.embedder is None) == (kind == "none") and release.tokenizer is None
    assert sample.generate(release, [1, 2], steps=2, progress=False).shape == (2, 1, 28, 28)
    assert not (out / "release" / "prompts.txt").exists()
    for flags, message in ((["--prompt", "a dog"], "not trained with prompts"),
                           (["--labels", "1"], "unconditional"),
                           (["--guidance", "2"], "unconditional")):
        if kind == "none" or message != "unconditional":
            assert command(sample, out, *flags, "--n", 2, "--steps", 2, "--out", tmp_path / "x.png") == 2
            lines = capsys.readouterr().err.strip().splitlines()
            assert len(lines) == 1 and message in lines[0]
    assert command(sample, out, "--n", 2, "--steps", 2, "--npz", tmp_path / "x.npz") == 0
    with np.load(tmp_path / "x.npz") as file:
        assert set(file) == ({"images"} if kind == "none" else {"images", "labels"})
    if kind == "none":  # nothing for a classifier to learn from
        assert command(evaluate, out, "--samples", tmp_path / "x.npz", "--no-distance") == 0
        assert files.read_json(out / "internal" / "evaluation.json")["accuracy"] == {}


@pytest.mark.parametrize("flags, message", [
    (["--condition", "none", "--guidance", "2"], "needs a condition"),
    (["--text-width", "12"], "--text-width"),
    (["--text-length", "0"], "--text-length")])
def test_impossible_settings_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        settings.parse(["--preset", "tiny", *flags])


def test_an_unconditional_network_gets_cross_attention_for_a_condition(monkeypatch):
    plain = replace(presets.PRESETS["tiny"]["unet"], use_spatial_transformer=False)
    monkeypatch.setitem(presets.PRESETS["tiny"], "unet", plain)
    given = settings.parse(["--preset", "tiny", "--condition", "text"]).unet
    assert given.use_spatial_transformer and given.context_dim
    assert settings.parse(["--preset", "tiny", "--condition", "none"]).unet.context_dim is None


def test_bad_prompts_are_one_line(run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\xfa")
    for flags, message in ((["--prompt", "a man", "--labels", "0"], "exclude"),
                           (["--prompts", "empty.txt"], "no prompt"),
                           (["--prompts", "none.txt"], "none.txt"),
                           (["--prompts", "bytes.txt"], "bytes.txt")):
        assert command(sample, run, *flags) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and message in lines[0]
    assert command(sample, run, "--prompt", "a " * 40, "--n", 1, "--steps", 1, "--out",
                   tmp_path / "x.png") == 0
    assert "only the first 31 words" in capsys.readouterr().err
