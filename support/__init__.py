"""Plumbing: run folders, checkpoints, hardware, tables. Nobody needs it to understand the paper.

What the paper describes stands at the top level; ideas beyond the paper belong into extensions/.
"""
