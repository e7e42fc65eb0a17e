"""Public networks in half precision: `python train.py --init pretrained/NAME`.

note.json has the command that made each.

Here belong networks of drawn images only. Not here: releases, and anything tuned on private images.
"""
from support import threads  # noqa: F401 (before torch)
