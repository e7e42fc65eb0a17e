"""What a run publishes: release/model.pt, privacy.json and images, all of it covered by epsilon.

The statement comes from guarantee.py. Nothing here reads a private image, a loss or a gradient norm.
"""
import math
import re
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

import datasets
import sample
from datasets import pixels
from extensions import lora, shift
from support import checkpoints, conditions, files, guarantee
from support.rounding import round_up

MOST = 60  # rows of images in a picture
TEMPLATE = Path(__file__).with_name("model_card.md")


def write_release(s, vae_checkpoint, ldm_checkpoint, model, private, privacy, public):
    """release/: model.pt, privacy.json, MODEL_CARD.md, samples.png, comparison.png; of --watch progress.png.

    comparison.png: real public images | before | after tuning. Rows of images for each class; of a text model
    per prompt: prompts.txt. At most MOST rows. private: only its schema is used.
    """
    lora.merge(model)
    classes, prompts = private.classes, conditions.class_prompts(s, private)
    content = {"format": sample.FORMAT, "vae": {k: vae_checkpoint[k] for k in ("config", "state")},
               "scale": vae_checkpoint["scale"],
               "shift": shift.shape_of(model),
               **{k: ldm_checkpoint[k] for k in ("unet", "embedder", "schedule")},
               "classes": classes, "crop": s.crop, "prompts": prompts,
               "data": {"public": datasets.kind_of(s.public), "public_classes": s.public_classes,
                        "private": datasets.kind_of(s.private), "label_attribute": s.label_attribute},
               "privacy": privacy}
    files.save({**content, "model": model.state_dict()}, s.out / "release" / "model.pt")
    files.write_json(privacy, s.out / "release" / "privacy.json")
    with files.replacing(s.out / "release" / "MODEL_CARD.md") as file:
        file.write(model_card(privacy, classes, s.out.resolve().name).encode())
    if (s.out / "internal" / "progress.png").exists():
        with files.replacing(s.out / "release" / "progress.png") as file:
            file.write((s.out / "internal" / "progress.png").read_bytes())
    lines = max(1, (6 if s.crop < 128 else 2) // len(classes))  # of ten images, for each class
    # What each row shows: (label, the label itself or one of the prompts that mean it).
    shown = [(label, what) for label in range(len(classes))
             for what in (prompts[label][:lines] if prompts else [label] * lines)][:MOST]
    labels = [what for _, what in shown for _ in range(10)]
    if prompts:
        with files.replacing(s.out / "release" / "prompts.txt") as file:
            file.write("".join(f"{prompt}\n" for _, prompt in shown).encode())
    draw = partial(sample.generate, labels=labels, steps=s.sample_steps, eta=s.sample_eta,
                   guidance=s.guidance, seed=s.seed)
    released = sample.load_release(s.out, s.device, s.bf16)
    after = draw(released)
    public_model, _ = checkpoints.build_model(ldm_checkpoint)
    before = draw(replace(released, model=public_model.eval().to(s.device)))
    pixels.save_grid(after, s.out / "release" / "samples.png", 10)
    rows, gap = [], torch.full((1, *after.shape[1:]), 96, dtype=torch.uint8)
    for i, (label, _) in enumerate(shown):
        alike = classes[label] in public.classes  # else any public images stand on the left
        images = public.images
        if alike:
            images = images[public.labels == public.classes.index(classes[label])]
        real = pixels.crop(images[4 * (i % lines if alike else i):][:4], s.crop)
        first = slice(10 * i, 10 * i + 6)
        rows += [real, gap.expand(5 - len(real), -1, -1, -1), before[first], gap, after[first]]
    pixels.save_grid(torch.cat(rows), s.out / "release" / "comparison.png", 18)


def model_card(privacy, classes, name):
    """release/MODEL_CARD.md: what the release is and promises, in plain words. Numbers: privacy.json's."""
    p, rates = privacy, privacy[guarantee.ATTACKER]
    words = {
        **p, "name": name, "classes": ", ".join(classes), "number": len(classes),
        "epsilon": round_up(float(p["epsilon"])), "delta": round_up(p["delta"]),
        "group": round_up(float(p[guarantee.GROUP])), "detected": at_most(rates["0.01"]),
        "table": "\n".join(f"| {float(fpr):.1%} | {at_most(rate)} |" for fpr, rate in rates.items()),
        "limits": "\n".join(f"- {item}" for item in p["does_not_cover"]),
        "enlarged": f"\nThe images cannot be sharper than this: the model was trained on {p['enlarged']}."
        if p["enlarged"] else "",
    }
    parts = dict(re.findall(r"<!-- (\w+) -->\n(.*?)\n<!-- end -->\n", TEMPLATE.read_text(), flags=re.DOTALL))
    kind = "void" if not p["private"] else "promise" if p["steps"] or p["before"] else "unread"
    told = [part for part, key in (("voted", "before"), ("tuned", "steps")) if p[key]]
    tuned = "".join(parts[part].format(**words) for part in told)
    return parts["card"].format(**words, tuned=tuned, promise=parts[kind].format(**words))


def at_most(rate):
    """A rate as text, rounded up: nothing is understated."""
    return f"{math.ceil(1e4 * float(rate)) / 100:g} %"
