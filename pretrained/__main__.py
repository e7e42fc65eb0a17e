"""Public networks of a run, in half precision, to be kept beside the code: python -m pretrained RUN NAME

Writes pretrained/NAME/public/vae.pt and ldm.pt, and note.json: the command and commit that made them, what
they were trained on, and the SHA-256 of each file. `python train.py --init pretrained/NAME` then begins with
the private stage. Only networks trained on drawn images are taken: nothing private can be in them, and no
licence binds them.
"""
import argparse
import hashlib
import subprocess
from pathlib import Path

import torch

import datasets
from support import checkpoints, command_line, files

HERE = Path(__file__).parent


def halved(value):
    """A checkpoint with its float32 tensors in float16, at any depth."""
    if isinstance(value, dict):
        return {key: halved(item) for key, item in value.items()}
    return value.half() if isinstance(value, torch.Tensor) and value.dtype == torch.float32 else value


def main(argv=None):
    parser = command_line.Parser(description=__doc__.partition("\n")[0],
                                 formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("run", type=Path, help="run folder whose public networks are taken")
    parser.add_argument("name", help="folder to write in pretrained/")
    args = parser.parse_args(argv)
    settings = files.read_json(args.run / "internal" / "settings.json")
    flags = (f"--{key.replace('_', '-')} {settings[key]}"
             for key in dict.fromkeys(("preset", *settings["given"])))
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=HERE,
                         check=True)
    note = {"command": " ".join(["python train.py", *flags]), "commit": git.stdout.strip(),
            "trained_on": {}, "sha256": {}}
    for name in ("vae.pt", "ldm.pt"):
        checkpoint = checkpoints.load_public(args.run / "public" / name)
        origin = checkpoint["trained_on"]
        if not datasets.is_drawn(origin):
            raise ValueError(f"{args.run}: {name} was trained on {origin}; only networks of drawn images are "
                             "kept here")
        path = HERE / args.name / "public" / name
        files.save(halved(checkpoint), path)
        note["trained_on"][name] = origin
        note["sha256"][name] = hashlib.sha256(path.read_bytes()).hexdigest()
    files.write_json(note, HERE / args.name / "note.json")
    return 0


if __name__ == "__main__":
    command_line.run_cli(main)
