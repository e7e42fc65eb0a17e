"""Imported first by every program, before torch: idle threads shall not starve the other work of the machine.

OpenMP's threads wait for each other by spinning. Two programs with as many threads as cores then spin in each
other's way: side by side they make a small part of the steps that they make alone. A short spin mends most
of it and costs a lone run about a tenth (docs/speed.md). A value that the user has set is kept.
"""
import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # GNU OpenMP, in torch's Linux builds
os.environ.setdefault("KMP_BLOCKTIME", "1")  # Intel's and LLVM's OpenMP (macOS, Windows), in milliseconds
