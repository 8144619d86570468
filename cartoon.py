"""Cartoon faces as labelled polygons: who a person is, and what there is to paint, back to front.

python synth.py                                        # a dataset of such faces
python -c "import synth; synth.draw_face(7)[0].show()" # one of them

Polygons stand in face coordinates: pixels of a 512 px portrait, origin between eyes and mouth, x to the image's
right, so that the person's left is positive, y down.
"""

from types import SimpleNamespace

import numpy as np

from labels import NAMES

ID = {name: label for label, name in enumerate(NAMES)}
LOW = 280  # a y below the picture's lower edge in every pose

SKINS = np.array([(250, 222, 202), (238, 196, 168), (222, 170, 132), (190, 134, 94), (142, 92, 62), (88, 56, 42)])
HAIRS = np.array([(24, 20, 22), (48, 32, 26), (84, 54, 36), (122, 80, 48), (150, 72, 40), (196, 152, 92),
                  (226, 200, 150), (150, 148, 148), (214, 212, 210)])  # fmt: skip
IRISES = np.array([(70, 44, 28), (96, 64, 36), (80, 104, 64), (80, 120, 160), (110, 124, 130)])
METALS = np.array([(212, 176, 84), (200, 204, 210), (236, 230, 222), (40, 110, 130), (176, 40, 60)])


def curve(points, closed=True, steps=5):
    """Catmull-Rom spline through `points` (n, 2)."""
    p = np.asarray(points, float)
    p = np.concatenate([p[-1:], p, p[:2]] if closed else [p[:1], p, p[-1:]])
    a, b, c, d = (p[i : len(p) - 3 + i, None] for i in range(4))
    t = np.linspace(0, 1, steps, endpoint=False)[:, None]
    spline = b + t / 2 * (c - a + t * (2 * a - 5 * b + 4 * c - d + t * (3 * (b - c) + d - a)))
    return np.concatenate([spline.reshape(-1, 2), p[:0] if closed else p[-1:]])


def ellipse(x, y, rx, ry, power=2.0):
    """Superellipse: an ellipse at power 2, nearer to a rectangle above."""
    t = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    cos, sin = (np.sign(v) * abs(v) ** (2 / power) for v in (np.cos(t), np.sin(t)))
    return np.stack([x + rx * cos, y + ry * sin], 1)


def ribbon(points, width):
    """A line as a polygon; the width is a number, or one for each point."""
    p = np.asarray(points, float)
    along = np.gradient(p, axis=0)
    normal = along[:, ::-1] * (-1, 1) / (np.linalg.norm(along, axis=1, keepdims=True) + 1e-9)
    side = np.broadcast_to(width, len(p))[:, None] / 2 * normal
    return np.concatenate([p + side, (p - side)[::-1]])


def symmetric(half):
    """A half contour at positive x, from top to bottom or back, joined with its mirror image."""
    half = np.asarray(half, float)
    return np.concatenate([half, half[half[:, 0] > 0][::-1] * (-1, 1)])


def rgba(colour, gain=1.0, alpha=255):
    """Any colour times `gain` as (R, G, B, alpha) of whole numbers from 0 to 255."""
    return *(max(0, min(255, int(value * gain))) for value in colour), int(alpha)


def draw_person(rng):
    """What the parts of a person must agree on, at the rates of CelebAMask-HQ (Lee et al., arXiv 1907.11922)."""
    who = SimpleNamespace(hat=rng.random() < 0.053, glasses=rng.choice(["", "clear", "sun"], p=[0.942, 0.036, 0.022]))
    who.style = rng.choice(["bald", "short", "bob", "long"], p=[0.015, 0.335, 0.14, 0.51])
    if who.hat and rng.random() < 0.3:
        who.style = "bald"
    who.hairy, who.short = who.style != "bald", who.style in ("bald", "short")
    who.makeup, who.ringed = (rng.random(2) < ((0, 0.05) if who.short else (0.6, 0.36))).tolist()
    who.end = LOW if who.style == "long" else rng.uniform(110, 200)  # y of the tips of long hair
    who.wide = 142 + (rng.uniform(6, 34) if who.short or who.hat else rng.uniform(20, 110))  # half of the hair's width
    who.top = -240 if who.hat else -100 - who.wide - rng.uniform(0, 60)
    who.curl = rng.uniform(4, 7 if who.short else 11) if rng.random() < 0.4 else rng.uniform(0, 3)
    tone = rng.random() ** 1.4 * (len(SKINS) - 1)
    who.skin = np.array([np.interp(tone, range(len(SKINS)), channel) for channel in SKINS.T]) + rng.normal(0, 4, 3)
    hair = rng.choice(HAIRS, p=[0.24, 0.22, 0.18, 0.11, 0.04, 0.09, 0.06, 0.04, 0.02])
    who.hair = rng.uniform(40, 230, 3) if rng.random() < 0.03 else hair * rng.uniform(0.8, 1.25)
    who.yaw = np.clip(rng.normal(0, 0.27), -0.6, 0.6)  # radians, positive to the image's right
    return who


def soft(colour, alpha, depth, x, y, rx, ry):
    """A shade without a hard edge, of the given alpha at its centre."""
    layer, unit = rgba(colour, 1, alpha / 6), ellipse(0, 0, rx, ry)
    for scale in (1, 0.87, 0.74, 0.61, 0.48, 0.35):
        yield None, depth, layer, unit * scale + (x, y)


def hair_behind(rng, who):
    """The hair behind head and shoulders, or on the scalp."""
    depth, half = -30, [(0, who.top + 30), (84, who.top + 45), (136, -190), (144, -60), (0, -40)]
    if not who.short:
        depth, low = -100, who.wide * rng.uniform(0.8, 1.2)
        half = [(0, who.top), (who.wide * 0.65, who.top + 28), (who.wide, -90), (who.wide + 4, 40)]
        half += [(low, who.end - 30), (low * 0.8, who.end)]
    outline = curve(symmetric(half), steps=3)
    yield ID["hair"], depth, rgba(who.hair, 0.75), curve(outline + rng.normal(0, who.curl, outline.shape), steps=3)


def body(rng, who):
    """Shoulders, clothes, neck and necklace."""
    skin, wide, slope = rgba(who.skin, 0.92), rng.uniform(84, 112) - 8 * (not who.short), rng.uniform(142, 196)
    dressed, colour = rng.random() < 0.6, rgba(rng.uniform(15, 240) + rng.normal(0, 45, 3))
    shoulder = curve([(0, slope - 40), (wide, slope - 22), (wide + 70, slope + 12), (300, slope + 60)], False)
    if dressed or rng.random() < 0.35:
        label, paint = (ID["cloth"], colour) if dressed else (ID["neck"], skin)
        yield label, -90, paint, symmetric([*shoulder, (320, LOW)])
    yield ID["neck"], -80, skin, symmetric([(0, 60), (wide - 8, 60), (wide, slope - 20), (wide + 8, LOW)])
    yield from soft((30, 12, 10), 150, -70, 0, 140, wide, 74)
    if dressed:
        low = [(0, 212), (wide * 0.5, 206), (wide - 4, slope + 12)]
        low = low if rng.random() < 0.6 else [(0, 250), (wide * 0.6, slope + 32)]
        edge = curve([*low, (wide + 14, slope - 24)], False)
        yield ID["cloth"], -80, colour, symmetric([*edge, (wide + 70, slope + 14), (wide + 70, LOW)])
        yield None, -80, rgba(colour[:3], 0.55, 140), ribbon([*(edge[::-1] * (-1, 1)), *edge], 5)
    if rng.random() < 0.045:
        beads = rng.uniform(2, 5) * (1 - 0.5 * (np.arange(36) % 4 == 0))
        loop = [(-wide, slope - 25), (-wide * 0.6, 185), (0, 210), (wide * 0.6, 185), (wide, slope - 25)]
        yield ID["neck_l"], -75, rgba(rng.choice(METALS)), ribbon(curve(loop, False, 9)[:36], beads)


def head(rng, who):
    """Ears, the skin with its shades and a beard, the nose."""
    size, ear = rng.normal(1, 0.1), curve([(-46, -34), (8, -48), (22, -30), (20, 8), (6, 42), (-42, 30)])
    for side, label in ((-1, "r_ear"), (1, "l_ear")):
        yield ID[label], -80, rgba(who.skin, 0.93), (ear * size + (146, 2)) * (side, 1)
        yield None, -80, rgba(who.skin, 0.6, 170), ribbon((ear[4:19] * size * 0.62 + (148, -2)) * (side, 1), 5)
    cheek, jaw, chin = rng.normal(141, 4), rng.normal(1, 0.06), rng.normal(178, 6)
    lower = [(cheek, 5), (cheek * jaw - 13, 72), (95 * jaw, 128), (48 * jaw, chin - 11), (0, chin)]
    upper = [(0, -222), (72, -208), (cheek - 20, -150), (cheek - 1, -68)]
    yield ID["skin"], -30, rgba(who.skin), curve(symmetric(upper + lower))
    if who.short and rng.random() < 0.35:
        beard = curve(symmetric([(0, 60), (58, 66), (cheek - 8, 10), *lower[1:]]))
        yield None, -30, rgba(who.hair, 0.8, rng.uniform(30, 200)), beard
        yield from soft(who.skin, 255, 0, 0, 98, 60, 30)
    blush, wide, tip = rng.uniform(0, 80), rng.normal(41, 4), rng.normal(55, 4)
    for side in (-1, 1):
        yield from soft((225, 70, 70), blush, -15, side * 76, 42, 46, 36)
        yield from soft((60, 25, 15), 70, 0, side * 56, -54, 48, 34)
    nose = curve(symmetric([(0, -49), (11, -46), (15, -10), (23, 16), (wide, 34), (wide - 9, tip - 5), (0, tip)]))
    yield None, 8, (40, 15, 10, 50), nose + (rng.choice([-5, 5]), 5)
    yield ID["nose"], 15, rgba(who.skin, 1.03), nose
    yield None, 25, (255, 250, 240, 40), ribbon([(0, -38), (0, 0), (0, 30)], [8, 10, 18])
    for side in (-1, 1):
        yield None, 20, rgba(who.skin, 0.4, 200), ellipse(side * wide * 0.45, tip - 9, 8, 4)


def eyes(rng, who):
    """Eyes with lids, and brows."""
    wide, slant, gaze, iris = rng.normal(25, 1.5), rng.normal(2, 3), rng.normal(0, 3), rng.choice(IRISES)
    thick, arch, lift = rng.uniform(8, 20), rng.uniform(2, 13), rng.normal(0, 5)
    x = np.linspace(-1, 1, 16)
    bow, lash = 1 - x**2, rng.uniform(1, 5)
    upper, lower = -rng.uniform(6, 13) * bow**0.8, rng.uniform(5, 9) * bow
    for side, eye, brow in ((-1, "r_eye", "r_brow"), (1, "l_eye", "l_brow")):
        lid, bag = (np.stack([side * 61 + x * wide, y - 45 - side * x * slant], 1) for y in (upper, lower))
        yield ID[eye], 0, (238, 234, 230, 255), np.concatenate([lid, bag[::-1]])
        for dx, dy, radius, colour in ((0, 0, 10.5, iris), (0, 0, 4.6, (12, 10, 10)), (-4, -3, 2, (255, 255, 255))):
            disc = ellipse(side * 61 + gaze + dx, dy - 47, radius, radius)
            disc[:, 1] = disc[:, 1].clip(np.interp(disc[:, 0], *lid.T), np.interp(disc[:, 0], *bag.T))
            yield None, 0, rgba(colour), disc
        yield None, 0, (30, 18, 16, 230), ribbon(lid, 2 + lash * bow)
        line = np.stack([side * (64 + 41 * x), lift - 77 - arch * np.sin((x + 1) * 1.9) - 3 * x], 1)
        yield ID[brow], 0, rgba(who.hair, 0.65, 225), ribbon(line, thick * (1.06 - x.clip(0) ** 1.5))


def mouth(rng, who):
    """Lips and, between them, the inside of the mouth with teeth."""
    x, gap = np.linspace(-1, 1, 24), rng.uniform(3, 32) * (rng.random() < 0.58)
    wide, bow, smile = rng.uniform(46, 62), 1 - x**2, rng.uniform(-3, 16) + 5 * (gap > 0)
    middle = 93 - gap * 0.4 - smile * x**2
    floor = middle + gap * bow
    top = middle - rng.uniform(9, 18) * bow**0.6 + 4 * np.exp(-((x / 0.18) ** 2))
    bottom = floor + rng.uniform(14, 27) * bow**0.7
    red = rng.uniform(0.5, 1) if who.makeup else rng.uniform(0.2, 0.45)
    lips = (1 - red) * who.skin + red * rng.uniform(0.6, 1.1) * np.array([200, 60, 70])
    for label, colour, above, below in (
        (ID["u_lip"], rgba(lips, 0.88), top, middle),
        (ID["l_lip"], rgba(lips), floor, bottom),
        (None, rgba(lips, 0.4, 200), middle - 1, middle + 1),
        (ID["mouth"] if gap else None, (70, 22, 24, 255), middle, floor),
        (None, (236, 230, 220, 255), middle, middle + rng.uniform(0, 0.95) * (floor - middle)),
    ):
        yield label, 8, colour, np.stack([np.append(x, x[::-1]) * wide, np.append(above, below[::-1])], 1)


def glasses(rng, who):
    """Lenses, frame and temples: one label."""
    frame = rgba(rng.uniform(0, 90, 3) if rng.random() < 0.7 else rng.choice(METALS))
    tint = rgba(rng.uniform(10, 70, 3), 1, 242) if who.glasses == "sun" else rgba(rng.uniform(150, 240, 3), 1, 60)
    rx, ry, power, thick = rng.uniform(46, 56), rng.uniform(28, 44), rng.uniform(2, 4), rng.uniform(4, 9)
    yield ID["eye_g"], 15, frame, ribbon([(-20, -46), (0, -51), (20, -46)], thick)
    for side in (-1, 1):
        lens = ellipse(side * 63, -38, rx, ry, power)
        yield ID["eye_g"], 10, tint, lens
        yield ID["eye_g"], 10, frame, ribbon([*lens, *lens[:2]], thick)
        yield ID["eye_g"], -20, frame, ribbon([(side * (59 + rx), -50), (side * 142, -48)], thick)
        yield None, 10, (255, 255, 255, 50), ribbon([(side * 62 - 18, -22), (side * 62 + 4, -58)], 9)


def hair_in_front(rng, who):
    """One outline: along the hairline, down one side and up outside of it, over the top, down and up the other."""
    t, part, cut = np.linspace(-0.9, 0.9, 15), rng.uniform(-0.6, 0.6), rng.random()
    line = rng.uniform(-198, -166) + rng.uniform(5, 50) * abs(t - part) ** 1.5 + rng.normal(0, 1.5, 15)
    if cut < 0.2:  # a fringe, down to the brows or over them
        line = rng.uniform(-125, -76) + rng.uniform(-18, 8) * t**2 + rng.normal(0, 7, 15)
    elif who.short and cut < 0.4:  # a receding hairline
        line = -203 + 24 * np.cos(t * 7) * (abs(t) < 0.5)
    sides = []
    for side in (-1, 1):
        edge = rng.uniform(104, 130)
        path = [(136, -90), (134, -62 + rng.uniform(0, 40)), (148, -50), (who.wide + 2, -95)]
        if not who.short and rng.random() < 0.8:  # over the ear
            path = [(edge + 4, -70), (edge + 3, 0), (edge, 80), (edge + 14, who.end), (who.wide + 8, who.end)]
        path += [(who.wide, -110), (who.wide * 0.84, who.top * 0.75), (who.wide * 0.5, who.top + 14)]
        sides.append(np.array(path) * (side, 1))
    hairline = np.stack([t * 132, line], 1)
    outline = curve([*hairline, *sides[1], (part * 30, who.top), *sides[0][::-1]], steps=4)
    outline[60:] += rng.normal(0, who.curl, outline[60:].shape)
    yield ID["hair"], -40, rgba(who.hair), curve(outline, steps=3)


def earrings(rng, who):
    """Studs, drops or hoops."""
    kind, metal, size = rng.integers(3), rgba(rng.choice(METALS)), rng.uniform(0.7, 1.7)
    for x, y in ((-148, 46), (148, 46)):
        stud, hoop = ellipse(x, y, 9 * size, 9 * size), ellipse(x, y + 26 * size, 18 * size, 26 * size)
        drop = ribbon([(x, y - 4), (x, y + 20), (x, y + 62 * size)], [5, 8, 28 * size])
        if x * who.yaw < 22:  # beyond, the ear is behind the cheek
            yield ID["ear_r"], -80, metal, (drop, stud, ribbon([*hoop, *hoop[:2]], 5 * size))[kind]


def hat(rng, who):
    """A cap, or a hat with a wide brim."""
    colour, edge, high = rng.uniform(20, 235, 3), rng.uniform(-145, -118), rng.uniform(-340, -280)
    dome = [(0, high), (60, high + 4), (132, high + 50), (172, edge - 50), (176, edge + 20), (0, edge + 30)]
    yield ID["hat"], -45, rgba(colour), curve(symmetric(dome))
    x, (wide, bend, thick) = np.linspace(-1, 1, 20), (245, -24, 40) if rng.random() < 0.4 else (178, 30, 44)
    brim = np.stack([x * wide, edge + 12 + bend * (x**2 - 0.5)], 1)
    yield None, -30, (0, 0, 0, 80), ribbon(brim + (0, thick * 0.5), 20 * (1 - x**2) ** 0.5)
    yield ID["hat"], -30, rgba(colour, rng.uniform(0.65, 1.2)), ribbon(brim, thick * (1 - x**8) ** 0.5)


def parts(rng, who):
    """All there is to paint of a person, back to front.

    Yields (label, depth, colour, polygon): label None is for the image only, depth grows towards the viewer, colour
    is (R, G, B, alpha) and polygon float (n, 2).
    """
    for part, present in (
        (hair_behind, who.hairy),
        (body, True),
        (head, True),
        (glasses, who.glasses == "clear"),  # under the eyes, which are seen and labelled through them
        (eyes, True),
        (mouth, True),
        (glasses, who.glasses == "sun"),
        (hair_in_front, who.hairy),
        (earrings, who.ringed),
        (hat, who.hat),
    ):
        if present:
            yield from part(rng, who)
