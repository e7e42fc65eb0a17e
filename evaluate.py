"""Scores of a release's samples: downstream accuracy, Frechet distance, precision and recall.

The evaluation of DP-LDM (Liu et al. 2024, experiments): train a classifier on generated images only, test it
on real ones. The paper's classifiers are those of DPDM (Dockhorn et al. 2023). There are three protocols,
and every metric is reported with its protocol:

    quick   10,000 samples, 30 DDIM steps, eta 0; CNN: 12 epochs, augmented by shifts and rotations (not for
            fashion); MLP and logistic regression: 20 epochs
    table   as for the paper's tables: 50,000 samples, 200 DDIM steps, eta 1; the authors' networks, 50 epochs
            of batch 128, Adam 3e-4
    strict  60,000 samples, 200 DDIM steps, eta 1; the three kinds of residual networks of DPImageBench, 50
            epochs of batch 128, Adam 1e-3 annealed; for a GPU. DPImageBench compares at delta = 1 / (n ln n),
            so train with that --delta (n: private images)

The classifier is scored after its LAST epoch. Held-out images never reach the training loop, so they cannot
choose an epoch (pitfall 15 is the same for the model). The authors use a validation set. They also
enlarge MNIST to 32 pixels; this program scores 28. Images of more than 64 pixels are reduced to 64. A real
colour photograph goes from the file to 64 pixels in one step. A sample goes from the model's size to 64. So
real images are a little sharper, and a part of the distance is due to that alone.

    python evaluate.py runs/digits                       JSON goes to runs/digits/internal/evaluation.json
    python evaluate.py release --out scores.json         a release without its run folder
    python evaluate.py runs/digits --protocol table --data-root DIR
    python evaluate.py runs/digits --samples synthetic.npz --classifiers cnn
    python evaluate.py runs/digits --public --out runs/digits/internal/public.json   public images instead
    python evaluate.py runs/digits --memorisation        are samples copies of private images?

Metrics on held-out images are NOT covered by epsilon, hence internal/. Publish them only if those images are
public anyway, as MNIST's are. The metrics themselves are in metrics.py. The Frechet distance is no "FID".
"""
from support import threads  # noqa: F401, I001 (first: before torch)

import math
import time
from pathlib import Path

import torch

import datasets
import metrics
import sample
from extensions import memorisation
from support import arguments, command_line, files, hardware, scored
from support.classifiers import RESIDUAL, network

# Arguments of metrics.train_classifier.
SIMPLE = {"epochs": 20, "lr": 1e-3, "anneal": True}
PAPER = {"epochs": 50, "lr": 3e-4}
PROTOCOLS = {  # number of samples, steps and eta of DDIM, and the recipe of each classifier
    "quick": {"n": 10_000, "steps": 30, "eta": 0.0, "recipes": {
        "cnn": metrics.STRONG,
        "mlp": {"kind": "mlp", **SIMPLE},
        "logreg": {"kind": "logreg", **SIMPLE}}},
    "table": {"n": 50_000, "steps": 200, "eta": 1.0, "recipes": {
        "cnn": {"kind": "paper-cnn", **PAPER},
        "mlp": {"kind": "mlp", **PAPER},
        "logreg": {"kind": "logreg", **PAPER}}},
    "strict": {"n": 60_000, "steps": 200, "eta": 1.0, "recipes": {
        kind: {"kind": kind, "epochs": 50, "lr": 1e-3, "anneal": True} for kind in RESIDUAL}},
}


def on_real_images(args, release, run, private, recipe, images, labels, real_sets):
    """Scores of a classifier trained on the private TRAINING images, the ceiling of the others: a dict.

    accuracy: on each held-out set. samples: for each class, the share of its samples that the classifier
    assigns to it. The classifier knows private images, so its scores are private. They go to the terminal
    and to internal/ (or where --out says).
    """
    train = scored.load_private(release, private, "train", args.data_root, scored.private_n(release, run),
                                scored.cache_of(run))
    model = metrics.train_classifier(
        images=train.images, labels=train.labels, num_classes=len(release.classes), device=args.device,
        generator=torch.Generator().manual_seed(args.seed), bf16=release.bf16, **recipe)
    of_class = {name: labels == i for i, name in enumerate(release.classes)}
    return {"n": len(train), "recipe": recipe,
            "accuracy": {name: metrics.accuracy(model, x.images, x.labels) for name, x in real_sets.items()},
            "samples": {name: metrics.accuracy(model, images[mine], labels[mine])
                        for name, mine in of_class.items() if mine.any()}}


def report(result):
    """The result as text; each metric with the settings it belongs to (docs/pitfalls.md, row 22)."""
    sets, d = result["held_out"], result["distance"]
    lines = [f"protocol {result['protocol']}: {result['n']:,} samples, {result['sampler']}", ""]
    if result["accuracy"]:
        lines.append(f"{'trained on samples only, last epoch':36}" + "".join(f"{name:>28}" for name in sets))
    for classifier, scores in result["accuracy"].items():
        # Binomial standard errors: the spread of test sets, not of seeds.
        errors = {k: math.sqrt(p * (1 - p) / sets[k]) for k, p in scores.items()}
        cells = [f"{100 * p:.2f} +- {100 * errors[k]:.2f} %" for k, p in scores.items()]
        recipe = result["recipes"][classifier]
        name = f"{classifier} ({recipe['kind']}, {recipe['epochs']} epochs)"
        lines.append(f"{name:36}" + "".join(f"{cell:>28}" for cell in cells))
    if real := result.get("real"):
        name = f"{next(iter(result['recipes']))}, trained on {real['n']:,} real images"
        lines.append(f"{name:36}"
                     + "".join(f"{100 * p:>26.2f} %" for p in real["accuracy"].values()))
        taken = ", ".join(f"{name} {100 * p:.0f} %" for name, p in real["samples"].items())
        lines += ["", f"samples that it assigns to their own class: {taken}"]
    if d:
        lines += ["", f"Frechet distance, features of a {d['features']}: {d['frechet']:.2f}",
                  f"  {d['n'][0]:,} samples against {d['split']}, {d['resize']}; real against real, "
                  f"{d['halves_n']:,} each (fewer images bias it upwards): {d['halves']:.2f}",
                  f"precision {d['precision']:.3f}, recall {d['recall']:.3f} in the same features, k = "
                  f"{d['k']}, {d['manifold_n'][0]:,} samples and {d['manifold_n'][1]:,} real"]
    seconds = ", ".join(f"{k} {v:.0f}" for k, v in result["seconds"].items())
    return "\n".join([*lines, "", f"seconds: {seconds}"])


def samples_of(args, release, run, public, n):
    """Samples (N, C, S, S) uint8, their labels (N,), and one line that says where they come from.

    Read from --samples, or n drawn with the protocol's sampler, in which flags replace single settings. With
    --public n public images take their place.
    """
    if args.public:
        images, labels = scored.public_images(release, public, n, args.seed, args.data_root,
                                              scored.cache_of(run))
        return images, labels, f"public images of {public} in place of samples, seed {args.seed}"
    if args.samples:
        images, labels = scored.read_samples(args.samples, release, args.n)
        return scored.shrink(images), labels, f"read from {args.samples}"
    protocol = PROTOCOLS[args.protocol]
    steps = protocol["steps"] if args.steps is None else args.steps
    eta = protocol["eta"] if args.eta is None else args.eta
    guidance = 1.0 if args.guidance is None else args.guidance
    if release.model.embedder is None and guidance != 1:
        raise ValueError("this model is unconditional: it has no use for --guidance")
    labels = sample.uniform_labels(n, len(release.classes))  # not as in the private set
    images = sample.generate(release, labels, steps, eta, guidance, args.seed)
    sampler = f"DDIM, {steps} steps, eta {eta:g}, guidance {guidance:g}, seed {args.seed}, uniform labels"
    return scored.shrink(images), labels, sampler


def distance_of(args, release, run, public, images, split, real, lap):
    """Result of `compare` and its circumstances, a dict; None if the public set cannot be used.

    run: its folder; None for a release that was copied. images: samples. split, real: name and ImageSet of
    the held-out set. lap(name): files the seconds since its last call.
    """
    size = images.shape[-1]
    try:
        if run is None and not args.features and datasets.REGISTRY[public].own:
            raise ValueError("a release does not say where its own public images lie; name a set with "
                             "--features")
        judge, name = metrics.feature_network(
            run, args.features or public, images.shape[1], size, args.data_root, args.device,
            frame=(release.vae.config.resolution, release.crop), keep=not args.features)
    except ValueError as error:  # the accuracies stand without it
        print(f"Frechet distance skipped: {error}")
        return None
    lap("feature network")
    resized = "not resized" if size == release.crop else f"resized from {release.crop}"
    distance = {"features": name, "split": split, "resize": f"{size} pixels, {resized}",
                **metrics.compare(judge, images, real.images, args.seed)}
    lap("distance")
    return distance


def parse(argv):
    parser = command_line.Parser(description="Score samples of a released model on real held-out images.")
    add = parser.add_argument
    add("run", help="run folder, release folder or model.pt")
    add("--protocol", choices=list(PROTOCOLS), default="quick",
        help="table: hours on a CPU; strict: days [quick]")
    add("--n", type=int, help="samples [10,000 quick, 50,000 table, 60,000 strict; all of --samples; 1,000 "
        "with --memorisation]")
    add("--steps", type=int, help="DDIM steps [30 quick, else 200]")
    add("--eta", type=float, help="fresh noise per DDIM step, 0..1 [0 quick, else 1]")
    add("--guidance", type=float, help="classifier-free guidance weight [1 = none]")
    add("--seed", type=int, default=0, help="of sampling and classifiers [0]")
    add("--samples", help="NPZ of sample.py to score instead of sampling")
    add("--public", action="store_true", help="score public images of the private classes instead of "
        "samples: what is learned without a private image")
    add("--classifiers", help="which to train, with commas [all of the protocol]")
    add("--features", help="set whose classes the feature network learns [the run's public set]")
    add("--real", action="store_true", help="also train the first classifier on the private training images: "
        "its accuracy is the ceiling, and it judges the samples")
    add("--memorisation", action="store_true",
        help="only look for private images near to samples (extensions/memorisation.py)")
    add("--no-distance", action="store_true", help="skip Frechet distance, precision and recall")
    add("--data-root", help="folder of the real data sets [$DPLDM_DATA, else ~/.cache/dpldm]")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i]")
    add("--precision", choices=("auto", "float32", "bf16"), default="auto",
        help="of sampling and classifiers [auto: the faster]")
    add("--out", help="JSON to write [RUN/internal/evaluation.json]")
    args = parser.parse_args(argv)
    if args.features and datasets.REGISTRY[datasets.kind_of(args.features)].role == "private":
        raise ValueError(f"--features: {args.features!r} is none of {', '.join(datasets.names('public'))}")
    if args.features and args.no_distance:
        raise ValueError("--features is for the distance: leave out --no-distance")
    if args.memorisation and (args.real or args.no_distance or args.classifiers):
        raise ValueError("--memorisation scores nothing: leave out --real, --classifiers and --no-distance")
    known = PROTOCOLS[args.protocol]["recipes"]
    args.classifiers = [name.strip() for name in (args.classifiers or ",".join(known)).split(",")]
    if unknown := [name for name in args.classifiers if name not in known]:
        raise ValueError(f"--classifiers: {unknown[0]!r} is none of {', '.join(known)}")
    if (args.samples or args.public) and (args.steps, args.eta, args.guidance) != (None, None, None):
        raise ValueError("--samples and --public take finished images: leave out --steps, --eta and "
                         "--guidance")
    if args.public and (args.samples or args.memorisation):
        raise ValueError("--public takes the place of samples: leave out --samples and --memorisation")
    arguments.check_numbers(args, n=(1, 10 ** 7), steps=(1, 100_000), eta=(0, 1), guidance=(-1000, 1000),
                            seed=(0, 2 ** 62))
    arguments.check_suffix("--out", args.out, ".json")
    hardware.check_device(args.device)
    return args


def main(argv=None):
    args = parse(argv)
    protocol = PROTOCOLS[args.protocol]
    release = sample.load_release(args.run, args.device, hardware.choose_bf16(args.precision, args.device))
    if args.n is not None and args.n < len(release.classes):
        raise ValueError(f"--n must be at least {len(release.classes)}, one sample of each class")
    run, is_folder = scored.find_run(args.run)  # a run folder, or a release that was copied?
    scored.check_place(args, run, is_folder)
    public, private = scored.sources(release, run)
    if args.features and datasets.same_images(args.features, private, args.data_root):
        raise ValueError(f"--features {args.features}: the feature network would learn private images")
    # Read the held-out images before the long work, so that missing ones are reported at once.
    if is_folder:
        scored.check_held_out(run, release, private, args.data_root)
    real_sets = scored.held_out_sets(release, private, args.data_root, scored.cache_of(run))
    split, real = next(iter(real_sets.items()))  # the first one is for the distance; accuracy uses all
    if args.memorisation:
        return memorisation.report(args, release, run, public, private, real,
                                   lambda: samples_of(args, release, run, public, args.n or 1000)[0])
    print(release.privacy["statement"])

    clock, seconds = time.monotonic(), {}

    def lap(name):
        nonlocal clock
        seconds[name], clock = time.monotonic() - clock, time.monotonic()

    # The samples of an unconditional model, or of one class, have no labels to learn from.
    names = args.classifiers if release.model.embedder is not None and len(release.classes) > 1 else []
    if not names:
        print("note: samples without labels, or of one class, train no classifier; --classifiers and --real "
              "have no use")
    for name in names:  # refuses a size for which there is no such network, before the long work
        with torch.device("meta"):
            network(protocol["recipes"][name]["kind"], release.vae.config.out_ch,
                    min(scored.LARGEST, release.crop), len(release.classes))
    images, labels, sampler = samples_of(args, release, run, public, args.n or protocol["n"])
    lap("sampling")
    recipes, scores = {name: dict(protocol["recipes"][name]) for name in names}, {}
    if not datasets.REGISTRY[datasets.kind_of(private)].augmented:  # its images are centred and upright
        for recipe in recipes.values():
            recipe.pop("augment", None)
    for name, recipe in recipes.items():
        model = metrics.train_classifier(
            images=images, labels=labels, num_classes=len(release.classes), device=args.device,
            generator=torch.Generator().manual_seed(args.seed), bf16=release.bf16, **recipe)
        scores[name] = {title: metrics.accuracy(model, held.images, held.labels)
                        for title, held in real_sets.items()}
        lap(name)
    ceiling, distance = None, None
    if args.real and names:
        ceiling = on_real_images(args, release, run, private, recipes[names[0]], images, labels, real_sets)
        lap("classifier of real images")
    if args.no_distance:
        pass
    elif min(len(real), len(images)) < 4:  # each half of the real ones needs 2, recall more than k samples
        print(f"note: {len(images)} samples and {len(real)} held-out images are too few for a Frechet "
              "distance, which is left out")
    else:
        distance = distance_of(args, release, run if is_folder else None, public, images, split, real, lap)
    note = "scores on real held-out images, not covered by epsilon"
    publish = "to be published only if the held-out images are public"
    if ceiling:
        note += "; also those of a classifier that knows private training images"
        publish = "to be published only if the private images, those of training included, are public"
    result = {"note": note, "protocol": args.protocol,
              "privacy": {key: release.privacy.get(key) for key in ("epsilon", "delta", "statement")},
              "n": len(images), "sampler": sampler, "seed": args.seed,
              "recipes": recipes, "accuracy": scores, "real": ceiling,
              "held_out": {name: len(held) for name, held in real_sets.items()}, "distance": distance,
              "precision": "bf16" if release.bf16 else "float32", "seconds": seconds}
    out = Path(args.out or run / "internal" / "evaluation.json")
    print(f"\n{report(result)}")  # first: it is not lost if the file cannot be written
    files.write_json(result, out)
    print(f"{out}: not covered by epsilon, {publish}")
    return 0


if __name__ == "__main__":
    command_line.run_cli(main)
