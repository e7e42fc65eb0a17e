"""Garments: the public data for Fashion-MNIST, drawn by a program; no image went into it.

Ten kinds in the order of Fashion-MNIST's labels, 28 pixels, bright on black, the longer side touching two
borders. A kind is an outline with random points, parts on it (sleeves, collars, soles,
straps), and cloth. The numbers below are judgement about clothes, and none was computed from an image. While
choosing them the author looked at about 1,300 Fashion-MNIST test images beside the drawings, some of them
because they had been mistaken, and watched one figure from real data: accuracy and confusions, on the 10,000
test images, of a small CNN that had learned nothing but drawings. The 60,000 training images were never used.
`SHAPES` are a public set that knows nothing of the private classes, as letters know no digit:
mirror-symmetric textured silhouettes, none of them a garment.

Alone:  python -m datasets garments     writes garments.png; python -m datasets shapes, shapes.png.
"""
from functools import partial

import torch

from .arrays import GARMENTS
from .drawing import (
    FAR,
    Canvas,
    Dice,
    blend,
    box,
    checked_labels,
    drawn_set,
    ellipse,
    frame,
    intersection,
    path,
    polygon,
    rounded,
    texture,
    union,
)
from .registry import dataset

CLASSES = tuple(GARMENTS)
SHAPES = tuple(f"shape {letter}" for letter in "ABCDEFGHIJ")

# What tells the garments with shoulders apart. Lengths in body lengths from shoulder to hem, widths from the
# middle, angles in radians from hanging straight down. neck: its width. reach: where long sleeves end; arm:
# how thick they are. sleeves, necks, fronts, cloth: how often each of SLEEVES, NECKS, FRONTS and
# drawing.PATTERNS comes; dark: the weight of dark cloth, where the other kinds together have 10. The rest are
# probabilities.
SLEEVES, NECKS = "none short half long", "round vee collar roll hood"
FRONTS = "closed buttons zip placket open"
TOPS = {
    "T-shirt": dict(
        shoulder=(0.23, 0.31), waist=(0.21, 0.28), hem=(0.22, 0.30), neck=(0.07, 0.13), angle=(0.15, 0.8),
        reach=(0.90, 1.10), arm=(0.050, 0.070), sleeves=(6, 82, 6, 6), necks=(71, 16, 13, 0, 0),
        fronts=(90, 0, 0, 10, 0), cloth=(62, 13, 9, 1, 1, 1, 5, 8), dark=2.5, printed=0.35,
        ribbed=0.1, curved=0.3, slits=0.01, pockets=0.01, belt=0.01),
    "pullover": dict(
        shoulder=(0.27, 0.34), waist=(0.23, 0.30), hem=(0.23, 0.30), neck=(0.07, 0.12), angle=(0.1, 0.3),
        reach=(0.92, 1.18), arm=(0.050, 0.075), sleeves=(1, 1, 4, 94), necks=(63, 14, 0, 13, 10),
        fronts=(96, 1, 1, 2, 0), cloth=(60, 17, 11, 2, 2, 2, 3, 3), dark=2, printed=0.25,
        ribbed=0.5, curved=0.15, slits=0.06, pockets=0.01, belt=0.01),
    "coat": dict(
        shoulder=(0.26, 0.34), waist=(0.23, 0.31), hem=(0.24, 0.34), neck=(0.06, 0.11), angle=(0.06, 0.26),
        reach=(0.86, 1.14), arm=(0.060, 0.085), sleeves=(1, 0, 3, 96), necks=(12, 8, 38, 22, 20),
        fronts=(6, 24, 52, 0, 18), cloth=(66, 18, 2, 1, 4, 1, 4, 4), dark=1.5, printed=0.0,
        ribbed=0.25, curved=0.15, slits=0.45, pockets=0.1, belt=0.1),
    "shirt": dict(
        shoulder=(0.25, 0.32), waist=(0.20, 0.28), hem=(0.21, 0.31), neck=(0.06, 0.12), angle=(0.1, 0.6),
        reach=(0.84, 1.14), arm=(0.042, 0.063), sleeves=(8, 22, 15, 55), necks=(30, 20, 48, 2, 0),
        fronts=(36, 45, 1, 14, 4), cloth=(52, 10, 3, 4, 10, 4, 5, 12), dark=2.5, printed=0.03,
        ribbed=0.1, curved=0.5, slits=0.01, pockets=0.2, belt=0.01),
    "dress": dict(
        shoulder=(0.13, 0.22), waist=(0.11, 0.20), hem=(0.14, 0.30), neck=(0.04, 0.10), angle=(0.08, 0.6),
        reach=(0.85, 1.10), arm=(0.050, 0.080), sleeves=(40, 22, 14, 24), necks=(62, 30, 5, 3, 0),
        fronts=(92, 5, 1, 1, 1), cloth=(60, 10, 5, 1, 3, 3, 8, 10), dark=2.5, printed=0.0,
        ribbed=0.1, curved=0.2, slits=0.01, pockets=0.01, belt=0.25),
}
PLAIN = (72, 16, 1, 1, 1, 2, 3, 4)  # cloth of all that has no shoulders


def top(dice, name):
    """Everything with shoulders: body and sleeve, mirrored at x = 0, then neck, front, cloth as TOPS says."""
    uniform, chance, known = dice.uniform, dice.chance, TOPS[name]
    sleeve, neck = dice.pick(SLEEVES, known["sleeves"]), dice.pick(NECKS, known["necks"])
    front = dice.pick(FRONTS, known["fronts"])
    dress, bare, long = float(name == "dress"), sleeve["none"], sleeve["long"]
    unit = 1 - 0.4 * dress  # a dress is long: the upper body is a smaller part of it

    # right half of the body: neck, shoulder, armhole, waist, hem
    neck_x, drop = uniform(*known["neck"]), uniform(0.03, 0.08) * unit
    shoulder, waist, hem = uniform(*known["shoulder"]), uniform(*known["waist"]), uniform(*known["hem"])
    hem = torch.maximum(hem, waist * uniform(0.93, 1.02))
    shoulder = blend(shoulder, torch.minimum(shoulder, neck_x + uniform(0.02, 0.09) * unit), bare)  # straps
    chest = blend(blend(shoulder, waist, 0.5) * uniform(0.95, 1.05), waist * uniform(0.95, 1.1), bare)
    chest_y, waist_y = uniform(0.22, 0.3) * unit, uniform(0.33, 0.45) if dress else uniform(0.45, 0.65)
    flare = 0.12 * dress * chance(0.5) * uniform(0, 1) ** 2
    body = dice.points(
        (-0.2, uniform(0.0, 0.03)), (neck_x * 0.6, 0.012), (neck_x, 0.0), (shoulder, drop),
        (blend(shoulder, chest, 0.6 + 0.2 * bare), chest_y * 0.7), (chest, chest_y), (waist, waist_y),
        (blend(waist, hem, 0.6), uniform(0.68, 0.8)),
        (hem + flare, 1 + uniform(-0.09, 0.02) * chance(known["curved"])), (-0.2, 1.0))

    # sleeve: along a line from the shoulder by the elbow to the cuff, wide at the shoulder
    broad = blend(uniform(0.075, 0.105), uniform(*known["arm"]), long) * (1 - 0.35 * dress)
    narrow = blend(broad * uniform(0.75, 1.25), uniform(0.036, 0.052) * (1 - 0.35 * dress), long)
    arm_x, arm_y = shoulder - broad * 0.75, drop + broad * 0.9
    length = sleeve["short"] * uniform(0.19, 0.31) + sleeve["half"] * uniform(0.36, 0.52)
    length = length * (1 - 0.38 * dress)
    length = length + long * (uniform(*known["reach"]) - arm_y) * (1 - dress * uniform(0.25, 0.55))
    angle = blend(uniform(*known["angle"]), uniform(0.03, 0.2), long)
    elbow_x, elbow_y = arm_x + 0.45 * length * (angle + uniform(0, 0.12)).sin(), arm_y + 0.45 * length
    angle = angle + uniform(-0.1, 0.1)
    sine, cosine = angle.sin(), angle.cos()
    cuff_x, cuff_y, middle = arm_x + length * sine, arm_y + length * cosine, blend(broad, narrow, 0.45)
    arm = dice.points(
        (arm_x - 0.04, arm_y - broad), (shoulder - 0.02 * unit, drop - 0.008),
        (shoulder + 0.022 * unit, drop + 0.05 * unit), (elbow_x + middle * cosine, elbow_y - middle * sine),
        (cuff_x + narrow * cosine, cuff_y - narrow * sine),
        (cuff_x - narrow * cosine, cuff_y + narrow * sine),
        (elbow_x - middle * cosine, elbow_y + middle * sine),
        (arm_x - broad, blend(arm_y + 0.13 * unit, chest_y, 0.6)))

    # the frame: what stands above the shoulders, the widest and the lowest point
    above = neck["roll"] * uniform(0.03, 0.08) + neck["collar"] * 0.02 + neck["hood"] * uniform(0.05, 0.12)
    above = (0.004 + above) * unit
    ends = torch.cat([body, arm * (1 - bare[..., None])], 1).amax(1)  # (N,2)
    x, y, pixel = frame(dice, (-ends[:, :1], -above), (ends[:, :1], ends[:, 1:]), turn=0.015)
    side, x = x, x.abs()  # with its sign for what is not mirrored

    d_body, d_arm = polygon(body, x, y), polygon(arm, x, y) + FAR * bare
    hood = ellipse(x, y + above * 0.3, neck_x + 0.03, above + 0.05) + FAR * (1 - neck["hood"])
    stand = box(x + 0.1 * y, y + above * 0.5 - 0.02, neck_x * 0.95, above * 0.5 + 0.02)
    stand = stand + FAR * (above < 0.012)
    distance = union(d_body, d_arm, hood, stand)
    cloth = texture(dice, side, y, known["cloth"], known["dark"])
    canvas = Canvas(dice, cloth, pixel)

    # blocks of another tone; ribs at hem and cuffs; a print, a logo
    canvas.shade(y - uniform(0.25, 0.75), 0.3, 1.5, chance(0.06 + 0.12 * dress))
    canvas.shade(d_arm, 0.4, 1.4, chance(0.06))
    ribs = union(1 - uniform(0.03, 0.07) - y, intersection(cuff_y - 0.05 - y, d_arm))
    canvas.shade(ribs, 0.65, 1.2, chance(known["ribbed"]))
    wide, high = uniform(0.05, 0.17), uniform(0.02, 0.16)
    letters = ((dice.field(22, 18) + uniform(-0.5, 1.2)) * 4).sigmoid()
    area = blend(box(x, y - 0.36, wide, high), ellipse(x, y - 0.36, wide, high), chance(0.3))
    canvas.paint(area, blend(cloth, uniform(0, 1), letters), chance(known["printed"]))
    canvas.paint(ellipse(side - 0.1, y - 0.25, 0.03, 0.025), uniform(0, 1), chance(0.08))
    # folds, and the crease between sleeve and body
    canvas.seam(intersection(d_arm, drop + 0.05 - y), chance(0.3 + 0.4 * long) * (d_body < 0), -0.3, 0.6)
    folds = dice.field(7, 10) * uniform(0, 0.04)
    folds = folds + dice.field(3, 16) * uniform(0, 0.06) * chance(0.5 + 0.3 * dress)
    canvas.tone = canvas.tone + folds * (0.4 + canvas.tone)

    # neck: in it the inside of the back shows, or the black behind
    depth = (uniform(0.03, 0.11) + bare * uniform(0, 0.12) + neck["vee"] * uniform(0.04, 0.16)) * unit
    vee = (x / neck_x + y / depth - 1) * torch.minimum(neck_x, depth) * 0.75
    opening = blend(ellipse(x, y, neck_x * 0.95, depth), vee, neck["vee"] + neck["collar"])
    opening = opening + FAR * neck["roll"]
    rim = uniform(0.007, 0.02)
    canvas.shade((opening - rim).abs() - rim, 0.5, 1.3, chance(0.5))
    canvas.shade(opening, 0.2, 1.15)
    hole = torch.maximum(chance(0.35), chance(0.7) * bare)
    hole = hole * canvas.cover(intersection(opening, 0.02 * (1 - bare) - y))
    canvas.seam(intersection((y - 0.015).abs(), x - neck_x), neck["roll"] * chance(0.7))
    # collar: two leaves beside the opening
    leaf = dice.points((0, depth * 0.9), (neck_x * 0.7, -above), (neck_x + 0.03, 0.01),
                       (neck_x * 0.95, uniform(0.08, 0.17) * unit), (0.015, depth + 0.02))
    leaf = polygon(leaf, x, y) + FAR * (1 - neck["collar"])
    canvas.paint(leaf, cloth * uniform(0.75, 1.25))
    canvas.seam(leaf)

    # front: zip or edge of the closed front, a band beside it, buttons; or open on what is worn beneath
    end = blend(2.0, depth + uniform(0.1, 0.2), front["placket"])
    down = canvas.cover(intersection(depth * 0.9 - y, y - end))
    middle, parted = (side - uniform(-0.02, 0.02)).abs(), 1 - front["closed"] * (1 - chance(0.015))
    canvas.paint(middle - uniform(0.002, 0.01), uniform(0, 1), parted * down * uniform(0.05, 0.8))
    canvas.seam(middle - uniform(0.02, 0.04), parted * down * chance(0.5), -0.2, 0.5)
    two = chance(0.2 * (name == "coat"))  # ranks of buttons
    rank = (middle - 0.06 * two).abs() - 0.012
    rows = ((y * uniform(35, 75) + uniform(0, 6)).sin() - 0.3).clamp(min=0) * 1.6
    canvas.paint(rank, uniform(0, 1), (front["buttons"] + front["placket"]) * chance(0.7) * rows * down)
    beneath = intersection(middle - uniform(0.005, 0.04) - uniform(0, 0.12) * y, -y)
    canvas.paint(beneath, uniform(0, 0.9) * (0.8 + 0.2 * cloth), front["open"])
    gap = front["open"] * chance(0.5) * canvas.cover(intersection(beneath, y - 0.9))
    # pockets, belt
    slit = path(dice.points((0.09, uniform(0.62, 0.7)), (0.17, uniform(0.58, 0.78))), x, y) - 0.008
    canvas.shade(slit, 0.4, 1.3, chance(known["slits"]))
    patch = box(blend(side, x, chance(0.5)) - 0.12, y - 0.32, 0.05, 0.05)
    canvas.seam(patch, uniform(0.2, 1) * chance(known["pockets"]))
    belt = intersection((y - waist_y).abs() - uniform(0.008, 0.03), d_body)
    leather = blend(canvas.tone, uniform(0, 1), chance(0.5)) * uniform(0.6, 1.1)
    canvas.paint(belt, leather, chance(known["belt"]))
    # light: sleeves and sides turn away; photographs of clothes on white were inverted, so that is brighter
    canvas.paint(d_arm, blend(canvas.tone, 0.95, uniform(-0.1, 0.5)), chance(0.7))
    canvas.light(distance, -0.15, 0.6, uniform(0.015, 0.06))
    canvas.tone = canvas.tone + uniform(-0.12, 0.12) * (y - 0.5) + uniform(-0.1, 0.1) * side
    return canvas.finish(canvas.cover(distance) * (1 - hole) * (1 - gap))


def trouser(dice, _):
    uniform, chance = dice.uniform, dice.chance
    waist, hip = uniform(0.11, 0.17), uniform(0.0, 0.04)
    knee, crotch = uniform(0.5, 0.62), uniform(0.24, 0.36)
    leg = uniform(0.055, 0.085) + 0.06 * chance(0.2) * uniform(0, 1)
    out, spread = torch.maximum(uniform(0.09, 0.2), leg + 0.02), uniform(0.0, 0.03)
    inner = out - leg
    half = dice.points(
        (-0.1, uniform(-0.01, 0.02)), (waist, 0.0), (waist + hip, 0.2), (blend(waist + hip, out, 0.55), knee),
        (out, 1.0), (inner, 1.0), (spread * 0.8 + 0.2 * inner, knee), (spread * 0.4, crotch),
        (-0.1, crotch - 0.01))
    wide = half[..., 0].amax(1, keepdim=True)
    # uniform(0, 0) and uniform(1, 1) are 0 and 1, (N,1); drawings depend on the numbers they use up.
    x, y, pixel = frame(dice, (-wide, uniform(0, 0)), (wide, uniform(1, 1)), turn=0.015, wave=0.015)
    side, x = x, (x + uniform(-0.02, 0.02) * y).abs()
    distance = polygon(rounded(half), x, y)
    canvas = Canvas(dice, texture(dice, side, y, PLAIN), pixel)
    middle = blend(waist * 0.5, (inner + out) / 2, y)
    crease = (x - middle) / uniform(0.02, 0.05)  # down the leg, worn or ironed
    crease = (-(crease**2)).exp()
    canvas.tone = canvas.tone * (1 + uniform(-0.3, 0.45) * crease * (1 - uniform(0, 1) * y))
    folds = dice.field(16, 8) * uniform(0, 0.05) + dice.field(5, 5) * uniform(0, 0.03)
    canvas.tone = canvas.tone + folds * (0.4 + canvas.tone)
    canvas.seam(intersection(side.abs(), y - crotch - 0.02), chance(0.6), -0.4, 0.8)  # fly
    canvas.shade((y - uniform(0.03, 0.06)).abs() - 0.006, 0.4, 1.3, chance(0.5))  # waistband
    pocket = dice.points((waist * 0.5, 0.05), (waist + hip, uniform(0.1, 0.16)))
    canvas.shade(path(pocket, x, y) - 0.005, 0.4, 1.4, chance(0.5))
    canvas.shade(1 - uniform(0.03, 0.1) - y, 0.4, 1.2, chance(0.3))  # turned up
    canvas.light(distance, -0.15, 0.7, uniform(0.015, 0.05))
    canvas.tone = canvas.tone + uniform(-0.15, 0.15) * (y - 0.5)
    return canvas.finish(canvas.cover(distance))


def bag(dice, _):
    uniform, chance = dice.uniform, dice.chance
    form = dice.pick("case trapeze clutch hobo tall", (4, 3, 2, 2, 1.2))
    height = (form["case"] * uniform(0.5, 0.85) + form["trapeze"] * uniform(0.5, 0.8)  # of a width of 1
              + form["clutch"] * uniform(0.4, 0.7) + form["hobo"] * uniform(0.5, 0.9)
              + form["tall"] * uniform(0.9, 1.3))
    upper = 0.5 - form["trapeze"] * uniform(-0.08, 0.14) - form["hobo"] * uniform(0.08, 0.2)
    lower, bend = 0.5 - form["trapeze"] * uniform(0, 0.1), uniform(0.01, 0.12)
    sag = form["hobo"] * uniform(0.05, 0.2) + uniform(-0.03, 0.03)
    half = dice.points(
        (-0.45, sag), (upper - bend, sag * 0.3), (upper, bend),
        (blend(upper, lower, 0.5) + uniform(-0.02, 0.03), height * 0.5), (lower, height - bend),
        (lower - bend, height), (-0.45, height + uniform(0, 0.02)))
    handle = dice.pick("none arc two strap", (25, 50, 12, 13))
    carried = (1 - handle["none"]) * (1 - form["clutch"] * chance(0.6))
    span = blend(uniform(0.12, 0.36), uniform(0.36, 0.48), handle["strap"])
    rise = blend(uniform(0.1, 0.45), uniform(0.4, 0.9), handle["strap"])
    wide = torch.maximum(upper, lower) + 0.02
    x, y, pixel = frame(dice, (-wide, -rise * carried - 0.02), (wide, height + 0.01), turn=0.04, wave=0.015)
    side, x = x, (x + uniform(-0.02, 0.02)).abs()
    d_body, thick = polygon(rounded(half), x, y), uniform(0.012, 0.045)
    second = ellipse(side - 0.04, y - 0.03, span * 0.95, rise * 0.8).abs() - thick * 0.7
    second = second + FAR * (1 - handle["two"])
    ring = union(ellipse(x, y - 0.03, span, rise).abs() - thick, second)
    ring = intersection(ring, y - 0.06) + FAR * (1 - carried)

    cloth = texture(dice, side, y, PLAIN)
    canvas = Canvas(dice, cloth, pixel)
    flap = blend(y - height * uniform(0.3, 0.7), ellipse(x, y, 0.5, height * uniform(0.4, 0.8)), chance(0.5))
    flapped = chance(0.35)
    canvas.shade(flap, 0.5, 1.4, flapped * chance(0.6))
    canvas.seam(flap, flapped, -0.4, 0.8)
    canvas.shade((y - height * uniform(0.06, 0.3)).abs() - 0.008, 0.3, 1.3, chance(0.5))  # zip
    pocket = box(x, y - height * uniform(0.55, 0.7), uniform(0.2, 0.4), height * uniform(0.15, 0.3))
    canvas.seam(pocket, chance(0.3), -0.4, 0.7)
    strap = (x - uniform(0.15, 0.35)).abs() - uniform(0.01, 0.03)
    canvas.paint(strap, cloth * uniform(0.4, 1.5), chance(0.2))
    clasp = box(x, y - height * uniform(0.2, 0.6), uniform(0.015, 0.07), uniform(0.015, 0.06))
    canvas.paint(clasp, uniform(0, 1), chance(0.45))
    canvas.tone = canvas.tone + dice.field(8, 8) * uniform(0, 0.05) * (0.4 + canvas.tone)
    canvas.light(d_body, -0.3, 0.6, uniform(0.015, 0.06))
    canvas.tone = canvas.tone + uniform(-0.15, 0.15) * (y - 0.5)
    canvas.tone = blend(cloth * uniform(0.5, 1.2), canvas.tone, canvas.cover(d_body))  # the handle
    return canvas.finish(canvas.cover(union(d_body, ring)))


def heeled(x, y, lift, start, length):
    """y, negative upwards from the ground, as counted from a sole that rises by lift towards the heel."""
    ramp = ((x - start) / length).clamp(0, 1)
    return y + lift * ramp * ramp * (3 - 2 * ramp)


def shoe(dice, name):
    """Sneaker or ankle boot from the side, toe to the left, x from 0 to 1, y = 0 on the ground."""
    uniform, chance, boot = dice.uniform, dice.chance, name == "ankle boot"
    if boot:
        lift = blend(uniform(0.01, 0.1), uniform(0.12, 0.3), chance(0.25))
        tall = blend(uniform(0.5, 0.8), uniform(0.75, 1.05), chance(0.3))
        toe, throat = uniform(0.09, 0.18), uniform(0.4, 0.55)
        front, back = uniform(0.44, 0.62), uniform(0.9, 1.0)
        rest = [(throat - 0.1, -blend(toe, tall, uniform(0.15, 0.35))),
                (throat, -blend(toe, tall, uniform(0.4, 0.6))),
                (front - 0.01, -blend(toe, tall, 0.75)), (front + uniform(-0.05, 0.01), -tall),
                (blend(front, back, 0.5), -tall + uniform(-0.02, 0.03)), (back, -tall + uniform(-0.04, 0.03)),
                (back - uniform(0, 0.04), -blend(0.2, tall, 0.4)), (0.97, -0.16), (0.97, -0.05), (0.95, 0)]
    else:
        high = chance(0.08)
        lift, tall = uniform(0, 0.03), blend(uniform(0.32, 0.46), uniform(0.5, 0.64), high)
        toe, throat = uniform(0.09, 0.16), uniform(0.38, 0.5)
        front = blend(uniform(0.56, 0.68), uniform(0.5, 0.6), high)
        dip = blend(uniform(0.7, 0.95), uniform(0.85, 1), high)
        tab = blend(uniform(0.68, 0.98), uniform(0.85, 1.05), high)
        rest = [(throat - 0.05, -blend(toe, tall, uniform(0.35, 0.5))),
                (blend(throat, front, 0.6), -blend(toe, tall, 0.8)), (front, -tall),
                (front + 0.06, -tall * uniform(0.93, 1)), (0.8, -tall * dip), (0.95, -tall * tab),
                (0.98, -tall * tab * 0.9), (0.95, -0.16), (0.99, -0.06), (0.98, 0)]
    upper = dice.points((0.02, 0), (0, -toe * 0.5), (0.06, -toe), (0.21, -toe - uniform(0.02, 0.06)), *rest)
    peak = upper[..., 1].amin(1, keepdim=True) - lift
    x, y, pixel = frame(dice, (uniform(0, 0), peak), (uniform(1, 1), uniform(0, 0)), wave=0.01)
    spring = uniform(0, 0.9) * (0.22 - x).clamp(min=0) ** 1.5  # the toe leaves the ground
    v = heeled(x, y, lift, 0.35, 0.4) + spring
    d_upper, lean = polygon(rounded(upper), x, v), uniform(0, 0.2) * y
    rear = blend(uniform(0.6, 0.78), 0.86, chance(0.3) * boot)  # where the heel begins
    heel = intersection(x - 0.965 - lean * 0.3, rear - x + lean, y, -v - 0.03) + FAR * (lift < 0.02)

    cloth, leather = texture(dice, x, v, PLAIN), uniform(0, 1)
    canvas = Canvas(dice, cloth, pixel)

    def part(region, p, low=0.2):
        tone = blend(leather, cloth * uniform(0.5, 1.4), chance(0.6))
        canvas.paint(region, tone, chance(p) * uniform(low, 1))

    part(x - uniform(0.1, 0.24) - 0.3 * v, 0.1 if boot else 0.35)  # toe cap
    part(uniform(0.78, 0.9) - x + uniform(-0.3, 0.3) * v, 0.12 if boot else 0.4)  # heel counter
    part(intersection(v + tall * uniform(0.4, 0.7), 0.5 - x), 0.2, 0.1)  # shaft
    for left, right, p in ((0.2, 0.45, 0.5), (0.5, 0.7, 0.5), (0.6, 0.9, 0.4)):  # upright seams, half-way up
        half = uniform(0.1, 0.9) * tall
        stop = blend(v + half, -half - v, chance(0.5))
        canvas.seam(intersection((x - uniform(left, right) - uniform(-0.6, 0.6) * v).abs(), stop), chance(p))
    canvas.seam(v + uniform(0.12, 0.24) - uniform(-0.2, 0.2) * x, chance(0.3))
    if boot:
        off = (x - blend(front, 0.93, 0.5)).abs()
        part(intersection(off - uniform(0.05, 0.1), v + tall * 0.35), 0.2)  # elastic
        part((v + tall * uniform(0.4, 0.8) + 0.1 * (x - 0.7)).abs() - uniform(0.015, 0.04), 0.25)  # strap
        part(v + tall - uniform(0.04, 0.14), 0.2)  # fur
    else:
        swing = dice.points(
            (uniform(0.35, 0.5), -uniform(0.08, 0.14)), (uniform(0.45, 0.6), -uniform(0.09, 0.16)),
            (uniform(0.65, 0.9), -tall * uniform(0.5, 0.8)))
        part(path(swing, x, v) - uniform(0.01, 0.03), 0.35)
        bars = (((x + uniform(0.2, 0.7) * v) * uniform(45, 80) + uniform(0, 6)).sin() * 3).sigmoid()
        canvas.paint(box(x - 0.52, v + 0.18, 0.13, 0.09), leather, chance(0.2) * bars)
        inside = ellipse(x - 0.75, v + tall, 0.18, uniform(0.04, 0.12))
        canvas.shade(inside, 0.2, 0.9, chance(0.4))
    vamp = dice.points((throat - 0.11, -0.25 if boot else -blend(toe, tall, 0.25)), (front, -tall * 0.93))
    laces = (((x - throat) * uniform(80, 200) + v * uniform(-5, 5)).sin() * 3).sigmoid()
    laces = laces * chance(0.5 if boot else 0.75)
    lace = blend(canvas.tone * uniform(0.3, 1.6), uniform(0, 1), chance(0.5))
    canvas.paint(path(vamp, x, v) - uniform(0.03, 0.07), lace, laces)
    wear = dice.field(8, 8) * uniform(0, 0.03) + dice.field(14, 14) * uniform(0, 0.04)
    canvas.tone = canvas.tone + wear * (0.4 + canvas.tone)
    canvas.light(d_upper, -0.2, 0.6, uniform(0.015, 0.05))
    canvas.tone = canvas.tone + uniform(-0.2, 0.2) * (x - 0.5)
    # sole: often of another tone; white rubber is black here
    thick = uniform(0.02, 0.08) if boot else uniform(0.03, 0.1)
    same = canvas.tone * uniform(0.4, 1.2)
    rubber = blend(same, blend(uniform(0, 0.25), uniform(0.5, 1), chance(0.5)), chance(0.75))
    canvas.paint(-v - thick - uniform(-0.03, 0.06) * x, rubber, chance(0.8))
    canvas.seam(v + thick + 0.01, chance(0.5))
    canvas.paint(intersection(heel, -d_upper), rubber * uniform(0.7, 1.1))
    return canvas.finish(canvas.cover(union(d_upper, heel)))


def sandal(dice, _):
    """A sole, flat, on a wedge or a heel; over it straps: arches, a loop at the ankle, a cage of bands."""
    uniform, chance = dice.uniform, dice.chance
    kind = dice.pick("flat wedge high", (50, 18, 32))
    lift = kind["flat"] * uniform(0, 0.06) + kind["wedge"] * uniform(0.12, 0.4)
    lift = lift + kind["high"] * uniform(0.28, 0.55)
    platform = uniform(0.03, 0.07) + uniform(0, 0.08) * chance(0.3)
    instep = uniform(0.1, 0.26)
    # how high the ankle strap sits, and the cage reaches
    shaft = torch.maximum(chance(0.6) * uniform(0.12, 0.4), kind["high"] * uniform(0.22, 0.5))
    ankle = torch.maximum(shaft, chance(0.5) * uniform(0.15, 0.4))
    height = torch.maximum(lift + ankle, instep) + platform + 0.02
    x, y, pixel = frame(dice, (uniform(0, 0), -height), (uniform(1, 1), uniform(0, 0)))
    v = heeled(x, y, lift, 0.28, 0.55) + platform
    ends, lean = intersection(-x, x - 0.98), uniform(0, 0.12) * y
    below = intersection(-v, y, ends)  # all between sole and ground
    rear = blend(uniform(0.7, 0.82), uniform(0.88, 0.93), chance(0.6))  # block heel or stiletto
    heel = intersection(below, rear - x - lean, x - 0.97 - lean * 0.5) + FAR * (1 - kind["high"])
    wedge = intersection(below, uniform(0.3, 0.45) - x) + FAR * (1 - kind["wedge"])
    sole = union(intersection(box(x, v, 9, 0.012), ends), intersection(-v, v - platform, ends), heel, wedge)

    straps = torch.full_like(x, FAR)
    for p in (0.95, 0.7, 0.5, 0.3):  # arches over toes and instep, which lean; some are closed
        middle = x - uniform(0.08, 0.5) + uniform(-0.4, 0.8) * v
        arch = ellipse(middle, v, uniform(0.05, 0.2), instep * uniform(0.5, 1.1))
        arch = blend(arch.abs() - uniform(0.012, 0.04), arch, chance(0.4))
        straps = union(straps, intersection(arch, v) + FAR * (1 - chance(p)))
    loop = ellipse(x - uniform(0.74, 0.82), v + shaft * 0.85, uniform(0.12, 0.2), uniform(0.02, 0.08))
    loop = loop.abs() - uniform(0.012, 0.03)
    counter = intersection((x - 0.95 - 0.1 * v).abs() - uniform(0.012, 0.06), v, -v - shaft)
    straps = union(straps, union(loop, counter) + FAR * (shaft < 0.05))
    for p in (0.5, 0.35):  # from the instep to the heel
        link = dice.points((uniform(0.2, 0.45), -instep * uniform(0.3, 0.9)),
                           (uniform(0.6, 0.75), -shaft * 0.6 - 0.02), (0.92, -shaft * uniform(0.6, 1) - 0.02))
        straps = union(straps, path(link, x, v) - uniform(0.01, 0.028) + FAR * (1 - chance(p)))
    # a cage: the form of a shoe, cut into bands
    form = dice.points((0.03, 0), (0.06, -instep * 0.8), (0.25, -instep),
                       (uniform(0.4, 0.55), -instep * uniform(0.6, 1.1)),
                       (uniform(0.58, 0.75), -ankle - 0.08),
                       (0.93, (-ankle - 0.08) * uniform(0.8, 1.05)), (0.96, 0))
    bands = ((x + v * uniform(-1.2, 1.5)) * uniform(14, 34) + uniform(0, 6)).sin() - uniform(-0.5, 0.6)
    more = ((v + x * uniform(-0.5, 0.5)) * uniform(14, 36) + uniform(0, 6)).sin() - uniform(-0.2, 0.7)
    bands, caged = torch.maximum(bands, more - 2 * (1 - chance(0.6))), chance(0.45)
    cage = intersection(polygon(form, x, v), -bands * 0.04) + FAR * (1 - caged)
    straps = union(straps + FAR * caged * chance(0.5), cage)

    canvas = Canvas(dice, texture(dice, x, v, PLAIN, dark=1.0), pixel)
    canvas.tone = canvas.tone + dice.field(16, 16) * uniform(0, 0.12) * (0.4 + canvas.tone)
    canvas.light(straps, -0.2, 0.6, 0.02)
    leather = blend(canvas.tone * uniform(0.5, 1.2), uniform(0.1, 1), chance(0.5))
    leather = leather + dice.field(9, 9) * uniform(0, 0.05)
    canvas.tone = blend(leather, canvas.tone, canvas.cover(straps))
    canvas.shade((v - 0.01).abs() - 0.012, 0.4, 1.3, chance(0.5))
    return canvas.finish(canvas.cover(union(straps, sole)))


def shape(dice, name):
    """A star-shaped outline, mirrored at x = 0: each class has its radii, each image misses them a little."""
    steps = 9
    own = torch.Generator().manual_seed(SHAPES.index(name))
    radius = 0.15 + 0.85 * torch.rand(steps, generator=own) * dice.uniform(0.8, 1.2)
    radius = radius + 0.06 * dice.normal(steps)
    radius, angle = radius.clamp(min=0.1), torch.linspace(0, torch.pi, steps)
    half = torch.stack([radius * angle.sin(), -radius * angle.cos()], -1)  # (N,steps,2), from top to bottom
    half[:, [0, -1], 0] = -0.1  # beyond the mirror axis, so that no seam shows at x = 0
    wide, low, high = half[..., :1].amax(1), half[..., 1:].amin(1), half[..., 1:].amax(1)
    x, y, pixel = frame(dice, (-wide, low), (wide, high))
    distance = polygon(half, x.abs(), y)
    canvas = Canvas(dice, texture(dice, x, y, PLAIN), pixel)
    canvas.light(distance, -0.3, 0.6, dice.uniform(0.02, 0.1))
    canvas.tone = canvas.tone + dice.uniform(-0.2, 0.2) * y
    return canvas.finish(canvas.cover(distance))


KINDS = {"trouser": trouser, "bag": bag, "sandal": sandal, "sneaker": shoe, "ankle boot": shoe}
KINDS |= dict.fromkeys(TOPS, top) | dict.fromkeys(SHAPES, shape)


def draw(labels, generator=None, size=28, classes=CLASSES):
    """One garment, or shape, per label: labels (N,) index `classes` -> (N,1,size,size) uint8 on 0.

    Deterministic for a given CPU generator. ValueError for labels out of range.
    """
    labels = checked_labels(labels, classes)
    images = torch.empty(len(labels), 1, size, size, dtype=torch.uint8)
    for label, name in enumerate(classes):
        for chosen in (labels == label).nonzero()[:, 0].split(64):  # what fits the cache
            if len(chosen):  # split of an empty tensor gives one empty part
                images[chosen] = KINDS[name](Dice(len(chosen), generator, size), name)
    return images


@dataset("garments", "ten kinds of garment, in Fashion-MNIST's order, drawn by a program", role="public",
         n=60_000, classes=CLASSES, drawn=True)
def load_garments(ask):
    return drawn_set(ask, draw, CLASSES)


@dataset("shapes", "mirrored silhouettes of the same cloth that know no garment, drawn by a program",
         role="public", n=60_000, classes=SHAPES, drawn=True)
def load_shapes(ask):
    return drawn_set(ask, partial(draw, classes=SHAPES), SHAPES)
