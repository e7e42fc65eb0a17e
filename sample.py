"""Images from a released model: DDIM in latent space with guidance, then the decoder.

The last step of DP-LDM (Liu et al. 2024, section 3). Everything here is post-processing of a model that was
trained with differential privacy. So epsilon stays as it is, however many images are drawn. Only
`release/model.pt` is needed.

    python sample.py runs/digits --labels 0-9 --n 100 --out grid.png
    python sample.py runs/digits --n 60000 --npz synthetic.npz
    python sample.py runs/faces-text --prompt "a young woman wearing eyeglasses" --n 16 --guidance 2
"""
from support import threads  # noqa: F401, I001 (first: sets OpenMP variables, which torch reads when loaded)

from dataclasses import dataclass

import torch

import diffusion
import unet
import vae
from datasets import pixels
from extensions import text
from support import arguments, checkpoints, command_line, files, hardware, scored
from support.bars import tqdm

FORMAT = 1  # of release/model.pt; incremented when an older one would be misread


@dataclass
class Release:
    """A released model, ready to sample."""
    vae: vae.AutoencoderKL
    model: unet.LatentModel
    scale: float  # the model sees the autoencoder's latents times scale
    schedule: diffusion.Schedule
    classes: list  # names; label i means the i-th
    crop: int  # side of the finished image in pixels: 28 for MNIST, whose networks see 32
    data: dict  # names of the public and the private set, the public classes, the attribute behind labels
    privacy: dict  # the content of privacy.json
    tokenizer: text.Tokenizer | None = None  # None, like prompts, unless the condition is text
    prompts: list | None = None  # for each class a list of prompts that describe it
    bf16: bool = False  # networks in bfloat16; the sampler stays in float32


def load_release(path, device="cpu", bf16=False):
    """Read a release from a run folder, a release folder or a model.pt; bf16: see `Release`.

    ValueError if the file is missing, damaged, or not a release.
    """
    file = files.release_file(path)
    checkpoint = files.load(file)  # a damaged or hostile file cannot run code
    with files.understanding(file, "release"):
        if checkpoint["format"] != FORMAT:
            raise ValueError(f"written in format {checkpoint['format']}, this program reads format {FORMAT}")
        autoencoder = checkpoints.build_vae(checkpoint["vae"])
        model, schedule = checkpoints.build_model(checkpoint)
        model = model.eval().requires_grad_(False)
        release = Release(
            hardware.laid_out(autoencoder, device), hardware.laid_out(model, device), checkpoint["scale"],
            schedule, checkpoint["classes"], checkpoint["crop"], checkpoint["data"], checkpoint["privacy"],
            checkpoints.build_tokenizer(checkpoint["embedder"]), checkpoint.get("prompts"), bf16)
        checkpoints.check_release(release, checkpoint["embedder"])
    return release


@torch.no_grad()
def generate(release, labels, steps=30, eta=0.0, guidance=1.0, seed=None, batch=None, progress=True):
    """Images of the given classes or prompts: labels (N,) int64, or N prompts -> uint8 (N, C, crop, crop).

    An unconditional model uses only the number of labels. steps, eta, guidance: see `diffusion.ddim`. batch:
    images at a time (None: what suits the device). The same seed, batch, device and precision give the same
    images; without a seed a fresh one is taken. N is at least 1.
    ValueError for labels or prompts that the model does not know.
    """
    device = next(release.model.parameters()).device
    generator = torch.Generator(device)
    if seed is None:
        generator.seed()  # a fresh one
    else:
        generator.manual_seed(seed)
    conditions = find_conditions(release, labels, generator.initial_seed())  # labels (N,) or tokens (N, L)
    config = release.vae.config
    # On a CPU few images at a time, which was fastest: 500 of 32 pixels. On a GPU so many that a map of the
    # decoder's last level (config.ch channels) has 65 million numbers.
    pixels_at_a_time = 65_536_000 // config.ch if device.type == "cuda" else 512_000
    batch = batch or max(1, pixels_at_a_time // config.resolution ** 2)
    images = []
    with tqdm(total=len(labels), desc="sampling", unit="image", disable=not progress) as bar:
        for part in conditions.split(batch):
            cond = part.to(device) if release.model.embedder is not None else None
            shape = (len(part), *release.vae.latent_shape)
            with torch.autocast(device.type, torch.bfloat16, enabled=release.bf16):
                z = diffusion.ddim(
                    release.model, shape, cond, steps, eta, guidance, generator, release.schedule)
                x = release.vae.decode(z / release.scale).float()  # the latents' own scale; x about [-1, 1]
            images.append(pixels.to_uint8(pixels.crop(x, release.crop)).cpu())
            bar.update(len(part))
    return torch.cat(images)


def find_conditions(release, labels, seed):
    """What the model's embedder takes: labels (N,) int64, or the tokens (N, L) of prompts.

    For a model conditioned on text a label becomes one of the prompts of its class, drawn with the seed.
    """
    if not len(labels):
        raise ValueError("no labels or prompts; ask for at least one image")
    if all(isinstance(label, str) for label in labels):
        if release.tokenizer is None:
            raise ValueError("this model was not trained with prompts; ask for classes (--labels)")
        return release.tokenizer.encode(labels)
    labels = torch.as_tensor(labels, dtype=torch.int64)  # not prompts, so class labels
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(release.classes):
        raise ValueError(f"labels must lie in 0..{len(release.classes) - 1} ({', '.join(release.classes)})")
    if release.tokenizer is None:
        return labels
    generator = torch.Generator().manual_seed(seed)
    options = [release.prompts[label] for label in labels.tolist()]  # one each, with equal probabilities
    return release.tokenizer.encode([prompts[torch.randint(len(prompts), (), generator=generator)]
                                     for prompts in options])


def uniform_labels(n, num_classes):
    """(n,) int64 labels, the classes in turn. The private labels' histogram is not used: it would leak."""
    return torch.arange(n) % num_classes


def main(argv=None):
    args = arguments.of_sample(argv)
    release = load_release(args.run, args.device, hardware.choose_bf16(args.precision, args.device))
    wanted = arguments.wanted(args, release)  # prompts, or labels
    labels = [wanted[i % len(wanted)] for i in range(args.n)]  # in turn, until there are n
    images = generate(release, labels, args.steps, args.eta, args.guidance, args.seed, args.batch)
    if args.npz:
        scored.write_samples(args.npz, release, images, labels)
        print(f"{args.npz}: {len(images)} images, {release.privacy['statement']}")
    if args.out or not args.npz:
        out = args.out or "samples.png"
        pixels.save_grid(images[:arguments.LARGEST_GRID], out, args.columns)
        print(f"{out}: {min(len(images), arguments.LARGEST_GRID)} images, {release.privacy['statement']}")
    return 0


if __name__ == "__main__":
    command_line.run_cli(main)
