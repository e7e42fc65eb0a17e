"""The command line of sample.py, and checks for those of other programs: numbers, labels, prompts."""
import os
import sys
from pathlib import Path

import torch

import datasets
from extensions import text
from support import command_line, hardware

LARGEST_GRID = 1000  # images in a PNG of samples


def of_sample(argv):
    """The command line of sample.py, checked."""
    parser = command_line.Parser(description="Draw images from a released DP-LDM model (no privacy cost).")
    add = parser.add_argument
    add("run", help="run folder, release folder or model.pt")
    add("--labels", help='classes to draw, e.g. "0-9" or "3,5" (default: all, in turn)')
    add("--prompt", help="text to draw, for models conditioned on text")
    add("--prompts", metavar="FILE", help="file of prompts, one per line, drawn in turn")
    add("--n", type=int, default=100, help="number of images (default 100)")
    add("--out", help="PNG grid to write (default samples.png unless --npz is given)")
    add("--npz", help="NPZ to write: images (N,H,W[,C]) uint8, labels (N,) or prompts")
    add("--columns", type=int, default=10, help="images per row of the grid (default 10)")
    add("--steps", type=int, default=30, help="DDIM steps (default 30; the paper uses 200)")
    add("--eta", type=float, default=0.0, help="fresh noise per step, 0..1 (default 0; the paper's MNIST: 1)")
    add("--guidance", type=float, default=1.0, help="classifier-free guidance weight (default 1 = none)")
    add("--seed", type=int, help="seed of the sampling noise (default: a fresh one)")
    add("--batch", type=int, help="images at a time (default 500 of 32 pixels, more on a GPU)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i]")
    add("--precision", choices=("auto", "float32", "bf16"), default="auto",
        help="of the networks (default auto: the faster)")
    args = parser.parse_args(argv)
    check_numbers(args, n=(1, 10 ** 7), batch=(1, 10 ** 7), columns=(1, 1000), steps=(1, 100_000),
                  eta=(0, 1), guidance=(-1000, 1000), seed=(0, 2 ** 62))
    if args.n > LARGEST_GRID and not args.npz:
        raise ValueError(f"--n {args.n}: a PNG shows at most {LARGEST_GRID} images; --npz FILE writes all")
    check_suffix("--out", args.out, ".png")
    check_suffix("--npz", args.npz, ".npz")
    hardware.check_device(args.device)
    return args


def check_numbers(args, **bounds):
    """ValueError for an argument outside its (low, high). None is a default and passes."""
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} must lie in {low}..{high}, got {value}")


def check_suffix(flag, path, suffix):
    """ValueError where a file cannot be written, or its name promises another kind of content.

    A name without suffix promises nothing; what is no plain file, such as /dev/null, takes anything.
    """
    if not path:
        return
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{flag} {path}: that is a folder; name a file in it")
    # Before hours of work. Files are written beside their place, but not what is no plain file.
    place = path
    if path.is_file() or not path.exists():
        place = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(place, os.W_OK):
        raise ValueError(f"{flag} {path}: {place} may not be written to")
    if path.suffix.lower() not in ("", suffix) and (path.is_file() or not path.exists()):
        raise ValueError(f"{flag} {path}: what is written is {suffix[1:].upper()}; name it "
                         f"{path.with_suffix(suffix)}")


def parse_labels(wanted, classes):
    """ "0-9" or "3,5,A" -> list of label indices. A part is a class name, an index or a range of indices."""
    labels, numbers = [], datasets.numbered(classes)
    for part in map(str.strip, wanted.split(",")):
        first, dash, last = part.partition("-")
        if part in classes:
            labels.append(classes.index(part))
            continue
        last = last if dash else first
        if not first.isdecimal() or not last.isdecimal():
            raise ValueError(f"--labels: {part!r} is neither a class ({', '.join(classes)}) nor a range "
                             "like 0-9")
        # Before a range is made of them, which could fill the memory.
        if max(len(first), len(last)) > 9 or not {int(first), int(last)} <= numbers.keys():
            raise ValueError(f"--labels: not {part[:40]!r}, this model has the labels "
                             f"{min(numbers)}..{max(numbers)} ({', '.join(classes)})")
        if int(last) < int(first):
            raise ValueError(f"--labels: the range {part!r} runs backwards")
        labels += [label for number, label in sorted(numbers.items()) if int(first) <= number <= int(last)]
    return labels


def wanted(args, release):
    """The prompts or labels asked for, to be drawn in turn: --prompt, --prompts, --labels, or all labels."""
    if release.model.embedder is None and (args.labels or args.guidance != 1):
        raise ValueError("this model is unconditional: it has no use for --labels or --guidance")
    prompts = read_prompts(args, release)
    if args.labels:
        return parse_labels(args.labels, release.classes)
    return prompts or range(len(release.classes))


def read_prompts(args, release):
    """The prompts asked for, None if there are none. Warns of words that the model does not know."""
    if args.prompt is None and args.prompts is None:
        return None
    if args.prompt is not None and args.prompts is not None or args.labels:
        raise ValueError("--prompt, --prompts and --labels exclude each other")
    if release.tokenizer is None:
        other = "ask for classes (--labels)" if release.model.embedder else "leave --prompt out"
        raise ValueError(f"this model was not trained with prompts; {other}")
    prompts = [args.prompt] if args.prompts is None else read_lines(args.prompts)
    unknown = list(dict.fromkeys(word for prompt in prompts for word in release.tokenizer.unknown(prompt)))
    if unknown:
        print(f"warning: unknown to this model and taken as <unk>: {', '.join(unknown)}", file=sys.stderr)
    if long := [p for p in prompts if len(text.split(p)) >= release.tokenizer.length]:
        print(f"warning: only the first {release.tokenizer.length - 1} words are read: {long[0]!r}",
              file=sys.stderr)
    return prompts


def read_lines(path):
    """The lines of a file of prompts, without empty ones. ValueError if there are none."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--prompts: cannot read {path} ({error})") from None
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise ValueError(f"--prompts: {path} has no prompt, one per line is expected")
    return lines
