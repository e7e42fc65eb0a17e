"""Progress bars: a bar in a terminal, a notebook's bar in a notebook, and a line now and then in a file."""
import sys

from tqdm.auto import tqdm as automatic

SECONDS = 30  # between two lines, where the output is a file
PLAIN = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class tqdm(automatic):  # noqa: N801 (the name that everybody knows)
    """tqdm.auto; but where stderr is a file, as in a batch job, a line per 30 seconds and one at the end."""

    def __init__(self, *args, **kwargs):
        self.lines = not sys.stderr.isatty() and "ipykernel" not in sys.modules
        if self.lines:
            form = kwargs.get("bar_format") or PLAIN
            kwargs |= {"mininterval": SECONDS, "maxinterval": SECONDS, "leave": True,
                       "bar_format": form.replace("|{bar}|", "")}
        super().__init__(*args, **kwargs)

    def display(self, msg=None, *args, **kwargs):
        if not self.lines:
            return super().display(msg, *args, **kwargs)
        # close() disables the bar, shows it a last time, and ends the line itself
        end = "" if self.disable else "\n"
        self.fp.write((str(self) if msg is None else msg) + end)
        self.fp.flush()

    def set_postfix(self, *args, **kwargs):
        super().set_postfix(*args, **kwargs | ({"refresh": False} if self.lines else {}))
