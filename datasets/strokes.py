"""Procedural handwriting: the public data that costs no privacy because no data went into it.

The paper pre-trains on public images (Sec. 3, step 1; EMNIST letters for MNIST). Here a program draws them:
a class is a few skeletons, the ways in which people write it; an image is one skeleton with jittered points,
a smooth random warp, slant, rotation, aspect and pen width, scaled to a box of 20 pixels and centred by mass
in 28 x 28 as MNIST is, and rendered by the distance of every pixel to the stroke. Pre-training on procedural
images: Tang et al. 2023 (DP-RandP). The numbers below are judgement about handwriting, and none was
computed from an image. While writing them the author watched one figure from real data, the accuracy and
confusions of `python -m bench.strokes_realism` on the 2,000 held-out digits of datasets/mnist10k.npz; the
8,000 private ones were never used.

A skeleton is text. "xxyy" is a control point (x to the right, y down, both 00..99), a blank goes on along a
smooth curve, "/" turns a corner at the last point, "|" lifts the pen; "3:" in front makes it three times as
likely. A skeleton becomes one matrix from control points to the ends of short segments, so a batch of
handwriting is one matrix product.

Alone:  python -m datasets strokes     writes strokes.png.
"""
import functools
import math

import numpy as np
import torch

from .drawing import checked_labels, drawn_set
from .registry import dataset

CLASSES = "0123456789abcdefghijklmnopqrstuvwxyz"

# fmt: off
SKELETONS = {
    "0": ["2:6205 4201 2528 2060 3592 5598 7680 8045 7015 5504 4306",
          "7008 4512 2555 2588 4298 6880 8040 7505 6003",
          "2:4803 2525 2068 4298 6592 8060 7622 5003", "5502 7515 8050 7090 4599 2575 2035 4005 6000",
          "2602 2050 3292 5299 7590 8045 6810 3503",
          "7006 5003 3025 2260 3892 5899 7880 7845 6515 4505 3010"],
    "1": ["5:5000 5050 5099", "2:3222 5500 / 5550 5599", "1:2820 5000 / 5050 5099 / 2899 7599",
          "5400 4850 5299",
          "3512 5000 / 5299"],
    "2": ["2:2222 3505 5800 7618 7040 4570 2097 / 5096 8096",
          "2:2225 4003 6803 7628 5570 3093 1890 2478 4582 6598 8590",
          "2220 4502 7212 7038 4572 2095 / 5088 8598",
          "2518 5000 7520 6548 4078 2092 2378 4080 6096 8894", "2008 5004 7808 / 5052 2096 / 5094 8294",
          "2:2222 4503 7015 6545 3592 1588 2572 4578 6592 8590",
          "2228 4004 6805 7228 5565 3095 1285 2568 5082 8888",
          "3027 2413 4502 7015 6545 3090 1292 2272 5088 8898"],
    "3": ["2:2212 4500 7012 6835 4248 / 7058 7585 4599 1988",
          "2212 5000 7215 5842 4549 4245 5545 7668 6092 4098 2088",
          "2205 5003 7502 / 4842 / 7255 7582 5098 2290",
          "2510 5500 7220 5943 4550 6055 7575 5598 2092", "2208 5000 6818 5540 3847 / 6550 7872 6095 1898"],
    "4": ["2:2800 2548 / 5048 8046 | 7005 6850 6699", "6500 1862 / 5061 8560 | 6530 6499",
          "2505 2238 4054 7045 / 7805 / 7250 6899", "2503 2035 3550 6545 8003 / 7050 6599",
          "3802 1558 / 5057 8856 | 6028 5899", "2805 2042 3352 7048 | 7800 7050 6299",
          "7202 2058 / 5056 8855 / 7202 / 6850 6499"],
    "5": ["7503 3004 / 2842 5536 7855 7088 4599 2090", "3005 2644 5538 7862 6092 4099 2092 | 3005 5503 8002",
          "8002 5004 3018 3540 6555 7278 5098 2092", "3004 2645 / 5538 7660 6590 4098 1890 | 3004 5506 7803",
          "8503 4004 / 3442 5540 7060 6085 3898 1592", "7005 3504 / 2840 5535 7657 6592 4098 2685"],
    "6": ["2:6500 4015 2545 2280 4599 7288 7465 5552 3560 2478",
          "7002 4030 2565 3094 5598 7580 6558 4556 2872",
          "6002 3030 2070 4098 7390 7855 5045 2872", "5500 3035 2575 4598 7085 6860 4555 2880",
          "7804 5008 2845 2582 4898 7588 7262 4855 2668", "5505 2830 2075 5098 8075 7350 5042 2862",
          "5800 3035 2075 4898 8082 7058 4855 2572"],
    "7": ["3:1806 5004 7804 / 5548 4099", "1810 3505 8005 / 6040 4899", "1820 2005 / 5004 8003 / 6040 4599",
          "2:1806 5004 7804 / 5548 4099 | 3552 5550 7848", "1815 3003 5508 8002 / 5850 4599",
          "1508 5006 8005 / 7045 6899", "1530 1806 / 5006 8004 / 6040 5099", "1808 5005 7808 7025 5055 3599",
          "1508 5006 7510 6545 5599"],
    "8": ["7215 5000 2818 5046 7575 5099 2578 5048 7520 6804",
          "7014 5002 2820 4543 7268 6094 4098 2578 4252 7028 6806",
          "5047 2825 5000 7222 5047 7878 5099 2275 5047",
          "5047 7525 5000 2522 5047 2278 5099 7875 5047", "2612 4542 7275 5598 3080 5052 7822 6003 3508 2618",
          "6810 5002 3520 5045 8072 5099 2072 4848 6522 6010",
          "7014 4802 2028 5055 6578 5099 3578 5055 8025 6806",
          "7512 4503 2520 5547 7275 4898 2880 4555 7828"],
    "9": ["2:7215 5002 2520 2842 5548 7222 / 7050 6899", "7212 5002 2522 3046 5545 7420 / 7060 6099",
          "7020 4802 2522 3545 6538 7515 / 7560 6090 3598", "7025 5502 2825 4545 7022 / 6860 5099",
          "7508 4803 2528 4047 6838 7808 / 7255 6599", "7012 5003 3020 4540 6530 7013 / 6850 6499",
          "7820 5002 1828 2850 5855 7530 / 7265 6299", "6840 4550 2525 5002 7225 6865 4599"],
    "a": ["7215 4808 2545 3088 6075 7412 / 7285 8595", "1899 5000 / 8099 | 3062 7062",
          "7030 5010 2048 3592 6580 7030 / 7298"],
    "b": ["2600 2550 2599 / 2570 5048 7870 5598 2590",
          "2202 2250 2299 | 2202 6505 6842 2248 | 2248 7855 7592 2298"],
    "c": ["7820 5502 2240 2880 5598 8085", "7530 5010 2050 4595 7885"],
    "d": ["7065 4548 2070 4598 7075 / 7200 / 7299", "2202 2250 2299 | 2202 6012 7850 6088 2299"],
    "e": ["2252 5050 7840 5812 2545 3088 5599 8085",
          "2402 2250 2499 | 2402 5002 8002 | 2348 6548 | 2499 8098",
          "7510 4002 2525 5045 / 2560 3092 8088"],
    "f": ["7808 5503 4540 4599 | 2245 7545", "2402 2450 2499 | 2402 8003 | 2448 7048",
          "8010 6000 4825 4060 2599 | 2050 7048"],
    "g": ["7220 4805 2530 4552 7025 / 7570 5098 2088", "7818 5002 2245 3592 7088 7860 / 5060 / 8560"],
    "h": ["2500 2550 2599 / 2660 5045 7265 7299", "2200 2250 2299 | 7800 7850 7899 | 2248 7850"],
    "i": ["5000 5050 5099", "5035 5070 5099 | 5008 5212", "2202 7802 | 5002 5050 5098 | 2298 7898"],
    "j": ["6000 6055 5590 2885", "6030 6075 4598 2590 | 6004 6208", "2502 8502 | 5802 5868 4098 2080"],
    "k": ["2500 2550 2599 | 7510 2858 / 7899", "2500 2550 2599 | 7538 2868 / 7599"],
    "l": ["5000 5050 5099", "2802 2550 2598 / 5098 8097", "3560 6020 5000 4040 5090 7095"],
    "m": ["1899 2005 / 5070 / 8005 / 8599", "1520 1598 / 1850 3022 4840 4898 / 5050 6522 8242 8598"],
    "n": ["2299 2505 / 7595 / 7800", "2520 2598 / 2755 5022 7545 7598"],
    "o": ["5502 2535 2575 5098 7870 7528 5002", "5010 2048 4590 7862 7020 4512 2838"],
    "p": ["2502 2550 2599 | 2505 6002 7830 5852 2652", "2525 2560 2499 / 2555 4522 7540 6068 2662"],
    "q": ["7015 4505 2230 4552 7025 / 7270 7299 / 8890", "5502 2535 2575 5092 7870 7528 5002 | 5568 8599",
          "7018 4508 2532 4555 7022 / 7299"],
    "r": ["2520 2560 2599 / 2850 5022 7525", "2402 2450 2499 | 2402 6502 7528 5550 2450 / 7899",
          "2025 3020 3060 3098 / 3855 6022 8030"],
    "s": ["7512 5002 2522 5048 7575 5098 2288", "7808 4005 2830 6060 7085 4599 2090"],
    "t": ["5000 5050 5099 | 2030 8030", "1804 8204 | 5004 5050 5099", "4500 4560 5595 7888 | 2035 7533"],
    "u": ["2202 2260 4598 7072 7805", "2515 2570 4598 7075 7515 / 7578 8598"],
    "v": ["1802 5098 / 8202", "2005 4595 / 7020 8008"],
    "w": ["1205 3298 / 5035 / 6898 / 8805", "1510 2590 4580 5030 / 5590 7590 8510"],
    "x": ["2002 8098 | 8002 2098", "2010 4550 8095 | 7808 5050 2298"],
    "y": ["2002 5052 / 8002 | 5052 5099", "2205 3045 6540 / 7505 / 7265 5598 2592",
          "2008 4858 / 7808 / 5065 3099"],
    "z": ["2004 8004 / 2097 / 8296", "2008 5005 7808 / 4548 / 7065 5598 2595",
          "2004 8004 / 2097 / 8296 | 3250 7048"],
}
# fmt: on

SEGMENTS = 40  # short straight pieces per skeleton
BOX = 20  # longer side of the ink in pixels, as in MNIST


def parse(text):
    """One skeleton as text -> what `segment_matrix` needs.

    Returns the weight, the control points (K,2) in -1..1, the stroke number of each (K,), the curves as lists
    of point indices, and the stroke number of each curve.
    """
    weight, _, body = text.rpartition(":")
    points, stroke, curves, strokes_of_curves = [], [], [], []
    for number, part in enumerate(body.split("|")):
        for corner, piece in enumerate(part.split("/")):
            # after a corner the curve starts at the last point
            first = len(points) - 1 if corner else len(points)
            points += [(int(token[:2]), int(token[2:])) for token in piece.split()]
            curves.append(list(range(first, len(points))))
            strokes_of_curves.append(number)
        stroke += [number] * (len(points) - len(stroke))
    return float(weight or 1), np.array(points) / 49.5 - 1, np.array(stroke), curves, strokes_of_curves


def segment_matrix(points, curves, strokes_of_curves):
    """The linear map from K control points to segments, a numpy array.

    Its shape is (sharp or smoothed corners, start or end, SEGMENTS, K).
    """
    from scipy.interpolate import CubicSpline  # here: it takes a quarter as long to load as torch
    lengths = [np.linalg.norm(np.diff(points[c], axis=0), axis=1).sum() for c in curves]
    counts = [max(1, int(SEGMENTS * length / sum(lengths))) for length in lengths]
    counts[int(np.argmax(lengths))] += SEGMENTS - sum(counts)
    samples = {}  # stroke number -> rows of its sample points, joined at the corners
    for curve, count, number in zip(curves, counts, strokes_of_curves, strict=True):
        gaps = np.linalg.norm(np.diff(points[curve], axis=0), axis=1)
        knots = np.concatenate([[0], np.cumsum(gaps**0.5)])  # centripetal: no overshoot at close points
        rows = np.zeros((count + 1, len(points)))
        rows[:, curve] = CubicSpline(knots, np.eye(len(curve)),
                                     bc_type="natural")(np.linspace(0, knots[-1], count + 1))
        samples[number] = np.concatenate([samples[number], rows[1:]]) if number in samples else rows
    ends = []
    for rows in samples.values():
        smooth = rows
        for _ in range(4):
            smooth = np.concatenate([smooth[:1], (smooth[:-2] + 2 * smooth[1:-1] + smooth[2:]) / 4,
                                     smooth[-1:]])
        ends.append(np.stack([[rows[:-1], rows[1:]], [smooth[:-1], smooth[1:]]]))  # (2,2,s,K)
    return np.concatenate(ends, axis=2)


@functools.cache
def compiled():
    """All V skeletons as padded tensors, made at the first use.

    Points (V,K,2), the number of each point's stroke (V,K), `segment_matrix` (V,2,2,SEGMENTS,K), and the
    weight of each skeleton in each class (36,V), with which it is chosen.
    """
    parsed = [parse(text) for name in CLASSES for text in SKELETONS[name]]
    most = max(len(p[1]) for p in parsed)
    points, stroke = torch.zeros(len(parsed), most, 2), torch.zeros(len(parsed), most, dtype=torch.long)
    matrix = torch.zeros(len(parsed), 2, 2, SEGMENTS, most)
    chance = torch.zeros(len(CLASSES), len(parsed))
    owner = [label for label, name in enumerate(CLASSES) for _ in SKELETONS[name]]
    for i, (weight, p, s, curves, numbers) in enumerate(parsed):
        points[i, : len(p)], stroke[i, : len(p)] = torch.tensor(p), torch.tensor(s)
        matrix[i, ..., : len(p)] = torch.tensor(segment_matrix(p, curves, numbers))
        chance[owner[i], i] = weight
    return points, stroke, matrix, chance


def draw(labels, generator=None, size=28):
    """One image per label: labels (N,) in 0..35, indices of CLASSES -> (N,1,size,size) uint8, ink 255 on 0.

    The ink fits a box of 20 pixels (times size / 28), its centre of mass lies within about a pixel of the
    image's centre. Deterministic for a given CPU generator. ValueError for labels out of range.
    """
    labels = checked_labels(labels, CLASSES)
    # Filled in place. A list of small results between large temporaries would fragment the heap: 4 GB instead
    # of 0.8.
    images = torch.empty(len(labels), 1, size, size, dtype=torch.uint8)
    # Parts of 512 bound the memory, whatever N, and parts of 32 fit the cache.
    for part, target in zip(labels.split(512), images.split(512), strict=True):
        if len(part):
            ends, radius = pen_path(part, generator)
            for e, r, t in zip(ends.split(32), radius.split(32), target.split(32), strict=True):
                t[:, 0] = render(e, r, size)
    return images


def pen_path(labels, generator):
    """Random handwriting: segment ends (N,2,S,2), pen radius (N,1,S), in pixels of MNIST's box of 20."""
    n = len(labels)

    def normal(*shape):
        return torch.randn(n, *shape, generator=generator)

    def uniform(*shape):
        return torch.rand(n, *shape, generator=generator)

    points, stroke, matrix, chance = compiled()
    variant = torch.multinomial(chance[labels], 1, generator=generator)[:, 0]
    points, stroke, matrix = points[variant], stroke[variant], matrix[variant]
    # the hand: points miss their place, neighbours in like manner (a 0 stays round); so does a whole stroke
    miss = normal(points.shape[1] + 2, 2)
    miss = (miss[:, :-2] + miss[:, 1:-1] + miss[:, 2:]) / 3**0.5  # (N,K,2), unit variance
    points = points + miss * (0.03 + 0.1 * uniform(1, 1))
    moved = normal(4, 2) * 0.06  # no skeleton has more than four strokes
    points = points + moved.gather(1, stroke[..., None].expand(-1, -1, 2))
    # corners between sharp and round
    sharp = uniform(1, 1, 1)
    ends = torch.einsum("ncesk,nkd->ncesd", matrix, points)  # (N,2,2,S,2)
    ends = ends[:, 0] * sharp + ends[:, 1] * (1 - sharp)
    # the page: a smooth warp of the plane, three waves
    for _ in range(3):
        wave = (ends * normal(1, 1, 2) * 1.2).sum(-1, keepdim=True) + 2 * math.pi * uniform(1, 1, 1)
        ends = ends + normal(1, 1, 2) * 0.09 * wave.sin()
    # the writer: aspect, slant, rotation
    x, y = ends.unbind(-1)
    x, y = x * (1 + 0.12 * normal(1, 1) * y), y + 0.1 * normal(1, 1) * (1 - y * y)  # top-heavy, high-waisted
    aspect = (normal(1, 1) * 0.2).exp()
    x = x * 0.85 * aspect
    x = x - (0.2 + 0.25 * normal(1, 1)) * y  # y points down: a positive slant leans to the right
    angle = normal(1, 1) * 0.12
    ends = torch.stack([x * angle.cos() - y * angle.sin(), x * angle.sin() + y * angle.cos()], -1)
    # the pen: width, and how it varies along the way
    width = 1.35 * aspect.sqrt() * (normal(1, 1) * 0.2).exp()  # narrow writing keeps its loops open
    way = torch.linspace(0, 1, SEGMENTS) * 2 * math.pi
    radius = width * (1 + 0.15 * (way * (0.5 + 1.5 * uniform(1, 1)) + 2 * math.pi * uniform(1, 1)).sin())
    radius = radius.clamp(0.7, 2.4)
    # the form: scale the ink to the box, keep its aspect, centre it by mass
    low, high = ends.amin((1, 2)), ends.amax((1, 2))  # (N,2)
    scale = (BOX - 2 * radius.amax((1, 2))) / (high - low).amax(1)
    ends = ends * scale[:, None, None, None]
    mass = (ends[:, 1] - ends[:, 0]).norm(dim=-1) * radius[:, 0] + 1e-6  # (N,S)
    centre = (ends.mean(1) * mass[..., None]).sum(1) / mass.sum(1, keepdim=True)
    return ends - centre[:, None, None], radius


def render(ends, radius, size):
    """(N,2,S,2), (N,1,S) -> (N,size,size) uint8: coverage of each pixel by the nearest round-ended stroke."""
    zoom = size / 28
    ends, radius = ends * zoom, radius[:, 0, :, None] * zoom
    axis = torch.arange(size) - (size - 1) / 2
    # (3,P): x, y, 1
    grid = torch.stack([axis.repeat(size), axis.repeat_interleave(size), torch.ones(size * size)])
    start, way = ends[:, 0], ends[:, 1] - ends[:, 0]  # (N,S,2)
    length = way.norm(dim=-1, keepdim=True).clamp(min=1e-4)
    along = way / length
    across = torch.stack([-along[..., 1], along[..., 0]], -1)

    def coordinate(direction):  # (p - start) . direction for every pixel p at once, linear in (x, y, 1)
        return torch.cat([direction, -(start * direction).sum(-1, keepdim=True)], -1) @ grid  # (N,S,P)

    u, v = coordinate(along), coordinate(across)
    u = u - torch.minimum(u.clamp(min=0), length)  # beyond the ends only
    distance = u.mul_(u).addcmul_(v, v).sqrt_().sub_(radius).amin(1)  # (N,P), negative inside the ink
    # The edge is 1.2 of MNIST's pixels wide.
    return (255 * (0.5 - distance / (1.2 * zoom)).clamp(0, 1)).round().to(torch.uint8).view(-1, size, size)


GROUPS = {"digits": CLASSES[:10], "letters": CLASSES[10:], "all": CLASSES}  # --public-classes


@dataset("strokes", "handwriting drawn by a program, nothing stored", role="public", n=60_000,
         classes=CLASSES, drawn=True)
def load_strokes(ask):
    if ask.public_classes not in GROUPS:
        raise ValueError(f"public_classes must be one of {', '.join(GROUPS)}, not {ask.public_classes!r}")
    classes = GROUPS[ask.public_classes]
    return drawn_set(ask, draw, classes, CLASSES.index(classes[0]))
