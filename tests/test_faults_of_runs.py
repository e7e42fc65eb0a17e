"""Faults of runs, by kind: schedulers, file systems without locks, working folders, few held-out images."""
import errno
import fcntl
import json
import os
import signal
import stat
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import evaluate
import sample
import train
from extensions import audit
from support import command_line, files, run_folder, scored, settings, team

TINY = ["--preset", "smoke", "--vae-steps", "1", "--ldm-steps", "1", "--public-n", "80", "--private-n", "200",
        "--batch-size", "20", "--steps", "1", "--delta", "1e-3", "--sample-steps", "1", "--device", "cpu",
        "--precision", "float32", "--accountant", "rdp"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "r"
    train.main([*TINY, "--out", str(out)])
    return out


def test_one_command_begins_a_run_and_goes_on_with_it(run, tmp_path):
    out = tmp_path / "r"
    for _ in range(2):  # the second time it is finished, and stays as it is
        train.main([*TINY, "--init", str(run), "--resume", "auto", "--out", str(out)])
        assert len((out / "internal" / "ledger.jsonl").read_text().splitlines()) == 1
    # plain --resume: a mistyped --out begins no new run
    with pytest.raises(ValueError, match="settings.json"):
        train.main([*TINY, "--resume", "--out", str(tmp_path / "mistyped")])
    assert not (tmp_path / "mistyped").exists()


def test_public_images_that_change_before_a_run_goes_on(tmp_path, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (120, 28, 28), dtype=np.uint8)
    public, out = tmp_path / "public.npz", tmp_path / "r"
    np.savez(public, images=images, labels=np.arange(120) % 10)

    def stopped(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, "train_diffusion", stopped)
        train.main([*TINY, "--public", f"npz:{public}", "--steps", "0", "--out", str(out)])
    np.savez(public, images=images[::-1] // 2, labels=np.arange(120) % 10)
    with pytest.raises(ValueError, match="has other images than when this run began"):
        train.main(["--resume", "--out", str(out)])
    assert not (out / "public" / "ldm.pt").exists()
    known = (out / "internal" / "public.json").read_bytes()
    (out / "internal" / "public.json").unlink()
    with pytest.raises(ValueError, match="has other images than when this run began"):
        train.main(["--resume", "--out", str(out)])  # nobody knows any more which they were
    (out / "internal" / "public.json").write_bytes(known)
    np.savez(public, images=images, labels=np.arange(120) % 10)
    train.main(["--resume", "--out", str(out)])
    assert (out / "release" / "model.pt").exists()


@pytest.mark.parametrize("main, flag, name, right", [
    (sample.main, "--out", "x.jpg", "x.png"), (sample.main, "--npz", "x.zip", "x.npz"),
    (evaluate.main, "--out", "x.csv", "x.json"), (audit.main, "--out", "x.pdf", "x.png")])
def test_a_written_file_is_what_its_name_says(run, tmp_path, main, flag, name, right):
    with pytest.raises(ValueError, match=rf"{flag} .*{name}: what is written is .*{right}"):
        main([str(run), flag, str(tmp_path / name)])
    assert not (tmp_path / name).exists()
    sample.main([str(run), "--n", "2", "--steps", "1", "--out", "/dev/null"])


def test_more_samples_than_a_grid_shows_want_an_npz(run):
    with pytest.raises(ValueError, match="at most 1000 images; --npz"):
        sample.main([str(run), "--n", "1001"])


def test_signal_handlers_are_put_back(tmp_path):
    kinds = [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]
    before = [signal.getsignal(kind) for kind in kinds]
    with pytest.raises(ValueError):
        train.main([*TINY, "--resume", "--out", str(tmp_path / "none")])
    train.main([*TINY, "--steps", "0", "--out", str(tmp_path / "r")])
    assert [signal.getsignal(kind) for kind in kinds] == before


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGUSR1])
def test_what_a_scheduler_sends_is_a_wish_to_stop(kind):
    before = {number: signal.getsignal(number) for number in run_folder.SIGNALS}
    try:
        stop = run_folder.Stop()
        os.kill(os.getpid(), kind)
        assert stop.asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(number, tmp_path, monkeypatch):
    def none(*args):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", none)
    monkeypatch.setattr(run_folder.atexit, "register", lambda *args, **rest: None)
    run_folder.lock(tmp_path)
    with pytest.raises(ValueError, match="has no locks.*remove .*held") as refused:
        run_folder.lock(tmp_path)
    assert str(tmp_path) in str(refused.value) and "\n" not in str(refused.value)


def test_a_folder_that_holds_a_run_is_refused_by_a_dry_run_as_well(run):
    with pytest.raises(ValueError, match="already holds a run"):
        train.main([*TINY, "--dry-run", "--out", str(run)])


def test_a_folder_that_cannot_hold_a_run_is_refused_at_once(tmp_path, run, monkeypatch):
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is no folder that may be written to"):
        train.main([*TINY, "--dry-run", "--out", str(tmp_path / "file" / "r")])
    monkeypatch.setattr(run_folder.os, "access", lambda *a: False)  # a dry run writes nothing
    run_folder.refuse_used(tmp_path / "r", dry_run=True)
    with pytest.raises(ValueError, match="may be written to"):
        run_folder.refuse_used(tmp_path / "r")
    monkeypatch.undo()
    (tmp_path / "begun" / "public").mkdir(parents=True)
    (tmp_path / "begun" / "public" / "vae.pt").write_bytes(b"")
    with pytest.raises(ValueError, match="no internal/settings.json"):
        train.main([*TINY, "--out", str(tmp_path / "begun")])


def test_flags_that_contradict_nothing_are_no_reason_to_refuse(tmp_path, run, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (120, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "public.npz", images=images, labels=np.arange(120) % 10)
    out, public = tmp_path / "r", f"npz:{tmp_path / 'public.npz'}"
    train.main([*TINY, "--public", public, "--condition", "none", "--cond-drop", "0.2", "--out", str(out)])
    train.main([*TINY, "--public", public, "--condition", "none", "--cond-drop", "0.2", "--resume", "--out",
                str(out)])
    without = [word for word in TINY if word not in ("--public-n", "80")]
    train.main([*without, "--public", public, "--resume", "--out", str(out)])
    for preset in ("mnist", "digits"):  # the default's name as well
        with pytest.raises(ValueError, match="began with preset = smoke"):
            train.main(["--preset", preset, "--resume", "--out", str(out)])
    began = files.read_json(out / "internal" / "settings.json")
    files.write_json({**began, "condition": "class"}, out / "internal" / "settings.json")
    with pytest.raises(ValueError, match="began with cond_drop = 0.0"):  # 0 was asked for
        train.main(["--resume", "--cond-drop", "0.3", "--out", str(out)])


def test_runs_of_older_versions_go_on(tmp_path, run, monkeypatch):
    """They stored a mix as it was typed, a relative cache, and took private sets as public ones."""
    images = np.random.default_rng(0).integers(0, 256, (120, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(120) % 10)
    monkeypatch.chdir(tmp_path)
    asked = [*TINY, "--public", "strokes+npz:own.npz", "--cache", "kept"]
    train.main([*asked, "--out", "r"])
    path = tmp_path / "r" / "internal" / "settings.json"
    stored = files.read_json(path)
    assert stored["public"] == f"strokes+npz:{tmp_path / 'own.npz'}"
    assert stored["cache"] == str(tmp_path / "kept")
    files.write_json({**stored, "public": "strokes+npz:own.npz"}, path)
    train.main([*asked, "--resume", "auto", "--out", "r"])
    files.write_json({**stored, "public": "mnist10k", "private": "fashion"}, path)
    with pytest.raises(ValueError) as refused:  # for another reason: the data are not at hand
        train.main(["--resume", "--out", "r"])
    assert "for private images only" not in str(refused.value)


def begun(s):
    """The part of a run folder that --resume reads first."""
    (s.out / "internal").mkdir(parents=True)
    files.write_json(settings.plain(vars(s)), s.out / "internal" / "settings.json")


def test_a_resumed_run_keeps_where_its_data_lie_and_how_it_computes(tmp_path, monkeypatch):
    """What Ctrl-C says is enough to go on, `--resume --out DIR`. A flag may still change such a setting."""
    monkeypatch.chdir(tmp_path)
    asked = settings.parse(["--preset", "celeba64", "--data-root", "sets", "--cache", "kept", "--method",
                            "loop", "--watch", "2", "--device", "cpu", "--out", "r"])
    assert asked.data_root == str(tmp_path / "sets") and asked.micro_batch == 64  # not the 256 of `digits`
    begun(asked)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    resume = ["--resume", "--device", "cpu", "--out", str(tmp_path / "r")]
    again = settings.parse(resume)
    changed = settings.parse([*resume, "--data-root", "/new", "--micro-batch", "8"])
    for key in run_folder.KEPT - {"micro_batch"}:
        assert getattr(again, key) == getattr(asked, key), key
    assert again.micro_batch == 64
    assert (changed.data_root, changed.micro_batch, changed.cache) == ("/new", 8, asked.cache)
    run_folder.remember(changed)  # what a resumed run does
    third = settings.parse(resume)
    assert (third.data_root, third.micro_batch, third.method) == ("/new", 8, "loop")
    monkeypatch.setattr(settings.hardware, "check_device", lambda device: None)
    assert settings.parse([*resume, "--device", "cuda"]).micro_batch == 8


def test_a_run_begun_on_a_cpu_takes_many_images_at_a_time_on_a_gpu(tmp_path, monkeypatch):
    asked = settings.parse(["--preset", "celeba64", "--device", "cpu", "--out", str(tmp_path)])
    begun(asked)
    monkeypatch.setattr(settings.hardware, "check_device", lambda device: None)
    assert settings.parse(["--resume", "--device", "cuda", "--out", str(tmp_path)]).micro_batch is None
    assert settings.parse(["--resume", "--device", "cpu", "--out", str(tmp_path)]).micro_batch == 64


def test_a_resumed_run_refuses_another_seed_the_default_too(tmp_path):
    begun(settings.parse(["--seed", "1", "--device", "cpu", "--out", str(tmp_path)]))
    assert settings.parse(["--resume", "--seed", "1", "--out", str(tmp_path)]).seed == 1
    with pytest.raises(ValueError, match="this run began with seed = 1, not 0"):
        settings.parse(["--resume", "--seed", "0", "--out", str(tmp_path)])


def test_an_empty_data_root_is_the_default(monkeypatch):
    assert settings.parse(["--data-root", "", "--cache", ""]).data_root is None


def test_public_classes_of_another_set_than_strokes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="public_classes only applies to strokes"):
        train.main([*TINY, "--public", "garments", "--public-classes", "letters", "--out",
                    str(tmp_path / "r")])


def test_a_release_of_a_data_set_that_is_not_there_is_refused_by_name(tmp_path):
    release = SimpleNamespace(data={"public": "strokes", "private": "mine"})
    with pytest.raises(ValueError, match="data set 'mine'"):
        scored.sources(release, tmp_path)


def test_a_file_system_that_cannot_sync_folders_costs_no_step(tmp_path, monkeypatch):
    """The row is in the ledger by then: an error would spend the step for nothing."""
    sync = files.os.fsync

    def refused(handle):
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        sync(handle)

    monkeypatch.setattr(files.os, "fsync", refused)
    files.append_row({"step": 0}, tmp_path / "ledger.jsonl")
    files.write_json({"a": 1}, tmp_path / "plan.json")
    assert files.read_json(tmp_path / "ledger.jsonl") == {"step": 0}


def test_too_few_public_classes_are_refused_before_anything_is_made(tmp_path, run):
    images = np.random.default_rng(0).integers(0, 256, (200, 28, 28), dtype=np.uint8)
    np.savez(tmp_path / "own.npz", images=images, labels=np.arange(200) % 50)
    for more in ([], ["--dry-run"]):
        with pytest.raises(ValueError, match="classes, fewer than the 50 private ones"):
            train.main([*TINY, "--private", f"npz:{tmp_path / 'own.npz'}", "--private-n", "100", "--classes",
                        "50", "--init", str(run), "--out", str(tmp_path / "r"), *more])
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize("error, known", [
    (MemoryError(), True), (torch.OutOfMemoryError("CUDA out of memory"), True),
    (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), True),
    (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory\nframe"), True),
    (RuntimeError("unable to mmap: Cannot allocate memory (12)"), True),
    (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    (RuntimeError("required rank 4 tensor to use channels_last memory format"), False)])
def test_what_is_called_out_of_memory(error, known, capsys):
    def fails():
        raise error

    with pytest.raises(SystemExit if known else RuntimeError) as left:
        command_line.run_cli(fails)
    lines = capsys.readouterr().err.splitlines()
    assert not known and lines == [] or (
        left.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: out of memory"))


def test_several_processes_are_not_put_on_one_card(monkeypatch):
    monkeypatch.setattr(team, "world", lambda: 2)
    with pytest.raises(ValueError, match="say --device cuda"):
        team.own_device("cuda:0")


def test_paths_of_sets_are_stored_whole(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    s = settings.parse([*TINY, "--private", "folder:mine"])
    assert s.private == f"folder:{tmp_path / 'mine'}"


def test_the_plan_names_the_classes_and_counts_what_is_tuned(run, capsys):
    train.main([*TINY, "--init", str(run), "--dry-run"])
    told = capsys.readouterr().out
    assert "classes        10, these names are published: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9" in told
    tuned = json.loads((run / "release" / "privacy.json").read_text())["trained_parameters"]
    assert f"attention: {tuned:,} of" in told  # the embedder has fewer rows than in the public stages


def test_few_held_out_images_cost_one_metric_only(run, monkeypatch, capsys):
    held_out = scored.held_out_sets

    def few(*args):
        (name, real), *_ = held_out(*args).items()
        real.images, real.labels = real.images[:3], real.labels[:3]
        return {name: real}

    monkeypatch.setattr(scored, "held_out_sets", few)
    evaluate.main([str(run), "--n", "20", "--steps", "1", "--classifiers", "logreg", "--device", "cpu"])
    assert "too few for a Frechet distance" in capsys.readouterr().out
    result = files.read_json(run / "internal" / "evaluation.json")
    assert result["distance"] is None and "logreg" in result["accuracy"]
