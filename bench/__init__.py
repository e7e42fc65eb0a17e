"""Measurements; each row of docs/results.md is a command here."""
from support import threads  # noqa: F401 (before torch)
