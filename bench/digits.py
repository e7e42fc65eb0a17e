"""The table `digits` of docs/results.md: the default run, its privacy levels, comparisons. See `bench.runs`.

By these commands all rows but `letters`, whose public set is another, share the public stages of the first
(`--init`). docs/results.md says which did so when they were measured.
"""
from bench.runs import Row, main

BASE = "runs/digits"


def again(label, name, flags):
    """A row that trains only the private stage anew."""
    return Row(label, f"{flags} --init {BASE} --out {BASE}-{name}".strip(), f"{BASE}-{name}")


ROWS = {
    "eps10": Row("attention, epsilon 10 (the default)", "", BASE),
    "public": again("public only, before tuning", "public", "--steps 0"),
    "drawings": Row("the public drawings themselves, no model", None, f"{BASE}-public",
                    f"--public --out {BASE}-public/internal/drawings.json"),
    "eps1": again("attention, epsilon 1", "eps1", "--epsilon 1 --lr 2e-3"),
    "eps3": again("attention, epsilon 3", "eps3", "--epsilon 3"),
    "inf": again("attention, no noise (not private)", "inf", "--epsilon inf"),
    "all": again("all parameters, epsilon 10", "all", "--tune all"),
    "letters": Row("attention, epsilon 10, public letters only",
                   f"--public-classes letters --out {BASE}-letters",
                   f"{BASE}-letters"),
}

if __name__ == "__main__":
    main("digits", ROWS)
