"""Crash safety of the private stage: killed at random and at each named point of a step, resumed to the end.

What must hold whatever happens: nothing that is read again is torn, every step whose noisy result ever
existed has its ledger row, the randomness is fresh, and epsilon of the whole ledger stays within the target.
"""
import argparse
import contextlib
import errno
import fcntl
import hashlib
import itertools
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
import dp_sgd
import optim
import sample
import train
from datasets import pixels
from support import calculator, command_line, files, guarantee, progress, randomness, rounding, run_folder

TINY = ["--preset", "smoke", "--public-n", "40", "--private-n", "100", "--vae-steps", "2", "--ldm-steps", "2",
        "--vae-batch",
        "8", "--ldm-batch", "8", "--batch-size", "10", "--accountant", "rdp", "--sample-steps", "1"]
# not part of a run's settings: given again on resume
FREE = ["--precision", "float32", "--micro-batch", "32"]


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
    rows = files.ledger_rows(ledger(out).decode(),
                                  files.read_json(out / "internal" / "plan.json")) if ledger(out) else []
    assert len(rows) >= spent
    if (out / "internal" / "state.pt").exists():
        assert files.load(out / "internal" / "state.pt")["done"] <= len(rows)
    if (out / "release" / "model.pt").exists():
        sample.load_release(out)
    return rows


def check_finished(out, steps):
    privacy = files.read_json(out / "release" / "privacy.json")
    counted, _ = calculator.read_run(out)
    assert sum(counted.values()) == privacy["steps"] == steps
    plan = files.read_json(out / "internal" / "plan.json")
    rows = files.ledger_rows(ledger(out).decode(), plan)
    assert accountant.epsilon_of_ledger(rows, 1e-5) <= privacy["epsilon"] <= plan["epsilon"] <= 10
    assert sample.generate(sample.load_release(out), [1], steps=1, progress=False).shape == (1, 1, 28, 28)
    assert not list(out.rglob("*.tmp"))


# --------------------------------------------------------------------------------------------- random moments


def attempt(args, diary):
    """One run in a forked process. Its diary outlives a kill: generators' states, hashes of the noise."""
    torch.set_num_threads(1)
    os.close(1), os.close(2)
    os.open(os.devnull, os.O_WRONLY), os.open(os.devnull, os.O_WRONLY)
    file = os.open(diary, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    fresh, privatise = randomness.fresh_generator, dp_sgd.privatise

    def watched_generator(device="cpu"):
        generator = fresh(device)
        os.write(file, b"state " + hashlib.sha256(generator.get_state().numpy()).hexdigest().encode() + b"\n")
        return generator

    def watched_privatise(*a):
        noisy = privatise(*a)
        os.write(file, b"noise " + hashlib.sha256(noisy[0].numpy()).hexdigest().encode() + b"\n")
        return noisy

    randomness.fresh_generator, dp_sgd.privatise = watched_generator, watched_privatise
    train.main(args)


def cpu_seconds(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


@pytest.mark.skipif(sys.platform != "linux", reason="reads CPU times from /proc")
def test_killed_eight_times_at_random_moments(public, tmp_path):
    steps, out, diary = 40, tmp_path / "run", tmp_path / "diary"
    context = multiprocessing.get_context("forkserver")  # imports once; every attempt is a fork of it
    kills, before, rng = 0, b"", random.Random()
    for _ in range(60):
        process = context.Process(target=attempt, args=(command(out, public, steps), diary))
        process.start()
        # In CPU seconds, so that another load on the machine does not matter. Every second kill counts them
        # from where the private stage begins (the diary grows), so that four kills at least meet it. After 8
        # kills it may finish.
        moment, begin = rng.uniform(0, 0.8), None if kills % 2 else 0.0
        size = diary.stat().st_size if diary.exists() else 0
        # it ended; the second, between open and read
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            while process.is_alive() and (kills == 8 or begin is None or cpu_seconds(process.pid) < begin
                                          + moment):
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
        if process.exitcode == 0 and kills >= 8:
            break
    assert kills == 8
    check_finished(out, steps)
    # nothing is repeated
    assert len(lines) == len(set(lines)) and sum(line.startswith("state") for line in lines) >= 4
    assert files.load(out / "internal" / "state.pt")["done"] <= sum(line.startswith("noise")
                                                                    for line in lines) <= steps


# --------------------------------------------------------------------------------------- each point of a step

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
    return isinstance(value, dict) and value.get("done", 0) > 0


# point: (object, name, what it does before it fails, which calls count, rows and updates on disk afterwards)
POINTS = {
    "accumulate": (dp_sgd.DPSGD, "accumulate", None, lambda *a: len(a[2]) > 0, 1, 1),
    "append_row": (files, "append_row", half_a_row, lambda row, path: path.name == "ledger.jsonl", 2, 1),
    "privatise": (dp_sgd, "privatise", None, lambda *a: True, 2, 1),
    "optimizer": (torch.optim.Adam, "step", None, lambda *a: True, 2, 1),
    "update_ema": (optim, "update_ema", None, lambda *a: True, 2, 1),
    "save": (torch, "save", half_a_checkpoint, is_state, 2, 1),
    "log": (files, "append_row", half_a_row, lambda row, path: path.name == "log.jsonl", 2, 2),
    "sampling": (pixels, "save_grid", None, lambda images, path, *a: "release" in str(path), 3, 3),
}


@pytest.mark.parametrize("number, point", [*enumerate(POINTS)])
def test_a_crash_at_each_point_of_a_step(number, point, public, tmp_path, monkeypatch):
    module, name, before, when, rows, done = POINTS[point]
    out, error = tmp_path / "run", EXCEPTIONS[number % 3]
    monkeypatch.setattr(sample, "generate", lambda release, labels,
                        **how: torch.zeros(len(labels), 1, 28, 28, dtype=torch.uint8))
    with monkeypatch.context() as patch, pytest.raises((type(error), ValueError)):
        patch.setattr(module, name, on_second_call(getattr(module, name), error, before, when))
        train.main(command(out, public, 3))
    assert len(check_whole(out, 0)) == rows and files.load(out / "internal" / "state.pt")["done"] == done
    assert not list(out.rglob("*.tmp"))  # an exception, unlike a kill, leaves nothing behind
    (out / "release" / ".model.pt.1.tmp").write_bytes(b"what a kill leaves behind")
    train.main(command(out, public, 3))
    check_finished(out, 3)
    # what a crash has lost stays spent
    assert files.load(out / "internal" / "state.pt")["done"] == 3 - (rows - done)


def test_a_full_disk_is_one_line(public, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "append_row", on_second_call(files.append_row, EXCEPTIONS[2]))
    with pytest.raises(SystemExit) as left:
        command_line.run_cli(lambda: train.main(command(tmp_path / "run", public, 3)))
    assert left.value.code == 2 and "No space left" in capsys.readouterr().err.strip().splitlines()[-1]


def test_a_disk_without_room_for_the_state_costs_no_step(public, tmp_path, monkeypatch):
    save = torch.save

    def full(value, *rest):
        if isinstance(value, dict) and "done" in value:
            raise EXCEPTIONS[2]
        save(value, *rest)

    for _ in range(3):  # a command that begins again whenever it fails
        with monkeypatch.context() as patch, pytest.raises((OSError, ValueError), match="No space left"):
            patch.setattr(torch, "save", full)
            train.main(command(tmp_path / "run", public, 3))
    assert not ledger(tmp_path / "run")
    train.main(command(tmp_path / "run", public, 3))
    check_finished(tmp_path / "run", 3)


@pytest.mark.parametrize("error", EXCEPTIONS)
def test_a_crash_before_the_first_step_costs_none(public, tmp_path, monkeypatch, error):
    out = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises((type(error), ValueError)):
        patch.setattr(progress.Private, "save", lambda self: (_ for _ in ()).throw(error))
        train.main(command(out, public, 3))
    assert not ledger(out) and not (out / "internal" / "state.pt").exists()
    train.main(command(out, public, 3))
    check_finished(out, 3)


def test_a_public_stage_is_not_forgotten_before_its_result_is_written(tmp_path, monkeypatch):
    out, save = tmp_path / "run", files.save
    args = [*TINY, *FREE, "--steps", "0", "--vae-steps", "3", "--out", str(out)]

    def full(value, path):
        if path.name == "vae.pt":
            raise EXCEPTIONS[2]
        save(value, path)

    with monkeypatch.context() as patch, pytest.raises(OSError):
        patch.setattr(files, "save", full)
        patch.setattr(progress.time, "monotonic", itertools.count(0, 100).__next__)  # saved after each step
        train.main(args)
    state = files.load(out / "internal" / "vae_state.pt")
    assert state["step"] == 3
    monkeypatch.setattr(progress.Public, "show", None)  # no step of stage 1 is made again
    with pytest.raises(TypeError):  # of stage 2
        train.main(["--resume", "--out", str(out), *FREE])
    average = dict(zip(state["model"], state["average"], strict=False))
    assert not (out / "internal" / "vae_state.pt").exists() and average
    weights = files.load(out / "public" / "vae.pt")["state"]
    assert all(torch.equal(a, b) for a, b in zip(state["average"], weights.values(), strict=True))


# --------------------------------------------------------------------------------------------------- resuming


@pytest.fixture(scope="module")
def stopped(public, tmp_path_factory):
    """A run of three steps, stopped after one."""
    out = tmp_path_factory.mktemp("runs") / "stopped"
    step = on_second_call(dp_sgd.DPSGD.accumulate, KeyboardInterrupt(), when=lambda *a: len(a[2]) > 0)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dp_sgd.DPSGD, "accumulate", step)
        train.main(command(out, public, 3))
    return out


@pytest.mark.parametrize("flag, value", [("batch-size", "11"), ("sigma", "9"), ("clipping", "automatic"),
                                         ("tune", "all"),
                                         ("private", "mnist"), ("private-n", "99"), ("steps", "2"),
                                         ("from-block", "1"),
                                         ("epsilon", "9"), ("delta", "1e-6"), ("accountant", "pld"),
                                         ("lr", "1e-3")])
def test_resume_refuses_a_changed_flag(stopped, flag, value):
    with pytest.raises(ValueError, match=f"began with {flag.replace('-', '_')} = "):
        train.main(["--resume", "--out", str(stopped), *FREE, f"--{flag}", value])


@pytest.mark.parametrize("setting, value, named",
                         [("batch_size", 11, "q"), ("sigma", 9.0, "sigma"), ("tune", "all", "tuned"),
                                                   ("clipping", "per-layer", "clipping"),
                                                   ("clip_norm", 0.2, "clip_norm"),
                                                   ("private_n", 101, "n"), ("steps", 4, "steps")])
def test_resume_refuses_changed_settings(stopped, setting, value, named, tmp_path, monkeypatch):
    """The settings of the run folder are edited: the plan beside the ledger does not fit any more."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    settings = files.read_json(out / "internal" / "settings.json")
    files.write_json({**settings, setting: value}, out / "internal" / "settings.json")
    monkeypatch.setattr(train, "tune_privately", None)  # not even begun
    with pytest.raises(ValueError, match=f"cannot resume: '{named}'"):
        train.main(["--resume", "--out", str(out), *FREE])


def test_the_stored_plan_rules_when_another_machine_finds_other_last_digits(stopped, tmp_path, monkeypatch):
    """Another CPU or numpy calibrates sigma a little differently; a new run instead would spend twice."""
    out, calibrate = tmp_path / "run", accountant.noise_multiplier
    shutil.copytree(stopped, out)
    began = files.read_json(out / "internal" / "plan.json")
    monkeypatch.setattr(accountant, "noise_multiplier", lambda *args: calibrate(*args) * (1 + 1e-12))
    train.main(["--resume", "--out", str(out), *FREE])
    rows = [json.loads(line) for line in ledger(out).splitlines()]
    assert [row["sigma"] for row in rows] == 3 * [began["sigma"]] and files.read_json(
        out / "internal" / "plan.json"
    ) == began
    assert files.read_json(out / "release" / "privacy.json")["epsilon"] == began["epsilon"]


@pytest.mark.parametrize("change", [{"sigma": 0.5}, {"sigma": 50.0}, {"epsilon": 9.9}, {"epsilon": 10.1},
                                    {"q": 0.05},
                                    {"delta": 1e-6}, {"n": 101}, {"steps": 2}, {"sigma": 1e-200},
                                    {"sigma": None},
                                    {"sigma": 0.0, "epsilon": "inf"}, {"numbers": {}}, {"numbers": 3}])
def test_a_stored_plan_that_does_not_cost_what_it_states_is_refused(stopped, change, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    plan = files.read_json(out / "internal" / "plan.json")
    files.write_json({**plan, **change}, out / "internal" / "plan.json")
    monkeypatch.setattr(train, "tune_privately", None)  # not even begun
    with pytest.raises(ValueError) as refused:
        train.main(["--resume", "--out", str(out), *FREE])
    assert "\n" not in str(refused.value) and "start a new run" not in str(refused.value)
    assert "add its epsilon" in str(refused.value) or "damaged" in str(refused.value)


def test_a_resumed_run_shows_its_epsilon_at_once(stopped, tmp_path, monkeypatch):
    out, shown, bar = tmp_path / "run", [], progress.tqdm

    class Watched(bar):
        def set_postfix(self, values=None, **rest):
            shown.append((self.n, {**(values or {}), **rest}))
            super().set_postfix(values, **rest)

    shutil.copytree(stopped, out)
    monkeypatch.setattr(progress, "tqdm", Watched)
    train.main(["--resume", "--out", str(out), *FREE])
    plan = files.read_json(out / "internal" / "plan.json")
    spent = [accountant.epsilon(plan["q"], plan["sigma"], steps, 1e-5) for steps in range(4)]
    lost = len(ledger(stopped).splitlines())
    assert lost == 1 and shown[0] == (1, {"epsilon": rounding.round_up(spent[1])})
    assert [float(values["epsilon"]) >= true for (_, values),
            true in zip(shown, spent[1:], strict=True)] == 3 * [True]


def test_the_epsilon_on_the_way_is_never_below_the_true_one(public, tmp_path):
    """It is computed a hundred times in a run, not at each of 250 steps. In between the later is shown."""
    train.main([*TINY, *FREE, "--steps", "250", "--tune", "embedder", "--batch-size", "1", "--init",
                str(public), "--out",
                str(tmp_path / "run")])
    plan = files.read_json(tmp_path / "run" / "internal" / "plan.json")
    log = [json.loads(line)
           for line in (tmp_path / "run" / "internal" / "log.jsonl").read_text().splitlines()]
    assert len(log) == 250 and log[-1]["epsilon"] == plan["epsilon"] and len({row["epsilon"]
                                                                              for row in log}) == 125
    for step in range(0, 250, 7):
        assert log[step]["epsilon"] >= accountant.epsilon(plan["q"], plan["sigma"], step + 1, 1e-5)


# ---------------------------------------------------------------- what is left of a run, in every combination

T = 4
ROWS = [json.dumps({"step": i, "q": 0.1, "sigma": 2.0}) + "\n" for i in range(T)]
PLAN = {"n": 100, "q": 0.1, "steps": T, "sigma": 2.0, "delta": 1e-5, "epsilon": 1.0, "numbers": {}}
LEFT = {  # file: {form: what it tells of steps spent, None where it cannot be read}
    "internal/ledger.jsonl": {"absent": 0, "begun": 1, "cut": 2, "torn": T, "whole": T},
    "internal/state.pt": {"absent": 0, "early": 1, "whole": T, "damaged": None},
    "internal/plan.json": {"absent": 0, "whole": 0, "damaged": None},
    "release/privacy.json": {"absent": 0, "whole": T, "damaged": None},
    "release/model.pt": {"absent": 0, "there": T},
}


def write_left(out, forms):
    """A run folder of T steps with these forms of its files."""
    for part in run_folder.PARTS:
        (out / part).mkdir(parents=True)
    texts = {"begun": "".join(ROWS[:1]), "cut": "".join(ROWS[:2]), "torn": "".join(ROWS)[:-20],
             "whole": "".join(ROWS)}
    if forms["internal/ledger.jsonl"] != "absent":
        (out / "internal/ledger.jsonl").write_text(texts[forms["internal/ledger.jsonl"]])
    if forms["internal/state.pt"] in ("early", "whole"):
        files.save({"done": LEFT["internal/state.pt"][forms["internal/state.pt"]]}, out / "internal/state.pt")
    for name, value in (("internal/plan.json", PLAN), ("release/privacy.json", {"steps": T})):
        if forms[name] == "whole":
            files.write_json(value, out / name)
    if forms["release/model.pt"] == "there":
        (out / "release/model.pt").write_bytes(b"x")
    for name, form in forms.items():
        if form == "damaged":
            (out / name).write_bytes(b'{"ste')


def may_go_on(ledger, state, plan, privacy, model):
    """What is allowed, as a list: all else is refused."""
    released = privacy != "absent" or model != "absent"
    if "damaged" in (state, plan):
        return False
    if released:  # drawn anew from the checkpoint, with the whole ledger
        return (ledger, state, plan) in [(rows, done, "whole") for rows in ("torn", "whole")
                                         for done in ("early", "whole")]
    return (ledger, state, plan) in [
        ("absent", "absent", "absent"), ("absent", "absent", "whole"),  # no private step yet
        # killed before the first checkpoint: rows stay spent
        ("begun", "absent", "whole"), ("cut", "absent", "whole"),
        ("begun", "early", "whole"), ("cut", "early", "whole"),  # killed on the way
        # killed before the release
        *[(rows, done, "whole") for rows in ("torn", "whole") for done in ("early", "whole")]]


@pytest.mark.parametrize("forms", [dict(zip(LEFT, forms, strict=True))
                                   for forms in itertools.product(*LEFT.values())],
                         ids=lambda forms: "-".join(forms.values()))
def test_resuming_never_loses_count_and_never_replaces_a_release_by_less(forms, tmp_path):
    out = tmp_path / "run"
    write_left(out, forms)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    s = argparse.Namespace(resume=True, out=out, steps=T, batch_size=10, delta=1e-5, sigma=2.0, epsilon=10.0,
                           accountant="rdp",
                           fast_noise=False, insecure_seed=None)
    error = None
    try:
        with pytest.MonkeyPatch.context() as patch:  # the numbers are slow, and not at stake
            patch.setattr(accountant, "cost", lambda *a: 1.0)
            patch.setattr(guarantee, "privacy_numbers", lambda *a: {})
            plan = guarantee.privacy_plan(s, 100)
        run_folder.check_spent(out, plan)
    except ValueError as refused:
        error = str(refused)
    assert (error is None) == may_go_on(*forms.values()), error
    if error is None:  # the same again, as what must hold: every file that tells of steps is heard
        told = [LEFT[name][form] for name, form in forms.items()]
        assert told[0] >= max(t or 0 for t in told) and (told[0] < T or told[1])
    else:
        assert "\n" not in error and "start a new run" not in error and "delete" not in error
        changed = [path for path, content in before.items() if path.read_bytes() != content]
        assert changed in ([], [out / "internal/ledger.jsonl"])  # at most the line end of a torn row


def test_the_log_too_knows_of_steps(tmp_path):
    write_left(tmp_path, dict.fromkeys(LEFT, "absent") | {"internal/plan.json": "whole"})
    run_folder.check_spent(tmp_path, PLAN)
    (tmp_path / "internal" / "log.jsonl").write_text("{}\n{}\n")
    with pytest.raises(ValueError, match="internal/log.jsonl tells of 2 private steps; rows are missing"):
        run_folder.check_spent(tmp_path, PLAN)


def test_a_state_that_is_lost_on_the_way_is_refused(stopped, tmp_path):
    """Else the run would go on from the untuned model with the rest of the budget, in silence."""
    for state in (None, {"done": 0}):
        out = tmp_path / str(state is None)
        shutil.copytree(stopped, out)
        (out / "internal" / "log.jsonl").write_text("{}\n")
        (out / "internal" / "state.pt").unlink(missing_ok=True)
        if state:
            files.save(state, out / "internal" / "state.pt")
        with pytest.raises(ValueError, match="log.jsonl tells of 1 private steps.*missing or holds none"):
            train.main(["--resume", "--out", str(out), *FREE])


def test_rows_that_ran_together_do_not_end_a_run_for_ever(stopped, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    with open(out / "internal" / "ledger.jsonl", "rb+") as file:  # two machines wrote at once
        row = file.read()
        file.seek(0, 2)
        file.write(row[:-5] + row[:-5] + b"\n")
    train.main(["--resume", "--out", str(out), *FREE])
    assert files.read_json(out / "release" / "privacy.json")["steps"] == 3 == len(
        files.ledger_rows(ledger(out).decode(), PLAN))


@pytest.mark.parametrize("name", ["vae.pt", "ldm.pt"])
def test_a_public_network_that_is_gone_is_not_trained_anew(stopped, tmp_path, name):
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    (out / "public" / name).unlink()
    with pytest.raises(ValueError, match="public/vae.pt or public/ldm.pt is missing"):
        train.main(["--resume", "--out", str(out), *FREE])


def test_a_finished_release_survives_the_loss_of_its_checkpoint(stopped, tmp_path):
    """The whole program: the release's bytes and its count stay, whichever of its witnesses are lost."""
    out = tmp_path / "run"
    shutil.copytree(stopped, out)
    train.main(["--resume", "--out", str(out), *FREE])
    released = {path.name: path.read_bytes() for path in (out / "release").iterdir()}
    for name in ("state.pt", "ledger.jsonl", "plan.json", "log.jsonl"):  # one after the other
        (out / "internal" / name).unlink()
        with pytest.raises(ValueError, match="cannot resume"):
            train.main(["--resume", "--out", str(out), *FREE])
        assert {path.name: path.read_bytes() for path in (out / "release").iterdir()} == released
        assert not (out / "internal" / "state.pt").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_two_processes_cannot_train_in_one_folder(tmp_path):
    run_folder.prepare(tmp_path / "run", resume=False)  # and twice in one process is no conflict
    run_folder.prepare(tmp_path / "run", resume=True)
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
        run_folder.prepare(tmp_path / "other", resume=True)
    os.kill(pid, signal.SIGKILL)  # the lock dies with its holder, however that ends
    os.waitpid(pid, 0)
    run_folder.prepare(tmp_path / "other", resume=True)


def test_another_program_in_the_same_folder_is_noticed_and_its_steps_count(public, tmp_path, monkeypatch):
    """Where locks do not reach other machines: rows that we have not written end the run; all rows count."""
    out, real, steps = tmp_path / "run", dp_sgd.DPSGD.step, 4

    def step(engine, optimizer):
        real(engine, optimizer)
        if len(ledger(out).splitlines()) == 2:
            (out / "internal" / "ledger.jsonl").write_bytes(ledger(out) + ledger(out).splitlines(True)[0])

    monkeypatch.setattr(dp_sgd.DPSGD, "step", step)
    with pytest.raises(ValueError, match="changed by another program"):
        train.main(command(out, public, steps))
    assert len(ledger(out).splitlines()) == 3
    monkeypatch.setattr(dp_sgd.DPSGD, "step", real)
    train.main(command(out, public, steps))
    assert len(ledger(out).splitlines()) == steps
    assert json.loads((out / "release" / "privacy.json").read_text())["steps"] == steps
