"""What an image is made from: its class, a text, or nothing.

The condition embedder is one of the two things that the private stage tunes (Liu et al. 2024, section 3).
What the private stage begins with (its shape, vocabulary and weights) depends on no private image: of the
private set only names of classes and attributes are used, which are public. A private image's own label,
attributes, caption and pixels are used in `of`, for the condition of this image and of no other.
"""
import hashlib
import sys
from functools import partial

import torch

from extensions import captions, text
from support import checkpoints
from support.bars import tqdm
from support.team import rank


def embedder_entry(s, public, private):
    """The condition embedder's entry in the checkpoints (`checkpoints.build_embedder`). None: no condition.

    public, private: ImageSets. Used are the names of classes and attributes, and the public set's captions.
    """
    if s.condition == "none":
        return None
    entry = {"kind": s.condition, "dim": s.unet.context_dim, "null_class": s.cond_drop > 0}
    if s.condition == "class":
        return {**entry, "num_classes": max(len(public.classes), len(private.classes))}
    names = [*(public.attributes or {}), *(private.attributes or {})]
    words = text.vocabulary(names, public.classes + private.classes, public.captions)
    return {**entry, "words": words, "length": s.text_length, "width": s.text_width, "layers": s.text_layers}


def tuned_entry(entry, names):
    """The entry as the private stage has it: an embedder of classes has one row for each private class."""
    return {**entry, "num_classes": len(names)} if checkpoints.condition_kind(entry) == "class" else entry


def of(s, found, embedder):
    """The conditions of an ImageSet, on the device: None, labels (N,), or the tokens (N, L) of captions.

    A caption is the image's own, else a sentence about its attributes, else about its class. Its wording is
    drawn with a seed made from the image itself. With one generator for all, leaving out one image would
    reword those after it, but the guarantee is about sets that differ in one image only.
    """
    if checkpoints.condition_kind(embedder) != "text":
        return found.labels.to(s.device) if embedder else None
    sentences = found.captions
    if sentences is None:
        sentences = []
        for i, image in enumerate(tqdm(found.images.numpy(), desc="    captions", unit="image", leave=False,
                                       disable=rank() > 0)):
            seed = int.from_bytes(hashlib.sha256(image.tobytes()).digest()[:8], "little")
            generator = torch.Generator().manual_seed(seed)
            if found.attributes:
                sentences.append(captions.caption({k: v[i] for k, v in found.attributes.items()}, generator))
            else:
                sentences.append(captions.class_caption(found.classes[found.labels[i]], generator))
    return checkpoints.build_tokenizer(embedder).encode(sentences).to(s.device)


def null(s, model, conditions):
    """The condition that stands for a dropped one, (1,) or (1, L). None where none is ever dropped."""
    return model.embedder.null(conditions[:1]) if conditions is not None and s.cond_drop > 0 else None


def check_classes(entry, names):
    """ValueError if the embedder of a class model has fewer rows than there are private classes."""
    if checkpoints.condition_kind(entry) == "class" and entry["num_classes"] < len(names):
        raise ValueError(f"the public model has {entry['num_classes']} classes, fewer than the {len(names)} "
                         "private ones; leave out --init, or bring back the classes this run began with")


def for_private_classes(checkpoint, names):
    """Stage 2's checkpoint with one embedder row per private class, in the order of `names`, and the null's.

    A class of the same name keeps its row, "7" that of the public sevens, wherever it stood. The others get
    the rows that are left, in order. Rows of other public classes are dropped: nothing private could train
    them, only noise. Raises ValueError if there are more private classes than rows.
    """
    entry = checkpoint["embedder"]
    if checkpoints.condition_kind(entry) != "class":
        return checkpoint
    check_classes(entry, names)
    public = checkpoint.get("classes", [])  # weights from elsewhere have no names
    total = entry["num_classes"]
    rows = {name: public.index(name) for name in names if name in public}
    free = (row for row in range(total) if row not in rows.values())
    index = [rows[name] if name in rows else next(free) for name in names]
    if rank() == 0:
        print(f"classes        {len(rows)} of {len(names)} private classes have the name of a public one and "
              "begin with its embedding")
    key = "embedder.embedding.weight"
    table = checkpoint["model"][key][index + [total] * entry["null_class"]].clone()
    return {**checkpoint, "embedder": tuned_entry(entry, names),
            "model": {**checkpoint["model"], key: table}}


def class_prompts(s, private):
    """For each class a list of prompts that mean it, so that a text model can be sampled by label.

    They are made from names only. None unless the condition is text.
    """
    if s.condition != "text":
        return None
    generator = torch.Generator().manual_seed(0)
    attribute = s.label_attribute
    if attribute in (private.attributes or {}) and len(private.classes) == 2:
        makers = [partial(captions.caption, {attribute: value}, generator, omit=0, deny=1)
                  for value in (False, True)]
    else:
        makers = [partial(captions.class_caption, name, generator) for name in private.classes]
    return [list(dict.fromkeys(make() for _ in range(10))) for make in makers]


def warn_of_unknown_words(s, public, private, embedder):
    """Say which words of the class prompts the model does not know, and which share of the public captions'.

    Of private captions only the fixed `text.NOTE` is said: how many of their words are unknown is private.
    """
    if s.steps:
        print(text.NOTE, file=sys.stderr)
    tokenizer = checkpoints.build_tokenizer(embedder)
    for options in class_prompts(s, private):
        if words := tokenizer.unknown(" ".join(options)):
            print(f"WARNING: the public model does not know {', '.join(words)}: train it anew, without "
                  "--init", file=sys.stderr)
    if public.captions:
        length, sentences = tokenizer.length - 1, [text.split(caption) for caption in public.captions]
        cut = sum(len(words) > length for words in sentences) / len(sentences)
        if cut:
            print(f"captions       {cut:.0%} of the public ones have more than {length} words and are cut "
                  "(--text-length)", file=sys.stderr)
        found = [word for words in sentences for word in words]
        share = sum(word not in tokenizer.index for word in found) / max(1, len(found))
        print(f"captions       {share:.0%} of the public captions' {len(found):,} words are unknown to the "
              "model", file=sys.stderr)
