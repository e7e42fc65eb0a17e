"""Rows on the full data sets, to stand beside the paper's: `python -m bench.papers`, see `bench.runs`.

Need the data root (--data-root or DPLDM_DATA); rows NAME-eps1 reuse the public stages of NAME-eps10, the rows
garments-public, -gpu and -shift those of pretrained/garments. Rows seed1 and seed2 score a run with further
sampling seeds.
"""
from bench.runs import Row, main

# The noise of a step, sigma * C / batch, is then about that of the default run (8,000 digits, epsilon 10).
EPS1 = "--epsilon 1 --batch-size 10000 --steps 30 --lr 5e-3 --ema 0.9"
# 1,500 steps, the preset's, make an autoencoder that loses more of a garment (docs/lab-notebook.md).
PHOTOS = "--preset fashion --public public32 --vae-steps 6000"
PHOTOS8 = "--preset fashion-8x8 --public public32"
# Private stages of drawn garments as they were before 876d6b0; the preset has Muon since then.
ADAM = "--private-optimizer adam --ema 0.95"
GARMENTS = {"10": f"{ADAM} --steps 80 --lr 4e-3 ",
            "1": f"{ADAM} --epsilon 1 --batch-size 6000 --steps 20 --lr 3e-3 "}
# At epsilon 1: attention and a shift, by Muon.
SHIFT1 = "--preset garments --epsilon 1 --batch-size 6000 --steps 20 --tune attention+shift"

VOTED = "Fashion-MNIST, drawn garments that were voted for, latents 8x8x4"


def again(label, flags, base, name):
    """A row that trains only the private stage anew, on the public stages of the run folder `base`."""
    return label, f"{flags} --init {base}", f"{base}-{name}"


def both(name, label, flags, out):
    """The rows of one pair of sets: all stages at epsilon 10, and the private stage anew at epsilon 1."""
    return {f"{name}-eps10": (label, flags, out),
            f"{name}-eps1": again(label, f"{flags} {EPS1}", out, "eps1")}


RUNS = {  # name: (label, flags of train.py, run folder)
    **both("mnist", "MNIST, public strokes", "--preset mnist-strokes", "runs/mnist-strokes"),
    "mnist-public": again("MNIST, public strokes, before tuning", "--preset mnist-strokes --steps 0",
                          "runs/mnist-strokes", "public"),
    **both("letters", "MNIST, public stroke letters", "--preset mnist-letters", "runs/mnist-letters"),
    "letters-eps1-muon": again("MNIST, public stroke letters, private stage by Muon",
                               f"--preset mnist-letters {EPS1} --private-optimizer muon --lr 6e-3",
                               "runs/mnist-letters", "eps1-muon"),
    **both("fashion", "Fashion-MNIST, public MNIST", "--preset fashion", "runs/fashion"),
    **both("photos", "Fashion-MNIST, public photographs in grey", PHOTOS, "runs/fashion-photos"),
    "photos-all": again("Fashion-MNIST, public photographs in grey, all parameters", f"{PHOTOS} --tune all",
                        "runs/fashion-photos", "all"),
    **both("fashion8", "Fashion-MNIST, public MNIST, latents 8x8x4", "--preset fashion-8x8",
           "runs/fashion-8x8"),
    **both("photos8", "Fashion-MNIST, public photographs in grey, latents 8x8x4", PHOTOS8, "runs/photos-8x8"),
    "garments-eps10": ("Fashion-MNIST, drawn garments, latents 8x8x4",
                       f"--preset garments {GARMENTS['10'].strip()}", "runs/garments-all-stages"),
    # The preset's own private stage, with Muon. The public stages of garments-eps10 are the preset's.
    "garments-private-eps10": again("Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon",
                                    "--preset garments", "runs/garments-all-stages", "again"),
    "garments-private-eps10-more": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, twice the work",
        "--preset garments --batch-size 8000 --steps 120 --ema 0.95", "runs/garments-all-stages", "more"),
    "garments-private-eps10-long": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, 240 steps of 5,000",
        "--preset garments --batch-size 5000 --steps 240", "runs/garments-all-stages", "long"),
    # The preset's three stages in one run. Then the private stage anew with all parameters, at the only rate
    # of Muon that they had on pretend-private garments.
    "garments-whole": ("Fashion-MNIST, drawn garments, latents 8x8x4, all stages of the preset",
                       "--preset garments", "runs/garments-whole"),
    "garments-whole-all": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, all parameters",
        "--preset garments --tune all --lr 4e-3", "runs/garments-whole", "all"),
    "garments-whole-public": again("Fashion-MNIST, drawn garments, latents 8x8x4, before tuning",
                                   "--preset garments --steps 0", "runs/garments-whole", "public"),
    # Photographs beside the drawings: in stage 1 as images, in stage 2 as an eleventh class.
    "garments-mixed": ("Fashion-MNIST, drawn garments and photographs in grey, latents 8x8x4",
                       "--preset garments --public garments+public32", "runs/garments-mixed"),
    # More steps, planned before any score of garments-whole was known.
    "garments-whole-400": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, 400 steps of 4,000",
        "--preset garments --batch-size 4000 --steps 400", "runs/garments-whole", "400"),
    # What the noise costs: the preset's private stage without it.
    "garments-whole-inf": again("Fashion-MNIST, drawn garments, latents 8x8x4, no noise (not private)",
                                "--preset garments --epsilon inf", "runs/garments-whole", "inf"),
    # Half the preset's learning rate, chosen on pretend-private garments (docs/lab-notebook.md).
    "garments-whole-lr3": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, lr 3e-3",
        "--preset garments --lr 3e-3", "runs/garments-whole", "lr3"),
    # The same with twice the batch, planned before the score of the row before was known.
    "garments-whole-lr3-more": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, lr 3e-3, batches of 6,000",
        "--preset garments --lr 3e-3 --batch-size 6000", "runs/garments-whole", "lr3-more"),
    # Less noise in a step, 0.56 of the preset's. With 0.44 of it (--sigma 0.3, epsilon 84) a CNN of 20,000
    # samples had half a point more (docs/lab-notebook.md).
    "garments-whole-10000": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, batches of 10,000",
        "--preset garments --batch-size 10000", "runs/garments-whole", "10000"),
    # Only the attention at 8x8, planned after the score of garments-whole-lr3. Elsewhere the gradient has
    # hardly any signal (docs/lab-notebook.md).
    "garments-whole-finest": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, attention at full resolution only",
        "--preset garments --tune attention-finest --lr 3e-3", "runs/garments-whole", "finest"),
    # Clipped layer by layer, so that layers with short gradients are not drowned by the others. Planned with
    # one trial on pretend-private garments (docs/lab-notebook.md).
    "garments-whole-per-layer": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, private stage by Muon, clipped per layer",
        "--preset garments --clipping per-layer --clip-norm 0.03", "runs/garments-whole", "per-layer"),
    # Planned after less noise in a step and a longer stage 2 had not helped.
    "garments-wide": ("Fashion-MNIST, drawn garments, latents 8x8x4, UNet of 48 channels",
                      "--preset garments --width 48", "runs/garments-wide"),
    # Stage 2 three times as long: its model teaches a CNN less than the drawings that it learned from.
    "garments-stage2": ("Fashion-MNIST, drawn garments, latents 8x8x4, stage 2 three times as long",
                        "--preset garments --ldm-steps 12000", "runs/garments-stage2"),
    # Muon has the preset's learning rate here. Half of it, the next row, was planned afterwards.
    "garments-whole-shift-eps1": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, attention and a shift, private stage by Muon",
        SHIFT1, "runs/garments-whole", "shift-eps1"),
    "garments-whole-shift-eps1-lr3": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, attention and a shift, private stage by Muon, lr 3e-3",
        f"{SHIFT1} --lr 3e-3", "runs/garments-whole", "shift-eps1-lr3"),
    # Drawings that the private images had voted for (extensions/vote.py), by
    # `python -m extensions.vote --out runs/garments-vote`, and for epsilon 1 by
    # `python -m extensions.vote --epsilon 0.5 --out runs/garments-vote-half`.
    "garments-voted": (f"{VOTED}, all stages", "--preset garments --public voted:runs/garments-vote",
                       "runs/garments-voted"),
    "garments-voted-public": again(f"{VOTED}, before tuning",
                                   "--preset garments --public voted:runs/garments-vote --steps 0",
                                   "runs/garments-voted", "public"),
    "garments-voted-eps1": (f"{VOTED}, all stages", "--preset garments --public "
                            "voted:runs/garments-vote-half --epsilon 1 --batch-size 6000 --steps 20",
                            "runs/garments-voted-eps1"),
    # Smaller steps, which keep more of what the votes gave, with less noise. Planned after the score of
    # garments-voted (83.5 % by seed 0).
    "garments-voted-lr3": again(f"{VOTED}, lr 3e-3, batches of 6,000",
                                "--preset garments --public voted:runs/garments-vote --lr 3e-3 "
                                "--batch-size 6000", "runs/garments-voted", "lr3"),
    # Planned after the score of garments-whole-shift-eps1 (80.1 % by seed 0).
    "garments-whole-shift": again(
        "Fashion-MNIST, drawn garments, latents 8x8x4, attention and a shift, private stage by Muon",
        "--preset garments --tune attention+shift", "runs/garments-whole", "shift"),
}
# 200 steps with eta 1 would take thirteen times as long. 15 do as well as 30: see the rows steps15 and
# steps30 of bench.ablations.
SCORE = "--protocol table --steps 15 --eta 0 --classifiers cnn"
ROWS = {name: Row(label, f"{flags} --out {out}", out, SCORE) for name, (label, flags, out) in RUNS.items()}
SEEDS = {"mnist-eps1": (1, 2), **dict.fromkeys([
    "mnist-eps10", "letters-eps10", "letters-eps1", "letters-eps1-muon", "garments-private-eps10-more",
    "garments-private-eps10-long", "garments-whole", "garments-whole-all", "garments-whole-400",
    "garments-whole-lr3", "garments-whole-lr3-more", "garments-whole-10000", "garments-whole-finest",
    "garments-whole-per-layer", "garments-wide", "garments-whole-shift-eps1",
    "garments-voted", "garments-voted-eps1"], (1,))}
ROWS |= {f"{name}-seed{seed}": Row(ROWS[name].label, None, ROWS[name].out,
                                   f"{SCORE} --seed {seed} --no-distance --out "
                                   f"{ROWS[name].out}/internal/seed{seed}.json")
         for name, seeds in SEEDS.items() for seed in seeds}
# More DDIM steps. 30 were planned after a score of other samples (docs/lab-notebook.md), 50 after that of 30,
# those of batches of 10,000 before any score of that run.
for run, what, steps in (("garments-whole", "all stages of the preset", 30),
                         ("garments-whole", "all stages of the preset", 50),
                         ("garments-whole-10000", "batches of 10,000", 30)):
    for seed in (0, 1):
        name = f"steps{steps}" + f"-seed{seed}" * (seed > 0)
        ROWS[f"{run}-{name}"] = Row(
            f"Fashion-MNIST, drawn garments, latents 8x8x4, {what}, sampled in {steps} steps",
            None, f"runs/{run}",
            f"--protocol table --steps {steps} --eta 0 --classifiers cnn --seed {seed} --no-distance --out "
            f"runs/{run}/internal/{name}.json")
# What a CNN learns from the public drawings themselves, without a model.
for name, what, out in (("mnist", "MNIST, public strokes", "runs/mnist-strokes-public"),
                        ("garments", "Fashion-MNIST, drawn garments", "runs/garments-whole-public"),
                        ("garments-voted", "Fashion-MNIST, drawn garments that were voted for",
                         "runs/garments-voted-public")):
    ROWS[f"{name}-drawings"] = Row(f"{what}: the drawings themselves, no model", None, out,
                                   "--protocol table --public --classifiers cnn --out "
                                   f"{out}/internal/drawings.json")
# A first run, scored on a fifth of the samples.
ROWS["garments10k-eps10"] = Row("Fashion-MNIST, drawn garments, latents 4x4x16",
                                "--preset fashion-8x8 --public garments --public-n 60000 --factor 8 "
                                "--latent-channels 16 --ldm-steps 4000 --steps 120 --out runs/garments",
                                "runs/garments", "--protocol table --n 10000 --steps 30 --eta 0")
# The private stage alone, in 66 or 14 minutes; a fifth of the samples as well.
for epsilon, flags in GARMENTS.items():
    out = f"runs/garments-eps{epsilon}"
    ROWS[f"garments-public-eps{epsilon}"] = Row(
        "Fashion-MNIST, drawn garments, latents 8x8x4",
        f"--preset garments --init pretrained/garments {flags}--out {out}", out,
        "--protocol table --n 10000 --steps 15 --eta 0")
    if epsilon == "10":
        ROWS["garments-public-eps10-50000"] = Row("the same run, scored with 50,000 samples", None, out,
                                                  f"{SCORE} --out {out}/internal/samples50000.json")
# The paper's claim, that tuning the attention suffices, with a public set that fits: the private stage of
# garments-public-eps10, but all parameters are tuned.
ROWS["garments-public-eps10-all"] = Row(
    "Fashion-MNIST, drawn garments, latents 8x8x4, all parameters",
    f"--preset garments --init pretrained/garments --tune all {GARMENTS['10']}--out runs/garments-eps10-all",
    "runs/garments-eps10-all", "--protocol table --n 10000 --steps 15 --eta 0 --no-distance")
# What the drawn garments are worth: silhouettes that know no garment in their place, all stages. Then the
# private stage anew: at epsilon 1, and with all parameters.
SHAPES = "runs/garments-shapes"
for name, what, flags, out in (
        ("shapes-eps10", "", GARMENTS["10"], SHAPES),
        ("shapes-eps1", "", f"--init {SHAPES} {GARMENTS['1']}", f"{SHAPES}-eps1"),
        ("shapes-shift-eps1", ", attention and a shift",
         f"--init {SHAPES} {GARMENTS['1']}--tune attention+shift ", f"{SHAPES}-shift-eps1"),
        ("shapes-eps10-all", ", all parameters", f"--init {SHAPES} --tune all {GARMENTS['10']}",
         f"{SHAPES}-all")):
    ROWS[name] = Row(f"Fashion-MNIST, drawn shapes, latents 8x8x4{what}",
                     f"--preset garments --public shapes {flags}--out {out}", out,
                     "--protocol table --n 10000 --steps 15 --eta 0 --classifiers cnn")
# More private work than a CPU does in an afternoon: minutes on a GPU.
GPU = {"10": "--private-optimizer adam --steps 300 --batch-size 6000 --noise-multiplicity 2 --lr 2e-3 "
             "--ema 0.99",
       "1": f"{ADAM} --epsilon 1 --steps 60 --batch-size 12000 --noise-multiplicity 4 --lr 2e-3"}
for epsilon, flags in GPU.items():
    out = f"runs/garments-gpu-eps{epsilon}"
    ROWS[f"garments-gpu-eps{epsilon}"] = Row(
        "Fashion-MNIST, drawn garments, latents 8x8x4, more private work (on a GPU)",
        f"--preset garments --init pretrained/garments {flags} --out {out}", out, f"{SCORE} --no-distance")
# The private stages with a shift of the latents for each class, which the paper lacks (extensions/shift.py):
# on the public networks of pretrained/garments, and on those of garments-eps10, which Muon has trained. The
# numbers are how many samples score a run at first, and how many again.
MUON = "runs/garments-all-stages"
for name, by, epsilon, init, out, *numbers in (
        ("garments-shift-eps10", "", "10", "pretrained/garments", "runs/garments-shift-eps10", 50_000),
        ("garments-shift-eps1", "", "1", "pretrained/garments", "runs/garments-shift-eps1", 50_000, 10_000),
        ("garments-muon-shift-eps1", " (by Muon)", "1", MUON, f"{MUON}-shift-eps1", 10_000, 50_000)):
    scores = [f"{SCORE} {'' if n == 50_000 else f'--n {n} '}--no-distance" for n in numbers]
    ROWS[name] = Row(
        f"Fashion-MNIST, drawn garments{by}, latents 8x8x4, attention and a shift of the latents",
        f"--preset garments --init {init} {GARMENTS[epsilon]}--tune attention+shift --out {out}", out,
        scores[0])
    for n, score in zip(numbers[1:], scores[1:], strict=True):
        ROWS[f"{name}-{n}"] = Row(f"the same run, scored with {n:,} samples", None, out,
                                  f"{score} --out {out}/internal/samples{n}.json")
ROWS["garments-shift-eps1-more"] = Row(
    "Fashion-MNIST, drawn garments, latents 8x8x4, attention and a shift, three times the private work",
    f"--preset garments --init pretrained/garments {ADAM} --epsilon 1 --batch-size 12000 --steps 30 "
    "--lr 3e-3 --tune attention+shift --out runs/garments-shift-eps1-more", "runs/garments-shift-eps1-more",
    f"{SCORE} --no-distance")

if __name__ == "__main__":
    main("papers", ROWS)
