"""Networks from the dicts that train.py writes, and back. A checkpoint says all that is needed for it."""
import torch

import diffusion
import unet
import vae
from datasets import pixels
from extensions import shift, text
from support import files


def condition_kind(entry):
    """What the checkpoint entry `embedder` conditions on: "none", "class" or "text"."""
    return entry["kind"] if entry else "none"


def build_embedder(entry):
    """Condition embedder from a checkpoint's entry: None, {"kind": "class", ...} or {"kind": "text", ...}."""
    kind, rest = condition_kind(entry), {k: v for k, v in (entry or {}).items() if k not in ("kind", "words")}
    if kind == "text":
        return text.TextEncoder(vocabulary_size=len(build_tokenizer(entry)), **rest)
    return unet.ClassEmbedder(**rest) if kind == "class" else None


def build_tokenizer(entry):
    """Tokenizer of a text model from the same entry; None for the others."""
    return text.Tokenizer(entry["words"], entry["length"]) if condition_kind(entry) == "text" else None


def build_model(checkpoint):
    """LatentModel and Schedule from the dict that train.py wrote (keys unet, embedder, schedule, model).

    The key shift, the shape of the latents, is there if the private stage inserted extensions/shift.py.
    """
    schedule = diffusion.Schedule(**checkpoint["schedule"])
    check_schedule(schedule)

    def make():
        model = unet.LatentModel(unet.UNet(unet.UNetConfig(**checkpoint["unet"])),
                                 build_embedder(checkpoint["embedder"]))
        if checkpoint.get("shift"):
            shift.insert(model, checkpoint["shift"], schedule)
        return model

    return build(make, checkpoint["model"], checkpoint["unet"], checkpoint["embedder"]), schedule


def check_schedule(schedule):
    """Raises ValueError for a noise schedule with no steps, far too many, or a beta outside (0, 1)."""
    steps = type(schedule.T) is int and 1 <= schedule.T <= 100_000
    if not (steps and 0 < schedule.beta_start <= schedule.beta_end < 1):
        raise ValueError(f"the noise schedule is out of range: {str(schedule):.120}")


def build_vae(checkpoint):
    """AutoencoderKL from the dict that train.py wrote (keys config, state)."""
    config = vae.VAEConfig(**checkpoint["config"])
    return build(lambda: vae.AutoencoderKL(config), checkpoint["state"],
                 checkpoint["config"]).eval().requires_grad_(False)


def build(make, state, *configs):
    """make() with the weights `state`.

    It is tried without memory first: sizes in a damaged or hostile file that do not fit its weights are
    refused before they cost terabytes or hours. Raises whatever the networks do about them.
    """
    for key, value in (item for config in configs for item in (config or {}).items()):
        if key in ("num_res_blocks", "transformer_depth", "layers") and value > 100 or \
                isinstance(value, (list, tuple)) and key != "words" and len(value) > 20:
            raise ValueError(f"{key} = {value!r:.20} is out of range")
    with torch.device("meta"):
        # dict: a state_dict would remember `assign`, and share its memory below
        make().load_state_dict(dict(state), assign=True)
    model = make()
    model.load_state_dict(state)
    return model


def load_public(path):
    """A checkpoint of stage 1 or 2, known to hold a network. ValueError, one line, if missing or damaged."""
    checkpoint = files.load(path)
    files.refuse_release(checkpoint, path)
    with files.understanding(path):
        if path.name == "vae.pt":
            build_vae(checkpoint)
            float(checkpoint["scale"])
        else:
            build_model(checkpoint)
    return checkpoint


def check_finite(title, checkpoint):
    """ValueError, one line, for a public network whose training has diverged. Nothing is spent on it yet."""
    weights = checkpoint.get("state", checkpoint.get("model"))
    numbers = [*weights.values(), torch.tensor(float(checkpoint.get("scale", 1.0)))]
    if not all(bool(a.isfinite().all()) for a in numbers):
        raise ValueError(f"the public {title} holds numbers that are not finite: its training has diverged; "
                         "train it anew with a smaller learning rate")


def check_release(release, embedder):
    """Raises ValueError, or what the parts raise, for a `sample.Release` whose parts do not fit together.

    embedder: the checkpoint's entry of the condition embedder.
    """
    side = release.vae.config.resolution
    pixels.crop(torch.empty(1, side, side, device="meta"), release.crop)
    if not isinstance(release.privacy["statement"], str) or not isinstance(release.data, dict):
        raise ValueError("it does not say what it is")
    if not 0 < release.scale < float("inf") or release.crop < 1:
        raise ValueError("scale or crop is out of range")
    if shift.shape_of(release.model) not in (None, release.vae.latent_shape):
        raise ValueError("it shifts latents of another shape")
    if not release.classes or not all(isinstance(name, str) for name in release.classes):
        raise ValueError("it has no classes")
    kind = condition_kind(embedder)
    if kind == "class" and embedder["num_classes"] < len(release.classes):
        raise ValueError("it has more classes than its model knows")
    if kind == "text":
        texts = all(isinstance(p, str) for options in release.prompts for p in options)
        if len(release.prompts) != len(release.classes) or not all(release.prompts) or not texts:
            raise ValueError("it does not have prompts for every class")
