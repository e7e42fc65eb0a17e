"""What drawn images share: dice for a batch, outlines and their signed distances, cloth, framing, a canvas.

A batch of N images of S x S pixels is drawn at once. A random choice is a tensor (N,1), one value per image;
an image in the making is (N,P) with P = S * S pixels. Shapes are signed distances, negative inside (Quilez,
"2D distance functions"): the union of two is their minimum, an outline is where the distance is 0. A pixel is
covered fully from half a pixel inside on, not at all from half a pixel outside on. Coordinates belong to the
thing drawn, x to the right and y down; `frame` lays them over the pixels.
"""
import math

import torch
import torch.nn.functional as F

from .registry import ImageSet

FAR = 9.0  # added to the distance of a part that an image does not have
PATTERNS = "plain melange rows columns checks dots patches flowers"


def drawn_set(ask, draw, classes, first=0):
    """A set of ask.n drawings by draw(labels, generator), in random order. Class sizes differ by one at most.

    first: the drawer's label of the set's class 0.
    """
    generator = torch.Generator().manual_seed(ask.seed)
    labels = (torch.arange(ask.n) % len(classes))[torch.randperm(ask.n, generator=generator)]
    return ImageSet(draw(labels + first, generator), labels, list(classes))


class Dice:
    """Random choices for n images of size x size pixels, all from one CPU generator."""

    def __init__(self, n, generator=None, size=28):
        self.n, self.generator, self.size = n, generator, size

    def number(self):
        """Uniform in 0..1 -> (N,1)."""
        return torch.rand(self.n, 1, generator=self.generator)

    def uniform(self, low, high):
        """Uniform in low..high, which are numbers or (N,1) -> (N,1)."""
        return low + (high - low) * self.number()

    def chance(self, p):
        """1.0 with probability p (a number or (N,1)), else 0.0 -> (N,1)."""
        return (self.number() < p).float()

    def normal(self, *shape):
        """Standard normal -> (N, *shape)."""
        return torch.randn(self.n, *shape, generator=self.generator)

    def pick(self, names, weights):
        """One of the names (blanks between) per image, as the weights say -> name: (N,1) of 0 and 1."""
        weights = torch.tensor(weights, dtype=torch.float)
        chosen = torch.multinomial(weights, self.n, replacement=True, generator=self.generator)[:, None]
        return {name: (chosen == i).float() for i, name in enumerate(names.split())}

    def field(self, rows, columns):
        """A smooth random surface of about rows x columns hills, unit variance at its knots -> (N,P)."""
        knots = self.normal(1, rows, columns)
        if (rows, columns) == (self.size, self.size):
            return knots.flatten(1)
        return F.interpolate(knots, (self.size, self.size), mode="bicubic", align_corners=True).flatten(1)

    def points(self, *pairs, miss=0.005):
        """Pairs (x, y) of numbers or (N,1) -> (N,K,2); each misses its place by a deviation of `miss`."""
        flat = [torch.as_tensor(v, dtype=torch.float).expand(self.n, 1) for pair in pairs for v in pair]
        return torch.cat(flat, 1).view(self.n, -1, 2) + miss * self.normal(len(pairs), 2)


def rounded(points):
    """Corners of closed outlines (N,K,2) cut off (Chaikin) -> (N,2K,2)."""
    following = points.roll(-1, 1)
    return torch.stack([0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following], 2).flatten(1, 2)


def to_segment(x, y, start, end):
    """Squared distance (N,P) of every pixel to one segment per image, ends (N,2); and the side, (N,P).

    The sign of the side, a cross product, tells on which side of the segment a pixel lies.
    """
    (ax, ay), (ex, ey) = start.split(1, 1), (end - start).split(1, 1)
    wx, wy = x - ax, y - ay
    along = (wx * ex).addcmul_(wy, ey).div_(ex * ex + ey * ey + 1e-9).clamp_(0, 1)
    side = (wy * ex).addcmul_(wx, ey, value=-1)
    wx.addcmul_(along, ex, value=-1)
    wy.addcmul_(along, ey, value=-1)
    return wx.mul_(wx).addcmul_(wy, wy), side


def polygon(points, x, y):
    """Signed distance of every pixel to closed outlines: points (N,K,2); x, y (N,P) -> (N,P), < 0 inside."""
    nearest = torch.full_like(x, 1e9)
    inside = torch.zeros_like(x, dtype=torch.bool)  # odd number of crossings of a ray to the side
    start = points[:, -1]
    below = y >= start[:, 1:]
    for end in points.unbind(1):  # one edge at a time: the temporaries stay in the cache
        distance, side = to_segment(x, y, start, end)
        torch.minimum(nearest, distance, out=nearest)
        below_end = y >= end[:, 1:]
        inside ^= (below ^ below_end) & ((side > 0) ^ below_end)  # crosses the pixel's row, on that side
        start, below = end, below_end
    return nearest.sqrt_().mul_(1 - 2 * inside.float())


def path(points, x, y):
    """Distance of every pixel to open lines: points (N,K,2); x, y (N,P) -> (N,P); less a radius, a stroke."""
    nearest = torch.full_like(x, 1e9)
    for start, end in zip(points.unbind(1)[:-1], points.unbind(1)[1:], strict=True):
        torch.minimum(nearest, to_segment(x, y, start, end)[0], out=nearest)
    return nearest.sqrt_()


def ellipse(x, y, rx, ry):
    """About the signed distance to an ellipse around the origin with half axes rx, ry (numbers or (N,1))."""
    rx, ry = torch.as_tensor(rx), torch.as_tensor(ry)
    return (((x / rx) ** 2 + (y / ry) ** 2).sqrt_() - 1) * torch.minimum(rx, ry)


def box(x, y, rx, ry):
    """About the signed distance to a box around the origin with half sides rx, ry."""
    return torch.maximum(x.abs() - rx, y.abs() - ry)


def union(first, *others):
    """What one of them has: the union of signed distances."""
    for other in others:
        first = torch.minimum(first, other)
    return first


def intersection(first, *others):
    """The part that all have: the intersection of signed distances."""
    for other in others:
        first = torch.maximum(first, other)
    return first


def blurred(image, width=3):
    """(N,C,H,W) -> the mean over width x width pixels around each, width odd; the border goes on beyond."""
    return F.avg_pool2d(F.pad(image, (width // 2,) * 4, mode="replicate"), width, stride=1)


def checked_labels(labels, classes):
    """Labels as a tensor; ValueError unless all lie in 0..len(classes)-1."""
    labels = torch.as_tensor(labels)
    if labels.numel() and not 0 <= labels.min() <= labels.max() < len(classes):
        raise ValueError(f"labels must lie in 0..{len(classes) - 1}")
    return labels


def blend(tone, value, share):
    """Linear interpolation: tone at share 0, value at share 1. As paint: value laid over tone."""
    return tone + share * (value - tone)


def frame(dice, low, high, turn=0.02, wave=0.012):
    """Lay a box over the image: its longer side touches two borders, its shorter is centred.

    low, high: corners of the box, each a pair of (N,1). turn: deviation of a rotation in radians; wave: of a
    smooth warp, in shares of the image. Returns x, y (N,P) of every pixel and the width of a pixel (N,1) in
    the box's units.
    """
    axis = (torch.arange(dice.size) + 0.5) / dice.size - 0.5
    x, y = axis.repeat(dice.size)[None], axis.repeat_interleave(dice.size)[None]
    for _ in range(2):
        across, shift = 5 * dice.normal(2, 1), wave * dice.normal(2, 1)
        bend = (x * across[:, 0] + y * across[:, 1] + dice.uniform(0, 2 * math.pi)).sin()
        x, y = x + shift[:, 0] * bend, y + shift[:, 1] * bend
    angle = turn * dice.normal(1)
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    scale = torch.maximum(high[0] - low[0], high[1] - low[1])
    return x * scale + (low[0] + high[0]) / 2, y * scale + (low[1] + high[1]) / 2, scale / dice.size


def texture(dice, x, y, weights, dark=2.0):
    """Cloth: tones (N,P) in about 0..1 of a base tone and a pattern in a second one.

    weights: how often each of PATTERNS comes, rows and columns being stripes; dark: how often the base is
    dark, against 4 of middle and 6 of bright tones. x, y (N,P): coordinates; a garment is about 1 long.
    """
    uniform, kind = dice.uniform, dice.pick(PATTERNS, weights)
    level = dice.pick("dark middle bright", (dark, 4, 6))
    base = level["dark"] * uniform(0.06, 0.3) + level["middle"] * uniform(0.4, 0.72)
    base = base + level["bright"] * uniform(0.72, 0.98)
    other = uniform(0.0, 1.0)
    other = other + 0.3 * (other - base).sign() * ((other - base).abs() < 0.2)  # a pattern that can be seen

    def stripes(along, least, most):
        wave = (2 * math.pi * (along * uniform(least, most) + uniform(0, 1))).sin()
        return ((wave - uniform(-0.6, 0.7)) * 4).sigmoid()

    rows, columns, coarse, pitch = stripes(y, 4, 13), stripes(x, 5, 13), dice.field(9, 9), uniform(25, 45)
    pattern = (kind["rows"] * rows + kind["columns"] * columns + kind["checks"] * (rows + columns) / 2
               + kind["dots"] * (((x * pitch).sin() * (y * pitch).sin() - 0.3) * 6).sigmoid()
               + kind["patches"] * ((coarse - uniform(-0.3, 0.8)) * 5).sigmoid()
               + kind["flowers"] * ((dice.field(16, 16) - uniform(-0.5, 0.5)) * 3).sigmoid())
    tone = blend(base, other, pattern * uniform(0.25, 1))
    grain = 0.012 + 0.04 * kind["melange"] * uniform(0.3, 1)
    return tone + grain * dice.field(dice.size, dice.size) + 0.02 * uniform(0, 1) * coarse


class Canvas:
    """An image in the making: tones (N,P), on which signed distances (N,P) are painted one after another."""

    def __init__(self, dice, tone, pixel):
        self.dice, self.tone, self.pixel = dice, tone, pixel

    def cover(self, distance):
        """Share of each pixel inside: 1 where distance <= -pixel / 2, 0 where >= pixel / 2."""
        return (0.5 - distance / self.pixel).clamp_(0, 1)

    def paint(self, distance, value, share=1.0):
        """A tone inside, as a number, (N,1) or (N,P); share: how much it covers what was there."""
        self.tone = blend(self.tone, value, share * self.cover(distance))

    def shade(self, distance, low, high, share=1.0):
        """Tones inside times a factor in low..high."""
        self.paint(distance, self.tone * self.dice.uniform(low, high), share)

    def seam(self, distance, share=1.0, low=-0.3, high=0.7):
        """A line of about a pixel where distance is 0, darker by low..high (negative: brighter)."""
        line = (-3 * (distance / self.pixel) ** 2).exp()
        self.tone = self.tone * (1 - share * self.dice.uniform(low, high) * line)

    def light(self, distance, low, high, reach):
        """By low..high of the way to white at the edge (negative: darker), fading inwards over `reach`."""
        near = (distance / reach).clamp(max=0).exp()
        self.tone = blend(self.tone, 0.95, self.dice.uniform(low, high) * near)

    def finish(self, mask):
        """What mask (N,P) covers, sharpened as a photograph is when made small -> (N,1,S,S) uint8."""
        image = (self.tone.clamp(0.03, 1) * mask).view(-1, 1, self.dice.size, self.dice.size)
        image = image + self.dice.uniform(0.3, 1.0)[..., None, None] * (image - blurred(image))
        image = image * (mask > 0.02).view_as(image)  # sharpening leaves the background alone
        return (255 * image.clamp(0, 1)).round().to(torch.uint8)
