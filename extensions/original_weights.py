"""Checkpoints of the original latent-diffusion code (CompVis) as the public stages of a run.

DP-LDM's authors began with such networks (Liu et al. 2024, appendix). This program turns a checkpoint into a
run folder with public/vae.pt and public/ldm.pt, and the private stage goes on from there:

    python -m extensions.original_weights model.ckpt --preset celeba64 --out runs/original
    python train.py --preset celeba64 --init runs/original --out runs/celeba64

The preset says what the networks look like; --size, --condition and the like change it as in train.py. Our
networks have the original's layers under other names, with 1x1 convolutions as Linear layers, so nothing is
approximated. Every GroupNorm of the original code has 32 groups. With another number all shapes still fit,
but every output is wrong.
"""
import json
import re
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import torch

import datasets
import diffusion
import unet
import vae
from datasets import pixels
from support import (
    arguments,
    checkpoints,
    command_line,
    conditions,
    files,
    presets,
    run_folder,
    settings,
    start,
    team,
)

GROUPS = 32  # in every GroupNorm of the original code
# Prefixes of the names in a checkpoint.
UNET, AUTOENCODER, AVERAGE = "model.diffusion_model.", "first_stage_model.", "model_ema."

LDM_NAMES = [  # original name -> ours, applied in order
    (r"in_layers\.0\.", "norm1."), (r"in_layers\.2\.", "conv1."), (r"emb_layers\.1\.", "time_proj."),
    (r"out_layers\.0\.", "norm2."), (r"out_layers\.3\.", "conv2."), (r"skip_connection\.", "skip."),
    (r"transformer_blocks\.", "blocks."), (r"to_out\.0\.", "to_out."), (r"ff\.net\.0\.proj\.", "ff.proj_in."),
    (r"ff\.net\.2\.", "ff.proj_out."),
]

# -------------------------------------------------------------------------------------- one network at a time


def load_unet(network, state_dict):
    """Read the original UNetModel's weights into our UNet, in place and strictly.

    state_dict: tensors under the original names, or a whole checkpoint that holds them under "state_dict".
    Tensors of other networks are passed over (`part`). Raises ValueError as `load_strictly`.
    """
    ours, theirs = network.state_dict(), {}
    for key, value in part(state_dict, UNET).items():
        for pattern, replacement in LDM_NAMES:
            key = re.sub(pattern, replacement, key)
        if key in ours and ours[key].dim() == 2 < value.dim() and value.shape[2:].numel() == 1:
            value = value.flatten(1)  # kernel of size 1: (p, d, 1[, 1]) -> (p, d)
        theirs[key] = value
    load_strictly(network, theirs, "UNet")


def load_autoencoder(network, state_dict):
    """Read the original AutoencoderKL's weights into ours, in place and strictly; the names are the same.

    The training-time `loss.*` (discriminator, LPIPS) is passed over. Raises ValueError as `load_strictly`.
    """
    theirs = {k: v for k, v in part(state_dict, AUTOENCODER).items() if not k.startswith("loss.")}
    load_strictly(network, theirs, "autoencoder")


def part(state_dict, prefix):
    """The tensors of one network, without the prefix of its names; all of them if no name has the prefix."""
    state_dict = state_dict.get("state_dict", state_dict)
    if any(key.startswith(prefix) for key in state_dict):
        return {key.removeprefix(prefix): v for key, v in state_dict.items() if key.startswith(prefix)}
    return state_dict


def load_strictly(network, theirs, what):
    """Load tensors under our names; ValueError, one line, if any is missing, left over or of another shape.

    Also for a network without the original's 32 groups. The network is then unchanged.
    """
    if (groups := network.config.num_groups) != GROUPS:
        raise ValueError(f"original weights need num_groups = {GROUPS}, this {what} has num_groups = {groups}"
                         ", and every output would be wrong: python -m extensions.original_weights sets it")
    ours = network.state_dict()
    wrong = [f"missing {k}" for k in ours if k not in theirs]
    wrong += [f"unexpected {k}" for k in theirs if k not in ours]
    wrong += [f"{k} is {tuple(theirs[k].shape)}, expected {tuple(v.shape)}" for k, v in ours.items()
              if k in theirs and theirs[k].shape != v.shape]
    if wrong:
        raise ValueError(f"latent-diffusion weights do not fit this {what} ({len(wrong)} problems): "
                         + "; ".join(wrong[:4]))
    network.load_state_dict(theirs)


def to_grey(state_dict):
    """Original weights for colour images -> for grey ones (one channel), under the same names.

    The encoder's first weights are summed over the colours: the same latent as for the grey image three
    times. The decoder's last layer is averaged over them: the mean of the three colours it would have
    painted.
    """
    def grey(name, value):
        if name.endswith("encoder.conv_in.weight"):
            return value.sum(1, keepdim=True)
        return value.mean(0, keepdim=True) if ".decoder.conv_out." in "." + name else value

    return {k: grey(k, v) for k, v in state_dict.get("state_dict", state_dict).items()}


# ----------------------------------------------------------------------------------------- a whole checkpoint


def read(path, average=False):
    """Tensors of a checkpoint file of the original code, by name.

    average: the UNet's weights are their moving average (`averaged`). ValueError, one line, if the file
    cannot be read without running code, is a release, or holds numbers that are not finite.
    """
    if not path.is_file():
        raise ValueError(f"there is no {path}")
    try:
        kind = files.nature(path)
        checkpoint = read_safetensors(path) if kind == "a safetensors file" else files.load(path)
        weights = checkpoint.get("state_dict", checkpoint)
        tensors = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor)}
    except (ValueError, AttributeError) as error:
        raise ValueError(why_not(path, error)) from None
    files.refuse_release(checkpoint, path)
    counters = (AVERAGE + "decay", AVERAGE + "num_updates")
    kept = [k for k in tensors if k.startswith(AVERAGE) and k not in counters]
    if average:
        tensors = averaged(tensors, path)
    elif kept and team.rank() == 0:
        print(f"note: {path.name} also holds a moving average of the UNet's weights, which is not used; "
              "python -m extensions.original_weights --average takes it")
    unread = (AVERAGE, AUTOENCODER + "loss.", "loss.")
    tensors = {k: v for k, v in tensors.items() if not k.startswith(unread)}
    for name, value in tensors.items():
        if not value.isfinite().all():
            raise ValueError(f"{path}: {name} holds numbers that are not finite (NaN or infinity); the "
                             "training that wrote it had diverged, take an earlier checkpoint")
    return tensors


def why_not(path, error):
    """One line on a file that gave no tensors. Running its code is proposed only where code was found."""
    cause = str(error.__context__)
    if "Unsupported global" not in cause or "blocked" in cause:
        reason = "no tensors in it" if "Weights only" in cause or error.__context__ is None else cause
        return files.unfit(path, "a checkpoint of torch, or safetensors", reason.partition("\n")[0])
    command = ("import sys, torch; torch.save(torch.load(sys.argv[1], map_location='cpu', weights_only=False)"
               "['state_dict'], sys.argv[2])")
    return (f"{path}: no tensors that can be read without running code ({str(error)[:120]}); if you trust "
            f"the file, convert it once: python -c {shlex.quote(command)} {shlex.quote(str(path))} "
            + shlex.quote(f"{path}.pt"))


SAFE = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
        "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
        "BOOL": torch.bool}


def read_safetensors(path):
    """{name: tensor} of a safetensors file: a length, a JSON header, then the raw arrays that it places.

    header: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}}. Nothing in it is code.
    """
    with files.understanding(path, "safetensors file"), open(path, "rb") as file:
        begin = 8 + int.from_bytes(file.read(8), "little")
        size = path.stat().st_size
        header = json.loads(file.read(begin - 8)) if begin <= size else None
        tensors = {}
        for name, entry in (header or {}).items():
            if name == "__metadata__":
                continue
            first, last = entry["data_offsets"]
            if not 0 <= first <= last <= size - begin:
                raise ValueError("it ends too early: half a download?")
            file.seek(begin + first)
            # torch.frombuffer refuses an empty buffer: an empty tensor is cut from eight bytes.
            raw = bytearray(file.read(last - first)) or bytearray(8)
            tensor = torch.frombuffer(raw, dtype=SAFE[entry["dtype"]])
            tensors[name] = tensor[:tensor.numel() if last > first else 0].reshape(entry["shape"])
        if header is None:
            raise ValueError("it ends within its header: half a download?")
    return tensors


def averaged(tensors, path):
    """The tensors with the UNet's weights replaced by their moving average, whose names have no dots.

    "model.diffusion_model.out.2.weight" is there as "model_ema.diffusion_modelout2weight".
    """
    names = {k: AVERAGE + k.removeprefix("model.").replace(".", "") for k in tensors if k.startswith(UNET)}
    if missing := [k for k, name in names.items() if name not in tensors] or ([] if names else [UNET + "*"]):
        raise ValueError(f"{path} holds no moving average of {missing[0]}; leave out --average")
    return tensors | {k: tensors[name] for k, name in names.items()}


def convert(s, unet_file, vae_file, scale, images, digests, embedder, average=False):
    """Checkpoint files -> contents of public/vae.pt and public/ldm.pt; the second is None without a UNet.

    unet_file, vae_file: paths; None if the UNet is trained here, or if one file holds both. images (N, C, H,
    W) uint8: PUBLIC images, for the latent scale where only the autoencoder is given, with their digests.
    Otherwise the UNet was trained with one scale, the buffer `scale_factor`, or `scale` where the file has
    none (None: 1, the original's default). embedder: see `ldm_checkpoint`. Sets num_groups and the noise
    schedule of the settings s to the original's. ValueError, one line, for weights that do not fit.
    """
    unet_weights = read(unet_file, average) if unet_file else {}
    vae_weights = read(vae_file) if vae_file else unet_weights
    name = (vae_file or unet_file).name
    s.vae = replace(s.vae, num_groups=GROUPS)
    colour = any(k.endswith("encoder.conv_in.weight") and v.shape[1] == 3 for k, v in vae_weights.items())
    if s.vae.in_channels == 1 and colour:
        vae_weights = to_grey(vae_weights)
    autoencoder = vae.AutoencoderKL(s.vae).eval()
    load_autoencoder(autoencoder, vae_weights)
    if unet_file:
        scale = float(unet_weights.get("scale_factor", scale or 1.0))
        digests = digests[:0]  # no image of ours has a part in it
    else:
        shown = pixels.to_float(pixels.some(images).to(s.device))  # as in train.py
        scale = vae.latent_scale(autoencoder.to(s.device), shown)
    vae_checkpoint = {"config": asdict(s.vae), "state": autoencoder.cpu().state_dict(), "scale": scale,
                      "trained_on": f"weights of {name}", "public_weights": [name], "steps": 0,
                      "digests": digests, "before": {} if unet_file else start.votes(s, {})}
    if not unet_file:
        return vae_checkpoint, None
    checkpoint = ldm_checkpoint(s, unet_weights, unet_file, digests, embedder)
    if team.rank() == 0:
        source = unet_file.name if vae_file is None else f"{unet_file.name}, autoencoder of {name}"
        print(f"weights        {source}; scale {scale:.5g}")
    return vae_checkpoint, checkpoint


def ldm_checkpoint(s, weights, path, digests, embedder):
    """The UNet's tensors -> content of public/ldm.pt.

    embedder: the entry of the condition embedder that the private set needs (`conditions.embedder_entry`).
    The file's class embedder is taken if it has the right width and at least as many classes. Otherwise the
    embedder starts afresh, as our text encoder always does.
    """
    s.unet = replace(s.unet, num_groups=GROUPS)
    if "betas" in weights:
        s.schedule = schedule_of(weights, path)
    table, fits = weights.get("cond_stage_model.embedding.weight"), False
    if checkpoints.condition_kind(embedder) == "class":
        if table is not None:
            rows = len(table) - embedder["null_class"]
            fits = table.shape[1:] == (embedder["dim"],) and rows >= embedder["num_classes"]
        embedder = {**embedder, "num_classes": rows if fits else embedder["num_classes"]}
    torch.manual_seed(s.seed)
    model = unet.LatentModel(unet.UNet(s.unet), checkpoints.build_embedder(embedder))
    load_unet(model.unet, weights)
    if fits:
        model.embedder.embedding.load_state_dict({"weight": table})
    if team.rank() == 0:
        kind = "class embedder" if fits else "a fresh embedder" if embedder else "no condition"
        print(f"condition      {path.name}: {kind}")
    return {"unet": asdict(s.unet), "embedder": embedder, "schedule": asdict(s.schedule),
            "model": model.state_dict(), "trained_on": f"weights of {path.name}",
            "public_weights": [path.name], "steps": 0, "digests": digests}


def schedule_of(weights, path):
    """The noise schedule of `betas` and `alphas_cumprod`; ValueError if it is not linear in sqrt(beta)."""
    begin, end = (float(f"{b:.6g}") for b in weights["betas"][[0, -1]].tolist())  # float32 in the file
    schedule = diffusion.Schedule("linear", "eps", len(weights["betas"]), begin, end)
    stored = weights.get("alphas_cumprod")
    if stored is not None and not torch.allclose(
            diffusion.alphas_cumprod(schedule), stored.double(), rtol=1e-3, atol=1e-6):
        raise ValueError(f"{path}: its noise schedule is not linear in sqrt(beta)")
    return schedule


# ------------------------------------------------------------------------------------------------ the program

# Flags of train.py that say what the networks and the public set are. Any flag could be passed on, but
# argparse would then take the value of one that it does not know for CHECKPOINT.
PASSED_ON = ("size", "factor", "latent-channels", "width", "depth", "condition", "cond-drop", "text-length",
             "text-width", "text-layers", "public", "public-classes", "public-n", "private", "classes",
             "label-attribute", "data-root", "cache", "seed", "device")


def main(argv=None):
    parser = command_line.Parser(description="Make the public stages of a run from a latent-diffusion "
                                             "checkpoint.")
    add = parser.add_argument
    add("checkpoint", type=Path, nargs="?", help="file of the original code with a UNet; without it only the "
        "autoencoder is converted, and its latent scale is that of the preset's public images")
    add("--preset", required=True, choices=presets.PRESETS, help="what the networks look like")
    add("--out", type=Path, required=True, help="run folder to make")
    add("--autoencoder", type=Path, default=None, help="its file, if CHECKPOINT does not hold it")
    add("--scale", type=float, default=None, help="scale_factor of the original configuration, if the "
        "checkpoint has no such buffer [1, the original code's default]")
    add("--average", action="store_true", help="take the moving average of the UNet's weights (model_ema)")
    for key in PASSED_ON:
        add("--" + key, default=None, help="as of train.py")
    args = parser.parse_args(argv)
    arguments.check_numbers(args, scale=(1e-6, 1e6))
    given = {key: getattr(args, key.replace("-", "_")) for key in PASSED_ON}
    s = settings.parse(["--preset", args.preset, *(f"--{k}={v}" for k, v in given.items() if v is not None)])
    if args.checkpoint is None and args.autoencoder is None:
        raise ValueError("name a checkpoint that holds a UNet, or an autoencoder's by --autoencoder")
    run_folder.refuse_used(args.out)  # before the public set is read
    images, digests = None, torch.empty(0, dtype=torch.int64)
    if not args.checkpoint:
        images = start.public_set(s).images
        digests = start.public_digests(s, images)
    declared = s.classes and datasets.class_list(s.classes)
    private = datasets.describe(s.private, s.data_root, s.vae.resolution, s.vae.in_channels,
                                s.label_attribute, declared)
    stages = convert(s, args.checkpoint, args.autoencoder, args.scale, images, digests,
                     conditions.embedder_entry(s, private, private), args.average)
    run_folder.prepare(args.out, resume=False)
    for name, checkpoint in zip(("vae.pt", "ldm.pt"), stages, strict=True):
        if checkpoint:
            files.save(checkpoint, args.out / "public" / name)
            print(f"{args.out / 'public' / name}")
    init = shlex.quote(str(args.out))
    flags = "".join(f" --{key} {shlex.quote(value)}" for key, value in given.items() if value is not None)
    print(f"go on with: python train.py --preset {args.preset}{flags} --init {init} --out runs/NAME")


if __name__ == "__main__":
    command_line.run_cli(main)
