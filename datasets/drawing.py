"""What drawn images share: dice for a batch, outlines and their signed distances, textures, framing, shading.

A batch of N images of S x S pixels is drawn at once. A random choice is a tensor (N,1), one value per image; a picture
in the making is (N,P) with P = S * S pixels. Shapes are signed distances, negative inside (Quilez, "2D distance
functions"): the union of two is their minimum, an outline is where the distance is 0, and coverage is its ramp.
Coordinates belong to the thing drawn, x to the right and y down; `frame` lays them over the pixels.
"""

import math

import torch
import torch.nn.functional as F


class Dice:
    """Random choices for n images of size x size pixels, all from one CPU generator."""

    def __init__(self, n, generator=None, size=28):
        self.n, self.generator, self.size = n, generator, size

    def between(self, low, high):
        """Uniform in low..high, which are numbers or (N,1) -> (N,1)."""
        return low + (high - low) * torch.rand(self.n, 1, generator=self.generator)

    def chance(self, p):
        """1.0 with probability p (a number or (N,1)), else 0.0 -> (N,1)."""
        return (torch.rand(self.n, 1, generator=self.generator) < p).float()

    def pick(self, **weights):
        """One of the names per image, as often as its weight says -> a dictionary of name: (N,1) of 0.0 and 1.0."""
        weight = torch.tensor(list(weights.values()), dtype=torch.float)
        chosen = torch.multinomial(weight, self.n, replacement=True, generator=self.generator)
        return {name: (chosen == i).float()[:, None] for i, name in enumerate(weights)}

    def field(self, rows, columns):
        """A smooth random surface of about rows x columns hills, unit variance at its knots -> (N,P)."""
        knots = torch.randn(self.n, 1, rows, columns, generator=self.generator)
        if (rows, columns) == (self.size, self.size):
            return knots.flatten(1)
        return F.interpolate(knots, (self.size, self.size), mode="bicubic", align_corners=True).flatten(1)

    def points(self, *pairs, miss=0.0):
        """Pairs (x, y) of numbers or (N,1) -> (N,K,2); every point misses its place by a deviation of `miss`."""
        flat = [torch.as_tensor(v, dtype=torch.float).expand(self.n, 1) for pair in pairs for v in pair]
        points = torch.cat(flat, 1).view(self.n, -1, 2)
        return points + miss * torch.randn(points.shape, generator=self.generator)


def rounded(points, cuts=1):
    """Corners of closed outlines (N,K,2) cut off `cuts` times (Chaikin) -> (N, K * 2**cuts, 2)."""
    for _ in range(cuts):
        following = points.roll(-1, 1)
        pair = [0.75 * points + 0.25 * following, 0.25 * points + 0.75 * following]
        points = torch.stack(pair, 2).flatten(1, 2)
    return points


def _to_segment(x, y, start, end):
    """Squared distance of each pixel (N,P) to one segment per image, ends (N,2); and the side on which it lies."""
    (ax, ay), (ex, ey) = start.split(1, 1), (end - start).split(1, 1)
    wx, wy = x - ax, y - ay
    along = (wx * ex).addcmul_(wy, ey).div_(ex * ex + ey * ey + 1e-9).clamp_(0, 1)
    side = (wy * ex).addcmul_(wx, ey, value=-1)
    wx.addcmul_(along, ex, value=-1)
    wy.addcmul_(along, ey, value=-1)
    return wx.mul_(wx).addcmul_(wy, wy), side


def polygon(points, x, y):
    """Signed distance of every pixel to closed outlines: points (N,K,2); x, y (N,P) -> (N,P), negative inside."""
    nearest = torch.full_like(x, 1e9)
    inside = torch.zeros_like(x, dtype=torch.bool)  # by even and odd crossings of a ray to the side
    below = y >= points[:, -1, 1:]
    start = points[:, -1]
    for end in points.unbind(1):
        distance, side = _to_segment(x, y, start, end)
        torch.minimum(nearest, distance, out=nearest)
        below_end = y >= end[:, 1:]
        inside ^= (below ^ below_end) & ((side > 0) ^ below_end)
        start, below = end, below_end
    return nearest.sqrt_().mul_(1 - 2 * inside.float())


def path(points, x, y):
    """Distance of every pixel to open lines: points (N,K,2); x, y (N,P) -> (N,P); less a radius it is a stroke."""
    nearest = torch.full_like(x, 1e9)
    for start, end in zip(points.unbind(1)[:-1], points.unbind(1)[1:], strict=True):
        torch.minimum(nearest, _to_segment(x, y, start, end)[0], out=nearest)
    return nearest.sqrt_()


def ellipse(x, y, rx, ry):
    """About the signed distance to an ellipse around the origin with half axes rx, ry (numbers or (N,1))."""
    rx, ry = torch.as_tensor(rx), torch.as_tensor(ry)
    return (((x / rx) ** 2 + (y / ry) ** 2).sqrt_() - 1) * torch.minimum(rx, ry)


def union(a, b, blend=0.0):
    """Of two signed distances; blend > 0 fills the corner between them, as far as blend reaches."""
    return torch.minimum(a, b) if not blend else torch.minimum(a, b) - (blend - (a - b).abs()).clamp(min=0) ** 2 / (4 * blend)


def cover(distance, pixel):
    """Share of a pixel inside: 1 where distance <= -pixel / 2, 0 where >= pixel / 2."""
    return (0.5 - distance / pixel).clamp_(0, 1)


def over(tone, value, share):
    """Paint value over tone where share (0..1) says."""
    return tone + share * (value - tone)


def frame(dice, low, high, turn=0.03, wave=0.02):
    """Lay a box over the image: its longer side touches two borders, its shorter is centred.

    low, high: corners (N,2) of the box. turn: deviation of a rotation in radians; wave: of a smooth warp, in shares of
    the image. Returns x, y (N,P) of every pixel and the width of a pixel (N,1) in the box's units.
    """
    s, n = dice.size, dice.n
    axis = (torch.arange(s) + 0.5) / s - 0.5
    x, y = axis.repeat(s)[None], axis.repeat_interleave(s)[None]
    for _ in range(2):
        across = torch.randn(n, 2, generator=dice.generator) * 5
        shift = torch.randn(n, 2, generator=dice.generator) * wave
        phase = dice.between(0, 2 * math.pi)
        bend = (x * across[:, :1] + y * across[:, 1:] + phase).sin()
        x, y = x + shift[:, :1] * bend, y + shift[:, 1:] * bend
    angle = torch.randn(n, 1, generator=dice.generator) * turn
    x, y = x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()
    scale = (high - low).amax(1, keepdim=True)
    centre = (low + high) / 2
    return x * scale + centre[:, :1], y * scale + centre[:, 1:], scale / s


def texture(dice, x, y, dark=2.0, **weights):
    """Cloth: tones (N,P) in about 0..1 of a base tone and a pattern in a second one.

    weights: how often each pattern comes: plain, melange, rows (horizontal stripes), columns, checks, dots, patches,
    flowers. x, y (N,P): the cloth's coordinates, in which the garment is about 1 long.
    """
    kind = dice.pick(**weights)
    level = dice.pick(dark=dark, middle=4, bright=6)
    base = (level["dark"] * dice.between(0.06, 0.3) + level["middle"] * dice.between(0.4, 0.72)
            + level["bright"] * dice.between(0.72, 0.98))
    other = dice.between(0.0, 1.0)
    other = other + 0.3 * (other - base).sign() * ((other - base).abs() < 0.2)  # a pattern that can be seen
    fine, coarse = dice.field(16, 16), dice.field(9, 9)

    def stripes(along, least, most):
        wave = (2 * math.pi * (along * dice.between(least, most) + dice.between(0, 1))).sin()
        return ((wave - dice.between(-0.6, 0.7)) * 4).sigmoid()

    rows, columns = stripes(y, 4, 13), stripes(x, 5, 13)
    pattern = kind.get("rows", 0) * rows + kind.get("columns", 0) * columns
    if "checks" in kind:
        pattern = pattern + kind["checks"] * (0.5 * rows + 0.5 * columns)
    if "dots" in kind:
        pitch = dice.between(25, 45)
        pattern = pattern + kind["dots"] * (((x * pitch).sin() * (y * pitch).sin() - 0.3) * 6).sigmoid()
    if "patches" in kind:
        pattern = pattern + kind["patches"] * ((coarse - dice.between(-0.3, 0.8)) * 5).sigmoid()
    if "flowers" in kind:
        pattern = pattern + kind["flowers"] * ((fine - dice.between(-0.5, 0.5)) * 3).sigmoid()
    strength = dice.between(0.25, 1)
    tone = over(base, other, pattern * strength)
    rough = 0.012 + 0.05 * kind.get("melange", 0) * dice.between(0.3, 1)
    return tone + rough * dice.field(dice.size, dice.size) + 0.02 * dice.between(0, 1) * coarse


def finish(dice, tone, mask):
    """Tones (N,P) under coverage mask (N,P), sharpened as a photograph that was made small -> (N,1,S,S) uint8."""
    image = (tone.clamp(0.03, 1) * mask).view(-1, 1, dice.size, dice.size)
    soft = F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    image = image + dice.between(0.3, 1.0)[..., None, None] * (image - soft)
    image = image * (mask > 0.02).view_as(image)  # sharpening leaves the background alone
    return (255 * image.clamp(0, 1)).round().to(torch.uint8)
