"""`python -m datasets NAME [SPLIT]`: print shape, mean and classes of a set, write its first hundred images.

They go to NAME.png, those of an own set to folder.png or npz.png. Only its owner may read that file where the
images may be private.
"""
import sys
from pathlib import Path

from . import REGISTRY, __doc__, kind_of, load, pixels, unlimited

try:
    name, *split = sys.argv[1:3] or sys.exit(__doc__)
    entry, path = REGISTRY[kind_of(name)], Path(f"{kind_of(name)}.png")
    some = None if entry.own else 1000 if unlimited(name) else min(1000, entry.n) or None
    chosen = load(name, *split, n=some)
    print(f"{chosen.name}: {tuple(chosen.images.shape)}, mean {chosen.images.float().mean():.1f}, "
          f"{chosen.classes}")
    pixels.save_grid(chosen.images[:100], path, private=entry.role != "public")
    print(f"{path}" + "; do not publish it, if these images are private" * (entry.role != "public"))
except (ValueError, OSError) as error:
    print(f"datasets: {error}", file=sys.stderr)
    sys.exit(2)
