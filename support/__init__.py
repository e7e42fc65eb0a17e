"""Plumbing: flags, run folders, checkpoints, hardware, processes, the privacy plan and statement, the release.

Nobody needs it to understand the paper. The method belongs into the files above, images into datasets/.
"""
