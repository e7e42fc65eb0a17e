"""Portraits: the public data for photographs of faces, drawn by a program; no image went into it.

A head is an ellipsoid that turns a little, with bumps for nose, brows, cheeks, lips and chin; its slopes give
the light and shade. On it lie skin, eyes, mouth and beard, around it hair, neck, clothes, head-wear and a
blurred background, all with soft edges. Every image has attributes under CelebA's names (Liu et al. 2015;
`Child`, `Senior` and `Grayscale` are other face sets'), so extensions/captions.py can describe it. People
differ by construction: skin and expression do not depend on age or sex. Gray hair, baldness, beards, length
of hair, glasses and head-wear depend on age or sex as the numbers in `people` say. The light is a little
brighter on dark skin. So no kind of face is the default one.

The numbers below are judgement about faces, and none was computed from an image. While choosing them the
author looked at some fifty images of the set `faces`, for how they are framed and lit. One number was read
there: how many of 1,000 held-out faces a CNN taught by drawings sorts into men and women. It spoke for the
tighter frame (docs/lab-notebook.md).

`draw` rolls the same dice whatever the attributes are: the same seed with and without eyeglasses gives the
same person.

Lengths are in distances between the eyes, from the point midway between them, y down; signs of x are the
viewer's. `Portrait.frame` lists the coordinates; s = 0 is always the middle of the head, turned or not.

Alone:  python -m datasets portraits     writes portraits.png.
"""
import math

import torch
import torch.nn.functional as F

from .drawing import FAR, Dice, blend, blurred, ellipse, union
from .photos import attribute_classes
from .registry import ImageSet, dataset

ATTRIBUTES = (
    "Bald", "Bangs", "Black_Hair", "Blond_Hair", "Blurry", "Brown_Hair", "Bushy_Eyebrows", "Child",
    "Eyeglasses", "Goatee", "Gray_Hair", "Grayscale", "Male", "Mouth_Slightly_Open", "Mustache", "No_Beard",
    "Pale_Skin", "Receding_Hairline", "Senior", "Smiling", "Straight_Hair", "Wavy_Hair", "Wearing_Earrings",
    "Wearing_Hat", "Wearing_Lipstick", "Young")
BATCH = 32  # what fits the cache

# From pale to dark; between two neighbours every mixture occurs.
SKIN = torch.tensor([
    (0.95, 0.82, 0.76), (0.90, 0.72, 0.63), (0.81, 0.61, 0.50), (0.65, 0.46, 0.36), (0.47, 0.32, 0.25),
    (0.34, 0.23, 0.19)])
HAIR = {  # two ends of every colour
    "Black_Hair": ((0.03, 0.03, 0.03), (0.10, 0.08, 0.07)),
    "Brown_Hair": ((0.17, 0.10, 0.06), (0.38, 0.25, 0.15)),
    "Blond_Hair": ((0.60, 0.45, 0.25), (0.86, 0.74, 0.52)),
    "Gray_Hair": ((0.45, 0.45, 0.45), (0.88, 0.87, 0.85)),
    "red": ((0.36, 0.15, 0.08), (0.58, 0.31, 0.18))}
IRIS = torch.tensor([(0.10, 0.06, 0.04), (0.22, 0.13, 0.07), (0.30, 0.40, 0.50), (0.28, 0.34, 0.22)])


def people(n, generator=None):
    """Attributes of n people in plausible combinations: {name: (n,) bool}."""
    dice = Dice(n, generator)
    chance, has = dice.chance, {}
    male, age = chance(0.5), dice.pick("child young older senior", (12, 43, 33, 12))
    adult = 1 - age["child"]
    has["Male"], has["Child"], has["Senior"] = male, age["child"], age["senior"]
    has["Young"] = age["child"] + age["young"]
    aged = 0.15 * age["young"] + 0.6 * age["older"] + age["senior"]
    has["Bald"] = chance(0.2 * aged * male)
    hair = 1 - has["Bald"]
    hair = hair * (1 - adult * chance(0.07))  # under a scarf or a turban nothing is known of it
    gray = chance(0.02 * age["young"] + 0.18 * age["older"] + 0.75 * age["senior"])
    colour = dice.pick("Black_Hair Brown_Hair Blond_Hair red", (44, 32, 17, 7))
    for name in ("Black_Hair", "Brown_Hair", "Blond_Hair"):
        has[name] = colour[name] * (1 - gray) * hair
    has["Gray_Hair"] = gray * hair
    has["Receding_Hairline"] = chance(0.45 * aged * male) * hair
    has["Bangs"] = chance(0.16 + 0.14 * (1 - male)) * hair * (1 - has["Receding_Hairline"])
    form = dice.pick("Straight_Hair Wavy_Hair other", (33, 33, 34))
    has["Straight_Hair"], has["Wavy_Hair"] = form["Straight_Hair"] * hair, form["Wavy_Hair"] * hair
    grown = dice.pick("none Mustache Goatee both full", (62, 9, 6, 6, 17))
    bearded = male * adult
    has["Mustache"] = (grown["Mustache"] + grown["both"] + grown["full"] * chance(0.6)) * bearded
    has["Goatee"] = (grown["Goatee"] + grown["both"]) * bearded
    has["No_Beard"] = 1 - bearded * (1 - grown["none"])
    has["Smiling"] = chance(0.5)
    has["Mouth_Slightly_Open"] = chance(0.2 + 0.5 * has["Smiling"])
    has["Eyeglasses"] = chance(0.05 + 0.12 * adult)
    has["Bushy_Eyebrows"] = chance(0.06 + 0.18 * bearded)
    has["Pale_Skin"] = chance(0.12)
    has["Wearing_Hat"] = chance(0.09)
    has["Wearing_Lipstick"] = chance(0.5 * adult * (1 - male))
    has["Wearing_Earrings"] = chance(0.03 + 0.3 * adult * (1 - male))
    has["Blurry"], has["Grayscale"] = chance(0.07), chance(0.05)
    return {name: has[name][:, 0].bool() for name in ATTRIBUTES}


def draw(attributes, generator=None, size=32):
    """Portraits of people with these attributes: {name: (N,) bool} -> (N,3,size,size) uint8.

    All of ATTRIBUTES must be there. Small images are drawn at 1.5 times their size, and reduced.
    Deterministic for a given CPU generator. ValueError for attributes that are missing.
    """
    if lacking := [name for name in ATTRIBUTES if name not in attributes]:
        raise ValueError(f"attributes lack {', '.join(lacking)}")
    table = torch.stack([torch.as_tensor(attributes[name]).float() for name in ATTRIBUTES], 1)  # (N,A)
    images = torch.empty(len(table), 3, size, size, dtype=torch.uint8)
    for rows, target in zip(table.split(BATCH), images.split(BATCH), strict=True):
        if len(rows):
            has = dict(zip(ATTRIBUTES, rows.split(1, 1), strict=True))
            target[:] = Portrait(has, generator, size).finished()
    return images


def smooth(x, low, high):
    """0 below low, 1 above high, a smooth ramp between."""
    x = ((x - low) / (high - low)).clamp_(0, 1)
    return x * x * (3 - 2 * x)


def paint(image, colour, share):
    """Colours (N,3) or (N,3,P) over an image (N,3,P) where share (N,P) says."""
    return torch.lerp(image, colour if colour.dim() == 3 else colour[..., None], share[:, None])


def bump(x, y, rx, ry):
    """A hill of height 1 at the origin, 0 from 2 rx, 2 ry on: about exp(-r^2), at a fifth of the time."""
    x, y = x / (2 * rx), y / (2 * ry)
    return power4(x.mul_(x).addcmul_(y, y))


def ridge(x, width):
    """The same along a line: height 1 where x = 0."""
    x = x / (2 * width)
    return power4(x.mul_(x))


def power4(squares):
    """(1 - squares)^4, 0 from squares = 1 on; in place."""
    return squares.neg_().add_(1).clamp_(min=0).square_().square_()


def mixed(stops, place):
    """Colours (K,3) at places (N,1) in 0..1 along them -> (N,3)."""
    place = place.clamp(0, 1) * (len(stops) - 1)
    first = place.long().clamp(max=len(stops) - 2)
    return blend(stops[first[:, 0]], stops[first[:, 0] + 1], place - first)


class Portrait:
    """A batch in the making. Values per image are (N,1), per pixel (N,P); colours (N,3), images (N,3,P)."""

    def __init__(self, has, generator, size):
        self.has, self.size = has, size
        self.side = size * 3 // 2 if size <= 64 else size
        self.dice = Dice(len(has["Male"]), generator, self.side)
        self.person()
        self.frame()
        self.lamp()

    # ---------------------------------------------------------------------------------- the person, the pose

    def person(self):
        """Proportions, colours, style."""
        dice, has = self.dice, self.has
        uniform, chance, male, child = dice.uniform, dice.chance, has["Male"], has["Child"]
        adult_male = male * (1 - child)
        self.age = 0.45 * (1 - has["Young"]) + 0.4 * has["Senior"] + uniform(0, 0.2) * (1 - child)
        self.width = uniform(1.04, 1.2) + 0.03 * adult_male + 0.07 * child
        self.chin = uniform(1.66, 1.9) + 0.1 * adult_male - 0.2 * child
        self.jaw = uniform(1.9, 2.5) + uniform(0, 0.7) * adult_male  # 2: an ellipse; more: square
        self.top = uniform(-1.2, -0.95)  # of the forehead
        # skin
        pale = has["Pale_Skin"]
        self.skin = mixed(SKIN, blend(uniform(0.12, 1.0), uniform(0, 0.07), pale))
        self.skin = self.skin * (1 + 0.04 * dice.normal(3) * torch.tensor([0.3, 0.6, 1.0]))
        self.skin = blend(self.skin, self.skin * torch.tensor([1.03, 0.9, 0.85]), uniform(0, 1) * (1 - pale))
        # hair
        colours = {name: torch.tensor(ends) for name, ends in HAIR.items()}
        names = [name for name in HAIR if name in has]
        known = sum(has[name] for name in names)
        share, other = uniform(0, 1), chance(0.35)
        made = sum(has[name] * mixed(colours[name], share) for name in names)
        # Where no attribute names a colour: red, or brown for some of the bald.
        spare = blend(mixed(colours["red"], share), mixed(colours["Brown_Hair"], share * 0.5),
                     has["Bald"] * other)
        self.hair = blend(made, spare, (known == 0).float())
        self.hair = self.hair * (1 + 0.025 * dice.normal(3))
        kind = dice.pick("short middle long", (1, 1, 1))
        long_hair = blend(chance(0.78), chance(0.07), male)
        self.long = long_hair * (1 - has["Bald"])
        self.length = kind["short"] * uniform(0.9, 1.5) + (1 - kind["short"]) * uniform(1.6, 4.0)
        curly = chance(0.4) * (1 - has["Straight_Hair"]) * (1 - has["Wavy_Hair"])
        self.curly = curly
        self.volume = blend(uniform(0.03, 0.14), uniform(0.1, 0.26), self.long) + curly * uniform(0.0, 0.35)
        loose = (1 - has["Straight_Hair"]) * (1 - curly)
        self.wave = blend(loose * uniform(0.015, 0.06), uniform(0.08, 0.16), has["Wavy_Hair"])
        # head-wear
        hat = has["Wearing_Hat"]
        form = dice.pick("cap beanie brim", (45, 30, 25))
        said = known + hat + has["Bald"] + has["Bangs"] + has["Straight_Hair"] + has["Wavy_Hair"]
        said = said + has["Receding_Hairline"]
        unsaid = 1 - said.clamp(max=1)
        covered = unsaid * (1 - child) * (1 - has["Wearing_Earrings"]) * chance(0.55)
        self.turban = covered * torch.maximum(male, chance(0.2))
        self.scarf = covered * (1 - self.turban)
        self.hats = {name: hat * form[name] for name in form}
        # expression
        self.smile = has["Smiling"] * uniform(0.65, 1.2) + (1 - has["Smiling"]) * uniform(-0.15, 0.12)
        least, most = uniform(0.09, 0.22), uniform(0.09, 0.16)
        self.open = has["Mouth_Slightly_Open"] * blend(least, most, has["Smiling"])

    def frame(self):
        """Coordinates of every pixel.

        x, y     in the image, which has the side 1, from its middle
        u, v     in distances between the eyes, from the point midway between them
        head     as u, from the middle of the head's outline;  low: as v, with the head's nod
        s, t     on the head, turned with it;  a: |s|
        outline  signed distance to the outline of the head, without hair;  depth: towards the viewer
        """
        dice, side = self.dice, self.side
        uniform = dice.uniform
        axis = (torch.arange(side) + 0.5) / side - 0.5
        self.x, self.y = axis.repeat(side)[None], axis.repeat_interleave(side)[None]
        # distance of the eyes in the image: the whole head, or more often the face alone
        unit = blend(uniform(0.27, 0.36), uniform(0.36, 0.47), dice.chance(0.7))
        angle = 0.07 * dice.normal(1)
        x = (self.x - 0.03 * dice.normal(1)) / unit
        y = (self.y - uniform(-0.2, -0.06)) / unit
        self.pixel = 1 / (unit * side)
        self.u, self.v = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
        yaw = (0.27 * dice.normal(1)).clamp(-0.65, 0.65)
        pitch = (0.1 * dice.normal(1)).clamp(-0.25, 0.25)
        self.turn, self.nod = yaw.sin(), pitch.sin()
        self.head = self.u + 0.85 * self.turn  # x from the middle of the outline; the eyes stay in place
        self.low = self.v + 0.3 * self.nod
        below = (self.v > 0.15).float()
        ry = blend(1.85, self.chin - 0.15, below)
        across = ((self.head / self.width) ** 2).clamp_(max=9)
        down = ((self.low - 0.15) / ry).abs_().clamp_(1e-3, 3)
        rho = across + down ** blend(2.4, self.jaw, below)
        self.outline = (rho.sqrt() - 1) * 1.1  # signed distance to the outline of the head, without hair
        self.depth = 1.05 * (1 - 0.97 * rho).clamp_(min=0).sqrt_()
        self.s = self.head * yaw.cos() - self.depth * self.turn
        self.t = self.low * pitch.cos() - (self.depth - 1.05) * self.nod
        self.a = self.s.abs()

    def lamp(self):
        """Direction, colour and hardness of the light."""
        dice = self.dice
        self.lx, self.ly = 0.7 * dice.normal(1), -0.35 + 0.35 * dice.normal(1)
        self.hard = dice.uniform(0.25, 0.75)
        warm = 0.04 + 0.1 * dice.normal(1)
        self.key = torch.cat([1 + warm, torch.ones_like(warm), 1 - 1.3 * warm], 1)
        bright, dark = dice.uniform(0.82, 1.1), dice.uniform(0.4, 0.85)
        exposure = blend(bright, dark, dice.chance(0.35))
        self.exposure = exposure + 0.2 * (0.6 - self.skin.mean(1, keepdim=True))

    # ------------------------------------------------------------------------------------------------- tools

    def cover(self, distance, soft=0.04):
        """Share of each pixel inside a signed distance, with an edge as wide as `soft` or 1.5 pixels."""
        return (0.5 - distance / torch.clamp(1.5 * self.pixel, min=soft)).clamp_(0, 1)

    def lit(self, nx, ny):
        """Light on a surface whose normal leans by nx, ny (to the right, down)."""
        nz = (1 - (nx * nx + ny * ny)).clamp_(0.02, 1).sqrt_()
        lz = 0.85
        shade = (nx * self.lx + ny * self.ly + nz * lz) / (self.lx**2 + self.ly**2 + lz * lz).sqrt()
        return 1 - self.hard + self.hard * (0.15 + 1.02 * shade.clamp_(min=-0.1))

    def colour(self, saturation=0.6):
        """Any colour, more often a dull one -> (N,3)."""
        hue = self.dice.uniform(0, 1) + torch.tensor([[0.0, 1 / 3, 2 / 3]])
        pure = 0.5 + 0.5 * (2 * math.pi * hue).cos()
        value, strength = self.dice.uniform(0.02, 1.0), saturation * self.dice.uniform(0, 1) ** 1.5
        return value * blend(torch.ones(1, 3), pure, strength)

    def strands(self):
        """Fine lines along the hair: unit variance (N,P)."""
        dice = self.dice
        part = dice.uniform(-0.6, 0.6)
        bend = self.wave * (self.v * dice.uniform(4.0, 6.0) + dice.uniform(0, 6)).sin()
        down = (self.v + 2.3).clamp(min=0.05)
        angle = (self.head + bend - part) / (1.4 + 0.8 * down)
        where = torch.stack([angle.mul_(1.3), self.v.mul(0.45)], -1).view(dice.n, self.side, self.side, 2)
        noise = dice.normal(1, 9, 46)
        fine = F.grid_sample(noise, where, padding_mode="reflection", align_corners=True).flatten(1)
        curls = 0.6 * dice.field(20, 20) + 0.6 * dice.field(11, 11)
        return blend(fine, curls, self.curly)

    # ------------------------------------------------------------------------------------------- the image

    def finished(self):
        """(N,3,size,size) uint8."""
        image = self.background()
        strands = self.strands()
        silhouette, front = self.hair_masks(strands)
        locks = self.hair_tone(strands)  # (N,3,P)
        image = paint(image, locks * 0.62, silhouette * (1 - self.scarf))
        image = self.neck_and_clothes(image)
        image = paint(image, locks * 0.85, self.before_shoulders(silhouette))
        image = paint(image, self.face(front), self.cover(self.outline))
        image = paint(image, locks, front)
        image = self.ears(image)
        image = self.earrings(image)
        image = self.head_wear(image)
        image = self.glasses(image)
        return self.photograph(image)

    def background(self):
        dice = self.dice
        uniform = dice.uniform
        first, second, third = self.colour(0.5), self.colour(0.5), self.colour(0.7)
        angle = uniform(0, 2 * math.pi)
        slope = 0.5 + uniform(0, 1.3) * (self.x * angle.cos() + self.y * angle.sin())
        mix = (slope + uniform(0, 0.35) * dice.field(5, 5)).clamp_(0, 1)
        image = blend(first[..., None], second[..., None], mix[:, None])
        edge = self.x * uniform(-1, 1).sign() - uniform(-0.2, 0.4)  # of a wall, a door
        edge = edge + 0.1 * dice.normal(1) * self.y
        things = blend(dice.field(6, 6) - uniform(0.2, 1.2), -8 * edge, dice.chance(0.4))
        image = paint(image, third, dice.chance(0.7) * smooth(things, -0.5, 0.7) * uniform(0.2, 1))
        return image

    def hair_masks(self, strands):
        """Coverage by all hair, seen from the front without a head; and by hair before the face."""
        dice, has, v = self.dice, self.has, self.v
        uniform = dice.uniform
        wobble = 0.03 * strands + self.wave * 0.8 * (v * uniform(3.5, 5.5) + uniform(0, 6)).sin()
        volume = self.volume + 0.1 * uniform(0, 1) * self.long
        high = 1.42 + volume * uniform(0.8, 1.5)
        across = ((self.head / (self.width + 0.02 + volume)) ** 2).clamp_(max=9)
        down = ((self.low + 0.3) / high).abs_().clamp_(1e-3, 3)
        cap = ((across + down**2.5).sqrt_() - 1) * 1.2 + wobble * 0.6
        ends = blend(uniform(0.05, 0.35), uniform(0.3, 0.8), self.curly)
        cap = torch.maximum(cap, (v - ends) * 0.4)
        spread = self.width + volume * uniform(0.7, 1.5) + uniform(-0.05, 0.22) * (v + 0.3).clamp(-0.4, 2)
        curtain = torch.maximum(self.head.abs() - spread + wobble, v - self.length + 0.15 * strands)
        curtain = torch.maximum(curtain, -0.3 - v) + FAR * (1 - self.long)
        shape = union(cap, curtain) + FAR * has["Bald"]
        silhouette = self.cover(shape, 0.1)
        # the hairline on the forehead, lower at the temples
        style = dice.pick("back side middle", (40, 38, 22))
        temple = uniform(0.84, 0.98) + 0.02 * strands
        line = self.top + blend(0.75, 0.95, self.long) * (self.a / temple) ** 3.5
        sweep = self.s * uniform(-1, 1).sign()
        line = line + style["side"] * (0.28 * sweep + 0.14 * (1 - smooth(sweep, -0.7, -0.2)))
        line = line + style["middle"] * self.long * (0.75 * (self.a**2 + 0.08).sqrt_() - 0.3)
        line = line - has["Receding_Hairline"] * (0.2 + 0.35 * ridge(self.a - 0.55, 0.28))
        fringe = uniform(-0.6, -0.34) + uniform(-0.12, 0.2) * self.s + 0.045 * strands + 0.25 * self.a**4
        line = blend(line, torch.maximum(fringe, line), has["Bangs"])
        line = line + 0.025 * strands
        burns = temple + 0.35 * (self.t + 0.35).clamp(min=0) - self.a
        burns = torch.maximum(burns, self.t - uniform(0.0, 0.5))
        edge = torch.minimum((self.t - line) * 0.8, burns)
        side = uniform(0.9, 1.08) - 0.1 * smooth(v, 0.2, 1.6) + self.wave * (v * 4 + uniform(0, 6)).sin()
        edge = torch.minimum(edge, torch.maximum(side + 0.03 * strands - self.head.abs(), -0.6 - v)
                             + FAR * (1 - self.long * dice.chance(0.85)))
        front = self.cover(torch.maximum(edge, shape), 0.13)
        return silhouette, front * (1 - self.scarf)

    def hair_tone(self, strands):
        dice, v = self.dice, self.v
        nx, ny = self.head / (self.width + self.volume + 0.1), ((self.low + 0.2) / 2.1).clamp(-1, 0.5)
        shade = self.lit(nx * 0.85, ny * 0.75)
        shine = bump(self.head - 0.5 * self.lx, v + 1.3 - 0.25 * self.head**2, 0.9, dice.uniform(0.18, 0.35))
        shine = shine + 0.4 * bump(self.head.abs() - 1.2, v - 0.3, 0.2, 0.5) * self.long
        fleck = (1 + dice.uniform(0.12, 0.3) * (1 - 0.4 * self.curly) * strands).clamp_(min=0.35)
        tone = shade * fleck * (1 - 0.25 * smooth(v, -0.5, 1.6))
        gloss = shine * (0.5 + 0.35 * strands).clamp_(min=0)
        gloss = gloss * dice.uniform(0.03, 0.22) * (1 - 0.7 * self.curly)
        return self.hair[..., None] * tone[:, None] + gloss[:, None] * self.key[..., None]

    def before_shoulders(self, silhouette):
        """Long hair that falls before neck and clothes, at both sides."""
        side = self.head.abs() - self.dice.uniform(0.65, 1.0) - 0.1 * self.wave * (self.v * 4).sin()
        return silhouette * smooth(side, -0.05, 0.15) * self.long * (1 - self.scarf) * self.dice.chance(0.7)

    def neck_and_clothes(self, image):
        dice, u, v = self.dice, self.u + 0.5 * self.turn, self.v
        uniform, chance = dice.uniform, dice.chance
        male = self.has["Male"] * (1 - self.has["Child"])
        neck = uniform(0.64, 0.76) + 0.16 * male - 0.08 * self.has["Child"]
        base = self.chin + uniform(0.0, 0.35)
        flare = 0.35 * (v - base + 0.3).clamp(min=0) ** 1.5
        distance = torch.maximum(u.abs() - neck - flare, self.chin - 0.9 - v)
        under = smooth(v, self.chin - 0.2, self.chin + 0.75)
        shade = self.lit((u / (neck + 0.2)).clamp(-1, 1) * 0.9, 0.1) * blend(0.5, 0.9, under)
        skin = (self.skin * torch.tensor([0.98, 0.94, 0.92]))[..., None] * shade[:, None]
        image = paint(image, skin, self.cover(distance, 0.08))
        # clothes: shoulders that fall to the sides, a round or pointed neckline
        first, second = self.colour(0.8), self.colour(0.8)
        shoulder = v - base - uniform(0.12, 0.3) * (u.abs() - neck).clamp(min=0) ** 1.3
        vee = chance(0.4)
        depth = uniform(0.1, 0.5) + uniform(0.2, 1) * vee
        neckline = blend(ellipse(u, v - base - 0.05, neck + 0.12, depth),
                        u.abs() * 0.8 + (v - base - depth) * 0.6, vee)
        cloth = torch.maximum(-shoulder, -neckline)
        folds = dice.field(7, 7) * 0.06
        tone = self.lit((u / 3).clamp(-0.9, 0.9), -0.2) * (1 + folds)
        stripes = chance(0.2) * (0.5 + 0.5 * (u * uniform(8, 20) + v * uniform(-12, 12)).sin())
        fabric = blend(first[..., None], second[..., None], stripes[:, None]) * tone[:, None]
        image = paint(image, fabric, self.cover(cloth, 0.06))
        collar = torch.maximum((neckline - 0.13).abs() - 0.13, -shoulder)
        image = paint(image, second[..., None] * tone[:, None], self.cover(collar, 0.05) * chance(0.4))
        return image

    def ears(self, image):
        x = self.head.abs() - self.width * 1.03
        y = self.v - 0.22 + 0.3 * self.nod
        ear = torch.maximum(ellipse(x + 0.25 * y, y, 0.15, 0.32), -0.04 - self.outline)
        shade = self.lit((self.head / 1.5).clamp(-0.9, 0.9), 0.0) * (0.82 - 0.4 * bump(x, y, 0.08, 0.2))
        share = (self.cover(ear, 0.06) * (1 - self.scarf)
                 * (1 - torch.maximum(self.long, self.curly) * self.dice.chance(0.8)))
        return paint(image, (self.skin * torch.tensor([1.0, 0.9, 0.87]))[..., None] * shade[:, None], share)

    # ---------------------------------------------------------------------------------------------- the face

    def relief(self):
        """Height of the face above the ellipsoid, in distances of the eyes (N,P)."""
        uniform, a, t, has = self.dice.uniform, self.a, self.t, self.has
        grown = 1 - 0.45 * has["Child"]
        nose = self.s - 0.22 * self.turn * smooth(t, 0.0, 0.7)
        wide = uniform(0.17, 0.24) + 0.02 * has["Male"]
        high = (0.2 * bump(nose, t - 0.64, wide, 0.22) + 0.1 * bump(nose, t - 0.25, wide * 0.9, 0.45)) * grown
        high = high * uniform(0.55, 0.95) + 0.07 * bump(nose.abs() - wide, t - 0.73, 0.1, 0.1)
        high = high - uniform(0.09, 0.16) * bump(a - 0.45, t + 0.06, 0.28, 0.16)
        high = high + (0.03 + 0.05 * has["Male"] * grown) * bump(a - 0.42, t + 0.36, 0.35, 0.11)
        rise = uniform(0.04, 0.1) + 0.07 * self.smile.clamp(min=0)
        high = high + rise * bump(a - 0.6, t - 0.6, 0.26, 0.26)
        high = high + 0.05 * bump(self.s, t - 1.25, 0.3, 0.16) - 0.05 * bump(self.s, t - 1.45, 0.26, 0.07)
        high = high + uniform(0.04, 0.1) * bump(self.s, t - self.chin + 0.22, 0.27, 0.18)
        # age: folds from the nose to the mouth, bags below the eyes, lines on the forehead, all dark as well
        fold = bump(a - 0.25 - 0.33 * (t - 0.72) - 0.06 * self.smile, t - 1.0, 0.06, 0.27)
        bags = bump(a - 0.45, t - 0.25 + 0.25 * (a - 0.45) ** 2, 0.27, 0.05)
        jowl = bump(a - 0.62, t - 1.42, 0.07, 0.2)
        lines = (t * uniform(26, 34) + 1.5 * self.s**2 + uniform(0, 6)).sin()
        lines = lines * bump(self.s, t + 0.72, 0.6, 0.24)
        lines = lines * (self.age - 0.3).clamp(min=0)
        high = high - (0.012 + 0.03 * self.smile.clamp(min=0) + 0.05 * self.age) * fold
        high = high - self.age * (0.05 * bags + 0.03 * jowl) + 0.014 * lines
        creases = self.age * (0.3 * fold + 0.35 * bags + 0.1 * jowl) + 0.12 * lines.clamp(min=0)
        return high, nose, wide, creases

    def shading(self, high):
        """Light on the head from its slopes; and gloss."""
        surface = (0.8 * self.depth + high).view(-1, self.side, self.side)
        step = 2 * self.pixel
        nx = F.pad(surface[:, :, :-2] - surface[:, :, 2:], (1, 1)).flatten(1) / step
        ny = F.pad(surface[:, :-2] - surface[:, 2:], (0, 0, 1, 1)).flatten(1) / step
        length = (1 + nx * nx + ny * ny).sqrt_()
        nx, ny = nx / length, ny / length
        shade = self.lit(nx, ny)
        mirror = bump(nx - 0.5 * self.lx, ny - 0.45 * self.ly, 0.3, 0.3)
        return shade, mirror

    def face(self, front):
        dice, s, t, a = self.dice, self.s, self.t, self.a
        uniform = dice.uniform
        high, nose, wide, creases = self.relief()
        shade, mirror = self.shading(high)
        blotch = 1 + dice.field(11, 11) * (0.012 + 0.035 * self.age * uniform(0.3, 1))
        red = 0.5 * bump(a - 0.62, t - 0.62, 0.3, 0.25) + 0.35 * bump(nose, t - 0.68, 0.2, 0.15)
        red = red * uniform(0.2, 1) + 0.3 * bump(a - 0.5, t, 0.3, 0.12)
        tint = torch.tensor([0.02, -0.16, -0.15])
        skin = self.skin[..., None] * blotch[:, None] * (1 + tint[:, None] * red[:, None])
        skin = self.beard(skin)
        skin = self.mouth(skin)
        # what lies deep is dark: sockets, beside and below the nose, under the lip
        deep = uniform(0.1, 0.32) * bump(a - 0.42, t + 0.07, 0.3, 0.15)
        deep = deep + uniform(0.15, 0.35) * bump(nose, t - 0.87, wide * 1.2, 0.07)
        deep = deep + 0.15 * bump(nose.abs() - wide * 1.35, t - 0.74, 0.05, 0.1)
        deep = deep + uniform(0.1, 0.25) * bump(s, t - 1.47, 0.2, 0.06)
        deep = deep + creases
        nostril = bump(nose.abs() - wide * 0.6, t - 0.81, 0.06, 0.035)
        skin = skin * (1 - deep - uniform(0.3, 0.7) * nostril).clamp_(min=0.1)[:, None]
        skin = self.eyes(skin)
        skin = self.brows(skin)
        above = front.view(-1, 1, self.side, self.side)
        above = F.avg_pool2d(above, 7, 1, 3, count_include_pad=False).flatten(1)
        shade = shade * (1 - 0.45 * above)
        # light that went through skin is red: the dark side is warmer
        warm = torch.tensor([0.06, 0.0, -0.03])[:, None] * (1 - shade).clamp(0, 1)[:, None]
        gloss = (mirror * uniform(0.02, 0.17))[:, None] * self.key[..., None]
        return skin * (shade[:, None] + warm) + gloss

    def eyes(self, skin):
        dice, has = self.dice, self.has
        uniform = dice.uniform
        large = uniform(0.235, 0.275) + 0.02 * has["Child"] - 0.01 * has["Male"]
        upper = uniform(0.085, 0.13) + 0.02 * has["Child"] - 0.035 * self.age
        lower = uniform(0.05, 0.08) - 0.03 * self.smile.clamp(min=0)
        e = self.a - 0.5
        f = self.t + uniform(-0.08, 0.16) * e  # outer corners up or down
        q = 1 - (e / large) ** 2
        lid, floor = f + upper * q, f - lower * q
        inside = self.cover(torch.maximum(-lid, floor), 0.035)
        white = blend(torch.ones(1, 3), self.skin, 0.3) * uniform(0.72, 0.95)
        white = white[..., None] * (0.78 + 0.22 * smooth(lid, 0.0, 0.1))[:, None]
        iris = mixed(IRIS, blend(uniform(0, 0.35), uniform(0.3, 1), dice.chance(0.3)))
        gaze = 0.03 * dice.normal(1) * self.s.sign()
        ball = ((e - gaze) ** 2 + (f + 0.015) ** 2).sqrt()
        eye = paint(white, iris, self.cover(ball - uniform(0.105, 0.13), 0.04))
        eye = paint(eye, torch.full((1, 3, 1), 0.02), self.cover(ball - 0.05, 0.04))
        spark = bump(self.s.sign() * (e - gaze) - 0.04 * self.lx.sign(), f + 0.06, 0.028, 0.028)
        eye = eye + (uniform(0.2, 0.9) * spark)[:, None]
        made_up = has["Wearing_Lipstick"] * uniform(0.2, 1)
        shadow = bump(e, f + upper + 0.06, 0.28, 0.08)
        tone = blend(self.skin * 0.6, self.colour(0.5), 0.25)[..., None]
        skin = paint(skin, tone, 0.6 * made_up * shadow)
        skin = paint(skin, eye, inside)
        # lashes and lids
        near = smooth(large * 1.12 - e.abs(), 0, 0.08)
        thick = 0.022 + 0.018 * made_up + 0.008 * (1 - has["Male"])
        lash = ridge(lid, thick) * near * (0.65 + 0.3 * made_up)
        crease = ridge(lid + uniform(0.06, 0.11), 0.025) * near * uniform(0, 0.4)
        line = ridge(floor, 0.025) * near * (0.25 + 0.3 * made_up)
        dark = 1 - (lash + crease + line).clamp_(max=0.95)
        return skin * dark[:, None]

    def brows(self, skin):
        dice, has = self.dice, self.has
        uniform, bushy = dice.uniform, has["Bushy_Eyebrows"]
        man = has["Male"] * (1 - has["Child"])
        e = self.a - 0.5
        y = uniform(-0.42, -0.34) + 0.05 * man - 0.03 * self.smile + 0.03 * bushy
        arch = uniform(0.02, 0.1) * (1 - 0.5 * man)
        curve = y - arch * (1 - ((e - 0.06) / 0.34) ** 2) + uniform(-0.05, 0.12) * e
        thick = uniform(0.028, 0.045) + 0.018 * man + 0.04 * bushy - 0.008 * has["Child"]
        taper = (1 - 0.5 * smooth(e, 0.0, 0.4)) * smooth(0.38 - e.abs(), 0, 0.12)
        brow = ridge(self.t - curve, thick * taper.clamp(min=0.3)) * smooth(taper, 0, 0.25)
        fair = blend(uniform(0.2, 0.6), uniform(0, 0.3), has["Gray_Hair"])
        colour = blend(self.hair * 0.6, self.skin * 0.3, fair)
        strength = blend(uniform(0.45, 0.8), uniform(0.85, 0.98), bushy) - 0.15 * has["Child"]
        return paint(skin, colour, brow * strength)

    def mouth(self, skin):
        dice, has, s = self.dice, self.has, self.s - 0.1 * self.turn
        uniform, smile, red = dice.uniform, self.smile, has["Wearing_Lipstick"]
        half = uniform(0.34, 0.42) + 0.1 * smile - 0.03 * has["Child"]
        m = (1 - (s / half) ** 2).clamp(-0.3, 1)
        place = uniform(1.12, 1.22) - 0.1 * has["Child"] + 0.01 * has["Male"]
        q = self.t - place - 0.12 * smile * (m - 0.35) + 0.02 * (3 * s).sin() * dice.normal(1)
        gap = self.open * m.clamp(min=0)
        full = uniform(0.75, 1.2) + 0.15 * (1 - has["Male"]) - 0.15 * smile
        upper = 0.085 * full * m * (1 - 0.25 * ridge(s, 0.07)) + 0.25 * gap
        lower = 0.115 * full * m + gap
        lips = self.cover(torch.maximum(-upper - q, q - lower), 0.05)
        natural = self.skin * torch.cat([uniform(0.8, 0.95), uniform(0.52, 0.7), uniform(0.55, 0.75)], 1)
        stick = torch.cat([uniform(0.5, 0.85), uniform(0.06, 0.32), uniform(0.12, 0.4)], 1)
        tone = blend(natural, blend(natural, stick, uniform(0.65, 1)), red)
        light = 0.84 + 0.3 * smooth(q, 0, 0.1) - 0.18 * smooth(q, 0.1, 0.24)
        strength = blend(uniform(0.45, 0.85), uniform(0.9, 1), red)
        skin = paint(skin, tone[..., None] * light[:, None], lips * strength)
        shine = bump(s + 0.05, q - lower * 0.6, 0.12, 0.025) * red * uniform(0, 0.35)
        skin = skin + shine[:, None]
        # open: teeth, and the dark below them; closed: a line
        line = ridge(q - 0.3 * gap, 0.022) * smooth(m, 0, 0.25) * (1 - has["Mouth_Slightly_Open"])
        corner = bump(s.abs() - half, q, 0.06, 0.05) * (0.25 + 0.25 * smile.clamp(min=0))
        skin = skin * (1 - uniform(0.4, 0.75) * line - corner)[:, None]
        inner = self.cover(torch.maximum(-0.2 * gap - q, q - gap * 0.85) + FAR * (gap < 0.01), 0.035)
        dark = self.skin * torch.tensor([0.24, 0.1, 0.09])
        skin = paint(skin, dark, inner * 0.95)
        shown = blend(uniform(0, 0.6), uniform(0.7, 1.0), has["Smiling"])
        teeth = self.cover(torch.maximum(-0.17 * gap - q, q - gap * shown * 0.8) + FAR * (gap < 0.01), 0.035)
        ivory = torch.tensor([0.97, 0.95, 0.9]) * uniform(0.8, 1.0)
        teeth = teeth * smooth(m, 0.0, 0.35) * (0.3 + 0.65 * has["Smiling"])
        return paint(skin, ivory, teeth)

    def beard(self, skin):
        dice, has, t, a = self.dice, self.has, self.t, self.a
        uniform = dice.uniform
        man = has["Male"] * (1 - has["Child"])
        smile = self.smile
        grain = 1 + 0.08 * dice.field(self.side // 2, self.side // 2)
        lip = t - 1.0 + 0.02 * smile - 0.2 * a**2 * (1 - smile)  # between nose and mouth
        mustache = ridge(lip, uniform(0.06, 0.085)) * smooth(uniform(0.42, 0.58) - a, 0, 0.15)
        chin = smooth(t, 1.36, 1.5) * smooth(uniform(0.36, 0.5) - a, 0, 0.16)
        ring = (smooth(uniform(0.5, 0.62) - a, 0, 0.1) * smooth(a, 0.36, 0.46) * smooth(t, 0.98, 1.1)
                * (1 - smooth(t, 1.5, 1.7)) * has["Mustache"] * dice.chance(0.6))
        goatee = torch.maximum(chin, ring)
        cheek = uniform(0.7, 1.0) - 0.75 * (a - 0.55).clamp(min=0) + 0.45 * (0.75 - a).clamp(min=0)
        full = smooth(t - cheek, -0.05, 0.25) * smooth(t + 1.2 * a, 1.35, 1.55)
        any_beard = (1 - has["No_Beard"]) * man
        rest = any_beard * (1 - has["Goatee"]) * (1 - torch.minimum(has["Mustache"], dice.chance(0.4)))
        cover = torch.maximum(has["Mustache"] * mustache, has["Goatee"] * goatee)
        cover = torch.maximum(cover, rest * full)
        cover = cover * blend(uniform(0.6, 0.9), uniform(0.75, 0.95), has["Mustache"])
        stubble = man * (1 - any_beard) * uniform(0, 0.3) * torch.maximum(full, 0.7 * mustache)
        cover = (cover * grain).clamp_(0, 0.97)
        grey = torch.ones(1, 3) * uniform(0.3, 0.8)
        hair = blend(self.hair, grey, (self.age - 0.4).clamp(min=0) * uniform(0, 1))
        skin = paint(skin, self.skin * torch.tensor([0.55, 0.56, 0.6]), stubble)
        tone = 0.9 * grain + 0.1
        return paint(skin, hair[..., None] * tone[:, None], cover)

    # ------------------------------------------------------------------------------------------ what is worn

    def earrings(self, image):
        dice = self.dice
        y = self.v - 0.62 + 0.3 * self.nod
        x = self.head.abs() - self.width * 1.02 - 0.03
        drop = dice.uniform(0.0, 0.35)
        stud = ellipse(x, y - drop * 0.5, 0.075, 0.085 + drop * 0.5)
        metal = blend(torch.full((1, 3), 0.93), self.colour(0.9), dice.chance(0.3))
        metal = blend(torch.tensor([[0.95, 0.8, 0.4]]), metal, dice.chance(0.5))  # gold
        tone = metal[..., None] * (0.7 + 0.5 * bump(x + 0.02, y, 0.05, 0.05))[:, None]
        return paint(image, tone, self.cover(stud, 0.04) * self.has["Wearing_Earrings"] * (1 - self.scarf))

    def head_wear(self, image):
        dice, x, v, hats = self.dice, self.head, self.v, self.hats
        uniform = dice.uniform
        first, second = self.colour(0.8), self.colour(0.8)
        weave = dice.field(self.side // 2, self.side // 2) * 0.03 + dice.field(8, 8) * 0.06
        shade = self.lit((x / 1.6).clamp(-0.9, 0.9), ((v + 0.7) / 1.8).clamp(-0.9, 0.4)) * (1 + weave)
        ribs = 1 + 0.12 * hats["beanie"] * (x * uniform(9, 15)).sin()
        folds = v * uniform(3, 5) + x * uniform(2, 4) * (x.sign() + uniform(-0.3, 0.3))
        folds = (folds + uniform(0, 6)).sin()
        shade = shade * ribs * (1 + 0.14 * (self.turban + self.scarf * 0.5) * folds)
        cloth = first[..., None] * shade[:, None]
        brim = uniform(-0.95, -0.68) + 0.12 * self.s * dice.normal(1) - 0.12 * self.nod
        arched = brim - 0.18 * (1 - self.s**2) * (hats["cap"] + self.turban) + 0.06 * self.s**2
        puff = uniform(0.05, 0.2) + 0.25 * self.turban
        crown = ellipse(x, v + 0.5, self.width + 0.12 + puff - 0.12 * hats["brim"],
                        1.45 + puff + 0.2 * hats["brim"])
        crown = torch.maximum(crown, v - arched)
        worn = (hats["cap"] + hats["beanie"] + hats["brim"] + self.turban).clamp(max=1)
        # its shadow on the forehead
        shadow = 0.45 * worn * smooth(arched + 0.45 - v, 0, 0.4) * self.cover(self.outline, 0.2)
        image = image * (1 - shadow)[:, None]
        image = paint(image, cloth, self.cover(crown, 0.06) * worn)
        band = torch.maximum((v - arched + 0.14).abs() - 0.13, crown)
        trim = blend(first * 0.7, second, dice.chance(0.4))[..., None] * shade[:, None]
        image = paint(image, trim, self.cover(band, 0.05) * (hats["beanie"] + hats["brim"]).clamp(max=1))
        visor = ellipse(self.s - 0.15 * self.turn, v - brim - 0.02, self.width * 0.92, uniform(0.14, 0.26))
        visor = torch.maximum(visor, v - brim - 0.2 + 0.2 * self.s**2) + FAR * (1 - hats["cap"])
        low = v - brim + 0.12 - 0.12 * x * x * 0.3
        wide = ellipse(x, low, self.width * uniform(1.5, 1.9), uniform(0.14, 0.24))
        rim = union(visor, wide + FAR * (1 - hats["brim"]))
        light = blend(0.65, 1.05, smooth(brim - v, -0.15, 0.15))
        tone = blend(first, second, 0.5 * hats["cap"])[..., None] * light[:, None]
        image = paint(image, tone, self.cover(rim, 0.05))
        # a scarf over the hair, around the face, down to the shoulders
        frame = ellipse(self.s, self.t - 0.28, uniform(0.94, 1.04), uniform(1.2, 1.34) + 0.15)
        drape = union(ellipse(x, v + 0.1, self.width + uniform(0.12, 0.3), 1.95),
                      torch.maximum(x.abs() - self.width - 0.1 - 0.5 * (v - 0.8).clamp(min=0), 0.2 - v))
        drape = torch.maximum(drape, -frame)
        inner = 1 - 0.35 * ridge(frame, 0.12)
        return paint(image, cloth * inner[:, None], self.cover(drape, 0.06) * self.scarf)

    def glasses(self, image):
        dice, has = self.dice, self.has
        uniform = dice.uniform
        worn, sun = has["Eyeglasses"], dice.chance(0.22)
        rx, ry = uniform(0.34, 0.41), uniform(0.2, 0.32)
        e, f = self.a - 0.49, self.t - uniform(0.02, 0.07)
        power = uniform(2, 4.5)
        ring = ((e / rx).abs() ** power + (f / ry).abs() ** power + 1e-6) ** (1 / power) - 1
        ring = ring * torch.minimum(rx, ry)
        thick = blend(uniform(0.016, 0.03), uniform(0.035, 0.06), dice.chance(0.5))
        bridge = torch.maximum((f + 0.06 - 0.1 * self.a).abs() - thick, self.a - 0.5 + rx)
        temple = torch.maximum((self.v + 0.05 + 0.3 * self.nod).abs() - thick, 0.5 + rx - self.a)
        temple = torch.maximum(temple, self.head.abs() - self.width - 0.03)
        frames = union(ring.abs() - thick, bridge, temple + FAR * dice.chance(0.2))
        metal = blend(torch.full((1, 3), 0.06), self.colour(0.8), dice.chance(0.35) * uniform(0.3, 1))
        lens = self.cover(ring, 0.04)
        dark = blend(torch.full((1, 3), 0.05), self.colour(0.6) * 0.3, 0.5)
        shine = ridge(e + 0.8 * f * self.s.sign() - uniform(-0.2, 0.2), 0.1) * uniform(0, 1) ** 2
        image = paint(image, dark, lens * worn * sun * uniform(0.8, 0.97))
        image = paint(image, torch.ones(1, 3, 1), lens * worn * (0.04 + 0.35 * shine))
        return paint(image, metal, self.cover(frames, 0.03) * worn * uniform(0.75, 1))

    # ---------------------------------------------------------------------------------------- the photograph

    def photograph(self, image):
        """Light, focus, grain and colour of the whole image; made small."""
        dice, has = self.dice, self.has
        uniform = dice.uniform
        image = image * (self.key * self.exposure)[..., None]
        angle = uniform(0, 2 * math.pi)
        fall = 1 + uniform(0, 0.35) * (self.x * angle.cos() + self.y * angle.sin())
        image = (image * fall[:, None]).clamp_(0, 1)
        gray = (image * torch.tensor([0.3, 0.59, 0.11])[:, None]).sum(1, keepdim=True)
        faded = has["Grayscale"] + (1 - has["Grayscale"]) * uniform(-0.05, 0.25)
        image = blend(image, gray, faded[..., None])
        image = image.view(-1, 3, self.side, self.side)
        if self.side > self.size:
            image = F.interpolate(image, (self.size, self.size), mode="bilinear", antialias=True)
        soft = image
        for _ in range(max(1, self.size // 32)):
            soft = blurred(soft)
        focus = blend(uniform(-0.35, 0.6), uniform(1.2, 1.5), has["Blurry"])
        image = blend(image, soft, focus.clamp(max=1)[..., None, None])
        image = blend(image, blurred(soft, 5), (focus - 1).clamp(min=0)[..., None, None])
        image = image + 0.012 * uniform(0, 1)[..., None, None] * dice.normal(3, self.size, self.size)
        image = image.clamp_(1e-4, 1) ** uniform(0.8, 1.15)[..., None, None]
        return (255 * image.clamp_(0, 1)).round().to(torch.uint8)


@dataset("portraits", "faces in colour with CelebA's attributes, drawn by a program at any size",
         role="public", channels=3, side=0, n=60_000, drawn=True,
         facts=lambda ask: {"attributes": ATTRIBUTES, "classes": classes_of(ask)})
def load_portraits(ask):
    classes = classes_of(ask)
    generator = torch.Generator().manual_seed(ask.seed)
    attributes = people(ask.n, generator)
    labels = attributes[ask.label_attribute].long()
    images = draw(attributes, generator, ask.size)
    return ImageSet(images, labels, classes, None, attributes)


def classes_of(ask):
    return attribute_classes(ask.label_attribute, ATTRIBUTES, "the set portraits")
