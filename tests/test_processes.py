"""Several processes with gloo: the sums of one, the noise once, one ledger, a clear end when one dies."""
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import time
from datetime import timedelta
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

import accountant
import datasets
import dp_sgd
import sample
import train
from support import command_line, files, randomness, run_folder, team

TINY = ["--preset", "smoke", "--public-n", "40", "--private-n", "101", "--vae-steps", "2", "--ldm-steps", "2",
        "--vae-batch",
        "9", "--ldm-batch", "9", "--batch-size", "20", "--accountant", "rdp", "--sample-steps", "1"]
FREE = ["--precision", "float32", "--micro-batch", "4"]


def worker(number, port, job, place):
    """One of two processes, with what torchrun would put into its environment, its words in files."""
    os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    for stream, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(place / f"{name}.{number}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    command_line.run_cli(partial(job, number, place))


def two_processes(job, place, stopped=None):
    """Run job(rank, place) in two forks of a process that has imported train -> exit codes, stderr lines.

    stopped: the one that SIGSTOP will keep from ending. It is killed when the other one has ended.
    """
    context = multiprocessing.get_context("forkserver")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started = [context.Process(target=worker, args=(number, port, job, place)) for number in (0, 1)]
    for process in started:
        process.start()
    patience = 240.0
    while any(process.is_alive() for i, process in enumerate(started) if i != stopped) and patience > 0:
        time.sleep(0.05)
        patience = min(patience, 20 if any(process.exitcode for process in started) else 240) - 0.05
    for process in started:  # who is still there is stopped, or waits for ever
        process.kill()
        process.join()
    errors = [(place / f"stderr.{number}").read_text().replace("\r", "\n").splitlines() for number in (0, 1)]
    errors = [[line for line in lines if line.startswith(("error", "rank", "Trace"))] for lines in errors]
    return [process.exitcode for process in started], errors


# ------------------------------------------------------------------------------------------------- the engine


def small_engine(noise_multiplier=0.0):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 40), torch.nn.Tanh(), torch.nn.Linear(40, 100)).double()
    return dp_sgd.DPSGD(model, 0.5, noise_multiplier, expected_batch_size=8)


def loss_fn(model, x):
    return model(x).square().sum(1)


EXAMPLES = torch.randn(30, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
DRAW = torch.tensor([0, 2, 3, 4, 6, 8, 10, 14, 21, 28, 29])  # three of them in the shard of rank 1


def engine_job(number, place):
    team.join()
    engine = small_engine()
    shard = team.shard(EXAMPLES)
    mine = [int(i) // 2 for i in DRAW if i % 2 == number]
    for part in torch.tensor(mine).split(2 if number == 0 else 5):  # four micro-batches here, one there
        engine.accumulate(loss_fn, shard[part])
    team.reduce_sums(engine)
    sums = [a.clone() for a in engine.sums]
    figures = dp_sgd.summary(engine.metrics) if number == 0 else engine.last
    empty = small_engine(3.0)  # nothing drawn by anybody: noise only
    start = [p.detach().clone() for p in empty.parameters]
    team.reduce_sums(empty)
    if number == 0:
        empty.step(torch.optim.SGD(empty.parameters, 1.0))
    team.broadcast(empty.parameters)
    change = torch.cat([(p.detach() - a).flatten() for p, a in zip(empty.parameters, start, strict=True)])
    torch.save({"sums": sums, "figures": figures, "change": change}, place / f"result.{number}")


def test_the_total_of_two_processes_is_the_sum_of_one_and_gets_the_noise_once(tmp_path):
    codes, errors = two_processes(engine_job, tmp_path)
    assert codes == [0, 0] and errors == [[], []]
    first, second = (torch.load(tmp_path / f"result.{number}", weights_only=True) for number in (0, 1))
    alone = small_engine()
    alone.accumulate(loss_fn, EXAMPLES[DRAW])
    for a, b, c in zip(alone.sums, first["sums"], second["sums"], strict=True):
        assert torch.allclose(a, b, rtol=1e-12, atol=1e-14) and a.abs().max() > 0.01 and not c.any()
    whole = dp_sgd.summary(alone.metrics)
    assert first["figures"]["examples"] == whole["examples"] == 11 and second["figures"]["examples"] == 3
    assert first["figures"]["norm_quantiles"] == pytest.approx(whole["norm_quantiles"])
    assert torch.equal(first["change"], second["change"])
    # 4340 numbers N(0, (sigma C / B)^2): the standard deviation is known to 1.1 %. Noise of both ranks would
    # make it 1.41 times as large.
    assert float(first["change"].std()) / (3.0 * 0.5 / 8) == pytest.approx(1, abs=0.05)
    assert abs(float(first["change"].mean())) < 5 * (3.0 * 0.5 / 8) / 4340 ** 0.5


# ------------------------------------------------------------------------------------------ the whole program


def run_job(flags, number, place):
    """train.main with plain gradient steps in place of Adam, so that the size of the noise can be seen."""
    seen = {"drawn": [], "noise": 0, "generators": [], "changes": [], "public": [], "drift": []}
    poisson_sample, privatise, fresh = dp_sgd.poisson_sample, dp_sgd.privatise, randomness.fresh_generator
    broadcast, fit, before = team.broadcast, train.fit, {}

    def watched_sample(n, q, generator):
        batch = poisson_sample(n, q, generator)
        seen["drawn"].append((n, q, len(batch)))
        return batch

    def watched_privatise(*args):
        seen["noise"] += 1
        return privatise(*args)

    def watched_generator(*args):
        generator = fresh(*args)
        seen["generators"].append(generator.get_state())
        return generator

    def watched_broadcast(tensors):
        flat = torch.cat([a.detach().flatten() for a in tensors])
        broadcast(tensors)
        after = torch.cat([a.detach().flatten() for a in tensors])
        seen["changes"].append(after - before.get("flat", flat))
        before["flat"] = after

    def watched_fit(s, title, model, *args, **named):
        fit(s, title, model, *args, **named)
        seen["public"].append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        seen["drift"].append(float(seen["changes"][-1].abs().max()))
        seen["changes"].clear(), before.clear()

    def sgd(parameters, lr, **betas):
        return torch.optim.SGD(parameters, lr)

    dp_sgd.poisson_sample, dp_sgd.privatise, randomness.fresh_generator = (
        watched_sample, watched_privatise, watched_generator
    )
    team.broadcast, train.fit, torch.optim.Adam = watched_broadcast, watched_fit, sgd
    try:
        train.main([*TINY, *FREE, "--out", str(place / "run"), *flags])
    finally:
        torch.save(seen, place / f"seen.{number}")


def test_a_run_by_two_processes(tmp_path):
    job = partial(run_job, ["--steps", "3", "--clip-norm", "1e-3", "--sigma", "4", "--lr", "1",
                            "--adversarial-weight", "0.5"])
    codes, errors = two_processes(job, tmp_path)
    assert codes == [0, 0] and errors == [[], []]
    first, second = (torch.load(tmp_path / f"seen.{number}", weights_only=True) for number in (0, 1))
    assert "privacy plan" in (tmp_path / "stdout.0").read_text()
    assert not (tmp_path / "stdout.1").read_text() and "step" not in (tmp_path / "stderr.1").read_text()

    for a, b in zip(first["public"], second["public"], strict=True):
        assert torch.equal(a, b)  # both ranks hold the same public networks ...
    # (before the last word of rank 0: all applied the same gradients)
    assert first["drift"] == second["drift"] == [0, 0]
    assert [n for n, *_ in first["drawn"]] == [51] * 3 and [n for n, *_ in second["drawn"]] == [50] * 3
    assert {q for _, q, _ in first["drawn"] + second["drawn"]} == {20 / 101}
    states = {bytes(state.numpy()) for state in first["generators"] + second["generators"]}
    assert len(states) == len(first["generators"] + second["generators"])  # ... but no randomness

    out = tmp_path / "run"
    rows, log = ([json.loads(line) for line in (out / "internal" / name).read_text().splitlines()]
                 for name in ("ledger.jsonl", "log.jsonl"))
    assert [row["step"] for row in rows] == [0, 1, 2]
    assert [row["examples"] for row in log] == [a[2] + b[2] for a,
                                                b in zip(first["drawn"], second["drawn"], strict=True)]
    assert (first["noise"], second["noise"]) == (3, 0)
    moved = second["changes"][1:]  # what rank 1 receives, step by step
    assert torch.equal(torch.stack(moved), torch.stack(first["changes"][1:])) and len(moved) == 3
    # 337,000 numbers, the clipped sum is far below the noise; 1.41 if both added, 0.71 if halves
    for change in moved:
        assert float(change.std()) / (4 * 1e-3 / 20) == pytest.approx(1, abs=0.02)
    privacy = files.read_json(out / "release" / "privacy.json")
    assert privacy["n"] == 101 and privacy["steps"] == 3
    assert privacy["epsilon"] == accountant.epsilon(20 / 101, 4.0, 3, 1e-5)
    assert sample.generate(sample.load_release(out), [1], steps=1, progress=False).shape == (1, 1, 28, 28)


def stop_job(number, place):
    """A signal reaches both processes at different moments. Rank 0 decides; all leave after the same step."""
    append, stops = files.append_row, []
    init = run_folder.Stop.__init__
    run_folder.Stop.__init__ = lambda self: (init(self), stops.append(self))[0]

    def appended(row, path):
        append(row, path)
        # rank 0 in step 0, rank 1 would be a step later
        if path.name == "ledger.jsonl" and row["step"] == number:
            stops[0].handle(2, None)

    files.append_row = appended
    train.main([*TINY, *FREE, "--steps", "3", "--out", str(place / "run")])


def test_stopped_by_two_processes_and_finished_by_one(tmp_path):
    codes, errors = two_processes(stop_job, tmp_path)
    assert codes == [130, 130] and errors == [[], []]
    assert files.load(tmp_path / "run" / "internal" / "state.pt")["done"] == 1
    train.main(["--resume", *FREE, "--out", str(tmp_path / "run")])
    assert files.read_json(tmp_path / "run" / "release" / "privacy.json")["steps"] == 3
    assert files.load(tmp_path / "run" / "internal" / "state.pt")["done"] == 3


def end_job(victim, how, number, place):
    """The victim ends, or hangs, in the second step."""
    poisson_sample, calls = dp_sgd.poisson_sample, []
    team.PATIENCE = timedelta(seconds=8)  # a busy machine may let a healthy process wait for half of that

    def watched(*args):
        calls.append(1)
        if number == victim and len(calls) == 2:
            (place / "ended").write_text(str(time.time()))
            os.kill(os.getpid(), how)
        return poisson_sample(*args)

    dp_sgd.poisson_sample = watched
    try:
        train.main([*TINY, *FREE, "--steps", "3", "--out", str(place / "run")])
    finally:
        (place / "left").write_text(str(time.time()))


@pytest.mark.parametrize("victim, how, within",
                         [(1, signal.SIGKILL, 10), (0, signal.SIGKILL, 10), (1, signal.SIGSTOP, 20)])
def test_a_dead_process_ends_the_run_with_one_line(victim, how, within, tmp_path):
    codes, errors = two_processes(partial(end_job, victim, how), tmp_path,
                                  stopped=victim if how == signal.SIGSTOP else None)
    survivor = 1 - victim
    assert codes[victim] == -signal.SIGKILL and codes[survivor] == 2
    assert len(errors[survivor]) == 1 and "another process" in errors[survivor][0] and not errors[victim]
    assert float((tmp_path / "left").read_text()) - float((tmp_path / "ended").read_text()) < within
    out = tmp_path / "run"
    # the second step has spent nothing
    assert len((out / "internal" / "ledger.jsonl").read_text().splitlines()) == 1
    assert (
        files.load(out / "internal" / "state.pt")["done"] == 1 and not (out / "release" / "model.pt").exists()
    )


def test_an_error_that_all_would_meet_is_told_once(tmp_path):
    codes, errors = two_processes(partial(run_job, ["--delta", "0.5"]), tmp_path)
    assert codes == [2, 2] and len(errors[0]) == 1 and "below 1/n" in errors[0][0] and errors[1] == []


def test_processes_that_read_other_private_images_are_refused(tmp_path, monkeypatch):
    run = run_folder.RunFolder.__new__(run_folder.RunFolder)
    run.s = SimpleNamespace(out=tmp_path, clip_norm=1.0, clipping="flat")
    (tmp_path / "internal").mkdir()
    private = datasets.ImageSet(torch.zeros(3, 1, 8, 8, dtype=torch.uint8), torch.zeros(3), ["a"])
    run.check_unchanged({}, [], private)  # alone
    first = hashlib.sha256(torch.ones(3).numpy()).hexdigest()
    monkeypatch.setattr(run_folder, "from_rank0", lambda value: first)
    with pytest.raises(ValueError, match="other private images than the first"):
        run.check_unchanged({}, [], private)


def test_alone_nothing_is_distributed(tmp_path):
    assert (team.rank(), team.world(), team.from_rank0("x"), team.share(7)) == (0, 1, "x", 7)
    assert not dist.is_initialized()
    assert torch.equal(team.shard(torch.arange(5)), torch.arange(5))
