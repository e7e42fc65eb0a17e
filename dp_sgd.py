"""DP-SGD: Poisson batches, per-example gradients, clipping, noise. Only the fast gradients are elsewhere.

Implements DP-SGD (Abadi et al. 2016, Algorithm 1) as *Differentially Private Latent Diffusion Models* (Liu et
al. 2024, Algorithm 1) uses it to tune the attention and the condition embedder. The file imports nothing of
the project. One step::

    engine = DPSGD(model, clip_norm=C, noise_multiplier=sigma, expected_batch_size=q * n)
    batch = poisson_sample(n, q)                        # every example independently with probability q
    for part in batch.split(64):                        # micro-batches: they only limit the memory
        engine.accumulate(loss_fn, x[part], y[part])    # sum_i clip(g_i); nothing is released yet
    engine.step(optimizer)                              # (sum + N(0, sigma^2 C^2 I)) / B, then the optimizer

Symbols
    n      number of private examples;  q  probability that an example enters a batch
    g_i    gradient of example i with respect to ALL trainable parameters together
    C      clip_norm, the sensitivity: one example more or less moves the sum by at most C (L2 norm), up to
           rounding. For this the noise is that of C * (1 + ROUNDING), see below
    sigma  noise_multiplier: the standard deviation of the noise, in units of C
    B      expected_batch_size = q * n, fixed before training, because the actual size is private
    N      number of examples of a micro-batch;  L  number of trainable layers
    K      draws of the loss for one example (diffusion.py)

The paper's C = 1e-3 for MNIST looks tiny. But where nearly all examples are clipped, gradients and noise are
both proportional to C, and Adam's step does not change if all gradients are multiplied by one factor. So a
smaller C does not make smaller steps. This holds while the noise on a coordinate, sigma * C / B, is well
above Adam's constant eps (1e-8). Below it (the paper's C = 1e-6 for CIFAR-10) Adam takes smaller steps.

The guarantee does not cover timing: the duration of a step tells the size of its batch.
"""
import math
import os
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

# For sigma from 1e-3 to 1e6 and B up to 10^6 the noisy mean, and its square in Adam, then stay finite and
# above 0 in float32 (support/settings.py checks sigma).
SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-10, 1e10
# One example may move a float32 sum of clipped gradients by slightly more than C, by rounding. So at most
# AT_ONCE are added in float32, their sums in float64. The noise is that of a sensitivity C * (1 + ROUNDING).
# This margin was measured on CPUs (`python -m bench.rounding`). It is no proof, and on a GPU it was not
# measured.
AT_ONCE = 1024
ROUNDING = 1e-3
CHUNK = 16_384  # normals drawn at a time: their uniforms fit into a CPU's cache. On a GPU 256 times as many


# ------------------------------------------------------------------------- randomness: noise and sampling

class SecureGenerator:
    """Randomness for noise and batches, in float64, from the operating system (os.urandom).

    Ordinary generators have three faults that break the guarantee.
    1. Prediction. The bits of torch's CPU generator are linear in its state. Whoever sees enough of them can
       compute all others, and released weights show some (tests/test_noise_attack.py). Here the process
       has no seed and no state. No attack is known that predicts the system's cryptographic generator.
    2. Tails. A float32 normal is at most sqrt(2 * 24 ln 2) = 5.77 standard deviations. An output further
       than that from the sum without an example is possible only if that example was in the batch. Here the
       density is a normal's up to 64 standard deviations (`reach`).
    3. Rounding (Mironov 2012). Floating-point normals lie on a lattice, so the low bits of a noisy sum tell
       which sum it was. Here a normal is the sum of four Box-Muller draws, divided by 2 (Holohan and
       Braghin 2021). Then `privatise` rounds to a grid that is far coarser than that lattice, and the
       same for all data.
    """

    # In standard deviations, read by support/randomness.py. Beyond it the density is below a normal's, and
    # from 74.9 on it is 0.
    reach = 64.0

    def uniforms(self, n):
        """(n,) float64, multiples of 2^-53 in [0, 1)."""
        if n == 0:
            return torch.zeros(0, dtype=torch.float64)
        bits = torch.frombuffer(bytearray(os.urandom(8 * n)), dtype=torch.int64)
        return ((bits >> 11) & (2 ** 53 - 1)).double().mul_(2.0 ** -53)  # the mask clears copies of the sign

    def normals(self, shape, device="cpu"):
        """Standard normals of the given shape, float64."""
        out = torch.empty(math.prod(shape), dtype=torch.float64, device=device)
        for part in out.split(CHUNK if out.device.type == "cpu" else 256 * CHUNK):
            # Box-Muller turns 2 uniforms into 2 normals, by cos and sin. Of 8 uniforms come 8 normals, which
            # are added in fours: 2 normals.
            half = (len(part) + 1) // 2
            u = self.uniforms(8 * half).view(2, 4, half)
            for power in range(32, 961, 32):
                # Near 0 multiples of 2^-53 are too coarse for the tail. A uniform number below 2^-32 is
                # uniform there, so it is drawn again with finer steps.
                if not (small := u[0] < 2.0 ** -power).any():
                    break
                u[0][small] = 2.0 ** -power * (1 - self.uniforms(int(small.sum())))
            u = u.to(out.device)  # for CUDA too the bytes come from the host
            radius = u[0].log_().mul_(-2).sqrt_()  # sqrt(-2 ln u), where u > 0
            angle = u[1].mul_(2 * math.pi)
            part[:half] = (radius * angle.cos()).sum(0)
            part[half:] = (radius * angle.sin_()).sum(0)[:len(part) - half]
        return out.div_(2).view(shape)  # the sum of four has standard deviation 2


def poisson_sample(n, q, generator=None):
    """A Poisson batch: each of n examples independently with probability q (Abadi et al. 2016, section 3.1).

    Returns sorted indices, a LongTensor. The accounting does not hold for shuffled batches, nor for batches
    that an attacker can guess. generator=None uses a new `SecureGenerator`. ValueError for q outside (0, 1]
    or negative n.
    """
    if not 0 < q <= 1:
        raise ValueError(f"q is the probability that an example enters a batch, in (0, 1], got {q}")
    if n < 0:
        raise ValueError(f"n, the number of examples, cannot be negative, got {n}")
    generator = SecureGenerator() if generator is None else generator
    if isinstance(generator, SecureGenerator):
        coins = generator.uniforms(n)
    else:  # float64, since float32 would round q
        coins = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)
    return (coins < q).nonzero()[:, 0]  # Binomial(n, q) many; an empty batch is a batch like any other


def privatise(sums, sensitivity, noise_multiplier, expected_batch_size, generator):
    """Clipped sums, a list of tensors -> new noisy mean gradients (sum + N(0, sigma^2 S^2 I)) / B.

    S is the sensitivity: C and what the engine allows for rounding. B is the expected batch size: the actual
    one is private. generator=None uses a new `SecureGenerator`.
    """
    generator = SecureGenerator() if generator is None else generator
    std, noisy = noise_multiplier * sensitivity, []
    grid = 2.0 ** (math.frexp(std)[1] - 16)  # a power of two, from std / 2^16 to std / 2^15
    for s in sums:
        # Every coordinate gets noise, because it is private which ones the batch touched.
        if isinstance(generator, SecureGenerator):
            noise = generator.normals(s.shape, s.device)
        else:
            noise = torch.randn(s.shape, dtype=torch.float64, device=s.device, generator=generator)
        # Added in float64 and rounded to a fixed grid (see SecureGenerator): near 0, floats that are not
        # rounded keep low bits that tell which sum it was.
        total = s.double() + std * noise
        total = (total / grid).round_() * grid if std else total
        noisy.append(total.to(s.dtype) / expected_batch_size)
    return noisy


# ------------------------------------------------------------------------------------------------ clipping
# A clipping rule maps the norms of the per-example gradients, layer by layer (L, N), to factors (L, N).
# Whatever the norms are, the clipped gradient of one example, all layers together, has length C at most.
# `bounded` makes sure of it. Not checked: the factors of an example must not depend on other examples' norms.
# If they did (on a maximum, a mean), one example would change the shares of all.

def flat(norms, clip_norm):
    """min(1, C/|g|) with |g| over all layers: no clipped gradient is longer than C (Abadi et al. 2016)."""
    total = norms.square().sum(0).sqrt()  # (N,)
    return (clip_norm / total).clamp(max=1).expand_as(norms)  # norm 0: C/0 = inf, clamped to 1


def automatic(norms, clip_norm):
    """C/(|g| + 0.01): the length is below C, and close to C unless |g| is small (Bu et al. 2022).

    C scales the gradient and its noise alike: with Adam it may as well be 1.
    """
    total = norms.square().sum(0).sqrt()  # (N,)
    return (clip_norm / (total + 0.01)).expand_as(norms)  # times |g|: below C


def per_layer(norms, clip_norm):
    """min(1, (C/sqrt(L))/|g_l|) in each of L layers (McMahan et al. 2018).

    The squared lengths sum to at most L * C^2/L = C^2.
    """
    return (clip_norm / len(norms) ** 0.5 / norms).clamp(max=1)  # len(norms) is L


CLIPPING = {"flat": flat, "automatic": automatic, "per-layer": per_layer}


def bounded(factors, norms, clip_norm):
    """Factors (L, N), reduced where a clipped gradient would be longer than C: for rules that do not clip."""
    length = (factors * norms).square().sum(0).sqrt()  # (N,), of the clipped gradients
    return factors * (clip_norm / length).clamp(max=1)


def finite_examples(norms, losses):
    """(N,) bool: which examples have a finite norm over all layers, and a finite loss."""
    return norms.square().sum(0).isfinite() & losses.isfinite()


def usable(factors, norms, losses):
    """Factors (L, N), set to 0 for examples that are not finite: they must contribute exactly nothing.

    Factors below float32's normal range become 0 too. There rounding is no longer small beside the factor,
    and could make a gradient much longer than C.
    """
    normal = factors > torch.finfo(torch.float32).tiny
    return torch.where(finite_examples(norms, losses) & normal, factors, 0.0)


# ----------------------------------------------------------------------------------- per-example gradients
# A method takes (model, layers, loss_fn, batch) and returns three things: the norms of the per-example
# gradients (L, N) float64, the losses (N,), and a function from factors (L, N) to the weighted sum of the
# gradients, one tensor per parameter. `loop` defines the result. extensions/bookkeeping.py is the fast one.

def loop(model, layers, loss_fn, batch):
    """One backward pass per example: slow and obvious. The other methods are tested against it."""
    params = [p for layer in layers for p in layer.params.values()]
    grads, losses = [], []
    for i in range(number_of_examples(batch)):
        # Example i as a batch of one: i:i+1 keeps the first dimension.
        loss = checked(loss_fn(model, *(b if b is None else b[i:i + 1] for b in batch)), 1)
        gradient = torch.autograd.grad(loss.sum(), params, allow_unused=True)  # None: not used by example i
        grads.append([torch.zeros_like(p) if g is None else g
                      for g, p in zip(gradient, params, strict=True)])
        losses.append(loss.detach())
    # From one list per example to one tensor per parameter, (N, *parameter.shape).
    return from_gradients(layers, [torch.stack(g) for g in zip(*grads, strict=True)], torch.cat(losses))


def vmap(model, layers, loss_fn, batch):
    """The gradient function of one example, vectorised by torch.func. Needs memory for N gradients."""
    # functional_call runs a module's forward with other parameters. So the loss is made one: that of `root`.
    root = nn.Module()
    root.model, root.forward = model, lambda *example: loss_fn(root.model, *example)
    # The name of a parameter is model.LAYER.weight; the layer's name is "" if the model itself is the layer.
    params = {f"model.{layer.name}.{k}".replace("..", "."): p.detach()
              for layer in layers for k, p in layer.params.items()}

    def one_loss(params, *example):
        losses = torch.func.functional_call(root, params, tuple(b if b is None else b[None] for b in example))
        return checked(losses, 1).sum(), losses[0]

    # All examples share the parameters (None); each has its own row of every item (0).
    dims = (None, *(None if b is None else 0 for b in batch))
    grads, losses = torch.func.vmap(torch.func.grad(one_loss, has_aux=True), dims)(params, *batch)
    return from_gradients(layers, list(grads.values()), losses.detach())


def from_gradients(layers, grads, losses):
    """Per-example gradients (N, *parameter.shape), in the layers' order -> what a method returns."""
    owner = [i for i, layer in enumerate(layers) for _ in layer.params]  # index of each gradient's layer
    with full_precision(losses.device):
        squared = torch.zeros(len(layers), len(losses), dtype=torch.float64, device=losses.device)
        for i, g in zip(owner, grads, strict=True):
            squared[i] += squared_norm(g)  # weight and bias of a layer count together

    def weighted(factors):  # (L, N): each layer may have its own factors
        keep = contributing(factors)
        return [weighted_sum(g, factors[i], keep) for i, g in zip(owner, grads, strict=True)]

    return squared.sqrt(), losses, weighted


def squared_norm(a):
    """|a_n|^2 of each row, (N, ...) -> (N,) float64. In float32 the square of 1e-23 would be 0."""
    return torch.linalg.vector_norm(a.reshape(len(a), -1), dim=-1, dtype=torch.float64).square()


def weighted_sum(a, factor, keep):
    """sum_n factor[n] * a[n], (N, d, ...) -> (d, ...), over the examples kept (`contributing`; None: all)."""
    a = a if keep is None else masked(a, keep)
    parts = zip(factor.to(a.dtype).split(AT_ONCE), a.reshape(len(a), -1).split(AT_ONCE), strict=True)
    return sum_of_parts(f @ x for f, x in parts).view(a.shape[1:])


def sum_of_parts(parts):
    """The sum of tensors; in float64 if there are several, see `zeros`."""
    first, *others = parts
    return sum((part.double() for part in others), first.double()) if others else first


def contributing(factors):
    """Factors (L, N) -> (N,) bool: which examples contribute. None if all do, on a CPU: no mask then."""
    keep = factors.any(0)
    # On a GPU this question would wait for the device, so it is not asked.
    return None if keep.device.type == "cpu" and keep.all() else keep


def masked(a, keep):
    """a (N*K, ...) with the rows of examples that are not kept (N,) set to 0. 0 * inf would be NaN."""
    rows_kept = keep.repeat_interleave(len(a) // len(keep)).view(-1, *[1] * (a.dim() - 1))
    return torch.where(rows_kept, a, 0.0) if a.is_floating_point() else a  # token numbers are finite


@contextmanager
def full_precision(device):
    """Within it norms and sums have full precision, and no graph is recorded."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")  # no TF32, which keeps 10 bits of a product's factors
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# ------------------------------------------------------------------------------------- what may be trained

class Layer(NamedTuple):
    """A module with trainable parameters of its own."""

    name: str  # in the model, as "middle_block.1.norm"
    module: nn.Module
    params: dict  # {"weight": Parameter, ...}, only the trainable ones


def trainable_layers(model):
    """The layers that DP-SGD trains. ValueError, with the layer's name, for one that it does not support.

    Refused are layers with running statistics (BatchNorm), shared parameters, dropout (the loss must be a
    function of its draws), models with nothing to train. A layer of your own that mixes examples is not
    detected: you must avoid it.
    """
    layers, owner = [], {}
    for name, m in model.named_modules():
        title = f"layer {name!r} ({type(m).__name__})"
        if isinstance(m, nn.modules.batchnorm._BatchNorm) or getattr(m, "track_running_stats", False):
            raise ValueError(f"{title} mixes the examples of a batch or keeps statistics of them, which "
                             "clipping per example does not bound; use GroupNorm or LayerNorm")
        rate = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else getattr(m, "dropout", 0)
        if isinstance(rate, (int, float)) and rate > 0:
            raise ValueError(f"{title} has dropout {rate}; set it to 0 for the private stage")
        params = {k: p for k, p in m.named_parameters(recurse=False) if p.requires_grad}
        # setdefault returns the name of the first layer that had the parameter.
        shared = [owner[p] for p in params.values() if owner.setdefault(p, name) != name]
        if shared:
            raise ValueError(f"{title} shares a parameter with layer {shared[0]!r}; untie or freeze it")
        if params:
            layers.append(Layer(name, m, params))
    if not layers:
        raise ValueError("the model has no trainable parameter; call tuning.select_trainable first")
    return layers


def number_of_examples(batch):
    """Number of examples N of a micro-batch, on which all its items (tensors or None) must agree."""
    sizes = {len(b) for b in batch if b is not None}
    if len(sizes) != 1:
        raise ValueError("every item of a micro-batch needs one row per example or is None; "
                         f"found {sorted(sizes)} rows")
    return sizes.pop()


def checked(losses, n):
    """The losses, if there is one per example and it depends on trainable parameters; else ValueError."""
    if not isinstance(losses, torch.Tensor) or losses.shape != (n,):
        raise ValueError(f"loss_fn must return one loss per example, shape ({n},), not "
                         f"{tuple(getattr(losses, 'shape', ()))}: never average over examples")
    if not losses.requires_grad:
        raise ValueError("the losses do not depend on any trainable parameter; is loss_fn under no_grad?")
    return losses


def zeros(params):
    """Empty sums, one float64 tensor per parameter.

    Float32 sums of 10,000 gradients would round the last ones away: one example more would move them by up
    to 1.001 C, and sums of 60,000 by 1.02 C (`python -m bench.rounding`).
    """
    return [torch.zeros_like(p, dtype=torch.float64) for p in params]


# ---------------------------------------------------------------------------------------------- the engine

class DPSGD:
    """DP-SGD on the parameters of `model` that require grad: accumulate micro-batches, then step once.

    clip_norm            C, between 1e-10 and 1e10
    noise_multiplier     sigma >= 0, in units of C; 0 is not private
    expected_batch_size  B = q * n
    clipping             clipping rule: `flat`, `automatic`, `per_layer`, or your own, example by example
    method               of per-example gradients: `loop`, `vmap` or extensions.bookkeeping.bookkeeping, equal
                         up to rounding
    generator            of the noise; None for `SecureGenerator`. A torch.Generator makes it predictable

    `sums` holds the clipped sums, one tensor per trainable parameter in the order of `names`. `last` holds
    metrics of the last step (`summary`). Neither has noise, so neither may be published. The caller may run
    loss_fn under bfloat16 autocast: norms and sums are taken in full precision all the same. ValueError for
    values out of range and for layers that `trainable_layers` refuses.
    """

    def __init__(self, model, clip_norm, noise_multiplier, expected_batch_size, clipping=flat, method=loop,
                 generator=None):
        if not SMALLEST_CLIP_NORM <= clip_norm <= LARGEST_CLIP_NORM:
            raise ValueError(f"clip_norm C must lie between {SMALLEST_CLIP_NORM:g} and "
                             f"{LARGEST_CLIP_NORM:g}, got {clip_norm}")
        if not 0 <= noise_multiplier < math.inf:
            raise ValueError(f"noise_multiplier sigma must be >= 0 (0: not private), got {noise_multiplier}")
        if not 0 < expected_batch_size < math.inf:
            raise ValueError(f"expected_batch_size q * n must be positive, got {expected_batch_size}")
        self.model, self.clipping, self.method, self.clip_norm = model, clipping, method, clip_norm
        self.noise_multiplier, self.expected_batch_size = noise_multiplier, expected_batch_size
        self.layers = trainable_layers(model)
        if refuse := getattr(method, "refuse", None):  # a method may refuse layers that it does not know
            refuse(self.layers)
        self.names = [f"{layer.name}.{k}".lstrip(".") for layer in self.layers for k in layer.params]
        self.parameters = [p for layer in self.layers for p in layer.params.values()]
        self.generator = SecureGenerator() if generator is None else generator
        self.sums, self.last, self.metrics = zeros(self.parameters), {}, []

    def accumulate(self, loss_fn, *batch):
        """Add the clipped per-example gradients of a micro-batch to `sums`. An error leaves `sums` unchanged.

        loss_fn(model, *batch) -> (N,) losses, where loss n depends on rows n of the batch only. It must not
        call autograd itself. Batch items have N rows (0 is fine) or are None. Examples with NaN or infinity
        contribute exactly zero. ValueError for losses or rows that do not fit, or if other parameters require
        grad than at first.
        """
        if {p for p in self.model.parameters() if p.requires_grad} != set(self.parameters):
            raise ValueError("the set of trainable parameters changed; make a new DPSGD for it")
        if number_of_examples(batch) == 0:
            return  # nobody was drawn; `step` adds noise all the same
        with torch.enable_grad():  # whatever the caller has set
            norms, losses, weighted = self.method(self.model, self.layers, loss_fn, batch)
        with full_precision(losses.device):
            factors = bounded(self.clipping(norms, self.clip_norm), norms, self.clip_norm)  # (L, N)
            factors = usable(factors, norms, losses)  # 0 if not finite
            sums = weighted(factors)  # of N gradients, each of length C at most
            metrics = measure(norms, losses, factors)
            torch._foreach_add_(self.sums, sums)  # nothing changes before this line, nothing fails after it
        self.metrics.append(metrics)

    def step(self, optimizer, *others):
        """Noise once, division by B, then the optimizers. An empty batch (no `accumulate`) is a step too."""
        # What goes in depends on single examples and is secret. What comes out is covered by epsilon.
        grads = privatise(self.sums, self.clip_norm * (1 + ROUNDING),
                          self.noise_multiplier, self.expected_batch_size, self.generator)
        self.last = summary(self.metrics)
        # Before the update: if that fails, the same sums cannot be released a second time.
        self.sums, self.metrics = zeros(self.parameters), []
        for p, g in zip(self.parameters, grads, strict=True):
            p.grad = g.to(p.dtype)  # the optimizer takes it like any gradient
        for one in (optimizer, *others):
            one.step()
        for p in self.parameters:
            p.grad = None


def check_against_loop(engine, loss_fn, *batch):
    """ValueError unless the engine's method finds the norms and the sum that `loop` finds on this batch.

    Call it with random data before the first step. Book-keeping (extensions/bookkeeping.py) sees inputs and
    output gradients of layers, through hooks. It misses a weight that is used outside its layer, or an input
    whose rows are not examples; then the results differ. A layer whose gradient is still 0, as the first
    matrix of a new LoRA pair, is not checked.
    """
    def norms_and_sums(method):  # the N norms, then the sums, in one vector
        norms, _, weighted = method(engine.model, engine.layers, loss_fn, batch)
        with full_precision(norms.device):
            sums = weighted(torch.ones_like(norms))  # not clipped
        return torch.cat([norms.square().sum(0).sqrt(), *(s.flatten().double() for s in sums)])

    with torch.enable_grad():
        expected, got = norms_and_sums(loop), norms_and_sums(engine.method)
    size = expected[:number_of_examples(batch)].norm()
    # 2 %: above rounding, below most missed gradients. 1e-12: book-keeping's norm of a zero gradient is > 0.
    if not (got - expected).norm() <= 0.02 * size + 1e-12:  # so that nan is refused
        name = getattr(engine.method, "__name__", engine.method)
        raise ValueError(f"{name} and the loop disagree about the gradients of random "
                         "examples, or these are not finite. If finite, the model uses a trained layer in "
                         "a way that hooks do not see: choose --method loop or vmap")


def measure(norms, losses, factors):
    """(4, N) float64, one column per example, for `summary`: norm, loss, is it clipped, is it finite."""
    parts = (norms.square().sum(0).sqrt(), losses, (factors < 1).any(0), finite_examples(norms, losses))
    return torch.stack([part.double() for part in parts])


def summary(metrics):
    """Results of `measure`, one per micro-batch -> the dict `DPSGD.last`; means are over finite examples."""
    metrics = torch.cat(metrics, 1).cpu() if metrics else torch.zeros(4, 0, dtype=torch.float64)
    good = metrics[:, metrics[3] > 0]  # the finite examples
    norms, losses, clipped, _ = good
    count, quantiles = good.shape[1], torch.linspace(0, 1, 5, dtype=torch.float64)
    return {"examples": metrics.shape[1], "nonfinite": metrics.shape[1] - count,
            "loss": float(losses.sum()) / max(count, 1),
            "clipped_fraction": float(clipped.sum()) / max(count, 1),
            "norm_quantiles": norms.quantile(quantiles).tolist() if count else [0.0] * 5}  # at 0, 1/4, .., 1
