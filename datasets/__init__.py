"""Image sets: programs that draw public ones.

Every module is one set or one family of sets; drawing.py is what the drawn ones share.
"""
