"""Pictures from a released model: DDIM in latent space with guidance, then the decoder.

Last step of DP-LDM (Liu et al. 2024, section 3): everything here is post-processing of a model trained with
differential privacy, so any number of pictures, any label and any seed leave epsilon as it is. Needs
`release/model.pt` and nothing else; no training data is read.

    python sample.py runs/digits --labels 0-9 --n 100 --out grid.png
    python sample.py runs/digits --n 60000 --npz synthetic.npz
"""
import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import data
import diffusion
import folder
import unet
import vae

FORMAT = 1  # of release/model.pt; raised whenever its keys change


@dataclass
class Release:
    """A released model, ready to sample. crop is the side of the finished picture in pixels (28 for MNIST at 32)."""
    vae: vae.AutoencoderKL
    model: unet.LatentModel
    scale: float
    schedule: diffusion.Schedule
    classes: list
    crop: int
    data: dict
    privacy: dict


def build_model(checkpoint):
    """LatentModel and Schedule from the dict that train.py wrote (keys unet, embedder, schedule, model)."""
    network = unet.UNet(unet.UNetConfig(**checkpoint["unet"]))
    embedder = unet.ClassEmbedder(**checkpoint["embedder"]) if checkpoint["embedder"] else None
    model = unet.LatentModel(network, embedder)
    model.load_state_dict(checkpoint["model"])
    return model, diffusion.Schedule(**checkpoint["schedule"])


def build_vae(checkpoint):
    """AutoencoderKL from the dict that train.py wrote (keys config, state)."""
    autoencoder = vae.AutoencoderKL(vae.VAEConfig(**checkpoint["config"]))
    autoencoder.load_state_dict(checkpoint["state"])
    return autoencoder.eval().requires_grad_(False)


def load_release(path, device="cpu"):
    """Read a run folder, its release folder, or a model.pt. Raises ValueError, one line, if that cannot be done."""
    path = Path(path)
    file = next((p for p in (path / "release" / "model.pt", path / "model.pt") if p.exists()),
                path if path.is_file() else path / "release" / "model.pt")
    checkpoint = folder.load(file)
    try:
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"written in format {checkpoint['format']}, this program reads format {FORMAT}")
        autoencoder = build_vae(checkpoint["vae"])
        model, schedule = build_model(checkpoint)
        release = Release(autoencoder.to(device), model.eval().requires_grad_(False).to(device), checkpoint["scale"],
                          schedule, checkpoint["classes"], checkpoint["crop"], checkpoint["data"], checkpoint["privacy"])
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError) as error:
        raise ValueError(f"{file} is not a release of this program ({type(error).__name__}: "
                         f"{str(error).splitlines()[0][:120]})") from None
    for network in (release.vae, release.model):
        network.to(memory_format=torch.channels_last)
    return release


@torch.no_grad()
def generate(release, labels, steps=30, eta=0.0, guidance=1.0, seed=None, batch=None, progress=True):
    """Pictures of the given classes: labels (N,) int64 -> uint8 (N, C, crop, crop).

    steps, eta, guidance: see diffusion.ddim. seed None draws a fresh one; with a seed the same call gives the same
    pictures. batch (None: 500 at 32 pixels, fewer at more) is only a matter of memory, but belongs to what the seed fixes.
    Raises ValueError for a label outside the model's classes.
    """
    labels = torch.as_tensor(labels, dtype=torch.int64)
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < len(release.classes):
        raise ValueError(f"labels must lie in 0..{len(release.classes) - 1} ({', '.join(release.classes)})")
    device = next(release.model.parameters()).device
    generator = torch.Generator(device)
    generator.manual_seed(seed) if seed is not None else generator.seed()
    channels, side, _ = release.vae.latent_shape
    pictures = []
    with tqdm(total=len(labels), desc="sampling", unit="picture", disable=not progress) as bar:
        for part in labels.split(batch or max(1, 512_000 // release.vae.config.resolution ** 2)):
            cond = part.to(device) if release.model.embedder is not None else None
            z = diffusion.ddim(release.model, (len(part), channels, side, side), cond, steps, eta, guidance, generator,
                               release.schedule)
            x = release.vae.decode(z / release.scale)
            pictures.append(data.to_uint8(data.crop(x, release.crop)).cpu())
            bar.update(len(part))
    return torch.cat(pictures) if pictures else torch.empty(0, release.vae.config.out_ch, release.crop, release.crop,
                                                            dtype=torch.uint8)


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
        elif first.isdigit() and (last.isdigit() or not dash):
            labels += range(int(first), int(last or first) + 1)
        else:
            raise ValueError(f"--labels: {part.strip()!r} is neither a class ({', '.join(classes)}) nor a range like 0-9")
    if any(label >= len(classes) for label in labels):
        raise ValueError(f"--labels: this model has the labels 0..{len(classes) - 1} ({', '.join(classes)})")
    return labels


def main(argv=None):
    parser = argparse.ArgumentParser(description="Draw pictures from a released DP-LDM model (no privacy cost).")
    parser.add_argument("run", help="run folder, release folder or model.pt")
    parser.add_argument("--labels", default=None, help='classes to draw, e.g. "0-9" or "3,5" (default: all, in turn)')
    parser.add_argument("--n", type=int, default=100, help="number of pictures (default 100)")
    parser.add_argument("--out", default=None, help="PNG grid to write (default samples.png unless --npz is given)")
    parser.add_argument("--npz", default=None, help="NPZ to write: images (N,H,W[,C]) uint8, labels (N,) uint8")
    parser.add_argument("--columns", type=int, default=10, help="pictures per row of the grid (default 10)")
    parser.add_argument("--steps", type=int, default=30, help="DDIM steps (default 30; the paper uses 200)")
    parser.add_argument("--eta", type=float, default=0.0, help="fresh noise per step, 0..1 (default 0; the paper's MNIST: 1)")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance weight (default 1 = none)")
    parser.add_argument("--seed", type=int, default=None, help="seed of the sampling noise (default: a fresh one)")
    parser.add_argument("--batch", type=int, default=None, help="pictures at a time, memory only (default 500 of 32 pixels)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda[:i]")
    args = parser.parse_args(argv)
    if args.n < 1 or (args.batch or 1) < 1 or args.columns < 1:
        raise ValueError("--n, --batch and --columns must be at least 1")
    release = load_release(args.run, args.device)
    wanted = parse_labels(args.labels, release.classes) if args.labels else list(range(len(release.classes)))
    labels = torch.tensor(wanted)[uniform_labels(args.n, len(wanted))]
    images = generate(release, labels, args.steps, args.eta, args.guidance, args.seed, args.batch)
    if args.npz:
        with folder.replacing(args.npz) as file:
            pixels = images.permute(0, 2, 3, 1)  # (N, H, W, C)
            np.savez_compressed(file, images=(pixels[..., 0] if pixels.shape[3] == 1 else pixels).numpy(),
                                labels=labels.numpy().astype(np.uint8))
        print(f"{args.npz}: {len(images)} pictures, {release.privacy['statement']}")
    if args.out or not args.npz:
        out = args.out or "samples.png"
        data.save_grid(images[:1000], out, args.columns)
        print(f"{out}: {min(len(images), 1000)} pictures, {release.privacy['statement']}")
    return 0


if __name__ == "__main__":
    folder.run_cli(main)
