"""Garments: the public data for Fashion-MNIST, drawn by a program; no picture went into it.

Ten kinds in the order of Fashion-MNIST's labels, 28 pixels, bright on black, the longer side touching two borders.
A kind is an outline whose points are rolled with dice, parts on it (sleeves, collars, soles, straps), and cloth.
The numbers below are judgement about clothes, and none was computed from a picture. While writing them the author
looked at TODO Fashion-MNIST test images beside the drawings, and watched one figure from them: accuracy and confusions
of a small CNN that learned the drawings alone. `draw_shapes` is the honest analogue, as letters are for digits:
mirror-symmetric textured silhouettes that know no garment.

Alone:  python -m datasets.garments     writes garments.png, twelve images of every class, and shapes.png.
"""

import math

import torch

from datasets.drawing import Dice, cover, ellipse, finish, frame, over, path, polygon, rounded, texture, union

CLASSES = ("T-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
SHAPES = tuple(f"shape {letter}" for letter in "ABCDEFGHIJ")
FAR = 9.0  # added to the distance of a part that an image does not have

# What tells the garments for the upper body apart. Lengths in garment lengths from shoulder to hem, x from the middle,
# angles in radians from hanging straight down; sleeves, necks, fronts and cloth: how often each kind comes.
TOPS = {
    "T-shirt": dict(
        reach=(0.9, 1.1),        shoulder=(0.23, 0.30), waist=(0.21, 0.28), hem=(0.22, 0.30), angle=(0.3, 0.8), neck=(0.07, 0.13),
        sleeves=dict(none=7, short=80, half=7, long=6), necks=dict(round=75, vee=17, collar=8),
        fronts=dict(closed=94, buttons=0, zip=0, placket=6, open=0), printed=0.35,
        cloth=dict(plain=66, melange=12, rows=9, columns=1, checks=1, dots=1, patches=4, flowers=6)),
    "pullover": dict(
        reach=(0.95, 1.2),        shoulder=(0.27, 0.34), waist=(0.23, 0.30), hem=(0.23, 0.30), angle=(0.10, 0.30), neck=(0.07, 0.12),
        sleeves=dict(none=1, short=1, half=4, long=94), necks=dict(round=63, vee=14, roll=13, hood=10),
        fronts=dict(closed=96, buttons=1, zip=1, placket=2, open=0), printed=0.25,
        cloth=dict(plain=60, melange=17, rows=11, columns=2, checks=2, dots=2, patches=3, flowers=3)),
    "coat": dict(
        reach=(0.84, 1.14),        shoulder=(0.24, 0.34), waist=(0.21, 0.30), hem=(0.22, 0.33), angle=(0.06, 0.26), neck=(0.06, 0.11),
        sleeves=dict(none=2, short=0, half=4, long=94), necks=dict(round=12, vee=8, collar=38, roll=22, hood=20),
        fronts=dict(closed=6, buttons=30, zip=46, placket=0, open=18), printed=0.0,
        cloth=dict(plain=66, melange=18, rows=2, columns=1, checks=4, dots=1, patches=4, flowers=4)),
    "shirt": dict(
        reach=(0.84, 1.14),        shoulder=(0.24, 0.32), waist=(0.20, 0.29), hem=(0.22, 0.33), angle=(0.10, 0.6), neck=(0.06, 0.12),
        sleeves=dict(none=10, short=25, half=15, long=50), necks=dict(round=30, vee=20, collar=48, roll=2),
        fronts=dict(closed=36, buttons=45, zip=1, placket=14, open=4), printed=0.03,
        cloth=dict(plain=52, melange=10, rows=3, columns=4, checks=10, dots=4, patches=5, flowers=12)),
    "dress": dict(
        reach=(0.85, 1.1),        shoulder=(0.13, 0.20), waist=(0.105, 0.18), hem=(0.13, 0.28), angle=(0.08, 0.6), neck=(0.04, 0.10),
        sleeves=dict(none=40, short=22, half=14, long=24), necks=dict(round=62, vee=30, collar=5, roll=3),
        fronts=dict(closed=92, buttons=5, zip=1, placket=1, open=1), printed=0.0,
        cloth=dict(plain=60, melange=10, rows=5, columns=1, checks=3, dots=3, patches=8, flowers=10)),
}
PLAIN = dict(plain=72, melange=16, rows=1, columns=1, checks=1, dots=2, patches=3, flowers=4)


def top(dice, name):
    """Everything with shoulders: an outline mirrored at x = 0, sleeves, neck, front and cloth as TOPS says."""
    roll, chance, known = dice.between, dice.chance, TOPS[name]
    sleeve, neck, front = dice.pick(**known["sleeves"]), dice.pick(**known["necks"]), dice.pick(**known["fronts"])
    dress = float(name == "dress")
    bare = sleeve["none"]
    unit = 1 - 0.4 * dress  # a dress is long: what belongs to the upper body is shorter in it

    # outline of the right half: neck, shoulder, armhole, waist, hem
    shoulder, waist, hem = roll(*known["shoulder"]), roll(*known["waist"]), roll(*known["hem"])
    neck_x = roll(*known["neck"])
    shoulder = over(shoulder, torch.minimum(shoulder, neck_x + roll(0.02, 0.09) * unit), bare)
    drop = roll(0.03, 0.08) * unit
    chest, chest_y = over(shoulder, waist, 0.5) * roll(0.95, 1.05), roll(0.22, 0.3) * unit
    chest = over(chest, roll(0.95, 1.1) * waist, bare)
    waist_y = over(roll(0.45, 0.65), roll(0.33, 0.45), torch.tensor(dress))
    flare = roll(0.0, 1.0) ** 2 * dress * chance(0.5) * 0.12
    hem_curve = roll(-0.05, 0.03) * chance(0.5)
    body = dice.points(
        (-0.2, roll(0.0, 0.03)), (neck_x * 0.6, 0.012), (neck_x, 0.0), (shoulder, drop),
        (over(shoulder, chest, 0.6 + 0.2 * bare), chest_y * 0.7), (chest, chest_y), (waist, waist_y),
        (over(waist, hem, 0.6), roll(0.68, 0.8)), (hem + flare, 1 + hem_curve), (-0.2, 1.0), miss=0.004)

    # sleeve: a centre line from the shoulder to the cuff, with an elbow, and its width on the way
    thin, thick = roll(0.036, 0.052), roll(0.055, 0.075)
    broad = over(roll(0.075, 0.105), thick, sleeve["long"]) * (1 - 0.35 * dress)
    narrow = over(broad * roll(0.75, 1.25), thin * (1 - 0.35 * dress), sleeve["long"])
    arm_x, arm_y = shoulder - broad * 0.75, drop + broad * 0.9
    reach = (roll(*known["reach"]) - arm_y) * (1 - dress * roll(0.25, 0.55))  # long sleeves may pass the hem
    length = sleeve["short"] * roll(0.19, 0.31) + sleeve["half"] * roll(0.36, 0.52)
    length = length * (1 - dress * 0.38) + sleeve["long"] * reach
    angle = over(roll(*known["angle"]), roll(0.03, 0.2), sleeve["long"])
    elbow_x, elbow_y = arm_x + 0.45 * length * (angle + roll(0, 0.12)).sin(), arm_y + 0.45 * length
    bent = angle + roll(-0.1, 0.1)
    cuff_x, cuff_y = arm_x + length * bent.sin(), arm_y + length * bent.cos()
    sine, cosine = bent.sin(), bent.cos()
    middle = over(broad, narrow, 0.45)
    sleeves = dice.points(
        (arm_x - 0.04, arm_y - broad), (shoulder - 0.02 * unit, drop - 0.008), (shoulder + 0.022 * unit, drop + 0.05 * unit),
        (elbow_x + middle * cosine, elbow_y - middle * sine), (cuff_x + narrow * cosine, cuff_y - narrow * sine),
        (cuff_x - narrow * cosine, cuff_y + narrow * sine), (elbow_x - middle * cosine, elbow_y + middle * sine),
        (arm_x - broad, over(arm_y + 0.13 * unit, chest_y, 0.6)), miss=0.004)

    # what stands above the shoulders: roll neck, stand-up collar, hood, straps
    above = 0.004 + neck.get("roll", 0) * roll(0.03, 0.08) + neck.get("collar", 0) * 0.02
    above = above + neck.get("hood", 0) * roll(0.05, 0.12)
    above = above * unit
    has = 1 - bare
    width = torch.cat([body[..., 0].amax(1, keepdim=True), has * sleeves[..., 0].amax(1, keepdim=True)], 1).amax(1)
    foot = torch.cat([body[..., 1].amax(1, keepdim=True), has * sleeves[..., 1].amax(1, keepdim=True)], 1).amax(1)
    x, y, pixel = frame(dice, torch.stack([-width, -above[:, 0]], 1), torch.stack([width, foot], 1), 0.015, 0.012)
    side = x  # with its sign, for what is not mirrored
    x = x.abs()

    d_body = polygon(body, x, y)
    d_sleeve = polygon(sleeves, x, y) + FAR * bare
    stand = union(ellipse(x, y + above * 0.3, neck_x + 0.03, above + 0.05) + FAR * (1 - neck.get("hood", torch.zeros(1))),
                  torch.maximum(x - neck_x * 0.95 + 0.1 * y, (y + above * 0.5 - 0.02).abs() - above * 0.5 - 0.02))
    stand = stand + FAR * (above < 0.012)
    distance = union(union(d_body, d_sleeve), stand)

    cloth = texture(dice, x if torch.rand((), generator=dice.generator) < 0.5 else side, y, **known["cloth"])
    tone = cloth
    # blocks of another tone: yoke or lower part, sleeves; cuffs and hem of ribs
    block = roll(0.25, 0.75)
    tone = over(tone, tone * roll(0.3, 1.5), chance(0.07 + 0.13 * dress) * cover(y - block, pixel))
    tone = over(tone, tone * roll(0.4, 1.4), chance(0.06) * cover(d_sleeve, pixel))
    ribbed = chance({"pullover": 0.5, "coat": 0.25}.get(name, 0.1))
    rib = torch.maximum(cover(1 - roll(0.03, 0.07) - y, pixel), has * cover(cuff_y - 0.05 - y, pixel) * cover(d_sleeve, pixel))
    tone = over(tone, tone * roll(0.65, 1.2), ribbed * rib)
    # print on the chest
    printed, high, wide = chance(known["printed"]), roll(0.02, 0.16), roll(0.05, 0.17)
    box = over(torch.maximum(x - wide, (y - 0.36).abs() - high), ellipse(x, y - 0.36, wide, high), chance(0.3))
    ink = over(cloth, roll(0, 1), ((dice.field(22, 18) + roll(-0.5, 1.2)) * 4).sigmoid())
    tone = over(tone, ink, printed * cover(box, pixel))
    logo = ellipse(side - 0.1, y - 0.25, 0.03, 0.025)
    tone = over(tone, roll(0, 1), chance(0.1) * cover(logo, pixel))
    # the crease between sleeve and body, as dark or bright as folds are
    deep = roll(-0.25, 0.6) * chance(0.7)
    crease = (-(d_sleeve / (0.55 * pixel)) ** 2).exp() * (d_body < 0) * (y > drop + 0.05)
    tone = tone * (1 - deep * crease)
    folds = dice.field(7, 10) * roll(0, 0.04) + dice.field(3, 16) * roll(0, 0.06) * chance(0.5 + 0.3 * dress)
    tone = tone + folds * (0.4 + tone)

    # neck: round, or a vee; the inside of the back shows, or the black behind
    depth = roll(0.03, 0.11) * unit + bare * roll(0, 0.12) * unit
    depth = depth + neck["vee"] * roll(0.04, 0.16) * unit
    vee = (x / neck_x + y / depth - 1) * torch.minimum(neck_x, depth) * 0.75
    opening = over(ellipse(x, y, neck_x * 0.95, depth), vee, torch.maximum(neck["vee"], neck.get("collar", torch.zeros(1))))
    opening = opening + FAR * neck.get("roll", 0)
    rim = roll(0.015, 0.04)
    tone = over(tone, tone * roll(0.5, 1.3), chance(0.5) * cover((opening - rim / 2).abs() - rim / 2, pixel))
    inside = cover(opening, pixel)
    tone = over(tone, (tone * roll(0.2, 1.15)), inside)
    hole = inside * torch.maximum(chance(0.35), chance(0.7) * bare) * cover(0.02 * (1 - bare) - y, pixel)
    roll_line = neck.get("roll", torch.zeros(1)) * chance(0.7) * (-((y - 0.015) / 0.014) ** 2).exp() * (x < neck_x)
    tone = tone * (1 - roll(-0.3, 0.7) * roll_line)
    # collar: two leaves beside the opening
    if "collar" in neck:
        tip = roll(0.08, 0.17) * unit
        leaf = dice.points((0.0, depth * 0.9), (neck_x * 0.7, -above), (neck_x + 0.03, 0.01), (neck_x * 0.95, tip),
                           (0.015, depth + 0.02))
        d_leaf = polygon(leaf, x, y) + FAR * (1 - neck["collar"])
        tone = over(tone, cloth * roll(0.75, 1.25), cover(d_leaf, pixel))
        tone = tone * (1 - roll(-0.3, 0.8) * (-(d_leaf / (0.6 * pixel)) ** 2).exp())
    # front: buttons, zip, short placket, or open on what is worn beneath
    start, end = depth * 0.9, over(torch.ones(1), depth + roll(0.1, 0.2), front["placket"])
    down = cover(start - y, pixel) * cover(y - end, pixel)
    offset = roll(-0.02, 0.02)
    line = (-((side - offset) / (roll(0.005, 0.014) + 0.35 * pixel)) ** 2).exp() * down
    closed = front["closed"] * (1 - chance(0.03))
    tone = over(tone, roll(0, 1), (1 - closed) * roll(0.05, 0.8) * line)
    band = roll(0.02, 0.04)
    edges = (-(((side - offset).abs() - band) / (0.5 * pixel)) ** 2).exp() * down
    tone = tone * (1 - (1 - closed) * chance(0.5) * roll(-0.2, 0.5) * edges)
    rows = ((y * roll(35, 75) + roll(0, 6)).sin() - 0.3).clamp(min=0) * 1.6
    rank = ((side - offset).abs() - chance(0.2 * (name == "coat")) * 0.06).abs() - 0.012
    tone = over(tone, roll(0, 1), (front["buttons"] + front["placket"]) * chance(0.7) * rows * cover(rank, pixel) * down)
    beneath = cover((side - offset).abs() - roll(0.005, 0.04) - roll(0, 0.12) * y, pixel) * cover(-y, pixel)
    tone = over(tone, roll(0, 0.9) * (0.8 + 0.2 * cloth), front["open"] * beneath)
    gap = front["open"] * chance(0.5) * beneath * cover(0.9 - y, pixel)
    # pockets and belt
    slant = dice.points((0.09, roll(0.62, 0.7)), (0.17, roll(0.58, 0.78))) * torch.tensor([1.0, 1.0])
    pocket = cover(path(slant, x, y) - 0.008, pixel) * chance({"coat": 0.45, "pullover": 0.06}.get(name, 0.02))
    pocket = pocket + chance({"shirt": 0.2, "coat": 0.1}.get(name, 0.01)) * cover(
        (torch.maximum((side.abs() - 0.12).abs() - 0.05, (y - 0.32).abs() - 0.05)).abs() - 0.004, pixel)
    tone = tone * (1 - roll(-0.3, 0.7) * pocket)
    belt = chance({"dress": 0.25, "coat": 0.12}.get(name, 0.01)) * cover((y - waist_y).abs() - roll(0.008, 0.03), pixel)
    tone = over(tone, over(tone, roll(0, 1), chance(0.5)) * roll(0.6, 1.1), belt * cover(d_body, pixel))
    # light: the sides turn away, sleeves more so; on the inverted photograph that is brighter
    tone = tone + (0.95 - tone) * roll(-0.1, 0.5) * cover(d_sleeve, pixel) * chance(0.7)
    tone = tone + (0.95 - tone) * roll(-0.15, 0.6) * (distance / roll(0.015, 0.06)).exp()
    tone = tone + roll(-0.12, 0.12) * (y - 0.5) + roll(-0.1, 0.1) * side
    return finish(dice, tone, cover(distance, pixel) * (1 - hole.clamp(0, 1)) * (1 - gap))


def trouser(dice, _):
    roll, chance = dice.between, dice.chance
    waist, hip = roll(0.11, 0.17), roll(0.0, 0.04)
    crotch, knee = roll(0.24, 0.36), roll(0.5, 0.62)
    out, spread = roll(0.09, 0.2), roll(0.0, 0.03)
    leg = roll(0.055, 0.085) + 0.06 * chance(0.2) * roll(0, 1)
    out = torch.maximum(out, leg + 0.02)
    inner = (out - leg).clamp(min=0.004)
    half = dice.points(
        (-0.1, roll(-0.01, 0.02)), (waist, 0.0), (waist + hip, 0.2), (over(waist + hip, out, 0.55), knee), (out, 1.0),
        (inner, 1.0), (spread * 0.8 + 0.2 * inner, knee), (spread * 0.4, crotch), (-0.1, crotch - 0.01), miss=0.004)
    wide = torch.maximum(torch.maximum(waist + hip, out), half[..., 0].amax(1, keepdim=True))
    zero = torch.zeros(dice.n, 1)
    x, y, pixel = frame(dice, torch.cat([-wide, zero], 1), torch.cat([wide, zero + 1], 1), 0.015, 0.015)
    side, x = x, (x + roll(-0.02, 0.02) * y).abs()
    distance = polygon(rounded(half), x, y)
    tone = texture(dice, side, y, **PLAIN)
    middle = over(waist * 0.5, (inner + out) / 2, y)
    tone = tone * (1 + roll(-0.3, 0.45) * (-((x - middle) / roll(0.02, 0.05)) ** 2).exp() * (1 - roll(0, 1) * y))
    tone = tone + (dice.field(16, 8) * roll(0, 0.05) + dice.field(5, 5) * roll(0, 0.03)) * (0.4 + tone)
    ink = roll(-0.4, 0.8)
    seam = (-(side / (0.5 * pixel)) ** 2).exp() * cover(y - crotch - 0.02, pixel) * cover(0.02 - y, pixel)
    tone = tone * (1 - ink * seam * chance(0.6))
    tone = tone * (1 - roll(-0.3, 0.6) * chance(0.5) * cover((y - roll(0.03, 0.06)).abs() - 0.006, pixel))
    pocket = path(dice.points((waist * 0.5, 0.05), (waist + hip, roll(0.1, 0.16))), x, y) - 0.005
    tone = tone * (1 - roll(-0.4, 0.6) * chance(0.5) * cover(pocket, pixel))
    tone = tone * (1 - roll(0, 0.6) * chance(0.3) * cover(1 - roll(0.03, 0.1) - y, pixel))
    tone = tone + (0.95 - tone) * roll(-0.15, 0.7) * (distance / roll(0.015, 0.05)).exp() + roll(-0.15, 0.15) * (y - 0.5)
    return finish(dice, tone, cover(distance, pixel))


def bag(dice, _):
    roll, chance = dice.between, dice.chance
    form = dice.pick(box=4, trapeze=3, clutch=2, hobo=2, tall=1.2)
    height = (form["box"] * roll(0.5, 0.85) + form["trapeze"] * roll(0.5, 0.8) + form["clutch"] * roll(0.4, 0.7)
              + form["hobo"] * roll(0.5, 0.9) + form["tall"] * roll(0.9, 1.3))
    upper = 0.5 - (form["trapeze"] * roll(-0.08, 0.14) + form["hobo"] * roll(0.08, 0.2))
    sag = form["hobo"] * roll(0.05, 0.2) + 0.03 * roll(-1, 1)
    lower = 0.5 - form["trapeze"] * roll(0, 0.1)
    round_ = roll(0.01, 0.12)
    half = dice.points((-0.45, sag), (upper - round_, sag * 0.3), (upper, round_), (over(upper, lower, 0.5) + roll(-0.02, 0.03),
                       height * 0.5), (lower, height - round_), (lower - round_, height), (-0.45, height + roll(0, 0.02)), miss=0.006)
    handle = dice.pick(none=25, arc=50, two=12, strap=13)
    handle = {**handle, "none": handle["none"] * 1.0}
    carried = 1 - torch.maximum(handle["none"], form["clutch"] * chance(0.6))
    span = handle["strap"] * roll(0.36, 0.48) + (1 - handle["strap"]) * roll(0.12, 0.36)
    rise = handle["strap"] * roll(0.4, 0.9) + (1 - handle["strap"]) * roll(0.1, 0.45)
    zero = torch.zeros(dice.n, 1)
    wide = torch.maximum(upper, lower) + 0.02
    x, y, pixel = frame(dice, torch.cat([-wide, -rise * carried - 0.02], 1), torch.cat([wide, zero + height + 0.01], 1), 0.04, 0.015)
    side, x = x, (x + roll(-0.02, 0.02)).abs()
    d_body = polygon(rounded(half), x, y)
    thick = roll(0.012, 0.045)
    ring = ellipse(x, y - 0.03, span, rise).abs() - thick
    ring = torch.maximum(ring, y - 0.06) + FAR * (1 - carried)
    second = torch.maximum(ellipse(side - 0.04, y - 0.03, span * 0.95, rise * 0.8).abs() - thick * 0.7, y - 0.06)
    ring = union(ring, second + FAR * (1 - handle["two"] * carried))
    tone = texture(dice, side, y, **{**PLAIN, "patches": 6, "checks": 3})
    cloth = tone
    flap = over(torch.maximum(y - height * roll(0.3, 0.7), -d_body * 0 - 1), ellipse(x, y, 0.5, height * roll(0.4, 0.8)), chance(0.5))
    flapped = chance(0.35)
    tone = over(tone, tone * roll(0.5, 1.4), flapped * chance(0.6) * cover(flap, pixel))
    tone = tone * (1 - roll(-0.4, 0.8) * flapped * (-(flap / (0.6 * pixel)) ** 2).exp())
    line = (y - height * roll(0.06, 0.3)).abs() - 0.008
    tone = tone * (1 - roll(-0.4, 0.8) * chance(0.5) * cover(line, pixel))
    pocket = torch.maximum(x - roll(0.2, 0.4), (y - height * roll(0.55, 0.7)).abs() - height * roll(0.15, 0.3)).abs() - 0.008
    tone = tone * (1 - roll(-0.4, 0.7) * chance(0.3) * cover(pocket, pixel))
    bars = ((x - roll(0.15, 0.35)).abs() - roll(0.01, 0.03))
    tone = over(tone, cloth * roll(0.4, 1.5), chance(0.2) * cover(bars, pixel))
    clasp = torch.maximum(x - roll(0.015, 0.07), (y - height * roll(0.2, 0.6)).abs() - roll(0.015, 0.06))
    tone = over(tone, roll(0, 1), chance(0.45) * cover(clasp, pixel))
    tone = tone + dice.field(6, 6) * roll(0, 0.07) * (0.4 + tone)
    tone = tone + (0.95 - tone) * roll(-0.3, 0.6) * (d_body / roll(0.015, 0.06)).exp() + roll(-0.15, 0.15) * (y - 0.5)
    tone = over(cloth * roll(0.5, 1.2), tone, cover(d_body, pixel))
    return finish(dice, tone, cover(union(d_body, ring), pixel))


def shoe(dice, name):
    """Sneakers and ankle boots from the side, toe to the left; y is 0 on the ground, x runs from 0 to 1."""
    roll, chance = dice.between, dice.chance
    boot = float(name == "ankle boot")
    if boot:
        raised = chance(0.3)
        lift = over(roll(0.0, 0.06), roll(0.12, 0.3), raised)
        tall = over(roll(0.5, 0.78), roll(0.75, 1.05), chance(0.3))
        toe, throat, front = roll(0.1, 0.19), roll(0.38, 0.52), roll(0.42, 0.56)
        back = roll(0.88, 0.99)
        upper = dice.points(
            (0.02, 0.0), (0.0, -toe * 0.5), (0.06, -toe), (0.22, -toe - roll(0.02, 0.06)), (throat - 0.06, -roll(0.26, 0.36)),
            (throat + 0.02, -roll(0.38, 0.46)), (front - 0.02, -over(0.45, tall, 0.5)), (front - roll(-0.01, 0.05), -tall),
            (over(front, back, 0.5), -tall + roll(-0.02, 0.03)), (back, -tall + roll(-0.04, 0.03)), (back - roll(0, 0.04), -over(0.2, tall, 0.4)),
            (0.97, -0.16), (0.97, -0.05), (0.95, 0.0), miss=0.006)
    else:
        high = chance(0.2)
        lift = roll(0.0, 0.03)
        tall = over(roll(0.3, 0.44), roll(0.5, 0.68), high)
        toe, throat, front = roll(0.09, 0.16), roll(0.36, 0.46), roll(0.5, 0.62)
        upper = dice.points(
            (0.02, 0.0), (0.0, -toe * 0.45), (0.06, -toe), (0.2, -toe - roll(0.03, 0.06)), (throat - 0.05, -over(toe, tall, 0.5)),
            (throat + 0.06, -over(toe, tall, 0.9)), (front, -tall), (front + 0.08, -tall * roll(0.9, 0.98)),
            (0.78, -tall * over(roll(0.68, 0.88), 1.0, high)), (0.93, -tall * over(roll(0.8, 1.0), 1.0, high)), (0.97, -tall * 0.75),
            (0.95, -0.16), (0.99, -0.06), (0.98, 0.0), miss=0.006)
    zero = torch.zeros(dice.n, 1)
    peak = upper[..., 1].amin(1, keepdim=True)
    x, y, pixel = frame(dice, torch.cat([zero, peak - lift], 1), torch.cat([zero + 1, zero], 1), 0.02, 0.01)
    ramp = ((x - 0.35) / 0.4).clamp(0, 1)
    spring = roll(0, 0.3) * (0.22 - x).clamp(min=0) ** 1.5 * 3  # the toe leaves the ground
    v = y + lift * ramp * ramp * (3 - 2 * ramp) + spring
    d_upper = polygon(rounded(upper), x, v)
    rear = roll(0.6, 0.78)
    thin = chance(0.3) * boot
    lean = roll(0, 0.06) * (y / 0.3)
    heel = torch.maximum((x - 0.965 - lean * 0.3).clamp(min=-9), over(rear, torch.full((1,), 0.86), thin) - x + lean)
    heel = torch.maximum(torch.maximum(heel, y), -v - 0.03) + FAR * (lift < 0.02)
    distance = union(d_upper, heel)
    tone = texture(dice, x, v, **(PLAIN if boot else {**PLAIN, "flowers": 7}))
    cloth = tone
    leather = roll(0, 1)

    def part(region, amount, p):
        nonlocal tone
        tone = over(tone, over(leather, cloth * roll(0.5, 1.4), chance(0.6)), chance(p) * amount * cover(region, pixel))

    def stitch(d, p):
        nonlocal tone
        tone = tone * (1 - chance(p) * roll(-0.4, 0.8) * (-(d / (0.55 * pixel)) ** 2).exp())

    slope_a, slope_b = throat - 0.06, front  # the vamp, where laces are
    vamp = dice.points((slope_a - 0.05, -over(toe, tall, 0.25) if not boot else -0.25), (front + 0.0, -tall * 0.93))
    d_vamp = path(vamp, x, v)
    t = (x - slope_a) / (slope_b - slope_a)
    part(x - roll(0.1, 0.24) - 0.3 * v, roll(0.2, 1), 0.35 if not boot else 0.1)  # toe cap
    part(roll(0.78, 0.9) - x + roll(-0.3, 0.3) * v, roll(0.2, 1), 0.4 if not boot else 0.12)  # heel counter
    part(torch.maximum(v + tall * roll(0.4, 0.7), 0.5 - x), roll(0.1, 0.7), 0.2)
    stitch(x - roll(0.25, 0.4) - roll(-0.6, 0.3) * v, 0.4)
    stitch(x - roll(0.55, 0.8) - roll(-0.6, 0.6) * v, 0.4)
    stitch(v + roll(0.12, 0.24) - roll(-0.2, 0.2) * x, 0.3)
    if boot:
        part(torch.maximum((x - over(front, 0.93, 0.5)).abs() - roll(0.05, 0.1), v + tall * 0.35), roll(0.2, 1), 0.2)  # elastic
        stitch(torch.maximum(v + tall * roll(0.45, 0.9), -1 + 0 * v).abs() - 0.01, 0.35)  # strap
        part((v + tall * roll(0.4, 0.8) + 0.1 * (x - 0.7)).abs() - roll(0.015, 0.04), roll(0.1, 1), 0.2)
        part(v + tall - roll(0.04, 0.14), 1.0, 0.2)  # fur, fold
    else:
        swing = dice.points((roll(0.35, 0.5), -roll(0.08, 0.14)), (roll(0.45, 0.6), -roll(0.09, 0.16)), (roll(0.65, 0.9), -tall * roll(0.5, 0.8)))
        part(path(swing, x, v) - roll(0.01, 0.03), 1.0, 0.35)
        bars = ((x + roll(0.2, 0.7) * v) * roll(45, 80) + roll(0, 6)).sin()
        tone = over(tone, leather, chance(0.2) * (bars * 3).sigmoid() * cover((x - 0.52).abs() - 0.13, pixel) * cover((v + 0.18).abs() - 0.09, pixel))
        opening = ellipse(x - 0.75, v + tall, 0.18, roll(0.04, 0.12))
        tone = over(tone, cloth * roll(0.2, 0.9), chance(0.4) * cover(opening, pixel))
    laced = chance(0.4 if boot else 0.75)
    laces = ((t * roll(14, 26) + v * roll(-5, 5)).sin() * 3).sigmoid()
    tone = over(tone, over(tone * roll(0.3, 1.6), roll(0, 1), chance(0.5)), laced * laces * cover(d_vamp - roll(0.03, 0.07), pixel))
    tone = tone + (dice.field(8, 8) * roll(0, 0.05) + dice.field(14, 14) * roll(0, 0.04)) * (0.4 + tone)
    tone = tone + (0.95 - tone) * roll(-0.2, 0.6) * (d_upper / roll(0.015, 0.05)).exp() + roll(-0.2, 0.2) * (x - 0.5)
    # sole: often of another tone, white rubber is black here
    thick = roll(0.02, 0.05) if boot else roll(0.03, 0.1)
    sole = cover(-v - thick - roll(-0.03, 0.06) * x, pixel)
    rubber = over(tone * roll(0.4, 1.2), over(roll(0, 0.25), roll(0.5, 1), chance(0.5)), chance(0.75))
    tone = over(tone, rubber, sole * chance(0.8))
    stitch(v + thick + 0.01, 0.5)
    tone = over(tone, rubber * roll(0.7, 1.1), cover(heel, pixel) * (1 - cover(d_upper, pixel)))
    return finish(dice, tone, cover(distance, pixel))


def sandal(dice, _):
    roll, chance = dice.between, dice.chance
    kind = dice.pick(flat=50, wedge=20, high=30)
    lift = kind["flat"] * roll(0, 0.06) + kind["wedge"] * roll(0.12, 0.4) + kind["high"] * roll(0.25, 0.6)
    platform = roll(0.03, 0.07) + roll(0, 0.08) * chance(0.3)
    shaft = chance(0.55) * roll(0.12, 0.4)  # how high the ankle strap sits above the sole
    shaft = torch.maximum(shaft, kind["high"] * roll(0.2, 0.45))
    front = roll(0.1, 0.26)
    zero = torch.zeros(dice.n, 1)
    top_ = torch.maximum(lift + shaft + 0.03, front + platform)
    x, y, pixel = frame(dice, torch.cat([zero, -top_ - platform], 1), torch.cat([zero + 1, zero], 1), 0.02, 0.012)
    ramp = ((x - 0.28) / 0.55).clamp(0, 1)
    v = y + lift * ramp * ramp * (3 - 2 * ramp) + platform
    ends = torch.maximum(0.0 - x, x - 0.98)
    d_sole = torch.maximum(v.abs() - 0.012 - 0 * x, ends)
    base = torch.maximum(torch.maximum(-v, y), ends)  # all between sole and ground
    plate = torch.maximum(torch.maximum(-v, v - platform), ends)
    lean = roll(0, 0.12) * y
    stake = torch.maximum(torch.maximum(base, over(roll(0.7, 0.82), roll(0.88, 0.93), chance(0.6)) - x - lean), x - 0.97 - lean * 0.5)
    wedge = torch.maximum(base, roll(0.3, 0.45) - x)
    d_sole = union(union(d_sole, plate), union(stake + FAR * (1 - kind["high"]), wedge + FAR * (1 - kind["wedge"])))
    straps = torch.full_like(x, FAR)
    for i in range(4):  # over the toes and instep: arches that lean
        wide, high_, at = roll(0.05, 0.2), front * roll(0.5, 1.1), roll(0.08, 0.5)
        arch = ellipse(x - at + roll(-0.4, 0.8) * v, v, wide, high_)
        there = chance((0.95, 0.7, 0.5, 0.3)[i])
        closed = chance(0.4)
        d = over(arch.abs() - roll(0.012, 0.04), arch, closed)
        straps = union(straps, torch.maximum(d, v) + FAR * (1 - there))
    has = (shaft > 0.05).float()
    loop = ellipse(x - roll(0.74, 0.82), v + shaft * 0.85, roll(0.12, 0.2), roll(0.02, 0.08)).abs() - roll(0.012, 0.03)
    counter = torch.maximum(torch.maximum((x - 0.95 - 0.1 * v).abs() - roll(0.012, 0.06), v), -v - shaft)
    straps = union(straps, union(loop, counter) + FAR * (1 - has))
    for p in (0.5, 0.35):
        link = dice.points((roll(0.2, 0.45), -front * roll(0.3, 0.9)), (roll(0.6, 0.75), -shaft * 0.6 - 0.02), (0.92, -shaft * roll(0.6, 1) - 0.02))
        straps = union(straps, path(link, x, v) - roll(0.01, 0.028) + FAR * (1 - chance(p)))
    # a cage: the form of a shoe, cut into bands
    ankle = torch.maximum(shaft, roll(0.15, 0.4)) * over(torch.ones(1), top_ - lift, kind["high"] * 0.0)
    ankle = torch.minimum(ankle, (top_ - lift).clamp(min=0.1))
    form = dice.points((0.03, 0.0), (0.06, -front * 0.8), (0.25, -front), (roll(0.4, 0.55), -front * roll(0.6, 1.1)),
                       (roll(0.58, 0.75), -ankle), (0.93, -ankle * roll(0.8, 1.05)), (0.96, 0.0), miss=0.01)
    bands = ((x + v * roll(-1.2, 1.5)) * roll(14, 34) + roll(0, 6)).sin() - roll(-0.5, 0.6)
    across = ((v + x * roll(-0.5, 0.5)) * roll(14, 36) + roll(0, 6)).sin() - roll(-0.2, 0.7)
    bands = torch.maximum(bands, across - 2 * (1 - chance(0.6)))
    cage = torch.maximum(polygon(form, x, v), -bands * 0.04)
    caged = chance(over(torch.full((1,), 0.5), torch.full((1,), 0.3), kind["high"]))
    straps = union(straps + FAR * caged * chance(0.5), cage + FAR * (1 - caged))
    tone = texture(dice, x, v, dark=1.0, **PLAIN)
    tone = tone + dice.field(16, 16) * roll(0, 0.15) * (0.4 + tone)
    tone = tone * (1 - roll(-0.3, 0.6) * (straps / 0.02).clamp(max=0).exp())
    sole_tone = over(tone * roll(0.5, 1.2), roll(0.1, 1), chance(0.5)) + dice.field(9, 9) * roll(0, 0.08)
    tone = over(sole_tone, tone, cover(straps, pixel))
    tone = over(tone, tone * roll(0.4, 1.3), cover((v - 0.01).abs() - 0.012, pixel) * chance(0.5))
    return finish(dice, tone, cover(union(straps, d_sole), pixel))


KINDS = {"trouser": trouser, "bag": bag, "sandal": sandal, "sneaker": shoe, "ankle boot": shoe}


def draw(labels, generator=None, size=28):
    """One image per label: labels (N,) integers in 0..9 (index into CLASSES) -> (N,1,size,size) uint8, black around.

    Deterministic for a given CPU generator. ValueError for labels out of range.
    """
    labels = torch.as_tensor(labels)
    if labels.numel() and not 0 <= labels.min() <= labels.max() < len(CLASSES):
        raise ValueError(f"labels must lie in 0..{len(CLASSES) - 1}")
    images = torch.empty(len(labels), 1, size, size, dtype=torch.uint8)
    for label, name in enumerate(CLASSES):
        for chosen in (labels == label).nonzero()[:, 0].split(64):  # what fits the cache
            if len(chosen):
                images[chosen] = KINDS.get(name, top)(Dice(len(chosen), generator, size), name)
    return images
