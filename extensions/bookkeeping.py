"""Book-keeping: all per-example gradient norms and the clipped sum from ONE forward and ONE backward pass.

The fastest of the three methods for `dp_sgd.DPSGD(..., method=bookkeeping)`. Its result is that of
`dp_sgd.loop` up to rounding: tests/test_dp_sgd.py compares the clipped sums of every kind of layer with a
loop of its own, in float64, to 1e-10. Not in the paper. First read dp_sgd.py.

The derivation
--------------
A linear layer maps its inputs x_s to W x_s + b, at the positions s = 1..P. Backpropagating the *summed* loss
of a micro-batch gives the gradient g_s of each output. Examples do not mix, so the g_s of one example depend
on its own loss only. Let X (P, d) be its inputs and G (P, p) its output gradients, one row per position. Then
the gradient of its loss is

    grad_W = sum_s g_s x_s^T = G^T X    (p, d)

The bias is the weight of a further input that is always 1.

(1) The norm does not need this matrix:

        |G^T X|^2 = tr(X X^T G G^T) = sum over s, s' of (X X^T)[s, s'] (G G^T)[s, s']

    The two Gram matrices cost P^2 (d + p) multiplications, grad_W itself P d p. For P = 1 the formula is
    |x|^2 |g|^2 (Goodfellow 2015). For sequences it is "ghost clipping" (Li et al. 2022), for convolutions the
    same on unfolded patches (Bu, Mao, Xu 2022).

(2) The clipped sum needs no second backward pass. With one factor c_n per example it is a single matrix
    product.  c G (N P, p) stacks the rows of all G_n, each times its c_n, and X (N P, d) those of all X_n:

        sum_n c_n G_n^T X_n = (c G)^T X

    This is "book-keeping" (Bu et al. 2023). It keeps X and G of the trained layers.

(3) With many positions and few channels the matrices grad_W are the cheaper way. They are formed once,
    (N, p, d), give the norms, and are kept in place of X and G. The clipped sum is sum_n c_n grad_n.

Autograd forms no gradient of a weight: weights are frozen during both passes. The graph starts at the output
of the first trainable layer. An embedding is a linear layer on one-hot inputs. A 3x3 convolution is nine
linear layers on shifted images. The scales of norm layers are so few that their gradients are formed per
example.

Rounding
--------
Where the contributions of positions cancel, a small norm is the difference of large numbers. Rounding may
make it too small, and that breaks the sensitivity. Let u be the format's machine epsilon (1.2e-7 in float32).
The error is u S^2 times a factor that grows with the length of the rows. S = sum_s |x_s| |g_s| follows from
the diagonals of the Gram matrices. So a bound is *added* to the squared norm: 8 u S^2 max(1, E / 256), E
being the number of entries of x_s or of g_s, whichever has more. The factor 8 E / 256 is 40 where x_s has
1,280 entries and 160 where it has 5,120; up to 20 and 79 were measured there. In all that was measured,
rounding then only clips harder (tests/test_dp_sgd.py,
`test_rounding_in_wide_layers_never_exceeds_the_clip_norm`). Case (3) needs no such bound: norm and clipped
sum are taken from the same rounded gradients.

Underflow
---------
Squares of entries below 1e-19 lose digits or vanish in float32, and a tiny input may meet a huge gradient. An
entry of a Gram matrix may have lost at most (number of products in its sum) * 1e-38. So the squared norm is
raised by the amount by which S^2 would grow if every |x_s|^2 and |g_s|^2 grew by that much. Overflow makes
the norm infinite or NaN. Such an example contributes zero, as all non-finite ones do.
"""
from collections import Counter
from contextlib import ExitStack

import torch
import torch.nn.functional as F
from torch import nn

from dp_sgd import (
    AT_ONCE,
    checked,
    contributing,
    full_precision,
    masked,
    number_of_examples,
    squared_norm,
    sum_of_parts,
    weighted_sum,
    zeros,
)

# Layers with a rule for the per-example gradient, and the fewest dimensions that a batch of inputs has.
FEWEST_DIMS = {nn.Linear: 2, nn.Conv2d: 4, nn.GroupNorm: 2, nn.LayerNorm: 2, nn.Embedding: 1}


def bookkeeping(model, layers, loss_fn, batch):
    """norms (L, N), losses (N,), and a function from factors (L, N) to the weighted sum, as `dp_sgd.loop`.

    One forward and one backward pass. As a layer's output gradients G arrive, its norms are computed and X
    and G kept, or its per-example gradients are formed and kept. n is N of the top. A layer's input has n K
    rows, K for each example. Call the returned function once: it frees what it has used.
    """
    n, uses, grams, views = number_of_examples(batch), Counter(), {}, []
    inputs = {}  # of layer i: (x, g, version of x)
    grads = {}  # of other layers: {name: (n, *shape of the parameter)}
    params = [p for layer in layers for p in layer.params.values()]
    squared = torch.zeros(len(layers), n, dtype=torch.float64, device=params[0].device)

    def forward_hook(i, x, out):
        """Layer i maps x to out."""
        if not torch.is_grad_enabled():
            return  # under no_grad: this use of the layer has no gradient
        if x.dim() < FEWEST_DIMS[type(layers[i].module)] or len(x) % n:
            raise ValueError(f"layer {layers[i].name!r} saw an input of shape {tuple(x.shape)} in a "
                             f"micro-batch of {n} examples; it needs a batch whose first dimension is a "
                             f"multiple of {n}, the rows of one example next to each other")
        uses[i] += 1
        if not out.requires_grad:
            out.requires_grad_()  # the graph starts here: no trainable layer before this one
        x, version = x.detach(), x._version  # torch's count of changes in place, which x and x.detach() share
        if out._is_view():  # changing a view in place would silently take the hook away
            views.append((i, out, out._version))
        out.register_hook(lambda g: gradient_hook(i, x, g, version))

    def gradient_hook(i, x, g, version):
        """The gradient g of layer i's output is complete."""
        layer = layers[i]
        unchanged("input", i, x, version)
        with full_precision(g.device):
            # an embedding's padding row gets no gradient
            if getattr(layer.module, "padding_idx", None) is not None:
                g = g.masked_fill((x == layer.module.padding_idx)[..., None], 0.0)
            if uses[i] == 1 and grams_are_cheaper(layer, x, g, n):
                squared[i], inputs[i] = gram_squared_norm(layer, x, g, n, grams), (x, g, version)
            else:  # gradients are formed; those of a layer used twice add up before the norm
                formed = per_example(layer, x, g, n)
                grads[i] = {k: v + grads[i][k] for k, v in formed.items()} if i in grads else formed

    def unchanged(what, i, tensor, version):
        if tensor._version != version:
            raise ValueError(f"the {what} of layer {layers[i].name!r} was changed in place after the layer "
                             "had run")

    with ExitStack() as undo:
        for p in params:  # frozen until `undo`; else autograd would compute the unclipped sum as well
            p.requires_grad_(False)
            undo.callback(p.requires_grad_, True)
        for i, layer in enumerate(layers):
            handle = layer.module.register_forward_hook(
                lambda _, args, out, i=i: forward_hook(i, args[0], out))
            undo.callback(handle.remove)
        losses = checked(loss_fn(model, *batch), n)
        while views:
            unchanged("output", *views.pop())
        # one NaN makes the sum NaN, but not its gradient: that is 1 for every example
        losses.sum().backward()

    losses = losses.detach()
    with full_precision(losses.device):
        for i, formed in grads.items():
            squared[i] = sum(squared_norm(g) for g in formed.values())

    def weighted(factors):
        keep, sums = contributing(factors), []
        for i, layer in enumerate(layers):
            if i in grads:  # popped: freed layer by layer
                sums += [weighted_sum(g, factors[i], keep) for g in grads.pop(i).values()]
            elif i in inputs:
                x, g, version = inputs.pop(i)
                unchanged("input", i, x, version)
                if keep is not None:
                    x, g = masked(x, keep), masked(g, keep)
                sums += weighted_product(layer, x, g, factors[i]).values()
            else:  # not used by this loss: zero, but it will get its noise
                sums += zeros(layer.params.values())
        return sums

    return squared.sqrt(), losses, weighted


def joined(parts):
    """A layer's weight gradient from those of its `linear_parts`: the kernel's offsets as last dimension."""
    return parts[0] if len(parts) == 1 else torch.stack(parts, -1)


def grams_are_cheaper(layer, x, g, n):
    """Compares multiplications per example: P_in^2 d + P_out^2 p, and P_out times the weights.

    A convolution's inputs count as pixels with d channels: `patches_gram` only adds up their products. True
    for embeddings, False for norm layers and where only a bias is trained.
    """
    m = layer.module
    if isinstance(m, (nn.GroupNorm, nn.LayerNorm)) or "weight" not in layer.params:
        return False
    if isinstance(m, nn.Embedding):
        return True
    d, p = m.weight.shape[1], m.weight.shape[0]
    inputs, outputs = x.numel() // n // d, g.numel() // n // p  # positions of one example
    return inputs ** 2 * d + outputs ** 2 * p < outputs * m.weight.numel()


def gram_squared_norm(layer, x, g, n, grams):
    """Squared norms (n,) float64 of the per-example gradients of weight (and bias) from two Gram matrices.

    grams keeps the Gram matrix of an input for the layers that share it, such as the queries, keys and values
    of an attention. Its key has the address of the input, which no other tensor gets while `bookkeeping`
    keeps the input.
    """
    m, g = layer.module, wide(g)
    # one-hot inputs: the Gram matrix says which positions hold the same token
    if isinstance(m, nn.Embedding):
        tokens, g = x.reshape(n, -1), positions(g, n)
        gram_x = (tokens[:, :, None] == tokens[:, None, :]).to(g.dtype)
    else:
        shape, size_out, key = x.shape, g.shape[2:], (type(m), x.data_ptr(), x.dtype, x.shape, x.stride())
        g = positions(channels_last(layer, g), n)
        if key not in grams:
            x = positions(channels_last(layer, wide(x)), n)
            grams[key] = x @ x.mT  # (n, P, P); for a convolution P = K H W, its pixels
        gram_x = grams[key]
        if isinstance(m, nn.Conv2d):
            k_h_w = (shape[0] // n, *shape[2:])
            gram_x = patches_gram(m, gram_x.view(n, *k_h_w, *k_h_w), size_out)
        if "bias" in layer.params:
            gram_x = gram_x + 1  # the further input that is always 1
    gram_g, limits = g @ g.mT, torch.finfo(g.dtype)  # (n, P, P)
    entries = max(m.weight[0].numel(), len(m.weight))  # of x_s or of g_s, whichever has more
    # (n, P): |x_s|^2, |g_s|^2
    x_squared, g_squared = (a.diagonal(dim1=1, dim2=2).double() for a in (gram_x, gram_g))
    S = (x_squared * g_squared).sqrt().sum(-1)  # sum_s |x_s| |g_s|
    lost = entries * limits.tiny  # see "Underflow" above
    S_raised = ((x_squared + lost) * (g_squared + lost)).sqrt().sum(-1)
    bound = 8 * max(entries / 256, 1) * limits.eps * S.square()  # see "Rounding" above
    bound += S_raised.square() - S.square()
    # These products may vanish too, but cost a norm less than 1e-19 P, far below any clip norm.
    squared = gram_g.mul_(gram_x).sum((1, 2), dtype=torch.float64)
    # Entries overflow to +inf or -inf; a norm clamped from -inf to 0 would let the example through unclipped.
    return torch.where(squared.isfinite(), squared.clamp(min=0), torch.inf) + bound


def patches_gram(conv, gram, size_out):
    """Gram matrix of a convolution's pixels (n, K, H, W, K, H, W) -> of its patches (n, P, P), P = K H' W'.

    The inner product of two patches is a sum of inner products of pixels, over the kernel's offsets. So the
    patches need not exist (for a 3x3 kernel they are nine times the size of the input). First the offsets in
    height are summed, then in width.
    """
    heights, widths = taps(conv, gram.shape[2:4], size_out)
    (n, k, _, w), (h_out, w_out) = gram.shape[:4], size_out
    high = gram.new_zeros(n, k, h_out, w, k, h_out, w)
    for o, i in heights:  # a slice of outputs, and of the inputs that they meet
        high[:, :, o, :, :, o] += gram[:, :, i, :, :, i]
    full = gram.new_zeros(n, k, h_out, w_out, k, h_out, w_out)
    for o, i in widths:
        full[:, :, :, o, :, :, o] += high[:, :, :, i, :, :, i]
    return full.view(n, k * h_out * w_out, -1)


def per_example(layer, x, g, n):
    """Per-example gradients of one use of a layer: {name: (n, *its shape)} of what is trained."""
    m, x, g, weight = layer.module, wide(x), wide(g), None
    if isinstance(m, nn.LayerNorm):
        product = g * F.layer_norm(x, m.normalized_shape, eps=m.eps)
        weight, bias = (a.reshape(n, -1, *m.normalized_shape).sum(1) for a in (product, g))
    elif isinstance(m, nn.GroupNorm):  # rows and pixels are summed: (n, K, C, pixels) -> (n, C)
        product = g * F.group_norm(x, m.num_groups, eps=m.eps)
        weight, bias = (a.reshape(n, -1, m.num_channels, a[0, 0].numel()).sum((1, 3)) for a in (product, g))
    elif isinstance(m, nn.Embedding):
        one_hot = F.one_hot(x.reshape(n, -1), m.num_embeddings).to(g.dtype)  # (n, P, V)
        weight, bias = one_hot.mT @ positions(g, n), None
    else:
        if "weight" in layer.params:
            weight = joined([b.mT @ a for a, b in linear_parts(layer, x, g, n)])  # (n, p, d[, taps])
        bias = positions(channels_last(layer, g), n).sum(1)
    return {k: (weight if k == "weight" else bias).reshape(n, *p.shape) for k, p in layer.params.items()}


def weighted_product(layer, x, g, factor):
    """Clipped sum {weight, bias} of a layer from inputs x, output gradients g, and factors (n,)."""
    m, x, g, n = layer.module, wide(x), wide(g), len(factor)
    if n > AT_ONCE:
        k = len(x) // n * AT_ONCE  # rows of so many examples
        parts = [weighted_product(layer, *part)
                 for part in zip(x.split(k), g.split(k), factor.split(AT_ONCE), strict=True)]
        return {name: sum_of_parts(part[name] for part in parts) for name in parts[0]}
    factor = factor.to(g.dtype)
    if isinstance(m, nn.Embedding):
        g = positions(g, n) * factor[:, None, None]
        return {"weight": g.new_zeros(m.weight.shape).index_add_(0, x.flatten(), g.flatten(0, 1))}
    bias = {"bias": factor @ positions(channels_last(layer, g), n).sum(1)} if "bias" in layer.params else {}
    if x.numel() < g.numel():  # c_n may scale either side of the product: the smaller one is cheaper
        x = scaled(x, factor)
    else:
        g = scaled(g, factor)
    # (p, n P) @ (n P, d)
    parts = [b.flatten(0, 1).mT @ a.flatten(0, 1) for a, b in linear_parts(layer, x, g, n)]
    return {"weight": joined(parts).view(m.weight.shape), **bias}


def scaled(a, factor):
    """Multiply the rows a (n*K, ...) by one factor (n,) per example."""
    return (a.unflatten(0, (len(factor), -1)) * factor.view(-1, *[1] * a.dim())).flatten(0, 1)


def wide(a):
    """bfloat16 and float16 (autocast) -> float32; float32, float64 and token numbers as they are."""
    return a.float() if a.dtype in (torch.bfloat16, torch.float16) else a


def channels_last(layer, a):
    """Images of a convolution (n*K, c, H, W) -> (n*K, H, W, c). Rows of a Linear layer stay (n*K, ..., c)."""
    return a.movedim(1, -1) if isinstance(layer.module, nn.Conv2d) else a


def positions(a, n):
    """(n*K, ..., c) -> (n, P, c): everything between the example and the channel is a position."""
    return a.reshape(n, -1, a.shape[-1])


def taps(conv, size_in, size_out):
    """Two lists, for height and width. Per offset of the kernel: (slice of outputs, slice of their inputs).

    A 3x3 convolution is nine linear layers, one per offset, between images shifted against each other. The
    slices leave out what meets the zero padding: on a 2x2 image more than half.
    """
    axes = []
    for size, stride, pad, dilation, n_in, n_out in zip(conv.kernel_size, conv.stride, conv.padding,
                                                        conv.dilation, size_in, size_out, strict=True):
        axes.append([])
        for shift in range(-pad, size * dilation - pad, dilation):
            # Output o meets input o * stride + shift, if that is an input: 0 <= o * stride + shift < n_in.
            first = max(0, -(shift // stride))  # -(a // b) is -a / b, rounded up
            end = max(first, min(n_out, (n_in - 1 - shift) // stride + 1))
            axes[-1].append((slice(first, end), slice(first * stride + shift, end * stride + shift, stride)))
    return axes


def linear_parts(layer, x, g, n):
    """Pairs of inputs (n, P, d), output gradients (n, P, p): one for a Linear layer, else one per offset."""
    x, g = channels_last(layer, x), channels_last(layer, g)
    if isinstance(layer.module, nn.Linear):
        return [(positions(x, n), positions(g, n))]
    heights, widths = taps(layer.module, x.shape[1:3], g.shape[1:3])
    return [(positions(x[:, i, j], n), positions(g[:, o, q], n)) for o, i in heights for q, j in widths]


def refuse(layers):
    """ValueError, with the layer's name, for the first layer that book-keeping has no rule for."""
    for name, module, params in layers:
        if reason := without_rule(module, params):
            raise ValueError(f"layer {name!r} ({type(module).__name__}): {reason}; freeze it or choose "
                             "--method vmap")


bookkeeping.refuse = refuse  # asked by DPSGD before the first step


def without_rule(m, params):
    """Why book-keeping cannot train this layer, or "". No subclass passes, since it may compute anything."""
    if type(m) not in FEWEST_DIMS or not set(params) <= {"weight", "bias"}:
        return f"book-keeping has no rule for its trainable parameters ({', '.join(params)})"
    if isinstance(m, nn.Conv2d) and (m.groups > 1 or m.padding_mode != "zeros" or isinstance(m.padding, str)):
        return "only convolutions without groups, with zero padding given in numbers, have a rule"
    if isinstance(m, nn.Embedding) and (m.max_norm is not None or m.scale_grad_by_freq or m.sparse):
        return "scale_grad_by_freq can mix examples, max_norm sets weights without noise, sparse has no rule"
    return ""
