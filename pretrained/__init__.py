"""Public networks in half precision, each made by the command in its note.json; `python train.py --init
pretrained/NAME`.

Here belong networks of drawn images only. Not here: releases, and anything tuned on private images.
"""
