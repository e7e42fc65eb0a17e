"""The picture of README.md: three runs, each as public images | the public model | after private tuning.

    python docs/strips.py RUN [RUN ...]    takes release/comparison.png of each run, writes docs/strips.png

Of ten rows every second one is taken, whatever it shows. Nothing here reads a private image.
"""
import sys
from pathlib import Path

import numpy as np
from PIL import Image

PER_ROW = 18  # images in a row of comparison.png (support/release.py)


def rows_of(path, most=6):
    """Rows of images of a comparison, lines included: every second one of more than `most`."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    side = picture.shape[1] // PER_ROW  # an image and the line beside it
    count = picture.shape[0] // side
    return np.concatenate([picture[i * side:(i + 1) * side] for i in range(0, count, 1 + (count > most))])


def main():
    if not sys.argv[1:]:
        sys.exit(__doc__)
    strips = [rows_of(Path(run) / "release" / "comparison.png") for run in sys.argv[1:]]
    width = max(strip.shape[1] for strip in strips)
    parts = []
    for strip in strips:
        wide = Image.fromarray(strip)
        height = round(strip.shape[0] * width / strip.shape[1])
        parts += [np.asarray(wide.resize((width, height), Image.Resampling.LANCZOS)),
                  np.full((6, width, 3), 255, np.uint8)]
    Image.fromarray(np.concatenate(parts[:-1])).save(Path(__file__).with_name("strips.png"), optimize=True)


if __name__ == "__main__":
    main()
