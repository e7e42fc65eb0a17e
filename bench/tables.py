"""The tables of README.md and of pages in docs/, from bench/results.jsonl and the code.

    python -m bench.tables            prints them
    python -m bench.tables --write    puts them into the pages

A page holds a table between `<!-- table: NAME -->` and `<!-- end -->`. If a row was measured several
times, the last measurement counts. A metric that nobody measured cannot get in.
"""
import json
import math
import re
import sys
import textwrap
from functools import partial
from importlib import import_module
from pathlib import Path

import datasets
from bench.runs import commands
from support import randomness

HERE = Path(__file__).parent
ROOT = HERE.parent

# "Read in this order": files and what each is about. The lines are counted, the minutes follow from them.
READING = {
    "diffusion.py": "noise schedule, training loss, DDIM sampling",
    "vae.py": "the autoencoder and its latent scale",
    "unet.py": "the network that predicts the noise",
    "tuning.py": "which parameters are tuned on private images",
    "optim.py": "learning rate, moving average, optimizers",
    "dp_sgd.py": "Poisson batches, clipping, noise; the per-example gradients",
    "accountant.py": "from q, sigma and the number of steps to epsilon",
    "train.py": "the three stages, one after the other",
    "sample.py": "from a release to images",
    "metrics.py": "classifiers that learn from samples, Frechet distance, precision and recall",
    "evaluate.py": "from a release to its metrics: protocols, report",
}
LINES_PER_MINUTE = 25
LETTERS = "abcdefgh"  # of feature networks
MARK = "†"  # at the epsilon of a run with noise of torch
MARKED = f"""{MARK} The noise came from torch's generator, which can be computed: by today's standard NOT
PRIVATE ([noise](#which-rows-are-private-by-todays-standard))."""

# The table of the README: (table, row, row of the same public model before tuning, row of the public drawings
# in place of samples, what it is, a note).
FIRST_ROWS = [
    ("digits", "eps10", "public", "drawings", "digits: tuned on 8,000 MNIST digits", ""),
    ("papers", "mnist-eps10", "mnist-public", "mnist-drawings",
     "digits, wider network: tuned on all of MNIST", "before tuning: public networks of the next row"),
    ("papers", "mnist-eps1", "mnist-public", "mnist-drawings",
     "the same with a tenth of the budget (private stage only)",
     "after the row above or, as here, `python train.py --preset mnist-strokes --steps 0 --out "
     "runs/mnist-strokes`"),
    ("papers", "letters-eps10", None, None, "the same at epsilon 10, public letters only, no digit",
     "nearest to the paper's pair of sets"),
    ("papers", "garments-whole-10000", "garments-whole-public", "garments-drawings",
     "garments: tuned on Fashion-MNIST (private stage only)",
     "after `python train.py --preset garments --steps 0 --out runs/garments-whole`"),
    ("papers", "garments-voted-eps1", None, None,
     "the same at epsilon 1, a vote on the drawings included (alone epsilon 0.5)",
     "after `python -m extensions.vote --epsilon 0.5 --out runs/garments-vote-half`; "
     "[vote](extensions/vote.py): not in the paper"),
    ("faces", "portraits-shift-whole-again", None, None, "faces in colour, 32 pixels: only a shift tuned",
     "[shift](extensions/shift.py); by guessing 54 %; the two sets are [not distributed](docs/datasets.md)"),
]

# The first table of docs/results.md: (what, goal in per cent, whose goal it is, table, row).
GOALS = [
    ("MNIST, drawn digits and letters public (NOT comparable: the paper's had letters only)", 97.4,
     "the paper's", "papers", "mnist-eps10"),
    ("the same", 95.9, "the paper's", "papers", "mnist-eps1"),
    ("MNIST, only drawn letters public", 97.4, "the paper's", "papers", "letters-eps10"),
    ("the same", 95.9, "the paper's", "papers", "letters-eps1-muon"),
    ("Fashion-MNIST, drawn garments public", 84.0, "ours", "papers", "garments-whole"),
    ("the same with larger batches (private stage only)", 84.0, "ours", "papers", "garments-whole-10000"),
    ("the same, with a shift", 76.0, "ours", "papers", "garments-whole-shift-eps1"),
    ("the same, after a vote on the drawings", 76.0, "ours", "papers", "garments-voted-eps1"),
    ("Male of faces, drawn faces and photographs public, only a shift tuned", 64.0, "ours", "faces",
     "portraits-shift-whole-again"),
]


# Rows of `bench.papers` that better ones have replaced. They stand at the end of docs/results.md.
REPLACED = {"garments10k-eps10", "garments-public-eps10", "garments-public-eps10-50000",
            "garments-public-eps1", "garments-public-eps10-all", "garments-gpu-eps10", "garments-gpu-eps1",
            "garments-shift-eps10"}
PARTS = {"mnist": "mnist", "letters": "mnist", "fashion": "other", "photos": "other"}  # all others: garments


def part_of(name):
    """The table of docs/results.md in which a row of `bench.papers` stands."""
    return "replaced" if name in REPLACED else PARTS.get(re.match("[a-z]+", name)[0], "garments")


def load(table):
    """Rows of a table in the order of `bench.TABLE`, each as last measured. Without rows no longer listed.

    Labels are those of `bench.TABLE`. Commands are those that ran, except where `bench.TABLE` says Adam: the
    older version had no flag for it, so today's command stands there.
    """
    lines = map(json.loads, (HERE / "results.jsonl").read_text().splitlines())
    last = {line["row"]: line for line in lines if line["table"] == table}
    rows = import_module(f"bench.{table}").ROWS
    found = {name: {**last[name], "label": row.label} for name, row in rows.items() if name in last}
    for name in found:
        if "--private-optimizer adam" in (rows[name].train or ""):
            found[name]["commands"] = commands(rows[name])
    return list(found.values())


def markdown(head, rows):
    """A table of Markdown: the header's words, then one list of cells per row."""
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    return "\n".join(lines + ["| " + " | ".join(cells) + " |" for cells in rows])


def percent(x):
    return f"{100 * x:.1f} %"


def first(scores):
    """Accuracy on the first of the held-out sets."""
    return next(iter(scores.values()))


def last(scores):
    """Accuracy on the last of the held-out sets, the largest one."""
    return next(reversed(scores.values()))


def with_seeds(rows, name):
    """The row of this name and those that sample its run with further seeds.

    An earlier run of that name has another digest. Older rows have none; there an earlier day tells.
    """
    def same_run(row):
        if "run" in row and "run" in rows[name]:
            return row["run"] == rows[name]["run"]
        return row["date"] >= rows[name]["date"]

    return [rows[name], *(row for key, row in rows.items()
                          if key.startswith(f"{name}-seed") and same_run(row))]


def over_seeds(rows, name, held_out=None):
    """The CNN's accuracy on a held-out set (None: the last), the mean of all sampling seeds of a row."""
    scores = [row["evaluation"]["accuracy"]["cnn"] for row in with_seeds(rows, name)]
    return sum(last(s) if held_out is None else s[held_out] for s in scores) / len(scores)


def minutes(row, digits=0):
    """Minutes of training and of evaluation, and the number of threads they had, or the GPU."""
    train, evaluate = (row["seconds"].get(key, 0) / 60 for key in ("train", "evaluate"))
    return f"{train:.{digits}f} + {evaluate:.{digits}f} ({row.get('gpu') or row['threads']})"


def torch_noise(privacy):
    """Whether the noise came from torch's generator, so that it can be computed: NOT PRIVATE today."""
    noisy = privacy["steps"] and privacy["epsilon"] != "inf"
    return bool(noisy) and randomness.can_be_computed(privacy)


def epsilon(privacy):
    """Epsilon of a privacy statement as text, marked if the noise can be computed.

    JSON has infinity as text already.
    """
    text = privacy["epsilon"] if isinstance(privacy["epsilon"], str) else f"{privacy['epsilon']:.3g}"
    return f"{text} {MARK}" if torch_noise(privacy) else text


def measured(rows):
    """Commits and days of measurements, each once."""
    return ", ".join(dict.fromkeys(f"{row['commit']}, {row['date'][:10]}" for row in rows))


def error(rate, n):
    """Standard error of an accuracy on n images, in per cent."""
    return 100 * math.sqrt(rate * (1 - rate) / n)


def trained(privacy):
    """Number of tuned parameters as text."""
    return f"{privacy['trained_parameters']:,}" if privacy["steps"] else "-"


def judges(rows):
    """The feature networks in which the rows' distances are measured."""
    distances = [row["evaluation"]["distance"] for row in rows]
    return list(dict.fromkeys(distance["features"] for distance in distances if distance))


def frechet(row, rows):
    """The distance as text, "-" if it was skipped.

    With a letter for its feature network if the rows have several (pitfall 22).
    """
    names, distance = judges(rows), row["evaluation"]["distance"]
    if distance is None:
        return "-"
    letter = f" ({LETTERS[names.index(distance['features'])]})" if len(names) > 1 else ""
    return f"{distance['frechet']:.1f}{letter}"


def accuracies(rows, name):
    """The CNN's accuracy on each held-out set with its standard error, the mean of all sampling seeds."""
    parts = []
    for held_out, n in rows[name]["evaluation"]["held_out"].items():
        rate = over_seeds(rows, name, held_out)
        parts.append(f"{percent(rate)[:-2]} ± {error(rate, n):.1f} % on {held_out}")
    return "; ".join(parts)


def overview():
    """The README's table: some runs, what they reach, how long they took."""
    head = ["what you get", "private images", "epsilon", "protocol", "metric ± error of the test set",
            "before tuning", "the public drawings, no model", "minutes: train + evaluate (threads)",
            "commands", "measured at", "note"]
    cells = []
    for table, name, before, drawings, what, note in FIRST_ROWS:
        rows = {row["row"]: row for row in load(table)}
        row, seeds = rows[name], len(with_seeds(rows, name))
        task = "Male: " if table == "faces" else ""
        score = f"{task}CNN reaches {accuracies(rows, name)}"
        bases = [percent(over_seeds(rows, other)) if other in rows else "-"
                 for other in (before, drawings)]
        notes = [f"mean of {seeds} sampling seeds"] * (seeds > 1) + [note] * bool(note)
        commits = dict.fromkeys(each["commit"] for each in with_seeds(rows, name))
        e = row["evaluation"]
        steps = re.search("[0-9]+ steps", e["sampler"])[0]  # protocol `table` alone would mean 200
        cells.append([what, f"{row['privacy']['n']:,}", epsilon(row["privacy"]),
                      f"`{e['protocol']}`, {e['n']:,} samples of {steps}", score, *bases, minutes(row),
                      ", ".join(f"`{command}`" for command in row["commands"]), ", ".join(commits),
                      "; ".join(notes)])
    return markdown(head, cells)


def goals():
    """docs/results.md: what was aimed at, what was reached, and by which commands."""
    head = ["a CNN learns from samples of", "epsilon", "goal", "reached", "train", "evaluate", "measured at"]
    cells = []
    for what, goal, whose, table, name in GOALS:
        rows = {row["row"]: row for row in load(table)}
        row = rows[name]
        reached = 100 * over_seeds(rows, name)
        spread = error(reached / 100, last(row["evaluation"]["held_out"]))
        verdict = f"{reached:.1f} % ± {spread:.1f}" + ("" if reached >= goal else ": missed")
        train, *_, evaluate = row["commands"]
        cells.append([what, epsilon(row["privacy"]), f"{goal:g} % ({whose})", verdict, f"`{train}`",
                      f"`{evaluate}`", measured(with_seeds(rows, name))])
    marked = [MARKED] * any(MARK in cell for _, cell, *_ in cells)
    return "\n\n".join([markdown(head, cells), *marked])


def reading():
    """The README's reading list, with the real lengths of the files."""
    head = ["", "file", "lines", "minutes", "what it is about"]
    cells = []
    for i, (name, what) in enumerate(READING.items(), 1):
        lines = len((ROOT / name).read_text().splitlines())
        cells.append([str(i), f"`{name}`", str(lines), str(round(lines / LINES_PER_MINUTE)), what])
    return markdown(head, cells)


def sets():
    """docs/datasets.md: what the registry knows of each data set."""
    head = ["name", "role", "images", "pixels", "in training", "classes", "in the data root"]
    cells = []
    for name, entry in datasets.REGISTRY.items():
        place = f"`{entry.files or name}`"
        if entry.drawn or entry.own:
            place = "drawn, not stored" if entry.drawn else "anywhere"
        elif name == "mnist10k":
            place = "in this repository"
        pixels = f"{entry.side}, {'grey' if entry.channels == 1 else 'colour'}"
        cells.append([f"`{name}:PATH`" if entry.own else f"`{name}`", entry.role, entry.about,
                      pixels if entry.side and not entry.own else "any", f"{entry.n:,}" if entry.n else "",
                      str(len(entry.classes) or ""), place])
    return markdown(head, cells)


def digits():
    """One line per run: what was tuned, epsilon, accuracies on real digits, distance, minutes, command."""
    rows = load("digits")
    held_out = list(rows[0]["evaluation"]["held_out"])
    head = ["run", "epsilon", "trained parameters", *[f"CNN on {name}" for name in held_out],
            f"MLP on {held_out[-1]}", f"logistic regression on {held_out[-1]}", "Frechet distance",
            "minutes: train + evaluate (threads)", "command", "measured at"]
    cells = []
    for row in rows:
        p, accuracy = row["privacy"], row["evaluation"]["accuracy"]
        cnn = [percent(accuracy["cnn"][name]) if name in accuracy["cnn"] else "-" for name in held_out]
        cells.append([row["label"], epsilon(p), trained(p), *cnn,
                      percent(last(accuracy["mlp"])), percent(last(accuracy["logreg"])), frechet(row, rows),
                      minutes(row, 1), f"`{row['commands'][0]}`", measured([row])])
    return markdown(head, cells) + "\n\n" + origin(rows)


def ablations():
    """What is tuned, at epsilon 10 and 1, with the same public stages; then changes of the recipe."""
    rows = {row["row"]: row for row in load("ablations")}
    tuned = {"attention": (rows["again"], rows["attention-eps1"])}
    for name, row in rows.items():
        p = row["privacy"]
        if not name.endswith("-eps1") and (p["tune"], p["from_block"]) != ("attention", 0):
            tuned[name] = (row, rows.get(f"{name}-eps1"))
    shown = list(rows.values())

    def scores(row):
        if row is None:
            return ["-"] * 3
        accuracy = row["evaluation"]["accuracy"]
        return [percent(last(accuracy["cnn"])), percent(last(accuracy["logreg"])), frechet(row, shown)]

    def source(row):
        return f"`{row['commands'][0]}` ({row['commit']})" if row else "-"

    names = ("CNN", "logistic regression", "Frechet distance")
    columns = [[row for row in column if row] for column in zip(*tuned.values(), strict=True)]
    epsilons = ["/".join(dict.fromkeys(epsilon(row["privacy"]) for row in column)) for column in columns]
    metrics = [f"{name}, epsilon {e}" for e in epsilons for name in names]
    head = ["tuned (flag)", "trained", "of these see only noise", *metrics, "epsilon 10: command and commit",
            "epsilon 1: command and commit"]
    cells = []
    for ten, one in tuned.values():
        p = ten["privacy"]
        flag = f"`{p['tune']}`" + (f" `--from-block {p['from_block']}`" if p["from_block"] else "")
        idle = p.get("of_these_see_only_noise")
        cells.append([flag, f"{p['trained_parameters']:,}", "-" if idle is None else f"{idle:,}",
                      *scores(ten), *scores(one), source(ten), source(one)])
    head2 = ["change of the recipe (attention)", "epsilon", *names, "command", "measured at"]
    recipe = [row for name, row in rows.items() if name not in tuned and not name.endswith("-eps1")]
    changes = [[row["label"], epsilon(row["privacy"]), *scores(row), f"`{row['commands'][0]}`",
                measured([row])] for row in recipe]
    return markdown(head, cells) + "\n\n" + markdown(head2, changes) + "\n\n" + origin(shown)


def papers(part):
    """Runs on full data sets: accuracy of a CNN trained on samples, one number per sampling seed.

    part: which of them, see part_of.
    """
    rows = {row["row"]: row for row in load("papers") if part_of(row["row"]) == part}
    head = ["public set, private stage", "epsilon", "CNN on real test images, per sampling seed", "samples",
            "Frechet distance", "trained parameters", "minutes: train + evaluate (threads)", "command",
            "measured at"]
    cells, shown = [], []
    for name, row in rows.items():
        if "-seed" in name:
            continue
        seeds = with_seeds(rows, name)
        shown += seeds
        p, e = row["privacy"], row["evaluation"]
        accuracies = [f"{100 * first(r['evaluation']['accuracy']['cnn']):.2f}" for r in seeds]
        label = row["label"].removeprefix("Fashion-").removeprefix("MNIST, ")  # the heading names the set
        cells.append([label, epsilon(p), ", ".join(accuracies) + " %",
                      f"{e['n']:,}", frechet(row, list(rows.values())), trained(p), minutes(row),
                      f"`{row['commands'][0]}`", measured(seeds)])
    return markdown(head, cells) + "\n\n" + origin(shown)


def recipes():
    """Changes of the recipe, tried on a pretend-private set."""
    rows = load("recipes")
    head = ["recipe", "epsilon", "CNN on held-out pretend digits", "logistic regression", "Frechet distance",
            "training minutes (threads)", "command", "measured at"]
    cells = []
    for row in rows:
        accuracy = row["evaluation"]["accuracy"]
        cells.append([row["label"], epsilon(row["privacy"]), percent(first(accuracy["cnn"])),
                      percent(first(accuracy["logreg"])), frechet(row, rows),
                      f"{row['seconds']['train'] / 60:.0f} ({row['threads']})",
                      f"`{row['commands'][0]}`", measured([row])])
    return markdown(head, cells) + "\n\n" + origin(rows)


def faces():
    """Real faces: distance of the samples to held-out faces, accuracy of a classifier trained on samples."""
    rows = load("faces")
    head = ["condition and epsilon", "epsilon", "Frechet distance", "two halves of the real faces",
            "precision", "recall", "Male, CNN", "Male, logistic regression", "trained parameters",
            "minutes: train + evaluate (threads)", "command", "measured at"]
    cells = []
    for row in rows:
        d, accuracy = row["evaluation"]["distance"], row["evaluation"]["accuracy"]
        shown = [f"{d['halves']:.1f}", f"{d['precision']:.2f}", f"{d['recall']:.2f}"] if d else ["-"] * 3
        cells.append([row["label"], epsilon(row["privacy"]), frechet(row, rows), *shown,
                      percent(first(accuracy["cnn"])), percent(first(accuracy["logreg"])),
                      trained(row["privacy"]), minutes(row), f"`{row['commands'][0]}`", measured([row])])
    return markdown(head, cells) + "\n\n" + origin(rows)


def gpu():
    """docs/speed.md: the private step on a GPU against the same step without privacy, as last measured."""
    lines = map(json.loads, (HERE / "results.jsonl").read_text().splitlines())
    found = {(line["row"], line["card"], line["micro_batch"]): line for line in lines
             if line["table"] == "gpu" and "micro_batch" in line and line["card"] != "cpu"}
    head = ["network", "tuned", "precision", "images at a time", "without privacy, images/s",
            "book-keeping, images/s", "time ratio", "peak memory, GiB", "memory ratio", "vmap, time ratio",
            "card, commit"]
    cells = []
    for (name, card, batch), line in sorted(found.items()):
        network, tune, precision = name.split(", ")[1:]
        rows = {row["method"]: row for row in line["rows"]}
        book = rows["bookkeeping"]
        cells.append([network, tune, precision, f"{batch:,}", f"{rows['none']['examples_per_s']:,.0f}",
                      f"{book['examples_per_s']:,.0f}", f"{book['time_ratio']:.2f}",
                      f"{book['peak_mib'] / 1024:.1f}", f"{book['memory_ratio']:.2f}",
                      f"{rows['vmap']['time_ratio']:.2f}" if "vmap" in rows else "-",
                      f"{card}, {line['commit']}"])
    return markdown(head, cells)


def origin(rows):
    """Protocol, number of samples and sampler, said once below a table, and which distances compare."""
    if not rows:
        return "Not measured yet."
    n = sorted({f"{row['evaluation']['n']:,}" for row in rows})
    # "DDIM, 15 steps, eta 0"
    samplers = {row["evaluation"]["sampler"].split(", guidance")[0] for row in rows}
    sampler = f" of {samplers.pop()}" if len(samplers) == 1 else ""
    text = f"Protocol `{rows[0]['evaluation']['protocol']}`, {' or '.join(n)} samples{sampler}."
    names = judges(rows)
    letters = "; ".join(f"({letter}) {name}" for letter, name in zip(LETTERS, names, strict=False))
    if len(names) > 1:
        text += f" Distances compare only within one feature network: {letters}."
    marked = [MARKED] * any(torch_noise(row["privacy"]) for row in rows)
    return "\n\n".join([textwrap.fill(text, 110), *marked])


TABLES = {"digits": digits, "ablations": ablations, "recipes": recipes, "faces": faces,
          **{f"papers-{part}": partial(papers, part) for part in ("mnist", "garments", "other", "replaced")}}
PAGES = ((ROOT / "README.md", {"overview": overview, "reading": reading}),
         (ROOT / "docs" / "results.md", {"goals": goals, **TABLES}),
         (ROOT / "docs" / "datasets.md", {"sets": sets}), (ROOT / "docs" / "speed.md", {"gpu": gpu}))


def replaced(text, name, table):
    """The page with a new table between its markers. ValueError if they do not stand there exactly once."""
    pattern = rf"(<!-- table: {name} -->\n).*?(<!-- end -->)"
    text, found = re.subn(pattern, lambda m: f"{m[1]}{table}\n{m[2]}", text, flags=re.S)
    if found != 1:
        raise ValueError(f"table {name} has {found} places on its page, not one")
    return text


def main(argv=None):
    write = "--write" in (sys.argv[1:] if argv is None else argv)
    for page, tables in PAGES:
        text = page.read_text()
        for name, make in tables.items():
            table = make()
            print(f"{name}\n{table}\n")
            text = replaced(text, name, table)
        if write:
            page.write_text(text)


if __name__ == "__main__":
    main()
