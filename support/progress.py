"""What a run keeps while it trains: its state for --resume, the ledger, the log, the progress bar.

`Public` is for the loop of stages 1 and 2, `Private` for that of stage 3. The order within a private step
makes it crash-safe: draw, accumulate, `spend` (the ledger row is on the disk), noise and update, `keep`.
"""
import time

import torch

import accountant
import optim
from support import files, guarantee
from support.bars import tqdm
from support.files import plain
from support.rounding import round_up
from support.team import from_rank0, rank

# Steps, epsilon and the time left; no rate of examples, which would tell the sizes of private batches. (The
# guarantee does not cover timing in any case: see dp_sgd.py.)
QUIET_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


def load_optimizers(optimizers, state):
    """Moments from a checkpoint, which has a list of them."""
    for optimizer, moments in zip(optimizers, state["optimizers"], strict=True):
        optim.load_state(optimizer, moments)


class Public:
    """State of a public stage in `path`: read first, written every minute and on Ctrl-C.

    It is removed when the stage's result is written (`RunFolder.cached`).

    adversary: a module that trains itself within the loss, or None; its state is saved as well.
    """

    def __init__(self, s, path, model, average, optimizers, generator, adversary, stop):
        self.s, self.path, self.model, self.average, self.stop = s, path, model, average, stop
        self.optimizers, self.generator, self.adversary = optimizers, generator, adversary
        self.first, self.saved = 0, time.monotonic()
        if path.exists():
            self.read()
        from_rank0(None)  # nobody writes before all have read

    def read(self):
        state = files.load(self.path)
        with files.understanding(self.path):
            self.model.load_state_dict(state["model"])
            torch._foreach_copy_(self.average, [a.to(self.s.device) for a in state["average"]])
            load_optimizers(self.optimizers, state)
            if self.adversary is not None:
                self.adversary.load_state_dict(state["also"])
            self.first = int(state["step"])
            if rank() == 0 and state.get("device", self.s.device) == self.s.device:
                self.generator.set_state(state["generator"])
            else:  # only rank 0's is stored, and a generator of another device has another state
                self.generator.manual_seed(self.s.seed + 1 + 1_000_000 * rank() + self.first)

    def steps(self, title, total):
        """Indices of the steps to do, with a bar."""
        self.bar = tqdm(range(self.first, total), desc=title, unit="step", initial=self.first, total=total,
                        disable=rank() > 0)
        return self.bar

    def show(self, step, metrics):
        """metrics: {name: number or tensor}, shown every tenth step: reading one waits for the device."""
        if step % 10 == 0:
            self.bar.set_postfix({k: f"{float(v):.4g}" for k, v in metrics.items()}, refresh=False)

    def keep(self, done):
        """After each step: save once a minute; if Ctrl-C was pressed, save and leave."""
        leaving = from_rank0(self.stop.asked)
        if leaving or time.monotonic() - self.saved > 60:
            also = None if self.adversary is None else self.adversary.state_dict()
            files.save({"model": self.model.state_dict(), "average": self.average, "step": done,
                        "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
                        "generator": self.generator.get_state(), "device": self.s.device, "also": also},
                       self.path)
            self.saved = time.monotonic()
        if leaving:
            self.stop.leave(self.s.out)


class Private:
    """Ledger, state, log and bar of the private stage, in internal/ of the run folder.

    rows     ledger rows: one for every step that is spent, also for one whose result a crash has lost
    done     updates that the weights contain, never more than there are rows (run_folder.check_spent)
    """

    def __init__(self, s, plan, engine, average, optimizers, stop):
        self.s, self.plan, self.engine, self.average = s, plan, engine, average
        self.optimizers, self.stop = optimizers, stop
        self.folder = s.out / "internal"
        self.rows = files.ledger_rows(files.read_ledger(self.folder / "ledger.jsonl"), plan)
        self.lines = count_lines(self.folder / "ledger.jsonl")
        self.done = resume(self.folder / "state.pt", engine, average, optimizers)
        self.covered = len(self.rows)  # the bar shows epsilon of so many steps
        self.epsilon = epsilon_after(s, plan, self.covered)
        self.examples, self.begin = 0, time.monotonic()
        from_rank0(None)  # nobody writes before all have read

    def steps(self):
        """Indices of the steps left, with a bar. A step in the ledger is spent even if its result is lost."""
        self.save()  # is there room? A full disk would spend a step at every restart, and lose its result
        first, total = len(self.rows), self.plan["steps"]
        self.bar = tqdm(range(first, total), desc="3/3 private tuning", unit="step", initial=first,
                        total=total, disable=rank() > 0,
                        bar_format=None if self.s.show_private else QUIET_BAR)
        self.bar.set_postfix(epsilon=round_up(self.epsilon))
        return self.bar

    def spend(self, step):
        """Write the step's ledger row, and return only when it is on the disk."""
        self.check_alone()
        row = {"step": step, "q": self.plan["q"], "sigma": self.plan["sigma"], "computed": computed(self.s)}
        self.rows.append({**row, "clip_norm": self.s.clip_norm, "batch_size": self.s.batch_size})
        files.append_row(self.rows[-1], self.folder / "ledger.jsonl")
        self.lines += 1

    def check_alone(self):
        """ValueError if the ledger on the disk has other rows than ours: another program writes there.

        The lock of the run folder should prevent that. Some network file systems keep locks on each machine.
        """
        path = self.folder / "ledger.jsonl"
        if rank() == 0 and count_lines(path) != self.lines:
            raise ValueError(f"{path} was changed by another program, so two runs may be at work in this "
                             "folder; stop one of them, then go on with --resume: every row counts as spent")

    def finished(self):
        """Rows of the ledger after the last step."""
        self.check_alone()
        return self.rows

    def save(self):
        """Write the tuned parameters, their average, the optimizers' moments, and the number of updates."""
        tuned = dict(zip(self.engine.names, self.engine.parameters, strict=True))
        files.save({"tuned": tuned, "average": self.average, "done": self.done,
                    "optimizers": [optimizer.state_dict() for optimizer in self.optimizers]},
                   self.folder / "state.pt")

    def keep(self, step):
        """After the step: save its result, log it, show epsilon. After Ctrl-C leave, if steps are left."""
        engine, spent, total = self.engine, len(self.rows), self.plan["steps"]
        self.done, self.examples = self.done + 1, self.examples + engine.last["examples"]
        leaving = from_rank0(self.stop.asked) and spent < total
        self.save()
        every = max(1, total // 100)  # tight accounting takes a tenth of a second
        # Computed once in `every` steps, for the last of them. So what bar and log show is an upper bound.
        if spent > self.covered:
            self.covered = min(spent + every - 1, total)
            self.epsilon = epsilon_after(self.s, self.plan, self.covered)
        row = {"step": step, "epsilon": plain(self.epsilon), **engine.last}
        files.append_row(row, self.folder / "log.jsonl")
        shown = {"epsilon": round_up(self.epsilon)}
        if self.s.show_private:  # exact numbers of private batches: epsilon does not cover them
            shown |= {"loss": f"{engine.last['loss']:.4f}",
                      "clipped": f"{engine.last['clipped_fraction']:.0%}",
                      "examples_per_s": f"{self.examples / (time.monotonic() - self.begin):.0f}"}
        self.bar.set_postfix(shown)
        if leaving:
            self.stop.leave(self.s.out)


def computed(s):
    """Where and how exactly a step was computed: "cpu, bf16"."""
    return f"{torch.device(s.device).type}, {'bf16' if s.bf16 else 'float32'}"


def count_lines(path):
    """How many lines a ledger has, a torn one included. Counted, not parsed: this stands in every step."""
    text = path.read_bytes() if path.exists() else b""
    return text.count(b"\n") + bool(text and not text.endswith(b"\n"))


def epsilon_after(s, plan, steps):
    """epsilon of the first `steps` steps of the plan, and of what was spent before them."""
    rows = [*guarantee.vote_steps(plan["before"]), (plan["q"], plan["sigma"], steps)]
    return accountant.epsilon_of_ledger(rows, s.delta, s.accountant)


def resume(path, engine, average, optimizers):
    """Load tuned parameters, EMA and optimizers, if there is a state -> updates they contain."""
    if not path.exists():
        return 0
    state = files.load(path)
    with files.understanding(path), torch.no_grad():
        done = int(state["done"])
        tuned = [state["tuned"][name].to(engine.parameters[0]) for name in engine.names]
        torch._foreach_copy_(engine.parameters, tuned)
        torch._foreach_copy_(average, [a.to(average[0]) for a in state["average"]])
        load_optimizers(optimizers, state)
    return done
