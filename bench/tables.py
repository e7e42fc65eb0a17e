"""The README's tables from bench/results.jsonl: `python -m bench.tables` prints them, `--write` puts them into README.md.

Between `<!-- table: NAME -->` and `<!-- end -->` the README holds what this program makes; of several lines for the same row
the last one counts. A figure that nobody measured cannot get in.
"""
import json
import re
import sys
from importlib import import_module
from pathlib import Path

HERE = Path(__file__).parent
README = HERE.parent / "README.md"


def load(table):
    """Rows of one table in the order of `bench.TABLE`, the last measurement of each; without rows that are no longer there."""
    lines = map(json.loads, (HERE / "results.jsonl").read_text().splitlines())
    last = {line["row"]: line for line in lines if line["table"] == table}
    rows = import_module(f"bench.{table}").ROWS
    return [{**last[name], "label": row.label} for name, row in rows.items() if name in last]


def percent(x):
    return f"{100 * x:.1f} %"


def epsilon(privacy):
    """Epsilon of a privacy statement as text; JSON has infinity as text already."""
    return privacy["epsilon"] if isinstance(privacy["epsilon"], str) else f"{privacy['epsilon']:.3g}"


def judges(rows):
    """The feature networks in which the rows' distances live."""
    return list(dict.fromkeys(row["evaluation"]["distance"]["features"] for row in rows if row["evaluation"]["distance"]))


def frechet(row, rows):
    """The distance as text, with a letter for its feature network where the rows of a table have several (pitfall 22)."""
    names, distance = judges(rows), row["evaluation"]["distance"]
    return f"{distance['frechet']:.1f}" + (" " + "abcdefgh"[names.index(distance["features"])] if len(names) > 1 else "")


def digits():
    """One line per run: what was tuned, epsilon, accuracies on real digits, Frechet distance, parameters, minutes, command."""
    rows = load("digits")
    held_out = list(rows[0]["evaluation"]["held_out"].items())
    last = held_out[-1][0]
    head = ["run", "epsilon", "trained parameters", *[f"CNN on {name}" for name, _ in held_out], f"MLP on {last}",
            "log. regr. on them", "Frechet", "minutes: train + evaluate (threads)", "command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        p, e = row["privacy"], row["evaluation"]
        cells = [row["label"], epsilon(p), f"{p['trained_parameters']:,}" if p["steps"] else "-",
                 *[percent(e["accuracy"]["cnn"][name]) if name in e["accuracy"]["cnn"] else "-" for name, _ in held_out],
                 percent(e["accuracy"]["mlp"][last]), percent(e["accuracy"]["logreg"][last]),
                 frechet(row, rows), f"{row['seconds']['train'] / 60:.1f} + {row['seconds']['evaluate'] / 60:.1f} "
                 f"({row['threads']})", f"`{row['commands'][0]}`"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n\n" + origin(rows)


def ablations():
    """What is tuned, at epsilon 10 and 1, beside the rows of `digits` with the same public stages; then changes of the recipe."""
    base = {row["row"]: row for row in load("digits")}
    rows = {row["row"]: row for row in load("ablations")}
    tuned = {"attention": (rows["again"], base["eps1"]), "all": (base["all"], rows.get("all-eps1"))}
    tuned |= {name: (row, rows.get(f"{name}-eps1")) for name, row in rows.items()
              if not name.endswith("-eps1") and row["privacy"]["tune"] + str(row["privacy"]["from_block"]) != "attention0"}

    shown = [*rows.values(), base["eps1"], base["all"]]

    def scores(row):
        if row is None:
            return ["-"] * 3
        e = row["evaluation"]
        return [percent(next(iter(reversed(e["accuracy"]["cnn"].values())))),
                percent(next(iter(reversed(e["accuracy"]["logreg"].values())))), frechet(row, shown)]

    columns = [f"{what}, epsilon {e}" for e in (10, 1) for what in ("CNN", "log. regr.", "Frechet")]
    head = ["tuned (flag)", "trained", "of these only noise", *columns, "epsilon 10 measured at"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for first, second in tuned.values():
        p = first["privacy"]
        flag = f"`{p['tune']}`" + (f" `--from-block {p['from_block']}`" if p["from_block"] else "")
        idle = p.get("of_these_see_only_noise")
        lines.append("| " + " | ".join([flag, f"{p['trained_parameters']:,}", "-" if idle is None else f"{idle:,}",
                                        *scores(first), *scores(second), first["commit"]]) + " |")
    recipe = {name: row for name, row in rows.items() if name not in tuned and not name.endswith("-eps1")}
    lines += ["", "| change of the recipe (epsilon 10, attention) | CNN | log. regr. | Frechet | command | measured at |",
              "|---" * 6 + "|"]
    lines += [f"| {row['label']} | " + " | ".join(scores(row)) + f" | `{row['commands'][0]}` | {row['commit']} |"
              for row in recipe.values()]
    return "\n".join(lines) + "\n\n" + origin(shown)


def papers():
    """Runs on full data sets: accuracy of a CNN trained on samples, one figure per sampling seed."""
    rows = {row["row"]: row for row in load("papers")}
    head = ["private and public set", "epsilon", "CNN on real test pictures, per sampling seed", "DDIM steps", "Frechet",
            "trained parameters", "minutes: train + evaluate (threads)", "command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for name, row in rows.items():
        if "-seed" in name:
            continue
        seeds = [row, *(other for key, other in rows.items() if key.startswith(f"{name}-seed"))]
        p, e = row["privacy"], row["evaluation"]
        lines.append("| " + " | ".join([
            row["label"], f"{p['epsilon']:.3g}", ", ".join(f"{100 * next(iter(r['evaluation']['accuracy']['cnn'].values())):.2f}"
                                                           for r in seeds) + " %",
            re.search(r"(\d+) steps", e["sampler"])[1],
            frechet(row, list(rows.values())), f"{p['trained_parameters']:,}" if p["steps"] else "-",
            f"{row['seconds'].get('train', 0) / 60:.0f} + {row['seconds']['evaluate'] / 60:.0f} ({row['threads']})",
            f"`{row['commands'][0]}`"]) + " |")
    return "\n".join(lines) + "\n\n" + origin(list(rows.values()))


def recipes():
    """Changes of the recipe for 60,000 pictures on a pretend-private set."""
    rows = load("recipes")
    head = ["recipe", "epsilon", "CNN on held-out pretend digits", "log. regr.", "Frechet", "training minutes (threads)", "flags"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        p, e = row["privacy"], row["evaluation"]
        flags = row["commands"][0].removeprefix("python train.py ").split(" --out")[0]
        scores = [percent(next(iter(e["accuracy"][name].values()))) for name in ("cnn", "logreg")]
        lines.append("| " + " | ".join([row["label"], epsilon(p), *scores, frechet(row, rows),
                                        f"{row['seconds']['train'] / 60:.0f} ({row['threads']})", f"`{flags}`"]) + " |")
    return "\n".join(lines) + "\n\n" + origin(rows)


def faces():
    """Real faces: distance of the samples to held-out faces, accuracy of a Male classifier trained on samples only."""
    rows = load("faces")
    head = ["condition and epsilon", "epsilon", "Frechet", "two halves of the real faces", "precision", "recall", "Male, CNN",
            "Male, log. regr.", "trained parameters", "minutes: train + evaluate (threads)", "command"]
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    for row in rows:
        p, e = row["privacy"], row["evaluation"]
        d, accuracy = e["distance"], {word: next(iter(scores.values())) for word, scores in e["accuracy"].items()}
        lines.append("| " + " | ".join([
            row["label"], epsilon(p), frechet(row, rows), f"{d['halves']:.1f}", f"{d['precision']:.2f}", f"{d['recall']:.2f}",
            percent(accuracy["cnn"]), percent(accuracy["logreg"]), f"{p['trained_parameters']:,}" if p["steps"] else "-",
            f"{row['seconds'].get('train', 0) / 60:.0f} + {row['seconds']['evaluate'] / 60:.0f} ({row['threads']})",
            f"`{row['commands'][0]}`"]) + " |")
    return "\n".join(lines) + "\n\n" + origin(rows)


def origin(rows):
    """Protocol, number of samples, sampler and commits, said once below a table."""
    if not rows:
        return "Not measured yet."
    n = sorted({f"{row['evaluation']['n']:,}" for row in rows})
    samplers = {row["evaluation"]["sampler"].split(", guidance")[0] for row in rows}  # "DDIM, 15 steps, eta 0"
    sampler = f" of {samplers.pop()}" if len(samplers) == 1 else ""
    several = judges(rows)
    letters = "" if len(several) < 2 else (" Distances compare only where the letter is the same, that of the feature network: " +
                                           "; ".join(f"{x} {name}" for x, name in zip("abcdefgh", several, strict=False)) + ".")
    return (f"Protocol `{rows[0]['evaluation']['protocol']}`, {' or '.join(n)} samples{sampler}; measured at "
            f"{', '.join(sorted({row['commit'] for row in rows}))}.{letters}")


TABLES = {"digits": digits, "ablations": ablations, "papers": papers, "recipes": recipes, "faces": faces}


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
