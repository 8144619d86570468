"""Charts of a run as SVG text: curves over the epochs, F by label, the confusion matrix.

Colours of lines are Okabe and Ito's, which the colour-blind tell apart; those of labels are the masks' palette.
"""

import math
from html import escape

import numpy as np

from labels import HEX_COLOURS, NAMES, NUM_CLASSES

BLUE, VERMILLION, GREY = "#0072B2", "#D55E00", "#666"
WIDTH, LEFT, RIGHT = 400, 46, 8  # of a chart and its margins, in user units; charts are shown about 1:1
FONT = "Arial, 'Liberation Sans', Helvetica, sans-serif"


def text(value):
    """Any value as text of HTML or SVG; names from a file system may hold what UTF-8 does not."""
    value = str(value)
    return escape(value if value.isascii() else value.encode("utf-8", "replace").decode("utf-8"))


def element(tag, content="", **attributes):
    """One element; `content` is markup, attributes are escaped: class_ is class, stroke_width is stroke-width."""
    given = "".join(f' {name.rstrip("_").replace("_", "-")}="{text(value)}"' for name, value in attributes.items())
    return f"<{tag}{given}>{content}</{tag}>"


def label(x, y, content, **attributes):
    """Text at a point, in the chart's font size unless told."""
    return element("text", text(content), x=number(x), y=number(y), **attributes)


def number(value):
    """A coordinate in few characters."""
    return f"{value:.5g}"


def figure(width, height, parts, title):
    """An <svg> that fills the width it is given."""
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {number(width)} {number(height)}" role="img" '
        f'aria-label="{text(title)}" font-family="{FONT}" font-size="11" fill="#222">' + "".join(parts) + "</svg>"
    )


def ticks(low, high, most=5):
    """At most `most` + 1 round numbers from low to high, 1, 2 or 5 times a power of ten apart."""
    rough = (high - low) / most
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    return [round(i * step, 10) for i in range(math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6) + 1)]


def plot(key, title, series, top, height, x_range, phases=(), y_range=None):
    """One set of axes with its lines, as markup.

    `series` is [(class, name, [(x, y), ...], dashed, dotted), ...]. Lines stand in the data's own coordinates below a
    transform, so that page.html can lay those of two runs over each other.
    """
    values = [y for _, _, points, _, _ in series for _, y in points]
    y0, y1 = y_range or (min(values), max(values))
    if y1 - y0 < 1e-9:
        y0, y1 = y0 - 0.05 * (abs(y0) or 1), y1 + 0.05 * (abs(y1) or 1)
    (x0, x1), right = x_range, WIDTH - RIGHT
    across, up = (right - LEFT) / (x1 - x0), height / (y1 - y0)

    parts, at, back = [label(LEFT, top - 7, title, font_weight="bold")], right, []
    for kind, name, _, dashed, _ in reversed(series):
        if not name:
            continue
        at -= 6.2 * len(name)
        parts.append(label(at, top - 7, name))
        line = {"class_": f"line {kind}", "d": f"M{number(at - 24)} {top - 11}h20"}
        parts.append(element("path", **line, stroke_dasharray="5 3") if dashed else element("path", **line))
        at -= 36
    begun = 0
    for i, (size, length) in enumerate(phases):
        left, end = LEFT + (begun - x0) * across, LEFT + (min(begun + length, x1) - x0) * across
        if end <= left:
            break
        if i % 2 == 0 and len(phases) > 1:
            back.append(element("rect", x=number(left), y=top, width=number(end - left), height=height, fill="#f0f2f5"))
        if len(phases) > 1 and end - left > 40 and key == "loss":  # below, other curves begin in that corner
            back.append(label(left + 4, top + height - 5, f"{size} px", fill=GREY, font_size=10))
        begun += length
    for y in ticks(y0, y1, max(2, height // 28)):
        level = top + (y1 - y) * up
        back.append(element("path", d=f"M{LEFT} {number(level)}H{right}", stroke="#ccc", stroke_width=0.6))
        back.append(label(LEFT - 5, level + 4, f"{y:g}", text_anchor="end"))
    for x in ticks(x0, x1, 8):
        if x == round(x):
            across_at = LEFT + (x - x0) * across
            back.append(label(across_at, top + height + 14, f"{x:g}", text_anchor="middle"))
    parts.insert(0, element("g", "".join(back), class_="back"))
    place = f"translate({number(LEFT - x0 * across)} {number(top + y1 * up)}) scale({number(across)} {number(-up)})"
    for kind, _, points, dashed, dotted in series:
        joined = "L".join(f"{number(x)} {number(y)}" for x, y in points)
        shape = {"transform": place, "vector_effect": "non-scaling-stroke"}
        if dashed:
            shape["stroke_dasharray"] = "5 3"
        parts.append(element("path", class_=f"line {kind}", d=f"M{joined}", **shape))
        if dotted:
            dots = "".join(f"M{number(x)} {number(y)}h0" for x, y in points)
            shape.pop("stroke_dasharray", None)
            parts.append(element("path", class_=f"dots {kind}", d=dots, **shape))
    data = {
        "data_x": f"{x0:g} {x1:g}",
        "data_y": f"{y0:g} {y1:g}",
        "data_box": f"{LEFT} {top} {right - LEFT} {height}",
    }
    return element("g", "".join(parts), class_="plot", data_key=key, **data)


def curves(lines, phases, name):
    """Loss, official score and learning rate over the epochs, with the phases of progressive resizing behind.

    `lines` are those of metrics.jsonl, at least one; `phases` [(size, epochs), ...].
    """

    def column(key):
        return [(line["epoch"], line[key]) for line in lines if line.get(key) is not None]

    x_range = (0, max(line["epoch"] for line in lines))
    losses = [("training", "training", column("loss"), True, False)]
    scores = []
    if found := column("val_loss"):
        losses.append(("validation", "validation (CE + Dice)", found, False, True))
    if found := column("train_official"):
        scores.append(("training", "training pairs", found, True, False))
    if found := column("official"):
        scores.append(("validation", "validation", found, False, True))
    top = max(y for _, _, points, _, _ in losses for _, y in points)
    parts = [plot("loss", "loss", losses, 24, 140, x_range, phases, (0, top))]
    if scores:
        parts.append(plot("official", "official score", scores, 212, 140, x_range, phases))
    rates = [("rate", "", column("lr"), False, False)]
    highest = max(y for _, y in rates[0][2])
    parts.append(plot("lr", "learning rate", rates, 400, 56, x_range, phases, (0, highest)))
    parts.append(label((LEFT + WIDTH - RIGHT) / 2, 486, "epoch", text_anchor="middle", fill=GREY))
    return figure(WIDTH, 490, parts, f"curves of {name}")


def swatch(x, y, index, side=10):
    """A label's colour as a square; the outline keeps pale and dark ones visible on any ground."""
    fill = HEX_COLOURS[index]
    return element("rect", x=number(x), y=number(y), width=side, height=side, fill=fill, stroke="#777")


def label_bars(f, images, name):
    """F of each label as a bar in its colour: f (19,) floats or None where absent, images (19,) that have it."""
    start, full = 122, WIDTH - RIGHT - 36 - 122
    parts = [
        label(start, 12, "F (mean over the images that have the label)", font_weight="bold"),
        label(start - 6, 12, "images", text_anchor="end", fill=GREY),
    ]
    for i, (value, count) in enumerate(zip(f, images, strict=True)):
        y = 20 + 24 * i
        parts += [swatch(2, y + 4, i), label(17, y + 13, NAMES[i])]
        parts.append(label(start - 6, y + 13, count, text_anchor="end", fill=GREY))
        parts.append(element("path", d=f"M{start} {y}v24", stroke="#999", stroke_width=0.6))
        if value is None:
            parts.append(label(start + 5, y + 13, "in no validation image", fill=GREY))
            continue
        bar = {"x": start, "y": y + 3, "width": number(full * value), "height": 13, "stroke": "#777"}
        parts.append(element("rect", class_="bar", fill=HEX_COLOURS[i], **bar))
        parts.append(label(start + full * value + 5, y + 13, f"{value:.3f}", class_="f", data_f=value))
    return figure(WIDTH, 480, parts, f"F by label of {name}")


def confusion_matrix(confusion, name):
    """Which label the pixels of each true label were given, in percent of the row: confusion (19, 19) pixel counts."""
    confusion = np.asarray(confusion, float)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    shades = np.ceil(share**0.5 * 12 - 0.5).astype(int)  # the root, so that small shares are seen
    side, left, top = 17, 76, 82
    cells, numbers = {}, []
    for row, column in np.argwhere(shades > 0).tolist():
        x, y, shade = left + column * side, top + row * side, int(shades[row, column])
        cells.setdefault(shade, []).append(f"M{x} {y}h{side}v{side}h-{side}z")
        if share[row, column] >= 0.01:
            ink, percent = "#fff" if shade > 7 else "#222", f"{100 * share[row, column]:.0f}"
            numbers.append(f'<text x="{x + side / 2}" y="{y + 11.5}" fill="{ink}">{percent}</text>')
    parts = [
        element("path", d="".join(paths), fill=mixed((255, 255, 255), (0, 58, 112), shade / 12))
        for shade, paths in sorted(cells.items())
    ]
    end = NUM_CLASSES * side
    lines = "".join(f"M{left} {top + i * side}h{end}M{left + i * side} {top}v{end}" for i in range(NUM_CLASSES + 1))
    parts.append(element("path", d=lines, stroke="#ccc", stroke_width=0.5))
    parts.append(element("g", "".join(numbers), font_size=8.5, text_anchor="middle"))
    for i, label_name in enumerate(NAMES):
        parts += [swatch(left - 13, top + i * side + 4, i, 9)]
        parts.append(label(left - 17, top + i * side + 12, label_name, text_anchor="end", font_size=10))
        turned = f"translate({left + i * side + 12} {top - 5}) rotate(-55)"
        parts.append(element("text", text(label_name), transform=turned, font_size=10))
    parts.append(
        label(0, 12, "% of the pixels of each true label (row) by predicted label (column)", font_weight="bold")
    )
    return figure(WIDTH + 20, top + end + 6, parts, f"confusion matrix of {name}")


def mixed(one, other, share):
    """The colour between two RGB triples, `share` of the way, as #rrggbb."""
    return "#{:02x}{:02x}{:02x}".format(*(round(a + (b - a) * share) for a, b in zip(one, other, strict=True)))
