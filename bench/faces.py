"""Real faces at 32x32: `python -m bench.faces`, see `bench.runs`. Needs the sets faces and public32.

The first row trains the public stages that the next ones reuse; the text rows reuse its autoencoder only.
"""
from bench.runs import Row, main

BASE = "runs/faces"
SCORE = "--n 5000 --classifiers cnn,logreg"
# Features of photographs, not of drawings. The network is trained anew: see the weights in its name.
DRAWN = f"{SCORE} --features public32 --real"
LARGER = ("--public portraits --public-n 20000 --size 64 --factor 8 --latent-channels 16 --vae-steps 3000 "
          "--vae-batch 16 --ldm-steps 8000 --public-optimizer adamw --vae-lr 2e-3 --ldm-batch 32 "
          "--ldm-lr 1.2e-3")
BOTH = "public drawn faces and photographs"
PORTRAITS = ("runs/portraits", "portraits", DRAWN)  # public stages of AdamW
MUON = ("runs/portraits-muon", "portraits", DRAWN)
FEW = "--n 5000 --steps 15 --classifiers cnn,logreg --no-distance"


def again(label, name, flags, base=BASE, preset="faces", score=SCORE):
    out = f"runs/{preset}-{name}"
    return Row(label, " ".join(f"--preset {preset} {flags} --init {base} --out {out}".split()), out, score)


ROWS = {
    "eps10": Row("class, epsilon 10", "--preset faces", BASE, SCORE),
    "public": again("class, before tuning", "public", "--steps 0"),
    "eps1": again("class, epsilon 1", "eps1", "--epsilon 1 --lr 2e-3"),
    "inf": again("class, no noise (not private)", "inf", "--epsilon inf"),
    "text": again("text, epsilon 10", "text", "--condition text --ldm-steps 1500"),
    "text-eps1": again("text, epsilon 1", "text-eps1", "--condition text --epsilon 1 --lr 2e-3",
                       f"{BASE}-text"),
    "64": Row("class, 64 x 64 pixels, epsilon 10",
              "--preset faces --size 64 --vae-batch 16 --vae-steps 1500 --ldm-batch 64 --ldm-steps 1500 "
              f"--out {BASE}-64", f"{BASE}-64", SCORE),
    "portraits": Row(f"class, epsilon 10, {BOTH}", "--preset portraits", "runs/portraits", DRAWN),
    "portraits-public": again(f"class, {BOTH}, before tuning", "public", "--steps 0", *PORTRAITS),
    "portraits-private": again(f"class, epsilon 10, {BOTH}, private stage only", "private", "", *PORTRAITS),
    "portraits-shift": again(f"class, epsilon 10, {BOTH}, only a shift is tuned", "shift",
                             "--tune shift --lr 2e-3", *PORTRAITS),
    "portraits-shift-eps1": again(f"class, epsilon 1, {BOTH}, only a shift is tuned", "shift-eps1",
                                  "--tune shift --epsilon 1 --lr 2e-3", *PORTRAITS),
    # all stages of the row before last in one run: what a user waits for
    "portraits-shift-whole": Row(f"class, epsilon 10, {BOTH}, only a shift is tuned, all stages",
                                 "--preset portraits --tune shift --lr 2e-3 --out runs/portraits-whole",
                                 "runs/portraits-whole", DRAWN),
    # the same with two threads and nothing beside it
    "portraits-shift-whole-again": Row(
        f"class, epsilon 10, {BOTH}, only a shift is tuned, all stages, again",
        "--preset portraits --tune shift --lr 2e-3 --out runs/portraits-whole-again",
        "runs/portraits-whole-again", DRAWN),
    # the same public stages made once more; their model before tuning, and both epsilons on it
    "portraits-muon-public": Row(f"class, {BOTH} (by Muon), before tuning",
                                 f"--preset portraits --steps 0 --out {MUON[0]}", MUON[0], DRAWN),
    "portraits-muon-shift": again(f"class, epsilon 10, {BOTH} (by Muon), only a shift is tuned", "muon-shift",
                                  "--tune shift --lr 2e-3", *MUON),
    "portraits-muon-shift-eps1": again(f"class, epsilon 1, {BOTH} (by Muon), only a shift is tuned",
                                       "muon-shift-eps1", "--tune shift --epsilon 1 --lr 2e-3", *MUON),
    "portraits-muon-attention": again(f"class, epsilon 10, {BOTH} (by Muon), attention tuned",
                                      "muon-attention", "", *MUON),
    # a CPU's share of the H200's run in docs/results.md: a narrower UNet, fewer steps, only a shift
    "portraits-64": Row("class, 64 x 64 pixels, epsilon 10, public drawn faces, only a shift is tuned",
                        f"--preset portraits {LARGER} --tune shift --lr 2e-3 --out runs/portraits-64",
                        "runs/portraits-64", FEW),
    "portraits-64-public": again("class, 64 x 64 pixels, public drawn faces, before tuning", "64-public",
                                 f"{LARGER} --steps 0", "runs/portraits-64", "portraits", f"{FEW} --real"),
}
for name in ("portraits-public", "portraits-shift", "portraits-shift-eps1"):
    ROWS[f"{name}-50000"] = Row(
        f"{ROWS[name].label}: 50,000 samples of 15 steps", None, ROWS[name].out,
        "--n 50000 --steps 15 --classifiers cnn,logreg --no-distance --out "
        f"{ROWS[name].out}/internal/samples50000.json")

if __name__ == "__main__":
    main("faces", ROWS)
