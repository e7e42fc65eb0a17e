"""What a GPU is asked first, in one command: is it right, is it fast, how long does a run take.

    python -m bench.gpu --minutes 9 --out DIR [--parts 1,2] [--device cpu --tiny]

    1  right   the gradient methods against a float64 loop; norms under bf16 and TF32; noise, its tail,
               Poisson batches, fresh generators; CUDA graphs; train, stop, resume, sample, evaluate; text
    2  fast    the private step against training without privacy (bench.dp_step), the paper's networks
    3  runs    the default run and mnist-strokes, seconds per stage
    4  faces   64 pixels by class, then 128 and 256 by text with drawn faces as public images

Each result is a line of DIR/gpu.jsonl, written as soon as it is known, with the card's name. (Appended to
bench/results.jsonl, the lines of part 2 become the table of docs/speed.md: `python -m bench.tables --write`.)
What fails is a line with its error, and the next thing begins. Nothing begins for which the time left is too
short, and what is at work when the time is up is stopped as by Ctrl-C. Run folders are in --work; a later
command with the same --work goes on with them, but part 1 begins anew. Their pictures and privacy.json are
copied to DIR.
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import threading
import time
import traceback
from datetime import date
from functools import partial
from pathlib import Path
from unittest import mock

import torch
from scipy.stats import binom

import diffusion
import dp_sgd
import evaluate
import sample
import train
import tuning
import unet
from bench import dp_step
from bench.runs import commit, move_away
from support import command_line, dry_run, files, hardware, progress, randomness
from support.settings import METHODS

MARGIN = 15  # seconds kept back for leaving
TINY = ["--preset", "smoke", "--public-n", "100", "--vae-steps", "2", "--vae-batch", "8", "--ldm-steps", "2",
        "--ldm-batch", "8", "--width", "16", "--private-n", "100", "--batch-size", "20", "--steps", "2"]
NETWORKS = {  # name: micro-batch to begin with; it is halved until it fits
    None: 4096, "mnist": 4096, "cifar10": 2048, "celeba64": 1024, "celeba256-text": 128}


class Bench:
    """The command's options, its clock and its file of results."""

    def __init__(self, args):
        self.args, self.device, self.begin = args, args.device, time.monotonic()
        self.out, self.work, self.tiny = args.out, args.work, args.tiny
        self.out.mkdir(parents=True, exist_ok=True)
        self.card = torch.cuda.get_device_name() if "cuda" in args.device else "cpu"
        self.commit = commit()

    def left(self):
        """Seconds until the last thing must have ended."""
        return self.args.minutes * 60 - MARGIN - (time.monotonic() - self.begin)

    def line(self, part, what, **facts):
        """Append one result and flush it to the disk."""
        row = {"table": "gpu", "row": f"{part} {what}", "date": date.today().isoformat(), "part": part,
               "what": what, **facts, "card": self.card, "torch": torch.__version__, "commit": self.commit,
               "at_s": round(time.monotonic() - self.begin, 1)}
        with open(self.out / "gpu.jsonl", "a") as file:
            file.write(json.dumps(row, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        print(f"[{part}] {what}: {facts}", flush=True)

    def attempt(self, part, what, least, function):
        """Run function(self) -> facts of one line, unless fewer than `least` seconds are left."""
        if self.left() < least:
            return self.line(part, what, skipped=f"needs {least} s, {max(0, self.left()):.0f} are left")
        begin, facts = time.monotonic(), {}
        # As by Ctrl-C: train.py ends its step and saves, anything else leaves at once.
        timer = threading.Timer(max(1, self.left()), os.kill, (os.getpid(), signal.SIGINT))
        timer.daemon = True
        timer.start()
        try:
            facts = function(self) or {}
        except (Exception, SystemExit, KeyboardInterrupt) as error:
            traceback.print_exc()
            facts = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        finally:
            timer.cancel()
        if "cuda" in self.device:
            torch.cuda.empty_cache()
        return self.line(part, what, **facts, seconds=round(time.monotonic() - begin, 2))


def demand(right, text):
    if not right:
        raise AssertionError(text)


# -------------------------------------------------------------------------------------------------- 1: right


def small(device, dtype, tune, n=4):
    """(model, loss_fn, batch): random weights and draws, the same on every device."""
    torch.manual_seed(0)
    config = unet.UNetConfig(4, 4, 32, num_heads=4, context_dim=8, num_groups=8)
    model = unet.LatentModel(unet.UNet(config), unet.ClassEmbedder(10, 8))
    for p in model.parameters():  # away from zero, where most gradients vanish
        torch.nn.init.normal_(p, mean=0.5 * (p.dim() == 1), std=0.2)
    tuning.select_trainable(model, tune)
    z = torch.randn(n, 4, 4, 4, dtype=torch.float64)
    batch = diffusion.draw(z, torch.arange(n), 2, torch.Generator().manual_seed(1), diffusion.PAPER)
    batch = [b.to(device, dtype) if b.is_floating_point() else b.to(device) for b in batch]
    return (hardware.laid_out(model.to(dtype), device), partial(diffusion.loss, schedule=diffusion.PAPER),
            batch)


def clipped_sum(method, clip_norm, model, loss_fn, batch):
    """(flat clipped sum on the CPU in float64, norms of the examples)."""
    engine = dp_sgd.DPSGD(model, clip_norm, 0.0, len(batch[0]), method=METHODS[method])
    engine.accumulate(loss_fn, *batch)
    return torch.cat([a.flatten() for a in engine.sums]).double().cpu(), engine.metrics[0][0].cpu()


def methods(bench, tune):
    """Distance of each method on the device from the float64 loop there, by the sum's length; half clipped.

    Also that of the CPU's loop: it is the network's, whose timestep embedding is float32 everywhere, and the
    sines of two devices differ by about 1e-7. Float32 twice: TF32 in convolutions is torch's default.
    """
    _, norms = clipped_sum("loop", 1.0, *small("cpu", torch.float64, tune))
    clip_norm = float(norms.median())

    def total(method, device, dtype):
        return clipped_sum(method, clip_norm, *small(device, dtype, tune))[0]

    def distance(got):
        return float((got - expected).norm() / expected.norm())

    expected, facts, tf32 = total("loop", bench.device, torch.float64), {}, torch.backends.cudnn.allow_tf32
    facts["loop on the CPU, float64"] = distance(total("loop", "cpu", torch.float64))
    for name, dtype, allow in (("float64", torch.float64, False), ("float32", torch.float32, False),
                               ("TF32", torch.float32, True)):
        torch.backends.cudnn.allow_tf32 = allow
        try:
            for method in METHODS:
                facts[f"{method}, {name}"] = distance(total(method, bench.device, dtype))
        finally:
            torch.backends.cudnn.allow_tf32 = tf32
    for key, value in facts.items():
        limit = 1e-5 if "CPU" in key else 1e-12 if "64" in key else 1e-2 if "TF32" in key else 1e-5
        demand(value < limit, f"{key} differs by {value:.1e} of the sum's length, over {limit:g}: {facts}")
    return facts


def lengths(bench):
    """Clipped examples have length C, whatever precision the network and the caller ask for."""
    model, loss_fn, batch = small(bench.device, torch.float32, "all")
    found = []
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # TF32 or bf16 in products
    try:
        with torch.autocast(torch.device(bench.device).type, torch.bfloat16):
            for i in range(len(batch[0])):
                total, _ = clipped_sum("bookkeeping", 1.0, model, loss_fn, [b[i:i + 1] for b in batch])
                found.append(float(total.norm()))
    finally:
        torch.set_float32_matmul_precision(before)
    demand(all(1 - 5e-4 < value < 1 + 1e-5 for value in found), f"lengths {found}, C is 1")
    return {"shortest": min(found), "longest": max(found)}


def noise(bench):
    """Normals beyond 1..5 deviations, mean and deviation: the chance of each result. The largest possible."""
    n = 200_000 if bench.tiny else 50_000_000
    sums = torch.zeros(n, device=bench.device)
    begin = time.monotonic()
    z, = dp_sgd.privatise([sums], 0.5, 3.0, 8.0, None)
    if "cuda" in bench.device:
        torch.cuda.synchronize()
    seconds, z = time.monotonic() - begin, z.double() / (0.5 * 3.0 / 8.0)
    chances = {}  # of a count, mean or deviation this far from the expected one, or farther, on its side
    for x in range(1, 6):  # beyond 5 only a few are expected, so standard errors would not do
        count, law = int((z.abs() > x).sum()), binom(n, math.erfc(x / math.sqrt(2)))
        chances[x] = float(min(law.cdf(count), law.sf(count - 1)))
    chances["mean"] = math.erfc(abs(float(z.mean())) * math.sqrt(n / 2)) / 2
    chances["deviation"] = math.erfc(abs(float(z.std()) - 1) * math.sqrt(n)) / 2
    demand(all(chance > 1e-7 for chance in chances.values()), f"chances {chances}")
    words = iter([b"\0"])  # the first uniforms are 0; what is then drawn anew is the smallest possible
    with mock.patch.object(os, "urandom", lambda count: next(words, b"\xff") * count):
        largest = float(dp_sgd.SecureGenerator().normals((2,), bench.device).abs().max())
    demand(74.9 < largest < 75, f"the largest normal is {largest}")
    return {"normals": n, "normals_per_s": round(n / seconds), "chances": chances, "largest": largest}


def sampling(bench):
    """Sizes of Poisson batches, and two generators of the loss's draws that must not agree."""
    n, q, rounds = 10_000, 0.1, 50 if bench.tiny else 300
    sizes = torch.tensor([len(dp_sgd.poisson_sample(n, q)) for _ in range(rounds)], dtype=torch.float64)
    error = float((sizes.mean() - n * q) / math.sqrt(n * q * (1 - q) / rounds))
    demand(abs(error) < 5, f"mean batch {sizes.mean()}, expected {n * q}")
    draws = [torch.randn(8, generator=randomness.fresh_generator(bench.device), device=bench.device)
             for _ in range(2)]
    demand(not torch.equal(*draws), "two fresh generators agree")
    return {"mean_batch_error": error, "deviation": float(sizes.std()),
            "expected_deviation": math.sqrt(n * q * (1 - q))}


def smoke(bench, name, *flags):
    """A tiny run of three stages."""
    if "--resume" not in flags:  # a command that goes on with the same --work begins it anew
        move_away(bench.work / name)
    train.main([*(TINY if bench.tiny else ["--preset", "smoke"]), "--device", bench.device, *flags,
                "--out", str(bench.work / name)])


def stopped(bench):
    """Ctrl-C in the private stage, --resume, as many ledger rows as steps; then sample.py, evaluate.py."""
    out, steps = bench.work / "gpu-smoke", 3 if bench.tiny else 20
    real = dp_sgd.DPSGD.step

    def step(engine, optimizer):  # the first private step ends with a Ctrl-C
        real(engine, optimizer)
        os.kill(os.getpid(), signal.SIGINT)

    with mock.patch.object(dp_sgd.DPSGD, "step", step), contextlib.suppress(SystemExit):
        smoke(bench, "gpu-smoke", "--steps", str(steps))
    done = len((out / "internal" / "ledger.jsonl").read_text().splitlines())
    train.main(["--resume", "--out", str(out), "--device", bench.device])
    rows = len((out / "internal" / "ledger.jsonl").read_text().splitlines())
    demand(rows == json.loads((out / "release" / "privacy.json").read_text())["steps"], f"{rows} ledger rows")
    sample.main([str(out), "--n", "10", "--labels", "0-9", "--device", bench.device, "--out",
                 str(bench.work / "smoke.png")])
    evaluate.main([str(out), "--n", "100", "--steps", "2", "--classifiers", "logreg",
                   "--device", bench.device, *(["--no-distance"] if bench.tiny else [])])
    return {"rows_when_stopped": done, "rows": rows}


def replayed(bench):
    """The public stages with CUDA graphs, each stopped once, against runs without: distances of the weights.

    A run that draws the same numbers in every step shows what a graph that did so would give.
    """
    found, stops, real, steps = {}, [], hardware.recorded, progress.Public.steps

    def recording(function, generator):
        replay = real(function, generator)
        demand(replay is not function or "cuda" not in bench.device, "a stage was not recorded")
        return replay

    def stopping(state, title, total):  # Ctrl-C in the sixth step of a stage that begins
        for step in steps(state, title, total):
            if state.first == 0 and step == 5:
                stops.append(title)
                os.kill(os.getpid(), signal.SIGINT)
            yield step

    def plain(function, generator):
        return function

    def repeating(function, generator):
        state = generator.get_state()
        return lambda: (generator.set_state(state), function())[1]

    flags = ["--steps", "0", "--precision", "float32", "--resume", "auto", "--sample-steps", "1",
             "--vae-steps", "8", "--ldm-steps", "8"]
    for name, how in (("graph", recording), ("eager", plain), ("again", plain), ("repeated", repeating)):
        out = bench.work / f"gpu-smoke-{name}"
        move_away(out)
        with mock.patch.object(hardware, "recorded", how):
            if name == "graph":
                with mock.patch.object(progress.Public, "steps", stopping):
                    for count in (1, 2):  # one stop in each public stage
                        with contextlib.suppress(SystemExit):
                            smoke(bench, out.name, *flags)
                        demand(len(stops) == count and bench.left() > 0, f"stopped in {stops} only")
            smoke(bench, out.name, *flags)
        for stage, key in (("vae", "state"), ("ldm", "model")):
            weights = files.load(out / "public" / f"{stage}.pt")[key]
            found[name, stage] = torch.cat([w.flatten().double() for w in weights.values()
                                            if w.is_floating_point()])
    facts = {}
    for stage in ("vae", "ldm"):
        eager = found["eager", stage]
        near, again, far = (float((found[name, stage] - eager).norm() / eager.norm())
                            for name in ("graph", "again", "repeated"))
        facts[stage] = {"graph": near, "eager again": again, "repeated draws": far}
        demand(near <= 2 * max(again, 1e-4) and far > 2 * near, str(facts))
    return facts


def right(bench):
    for tune in ("attention",) if bench.tiny else ("attention", "all"):
        bench.attempt(1, f"methods, {tune}", 10, partial(methods, tune=tune))
    bench.attempt(1, "clipped lengths under bf16 and TF32", 5, lengths)
    bench.attempt(1, "noise", 10, noise)
    bench.attempt(1, "Poisson batches, generators", 5, sampling)
    bench.attempt(1, "public stages, recorded and not", 40 if not bench.tiny else 5, replayed)
    bench.attempt(1, "run, stop, resume, sample, evaluate", 20, stopped)
    bench.attempt(1, "run by text", 15, lambda b: smoke(b, "gpu-smoke-text", "--condition", "text"))


# --------------------------------------------------------------------------------------------------- 2: fast


def private_step(bench, network, bf16, tune):
    """dp_step's rows for one network, at the largest micro-batch of NETWORKS[network] / 2^i that fits."""
    names = ["none", "bookkeeping"] + (["vmap", "loop"] if network is None else [])
    args = argparse.Namespace(device=bench.device, threads=torch.get_num_threads(), network=network,
                              rounds=1 if bench.tiny else 5, bf16=bf16, channels_last=not bench.tiny)
    size = 4 if network is None else dp_step.own_size(network)
    batch = 4 if bench.tiny else NETWORKS[network]
    while True:
        try:
            cell = (size, tune, batch)
            rows = dp_step.compare(args, cell, dp_step.memories(args, cell, names))
            return {"micro_batch": batch, "rows": rows}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()


def fast(bench):
    for tune in ("attention", "all"):
        for bf16 in (True, False):  # the networks take turns: whatever time is left, each has been seen
            for network in NETWORKS:
                if network == "celeba256-text" and (tune, bf16) != ("attention", True):
                    continue
                bench.attempt(2, f"private step, {network or '4 channels'}, {tune}, "
                              f"{'bf16' if bf16 else 'float32'}", 15,
                              partial(private_step, network=network, bf16=bf16, tune=tune))
                if bench.tiny:
                    return


# --------------------------------------------------------------------------------------------------- 3: runs

STAGES = ("train_autoencoder", "train_diffusion", "encode", "tune_privately", "write_release")


def timed_run(bench, flags, score=()):
    """train.py and evaluate.py with these flags -> seconds of each stage, epsilon, scores, peak memory."""
    out, seconds = Path(flags[flags.index("--out") + 1]), {}

    def timed(name, real):
        def stage(*args, **kwargs):
            begin = time.monotonic()
            try:
                return real(*args, **kwargs)
            finally:  # all of train.py's stages end with numbers on the host, so the device is done
                seconds[name] = round(seconds.get(name, 0) + time.monotonic() - begin, 2)
        return stage

    if "cuda" in bench.device:
        torch.cuda.reset_peak_memory_stats()
    begin = time.monotonic()
    with contextlib.ExitStack() as patches:
        for name in STAGES:
            patches.enter_context(mock.patch.object(train, name, timed(name, getattr(train, name))))
        train.main([*flags, "--device", bench.device, "--resume", "auto"])
    facts = {"train_s": round(time.monotonic() - begin, 2), "stages_s": seconds}
    if "cuda" in bench.device:
        facts["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2 ** 20)
    shutil.copy(out / "release" / "privacy.json", bench.out / f"{out.name}-privacy.json")
    shutil.copy(out / "release" / "comparison.png", bench.out / f"{out.name}-comparison.png")
    facts["statement"] = json.loads((out / "release" / "privacy.json").read_text())["statement"]
    if score:
        begin = time.monotonic()
        evaluate.main([str(out), "--device", bench.device, *score])
        facts["evaluate_s"] = round(time.monotonic() - begin, 2)
        found = json.loads((out / "internal" / "evaluation.json").read_text())
        facts |= {key: found[key] for key in ("accuracy", "distance", "real", "seconds") if key in found}
        facts["evaluate_stages_s"] = facts.pop("seconds")  # `seconds` is the whole attempt's
    return facts


def runs(bench):
    if bench.tiny:
        flags = [*TINY, "--out", str(bench.work / "default")]
        return bench.attempt(3, "default run", 10, partial(timed_run, flags=flags))
    bench.attempt(3, "default run", 60, partial(timed_run, flags=["--out", str(bench.work / "digits")],
                                                score=["--classifiers", "cnn,logreg"]))
    flags = ["--preset", "mnist-strokes", *root(bench), "--out", str(bench.work / "mnist-strokes")]
    bench.attempt(3, "mnist-strokes", 150, partial(timed_run, flags=flags, score=[
        "--classifiers", "cnn,logreg", *root(bench)]))
    return None


def root(bench):
    return ["--data-root", bench.args.data_root] if bench.args.data_root else []


# -------------------------------------------------------------------------------------------------- 4: faces


def scaled_run(bench, flags, budget, score=()):
    """`timed_run` with so many public steps that the run takes about `budget` seconds, at most the preset's.

    A dry run measures one step of each stage. The private stage keeps its plan. A run that an earlier command
    had to stop goes on with its own settings.
    """
    out = flags[flags.index("--out") + 1]
    if (Path(out) / "internal" / "settings.json").exists():
        return timed_run(bench, ["--out", out], score)
    budget, minutes = min(budget, bench.left()), []
    real = dry_run.estimate
    with mock.patch.object(dry_run, "estimate", lambda *args: minutes.append(real(*args))):
        train.main([*flags, "--device", bench.device, "--dry-run"])
    first, second, private = minutes[0]
    # A quarter is for reading, drawing and encoding images, and for scores.
    share = (0.75 * budget / 60 - private) / max(first + second, 1e-9)
    demand(share > 0.02, f"planned {minutes[0]} minutes (three stages), {budget:.0f} s left")
    preset = vars(train.start.settings_of([*flags, "--dry-run"])[0])
    steps = {key: max(1, round(preset[key] * min(1, share))) for key in ("vae_steps", "ldm_steps")}
    more = [word for key, n in steps.items() for word in ("--" + key.replace("_", "-"), str(n))]
    return {"planned_minutes": minutes[0], **steps, **timed_run(bench, [*flags, *more], score)}


def faces(bench):
    if bench.tiny:
        flags = [*TINY, "--out", str(bench.work / "faces-64")]
        return bench.attempt(4, "faces-64", 10, partial(scaled_run, flags=flags, budget=200))
    for name, least, share, flags in (
            ("faces-64", 120, 0.6, ["--size", "64", "--factor", "8", "--latent-channels", "16",
                                    "--width", "128", "--micro-batch", "512"]),
            ("text-128", 120, 0.5, ["--size", "128", "--factor", "8", "--width", "128",
                                    "--condition", "text"]),
            ("text-256", 150, 1.0, ["--size", "256", "--factor", "8", "--width", "128", "--condition", "text",
                                    "--micro-batch", "64"])):
        whole = ["--preset", "portraits", "--public", "portraits", "--public-n", str(bench.args.drawn),
                 "--private", bench.args.private, *root(bench), *flags, "--out", str(bench.work / name)]
        score = [*root(bench), "--n", "2000", "--classifiers", "cnn"] if name == "faces-64" else ()
        bench.attempt(4, name, least, lambda b, whole=whole, share=share, score=score: scaled_run(
            b, whole, share * b.left(), score))
    return None


PARTS = {1: right, 2: fast, 3: runs, 4: faces}


def main(argv=None):
    parser = argparse.ArgumentParser(prog="bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=9, help="the command ends within these [9]")
    parser.add_argument("--out", type=Path, required=True, help="folder of gpu.jsonl and pictures")
    parser.add_argument("--work", type=Path, default=Path("runs/gpu"), help="of run folders [runs/gpu]")
    parser.add_argument("--parts", default="1,2,3,4", help="which parts, with commas [1,2,3,4]")
    parser.add_argument("--device", default="cuda", choices=["cpu", "cuda"], help="[cuda]")
    parser.add_argument("--data-root", help="folder of MNIST and the faces [$DPLDM_DATA, else the programs']")
    parser.add_argument("--private", default="faces", help="private set of part 4 [faces]")
    parser.add_argument("--drawn", type=int, default=12_000, help="public faces to draw in part 4 [12,000]")
    parser.add_argument("--tiny", action="store_true", help="everything small, to try the program on a CPU")
    args = parser.parse_args(argv)
    parts = [int(word) for word in args.parts.split(",")]
    if not set(parts) <= set(PARTS):
        parser.error(f"--parts are {', '.join(map(str, PARTS))}")
    hardware.check_device(args.device)
    if args.device == "cpu":
        torch.set_num_threads(1)  # part 2 forks: only safe in a process of one thread
    bench = Bench(args)
    # Should a call not come back at all, leave without it: every line is on the disk.
    watchdog = threading.Timer(args.minutes * 60, os._exit, (3,))
    watchdog.daemon = True
    watchdog.start()
    for part in parts:
        PARTS[part](bench)
    watchdog.cancel()
    bench.line(0, "end", parts=parts)
    return 0


if __name__ == "__main__":
    command_line.run_cli(main)
