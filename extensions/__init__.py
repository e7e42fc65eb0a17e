"""Beyond the paper: one idea a file, with its own derivation. What a second course would teach.

Method files at the top level do not need it, but for names in their registries. Plumbing belongs into
support/.
"""
from support import threads  # noqa: F401 (before torch)
