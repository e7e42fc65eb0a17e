"""How files are written: nothing torn, nothing lost, nothing executed on reading.

DP-LDM's guarantee needs it: a private step that is not in the ledger is epsilon that nobody counts. Files are
written beside their place and renamed. Ledger rows are on the disk before the noisy step is applied.
Checkpoints are read with weights_only=True, so that a file from elsewhere cannot run code.
"""
import contextlib
import errno
import io
import json
import math
import os
from dataclasses import asdict, is_dataclass
from pathlib import Path
from zipfile import is_zipfile

import torch

from support.team import rank


@contextlib.contextmanager
def replacing(path, private=False):
    """Open a file to write bytes. It takes the place of `path` when complete: a crash leaves old or new.

    Only plain files are replaced. A link's target is; what goes to a device or a pipe is written into it when
    complete. private: only its owner may read it, as all in internal/ (`opening`). ValueError, one line, on a
    full disk: the old file is as it was.
    """
    if rank():
        with open(os.devnull, "wb") as file:
            yield file
        return
    path = Path(path)
    if write_through(path):
        file = io.BytesIO()  # the writers of archives seek
        yield file
        with roomy(path), open(path, "ab") as target:
            target.write(file.getvalue())
        return
    private = private or path.parent.name == "internal"
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700 if private else 0o777)
    path = Path(os.path.realpath(path)) if path.is_symlink() else path
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with roomy(path), open(temporary, "wb", opener=opening(path, private)) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        with contextlib.suppress(OSError):  # the new name as well: what is written next may tell of it
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_through(path):
    """Is this a device, a pipe or an open file such as /dev/stdout, which must not be replaced?"""
    links = [os.path.realpath(path.parent), os.readlink(path)] if path.is_symlink() else []
    return any(link.startswith("/proc/") for link in links) or (
        path.exists() and not path.is_file() and not path.is_dir())


FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@contextlib.contextmanager
def roomy(path):
    """Whatever a writer raises because the disk, or the quota, is full -> ValueError, one line."""
    try:
        yield
    except Exception as error:
        cause = error  # archives raise errors of their own while they handle that of the disk
        while cause and getattr(cause, "errno", None) not in FULL:
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise ValueError(f"{path} could not be written ({os.strerror(cause.errno)}); make room and begin "
                         "again, a training run goes on with --resume") from None


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


KINDS = (  # first bytes -> what the file is, and what to do where that helps
    (b"version https://git-lfs", "a Git LFS pointer (git lfs pull fetches the file itself)"),
    (b"<!doctype html", "an HTML page (download the file itself, not the page about it)"),
    (b"<html", "an HTML page (download the file itself, not the page about it)"),
    (b"<", "an XML page, perhaps a server's error"),
    (b"\x89png", "a PNG image"), (b"\xff\xd8\xff", "a JPEG image"), (b"gif8", "a GIF image"),
    (b"%pdf", "a PDF file"),
    (b"\x89hdf", "an HDF5 file"), (b"\x1f\x8b", "gzip data (gunzip unpacks it)"),
    (b"\x93numpy", "a single array of numpy"),
    (b"pk\x03\x04", "a zip archive"), (b"\x80", "a pickle"), (b"{", "JSON text"),
)


def nature(path):
    """What a file is by its first bytes, in words; "" if they say nothing, or it cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(512)
        if not start:
            return "an empty file"
        if start[8:10] == b'{"' and int.from_bytes(start[:8], "little") < 2 ** 27:
            return "a safetensors file"
        if start[257:262] == b"ustar":
            return "a tar archive (tar -xf unpacks it)"
        kind = next((kind for first, kind in KINDS if start.lstrip().lower().startswith(first)), "")
        half = kind == "a zip archive" and not is_zipfile(path)
        return "the beginning of a zip archive (half a download?)" if half else kind
    except OSError:
        return ""


def unfit(path, expected, why):
    """One line about a file that is no `expected`: what it is, and why it could not be read."""
    if isinstance(why, OSError) and why.strerror:
        return f"{path} cannot be read: {why.strerror}"
    found, why = nature(path) or "a file that is not readable as such", " ".join(str(why).split())[:300]
    return f"{path}: found {found}, expected {expected} ({why})"


def expanded(path):
    """Path with ~ replaced by the home directory, left as it is where there is none."""
    return Path(os.path.expanduser(path))


@contextlib.contextmanager
def understanding(path, kind="checkpoint"):
    """Reading a file that may be missing, damaged or hostile: any error becomes a one-line ValueError."""
    try:
        yield
    except FileNotFoundError:
        raise ValueError(f"there is no {path}; make it first: python train.py") from None
    except torch.OutOfMemoryError:  # of a GPU: the file may be sound
        raise
    except PermissionError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    except Exception as error:  # unpicklers, unzippers and the networks' constructors raise two dozen types
        reason = (str(error).splitlines() or [""])[0][:120] or type(error).__name__
        raise ValueError(f"{path} is damaged or not a {kind} of this program ({reason})") from None


def load(path):
    """A dict by torch.load, on the CPU; no code of it runs (pitfall 21). ValueError if missing or damaged."""
    with understanding(path):
        value = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(value, dict):
            raise ValueError(f"holds a {type(value).__name__}")
        return value


def release_file(path):
    """The model.pt of a run folder, of a release folder, or the file itself."""
    places = Path(path), Path(path) / "release" / "model.pt", Path(path) / "model.pt"
    return next((place for place in places if place.is_file()), places[1])


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
    first = not path.exists()
    with roomy(path), open(path, "a", opener=opening(path)) as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    if first:  # the new name in its folder, too
        sync(path.parent)


def sync(folder):
    """A new name in the folder is on the disk before we go on. Some file systems cannot do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)


def read_ledger(path):
    """Text of the ledger, "" if there is none, for `ledger_rows`.

    A torn line stays where it is, as a step that was spent. Only its line end is added, so that the next row
    stands on a line of its own.
    """
    if not Path(path).exists():
        return ""
    text = Path(path).read_bytes().decode(errors="replace")
    if text and not text.endswith("\n") and not rank():
        with open(path, "a") as file:
            file.write("\n")
    return text


def plain(value):
    """A value as JSON gives it back: dataclass to dict, tuple to list, numpy to float, infinity to text."""
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if is_dataclass(value):
        value = asdict(value)
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return str(value) if isinstance(value, Path) else value


def ledger_rows(text, *known):
    """Text of a ledger, one JSON row per line -> list of rows. A crash may have left a torn line.

    Every row begun on a torn line was spent, so each counts as one step. It gets the largest q and the
    smallest sigma of all complete rows and of `known` (dicts with q and sigma, as a plan). ValueError if a
    line is torn and nothing tells q and sigma.
    """
    def complete(row):  # a dict with usable numbers q and sigma; "" stands for what is no number
        q, sigma = (row.get(key) for key in ("q", "sigma")) if isinstance(row, dict) else ("", "")
        return all(type(x) in (int, float) for x in (q, sigma)) and 0 <= q <= 1 and 0 <= sigma < math.inf

    def read(line):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            return None
        return row if complete(row) else None

    lines = text.removesuffix("\n").split("\n") if text else []
    rows = [read(line) for line in lines]
    if None in rows:
        whole = [row for row in (*rows, *known) if complete(row)]
        if not whole:
            raise ValueError(f"row {rows.index(None) + 1} of the ledger is damaged, and no other row or plan "
                             "tells its q and sigma")
        worst = {"q": max(row["q"] for row in whole), "sigma": min(row["sigma"] for row in whole)}
        # Several rows may have run into one torn line: each "{" begins one.
        more = sum(max(0, line.count("{") - 1) for line, row in zip(lines, rows, strict=True) if row is None)
        rows = [{**worst, "torn": True} if row is None else row for row in rows]
        rows += more * [{**worst, "torn": True}]
    return rows
