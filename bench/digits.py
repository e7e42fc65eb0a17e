"""The README's `digits` table: every row is a training command and an evaluation command, run and written down.

    python -m bench.digits                    all rows that bench/results.jsonl does not have yet for this commit's code
    python -m bench.digits eps1 all           some rows, anew
    python -m bench.digits --list             the commands of every row

Rows share the public stages of the first (`--init`), except `letters`, whose public set is another. Each adds one JSON line
to bench/results.jsonl: commands, commit, date, seconds, protocol, all figures. `python -m bench.tables` turns the lines
into the README's table; no figure is typed.
"""
import json
import shutil
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).with_name("results.jsonl")
BASE = "runs/digits"
ROWS = {  # name: (label in the table, flags of train.py)
    "eps10": ("attention, epsilon 10 (the default)", ""),
    "public": ("public only, before tuning", "--steps 0"),
    "eps1": ("attention, epsilon 1", "--epsilon 1 --lr 2e-3"),
    "eps3": ("attention, epsilon 3", "--epsilon 3"),
    "inf": ("attention, no noise (not private)", "--epsilon inf"),
    "all": ("all parameters, epsilon 10", "--tune all"),
    "letters": ("attention, epsilon 10, public letters only", "--public-classes letters"),
}


def commands(name):
    """(train command, evaluate command) of a row, as a user would type them."""
    out = BASE if name == "eps10" else f"{BASE}-{name}"
    flags = ROWS[name][1]
    if name not in ("eps10", "letters"):
        flags += f" --init {BASE}"
    where = "" if name == "eps10" else f" --out {out}"
    return f"python train.py {flags.strip()}{where}".replace("  ", " ").strip(), f"python evaluate.py {out}"


def run_row(name):
    """Train, evaluate, append to results.jsonl. The feature network of the first run judges all rows of the same public set."""
    train, evaluate = commands(name)
    out = Path(BASE if name == "eps10" else f"{BASE}-{name}")
    shutil.rmtree(out, ignore_errors=True)
    seconds = {}
    for stage, command in (("train", train), ("evaluate", evaluate)):
        if stage == "evaluate" and "--init" in train and (Path(BASE) / "public" / "features.pt").exists():
            shutil.copy(Path(BASE) / "public" / "features.pt", out / "public")
        print(f"$ {command}", flush=True)
        begin = time.monotonic()
        subprocess.run([sys.executable, *command.split()[1:]], check=True)
        seconds[stage] = time.monotonic() - begin
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    row = {"table": "digits", "row": name, "label": ROWS[name][0], "commands": [train, evaluate], "commit": commit,
           "date": date.today().isoformat(), "seconds": seconds, "threads": torch.get_num_threads(),
           "privacy": json.loads((out / "release" / "privacy.json").read_text()),
           "evaluation": json.loads((out / "internal" / "evaluation.json").read_text())}
    with open(RESULTS, "a") as file:
        file.write(json.dumps(row) + "\n")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "--list" in argv:
        for name in ROWS:
            print(f"{name:8} {' && '.join(commands(name))}")
        return
    unknown = [name for name in argv if name not in ROWS]
    if unknown:
        sys.exit(f"error: no row {unknown[0]!r}; choose among {', '.join(ROWS)}")
    have = {json.loads(line)["row"] for line in RESULTS.read_text().splitlines()} if RESULTS.exists() else set()
    for name in argv or [name for name in ROWS if name not in have]:
        run_row(name)


if __name__ == "__main__":
    main()
