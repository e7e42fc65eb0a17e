"""Crash safety of the private stage: killed at random moments and at each named point of a step, resumed until finished.

What must hold whatever happens: nothing that is read again is torn, every step whose noisy result ever existed has its
ledger row, the randomness is fresh, and epsilon of the whole ledger stays within the target.
"""
import contextlib
import errno
import fcntl
import hashlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import accountant
import data
import dp_sgd
import folder
import sample
import train
from support import calculator

TINY = ["--preset", "smoke", "--public-n", "40", "--private-n", "100", "--vae-steps", "2", "--ldm-steps", "2", "--vae-batch",
        "8", "--ldm-batch", "8", "--batch-size", "10", "--accountant", "rdp", "--sample-steps", "1"]
FREE = ["--precision", "float32", "--micro-batch", "32"]  # not part of a run's settings: given again on resume


@pytest.fixture(scope="module")
def public(tmp_path_factory):
    """A run whose public stages the others start from."""
    out = tmp_path_factory.mktemp("runs") / "public"
    train.main([*TINY, *FREE, "--steps", "0", "--out", str(out)])
    return out


def command(out, public, steps):
    """What a user would type next: resume where a run has begun, else start it in an empty folder."""
    if (out / "internal" / "settings.json").exists():
        return ["--resume", "--out", str(out), *FREE]
    shutil.rmtree(out, ignore_errors=True)
    return [*TINY, *FREE, "--steps", str(steps), "--init", str(public), "--out", str(out)]


def ledger(out):
    path = out / "internal" / "ledger.jsonl"
    return path.read_bytes() if path.exists() else b""


def check_whole(out, spent):
    """What must hold at any moment. spent: how often noise was ever added."""
    rows = accountant.ledger_rows(ledger(out).decode(), folder.read_json(out / "internal" / "plan.json")) if ledger(out) else []
    assert len(rows) >= spent
    if (out / "internal" / "state.pt").exists():
        assert folder.load(out / "internal" / "state.pt")["done"] <= len(rows)
    if (out / "release" / "model.pt").exists():
        sample.load_release(out)
    return rows


def check_finished(out, steps):
    privacy = folder.read_json(out / "release" / "privacy.json")
    counted, _ = calculator.read_run(out)
    assert sum(counted.values()) == privacy["steps"] == steps
    plan = folder.read_json(out / "internal" / "plan.json")
    rows = accountant.ledger_rows(ledger(out).decode(), plan)
    assert accountant.epsilon_of_ledger(rows, 1e-5) <= privacy["epsilon"] <= plan["epsilon"] <= 10
    assert sample.generate(sample.load_release(out), [1], steps=1, progress=False).shape == (1, 1, 28, 28)
    assert not list(out.rglob("*.tmp"))


# ------------------------------------------------------------------------------------------------------ random moments


def attempt(args, diary):
    """One run in a forked process. The diary outlives a kill: a line per fresh generator (its state) and per noise (its hash)."""
    torch.set_num_threads(1)
    os.close(1), os.close(2)
    os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
    file = os.open(diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    fresh, privatise = dp_sgd.fresh_generator, dp_sgd.privatise

    def watched_generator(device="cpu"):
        generator = fresh(device)
        os.write(file, b"state " + hashlib.sha256(generator.get_state().numpy()).hexdigest().encode() + b"\n")
        return generator

    def watched_privatise(*a):
        noisy = privatise(*a)
        os.write(file, b"noise " + hashlib.sha256(noisy[0].numpy()).hexdigest().encode() + b"\n")
        return noisy

    dp_sgd.fresh_generator, dp_sgd.privatise = watched_generator, watched_privatise
    train.main(args)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="reads CPU times from /proc")
def test_killed_twenty_times_at_random_moments(public, tmp_path):
    steps, out, diary = 40, tmp_path / "run", tmp_path / "diary"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["train"])  # imports once; every attempt is a fork of it
    kills, before, rng = 0, b"", random.Random()
    for _ in range(60):
        process = context.Process(target=attempt, args=(command(out, public, steps), diary))
        process.start()
        # In CPU seconds, so that another load on the machine does not matter. Every second kill counts them from where the
        # private stage begins (the diary grows), so that ten kills at least meet it. After 20 kills it may finish.
        moment, begin, size = rng.uniform(0, 0.8), None if kills % 2 else 0.0, diary.stat().st_size if diary.exists() else 0
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ended; the second, between open and read
            while process.is_alive() and (kills == 20 or begin is None or cpu_seconds(process.pid) < begin + moment):
                if begin is None and diary.exists() and diary.stat().st_size > size:
                    begin = cpu_seconds(process.pid)
                time.sleep(0.004)
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL)
        kills += process.exitcode != 0
        lines = diary.read_text().splitlines() if diary.exists() else []
        if (out / "internal" / "plan.json").exists():
            check_whole(out, sum(line.startswith("noise") for line in lines))
        assert ledger(out).startswith(before)  # append-only, whatever happens
        before = ledger(out)
        if process.exitcode == 0 and kills >= 20:
            break
    assert kills == 20
    check_finished(out, steps)
    assert len(lines) == len(set(lines)) and sum(line.startswith("state") for line in lines) >= 6  # nothing is repeated
    assert folder.load(out / "internal" / "state.pt")["done"] <= sum(line.startswith("noise") for line in lines) <= steps


# -------------------------------------------------------------------------------------------------- each point of a step

EXCEPTIONS = (SystemExit(1), KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device"))


def on_second_call(f, error, before=None, when=lambda *a: True):
    """f, but its second call raises the error, after what `before` does."""
    calls = []

    def wrapped(*args, **kwargs):
        if when(*args):
            calls.append(1)
        if len(calls) == 2 and when(*args):
            if before:
                before(*args)
            raise error
        return f(*args, **kwargs)
    return wrapped


def half_a_row(row, path):
    with open(path, "a") as file:
        file.write(json.dumps(row)[:20])


def half_a_checkpoint(value, file):
    file.write(b"PK\3\4 half a checkpoint")


def is_state(value, *rest):
    return isinstance(value, dict) and "done" in value


POINTS = {  # point: (object, name, what it does before it fails, which calls count, rows and updates on the disk afterwards)
    "accumulate": (dp_sgd.DPSGD, "accumulate", None, lambda *a: len(a[2]) > 0, 1, 1),
    "append_row": (folder, "append_row", half_a_row, lambda row, path: path.name == "ledger.jsonl", 2, 1),
    "privatise": (dp_sgd, "privatise", None, lambda *a: True, 2, 1),
    "optimizer": (torch.optim.Adam, "step", None, lambda *a: True, 2, 1),
    "update_ema": (train, "update_ema", None, lambda *a: True, 2, 1),
    "save": (torch, "save", half_a_checkpoint, is_state, 2, 1),
    "log": (folder, "append_row", half_a_row, lambda row, path: path.name == "log.jsonl", 2, 2),
    "sampling": (data, "save_grid", None, lambda images, path, *a: "release" in str(path), 3, 3),
}


@pytest.mark.parametrize("number, point", [*enumerate(POINTS)])
def test_a_crash_at_each_point_of_a_step(number, point, public, tmp_path, monkeypatch):
    module, name, before, when, rows, done = POINTS[point]
    out, error = tmp_path / "run", EXCEPTIONS[number % 3]
    monkeypatch.setattr(sample, "generate", lambda release, labels, **how: torch.zeros(len(labels), 1, 28, 28, dtype=torch.uint8))
    with monkeypatch.context() as patch, pytest.raises(type(error)):
        patch.setattr(module, name, on_second_call(getattr(module, name), error, before, when))
        train.main(command(out, public, 3))
    assert len(check_whole(out, 0)) == rows and folder.load(out / "internal" / "state.pt")["done"] == done
    assert not list(out.rglob("*.tmp"))  # an exception, unlike a kill, leaves nothing behind
    (out / "release" / ".model.pt.1.tmp").write_bytes(b"what a kill leaves behind")
    train.main(command(out, public, 3))
    check_finished(out, 3)
    assert folder.load(out / "internal" / "state.pt")["done"] == 3 - (rows - done)  # what a crash has lost stays spent


def test_a_full_disk_is_one_line(public, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(folder, "append_row", on_second_call(folder.append_row, EXCEPTIONS[2]))
    with pytest.raises(SystemExit) as left:
        folder.run_cli(lambda: train.main(command(tmp_path / "run", public, 3)))
    assert left.value.code == 2 and "No space left" in capsys.readouterr().err.strip().splitlines()[-1]


# -------------------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def stopped(public, tmp_path_factory):
    """A run of three steps, stopped after one."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    step = on_second_call(dp_sgd.DPSGD.accumulate, KeyboardInterrupt(), when=lambda *a: len(a[2]) > 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dp_sgd.DPSGD, "accumulate", step)
        train.main(command(out, public, 3))
    return out


@pytest.mark.parametrize("flag, value", [("batch-size", "11"), ("sigma", "9"), ("clipping", "automatic"), ("tune", "all"),
                                         ("private", "mnist"), ("private-n", "99"), ("steps", "2"), ("from-block", "1"),
                                         ("epsilon", "9"), ("delta", "1e-6"), ("accountant", "pld"), ("lr", "1e-3")])
def test_resume_refuses_a_changed_flag(stopped, flag, value):
    with pytest.raises(ValueError, match=f"began with {flag.replace('-', '_')} = "):
        train.main(["--resume", "--out", str(stopped), *FREE, f"--{flag}", value])


@pytest.mark.parametrize("setting, value, named", [("batch_size", 11, "q"), ("sigma", 9.0, "sigma"), ("tune", "all", "tuned"),
                                                   ("clipping", "per-layer", "clipping"), ("clip_norm", 0.2, "clip_norm"),
                                                   ("private_n", 101, "n"), ("steps", 4, "steps")])
def test_resume_refuses_changed_settings(stopped, setting, value, named, tmp_path, monkeypatch):
    """The settings of the run folder are edited: the plan, which lies beside the ledger, does not fit any more."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    settings = folder.read_json(out / "internal" / "settings.json")
    folder.write_json({**settings, setting: value}, out / "internal" / "settings.json")
    monkeypatch.setattr(train, "tune_privately", None)  # not even begun
    with pytest.raises(ValueError, match=f"cannot resume: '{named}'"):
        train.main(["--resume", "--out", str(out), *FREE])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_cannot_train_in_one_folder(tmp_path):
    folder.prepare(tmp_path / "run", resume=False)  # and twice in one process is no conflict
    folder.prepare(tmp_path / "run", resume=True)
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    locked, hold = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        file = os.open(tmp_path / "other" / ".lock", os.O_RDWR)
        fcntl.lockf(file, fcntl.LOCK_EX)
        os.write(locked[1], b"x")
        os.read(hold[0], 1)
        os._exit(0)
    os.read(locked[0], 1)
    with pytest.raises(ValueError, match="another process"):
        folder.prepare(tmp_path / "other", resume=True)
    os.kill(pid, signal.SIGKILL)  # the lock dies with its holder, however that ends
    os.waitpid(pid, 0)
    folder.prepare(tmp_path / "other", resume=True)
