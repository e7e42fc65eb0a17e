"""One row per choice of the method: `python -m bench.ablations NAME`, see `bench.runs`.

Each row takes less than 15 minutes on two cores.

All rows reuse the public stages of the default run (`python train.py` first) and change one thing of its
private stage: what is tuned (the paper's claim), the privacy level, or the recipe.
"""
from bench.digits import BASE, again
from bench.runs import Row, main

TUNED = {  # name: (label, flags); at epsilon 10 and again, with -eps1, at epsilon 1
    "all": ("all parameters", "--tune all"),
    "attention-only": ("attention without the embedder", "--tune attention-only"),
    "later": ("attention, last 4 of 7 modules", "--from-block 3"),
    "resblocks": ("ResBlocks", "--tune resblocks"),
    "norm": ("norm layers", "--tune norm"),
    "embedder": ("class embedder only", "--tune embedder"),
    "lora4": ("LoRA, rank 4", "--tune lora:4"),
    "lora16": ("LoRA, rank 16", "--tune lora:16"),
}
RECIPE = {
    "again": ("nothing: the private stage made again", ""),
    "K2": ("noise multiplicity 2, half the batch", "--noise-multiplicity 2 --batch-size 2000"),
    "automatic": ("automatic clipping", "--clipping automatic --clip-norm 1"),
    "per-layer": ("per-layer clipping", "--clipping per-layer"),
    "no-ema": ("no EMA", "--ema 0"),
    "small-batch": ("batch 1,000, 120 steps", "--batch-size 1000 --steps 120"),
}
SAMPLING = {  # post-processing: the default run, sampled otherwise
    "steps30": ("nothing: the default run whose public stages all share; the next five rows sample it", ""),
    "steps15": ("15 DDIM steps instead of 30", "--steps 15"),
    "steps10": ("10 DDIM steps", "--steps 10"),
    "guidance": ("guidance 1.5", "--guidance 1.5"),
    "guidance-low": ("guidance 0.7", "--guidance 0.7"),
    "eta1": ("DDIM eta 1", "--eta 1"),
}

ROWS = {name: again(label, name, flags) for name, (label, flags) in TUNED.items()}
ROWS |= {f"{name}-eps1": again(label, f"{name}-eps1", f"{flags} --epsilon 1 --lr 2e-3") for name,
         (label, flags) in TUNED.items()}
ROWS |= {"attention-eps1": again("attention", "eps1", "--epsilon 1 --lr 2e-3")}
ROWS |= {name: again(label, name, flags) for name, (label, flags) in RECIPE.items()}
ROWS |= {name: Row(label, None, BASE, f"{flags} --out {BASE}/internal/{name}.json".strip())
         for name, (label, flags) in SAMPLING.items()}

if __name__ == "__main__":
    main("ablations", ROWS)
