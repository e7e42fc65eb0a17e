"""Several processes that train together, under `torchrun --nproc_per_node=N train.py ...`.

No wrapper around the model: micro-batch counts differ between processes. In the public stages each draws its
share of a batch and all apply the mean of the gradients; in the private stage each Poisson-samples its own
shard, and rank 0 alone writes the ledger and adds the noise (`reduce_sums`). Alone, every function here does
the obvious.
"""
import os
import sys
from datetime import timedelta
from functools import partial

import torch
import torch.distributed as dist

import dp_sgd

# A dead process is noticed at once, by its closed connection; a hanging one after this. All wait while rank 0
# decodes the photographs of a new set.
PATIENCE = timedelta(hours=3)


def rank():
    """This process's number among those of a torchrun, 0 when alone. Writers do nothing unless it is 0."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def join():
    """Under torchrun: meet the other processes (gloo on the CPU, NCCL on CUDA). Rank 0 prints and writes."""
    if int(os.environ.get("WORLD_SIZE") or 1) > 1 and not dist.is_initialized():
        dist.init_process_group(timeout=PATIENCE)
    if rank():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 (for the rest of the process)


def world():
    """Number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def from_rank0(value):
    """Rank 0's value, a small picklable one, for all; everybody waits for everybody."""
    box = [value]
    if world() > 1:
        collective(lambda flag: (dist.all_reduce(flag), dist.broadcast_object_list(box)), [torch.zeros(1)])
    return box[0]


def once(f, *args):
    """f(*args) by rank 0 alone -> its result, for all. An error is told once: the others leave quietly."""
    result = error = None
    if rank() == 0:
        try:
            result = f(*args)
        except BaseException as raised:
            error = raised
    result, failed = from_rank0((result, error is not None))
    if error is not None:
        raise error
    if failed:
        raise SystemExit(2)
    return result


def share(batch):
    """This rank's part of a public batch. Parts differ by one image at most and add up to the batch."""
    return batch // world() + (rank() < batch % world())


def shard(found):
    """This rank's part of a tensor or an ImageSet: every world()-th image."""
    return found[rank()::world()]


def own_device(device):
    """cuda -> cuda:i, the i-th for the i-th process of this machine. ValueError if they want one together."""
    if world() > 1 and device.startswith("cuda:"):
        raise ValueError("several processes need a card each: say --device cuda")
    if world() > 1 and device == "cuda":
        local = int(os.environ.get("LOCAL_RANK", rank()))
        needed = int(os.environ.get("LOCAL_WORLD_SIZE", world()))
        if torch.cuda.device_count() < needed:
            raise ValueError(f"{needed} processes need as many CUDA devices, found "
                             f"{torch.cuda.device_count()}; or --device cpu")
        torch.cuda.set_device(local)
        return f"cuda:{local}"
    return device


def collective(operation, tensors):
    """operation(flat tensor), one of torch.distributed's, on all tensors laid end to end, result copied back.

    Raises ConnectionError, one line, when another process is dead or silent for longer than the group's
    timeout.
    """
    flat = torch.cat([a.detach().flatten() for a in tensors])
    try:
        operation(flat)
    except RuntimeError:
        raise ConnectionError("another process of this run has died or hangs, so the step cannot be "
                              "finished; all stop here, the ledger is whole, go on with --resume") from None
    with torch.no_grad():
        for a, part in zip(tensors, flat.split([a.numel() for a in tensors]), strict=True):
            a.copy_(part.view_as(a))


def mean_gradients(parameters, adversary=None):
    """Mean over the processes, in place, of gradients, and of the weights of a module that trains itself."""
    if world() > 1:
        together = [p.grad for p in parameters if p.grad is not None]
        together += [] if adversary is None else adversary.parameters()
        collective(lambda flat: dist.all_reduce(flat.div_(world())), together)


def reduce_sums(engine):
    """The sums of all ranks -> their total on rank 0, zeros elsewhere; between `accumulate` and `step`.

    Each rank samples a shard of its own with the same q, so an example is on one rank and moves the total by
    at most C, as in one process. Rank 0 alone then writes the ledger row, steps (all the noise, once) and
    hands out the parameters by `broadcast`. A share of the noise on each rank would be smaller than it looks:
    a rank knows, and can subtract, its own. Not DistributedDataParallel, which waits for as many backward
    passes on every rank: numbers of micro-batches differ.
    """
    if world() == 1:
        return
    metrics = torch.cat(engine.metrics, 1).cpu() if engine.metrics else torch.zeros(4, 0, dtype=torch.float64)
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    collective(partial(dist.reduce, dst=0), engine.sums)
    collective(lambda _: dist.gather_object(metrics, gathered), [metrics])
    if gathered is None:
        engine.last, engine.sums, gathered = dp_sgd.summary([metrics]), dp_sgd.zeros(engine.parameters), []
    engine.metrics = gathered


def broadcast(tensors):
    """Rank 0's values, into everybody's tensors."""
    if world() > 1:
        collective(partial(dist.broadcast, src=0), tensors)


def dismiss_others():
    """True for the processes that may go home: the release is written by one. Called by all, once."""
    if world() == 1:
        return False
    going = rank() > 0
    from_rank0(None)
    dist.destroy_process_group()
    return going
