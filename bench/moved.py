"""How far the private stage moved each kind of attention layer, and whether two runs moved alike.

    python -m bench.moved RUN RUN ...     runs on the same public networks, which `--init` gives them

For each kind of layer: the root mean square of the weights before tuning, that of their change in each run,
and the cosine between the change of the first run and that of every further one. Two runs draw different
noise and batches, so what their changes have in common is neither. By chance a cosine of d numbers is about
1 / sqrt(d). One as small says that noise or batches decided, or that the runs found different ways; it does
not say which.

Read from RUN/public and RUN/release, so nothing is spent. Only attention and condition embedder are compared.
A shift (`--tune attention+shift`) is refused.
"""
import argparse
from pathlib import Path

import torch

import sample
import tuning
import unet
from support import checkpoints, command_line, conditions


def kinds(model):
    """Kind of layer -> names of its parameters, for the attention modules and the condition embedder.

    A level of the UNet is named by its number of channels, a kind by its part of a SpatialTransformer.
    """
    found, names = {}, {id(p): name for name, p in model.named_parameters()}
    for module in tuning.attention_modules(model):
        for name, p in module.named_parameters():
            part = ("normalisations" if "norm" in name else "cross-attention" if "attn2" in name else
                    "self-attention" if "attn1" in name or isinstance(module, unet.AttentionBlock) else
                    "feed-forward" if ".ff." in name else "in, out")
            found.setdefault(f"{module.norm.num_channels} channels, {part}", []).append(names[id(p)])
    for module in tuning.embedder_of(model):
        found["condition embedder"] = [names[id(p)] for p in module.parameters()]
    return found


def changes(runs):
    """Rows (kind, RMS before tuning, RMS of the change in each run, cosines with the first run).

    runs: Paths of run folders. Parameters that no run has changed are left out. ValueError, one line, if
    their public networks or classes differ, and for a shift.
    """
    releases = [sample.load_release(run) for run in runs]
    public = [starting_weights(run, release.classes) for run, release in zip(runs, releases, strict=True)]
    for run, weights in zip(runs, public, strict=True):
        if weights.keys() != public[0].keys() or not all(
                torch.equal(w, public[0][name]) for name, w in weights.items()):
            raise ValueError(f"{run} has other public networks or classes than {runs[0]}: only runs with the "
                             "same --init and private set compare")
    tuned = [release.model.state_dict() for release in releases]
    for run, weights in zip(runs, tuned, strict=True):
        if weights.keys() != public[0].keys():
            raise ValueError(f"{run} has weights that its public network does not have, a shift or LoRA; "
                             "this program compares runs without them")
    rows = []
    for kind, names in kinds(releases[0].model).items():
        names = [name for name in names if any(not torch.equal(t[name], public[0][name]) for t in tuned)]
        if names:
            before = torch.cat([public[0][name].flatten() for name in names])
            moved = [torch.cat([t[name].flatten() for name in names]) - before for t in tuned]
            rows.append((kind, rms(before), [rms(m) for m in moved],
                         [torch.cosine_similarity(moved[0], m, 0).item() for m in moved[1:]]))
    return rows


def starting_weights(run, classes):
    """The weights with which a run's private stage began: its public ones, one embedding for each class."""
    checkpoint = checkpoints.load_public(run / "public" / "ldm.pt")
    return conditions.for_private_classes(checkpoint, classes)["model"]


def rms(x):
    return x.square().mean().sqrt().item()


def main(argv=None):
    parser = argparse.ArgumentParser(description="How far tuning moved each kind of attention layer.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders with the same public networks")
    args = parser.parse_args(argv)
    if len(args.runs) < 2:
        raise ValueError("name at least two runs, to compare them")
    rows = changes(args.runs)
    print(f"{'kind of layer':32} before  moved by each run; cosine of the first with every further one")
    for kind, before, moved, cosines in rows:
        print(f"{kind:32} {before:6.3f}  {' '.join(f'{m:.3f}' for m in moved)}; "
              f"{' '.join(f'{c:.2f}' for c in cosines)}")


if __name__ == "__main__":
    command_line.run_cli(main)
