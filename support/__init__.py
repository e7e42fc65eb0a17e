"""Plumbing: flags, run folders, checkpoints, hardware, processes, privacy plan and statement, release.

Nobody needs it to understand the paper. What the paper describes stands at the top level; ideas beyond the
paper belong in extensions/, images into datasets/.
"""
