"""Beyond the paper: one idea a file, with its own derivation. What a second course would teach.

The method needs none of it. The files at the top level name what is here in their registries and flags: fast
gradients, tight accounting, Muon, the perceptual loss, the memorisation test. Plumbing belongs into support/.
"""
from support import threads  # noqa: F401 (before torch)
