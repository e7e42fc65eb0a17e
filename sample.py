"""Pictures from a released model: DDIM in latent space with guidance, then the decoder.

Last step of DP-LDM (Liu et al. 2024, section 3): everything here is post-processing of a model trained with
differential privacy, so any number of pictures, any label or prompt and any seed leave epsilon as it is. Needs
`release/model.pt` and nothing else; no training data is read.

    python sample.py runs/digits --labels 0-9 --n 100 --out grid.png
    python sample.py runs/digits --n 60000 --npz synthetic.npz
    python sample.py runs/faces --prompt "a smiling young woman with eyeglasses" --n 16 --guidance 2
"""
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import diffusion
import unet
import vae
from datasets import pixels
from extensions import text
from support import checkpoints, files, hardware, run_folder

FORMAT = 1  # of release/model.pt; raised whenever its keys change


@dataclass
class Release:
    """A released model, ready to sample. crop is the side of the finished picture in pixels (28 for MNIST at 32).

    Models conditioned on text have a tokenizer and, for each class, prompts that mean it; others None. bf16: the networks
    run in bfloat16, the sampler around them in float32.
    """
    vae: vae.AutoencoderKL
    model: unet.LatentModel
    scale: float
    schedule: diffusion.Schedule
    classes: list
    crop: int
    data: dict
    privacy: dict
    tokenizer: text.Tokenizer | None = None
    prompts: list | None = None
    bf16: bool = False


def load_release(path, device="cpu", bf16=False):
    """Read a run folder, its release folder, or a model.pt. Raises ValueError, one line, if that cannot be done.

    bf16: see `Release`.
    """
    path = Path(path)
    file = next((p for p in (path / "release" / "model.pt", path / "model.pt") if p.exists()),
                path if path.is_file() else path / "release" / "model.pt")
    checkpoint = files.load(file)
    with files.understanding(file, "release"):
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"written in format {checkpoint['format']}, this program reads format {FORMAT}")
        autoencoder = checkpoints.build_vae(checkpoint["vae"])
        model, schedule = checkpoints.build_model(checkpoint)
        model = model.eval().requires_grad_(False)
        release = Release(hardware.laid_out(autoencoder, device), hardware.laid_out(model, device), checkpoint["scale"], schedule,
                          checkpoint["classes"], checkpoint["crop"], checkpoint["data"], checkpoint["privacy"],
                          checkpoints.build_tokenizer(checkpoint["embedder"]), checkpoint.get("prompts"), bf16)
        pixels.crop(torch.empty(1, *2 * [release.vae.config.resolution], device="meta"), release.crop)
        release.privacy["statement"] + "", release.data.get("private")
        if not 0 < release.scale < float("inf") or release.crop < 1:
            raise ValueError("scale or crop is out of range")
        if not release.classes or not all(isinstance(name, str) for name in release.classes):
            raise ValueError("it has no classes")
        kind, entry = checkpoints.condition_kind(checkpoint["embedder"]), checkpoint["embedder"]
        if kind == "class" and entry["num_classes"] < len(release.classes):
            raise ValueError("it has more classes than its model knows")
        if kind == "text" and not (len(release.prompts) == len(release.classes) and all(
                isinstance(p, str) for options in release.prompts for p in options) and all(release.prompts)):
            raise ValueError("it does not have prompts for every class")
    return release


@torch.no_grad()
def generate(release, labels, steps=30, eta=0.0, guidance=1.0, seed=None, batch=None, progress=True):
    """Pictures of the given classes or prompts: labels (N,) int64, or a list of N str -> uint8 (N, C, crop, crop).

    A model conditioned on text draws a class by one of its prompts, at random; an unconditional one only counts the labels.
    steps, eta, guidance: see diffusion.ddim. seed None draws a fresh one; with a seed the same call gives the same
    pictures. batch (None: 500 at 32 pixels, fewer at more) is only a matter of memory, but belongs to what the seed fixes.
    Raises ValueError for a label outside the model's classes, and for prompts to a model that was not trained with any.
    """
    device = next(release.model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    conditions = find_conditions(release, labels, generator.initial_seed())
    channels, side, _ = release.vae.latent_shape
    pictures = []
    with tqdm(total=len(labels), desc="sampling", unit="picture", disable=not progress) as bar:
        for part in conditions.split(batch or max(1, 512_000 // release.vae.config.resolution ** 2)):
            cond = part.to(device) if release.model.embedder is not None else None
            with torch.autocast(device.type, torch.bfloat16, enabled=release.bf16):
                z = diffusion.ddim(release.model, (len(part), channels, side, side), cond, steps, eta, guidance, generator,
                                   release.schedule)
                x = release.vae.decode(z / release.scale).float()
            pictures.append(pixels.to_uint8(pixels.crop(x, release.crop)).cpu())
            bar.update(len(part))
    return torch.cat(pictures) if pictures else torch.empty(0, release.vae.config.out_ch, release.crop, release.crop,
                                                            dtype=torch.uint8)


def find_conditions(release, labels, seed):
    """What the model's embedder eats: labels (N,) int64, or tokens (N, L) of the prompts, if need be of the labels."""
    if all(isinstance(label, str) for label in labels) and len(labels):
        if release.tokenizer is None:
            raise ValueError("this model was not trained with prompts; ask for classes (--labels)")
        return release.tokenizer.encode(labels)
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(release.classes):
        raise ValueError(f"labels must lie in 0..{len(release.classes) - 1} ({', '.join(release.classes)})")
    if release.tokenizer is None:
        return labels
    generator = torch.Generator().manual_seed(seed)
    return release.tokenizer.encode([release.prompts[label][torch.randint(len(release.prompts[label]), (), generator=generator)]
                                     for label in labels.tolist()])


def check_numbers(args, **bounds):
    """Raises ValueError for an argument outside its (low, high); None is a default and passes."""
    for name, (low, high) in bounds.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise ValueError(f"--{name} must lie in {low}..{high}, got {value}")


def uniform_labels(n, num_classes):
    """n labels, the classes in turn: uniform, never the private histogram (pitfall 16)."""
    return torch.arange(n) % num_classes


def parse_labels(text, classes):
    """ "0-9" or "3,5,A" -> list of label indices. A part is a class name, an index or a range of indices."""
    labels = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if part.strip() in classes:
            labels.append(classes.index(part.strip()))
        elif first.isdecimal() and (last.isdecimal() or not dash):
            # Before a range is made of them: it would fill the memory.
            if max(len(first), len(last)) > 9 or int(last or first) >= len(classes):
                raise ValueError(f"--labels: not {part.strip()[:40]!r}, this model has the labels "
                                 f"0..{len(classes) - 1} ({', '.join(classes)})")
            if int(last or first) < int(first):
                raise ValueError(f"--labels: the range {part.strip()!r} runs backwards")
            labels += range(int(first), int(last or first) + 1)
        else:
            raise ValueError(f"--labels: {part.strip()!r} is neither a class ({', '.join(classes)}) nor a range like 0-9")
    return labels


def read_prompts(args, release):
    """The prompts asked for, None if there are none. Warns of words that the model does not know."""
    if args.prompt is None and args.prompts is None:
        return None
    if args.prompt is not None and args.prompts is not None or args.labels:
        raise ValueError("--prompt, --prompts and --labels exclude each other")
    if release.tokenizer is None:
        raise ValueError("this model was not trained with prompts; " + (
            "ask for classes (--labels)" if release.model.embedder else "it is unconditional, leave --prompt out"))
    prompts = [args.prompt]
    if args.prompts is not None:
        try:
            prompts = [line.strip() for line in Path(args.prompts).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"--prompts: cannot read {args.prompts} ({error})") from None
        if not prompts:
            raise ValueError(f"--prompts: {args.prompts} has no prompt, one per line is expected")
    unknown = list(dict.fromkeys(word for prompt in prompts for word in release.tokenizer.unknown(prompt)))
    if unknown:
        print(f"warning: unknown to this model and taken as <unk>: {', '.join(unknown)}", file=sys.stderr)
    if long := [p for p in prompts if len(text.split(p)) >= release.tokenizer.length]:
        print(f"warning: only the first {release.tokenizer.length - 1} words are read: {long[0]!r}", file=sys.stderr)
    return prompts


def main(argv=None):
    parser = run_folder.Parser(description="Draw pictures from a released DP-LDM model (no privacy cost).")
    parser.add_argument("run", help="run folder, release folder or model.pt")
    parser.add_argument("--labels", default=None, help='classes to draw, e.g. "0-9" or "3,5" (default: all, in turn)')
    parser.add_argument("--prompt", default=None, help="text to draw, for models conditioned on text")
    parser.add_argument("--prompts", default=None, metavar="FILE", help="file of prompts, one per line, drawn in turn")
    parser.add_argument("--n", type=int, default=100, help="number of pictures (default 100)")
    parser.add_argument("--out", default=None, help="PNG grid to write (default samples.png unless --npz is given)")
    parser.add_argument("--npz", default=None, help="NPZ to write: images (N,H,W[,C]) uint8, labels (N,) or "
                                                    "prompts")
    parser.add_argument("--columns", type=int, default=10, help="pictures per row of the grid (default 10)")
    parser.add_argument("--steps", type=int, default=30, help="DDIM steps (default 30; the paper uses 200)")
    parser.add_argument("--eta", type=float, default=0.0, help="fresh noise per step, 0..1 (default 0; the paper's MNIST: 1)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance weight (default 1 = none)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the sampling noise (default: a fresh one)")
    parser.add_argument("--batch", type=int, default=None, help="pictures at a time, memory only (default 500 of 32 pixels)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i]")
    parser.add_argument("--precision", choices=("auto", "float32", "bf16"), default="auto",
                        help="of the networks (default auto: the faster)")
    args = parser.parse_args(argv)
    check_numbers(args, n=(1, 10 ** 7), batch=(1, 10 ** 7), columns=(1, 1000), steps=(1, 100_000), eta=(0, 1),
                  guidance=(-1000, 1000), seed=(0, 2 ** 62))
    hardware.check_device(args.device)
    release = load_release(args.run, args.device, hardware.choose_bf16(args.precision, args.device))
    if release.model.embedder is None and (args.labels or args.guidance != 1):
        raise ValueError("this model is unconditional: it has no use for --labels or --guidance")
    prompts = read_prompts(args, release)
    wanted = prompts or (parse_labels(args.labels, release.classes) if args.labels else range(len(release.classes)))
    labels = [wanted[i] for i in uniform_labels(args.n, len(wanted)).tolist()]
    images = generate(release, labels, args.steps, args.eta, args.guidance, args.seed, args.batch)
    if args.npz:
        with files.replacing(args.npz) as file:
            last = images.permute(0, 2, 3, 1)  # (N, H, W, C)
            kind = {"prompts": np.array(labels)} if prompts else {
                "labels": np.array(labels, dtype=np.min_scalar_type(len(release.classes)))}
            np.savez_compressed(file, images=(last[..., 0] if last.shape[3] == 1 else last).numpy(), **(
                kind if release.model.embedder is not None else {}))
        print(f"{args.npz}: {len(images)} pictures, {release.privacy['statement']}")
    if args.out or not args.npz:
        out = args.out or "samples.png"
        pixels.save_grid(images[:1000], out, args.columns)
        print(f"{out}: {min(len(images), 1000)} pictures, {release.privacy['statement']}")
    return 0


if __name__ == "__main__":
    run_folder.run_cli(main)
