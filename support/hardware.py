"""Device, precision, memory layout, images at a time: where and how fast, never what is computed."""
import copy
import functools
import time

import torch
from torch import nn

from extensions import text

LARGEST = 8192  # images at a time by default: beyond a few thousand a GPU gains no speed
# Bytes for each tuned parameter, beside the weight itself: Adam's moments 8, EMA 4, clipped sum 8, that of a
# micro-batch 8, noisy mean 8, the next sum 8, gradient 4.
TUNED = 48


def laid_out(network, device):
    """The network on the device, in the memory layout that suits the device (`python -m bench.layout`).

    Channels last for a GPU's tensor cores. Contiguous on a CPU, where group norm and bfloat16 convolutions
    are up to 1.6 times as fast that way.
    """
    return network.to(device, memory_format=torch.channels_last
                      if "cuda" in str(device) else torch.contiguous_format)


def free_memory(device):
    """Bytes that are free on a GPU, those included that torch has kept for later."""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info(device)[0]


def kept_on(images, device):
    """Images, a tensor: on a GPU if they take a tenth of its free memory at most, else where they are."""
    if "cuda" in str(device) and images.nbytes <= free_memory(device) / 10:
        return images.to(device)
    return images


def recorded(function, generator):
    """function() -> tensors, recorded as a CUDA graph if generator is a GPU's: a function that replays it.

    Starting a kernel takes Python longer than a small network's kernel runs. A graph starts all kernels of a
    step at once (`python -m bench.gpu`). The function must do the same work on the same tensors at each call,
    and draw from this generator alone. Its results are overwritten by the next call. One that waits for the
    device (as `.item()` does), or fails otherwise when it must not wait, is returned as it is, and a line
    says so. A lack of memory is an error. The generator goes on from where it was.
    """
    if generator.device.type != "cuda":
        return function
    with torch.cuda.device(generator.device):  # streams and graphs belong to the current device
        state, mode, stream = generator.get_state(), torch.cuda.get_sync_debug_mode(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # the first calls prepare libraries and caches
            for _ in range(3):
                function()
            torch.cuda.set_sync_debug_mode("error")
            try:
                function()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason = str(error).splitlines()[0]
                print(f"note: steps are not recorded as a CUDA graph, so they are slower: {reason}")
                return function
            finally:
                torch.cuda.set_sync_debug_mode(mode)
                stream.synchronize()
                generator.set_state(state)
        graph = torch.cuda.CUDAGraph()
        graph.register_generator_state(generator)
        with torch.cuda.graph(graph, stream=stream):
            results = function()

    def replay():
        graph.replay()
        return results
    return replay


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
            torch.cuda.synchronize(s.device)
        begin = time.perf_counter()
        f()
        if "cuda" in s.device:
            torch.cuda.synchronize(s.device)
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
    """n conditions of the model's kind, made up: None, label 0, or prompts of full length."""
    if isinstance(model.embedder, text.TextEncoder):
        return torch.full((n, model.embedder.length), text.BEGIN, device=device)
    return None if model.embedder is None else torch.zeros(n, dtype=torch.int64, device=device)


def bytes_for_backward(network, f):
    """Bytes that autograd keeps of f(), which runs the network; its weights are not counted.

    Meant for the meta device, which computes shapes only: no memory, no time, however large the network is.
    """
    weights, seen = {p.untyped_storage()._cdata for p in network.parameters()}, {}
    with torch.autograd.graph.saved_tensors_hooks(lambda a: seen.update({a.untyped_storage()._cdata: a}) or a,
                                                  lambda a: a):
        f()  # `seen` holds all that is saved, so no storage is freed before it is counted
    return sum(a.untyped_storage().nbytes() for key, a in seen.items() if key not in weights)


def bytes_of_one_latent(model, latent_shape):
    """`bytes_for_backward` of one latent and its condition, all parameters trained. Nothing is computed."""
    z, t = torch.empty(1, *latent_shape, device="meta"), torch.zeros(1, dtype=torch.int64, device="meta")
    # A copy on the meta device, where tensors are shapes only. Its parameters need a gradient.
    tensors = {id(p): nn.Parameter(p.to("meta")) for p in model.parameters()}
    tensors |= {id(buffer): buffer.to("meta") for buffer in model.buffers()}
    twin = copy.deepcopy(model, tensors)
    return bytes_for_backward(twin, lambda: twin(z, t, stand_in(twin, 1, "meta")))


def bytes_of_one_image(s, latent, trained):
    """Bytes that an image takes in the private stage. latent: what `bytes_of_one_latent` gives.

    vmap and loop keep the gradient of every image, float32 of `trained` parameters, the loop twice for a
    moment.
    """
    return s.noise_multiplicity * latent + (0 if s.method == "bookkeeping" else 8 * trained)


def largest_batch(free, fixed, per_image):
    """Largest number of images at a time, from three numbers of bytes; 0 if not even one fits.

    A tenth of the free memory is left to the allocator, and an image takes a third more than what autograd
    keeps of it: gradients on their way, and the Gram matrices of book-keeping (bench/dp_step.py).
    """
    return max(0, int((0.9 * free - fixed) / (4 / 3 * per_image)))


def micro_batch(s, model, latent_shape):
    """Private images at a time: --micro-batch, or on a GPU as many as surely fit half of its free memory.

    Given the draws, a step's result does not depend on it. A GPU is done with a few hundred images of a small
    network before Python has started the next kernel.
    """
    if s.micro_batch is not None:
        return s.micro_batch
    trained = count(p for p in model.parameters() if p.requires_grad)
    per_image = bytes_of_one_image(s, bytes_of_one_latent(model, latent_shape), trained)
    return min(LARGEST, max(1, largest_batch(free_memory(s.device) / 2, TUNED * trained, per_image)))
