"""A run folder from its making to its end: locked, resumed only with what it began with, stopped without loss.

    runs/NAME/public/     autoencoder and diffusion model, trained on public data only
    runs/NAME/release/    model, privacy statement, images: covered by epsilon, may be published
    runs/NAME/internal/   ledger, state for resume, losses and gradient norms: NOT covered, never publish
"""
import argparse
import contextlib
import fcntl
import os
import signal
import sys
import time

import torch

import accountant
from support import files
from support.team import rank

PARTS = ("public", "release", "internal")
ADD_UP = "a new run on the same pictures would add its epsilon to what this one has spent"


def prepare(out, resume):
    """Make the run folder, lock it until this process ends, clear up after a crash. Raises ValueError where a new run would
    be mixed into an old one, or while another process trains there: two of them would each spend the whole budget."""
    used = [part for part in PARTS if (out / part).exists() and any((out / part).iterdir())]
    if used and not resume:
        raise ValueError(f"{out} already holds a run; go on with it (--resume --out {out}), or choose "
                         f"another --out; {ADD_UP}")
    for part in PARTS:
        (out / part).mkdir(parents=True, exist_ok=True, mode=0o700 if part == "internal" else 0o777)
    files.only_owner(out / "internal")
    lock = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)  # stays open: closed, the lock is lost
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"another process is at work in {out}; wait for it, or choose another --out") from None
    for part in PARTS:
        for unfinished in (out / part).glob(".*.tmp"):
            unfinished.unlink()


def check_unchanged(facts, path):
    """Write down what the guarantee depends on; where it is written already (resume), refuse if any of it differs."""
    if not path.exists():
        return files.write_json(facts, path)
    for key, value in files.read_json(path).items():
        if facts.get(key) != value:
            raise ValueError(f"cannot resume: '{key}' is not what this run began with; {ADD_UP}")


def check_spent(out, plan):
    """Refuse to go on where a run's files contradict each other about the private steps that are spent.

    Ledger, checkpoint, log and release each tell how many there were; the ledger must know of all. Raises
    ValueError, one line, where rows are missing, where the plan they belong to is missing, and where the
    checkpoint with their result is gone: the untuned public model would be released, or replace a good release.
    """
    internal, release = out / "internal", out / "release"
    spent = len(accountant.ledger_rows(files.read_ledger(internal / "ledger.jsonl"), plan))
    done = 0
    if (internal / "state.pt").exists():
        state = files.load(internal / "state.pt")
        with files.understanding(internal / "state.pt"):
            done = int(state["done"])
    log = internal / "log.jsonl"  # a row of it is written after the ledger's
    logged = log.read_bytes().count(b"\n") if log.exists() else 0
    stated = 0
    if any((release / name).exists() for name in ("model.pt", "privacy.json")):  # written after the last step
        try:
            stated = int(files.read_json(release / "privacy.json")["steps"])
        except (ValueError, KeyError, TypeError, OverflowError):
            stated = plan["steps"]
        stated = max(stated, plan["steps"] if stated else 0)
    for name, count in (("internal/state.pt", done), ("internal/log.jsonl", logged), ("the release", stated)):
        if count > spent or count < 0:
            raise ValueError(f"cannot resume: the ledger has {spent} rows, but {name} tells of {count} "
                             "private steps; rows are missing, so epsilon is unknown. Bring back "
                             f"internal/ledger.jsonl from a copy; {ADD_UP}")
    if spent and not (plan["steps"] and (internal / "plan.json").exists()):
        raise ValueError(f"cannot resume: {spent} private steps are spent, but the plan they belong to, "
                         "internal/plan.json, is missing or says there are none. Bring it back from a copy; "
                         f"{ADD_UP}")
    if stated and not done:
        raise ValueError("cannot resume: internal/state.pt is missing, and the untuned public model would "
                         f"replace the release, which is finished: draw from it with python sample.py {out}")
    if spent and spent >= plan["steps"] and not done:
        raise ValueError(f"cannot resume: all {spent} private steps are spent, and internal/state.pt, their "
                         f"result, is missing. Bring it back from a copy, or this run is lost; {ADD_UP}")


class Stop:
    """First Ctrl-C (or SIGTERM): finish the step, files.save, leave with code 130. Second one: leave at once.

    Signals within a second of the first are taken as the same one: torchrun passes on what the terminal has sent already.
    """

    def __init__(self):
        self.asked, self.since = False, 0.0
        for number in (signal.SIGINT, signal.SIGTERM):
            with contextlib.suppress(ValueError):  # only a main thread may set handlers
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked:
            if time.monotonic() - self.since > 1:
                raise KeyboardInterrupt
            return
        self.asked, self.since = True, time.monotonic()
        if not rank():
            print("\nstopping after this step (once more: at once)", file=sys.stderr)

    def leave(self, out):
        if not rank():
            print(f"stopped, nothing is lost; go on with: python train.py --resume --out {out}", file=sys.stderr)
        raise SystemExit(130)


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are one line, as all others are: ValueError instead of the whole usage."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


def run_cli(main):
    """Run a program: a foreseen error is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"rank {rank()}: error: {error}" if rank() else f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # out of memory has three types
        text = str(error).strip().splitlines()[:1] or ["no more memory"]
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and "memory" not in text[0]:
            raise
        print("error: out of memory; ask for smaller batches (--batch, --micro-batch, --vae-batch, "
              f"--ldm-batch) or fewer pictures ({text[0][:100]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
