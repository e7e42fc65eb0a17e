"""`python -m datasets NAME [SPLIT]`: print shape, mean and classes of a set, write its first hundred images.

They go to NAME.png, those of an own set to folder.png or npz.png.
"""
import sys

from . import REGISTRY, __doc__, kind_of, load, pixels, unlimited

try:
    name, *split = sys.argv[1:3] or sys.exit(__doc__)
    some = unlimited(name) or not REGISTRY[kind_of(name)].own  # else all: own sets may have fewer
    chosen = load(name, *split, n=1000 if some else None)
    print(f"{chosen.name}: {tuple(chosen.images.shape)}, mean {chosen.images.float().mean():.1f}, "
          f"{chosen.classes}")
    pixels.save_grid(chosen.images[:100], f"{kind_of(name)}.png")
except (ValueError, OSError) as error:
    print(f"datasets: {error}", file=sys.stderr)
    sys.exit(2)
