"""What is written to a run folder, and how: nothing torn, nothing lost, nothing executed on reading.

The crash safety of the programs in one place (DP-LDM's guarantee needs it: a private step that is not in the ledger is
epsilon that nobody counts). Files are written beside their place and renamed; ledger rows are on the disk before the
noisy step is applied; checkpoints are read with weights_only=True, so that a file from elsewhere cannot run code.

    runs/NAME/public/     autoencoder and diffusion model, trained on public data only
    runs/NAME/release/    model, privacy statement, pictures: covered by epsilon, may be published
    runs/NAME/internal/   ledger, state for resume, losses and gradient norms: NOT covered, never publish
"""
import argparse
import contextlib
import fcntl
import json
import os
import signal
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

import accountant

PARTS = ("public", "release", "internal")
ADD_UP = "a new run on the same pictures would add its epsilon to what this one has spent"


def rank():
    """This process's number among those of a torchrun, 0 when alone. Only rank 0 writes: for others the writers do nothing."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextlib.contextmanager
def replacing(path, private=False):
    """Open a file to write bytes; it takes the place of `path` when complete: a crash leaves the old or the new.

    private: only its owner may read it, as all in internal/ (`opening`).
    """
    if rank():
        with open(os.devnull, "wb") as file:
            yield file
        return
    path = Path(path)
    private = private or path.parent.name == "internal"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb", opener=opening(path, private)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def opening(path, private=False):
    """For open(): a new file that is private or in internal/ begins with mode 0600, whatever the umask."""
    mode = 0o600 if private or Path(path).parent.name == "internal" else 0o666
    return lambda name, flags: os.open(name, flags, mode)


def only_owner(place, pattern="*"):
    """Make a folder, or close an older one: only its owner may enter it (0700) and read its files (0600).

    A folder with other things than `pattern` is somebody's own: only the files that match are closed there.
    """
    place.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = list(place.iterdir())
    if all(path.match(pattern) for path in found):
        place.chmod(0o700)
    for path in found:
        if path.match(pattern) and path.is_file() and not path.is_symlink():
            path.chmod(0o600)


def save(value, path):
    """torch.save, all or nothing."""
    with replacing(path) as file:
        torch.save(value, file)


@contextlib.contextmanager
def understanding(path, kind="checkpoint"):
    """Reading a file that may be missing, damaged or made to harm: whatever the readers raise -> ValueError, one line."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; make it first: python train.py") from None
    except Exception as error:  # unpicklers, unzippers and the networks' constructors raise two dozen types
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a {kind} of this program ({reason})") from None


def load(path):
    """A dict by torch.load, on the CPU, without code execution (pitfall 21). ValueError, one line, if missing or damaged."""
    with understanding(path):
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}")
        return value


def refuse_release(checkpoint, path):
    """A checkpoint with a privacy statement was tuned on private images: it is no public network."""
    if "privacy" in checkpoint:
        raise ValueError(f"{path} is a release with a privacy statement, no public network: it was tuned on "
                         "private images; use public networks, e.g. those of that run (--init RUN)")


def write_json(value, path):
    with replacing(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path):
    """A JSON object as dict. Raises ValueError, one line, if missing or damaged."""
    with understanding(path, "file"):
        value = json.loads(Path(path).read_bytes())
        if not isinstance(value, dict):
            raise ValueError("not a JSON object")
        return value


def append_row(row, path):
    """One JSON line at the end of the file, on the disk before we go on."""
    if rank():
        return
    with open(path, "a", opener=opening(path)) as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())


def read_ledger(path):
    """Text of the ledger, "" if there is none, for accountant.ledger_rows. A torn line stays where it is, as a step that
    was spent; only its line end is added, so that the next row stands on a line of its own."""
    if not Path(path).exists():
        return ""
    text = Path(path).read_bytes().decode(errors="replace")
    if text and not text.endswith("\n") and not rank():
        with open(path, "a") as file:
            file.write("\n")
    return text


def prepare(out, resume):
    """Make the run folder, lock it until this process ends, clear up after a crash. Raises ValueError where a new run would
    be mixed into an old one, or while another process trains there: two of them would each spend the whole budget."""
    used = [part for part in PARTS if (out / part).exists() and any((out / part).iterdir())]
    if used and not resume:
        raise ValueError(f"{out} already holds a run; go on with it (--resume --out {out}), or choose "
                         f"another --out; {ADD_UP}")
    for part in PARTS:
        (out / part).mkdir(parents=True, exist_ok=True, mode=0o700 if part == "internal" else 0o777)
    only_owner(out / "internal")
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
        return write_json(facts, path)
    for key, value in read_json(path).items():
        if facts.get(key) != value:
            raise ValueError(f"cannot resume: '{key}' is not what this run began with; {ADD_UP}")


def check_spent(out, plan):
    """Refuse to go on where a run's files contradict each other about the private steps that are spent.

    Ledger, checkpoint, log and release each tell how many there were; the ledger must know of all. Raises
    ValueError, one line, where rows are missing, where the plan they belong to is missing, and where the
    checkpoint with their result is gone: the untuned public model would be released, or replace a good release.
    """
    internal, release = out / "internal", out / "release"
    spent = len(accountant.ledger_rows(read_ledger(internal / "ledger.jsonl"), plan))
    done = 0
    if (internal / "state.pt").exists():
        state = load(internal / "state.pt")
        with understanding(internal / "state.pt"):
            done = int(state["done"])
    log = internal / "log.jsonl"  # a row of it is written after the ledger's
    logged = log.read_bytes().count(b"\n") if log.exists() else 0
    stated = 0
    if any((release / name).exists() for name in ("model.pt", "privacy.json")):  # written after the last step
        try:
            stated = int(read_json(release / "privacy.json")["steps"])
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
    """First Ctrl-C (or SIGTERM): finish the step, save, leave with code 130. Second one: leave at once.

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
