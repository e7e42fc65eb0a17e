"""Private images vote on the drawings: `python -m extensions.vote --private fashion`. Not in the paper.

Drawn public images differ from private ones, and the more they do, the more is left for the noisy private
stage. So the drawings are bred for a few generations, before any network sees them. In each one

    1. 512 drawings of each class, chosen at random, are the candidates. Every private image votes for the
       nearest candidate of its class, by sums of 2 x 2 pixels,
    2. the counts of votes get noise: they are all that is learned of the private images,
    3. sigma is subtracted from each count, and what is below 0 becomes 0. Every drawing belongs to its
       nearest candidate, and the drawings of a candidate share its count equally,
    4. parents are drawn at random, in proportion to these shares. A child repeats its parent's random choices
       (a sleeve's length, a stripe's width), but some are made anew: 20 % at first, 2 % at last. The children
       take the place of all drawings.

This is a variant of Private Evolution (Zinan Lin et al. 2024, "Differentially Private Synthetic Data via
Foundation Model APIs 1: Images") with a program in place of the generative model (Zinan Lin et al. 2025,
"... APIs 3"). Theirs compares features of a network; here pixels are compared.

One private image more or less changes one count by 1. So each generation is one Gaussian mechanism of
sensitivity 1, in which every image takes part: a step with q = 1 for the accountant. What is drawn
afterwards costs nothing further. All generations together cost --epsilon at --delta. A run of train.py with
--public voted:RUN counts their steps, at its own delta, as part of its epsilon.

With a count for each of 6,000 drawings, the 6,000 images of a class would give one vote to each on average.
With 512 candidates a count is twelve on average, and sigma is 11.8 for ten generations at epsilon 1.
"""
import hashlib
import json
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import accountant
import datasets
import dp_sgd
from datasets import arrays, garments, pixels
from datasets.drawing import Dice
from support import calculator, command_line, files, guarantee, run_folder
from support.bars import tqdm
from support.rounding import round_up

CANDIDATES = 512  # of each class
FRESH = 0.2, 0.02  # share of choices that a child makes anew, in the first and the last generation
DRAWERS = {"garments": garments.CLASSES, "shapes": garments.SHAPES}


class Inherited(Dice):
    """Dice for children: each random choice is the parent's, or with probability `fresh` a new one.

    A drawer makes the same choices in the same order for every image, so the i-th choice of a child is the
    i-th of its parent.

    parents: `choices` of other dice that drew the same class, the row of an image being its parent's; None
    for a first generation. Grain, which has a number for each pixel, is always new.
    """

    def __init__(self, n, generator=None, size=28, parents=None, fresh=1.0):
        super().__init__(n, generator, size)
        self.parents, self.fresh, self.choices = parents, fresh, []

    def inherit(self, new):
        """New numbers (n, ...) for the next choice -> the same, most rows replaced by the parents'."""
        if self.parents is not None:
            anew = torch.rand(self.n, generator=self.generator) < self.fresh
            new = torch.where(anew.view(-1, *[1] * (new.dim() - 1)), new, self.parents[len(self.choices)])
        self.choices.append(new)
        return new

    def number(self):
        return self.inherit(super().number())

    def normal(self, *shape):
        new = super().normal(*shape)
        return new if new[0].numel() >= self.size ** 2 else self.inherit(new)

    def pick(self, names, weights):  # by `number`, which is inherited; torch.multinomial would draw anew
        share = torch.tensor(weights, dtype=torch.float)
        ends = (share / share.sum()).cumsum(0)[:-1].contiguous()  # the last end, 1, is not needed
        chosen = torch.searchsorted(ends, self.number(), right=True)
        return {name: (chosen == i).float() for i, name in enumerate(names.split())}


def draw(name, n, generator, parents=None, fresh=1.0):
    """n drawings of the kind `name` -> images (n,1,28,28) uint8, and their choices for a next generation."""
    images, choices = [], []
    for rows in torch.arange(n).split(64):  # what fits the cache
        dice = Inherited(len(rows), generator, parents=parents and [p[rows] for p in parents], fresh=fresh)
        images.append(garments.KINDS[name](dice, name))
        choices.append(dice.choices)
    return torch.cat(images), [torch.cat(numbers) for numbers in zip(*choices, strict=True)]


def seen(images):
    """Images (N,1,28,28) uint8 -> (N,196) float64: what voters compare, sums of 2 x 2 pixels.

    These are whole numbers, and so are squared distances, below 2^53. So they are exact: no rounding lets the
    vote of one image depend on the others of its batch.
    """
    return (F.avg_pool2d(images.double(), 2) * 4).flatten(1)


def nearest(x, candidates):
    """x (N,D), candidates (M,D) -> (N,) index of each row's nearest candidate; of equal ones the first.

    Of |x - c|^2 = |x|^2 + |c|^2 - 2 x c the first term is left out: it is the same for all candidates.
    """
    return torch.cat([(candidates.square().sum(1) - 2 * part @ candidates.T).argmin(1)
                      for part in x.split(4096)])


def count_votes(x, labels, candidates):
    """Private images x (n,D), their labels, candidates (K,M,D) of K classes -> votes (K,M) float64.

    One image more or less changes one number by 1.
    """
    return torch.stack([torch.bincount(nearest(x[labels == k], candidates[k]), minlength=len(candidates[k]))
                        for k in range(len(candidates))]).double()


def evolve(names, x, labels, sigma, generations, per_class, spend, generator):
    """The last generation: images (K * per_class,1,28,28) and their labels, classes in turn.

    names: of what is drawn for each class. x, labels: the private images, as `seen`. spend(g) is called
    before the counts of generation g get their noise, so before anything is learned. generator: of all that
    is random, but for this noise.
    """
    population = [draw(name, per_class, generator) for name in names]
    for g in tqdm(range(generations), desc="vote", unit="generation"):
        looks = torch.stack([seen(images) for images, _ in population])  # (K,N,D)
        candidates = torch.stack([look[torch.randperm(per_class, generator=generator)[:CANDIDATES]]
                                  for look in looks])
        votes = count_votes(x, labels, candidates)
        spend(g)
        [votes] = dp_sgd.privatise([votes], 1.0, sigma, 1, None)  # noise of a SecureGenerator
        # All that follows is post-processing. Of counts without a vote 84 % become 0.
        votes = (votes - sigma).clamp(min=0)
        fresh = FRESH[0] * (FRESH[1] / FRESH[0]) ** (g / max(1, generations - 1))
        for k, name in enumerate(names):
            cell = nearest(looks[k], candidates[k])
            weight = (votes[k] / torch.bincount(cell, minlength=CANDIDATES).clamp(min=1))[cell]
            weight = weight if weight.any() else torch.ones_like(weight)  # no count is left: all are equal
            parents = torch.multinomial(weight, per_class, replacement=True, generator=generator)
            population[k] = draw(name, per_class, generator, [c[parents] for c in population[k][1]], fresh)
    images = torch.stack([images for images, _ in population], 1).flatten(0, 1)
    return images, torch.arange(len(names)).repeat(per_class)


# ---- what it costs -----------------------------------------------------------------------------------------


def cost(run):
    """What a vote has spent: {checksum of its drawings: {"private_set", "private_n", "n", "steps"}}.

    steps: rows [q, sigma, T]. run: Path of its run folder, or of a copy with release/ alone. The file of the
    drawings tells it, and so do ledger and statement: of each kind of step the largest number counts. The
    checksum lets a vote count once where several networks know it. ValueError for a missing or damaged file.
    """
    path = run / "release" / "drawings.npz"
    with files.understanding(path, "file of drawings"):
        vote = checked(json.loads(str(arrays.read_npz(path, ["voted"])["voted"])))
        checksum = hashlib.sha256(path.read_bytes()).hexdigest()
    told, _ = calculator.read_run(run)
    return merged([{checksum: vote}, {checksum: {**vote, "steps": [[*kind, T] for kind, T in told.items()]}}])


def checked(vote):
    """A vote as `cost` returns it, from a file that may be damaged. Raises whatever is wrong with it."""
    steps = accountant.count_steps([tuple(row) for row in vote["steps"]])
    if not steps:
        raise ValueError("a vote without steps")
    private_n = vote["private_n"] and int(vote["private_n"])
    return {"private_set": str(vote["private_set"]), "private_n": private_n, "n": int(vote["n"]),
            "steps": [[*kind, T] for kind, T in steps.items()]}


def merged(several):
    """Results of `cost` -> one. Where they differ on a vote, the most steps of each kind count."""
    found = {}
    for checksum, vote in (item for votes in several for item in votes.items()):
        other = found.get(checksum, vote)
        known = Counter(accountant.count_steps(other["steps"]))
        steps = known | Counter(accountant.count_steps(vote["steps"]))
        found[checksum] = {**vote, "n": max(vote["n"], other["n"]),
                           "steps": [[*kind, T] for kind, T in sorted(steps.items())]}
    return found


# ---- the program -------------------------------------------------------------------------------------------


def parse(argv):
    parser = command_line.Parser(description="Private images vote on drawn ones. For train.py these are then "
                                             "--public voted:OUT. See the head of extensions/vote.py.")
    add = parser.add_argument
    add("--private", default="fashion", help="the images that vote, a data set of train.py [fashion]")
    add("--private-n", type=int, help="only this many of them, a subset by --seed")
    add("--classes", help="classes of an own private set, as in train.py")
    add("--public", choices=DRAWERS, default="garments", help="what is drawn [garments]")
    add("--per-class", type=int, default=6000, help="drawings of each class [6000]")
    add("--generations", type=int, default=10, help="number of generations [10]")
    add("--epsilon", type=float, default=1.0, help="of all generations together [1]")
    add("--delta", type=float, default=1e-5, help="of the guarantee, below 1/n [1e-5]")
    add("--seed", type=int, default=0, help="of drawings, candidates, parents and --private-n; "
        "never of the noise [0]")
    add("--data-root", help="the folder of the data sets, as in train.py")
    add("--out", type=Path, required=True, help="a new folder")
    args = parser.parse_args(argv)
    if not CANDIDATES <= args.per_class <= 100_000:
        raise ValueError(f"--per-class must be from {CANDIDATES}, the number of candidates, to 100000")
    if not 1 <= args.generations <= 1000:
        raise ValueError("--generations must be from 1 to 1000")
    if datasets.REGISTRY[datasets.kind_of(args.private)].role == "public":
        raise ValueError(f"--private {args.private}: a public set, or a mix of them, has no vote")
    return args


def paired(names, kinds):
    """The kind on which each class votes: the one of its name, if all have one, else that of its place."""
    if len(names) != len(kinds):
        raise ValueError(f"the private set has {len(names)} classes, and there are {len(kinds)} kinds of "
                         "drawings: each class votes on one kind")
    return list(names) if {*names} == {*kinds} else list(kinds)


def statement(args, plan, numbers):
    """release/privacy.json. plan: q, sigma, steps, n. numbers: `guarantee.privacy_numbers` of these steps."""
    epsilon, kind = numbers["epsilon_pld"], datasets.kind_of(args.private)
    return {
        "statement": f"({round_up(epsilon)}, {round_up(args.delta)})-differentially private with respect to "
                     "one image",
        "private": True, "epsilon": epsilon, "delta": args.delta, "accountant": "pld", **numbers,
        "adjacency": "add or remove one image", "unit": "one image", "sampling": "none: all images vote",
        **plan, "mechanism": "counts of votes, one vote for each image in each step, with Gaussian noise",
        "public_set": args.public, "private_set": kind,
        "hyper_parameters": guarantee.LOOKED.get(kind, guarantee.BEFOREHAND),
        "fast_noise": False, "noise": "float64 from the operating system's CSPRNG (dp_sgd.SecureGenerator)",
        "covers": "everything in release/ and whatever is made from it",
        "does_not_cover": [
            "the number n of private images and the names of their classes, which are treated as public",
            guarantee.NOT_COVERED["choice"], *([guarantee.NOT_COVERED["subset"]] if args.private_n else []),
            "other runs on the same private images: their epsilons add up, and so do their deltas (but "
            "train.py --public voted:RUN has this vote in its own epsilon)",
            "internal/, and what the terminal shows: messages that name private files",
            "that this release exists: its private files could all be read",
            guarantee.NOT_COVERED["person"], "timing"]}


def main(argv=None):
    """Let the private images vote; write drawings and statement. ValueError, one line, for what cannot be."""
    args = parse(argv)
    run_folder.refuse_used(args.out)
    private = datasets.load(args.private, "train", args.data_root, 28, args.private_n, args.seed, channels=1,
                            private=True, classes=args.classes and datasets.class_list(args.classes))
    kinds, n = paired(private.classes, DRAWERS[args.public]), len(private)
    guarantee.check_delta(args.delta, n, "private images")
    sigma = accountant.noise_multiplier(args.epsilon, args.delta, 1.0, args.generations, "pld")
    plan = {"n": n, "q": 1.0, "steps": args.generations, "sigma": sigma}
    steps = [[1.0, sigma, args.generations]]
    reach = dp_sgd.SecureGenerator.reach
    guarantee.check_noise(reach, accountant.count_steps(steps), args.delta)
    numbers = guarantee.privacy_numbers(reach, steps, args.delta)
    print(f"vote           {n} images of {args.private} on drawn {args.public}: {args.generations} "
          f"generations, sigma {sigma:.4g}, epsilon {round_up(numbers['epsilon_pld'])} at delta "
          f"{round_up(args.delta)}")
    if kinds != private.classes:
        pairs = zip(private.classes, kinds, strict=True)
        print("classes        " + ", ".join(f"{name} votes on {kind}" for name, kind in pairs))
    run_folder.prepare(args.out, resume=False)
    files.write_json({**vars(args), "out": str(args.out), "fast_noise": False},
                     args.out / "internal" / "settings.json")
    files.write_json(plan, args.out / "internal" / "plan.json")

    def spend(generation):  # on the disk before the result exists
        files.append_row({"step": generation, "q": 1.0, "sigma": sigma},
                         args.out / "internal" / "ledger.jsonl")

    images, labels = evolve(kinds, seen(private.images), private.labels, sigma, args.generations,
                            args.per_class, spend, torch.Generator().manual_seed(args.seed))
    release, vote = args.out / "release", {"private_set": datasets.kind_of(args.private), "n": n,
                                           "private_n": args.private_n, "steps": steps}
    with files.replacing(release / "drawings.npz") as file:
        np.savez_compressed(file, images=images[:, 0].numpy(), labels=labels.numpy().astype(np.uint8),
                            class_names=np.array(private.classes), voted=np.array(json.dumps(vote)))
    generator, classes = torch.Generator().manual_seed(args.seed), len(kinds)
    # A row for each class: 10 drawings as the program makes them, 10 after the last generation.
    rows = [torch.cat([draw(kind, 10, generator)[0], images[i:10 * classes:classes]])
            for i, kind in enumerate(kinds)]
    pixels.save_grid(torch.cat(rows), release / "comparison.png", columns=20)
    files.write_json(files.plain(statement(args, plan, numbers)), release / "privacy.json")
    print(f"{args.out}/release: {len(images)} drawings, for train.py --public voted:{args.out}")


if __name__ == "__main__":
    command_line.run_cli(main)
