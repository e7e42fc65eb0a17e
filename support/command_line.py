"""What all command lines share: mistakes are told in one line, and errors that were foreseen are, too."""
import argparse
import re
import sys

import torch

from support.team import rank


class Parser(argparse.ArgumentParser):
    """A command line whose mistakes are reported in one line, a ValueError, instead of the whole usage."""

    def error(self, message):
        raise ValueError(f"{message} (see --help)")


# Where memory ended, and what helps there: the functions of train.py.
SMALLER = {
    "train_autoencoder": "in stage 1: begin again in another --out with a smaller --vae-batch",
    "train_diffusion": "in stage 2: begin again in another --out with a smaller --ldm-batch; --init with "
                       "this run's folder keeps its autoencoder",
    "tune_privately": "in the private stage: go on with --resume and a smaller --micro-batch, which changes "
                      "no result"}


def advice(error):
    """What to do after an error of memory, by the stage in which it was raised."""
    trace = error.__traceback__
    while trace:
        if found := SMALLER.get(trace.tb_frame.f_code.co_name):
            return found
        trace = trace.tb_next
    return "here: ask for smaller batches (--batch, --micro-batch, --vae-batch, --ldm-batch) or fewer images"


def run_cli(main):
    """Run a program: a foreseen error is one line on stderr and exit code 2; Ctrl-C is exit code 130."""
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        print(f"rank {rank()}: error: {error}" if rank() else f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except (MemoryError, RuntimeError) as error:  # out of memory has three types
        text = str(error).strip().splitlines()[:1] or ["no more memory"]
        known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not known and not re.search("out of memory|[Cc]an(no|')t allocate memory|not enough memory|"
                                       "ALLOC_FAILED", text[0]):
            raise
        print(f"error: out of memory {advice(error)} ({text[0][:100]})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
