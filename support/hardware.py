"""Device, precision and memory layout: where and how fast, never what is computed."""
import functools
import time

import torch

from extensions import text


def laid_out(network, device):
    """The network on the device, in the memory layout that suits the device (`python -m bench.layout`).

    Channels last for a GPU's tensor cores. Contiguous on a CPU, where group norm and bfloat16 convolutions
    are up to 1.6 times as fast that way.
    """
    return network.to(device, memory_format=torch.channels_last
                      if "cuda" in str(device) else torch.contiguous_format)


def choose_bf16(precision, device):
    """What --precision auto, float32 or bf16 means on this device: do the networks run in bfloat16?"""
    return precision == "bf16" or precision == "auto" and bf16_wins(device)


@functools.cache
def bf16_wins(device):
    """Time a convolution and a matrix product of the UNet's size in both precisions.

    Some CPUs only emulate bfloat16.
    """
    def seconds(dtype, n):  # n: images of 4 x 4
        x, w, a = (torch.randn(shape, device=device, dtype=dtype)
                   for shape in ((n, 128, 4, 4), (128, 128, 3, 3), (4 * n, 512)))
        times = []
        for _ in range(4):  # the first call is slow
            begin = time.perf_counter()
            (torch.nn.functional.conv2d(x, w, padding=1).sum() + (a @ a.T).sum()).item()
            times.append(time.perf_counter() - begin)
        return min(times)
    # Emulated bfloat16 takes a hundred times as long: seen with few images already, in an instant.
    if "cpu" in str(device) and seconds(torch.bfloat16, 4) > 5 * seconds(torch.float32, 4):
        return False
    return seconds(torch.bfloat16, 256) < 0.8 * seconds(torch.float32, 256)


def check_device(device):
    """Raises ValueError if torch cannot use `device` ("cpu", "cuda:1") on this machine."""
    try:
        if torch.device(device).type not in ("cpu", "cuda"):
            raise RuntimeError("choose cpu, cuda or cuda:i")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {device} is not usable here "
                         f"({str(error).splitlines()[0][:80]})") from None


def seconds(s, f):
    """Wall time of one call of f under the run's precision."""
    with autocast(s):
        if "cuda" in s.device:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        f()
        if "cuda" in s.device:
            torch.cuda.synchronize()
    return time.perf_counter() - begin


def autocast(s):
    """bfloat16 for forward and backward where it is faster (decided once); needs no loss scaling."""
    return torch.autocast(torch.device(s.device).type, torch.bfloat16, enabled=s.bf16)


def select(conditions, index):
    """Rows of the conditions, None for none."""
    return None if conditions is None else conditions[index]


def count(parameters):
    return sum(p.numel() for p in parameters)


def stand_in(model, n, device):
    """n conditions of the model's kind for measuring times: None, label 0, or prompts of full length."""
    if isinstance(model.embedder, text.TextEncoder):
        return torch.full((n, model.embedder.length), text.BEGIN, device=device)
    return None if model.embedder is None else torch.zeros(n, dtype=torch.int64, device=device)
