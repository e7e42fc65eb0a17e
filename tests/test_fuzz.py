"""Damaged and hostile input: a one-line ValueError or a valid load. Nothing else is raised, run or made."""
import copy
import gzip
import json
import random
import re
import resource
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import accountant
import dp_sgd
import sample
import train
import tuning
import unet
import vae
from datasets import arrays, photos
from extensions import original_weights
from support import calculator, checkpoints, command_line, files, progress, run_folder, settings

TIMES = 20
UNET = dict(in_channels=2, out_channels=2, model_channels=8, channel_mult=(1,), num_heads=1, context_dim=4,
            num_groups=4,
            attention_resolutions=(1,))
VAE = dict(ch=4, ch_mult=(1, 2), resolution=8, z_channels=2, embed_dim=2, num_groups=2)


def contents():
    """Contents of valid checkpoints of tiny networks, as train.py writes them: {name: dict}."""
    torch.manual_seed(0)
    autoencoder, embedder = vae.AutoencoderKL(vae.VAEConfig(**VAE)), {"kind": "class", "num_classes": 3,
                                                                      "dim": 4,
                                                                      "null_class": True}
    model = unet.LatentModel(unet.UNet(unet.UNetConfig(**UNET)), checkpoints.build_embedder(embedder))
    first = {"config": VAE, "state": autoencoder.state_dict(), "scale": 1.5, "trained_on": "strokes",
             "steps": 2}
    second = {"unet": UNET, "embedder": embedder, "schedule": {"kind": "cosine", "prediction": "v"},
              "model": model.state_dict()}
    release = {"format": sample.FORMAT, "vae": {k: first[k] for k in ("config", "state")}, "scale": 1.5,
               **second,
               "classes": ["a", "b", "c"], "crop": 8, "prompts": None,
               "data": {"public": "strokes", "private": "mnist10k"},
               "privacy": {"statement": "(1, 1e-05)-differentially private", "epsilon": 1.0}}
    engine, average, optimizer = training(model)
    engine.step(optimizer)
    state = {"tuned": dict(zip(engine.names, engine.parameters, strict=True)), "average": average,
             "optimizers": [optimizer.state_dict()], "done": 1}
    return {"vae.pt": first, "ldm.pt": second, "model.pt": release, "state.pt": state}


def training(model=None):
    if model is None:
        model = unet.LatentModel(unet.UNet(unet.UNetConfig(**UNET)), unet.ClassEmbedder(3, 4, True))
    tuning.select_trainable(model)
    engine = dp_sgd.DPSGD(model, 1.0, 1.0, 1)
    return engine, [p.detach().clone() for p in engine.parameters], torch.optim.Adam(engine.parameters)


def read_state(path):
    engine, average, optimizer = training()
    progress.resume(path, engine, average, [optimizer])
    engine.step(optimizer)


def read_release(path):
    sample.generate(sample.load_release(path), [0], steps=1, progress=False)


CHECKPOINTS = {"vae.pt": checkpoints.load_public,
               "ldm.pt": checkpoints.load_public, "model.pt": read_release, "state.pt": read_state}


@pytest.fixture(scope="module")
def valid():
    return contents()


@pytest.fixture(autouse=True)
def little_memory():
    """A fuzzed size must not become an allocation: the peak of the process may grow by 400 MB at most."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    yield
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000


def survives(read, path):
    """True if it was read, False if refused in one line. Anything else that is raised fails the test."""
    try:
        read(path)
        return True
    except ValueError as error:
        assert str(error) and "\n" not in str(error), repr(error)
        return False


def damaged_bytes(raw, rng):
    """One random mutation of a file."""
    raw, at = bytearray(raw), rng.randrange(len(raw))
    length = rng.randrange(1, max(2, min(64, len(raw) - at)))
    kind = rng.randrange(6)
    if kind == 0:
        del raw[at:]
    elif kind == 1:
        del raw[at:at + length]
    elif kind == 2:
        raw[at:at] = rng.randbytes(length)
    elif kind == 3:
        raw[at:at + length] = rng.randbytes(length)
    elif kind == 4:
        raw[at:at + length] = bytes(length)
    else:
        raw[at] ^= 1 << rng.randrange(8)
    return bytes(raw)


STRANGE = [None, True, -1, 0, 2 ** 31, 10 ** 18, 1e308, float("nan"), "", "x\ny", [], [1] * 50, {}, {"a": 1},
           torch.zeros(2, 3)]


def damaged_value(value, rng, strange):
    """One place of a nested dict or list is removed or replaced by something strange."""
    value = copy.deepcopy(value)
    place = value
    while True:
        key = rng.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if not (isinstance(place[key], (dict, list)) and place[key]) or rng.random() < 0.2:
            break
        place = place[key]
    if rng.random() < 0.2:
        del place[key]
    else:
        place[key] = rng.choice(strange)
    return value


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_checkpoints(name, valid, tmp_path):
    path, rng = tmp_path / name, random.Random(name)
    files.save(valid[name], path)
    assert survives(CHECKPOINTS[name], path)
    raw, refused = path.read_bytes(), 0
    for _ in range(TIMES):
        path.write_bytes(damaged_bytes(raw, rng))
        refused += not survives(CHECKPOINTS[name], path)
    for _ in range(TIMES // 2):
        files.save(damaged_value(valid[name], rng, STRANGE), path)  # a whole file with strange content
        refused += not survives(CHECKPOINTS[name], path)
    assert refused >= TIMES / 2
    for other in ([1, 2], torch.zeros(3), "text", {}):
        files.save(other, path)
        assert not survives(CHECKPOINTS[name], path)


@pytest.mark.parametrize("damage", [lambda moments: moments.update(exp_avg=moments["exp_avg"][..., :1]),
                                    lambda moments: moments.pop("exp_avg_sq"),
                                    lambda moments: moments.update(step=None)])
def test_moments_that_do_not_fit_their_parameter(damage, valid, tmp_path):
    """PyTorch would notice in the step after next, the ledger row already written, or never."""
    state = copy.deepcopy(valid["state.pt"])
    damage(state["optimizers"][0]["state"][0])
    files.save(state, tmp_path / "state.pt")
    engine, average, optimizer = training()
    assert not survives(lambda path: progress.resume(path, engine, average, [optimizer]),
                        tmp_path / "state.pt")


@pytest.mark.parametrize("where, key, value",
                         [("unet", "model_channels", 2 ** 24), ("unet", "num_res_blocks", 10 ** 9),
                                               ("unet", "channel_mult", [1] * 10 ** 4),
                                               ("embedder", "num_classes", 5 * 10 ** 7),
                                               ("unet", "transformer_depth", 10 ** 9),
                                               ("schedule", "T", 10 ** 9)])
def test_sizes_that_would_take_terabytes_or_hours(where, key, value, valid, tmp_path):
    release = copy.deepcopy(valid["model.pt"])
    release[where][key] = value
    files.save(release, tmp_path / "model.pt")
    assert not survives(sample.load_release, tmp_path / "model.pt")


@pytest.mark.parametrize("change", [
    {"classes": []}, {"classes": ["a", "b", "c", "d"]}, {"classes": [1, 2, 3]}, {"classes": "abc", "crop": 0},
    {"schedule": {"kind": "linear", "beta_start": -0.1}}, {"schedule": {"kind": "linear", "beta_end": -0.1}},
    {"schedule": {"kind": "linear", "beta_end": 2.0}}, {"schedule": {"T": 0}}, {"schedule": {"T": 2.5}},
    {"schedule": {"beta_end": float("nan")}}, {"scale": float("nan")}, {"data": None}, {"privacy": {}}])
def test_releases_that_cannot_draw(change, valid, tmp_path):
    files.save({**valid["model.pt"], **change}, tmp_path / "model.pt")
    assert not survives(sample.load_release, tmp_path / "model.pt")


@pytest.mark.parametrize("arguments", [
    ["--labels", "0-99999999999"], ["--labels", "99999999999"], ["--labels", "2-1"], ["--labels", "\u00b2"],
    ["--labels", ","],
    ["--n", "1000000000000"], ["--n", "1" + 40 * "0"], ["--n", "0"], ["--seed", str(2 ** 64)],
    ["--seed", "-1"],
    ["--steps", "2000"], ["--steps", "0"], ["--eta", "nan"], ["--guidance", "1e300"], ["--guidance", "nan"],
    ["--batch", "1" + 40 * "0"], ["--columns", "1" + 40 * "0"], ["--device", "meta"], ["--device", "x y"],
    ["--prompt", "a"], ["--out", "."]])
def test_command_line_of_sample(arguments, valid, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files.save(valid["model.pt"], tmp_path / "model.pt")
    with pytest.raises(SystemExit) as left:
        command_line.run_cli(lambda: sample.main(["model.pt", *arguments]))
    assert left.value.code == 2 and capsys.readouterr().err.strip().splitlines()[-1].startswith("error: ")
    assert [path.name for path in tmp_path.iterdir()] == ["model.pt"]


def test_a_pickle_does_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (Path.write_text, (tmp_path / "ran", "x"))

    for name, read in CHECKPOINTS.items():
        torch.save({"format": 1, "x": Evil()}, tmp_path / name)
        assert not survives(read, tmp_path / name)
    np.savez(tmp_path / "x.npz", images=np.array([Evil()], dtype=object), labels=np.zeros(1))
    assert not survives(lambda path: arrays.read_npz(path, ("images", "labels")), tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()


def test_only_one_place_loads_checkpoints_and_arrays_are_never_pickles():
    for path in Path(train.__file__).parent.glob("**/*.py"):
        if "tests" in path.parts or any(part.startswith(".") for part in path.parts):
            continue
        text = path.read_text()
        for call in re.findall(r"(?<!')\b(?:torch|np|numpy|pickle)\.load\([^\n]*", text):
            if call.startswith(("torch.load('", "torch.load(sys.argv")):
                continue  # a command shown to the user in an error message
            assert "allow_pickle=False" in call or (path.name == "files.py"
                                                    and "weights_only=True" in call), (path.name, call)
        assert not re.search(r"^\s*(import|from) (pickle|marshal|shelve|dill)\b", text, re.MULTILINE), path
        # docs/render.py runs the cells of the course, a file of this repository
        assert path.name == "render.py" or not re.search(r"\bexec\(", text), path


PLAN = {"n": 100, "q": 0.1, "steps": 4, "sigma": 1.5, "delta": 1e-5, "epsilon": 3.0, "clip_norm": 0.1,
        "numbers": {}, "tuned": ["a", "b"]}
LEDGER = [{"step": i, "q": 0.1, "sigma": 1.5, "clip_norm": 0.1, "batch_size": 10} for i in range(4)]


def a_run_folder(place):
    """A run folder with small valid JSON files."""
    for part in run_folder.PARTS:
        (place / part).mkdir(parents=True, exist_ok=True)
    chosen = vars(settings.parse(["--preset", "smoke", "--out", str(place)]))
    files.write_json(settings.plain(chosen), place / "internal" / "settings.json")
    files.write_json(PLAN, place / "internal" / "plan.json")
    stated = {**PLAN, "statement": "x", "epsilon": 3.0, "fast_noise": False}
    files.write_json(stated, place / "release" / "privacy.json")
    (place / "internal" / "ledger.jsonl").write_text("".join(json.dumps(row) + "\n" for row in LEDGER))
    return place


def read_json_files(place):
    settings.parse(["--resume", "--out", str(place)])
    run_folder.check_unchanged(PLAN, place / "internal" / "plan.json")
    calculator.compare([place], None)


def read_ledger(place):
    counted, _ = calculator.read_run(place)
    assert sum(counted.values()) >= 1
    rows = files.ledger_rows(files.read_ledger(place / "internal" / "ledger.jsonl"), PLAN)
    # at least the rows; the statement may know of more steps
    assert all(counted[step] >= count for step, count in accountant.count_steps(rows).items())


@pytest.mark.parametrize("name", ["internal/settings.json", "internal/plan.json", "release/privacy.json"])
def test_json(name, tmp_path, monkeypatch):
    # the numbers themselves are slow, and not at stake
    monkeypatch.setattr(calculator, "line", lambda *a: f"{a[-1] or 0:.4g}")
    place, rng = a_run_folder(tmp_path / "run"), random.Random(name)
    assert survives(read_json_files, place)
    raw, value = (place / name).read_bytes(), files.read_json(place / name)
    for _ in range(TIMES):
        (place / name).write_bytes(damaged_bytes(raw, rng))
        survives(read_json_files, place)
        (place / name).write_text(json.dumps(damaged_value(value, rng, STRANGE[:-1])))
        survives(read_json_files, place)
    for text in ("", "[1]", "null", "[" * 100_000, '{"a": 1' + "0" * 10_000 + "}", "\xff\xfe",
                 '{"q": {"q": {}}}'):
        (place / name).write_text(text)
        survives(read_json_files, place)


@pytest.mark.parametrize("key, value", [("private_n", "x"), ("sigma", [1]), ("steps", "4"), ("lr", None),
                                        ("flips", 1),
                                        ("unet", {"no": 1}), ("schedule", 3), ("seed", "x"), ("tune", 5),
                                        ("epsilon", {}), ("classes", 5)])
def test_settings_of_another_type(key, value, tmp_path):
    path = a_run_folder(tmp_path / "run") / "internal" / "settings.json"
    files.write_json(files.read_json(path) | {key: value}, path)
    assert not survives(read_json_files, tmp_path / "run")


def test_ledger(tmp_path):
    place, rng = a_run_folder(tmp_path / "run"), random.Random(1)
    ledger = place / "internal" / "ledger.jsonl"
    raw = ledger.read_bytes()
    for _ in range(TIMES):
        ledger.write_bytes(damaged_bytes(raw, rng))
        survives(read_ledger, place)
        ledger.write_text("".join(json.dumps(damaged_value(row, rng, STRANGE[:-1])) + "\n" for row in LEDGER))
        survives(read_ledger, place)


def test_idx(tmp_path):
    rng, path = random.Random(2), tmp_path / "t-images-idx3-ubyte"
    raw = struct.pack(">4B3I", 0, 0, 8, 3, 5, 8, 8) + rng.randbytes(320)
    for suffix, content in (("", raw), (".gz", gzip.compress(raw))):
        path = tmp_path / f"t-images-idx3-ubyte{suffix}"
        path.write_bytes(content)
        assert survives(arrays.read_idx, path)
        for _ in range(TIMES):
            path.write_bytes(damaged_bytes(content, rng))
            survives(arrays.read_idx, path)
    path.with_suffix("").write_bytes(struct.pack(">4B3I", 0, 0, 8, 3, 2 ** 32 - 1, 2 ** 32 - 1, 2 ** 32 - 1))
    assert not survives(arrays.read_idx, path.with_suffix(""))


def read_pictures(path):
    found = arrays.read_npz(path, ("images", "labels"))
    arrays.check(found["images"], found["labels"], path, 0, 9)


@pytest.mark.parametrize("write", [np.savez, np.savez_compressed])
def test_npz(write, tmp_path):
    rng, path = random.Random(3), tmp_path / "x.npz"
    write(path, images=np.arange(5 * 64, dtype=np.uint8).reshape(5, 8, 8), labels=np.arange(5))
    raw = path.read_bytes()
    assert survives(read_pictures, path)
    for _ in range(2 * TIMES):
        path.write_bytes(damaged_bytes(raw, rng))
        survives(read_pictures, path)
    strange = [np.zeros((5, 8, 9), np.uint8), np.full((5, 8, 8), 2.0), np.zeros((0, 8, 8), np.uint8),
               np.zeros(5, np.uint8),
               np.zeros((5, 8, 8, 4), np.uint8), np.array("x"), np.zeros((4, 8, 8), np.uint8)]
    for images in strange:
        write(path, images=images, labels=np.arange(5))
        assert not survives(read_pictures, path)


@pytest.mark.parametrize("form", [
    {"images": np.arange(320).reshape(5, 1, 8, 8) / 320}, {"images": np.zeros((5, 8, 8), bool)},
    {"train_images": np.zeros((5, 8, 8, 1), np.uint8), "train_labels": np.arange(5)[:, None],
     "test_images": np.zeros((5, 8, 8, 1), np.uint8), "test_labels": np.arange(5)[:, None]},
    {"x": np.zeros((5, 3, 8, 8), np.int64), "y": np.eye(5)},
    {"images": np.zeros((5, 8, 8)), "labels": np.array(list("abcde"))}])
def test_forms_of_arrays(form, tmp_path):
    rng, path = random.Random(4), tmp_path / "x.npz"
    np.savez(path, **form)
    raw = path.read_bytes()
    assert survives(arrays.own_arrays, path)
    for _ in range(TIMES):
        path.write_bytes(damaged_bytes(raw, rng))
        survives(arrays.own_arrays, path)
        survives(arrays.describe_npz, path)


@pytest.mark.parametrize("name, text", [
    ("captions.txt", "x.png\ta caf\u00e9\n" * 3),
    ("metadata.jsonl", '{"file_name": "x.png", "text": "a"}\n' * 3),
    ("metadata.csv", "file_name,text\nx.png,a\n")])
@pytest.mark.parametrize("code", ["utf-8", "utf-8-sig", "utf-16"])
def test_captions(name, text, code, tmp_path):
    rng, path = random.Random(name), tmp_path / name
    path.write_bytes(text.encode(code))

    def read(path):
        photos.captions(tmp_path, [Path("x.png")], [7], [Path(name)])

    assert survives(read, path)
    for _ in range(TIMES):
        path.write_bytes(damaged_bytes(text.encode(code), rng))
        survives(read, path)


def test_safetensors(tmp_path):
    rng, path = random.Random(5), tmp_path / "x.safetensors"
    header = b'{"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}'
    raw = struct.pack("<Q", len(header)) + header + bytes(16)
    path.write_bytes(raw)
    assert survives(original_weights.read, path)
    for _ in range(3 * TIMES):
        path.write_bytes(damaged_bytes(raw, rng))
        survives(original_weights.read, path)
        survives(original_weights.read_safetensors, path)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
def test_photographs(form, tmp_path):
    rng, path = random.Random(form), tmp_path / f"x.{form.lower()}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8)).save(path, form)
    raw = path.read_bytes()
    assert survives(lambda path: photos.square(path, 16, 3), path)
    for _ in range(TIMES):
        path.write_bytes(damaged_bytes(raw, rng))
        survives(lambda path: photos.square(path, 16, 3), path)
    path.write_bytes(b"")
    assert not survives(lambda path: photos.square(path, 16, 3), path)
