"""Beyond the paper: one idea a file, with its own derivation. What a second course would teach.

The paper's method can be read without it. Registries and flags of the files at the top level name what is
here, and some of it is the default: fast gradients, tight accounting, Muon. Plumbing belongs into support/.
"""
from support import threads  # noqa: F401 (before torch)
