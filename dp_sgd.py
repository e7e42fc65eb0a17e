"""DP-SGD: per-example gradients, clipping, one noise draw per step; exact, in a single backward pass.

Implements DP-SGD (Abadi et al. 2016, Algorithm 1) as *Differentially Private Latent Diffusion Models* (Liu et al. 2024,
Algorithm 1) uses it to tune the attention of a latent diffusion model. Imports nothing of the project. One step::

    engine = DPSGD(model, clip_norm=C, noise_multiplier=sigma, expected_batch_size=q * n)
    batch = poisson_sample(n, q)                           # every example independently with probability q
    for part in batch.split(64):                           # micro-batches: their size never changes the result
        engine.accumulate(loss_fn, x[part], y[part])       # sum_i clip(g_i), nothing is released yet
    engine.step(optimizer)                                 # (sum + N(0, sigma^2 C^2 I)) / B, then the optimizer

Symbols: g_i gradient of example i over ALL trainable parameters together · C clip_norm, the sensitivity: adding or
removing one example moves the sum by at most C (L2) · sigma noise_multiplier, the standard deviation of the noise in
units of C · B expected_batch_size = q*n, fixed beforehand (the actual size is private) · N examples of a micro-batch,
K noise draws of each · P positions (pixels or tokens, times K) · d, p inputs and outputs of a layer · L layers.

The paper's C = 1e-3 looks tiny, but Adam divides by the gradient's own size, so C and the learning rate decouple: C
only sets how many examples are clipped. (It needs sigma*C/B well above Adam's eps, or eps takes the place of the size.)

Book-keeping: all per-example norms and the clipped sum from ONE forward and ONE backward pass
----------------------------------------------------------------------------------------------
A linear layer maps x_p -> W x_p + b at P positions. Backpropagating the *summed* loss of a micro-batch gives the
gradient g_p of each output, and since examples do not mix, the g_p of example n depend on its own loss only. With
X (P, d) and G (P, p) of that example, its gradient is

    grad_W = sum_p g_p x_p^T = G^T X   (p, d)             and bias is the weight of a further input that is always 1.

(1) Its norm does not need the matrix:  |G^T X|^2 = tr(X X^T G G^T) = sum over p, p' of (X X^T)[p,p'] (G G^T)[p,p'],
    two Gram matrices: P^2 (d + p) multiplications instead of P d p. P = 1: |x|^2 |g|^2 (Goodfellow 2015). Convolutions
    are the same on unfolded patches (Rochette et al. 2019); sequences: "ghost clipping" (Li et al. 2022).
(2) The clipped sum needs no second backward pass: with the factors c_n, sum_n c_n G_n^T X_n is one matrix product of
    the stacked (c G)^T (p, N P) and X (N P, d): "book-keeping" (Bu et al. 2023). X and G of the trained layers are kept.
(3) Where the matrix itself is the cheaper way (many positions, few channels) it is formed once, (N, p, d); it gives the
    norm, is kept in place of X and G, and the clipped sum is sum_n c_n grad_n.

Autograd does none of that work a second time: weights do not require grad in the meantime, and the graph starts at the
output of the first trainable layer. An embedding is a linear layer on one-hot inputs; a 3x3 convolution is nine linear
layers on shifted images; the scales of norm layers have few enough numbers to be formed per example.

Rounding. Gram products cancel: where positions of opposite sign leave a small norm as the difference of large numbers,
rounding may make it too small, and that breaks the sensitivity. The error is a few float epsilons (more for sums over wide
layers) times (sum_p |x_p||g_p|)^2, which the two diagonals tell. A bound of 8 epsilons, and of 8 per 256 inputs or outputs
where there are more, is *added*: rounding can only clip harder, by about 1e-4. (Measured errors: up to 20 epsilons at 1,280
inputs, 79 at 5,120.)

Underflow. Squares of entries below 1e-19 vanish in float32, and a tiny input may meet a huge gradient. What a Gram matrix
may have lost that way is at most (number of products) * 1e-38 per entry; the norm is computed as if it had lost all of it.
Overflow makes the norm infinite, and such an example contributes zero, as all non-finite ones.

Not covered: a loss_fn that calls autograd itself; timing; with `fresh_generator` instead of `SecureGenerator`, whoever
computes the noise from what is released.
"""
import math
import os
from collections import Counter
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

GAMMA = 0.01  # stability constant of automatic clipping (Bu et al. 2022)
CLIPPING = ("flat", "automatic", "per-layer")
# Beyond these float32 rounds sums and Adam's squares of them to 0 or infinity: the noise would vanish with the signal.
SMALLEST_CLIP_NORM, LARGEST_CLIP_NORM = 1e-10, 1e10


# ---------------------------------------------------------------------------------------- randomness: sample, noise


class SecureGenerator:
    """The default randomness of the mechanism: every number from the operating system's CSPRNG (os.urandom), in float64.

    DP-SGD is private only if its noise cannot be guessed, and only if its noise can be as large as a Gaussian's. Three
    faults of ordinary generators are answered here.

    1. Prediction. torch's CPU generator is a Mersenne twister: all its outputs are linear, over GF(2), in 19,937 bits of
       state. Weights that see no gradient show the signs of their noise in a release, each sign is one or two linear
       equations, and the solution gives the noise of all other weights (tests/test_noise_attack.py). A CSPRNG's outputs
       tell nothing about each other.
    2. Tails. float32 normals are made from uniforms of 24 bits, and end at sqrt(2 * 24 ln 2) = 5.77 standard deviations.
       An output beyond is impossible unless the example is there: infinite privacy loss. Here they end at 17.1.
    3. Floating point (Mironov 2012; Holohan and Braghin 2021). A Gaussian computed from two uniforms takes few values, so
       an output minus a candidate sum that is none of them refutes the candidate. A normal here is the sum of FOUR
       Box-Muller draws, divided by 2: to invert it, four pairs must be searched at once. `privatise` adds it to the sum
       in float64 and rounds once to float32, which drops the 29 low bits that such an attack reads.

    The bytes are drawn on the host also when the weights are on CUDA, and turned into normals on the device: CUDA's own
    generator (Philox, 64 bits of seed) is not a cryptographic one. No seed, no state, nothing to save or to replay.
    Cost: `python -m bench.noise`. Not covered: timing.
    """

    device = torch.device("cpu")
    limit = 2 * math.sqrt(2 * 53 * math.log(2))  # largest normal: four draws of sqrt(-2 ln 2^-53), divided by 2

    def uniforms(self, n, device="cpu"):
        """(n,) float64, multiples of 2^-53 in [0, 1)."""
        bits = torch.frombuffer(bytearray(os.urandom(8 * n)), dtype=torch.int64) if n else torch.zeros(0, dtype=torch.int64)
        bits = bits.to(device) >> 11 & 2 ** 53 - 1  # the shift keeps the sign, the mask drops it
        return bits.double().mul_(2.0 ** -53)

    def normals(self, shape, device="cpu"):
        """Standard normals of the given shape, float64."""
        out = torch.empty(math.prod(shape), dtype=torch.float64, device=device)
        for part in out.split(CHUNK if out.device.type == "cpu" else 256 * CHUNK):
            half = (len(part) + 1) // 2
            u = self.uniforms(8 * half, out.device).view(2, 4, half)
            radius = u[0].neg_().log1p_().mul_(-2).sqrt_()  # sqrt(-2 ln(1 - u)); 1 - u is never 0
            angle = u[1].mul_(2 * math.pi)
            part[:half] = (radius * angle.cos()).sum(0)
            part[half:] = (radius * angle.sin_()).sum(0)[:len(part) - half]
        return out.div_(2).view(shape)


CHUNK = 16_384  # normals at a time: their uniforms fit into the processor's cache


def fresh_generator(device="cpu"):
    """An ordinary generator with a seed that nobody knows; never torch's global one. NOT for the noise of a release.

    Whoever sees enough of its output computes the rest (`SecureGenerator`, fault 1). It draws what is no secret of the
    mechanism, the timesteps and noise of the diffusion loss; and the DP noise under --fast-noise, for experiments.

    On the CPU manual_seed keeps only 32 bits of a seed (few enough to try all 2^32 noises), so the whole state of the
    Mersenne twister is drawn from os.urandom instead. CUDA's Philox takes 64 bits.
    """
    generator = torch.Generator(device).manual_seed(int.from_bytes(os.urandom(8), "little"))
    if generator.device.type == "cpu":
        state = generator.get_state()  # bytes: seed (8), left (4), seeded (4), next (8), then 624 words of 8 bytes each
        words = torch.frombuffer(bytearray(os.urandom(624 * 4)), dtype=torch.int32).to(torch.int64) & 0xFFFFFFFF
        state[24:24 + 624 * 8] = words.view(torch.uint8)
        generator.set_state(state)
    return generator


def largest_normal(generator):
    """In standard deviations: no normal drawn by `privatise` from this generator is larger.

    torch's float64 normals come from uniforms of 53 bits: sqrt(2 * 53 ln 2) = 8.57. (Its float32 normals, which are not
    used here, end at 5.77 on a CPU and at 6.76 on CUDA.)
    """
    return generator.limit if isinstance(generator, SecureGenerator) else SecureGenerator.limit / 2


def beyond_the_noise(generator, q, sigma, steps, k=1):
    """Bound on the probability that k examples push an output to where the noise alone cannot get.

    For one example it is steps * q * P(N > limit - 1/sigma). Such an output proves that the examples are there, so this
    has to be far below delta. j of the k examples are in a batch with probability Bin(j; k, q), and move the sum by at
    most j clip norms, which is j / sigma standard deviations of the noise.
    """
    if sigma == 0:
        return 1.0
    limit, total = largest_normal(generator), 0.0
    for j in range(1, k + 1):
        present = math.comb(k, j) * q ** j * (1 - q) ** (k - j)
        total += present * 0.5 * math.erfc((limit - j / sigma) / math.sqrt(2))
    return min(1.0, steps * total)


def poisson_sample(n, q, generator=None):
    """Indices of a Poisson batch: each of n examples independently with probability q (Abadi et al. 2016, section 3.1).

    Returns a sorted LongTensor of random length, Binomial(n, q), possibly empty; an empty batch is a step like any
    other. The accountant's amplification by sampling holds for this scheme and no other: there is no shuffling mode.
    Raises ValueError for q outside (0, 1] or negative n.
    """
    if not 0 < q <= 1:
        raise ValueError(f"q is the probability that an example enters a batch and must lie in (0, 1], got {q}")
    if n < 0:
        raise ValueError(f"n, the number of examples, cannot be negative, got {n}")
    generator = SecureGenerator() if generator is None else generator
    if isinstance(generator, SecureGenerator):
        coins = generator.uniforms(n)
    else:
        coins = torch.rand(n, generator=generator, device=generator.device, dtype=torch.float64)  # float32 would round q
    return (coins < q).nonzero()[:, 0]


def privatise(sums, clip_norm, noise_multiplier, expected_batch_size, generator):
    """Clipped sums -> noisy mean gradients, (sum + N(0, sigma^2 C^2 I)) / B, tensor by tensor (new tensors).

    Every coordinate gets noise, touched by the batch or not: which ones were touched is private as well. B is the
    expected batch size; dividing by the actual one would reveal it and change the sensitivity.
    """
    std = noise_multiplier * clip_norm
    noisy = []
    for s in sums:
        if isinstance(generator, SecureGenerator):
            noise = generator.normals(s.shape, s.device if s.device.type == "cuda" else "cpu").to(s.device)
        else:
            noise = torch.randn(s.shape, dtype=torch.float64, device=s.device, generator=generator)
        # added in float64 and rounded once: float32 noise has no tail beyond 5.77 standard deviations
        noisy.append((s.double() + std * noise).to(s.dtype) / expected_batch_size)
    return noisy


# --------------------------------------------------------------------------------------------------------- clipping


def clip_factors(squared, losses, clip_norm, clipping):
    """Squared norms (L, N) of the layers' per-example gradients -> factors (L, N) on those gradients, finite (N,) bool.

    flat       min(1, C/|g|), |g| over all layers. Sensitivity C: no clipped gradient is longer than C (Abadi et al. 2016).
    automatic  C/(|g| + 0.01). Sensitivity C: the length C |g|/(|g| + 0.01) is below C. Every example counts about
               equally and C merges into the learning rate; use C = 1 (Bu et al. 2022).
    per-layer  min(1, (C/sqrt(L))/|g_l|) for each of the L layers. Sensitivity C: squared lengths add, L * C^2/L = C^2.

    A non-finite loss or norm gives the factor 0; the tensors need masking as well, since 0 * inf is NaN. A factor too
    small for float32's full precision becomes 0 as well: rounded, it might let through more than C.
    """
    total = squared.sum(0)  # (N,)
    finite = total.isfinite() & losses.isfinite()
    if clipping == "per-layer":
        factors = (clip_norm / len(squared) ** 0.5 / squared.sqrt()).clamp(max=1)  # norm 0: C/0 = inf, clamped to 1
    elif clipping == "automatic":
        factors = (clip_norm / (total.sqrt() + GAMMA)).expand_as(squared)
    else:
        factors = (clip_norm / total.sqrt()).clamp(max=1).expand_as(squared)
    return torch.where(finite & (factors > torch.finfo(torch.float32).tiny), factors, 0.0), finite


def squared_norm(a):
    """(N, ...) -> (N,) float64; only the last dimension is summed in the tensor's own precision."""
    return torch.linalg.vector_norm(a.reshape(len(a), -1, a.shape[-1]), dim=-1).double().square().sum(-1)


def weighted_sum(a, factor, finite):
    """sum_n factor[n] * a[n], (N, ...) -> (...); non-finite examples are left out."""
    a = a if finite is None else masked(a, finite)
    return (factor.to(a.dtype) @ a.flatten(1)).view(a.shape[1:])


def masked(a, finite):
    """Zero the rows of non-finite examples, (n*K, ...) with finite (n,); token numbers pass."""
    keep = finite.repeat_interleave(len(a) // len(finite)).view(-1, *[1] * (a.dim() - 1))
    return torch.where(keep, a, 0.0) if a.is_floating_point() else a


@contextmanager
def exact(device):
    """No graph, no autocast, no TF32: norms and sums in float32 (or float64), also inside a mixed-precision region."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


# ------------------------------------------------------------------ method 1: the definition; method 2: torch.func


def loop(model, layers, loss_fn, batch, clip):
    """One backward pass per example. Slow and obvious: what the other two methods are tested against."""
    params = [p for layer in layers for p in layer.params.values()]
    sums = zeros(params)
    for i in range(rows(batch)):
        losses = checked(loss_fn(model, *(b if b is None else b[i:i + 1] for b in batch)), 1)
        grads = torch.autograd.grad(losses.sum(), params, allow_unused=True)
        grads = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, params, strict=True)]
        add_clipped(sums, layers, [g[None] for g in grads], losses.detach(), clip)
    return sums


def vmap(model, layers, loss_fn, batch, clip):
    """torch.func: the gradient function of one example, vectorised over the micro-batch; N gradients of memory."""
    root = nn.Module()  # functional_call swaps the parameters of a module, a loss function takes the module: join them
    root.model, root.forward = model, lambda *example: loss_fn(root.model, *example)
    params = {f"model.{layer.name}.{k}".replace("..", "."): p.detach() for layer in layers for k, p in layer.params.items()}

    def one_loss(params, *example):
        losses = torch.func.functional_call(root, params, tuple(b if b is None else b[None] for b in example))
        return checked(losses, 1).sum(), losses[0]

    dims = (None, *(None if b is None else 0 for b in batch))
    grads, losses = torch.func.vmap(torch.func.grad(one_loss, has_aux=True), dims)(params, *batch)
    sums = zeros(params.values())
    add_clipped(sums, layers, list(grads.values()), losses.detach(), clip)
    return sums


def add_clipped(sums, layers, grads, losses, clip):
    """sums[j] += sum_n factor_n * grads[j][n] for per-example gradients grads[j] (N, ...), in the order of the layers."""
    owner = [i for i, layer in enumerate(layers) for _ in layer.params]
    with exact(losses.device):
        squared = torch.zeros(len(layers), len(losses), dtype=torch.float64, device=losses.device)
        for i, g in zip(owner, grads, strict=True):
            squared[i] += squared_norm(g)
        factors, finite = clip(squared, losses)
        for s, i, g in zip(sums, owner, grads, strict=True):
            s += weighted_sum(g, factors[i], finite)


# --------------------------------------------------------------------- method 3: book-keeping (derivation on top)


def bookkeeping(model, layers, loss_fn, batch, clip):
    """One forward and one backward pass of the summed loss; norms as the output gradients arrive, sums at the end."""
    n, uses, kept, grams, views = rows(batch), Counter(), {}, {}, []
    params = [p for layer in layers for p in layer.params.values()]
    squared = torch.zeros(len(layers), n, dtype=torch.float64, device=params[0].device)

    def seen(i, x, out):
        """Forward hook of layer i."""
        if not torch.is_grad_enabled():
            return  # used as a constant
        if x.dim() < FEWEST_DIMS[type(layers[i].module)] or len(x) % n:
            raise ValueError(f"layer {layers[i].name!r} saw an input of shape {tuple(x.shape)} in a micro-batch of {n} "
                             f"examples; its first dimension must be a multiple of {n}, example after example")
        uses[i] += 1
        if not out.requires_grad:
            out.requires_grad_()  # the graph starts here: no trainable layer before this one
        x, version = x.detach(), x._version
        if out._is_view():  # changing a view in place would silently take the hook away
            views.append((i, out, out._version))
        out.register_hook(lambda g: received(i, x, g, version))

    def received(i, x, g, version):
        """Backward hook: the gradient of a layer's output is complete."""
        layer = layers[i]
        unchanged("input", i, x, version)
        with exact(g.device):
            if getattr(layer.module, "padding_idx", None) is not None:  # an embedding's padding row gets no gradient
                g = g.masked_fill((x == layer.module.padding_idx)[..., None], 0.0)
            if uses[i] == 1 and grams_are_cheaper(layer, x, g, n):
                squared[i], kept[i] = gram_squared_norm(layer, x, g, n, grams), (x, g, version)
            else:  # a layer used twice: the two gradients add up before the norm
                grads = per_example(layer, x, g, n)
                kept[i] = {k: v + kept[i][k] for k, v in grads.items()} if i in kept else grads

    def unchanged(what, i, tensor, version):
        if tensor._version != version:
            raise ValueError(f"the {what} of layer {layers[i].name!r} was changed in place after the layer had used it")

    with ExitStack() as undo:
        for p in params:  # or autograd would compute the sum of the unclipped gradients as well
            undo.callback(p.requires_grad_(False).requires_grad_, True)
        for i, layer in enumerate(layers):
            handle = layer.module.register_forward_hook(lambda _, args, out, i=i: seen(i, args[0], out))
            undo.callback(handle.remove)
        losses = checked(loss_fn(model, *batch), n)
        while views:
            unchanged("output", *views.pop())
        losses.sum().backward()  # one NaN makes the sum NaN, but not its gradient: that is 1 for every example

    losses, sums = losses.detach(), []
    with exact(losses.device):
        for i, grads in kept.items():
            if isinstance(grads, dict):
                squared[i] = sum(squared_norm(g) for g in grads.values())
        factors, finite = clip(squared, losses)
        for i, layer in enumerate(layers):
            found = kept.pop(i, None)  # popped: freed layer by layer
            if found is None:  # not used by this loss: zero, but it will get its noise
                sums += zeros(layer.params.values())
            elif isinstance(found, dict):
                sums += [weighted_sum(g, factors[i], finite) for g in found.values()]
            else:
                x, g, version = found
                unchanged("input", i, x, version)
                if finite is not None:
                    x, g = masked(x, finite), masked(g, finite)
                sums += weighted_product(layer, x, g, factors[i]).values()
    return sums


def joined(parts):
    """Weight gradients of a layer's linear parts -> of the layer: the kernel's offsets are the last dimensions."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, -1)


def grams_are_cheaper(layer, x, g, n):
    """Count multiplications per example, P^2 (d + p) against P d p; the scales of norm layers are always formed."""
    m = layer.module
    if isinstance(m, (nn.GroupNorm, nn.LayerNorm)) or "weight" not in layer.params:
        return False
    if isinstance(m, nn.Embedding):
        return True
    d, p = m.weight.shape[1], m.weight.shape[0]
    p_in, p_out = x.numel() // n // d, g.numel() // n // p
    return p_in ** 2 * d + p_out ** 2 * p < p_out * m.weight.numel()


def gram_squared_norm(layer, x, g, n, grams):
    """Squared norms (n,) float64 of the per-example gradients of weight (and bias) from two Gram matrices.

    grams keeps the Gram matrix of an input for the layers that share it, such as the queries, keys and values of an
    attention; an input is known by its address, which nothing else takes while `bookkeeping` keeps the input itself.
    """
    m, g = layer.module, wide(g)
    if isinstance(m, nn.Embedding):  # one-hot inputs: the Gram matrix says which positions hold the same token
        tokens, g = x.reshape(n, -1), positions(g, n)
        gram_x = (tokens[:, :, None] == tokens[:, None, :]).to(g.dtype)
    else:
        shape, size_out, key = x.shape, g.shape[2:], (type(m), x.data_ptr(), x.dtype, x.shape, x.stride())
        g = positions(channels_last(layer, g), n)
        if key not in grams:
            x = positions(channels_last(layer, wide(x)), n)
            grams[key] = x @ x.mT  # (n, P, P)
        gram_x = grams[key]
        if isinstance(m, nn.Conv2d):
            gram_x = patches_gram(m, gram_x.view(n, *2 * (shape[0] // n, *shape[2:])), size_out)
        if "bias" in layer.params:
            gram_x = gram_x + 1  # the further input that is always 1
    products, limits, most = g @ g.mT, torch.finfo(g.dtype), max(m.weight[0].numel(), len(m.weight))  # (n, P, P)
    x_squared, g_squared = (a.diagonal(dim1=1, dim2=2).double() for a in (gram_x, products))  # (n, P): |x_p|^2, |g_p|^2
    lengths = (x_squared * g_squared).sqrt().sum(-1)  # sum_p |x_p||g_p|
    lost = most * limits.tiny  # see "Underflow" above
    longest = ((x_squared + lost) * (g_squared + lost)).sqrt().sum(-1)
    bound = 8 * max(most / 256, 1) * limits.eps * lengths.square()  # see "Rounding" above
    bound += longest.square() - lengths.square()
    return products.mul_(gram_x).sum((1, 2), dtype=torch.float64).clamp(min=0) + bound


def patches_gram(conv, gram, size_out):
    """Gram matrix of a convolution's pixels (n, K, H, W, K, H, W) -> of its patches (n, P, P), P = K H' W'.

    The inner product of two patches is the sum over the kernel's offsets of the inner products of their pixels: the
    patches, nine times the size of the input, need not exist. First the offsets in height are summed, then in width.
    """
    rows, columns = taps(conv, gram.shape[2:4], size_out)
    (n, k, _, w), (h_out, w_out) = gram.shape[:4], size_out
    high = gram.new_zeros(n, k, h_out, w, k, h_out, w)
    for o, i in rows:
        high[:, :, o, :, :, o] += gram[:, :, i, :, :, i]
    full = gram.new_zeros(n, k, h_out, w_out, k, h_out, w_out)
    for o, i in columns:
        full[:, :, :, o, :, :, o] += high[:, :, :, i, :, :, i]
    return full.view(n, k * h_out * w_out, -1)


def per_example(layer, x, g, n):
    """Per-example gradients {weight: (n, *weight.shape), bias: (n, p)} of one use of a layer, whichever are trained."""
    m, x, g, weight = layer.module, wide(x), wide(g), None
    if isinstance(m, nn.LayerNorm):
        scaled = g * F.layer_norm(x, m.normalized_shape, eps=m.eps)
        weight, bias = (a.reshape(n, -1, *m.normalized_shape).sum(1) for a in (scaled, g))
    elif isinstance(m, nn.GroupNorm):
        scaled = g * F.group_norm(x, m.num_groups, eps=m.eps)
        weight, bias = (a.reshape(n, -1, m.num_channels, a[0, 0].numel()).sum((1, 3)) for a in (scaled, g))
    elif isinstance(m, nn.Embedding):
        one_hot = F.one_hot(x.reshape(n, -1), m.num_embeddings).to(g.dtype)  # (n, P, V)
        weight, bias = one_hot.mT @ positions(g, n), None
    else:
        if "weight" in layer.params:
            weight = joined([b.mT @ a for a, b in linear_parts(layer, x, g, n)])  # (n, p, d[, taps])
        bias = positions(channels_last(layer, g), n).sum(1)
    return {k: (weight if k == "weight" else bias).reshape(n, *p.shape) for k, p in layer.params.items()}


def weighted_product(layer, x, g, factor):
    """Clipped sum {weight, bias} of a layer from inputs x, output gradients g and one factor (n,) per example."""
    m, x, g, n = layer.module, wide(x), wide(g), len(factor)
    factor = factor.to(g.dtype)
    if isinstance(m, nn.Embedding):
        g = positions(g, n) * factor[:, None, None]
        return {"weight": g.new_zeros(m.weight.shape).index_add_(0, x.flatten(), g.flatten(0, 1))}
    bias = {"bias": factor @ positions(channels_last(layer, g), n).sum(1)} if "bias" in layer.params else {}
    if x.numel() < g.numel():  # the factor belongs to the product; the smaller of the two carries it
        x = scaled(x, factor)
    else:
        g = scaled(g, factor)
    parts = [b.flatten(0, 1).mT @ a.flatten(0, 1) for a, b in linear_parts(layer, x, g, n)]  # (p, n P) @ (n P, d)
    return {"weight": joined(parts).view(m.weight.shape), **bias}


def scaled(a, factor):
    """Multiply the rows a (n*K, ...) by one factor (n,) per example."""
    return (a.unflatten(0, (len(factor), -1)) * factor.view(-1, *[1] * a.dim())).flatten(0, 1)


def wide(a):
    """bfloat16 (autocast) -> float32; float32, float64 and token numbers as they are."""
    return a.float() if a.dtype in (torch.bfloat16, torch.float16) else a


def channels_last(layer, a):
    """Images (n*K, c, H, W) of a convolution -> (n*K, H, W, c); rows of a Linear layer (n*K, ..., c) as they are."""
    return a.movedim(1, -1) if isinstance(layer.module, nn.Conv2d) else a


def positions(a, n):
    """(n*K, ..., c) -> (n, P, c): everything between the example and the channel is a position."""
    return a.reshape(n, -1, a.shape[-1])


def taps(conv, size_in, size_out):
    """For each offset of a kernel in height, and in width: [(slice of outputs, slice of the inputs they meet), ...].

    A 3x3 convolution is nine linear layers, one per offset, between images shifted against each other. The slices leave
    out what meets the zero padding: on a 2x2 image more than half.
    """
    axes = []
    for k, s, p, d, n_in, n_out in zip(conv.kernel_size, conv.stride, conv.padding, conv.dilation, size_in, size_out,
                                       strict=True):
        axes.append([])
        for shift in range(-p, k * d - p, d):  # output o meets input o*s + shift, if 0 <= o*s + shift < n_in
            first = max(0, -(shift // s))
            end = max(first, min(n_out, (n_in - 1 - shift) // s + 1))
            axes[-1].append((slice(first, end), slice(first * s + shift, end * s + shift, s)))
    return axes


def linear_parts(layer, x, g, n):
    """Inputs (n, P, d) and output gradients (n, P, p) of a Linear layer, or of each linear layer of a convolution."""
    x, g = channels_last(layer, x), channels_last(layer, g)
    if isinstance(layer.module, nn.Linear):
        return [(positions(x, n), positions(g, n))]
    rows, columns = taps(layer.module, x.shape[1:3], g.shape[1:3])
    return [(positions(x[:, i, j], n), positions(g[:, o, q], n)) for o, i in rows for q, j in columns]


# ---------------------------------------------------------------------------------------------- what may be trained


class Layer(NamedTuple):
    """A module with trainable parameters of its own: {"weight" and/or "bias": Parameter}."""

    name: str
    module: nn.Module
    params: dict


# Layers with a rule for the per-example gradient, and how many dimensions a batch of their inputs has at least.
FEWEST_DIMS = {nn.Linear: 2, nn.Conv2d: 4, nn.GroupNorm: 2, nn.LayerNorm: 2, nn.Embedding: 1}


def trainable_layers(model, method="bookkeeping"):
    """The layers that DP-SGD trains. Raises ValueError, by name, for all whose per-example gradient would be wrong:

    layers that mix examples or keep statistics of them, dropout, a parameter shared by two layers, and (book-keeping
    only) layers without a rule; also if nothing is trainable.
    """
    layers, owner = [], {}
    for name, m in model.named_modules():
        title = f"layer {name!r} ({type(m).__name__})"
        if isinstance(m, nn.modules.batchnorm._BatchNorm) or getattr(m, "track_running_stats", False):
            raise ValueError(f"{title} mixes the examples of a batch or keeps statistics of them, which clipping per "
                             "example does not bound; use GroupNorm or LayerNorm")
        rate = m.p if isinstance(m, nn.modules.dropout._DropoutNd) else getattr(m, "dropout", 0)
        if isinstance(rate, (int, float)) and rate > 0:
            raise ValueError(f"{title} has dropout {rate}; set it to 0 for the private stage")
        params = {k: p for k, p in m.named_parameters(recurse=False) if p.requires_grad}
        shared = [owner[p] for p in params.values() if owner.setdefault(p, name) != name]
        if shared:
            raise ValueError(f"{title} shares a parameter with layer {shared[0]!r}; untie or freeze it")
        if params:
            layers.append(Layer(name, m, params))
            if method == "bookkeeping" and (reason := without_rule(m, params)):
                raise ValueError(f"{title}: {reason}; freeze it or choose method='vmap'")
    if not layers:
        raise ValueError("the model has no trainable parameter; call unet.select_trainable first")
    return layers


def without_rule(m, params):
    """Why book-keeping cannot train this layer, or "". Subclasses may compute anything: the type must match exactly."""
    if type(m) not in FEWEST_DIMS or not set(params) <= {"weight", "bias"}:
        return f"book-keeping has no rule for its trainable parameters ({', '.join(params)})"
    if isinstance(m, nn.Conv2d) and (m.groups > 1 or m.padding_mode != "zeros" or isinstance(m.padding, str)):
        return "only convolutions without groups, with zero padding given in numbers, have a rule"
    if isinstance(m, nn.Embedding) and (m.max_norm is not None or m.scale_grad_by_freq or m.sparse):
        return "max_norm and scale_grad_by_freq mix examples, sparse gradients have no rule"
    return ""


def rows(batch):
    """Number of examples N of a micro-batch, on which all its items (tensors or None) must agree."""
    sizes = {len(b) for b in batch if b is not None}
    if len(sizes) != 1:
        raise ValueError(f"every item of a micro-batch needs one row per example or is None; found {sorted(sizes)} rows")
    return sizes.pop()


def checked(losses, n):
    """The losses, if there is one per example and it depends on trainable parameters."""
    if not isinstance(losses, torch.Tensor) or losses.shape != (n,):
        raise ValueError(f"loss_fn must return one loss per example, shape ({n},), not "
                         f"{tuple(getattr(losses, 'shape', ()))}: average over pixels and draws, never over examples")
    if not losses.requires_grad:
        raise ValueError("the losses do not depend on any trainable parameter; is loss_fn under no_grad?")
    return losses


def zeros(params):
    """Where sums are gathered: float32, or float64 for float64 parameters."""
    return [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32), requires_grad=False) for p in params]


# ------------------------------------------------------------------------------------------------------- the engine


class DPSGD:
    """DP-SGD on the parameters of `model` that require grad: accumulate micro-batches, then step once.

    clip_norm C in [1e-10, 1e10] (None: 1, for "automatic" only) · noise_multiplier sigma >= 0 in units of C (0 is not private) ·
    expected_batch_size B = q * n · method "bookkeeping", "loop" or "vmap" (same result) · clipping "flat", "automatic"
    or "per-layer" (`clip_factors`) · generator of the noise; None: `SecureGenerator` (a torch.Generator makes the noise
    predictable, one with a known seed makes it void). Raises ValueError for bad arguments and for the layers that
    `trainable_layers` refuses.

    Between accumulate and step, `sums` holds the clipped sum, one tensor per trainable parameter in the order of
    `names`: the moment to write the ledger, or to reduce over processes. It is not private yet. Neither is `last`,
    figures of the last step: examples, nonfinite, loss (mean), clipped_fraction, norm_quantiles (0, 1/4, 1/2, 3/4, 1).

    Autocast is the caller's, around or inside loss_fn: bfloat16 for forward and backward, no loss scaling. Norms, sums
    and noise are float32 whatever the region.
    """

    def __init__(self, model, clip_norm, noise_multiplier, expected_batch_size, method="bookkeeping", clipping="flat",
                 generator=None):
        if clip_norm is None and clipping == "automatic":
            clip_norm = 1.0
        if clip_norm is None or not SMALLEST_CLIP_NORM <= clip_norm <= LARGEST_CLIP_NORM:
            raise ValueError(f"clip_norm C must lie between {SMALLEST_CLIP_NORM:g} and {LARGEST_CLIP_NORM:g}, got {clip_norm}")
        if not 0 <= noise_multiplier < float("inf"):
            raise ValueError(f"noise_multiplier sigma must be 0 (not private) or positive, got {noise_multiplier}")
        if not 0 < expected_batch_size < float("inf"):
            raise ValueError(f"expected_batch_size q * n must be positive, got {expected_batch_size}")
        for name, value, choices in (("method", method, METHODS), ("clipping", clipping, CLIPPING)):
            if value not in choices:
                raise ValueError(f"unknown {name} {value!r}; choose one of {', '.join(choices)}")
        self.model, self.method, self.clipping = model, method, clipping
        self.clip_norm, self.noise_multiplier = clip_norm, noise_multiplier
        self.expected_batch_size = expected_batch_size
        self.layers = trainable_layers(model, method)
        self.names = [f"{layer.name}.{k}".lstrip(".") for layer in self.layers for k in layer.params]
        self.parameters = [p for layer in self.layers for p in layer.params.values()]
        self.generator = SecureGenerator() if generator is None else generator
        self.sums, self.last, self._figures = zeros(self.parameters), {}, []

    def accumulate(self, loss_fn, *batch):
        """Add the clipped per-example gradients of one micro-batch to `sums`: all of them, or none if anything raises.

        loss_fn(model, *batch) -> (N,) losses, deterministic, example n's loss depending on rows n of the batch only.
        Batch items have N rows (N = 0 is fine) or are None. A non-finite example contributes exactly zero. Raises
        ValueError for losses of another shape, rows that do not match, or a changed set of trainable parameters.
        """
        if {p for p in self.model.parameters() if p.requires_grad} != set(self.parameters):
            raise ValueError("the set of trainable parameters changed; make a new DPSGD after select_trainable")
        if rows(batch) == 0:
            return
        figures = []

        def clip(squared, losses):
            factors, finite = clip_factors(squared, losses, self.clip_norm, self.clipping)
            clipped = (factors < 1).any(0)
            figures.append(torch.stack([squared.sum(0).sqrt(), *(a.double() for a in (losses, clipped, finite))]))
            return factors, None if finite.all() else finite

        with torch.enable_grad():
            sums = METHODS[self.method](self.model, self.layers, loss_fn, batch, clip)
        torch._foreach_add_(self.sums, sums)  # the only lines that change anything: what could fail is behind us
        self._figures += figures

    def step(self, optimizer):
        """Noise once, divide by B, optimizer.step(), clear. Right also after no accumulate at all: a step of noise."""
        grads = privatise(self.sums, self.clip_norm, self.noise_multiplier, self.expected_batch_size, self.generator)
        self.last = summary(self._figures)
        self.sums, self._figures = zeros(self.parameters), []  # before anything else can fail: these sums are spent
        for p, g in zip(self.parameters, grads, strict=True):
            p.grad = g.to(p.dtype)
        optimizer.step()
        for p in self.parameters:
            p.grad = None


def check_against_loop(engine, loss_fn, *batch):
    """Raise ValueError unless the engine's method finds the norms and the sum of the loop, both without clipping, on this batch.

    For RANDOM data, once before the first step. Hooks see what layers do, not what a model does besides: F.linear on a
    trained weight, a layer that sees positions before examples, another hook that changes an output. All that shows here.
    """
    def found(method):
        norms = []

        def keep(squared, losses):
            norms.append(squared.sum(0).sqrt())
            return torch.ones_like(squared), None

        sums = method(engine.model, engine.layers, loss_fn, batch, keep)
        return torch.cat([*norms, *(s.flatten().double() for s in sums)]), torch.cat(norms).norm()

    with torch.enable_grad():
        (expected, size), (got, _) = found(loop), found(METHODS[engine.method])
    if (got - expected).norm() > 0.02 * size + 1e-12:  # (gradients of zero: see "Underflow")
        raise ValueError(f"{engine.method} and the loop disagree about the gradients of random examples: the model uses a "
                         "trained layer in a way that hooks do not see; choose method 'loop' or 'vmap'")


def summary(figures):
    """Rows (4, N) of norms, losses, clipped, finite -> the figures of `DPSGD.last` (one copy to the host per step)."""
    figures = torch.cat(figures, 1).cpu() if figures else torch.zeros(4, 0, dtype=torch.float64)
    norms, losses, clipped, _ = good = figures[:, figures[3] > 0]
    count, quantiles = good.shape[1], torch.linspace(0, 1, 5, dtype=torch.float64)
    return {"examples": figures.shape[1], "nonfinite": figures.shape[1] - count, "loss": float(losses.sum()) / max(count, 1),
            "clipped_fraction": float(clipped.sum()) / max(count, 1),
            "norm_quantiles": norms.quantile(quantiles).tolist() if count else [0.0] * 5}


METHODS = {"loop": loop, "vmap": vmap, "bookkeeping": bookkeeping}

# ------------------------------------------------------------------------------------------------- several processes


def collective(operation, tensors):
    """operation(flat tensor), one of torch.distributed's, on all tensors laid end to end; the result is copied into them.

    Raises ConnectionError, one line, when another process is dead or silent for longer than the group's timeout.
    """
    flat = torch.cat([a.detach().flatten() for a in tensors])
    try:
        operation(flat)
    except RuntimeError:
        raise ConnectionError("another process of this run has died or hangs, so the step cannot be finished; all stop here, "
                              "the ledger is whole, go on with --resume") from None
    with torch.no_grad():
        for a, part in zip(tensors, flat.split([a.numel() for a in tensors]), strict=True):
            a.copy_(part.view_as(a))


def reduce_sums(engine):
    """Called by every process between accumulate and step: the sums of all ranks -> their total on rank 0, zeros elsewhere.

    Each rank samples a shard of its own with the same q, so an example is on one rank and moves the total by at most C,
    as in one process. Rank 0 alone then writes the ledger row, steps (all the noise, once) and hands out the parameters
    by `broadcast`. A share of the noise on each rank would be smaller than it looks: a rank knows, and can subtract, its
    own. Not DistributedDataParallel, which waits for as many backward passes on every rank: numbers of micro-batches differ.
    """
    figures = torch.cat(engine._figures, 1).cpu() if engine._figures else torch.zeros(4, 0, dtype=torch.float64)
    gathered = [None] * dist.get_world_size() if dist.get_rank() == 0 else None
    collective(partial(dist.reduce, dst=0), engine.sums)
    collective(lambda _: dist.gather_object(figures, gathered), [figures])
    if gathered is None:
        engine.last, engine.sums, gathered = summary([figures]), zeros(engine.parameters), []
    engine._figures = gathered


def broadcast(tensors):
    """Rank 0's values, into everybody's tensors."""
    collective(partial(dist.broadcast, src=0), tensors)
