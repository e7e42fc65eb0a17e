"""`python -m datasets NAME [SPLIT]`: print the metrics of a set, write its first hundred images to NAME.png.
"""
import sys

from . import REGISTRY, __doc__, kind_of, load, pixels

try:
    name, *split = sys.argv[1:3] or sys.exit(__doc__)
    chosen = load(name, *split, n=None if REGISTRY[kind_of(name)].own else 1000)
except ValueError as error:
    print(f"datasets: {error}", file=sys.stderr)
    sys.exit(2)
print(f"{chosen.name}: {tuple(chosen.images.shape)}, mean {chosen.images.float().mean():.1f}, "
      f"{chosen.classes}")
pixels.save_grid(chosen.images[:100], f"{kind_of(name)}.png")
