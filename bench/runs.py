"""Measured training runs: a row of docs/results.md is a train and an evaluate command, run and written down.

Used by the modules of bench/ that only list rows (`bench.digits`, `bench.papers` and others). Each run adds
one JSON line to bench/results.jsonl: commands, commit, date, seconds, threads, privacy statement, all metrics
with their protocol. `python -m bench.tables --write` turns the lines into the tables, so that no number is
typed.

    python -m bench.NAME            all rows of that table that results.jsonl does not have yet
    python -m bench.NAME ROW ...    some rows, anew
    python -m bench.NAME --list     the commands of every row

A run folder that is in the way is renamed, never deleted.
"""
import hashlib
import itertools
import json
import platform
import resource
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path
from typing import NamedTuple

import torch

RESULTS = Path(__file__).with_name("results.jsonl")


class Row(NamedTuple):
    """A row of a table.

    label: its name there. train: flags of train.py ("" is the default run), or None for a row that only
    evaluates `out` again. out: run folder. evaluate: flags of evaluate.py.
    """

    label: str
    train: str
    out: str
    evaluate: str = ""


def commands(row):
    """The commands of a row as a user types them: [train, evaluate], or [evaluate] for another row's run."""
    evaluate = f"python evaluate.py {row.out} {row.evaluate}".strip()
    train = f"python train.py {row.train}".strip()
    return [evaluate] if row.train is None else [train, evaluate]


def move_away(folder):
    """Rename a run folder that is in the way: its ledger may be somebody's only record of what was spent."""
    if folder.exists():
        old = next(p for p in (folder.with_name(f"{folder.name}.old{i}") for i in itertools.count(1))
                   if not p.exists())
        print(f"{folder} exists and is kept as {folder.rename(old)}", flush=True)


def measure(table, name, row):
    """Run a row's commands from the beginning and append the line. CalledProcessError if a command fails."""
    out, seconds, commits = Path(row.out), {}, []
    evaluation = Path(row.evaluate.partition("--out ")[2] or out / "internal" / "evaluation.json")
    for command in commands(row):
        training = command.startswith("python train.py")
        if training:
            move_away(out)
        print(f"$ {command}", flush=True)
        commits.append(commit())  # before each: files may change while it runs
        begin = time.monotonic()
        subprocess.run([sys.executable, *command.split()[1:]], check=True)
        seconds["train" if training else "evaluate"] = time.monotonic() - begin
    result = {"table": table, "row": name, "label": row.label, "commands": commands(row),
              "commit": ", ".join(dict.fromkeys(commits)), "run": digest(out / "release" / "model.pt"),
              "date": date.today().isoformat(), "seconds": seconds, "threads": torch.get_num_threads(),
              # The largest of all commands of this call so far, earlier rows included.
              "peak_mib": round(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024),
              "cpu": cpu(),
              "gpu": torch.cuda.get_device_name() if torch.cuda.is_available()
              and "--device cpu" not in f"{row.train} {row.evaluate}" else None,
              "privacy": json.loads((out / "release" / "privacy.json").read_text()),
              "evaluation": json.loads(evaluation.read_text())}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(result) + "\n")


def digest(path):
    """The beginning of a file's SHA-256: it tells whether two rows are about one run."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:8]


def cpu():
    """What the processor can do that matters here, such as "AMD EPYC, avx512_bf16", or its bare name."""
    try:
        first = Path("/proc/cpuinfo").read_text().replace("\t", "").partition("\n\n")[0]
        lines = dict(line.split(":", 1) for line in first.splitlines())
    except (OSError, ValueError):
        return platform.processor()
    flags = lines.get("flags", "").split()
    best = next((flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags), "")
    return ", ".join(word for word in (lines.get("model name", "").strip(), best) if word)


def commit():
    """Short name of the commit, with -dirty if any program differs from it (results and texts may).

    "" where there is no git, or the programs were copied without its folder.
    """
    if not shutil.which("git"):
        return ""

    def git(*words):
        return subprocess.run(["git", *words], capture_output=True, text=True,
                              cwd=Path(__file__).parent.parent).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("-dirty"
                                                  if git("status", "--porcelain", "--", "*.py") else "")


def main(table, rows, argv=None):
    """The command line of a table: rows is {name: Row}."""
    argv = sys.argv[1:] if argv is None else argv
    if "--list" in argv:
        for name, row in rows.items():
            print(f"{name:16} {' && '.join(commands(row))}")
        return
    if unknown := [name for name in argv if name not in rows]:
        sys.exit(f"error: no row {unknown[0]!r}; choose among {', '.join(rows)}")
    lines = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    have = {line["row"] for line in lines if line["table"] == table}
    for name in argv or [name for name in rows if name not in have]:
        measure(table, name, rows[name])
