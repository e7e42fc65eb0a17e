"""The README's tables from bench/results.jsonl: `python -m bench.tables` prints them, `--write` puts them into README.md.

Between `<!-- table: NAME -->` and `<!-- end -->` the README holds what this program makes; of several lines for the same row
the last one counts. A figure that nobody measured cannot get in.
"""
import json
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def load(table):
    """Rows of one table in the order in which they first appear, the last measurement of each."""
    rows = {}
    for line in (HERE / "results.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["table"] == table:
            rows[row["row"]] = row
    return list(rows.values())


def percent(x):
    return f"{100 * x:.1f} %"


def digits():
    """One line per run: what was tuned, epsilon, accuracies on real digits, Frechet distance, parameters, minutes, command."""
    rows = load("digits")
    held_out = list(rows[0]["evaluation"]["held_out"].items())
    head = ["run", "epsilon", "trained parameters", *[f"CNN on {name}" for name, _ in held_out], "MLP", "log. regr.",
            "Frechet", "minutes: train + evaluate (threads)", "command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        p, e = row["privacy"], row["evaluation"]
        first = held_out[0][0]
        epsilon = p["epsilon"] if isinstance(p["epsilon"], str) else f"{p['epsilon']:.3g}"
        cells = [row["label"], epsilon, f"{p['trained_parameters']:,}" if p["steps"] else "-",
                 *[percent(e["accuracy"]["cnn"][name]) if name in e["accuracy"]["cnn"] else "-" for name, _ in held_out],
                 percent(e["accuracy"]["mlp"][first]), percent(e["accuracy"]["logreg"][first]),
                 f"{e['distance']['frechet']:.1f}", f"{row['seconds']['train'] / 60:.1f} + {row['seconds']['evaluate'] / 60:.1f} "
                 f"({row['threads']})", f"`{row['commands'][0]}`"]
        lines.append("| " + " | ".join(cells) + " |")
    commits = sorted({row["commit"] for row in rows})
    return "\n".join(lines) + f"\n\nProtocol `{rows[0]['evaluation']['protocol']}`; measured at {', '.join(commits)}."


TABLES = {"digits": digits}


def main(argv=None):
    write = "--write" in (sys.argv[1:] if argv is None else argv)
    text = README.read_text()
    for name, make in TABLES.items():
        table = make()
        print(f"{name}\n{table}\n")
        text = re.sub(rf"(<!-- table: {name} -->\n).*?(<!-- end -->)", lambda m, t=table: f"{m[1]}{t}\n{m[2]}", text, flags=re.S)
    if write:
        README.write_text(text)


if __name__ == "__main__":
    main()
