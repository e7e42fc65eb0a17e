"""The programs end to end on the smoke preset: all stages, release, sampling, resuming, one-line refusals."""
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import accountant
import datasets
import optim
import sample
import train
import tuning
import vae
from datasets import strokes
from support import (
    checkpoints,
    command_line,
    conditions,
    dry_run,
    files,
    guarantee,
    presets,
    run_folder,
    settings,
)

PRIVACY_KEYS = {"statement", "epsilon", "delta", "accountant", "adjacency", "unit", "sampling", "n", "q",
                "steps", "sigma",
                "clip_norm", "noise_multiplicity", "expected_batch_size", "covers", "does_not_cover",
                "insecure_seed"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "smoke"
    train.main(["--preset", "smoke", "--out", str(out)])
    return out


def read_rows(out):
    return [json.loads(line) for line in (out / "internal" / "ledger.jsonl").read_text().splitlines()]


def test_help_is_short_and_help_all_is_whole(capsys):
    flags = []
    for word in ("--help", "--help-all"):
        with pytest.raises(SystemExit):
            settings.parse([word])
        flags.append(set(re.findall(r"^  (?:-h, )?--([a-z0-9-]+)", capsys.readouterr().out, flags=re.M)))
    short, whole = flags
    assert len(short) <= 32 and short < whole
    assert {name.replace("-", "_") for name in whole - short} == settings.RARE
    networks = {"vae", "unet", "schedule"}
    assert whole >= {key.replace("_", "-") for key in presets.DIGITS.keys() - networks}


def test_a_run_leaves_what_it_promises(run):
    for name in ("public/vae.pt", "public/ldm.pt", "public/autoencoder.png", "release/model.pt",
                 "release/privacy.json",
                 "release/samples.png", "release/comparison.png", "internal/ledger.jsonl",
                 "internal/state.pt"):
        assert (run / name).stat().st_size > 100, name
    assert not list(run.rglob("*.tmp"))
    privacy = files.read_json(run / "release" / "privacy.json")
    assert privacy.keys() >= PRIVACY_KEYS
    assert 9.9 < privacy["epsilon"] <= 10.0 and privacy["delta"] == 1e-5 and privacy["n"] == 1000
    assert privacy["private"] and "(10, 1e-05)" in privacy["statement"]


def test_the_ledger_has_one_row_per_logical_step_and_gives_the_epsilon(run):
    rows, privacy = read_rows(run), files.read_json(run / "release" / "privacy.json")
    assert len(rows) == privacy["steps"] == 4  # four logical steps of about three micro-batches each
    assert all(row["q"] == 100 / 1000 and row["sigma"] == privacy["sigma"] for row in rows)
    assert abs(accountant.epsilon(100 / 1000, privacy["sigma"], 4, 1e-5,
                                  privacy["accountant"]) - privacy["epsilon"]) < 1e-6


@pytest.mark.parametrize("names, rows", [
    (["1", "2", "9"], [1, 2, 9]), (["10", "2", "0"], [1, 2, 0]), (["cat", "3", "dog"], [0, 3, 1]),
    (["9"], [9])])
def test_private_classes_begin_with_the_embedding_of_the_same_name(names, rows):
    """Matched by name, not position. Others get rows that are left. Rows nothing can train are dropped."""
    table = torch.arange(37.0)[:, None].expand(-1, 4)
    entry = {"kind": "class", "dim": 4, "null_class": True, "num_classes": 36}
    checkpoint = {"embedder": entry, "model": {"embedder.embedding.weight": table, "x": 1},
                  "classes": list(strokes.GROUPS["all"])}
    found = conditions.for_private_classes(checkpoint, names)
    assert found["embedder"] == entry | {"num_classes": len(names)} and found["model"]["x"] == 1
    assert found["model"]["embedder.embedding.weight"][:, 0].tolist() == [*rows, 36]
    with pytest.raises(ValueError, match="fewer than the 37"):
        conditions.for_private_classes(checkpoint, list(map(str, range(37))))


def test_a_plan_whose_noise_ends_too_early_is_refused(tmp_path):
    for flags, fine in ((["--sigma", "0.3"], True), (["--sigma", "0.3", "--fast-noise"], False),
                        (["--sigma", "0.08"], True), (["--sigma", "0.016"], False)):
        s = settings.parse(["--preset", "smoke", "--out", str(tmp_path), *flags])
        if fine:
            assert guarantee.privacy_plan(s, 1000)["sigma"] == s.sigma
        else:
            with pytest.raises(ValueError, match="so little noise"):
                guarantee.privacy_plan(s, 1000)


def test_only_the_chosen_parameters_changed(run):
    public, released = (
        files.load(run / "public" / "ldm.pt")["model"],
        files.load(run / "release" / "model.pt")["model"],
    )
    changed = {k for k in public if not torch.equal(public[k], released[k])}
    model, _ = checkpoints.build_model(files.load(run / "public" / "ldm.pt"))
    assert changed == set(tuning.select_trainable(model, "attention"))  # each of them gets noise, used or not
    assert torch.equal(files.load(run / "public" / "vae.pt")["state"]["quant_conv.weight"],
                       files.load(run / "release" / "model.pt")["vae"]["state"]["quant_conv.weight"])


def test_public_networks_that_know_the_private_pictures_are_refused(run, tmp_path):
    with pytest.raises(ValueError, match="public networks know these images"):
        train.main(["--preset", "smoke", "--public", "mnist", "--private", "mnist10k", "--out",
                    str(tmp_path / "r")])
    with pytest.raises(ValueError, match="mnist10k: this set is for private images only"):
        train.main(["--preset", "smoke", "--public", "mnist10k", "--private", "mnist", "--out",
                    str(tmp_path / "r")])
    # an earlier run's networks, made from digits that are private now
    shutil.copytree(run, tmp_path / "tainted")
    for name in ("vae.pt", "ldm.pt"):
        path = tmp_path / "tainted" / "public" / name
        files.save({**files.load(path), "trained_on": "mnist"}, path)
    # mnist10k is a part of mnist
    with pytest.raises(ValueError, match="public networks know these images.*mnist"):
        train.main(["--preset", "smoke", "--init", str(tmp_path / "tainted"), "--out", str(tmp_path / "r")])
    assert not (tmp_path / "r").exists()


def test_a_network_shares_no_memory_with_the_checkpoint_it_is_built_from(run):
    """Else private tuning would change the public model that the comparison shows as "before"."""
    checkpoint = files.load(run / "public" / "ldm.pt")
    model, _ = checkpoints.build_model(checkpoint)
    owned = {value.data_ptr() for value in checkpoint["model"].values()}
    assert not any(p.data_ptr() in owned for p in model.parameters())


def test_samples_come_from_the_release_alone(run, tmp_path):
    shutil.copytree(run / "release", tmp_path / "release")
    release = sample.load_release(tmp_path)
    images = sample.generate(release, [3, 3, 9], steps=3, seed=1, progress=False)
    assert images.shape == (3, 1, 28, 28) and images.dtype == torch.uint8
    assert torch.equal(images, sample.generate(release, [3, 3, 9], steps=3, seed=1, progress=False))
    assert not torch.equal(images, sample.generate(release, [3, 3, 9], steps=3, progress=False))
    sample.main([str(tmp_path), "--n", "7", "--labels", "0-2,9", "--steps", "2", "--npz",
                 str(tmp_path / "x.npz"), "--out",
                 str(tmp_path / "x.png"), "--guidance", "1.5"])
    with np.load(tmp_path / "x.npz") as file:
        assert file["images"].shape == (7, 28, 28) and file["images"].dtype == np.uint8
        assert file["labels"].tolist() == [0, 1, 2, 9, 0, 1, 2]
    with pytest.raises(ValueError, match="labels"):
        sample.generate(release, [10])
    with pytest.raises(ValueError, match="at least one image"):
        sample.generate(release, [])


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_resume_after_ctrl_c_ends_like_an_uninterrupted_run(optimizer, run, tmp_path, monkeypatch):
    out = tmp_path / "r"
    again = ["--preset", "smoke", "--out", str(out), "--init", str(run), "--private-optimizer", optimizer]
    append, stops = files.append_row, []

    def interrupting(row, path):  # a real SIGINT's handler, called right after the ledger row of step 1
        append(row, path)
        if path.name == "ledger.jsonl" and row["step"] == 1:
            stops[0].handle(2, None)

    monkeypatch.setattr(files, "append_row", interrupting)
    init = run_folder.Stop.__init__
    monkeypatch.setattr(run_folder.Stop, "__init__", lambda self: (init(self), stops.append(self))[0])
    with pytest.raises(SystemExit) as stopped:
        train.main(again)
    assert stopped.value.code == 130 and len(read_rows(out)) == 2
    state = files.load(out / "internal" / "state.pt")
    assert state["done"] == 2 and len(state["optimizers"]) == (2 if optimizer == "muon" else 1)
    monkeypatch.undo()
    train.main(["--resume", "--out", str(out)])
    assert [r["step"] for r in read_rows(out)] == [0, 1, 2, 3]
    whole, resumed = (files.read_json(x / "release" / "privacy.json") for x in (run, out))
    assert whole | {"optimizer": optimizer} == resumed


def test_a_run_from_before_muon_goes_on_with_adam(run, tmp_path):
    shutil.copytree(run, tmp_path / "r")
    path = tmp_path / "r" / "internal" / "settings.json"
    stored = files.read_json(path)
    assert stored.pop("public_optimizer") == "muon" and stored.pop("private_optimizer") == "adam"
    files.write_json({**stored, "preset": "garments"}, path)  # whose private optimizer is another today
    resumed = settings.parse(["--preset", "garments", "--resume", "--out", str(tmp_path / "r")])
    assert (resumed.public_optimizer, resumed.private_optimizer) == ("adamw", "adam")
    with pytest.raises(ValueError, match="this run began with private_optimizer = adam, not muon"):
        settings.parse(["--private-optimizer", "muon", "--resume", "--out", str(tmp_path / "r")])
    files.write_json({**stored, "private_optimizer": "Muon"}, path)
    with pytest.raises(ValueError, match="--private-optimizer must be one of adam, muon, got Muon"):
        settings.parse(["--resume", "--out", str(tmp_path / "r")])


def test_a_step_lost_in_a_crash_stays_spent(run, tmp_path, monkeypatch):
    out = tmp_path / "r"

    class Crash(BaseException):
        pass

    def crash(self, optimizer):
        raise Crash

    import dp_sgd
    step = dp_sgd.DPSGD.step
    calls = []
    monkeypatch.setattr(dp_sgd.DPSGD, "step", lambda self,
                        o: calls.append(1) or (step if len(calls) < 3 else crash)(self, o))
    with pytest.raises(Crash):
        train.main(["--preset", "smoke", "--out", str(out), "--init", str(run)])
    monkeypatch.undo()
    # the third batch was drawn and is in the ledger, its update never happened
    assert len(read_rows(out)) == 3
    with open(out / "internal" / "ledger.jsonl", "a") as file:
        file.write('{"step": 3, "q": 0.0')  # and a torn row
    train.main(["--resume", "--out", str(out)])
    assert files.load(out / "internal" / "state.pt")["done"] == 2
    privacy = files.read_json(out / "release" / "privacy.json")
    assert privacy["steps"] == 4 and privacy["epsilon"] <= 10.0


def test_resume_refuses_what_would_change_the_guarantee(run, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(run, out)
    with pytest.raises(ValueError, match="clip_norm"):
        train.main(["--resume", "--out", str(out), "--clip-norm", "0.7"])
    plan = files.read_json(out / "internal" / "plan.json")
    files.write_json(plan | {"private_pictures": "0"}, out / "internal" / "plan.json")
    with pytest.raises(ValueError, match="private_pictures"):
        train.main(["--resume", "--out", str(out)])
    files.write_json(plan | {"private_conditions": "0"}, out / "internal" / "plan.json")
    with pytest.raises(ValueError, match="private_conditions"):
        train.main(["--resume", "--out", str(out)])
    files.write_json(plan, out / "internal" / "plan.json")
    (out / "internal" / "ledger.jsonl").write_text("")
    with pytest.raises(ValueError, match="rows are missing"):
        train.main(["--resume", "--out", str(out)])


def test_an_accountant_that_states_too_little_is_refused(run, tmp_path, monkeypatch):
    monkeypatch.setitem(accountant.ACCOUNTANTS, "half", lambda *plan: accountant.by_rdp(*plan) / 2)
    with pytest.raises(ValueError, match="half gives epsilon .* it is wrong"):
        train.main(["--preset", "smoke", "--out", str(tmp_path / "r"), "--init", str(run),
                    "--accountant", "half"])
    assert not (tmp_path / "r" / "internal").exists()


def test_noise_of_older_runs_that_can_be_computed_stays_stated(run, tmp_path):
    """Older settings.json say secure_noise; the oldest do not, and had noise that can be computed."""
    out = tmp_path / "r"
    shutil.copytree(run, out)
    stored = files.read_json(out / "internal" / "settings.json")
    for secure, private in (({"secure_noise": True}, True), ({"secure_noise": False}, False), ({}, False)):
        older = {key: value for key, value in stored.items() if key != "fast_noise"}
        files.write_json(older | secure, out / "internal" / "settings.json")
        train.main(["--resume", "--out", str(out)])
        privacy = files.read_json(out / "release" / "privacy.json")
        assert privacy["private"] == private == ("NOT PRIVATE" not in privacy["statement"])
        if private:  # with the flag of today the noise of later steps would be another, unnoticed
            with pytest.raises(ValueError, match="began with fast_noise = False"):
                train.main(["--resume", "--out", str(out), "--fast-noise"])


@pytest.mark.parametrize(("key", "flags", "message"), [
    ("flips", ["--flips", "yes"], "had no --flips"),
    ("init", ["--init", "elsewhere"], "leave --init out"),
    ("clipping", [], "--clipping must be one of")])
def test_a_resumed_run_says_which_flag_or_setting_does_not_fit(key, flags, message, run, tmp_path):
    out = tmp_path / "r"
    shutil.copytree(run, out)
    stored = files.read_json(out / "internal" / "settings.json")
    changed = {"flips": {}, "init": {"init": None}, "clipping": {"clipping": "of-mine"}}[key]
    files.write_json({k: v for k, v in stored.items() if k != key} | changed,
                     out / "internal" / "settings.json")
    with pytest.raises(ValueError, match=message):
        train.main(["--resume", "--out", str(out), *flags])


def test_steps_zero_releases_the_public_model_without_reading_private_pictures(run, tmp_path, monkeypatch):
    read = datasets.load

    def watched(name, split="train", *args, **kwargs):
        assert (name, split) != ("mnist10k", "train"), "a private picture was read"
        return read(name, split, *args, **kwargs)

    monkeypatch.setattr(datasets, "load", watched)
    train.main(["--preset", "smoke", "--out", str(tmp_path / "r"), "--init", str(run), "--steps", "0"])
    assert files.read_json(tmp_path / "r" / "release" / "privacy.json")["epsilon"] == 0.0


def test_no_noise_is_named_not_private(run, tmp_path, capsys):
    train.main(["--preset", "smoke", "--out", str(tmp_path / "r"), "--init", str(run), "--epsilon", "inf",
                "--steps", "1"])
    privacy = files.read_json(tmp_path / "r" / "release" / "privacy.json")
    assert privacy["epsilon"] == "inf" and not privacy["private"] and "NOT PRIVATE" in privacy["statement"]
    assert "NOT private" in capsys.readouterr().err


@pytest.mark.parametrize("flags", [["--tune", "lora:2"], ["--tune", "all", "--clipping", "automatic"],
                                   ["--noise-multiplicity", "2", "--flips", "yes"], ["--insecure-seed", "1"],
                                   ["--from-block", "1", "--accountant", "pld"]])
def test_ablations_are_flags(run, tmp_path, flags):
    train.main(["--preset", "smoke", "--out", str(tmp_path / "r"), "--init", str(run), "--steps", "1",
                *flags])
    assert sample.generate(sample.load_release(tmp_path / "r"), [1], steps=2,
                           progress=False).shape == (1, 1, 28, 28)
    privacy = files.read_json(tmp_path / "r" / "release" / "privacy.json")
    assert privacy["private"] == ("--insecure-seed" not in flags) and privacy["epsilon"] <= 10
    card = (tmp_path / "r" / "release" / "MODEL_CARD.md").read_text()
    for text in (privacy["statement"], card):
        assert ("NOT PRIVATE" in text) == ("--insecure-seed" in flags)


def test_flags_of_the_networks_change_them_or_are_refused(run, tmp_path):
    s = settings.parse(["--preset", "smoke", "--width", "64", "--prediction", "eps", "--depth", "2",
                        "--latent-channels", "3"])
    assert (s.unet.model_channels, s.schedule.prediction, s.unet.num_res_blocks) == (64, "eps", 2)
    assert (s.vae.embed_dim, s.vae.z_channels, s.unet.in_channels, s.unet.out_channels) == (3, 3, 3, 3)
    for factor, side in (("4", 8), ("8", 4), ("16", 2)):
        net = vae.AutoencoderKL(settings.parse(["--preset", "smoke", "--factor", factor]).vae)
        assert net.encode(torch.zeros(1, 1, 32, 32)).mean.shape == (1, 4, side, side)
    with pytest.raises(ValueError, match="latents of 2 x 2 cannot be halved 2 times"):  # by its UNet
        train.main(["--preset", "celeba32", "--factor", "16", "--dry-run", "--out", "/nonexistent/run"])
    with pytest.raises(ValueError, match="--factor must be 2, 4, 8 or 16, got 5"):
        settings.parse(["--factor", "5"])
    reuse = ["--preset", "smoke", "--init", str(run), "--out", str(tmp_path / "again"), "--dry-run"]
    for flag, value in (("--width", "64"), ("--prediction", "eps"), ("--depth", "2"),
                        ("--latent-channels", "3"),
                        ("--factor", "4")):
        with pytest.raises(ValueError,
                           match=f"{flag} {value}: the network of .* leave out {flag}, or --init"):
            train.main([*reuse, flag, value])
    train.main([*reuse, "--width", "32", "--prediction", "v", "--depth", "1", "--latent-channels", "4",
                "--factor", "8"])
    with pytest.raises(ValueError, match="must be divisible by num_groups"):
        train.main(["--preset", "smoke", "--width", "60", "--out", str(tmp_path / "new"), "--dry-run"])


def test_flags_that_reused_networks_contradict_are_refused_or_named(run, tmp_path, capsys):
    reuse = ["--preset", "smoke", "--init", str(run), "--out", str(tmp_path / "again"), "--dry-run"]
    # else the release would claim it
    with pytest.raises(ValueError, match="--public-classes letters: .* was trained on all"):
        train.main([*reuse, "--public-classes", "letters"])
    train.main([*reuse, "--ldm-steps", "9", "--vae-steps", "9"])
    out = capsys.readouterr().out
    assert "note: --ldm-steps has no effect" in out and "note: --vae-steps has no effect" in out
    assert "were trained on" not in out
    train.main([*reuse, "--public", "garments", "--public-n", "9"])
    out = capsys.readouterr().out
    assert "were trained on strokes; images of --public garments only" in out and "--public-n has no" in out
    train.main(reuse)
    assert "autoencoder 0.0, latent diffusion 0.0, private" in capsys.readouterr().out


def test_dry_run_of_what_does_not_fit_the_memory_measures_nothing(capsys, monkeypatch):
    monkeypatch.setattr(dry_run, "estimate", None)  # would fail if it began
    train.main(["--preset", "smoke", "--ldm-batch", str(10 ** 9), "--dry-run"])
    assert "GB, this machine has" in capsys.readouterr().out


def test_dry_run_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train.main(["--preset", "smoke", "--dry-run"])
    out = capsys.readouterr().out
    assert "epsilon 10" in out and "sigma" in out and "minutes" in out and not list(tmp_path.iterdir())


REFUSED = [
    (["--epsilon", "0"], "--epsilon"), (["--epsilon", "nan"], "--epsilon"), (["--delta", "0"], "--delta"),
    (["--delta", "0.002"], "below 1/n"), (["--batch-size", "1001"], "exceeds"),
    (["--batch-size", "0"], "--batch-size"),
    (["--steps", "-1"], "--steps"), (["--clip-norm", "0"], "--clip-norm"), (["--sigma", "-1"], "--sigma"),
    (["--tune", "attn"], "unknown tune"), (["--from-block", "99"], "from_block"), (["--lr", "-1"], "--lr"),
    (["--private", "mnist", "--data-root", "/nonexistent"], "MNIST"),
    (["--init", "/nonexistent"], "there is no"),
    (["--resume", "--out", "/nonexistent"], "there is no"), (["--device", "cuda:99"], "--device"),
    (["--guidance", "2", "--cond-drop", "0"], "--guidance"), (["--ema", "1"], "--ema"),
    (["--guidance", "nan"], "--guidance"),
    (["--flips", "true"], "--flips: must be yes or no"), (["--preset", "digit"], "'digit'"),
    (["--epsilon", "much"], "--epsilon"),
    (["--epsilon", "1", "--sigma", "2"], "give one of the two"), (["--init", "/nonexistent"], "there is no"),
    (["--sigma", "1e-200"], "--sigma"), (["--sigma", "1e300"], "--sigma"),
    (["--epsilon", "1e300"], "--epsilon"),
    (["--device", "meta"], "--device"), (["--tune", "lora:999999999999"], "the rank must be at most"),
    (["--lr", "1e300"], "--lr"), (["--vae-lr", "inf"], "--vae-lr"),
    (["--clip-norm", "1e-320"], "--clip-norm"),
    (["--clip-norm", "1e300"], "--clip-norm"), (["--batch-size", "1" + 30 * "0"], "--batch-size"),
    (["--steps", "1" + 30 * "0"], "--steps"), (["--micro-batch", "1" + 30 * "0"], "--micro-batch"),
    (["--seed", str(2 ** 64)], "--seed"), (["--insecure-seed", str(-2 ** 64)], "--insecure-seed"),
    (["--noise-multiplicity", "1000000000"], "--noise-multiplicity"),
    (["--sample-steps", "2000"], "--sample-steps"),
    (["--guidance", "1e300"], "--guidance"), (["--width", "1" + 30 * "0"], "--width"),
    (["--depth", "99999999"], "--depth"),
    (["--text-layers", "99999999"], "--text-layers"), (["--public-n", "1" + 30 * "0"], "--public-n"),
    (["--kl-weight", "1e300"], "--kl-weight"), (["--tune", "lora:\u00b2"], "whole number"),
    (["--delta", "1e-11"], "--accountant rdp"),
]


@pytest.mark.parametrize("flags, message", REFUSED)
def test_bad_input_is_refused_before_any_work(flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "fit", None)  # would fail with a TypeError if training began
    with pytest.raises(SystemExit) as left:
        command_line.run_cli(lambda: train.main(["--preset", "smoke", *flags]))
    error = capsys.readouterr().err.strip().splitlines()
    assert not any(line.startswith("usage") for line in error)
    assert left.value.code == 2 and message in error[-1] and error[-1].startswith("error: ")


def test_a_used_folder_is_not_mixed_into(run):
    with pytest.raises(ValueError, match="already holds a run.*would add its epsilon") as refused:
        train.main(["--preset", "smoke", "--out", str(run)])
    assert "delete" not in str(refused.value)


PRIVATE_NUMBERS = "loss=", "clipped=", "examples_per_s=", "step/s", "s/step"


@pytest.mark.parametrize("flags, shown", [([], False), (["--show-private"], True)])
def test_the_bar_shows_private_numbers_only_when_asked(run, tmp_path, capsys, flags, shown):
    """A cluster keeps what the terminal shows; the rate, too, would tell the size of a private batch."""
    train.main(["--preset", "smoke", "--out", str(tmp_path / "r"), "--init", str(run), "--steps", "1",
                *flags])
    written = capsys.readouterr()
    lines = [line for line in written.err.replace("\r", "\n").splitlines() if "private tuning" in line]
    assert any("1/1" in line and "epsilon=10" in line for line in lines)
    assert [number in "".join(lines) for number in PRIVATE_NUMBERS[:3]] == 3 * [shown]
    assert shown or not any(number in "".join(lines) for number in PRIVATE_NUMBERS)
    assert not any(number in written.out for number in PRIVATE_NUMBERS)
    log = [json.loads(line) for line in (tmp_path / "r" / "internal" / "log.jsonl").read_text().splitlines()]
    assert log[0].keys() >= {"loss", "clipped_fraction", "examples"}  # internal/ keeps them


@pytest.mark.parametrize("flags", [["--accountant", "rdp", "--delta", "1e-11"], ["--epsilon", "10000"],
                                   ["--sigma", "1e-5"],
                                   ["--sample-steps", "2000"], ["--sigma", "0.05"]])
def test_a_run_is_refused_before_its_first_private_step_or_ends_with_a_release(run, tmp_path, flags):
    out = tmp_path / "r"
    try:
        train.main(["--preset", "smoke", "--out", str(out), "--init", str(run), "--steps", "1", *flags])
    except ValueError as error:
        assert "\n" not in str(error) and not (out / "internal" / "ledger.jsonl").exists()
    else:
        privacy, plan = (files.read_json(out / name)
                         for name in ("release/privacy.json", "internal/plan.json"))
        assert len(read_rows(out)) == 1 and plan["numbers"].items() <= privacy.items()
        assert (
            privacy["epsilon"] <= privacy["epsilon_rdp"]
            and float(privacy[guarantee.GROUP]) >= privacy["epsilon"]
        )


def test_settings_of_sampling_are_checked_against_the_networks_of_init(run, tmp_path):
    """The preset's own settings would do; those of the networks that are reused decide."""
    shutil.copytree(run, tmp_path / "short")
    path = tmp_path / "short" / "public" / "ldm.pt"
    checkpoint = files.load(path)
    files.save({**checkpoint, "schedule": {**checkpoint["schedule"], "T": 50}}, path)
    with pytest.raises(ValueError, match="--sample-steps must lie in 1..50"):
        train.main(["--preset", "smoke", "--out", str(tmp_path / "r"), "--init", str(tmp_path / "short"),
                    "--sample-steps", "51"])
    assert not (tmp_path / "r").exists()


def test_diverged_public_networks_cost_no_private_step(run, tmp_path):
    for name, damage in (("vae.pt", {"scale": float("nan")}), ("ldm.pt", None)):
        shutil.copytree(run, tmp_path / name)
        path = tmp_path / name / "public" / name
        checkpoint = files.load(path)
        if damage is None:
            next(iter(checkpoint["model"].values())).view(-1)[0] = float("inf")
        files.save({**checkpoint, **(damage or {})}, path)
        with pytest.raises(ValueError, match="not finite"):
            train.main(["--preset", "smoke", "--out", str(tmp_path / f"r-{name}"), "--init",
                        str(tmp_path / name)])
        assert not (tmp_path / f"r-{name}" / "internal" / "ledger.jsonl").exists()


def test_a_diffusion_model_that_diverged_is_not_kept(run, tmp_path, monkeypatch):
    """Else --init with this run, the way to reuse its autoencoder, would take the broken network too."""
    trained = train.train_diffusion

    def diverged(*args):
        checkpoint = trained(*args)
        next(iter(checkpoint["model"].values())).view(-1)[0] = float("nan")
        return checkpoint

    monkeypatch.setattr(train, "train_diffusion", diverged)
    (tmp_path / "begun" / "public").mkdir(parents=True)
    shutil.copy(run / "public" / "vae.pt", tmp_path / "begun" / "public")
    with pytest.raises(ValueError, match="not finite"):
        train.main(["--preset", "smoke", "--out", str(tmp_path / "r"), "--init", str(tmp_path / "begun")])
    assert [path.name for path in (tmp_path / "r" / "public").glob("*.pt")] == ["vae.pt"]


def test_settings_of_sampling_may_change_on_resume_and_stay_otherwise(run, tmp_path, monkeypatch):
    out, seen = tmp_path / "r", []
    shutil.copytree(run, out)
    generate = sample.generate
    monkeypatch.setattr(sample, "generate", lambda *args, **how: seen.append(how) or generate(*args, **how))
    train.main(["--resume", "--out", str(out)])
    train.main(["--resume", "--out", str(out), "--sample-steps", "2", "--sample-eta", "1", "--guidance",
                "1.5"])
    assert [(how["steps"], how["eta"], how["guidance"])
            for how in seen] == 2 * [(4, 0.0, 1.0)] + 2 * [(2, 1.0, 1.5)]
    assert len(read_rows(out)) == 4


def test_command_line_of_the_real_program(run, tmp_path):
    def call(*args):
        done = subprocess.run([sys.executable, *args], capture_output=True, text=True)
        return done.returncode, done.stderr.strip().splitlines()

    assert call("train.py", "--no-such-flag")[0] == 2
    code, lines = call("sample.py", str(tmp_path))
    assert code == 2 and len(lines) == 1 and "there is no" in lines[0]
    (tmp_path / "model.pt").write_bytes(b"not a checkpoint")
    code, lines = call("sample.py", str(tmp_path))
    assert code == 2 and len(lines) == 1 and "damaged" in lines[0]


def test_ema_formula():
    average, values = [torch.zeros(2)], [torch.ones(2)]
    optim.update_ema(average, values, 0.9, 0)
    assert torch.allclose(average[0], torch.full((2,), 0.9))  # first step: d = 1/10
    optim.update_ema(average, values, 0.5, 1000)
    assert torch.allclose(average[0], torch.full((2,), 0.95))


def test_progress_can_be_watched_and_changes_nothing(run, tmp_path):
    flags = ["--preset", "smoke", "--init", str(run), "--steps", "2", "--insecure-seed", "1"]
    train.main([*flags, "--out", str(tmp_path / "a"), "--watch", "1"])
    train.main([*flags, "--out", str(tmp_path / "b")])  # no terminal: nothing is drawn
    strip = Image.open(tmp_path / "a" / "release" / "progress.png")
    assert strip.width > 3 * strip.height and not (tmp_path / "b" / "release" / "progress.png").exists()
    rows = np.asarray(strip.convert("L"), dtype=int)
    height = strip.height // 3  # the untuned model, and one row after each of two steps
    assert (rows[:height - 3] != rows[height:2 * height - 3]).any()
    a, b = (files.load(tmp_path / name / "release" / "model.pt")["model"] for name in "ab")
    assert all(torch.equal(a[key], b[key]) for key in a)
