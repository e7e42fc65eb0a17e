"""Do samples show what their prompts name?

    python -m bench.prompts RUN --guidance 4 [--n 32] [--data-root DIR]

For each attribute that the prompts name, one classifier is trained. It then judges samples of a model by
text. It learns from the private TRAINING faces if these are labelled with the attribute; then its answers are
private, and they go to the terminal and to RUN/internal/prompts.json only. Otherwise it learns from drawn
faces (datasets/portraits.py) of another seed than the model's. Such a classifier has not seen photographs.

Half of the faces have the attribute, both where a classifier learns and where it is tested. So a judge who
guesses is right half of the time.
"""
import argparse

import torch

import datasets
import metrics
import sample
from support import command_line, files, hardware, scored

PROMPTS = {  # what each of them names
    "a young woman": {"Male": False, "Young": True},
    "a young man": {"Male": True, "Young": True},
    "a smiling woman": {"Male": False, "Smiling": True},
    "a smiling man": {"Male": True, "Smiling": True},
    "a woman wearing eyeglasses": {"Male": False, "Eyeglasses": True},
    "a man wearing eyeglasses": {"Male": True, "Eyeglasses": True},
    "a bald man": {"Male": True, "Bald": True},
    "a young woman with blond hair": {"Male": False, "Young": True, "Blond_Hair": True},
    "an old man with gray hair": {"Male": True, "Young": False, "Gray_Hair": True},
    "a man with a mustache": {"Male": True, "Mustache": True},
    "a woman wearing a hat": {"Male": False, "Wearing_Hat": True},
    "a man with a beard": {"Male": True, "No_Beard": False},
}
DRAWN = 60_000  # drawn people, among whom the rare attributes are looked for
MOST = 3000  # images with an attribute, and as many without, that teach its judge


def balanced(values, most, generator):
    """Indices of at most `most` True and as many False entries of values (N,) bool, drawn at random."""
    yes, no = (torch.nonzero(values == wanted)[:, 0] for wanted in (True, False))
    n = min(len(yes), len(no), most)
    if n == 0:
        raise ValueError("an attribute that all images have, or none, teaches nothing")
    return torch.cat([some[torch.randperm(len(some), generator=generator)[:n]] for some in (yes, no)])


def drawn_faces(name, size, seed, most):
    """Drawn faces, half of them with the attribute: images (N, 3, size, size) uint8, values (N,) bool."""
    generator = torch.Generator().manual_seed(seed)
    everybody = datasets.portraits.people(DRAWN, generator)
    chosen = balanced(everybody[name], most, generator)
    some = {key: value[chosen] for key, value in everybody.items()}
    return datasets.portraits.draw(some, generator, size), some[name]


def real_faces(name, found, most):
    """The same of an ImageSet of real faces."""
    values = found.attributes[name]
    chosen = balanced(values, most, torch.Generator().manual_seed(0))
    return found.images[chosen], values[chosen]


def judge(learned, tested):
    """(classifier, its accuracy on the pair `tested`), taught by the pair `learned`: images, values."""
    (images, values), generator = learned, torch.Generator().manual_seed(0)
    model = metrics.train_classifier(images=images, labels=values.long(), num_classes=2, generator=generator,
                                     **metrics.STRONG)
    return model, metrics.accuracy(model, tested[0], tested[1].long())


def shares(model, images, asked):
    """{prompt: share of its samples that a classifier gives the attribute}; asked: a prompt for each."""
    shown = (metrics.predict(model, images).argmax(1) == 1).double()
    return {prompt: shown[[other == prompt for other in asked]].mean().item() for prompt in PROMPTS}


def table(judges):
    """Text: for each prompt, how many of its samples show each thing that it names, and how many others do.

    judges: {attribute: {"shares": as of `shares`, ...}}. "Others" are the samples of prompts that do not name
    the attribute, or, where all name it, of those that ask for the opposite.
    """
    lines = []
    for prompt, named in PROMPTS.items():
        cells = []
        for name, wanted in named.items():
            given = judges[name]["shares"]
            silent = [p for p, other in PROMPTS.items() if name not in other]
            others = silent or [p for p, other in PROMPTS.items() if other[name] != wanted]
            mean = sum(given[p] for p in others) / len(others)
            share, rest = (given[prompt], mean) if wanted else (1 - given[prompt], 1 - mean)
            cells.append(f"{'' if wanted else 'not '}{name} {share:.0%} (others {rest:.0%})")
        lines.append(f"{prompt:32}" + "; ".join(cells))
    return "\n".join(lines)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Do samples show what their prompts name?")
    parser.add_argument("run", help="run folder of a model by text")
    parser.add_argument("--n", type=int, default=32, help="samples of each of the twelve prompts [32]")
    parser.add_argument("--steps", type=int, default=30, help="DDIM steps [30]")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance weight [1]")
    parser.add_argument("--seed", type=int, default=1, help="of sampling [1]")
    parser.add_argument("--data-root", help="folder of the data sets [$DPLDM_DATA, else ~/.cache/dpldm]")
    args = parser.parse_args(argv)
    release = sample.load_release(args.run, bf16=hardware.choose_bf16("auto", "cpu"))
    run, whole = scored.find_run(args.run)
    if release.tokenizer is None or not whole:
        raise ValueError(f"{args.run}: needs the run folder of a model trained with --condition text")
    private = scored.sources(release, run)[1]
    cache = scored.cache_of(run)
    train, test = (scored.load_private(release, private, split, args.data_root, cache=cache)
                   for split in ("train", "test"))
    asked = [prompt for prompt in PROMPTS for _ in range(args.n)]
    images = scored.shrink(sample.generate(release, asked, args.steps, 0.0, args.guidance, args.seed))
    judges = {}
    for name in sorted({name for named in PROMPTS.values() for name in named}):
        if name in (train.attributes or {}):
            source, learned, tested = "real", *(real_faces(name, found, MOST) for found in (train, test))
        else:
            source, size = "drawn", images.shape[-1]
            learned, tested = (drawn_faces(name, size, seed, most) for seed, most in ((71, MOST), (72, 500)))
        model, accuracy = judge(learned, tested)
        of = [f"{len(values):,} {source} faces" for _, values in (learned, tested)]
        judges[name] = {"taught_by": of[0], "tested_on": of[1], "accuracy": accuracy,
                        "shares": shares(model, images, asked)}
        print(f"{name:12} judge taught by {of[0]}, right on {accuracy:.0%} of {of[1]}", flush=True)
    print(f"\n{args.n} samples of each prompt, DDIM, {args.steps} steps, guidance {args.guidance:g}, seed "
          f"{args.seed}; in brackets the samples of prompts that say nothing of it, or else the opposite\n\n"
          f"{table(judges)}")
    sampler = {"n": args.n, "steps": args.steps, "guidance": args.guidance, "seed": args.seed}
    files.write_json({**sampler, "judges": judges}, run / "internal" / "prompts.json")


if __name__ == "__main__":
    command_line.run_cli(main)
