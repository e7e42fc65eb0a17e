"""A run folder from its making to its end: locked, resumed only with its own settings, stopped without loss.

    runs/NAME/public/     autoencoder and diffusion model, trained on public data (or on voted:RUN) only
    runs/NAME/release/    model, privacy statement, images: covered by epsilon, may be published
    runs/NAME/internal/   ledger, state for resume, losses and gradient norms: NOT covered, never publish
"""
import atexit
import contextlib
import errno
import functools
import hashlib
import os
import shlex
import shutil
import signal
import sys
import time

import datasets
from support import checkpoints, files
from support.files import plain
from support.team import from_rank0, once, rank

PARTS = ("public", "release", "internal")
# What a scheduler may send before it takes the machine away is a wish to stop, as Ctrl-C is.
SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)]
# A resumed run inherits these settings, and flags may change them: places, memory, speed, post-processing.
KEPT = {"data_root", "cache", "micro_batch", "method", "watch", "sample_steps", "sample_eta", "guidance"}
ADD_UP = "a new run on the same images would add its epsilon to what this one has spent"


class RunFolder:
    """The folder of one run, locked until the process ends.

    known: public checkpoints {"vae.pt": ..., "ldm.pt": ...} of --init, which are copied into it.
    public_facts: what is known of the public set (`start.read_sets`). `stop` says whether Ctrl-C was pressed.
    Raises ValueError, one line, where a new run would be mixed into an old one, and where a resumed run's
    files contradict each other.
    """

    def __init__(self, s, plan, known, public_facts):
        self.s, self.stop, self.known = s, Stop(), known
        once(prepare, s.out, s.resume)
        once(check_spent, s.out, plan)
        if "ldm.pt" not in known:  # a public stage is to be trained, or to be gone on with
            once(check_public, s, public_facts["digests"])
        if not s.resume:
            for name, checkpoint in known.items():
                files.save(checkpoint, s.out / "public" / name)
            # evaluate.py's feature network, so that both runs are judged alike. One that has learned images
            # of the user's own is made anew: they may be others here, and private ones among them.
            own = (datasets.REGISTRY[datasets.kind_of(s.public)].own
                   or any(checkpoint.get("before") for checkpoint in known.values()))
            if rank() == 0 and s.init and not own and (s.init / "public" / "features.pt").exists():
                shutil.copy(s.init / "public" / "features.pt", s.out / "public")
            # A preset's sets with the whole path as well: a resumed run may begin elsewhere.
            sets = {key: datasets.resolved(getattr(s, key), s.data_root) for key in ("public", "private")}
            files.write_json({key: plain(value) for key, value in {**vars(s), **sets}.items()},
                             s.out / "internal" / "settings.json")
        else:
            remember(s)
        from_rank0(None)  # nobody looks before all is written

    def cached(self, name, make):
        """The public checkpoint NAME: known already, or else made by make() and written to public/."""
        checkpoint = self.known.get(name) or make()
        checkpoints.check_finite({"vae.pt": "autoencoder", "ldm.pt": "diffusion model"}[name], checkpoint)
        if name not in self.known:
            files.save(checkpoint, self.s.out / "public" / name)
        if rank() == 0:  # only now: after a crash the stage goes on from its last minute
            (self.s.out / "internal" / name.replace(".pt", "_state.pt")).unlink(missing_ok=True)
        return checkpoint

    def check_unchanged(self, plan, names, private):
        """Write down what the guarantee depends on; when the run is resumed, refuse if any of it differs."""
        images, labels = hashlib.sha256(private.images.numpy()).hexdigest(), conditions_digest(private)
        if from_rank0((images, labels)) != (images, labels):  # each process takes a part of what it has read
            raise ValueError("this process has read other private images than the first one, so an image "
                             "could be in two parts; give all processes the same files")
        facts = {**plan, "clip_norm": self.s.clip_norm, "clipping": self.s.clipping, "tuned": names,
                 "private_pictures": images, "private_conditions": labels}
        once(check_unchanged, plain(facts), self.s.out / "internal" / "plan.json")
        # For evaluate.py: what was trained on is never called held out, whatever its file's name.
        files.save({"digests": datasets.digests(private.images)}, self.s.out / "internal" / "digests.pt")


def prepare(out, resume):
    """Make the run folder, lock it until this process ends, clear up after a crash.

    ValueError where a new run would be mixed into an old one, or while another process trains there: each of
    the two would spend the whole budget.
    """
    if not resume:
        refuse_used(out)
    for part in PARTS:
        (out / part).mkdir(parents=True, exist_ok=True, mode=0o700 if part == "internal" else 0o777)
    files.only_owner(out / "internal")
    lock(out)
    for part in PARTS:
        for unfinished in (out / part).glob(".*.tmp"):
            unfinished.unlink()


def refuse_used(out, dry_run=False):
    """ValueError where `out` holds a run already, or cannot be made. A dry run writes nothing."""
    place = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not (place.is_dir() and (dry_run or os.access(place, os.W_OK))):
        raise ValueError(f"--out {out}: {place} is no folder that may be written to")
    if any((out / part).exists() and any((out / part).iterdir()) for part in PARTS):
        if not (out / "internal" / "settings.json").exists():
            raise ValueError(f"{out} holds files but no internal/settings.json: networks for --init perhaps, "
                             "or a run that ended before it began; choose another --out, or empty this one "
                             "if nothing in it is needed")
        raise ValueError(f"{out} already holds a run; go on with it (--resume --out {quoted(out)}), or "
                         f"choose another --out; {ADD_UP}")


def lock(out):
    """Lock the folder until this process ends. ValueError if another holds it, or nothing can be locked.

    Some file systems have no locks. There a file, made only if there is none, takes its place; it is removed
    at the end, but not after a crash.
    """
    import fcntl  # here: sampling and evaluation, which need no lock, also run where there is none
    busy = f"another process is at work in {out}; wait for it, or choose another --out"
    handle = os.open(out / ".lock", os.O_RDWR | os.O_CREAT, 0o600)  # stays open: closed, the lock is lost
    try:
        return fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(busy) from None
    except OSError as error:
        if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL):
            raise
    held = (out / ".lock.held").resolve()
    try:
        os.close(os.open(held, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
    except FileExistsError:
        raise ValueError(f"{busy}. The file system of {out} has no locks; if no process is at work there, "
                         f"remove {held}, which a crash has left") from None
    atexit.register(held.unlink, missing_ok=True)


def remember(s):
    """Store the settings that this command has changed of a resumed run. The next --resume keeps them."""
    path, changed = s.out / "internal" / "settings.json", {*s.given} & KEPT
    if changed and rank() == 0:
        stored = files.read_json(path)
        files.write_json({**stored, **{key: plain(getattr(s, key)) for key in changed},
                          "given": sorted({*stored.get("given", ()), *changed})}, path)


def quoted(path):
    """A path as a shell takes it."""
    return shlex.quote(str(path))


def handlers_restored(main):
    """Decorator: puts the handlers of signals back afterwards, for a program that calls main()."""
    @functools.wraps(main)
    def wrapped(*args, **kwargs):
        before = {number: signal.getsignal(number) for number in SIGNALS}
        try:
            return main(*args, **kwargs)
        finally:
            with contextlib.suppress(ValueError):  # only a main thread may set handlers
                for number, handler in before.items():
                    signal.signal(number, handler)
    return wrapped


def conditions_digest(images):
    """A hash of what goes with the images of an ImageSet: labels, captions, attributes."""
    attributes = {name: column.tolist() for name, column in sorted((images.attributes or {}).items())}
    text = repr((images.labels.tolist(), images.captions, attributes))
    return hashlib.sha256(text.encode()).hexdigest()


def check_unchanged(facts, path):
    """Write down what the guarantee depends on. If it is written already (resume), refuse any difference."""
    if not path.exists():
        return files.write_json(facts, path)
    stored = files.read_json(path)
    for key, value in stored.items():
        if facts.get(key) != value:
            raise ValueError(f"cannot resume: '{key}' is not what this run began with; {ADD_UP}")
    if facts.keys() - stored.keys():  # an older version did not write them down
        files.write_json(facts, path)


def check_public(s, digests):
    """Write down which public images there are (datasets.digests); refuse if a resumed run finds others.

    Sets drawn as a whole have no digests. A mix with others has, so its drawings must be those of this
    version.
    """
    path = s.out / "internal" / "public.json"
    found = hashlib.sha256(digests.numpy()).hexdigest()
    begun = any(path.parent.glob("*_state.pt")) or any((s.out / "public").glob("*.pt"))
    # Where a stage has begun and nothing is written down, nobody knows which images they were.
    if not path.exists() and not (s.resume and begun and len(digests)):
        files.write_json({"images": found}, path)
    elif not path.exists() or files.read_json(path).get("images") != found:
        raise ValueError(f"cannot resume: --public {s.public} has other images than when this run began; "
                         "bring them back (or the version of this program that began, if it draws a part of "
                         "them), or choose another --out")


def check_spent(out, plan):
    """Refuse to go on where a run's files contradict each other about the private steps that are spent.

    Ledger, checkpoint, log and release each tell how many there were; the ledger must know of all. Raises
    ValueError, one line, where rows are missing, where the plan they belong to is missing, and where the
    checkpoint with their result is gone: the untuned public model would be released, or replace a good
    release.
    """
    internal, release = out / "internal", out / "release"
    spent = len(files.ledger_rows(files.read_ledger(internal / "ledger.jsonl"), plan))
    done, logged, stated = updates(internal), logged_steps(internal), 0
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
    if logged and not done:  # the state is written before the log
        raise ValueError(f"cannot resume: internal/log.jsonl tells of {logged} private steps, and "
                         "internal/state.pt, their result, is missing or holds none; bring it back from a "
                         f"copy; {ADD_UP}")
    if spent and not (plan["steps"] and (internal / "plan.json").exists()):
        raise ValueError(f"cannot resume: {spent} private steps are spent, but the plan they belong to, "
                         "internal/plan.json, is missing or says there are none. Bring it back from a copy; "
                         f"{ADD_UP}")
    if stated and not done:
        raise ValueError("cannot resume: internal/state.pt is missing, and the untuned public model would "
                         f"replace the release, which is finished: draw from it with python sample.py "
                         f"{quoted(out)}")
    if spent and spent >= plan["steps"] and not done:
        raise ValueError(f"cannot resume: all {spent} private steps are spent, and internal/state.pt, their "
                         "result, is missing or holds none. Bring it back from a copy, or this run is lost; "
                         f"{ADD_UP}")


def updates(internal):
    """The number of private updates that internal/state.pt contains; 0 without it."""
    if not (internal / "state.pt").exists():
        return 0
    state = files.load(internal / "state.pt")
    with files.understanding(internal / "state.pt"):
        return int(state["done"])


def logged_steps(internal):
    """The number of rows of internal/log.jsonl. One is written after the ledger's and after state.pt."""
    log = internal / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def steps_done(internal):
    """At least so many private steps were made, whatever the ledger says."""
    return max(updates(internal), logged_steps(internal))


class Stop:
    """What Ctrl-C (SIGINT), SIGTERM and SIGUSR1 do.

    The first finishes the step, saves, leaves with code 130. The second leaves at once.

    Signals within a second of the first are taken as the same one: torchrun passes on what the terminal has
    sent already.
    """

    def __init__(self):
        self.asked, self.since = False, 0.0
        for number in SIGNALS:
            with contextlib.suppress(ValueError):  # only a main thread may set handlers
                signal.signal(number, self.handle)

    def handle(self, number, frame):
        if self.asked:
            if time.monotonic() - self.since > 1:
                raise KeyboardInterrupt
            return
        self.asked, self.since = True, time.monotonic()
        if rank() == 0:  # no print here: the signal may have come within another one
            os.write(2, b"\nstopping after this step, or at the end (once more: at once)\n")

    def leave(self, out):
        if rank() == 0:
            print(f"stopped, nothing is lost; go on with: python train.py --resume --out {quoted(out)}",
                  file=sys.stderr)
        raise SystemExit(130)
