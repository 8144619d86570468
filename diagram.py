"""The networks' parts with their parameters, and a drawing of each network as SVG."""

from dataclasses import dataclass

from labels import NUM_CLASSES
from model import MicroSegFormer
from parameters import count_parameters
from svg import element, figure, label

LINE, HEIGHT, INK = 15, 42, "#444"
ENCODER, DECODER, HEAD = "#d6e6f2", "#fbe3d0", "#e8e8e8"


@dataclass(frozen=True)
class Part:
    """A row of the parameter table: a module or a few, what they hold, channels out, stride out, parameters."""

    name: str
    what: str
    channels: int
    stride: int
    parameters: int


def several(count, thing):
    """A number of things in words: "2 residual blocks"; "" for none."""
    return f"{count} {thing}{'s' if count > 1 else ''}" if count else ""


def conv_text(conv):
    """A convolution in short: its kernel and stride."""
    return f"{conv.kernel_size[0]}×{conv.kernel_size[0]} conv, stride {conv.stride[0]}"


def parts(model):
    """The parts of a MicroSegFormer or MicroUNet from image to logits; their parameters add up to the model's."""
    found = (segformer_parts if isinstance(model, MicroSegFormer) else unet_parts)(model)
    head = model.classifier
    found.append(Part("classifier", "1×1 conv", head.out_channels, model.stride, count_parameters(head)))
    if rest := count_parameters(model) - sum(part.parameters for part in found):
        found.append(Part("other", "further modules", 0, 0, rest))
    return found


def segformer_parts(model):
    """`parts` of a MicroSegFormer up to its classifier."""
    found, stride = [], 1
    for i, (embed, blocks) in enumerate(zip(model.embeddings, model.stages, strict=True)):
        stride *= embed.stride[0]
        modules = (embed, model.embedding_norms[i], blocks, model.norms[i])
        what = f"{conv_text(embed)}; {several(len(blocks), 'transformer block')}"
        found.append(
            Part(f"stage {i + 1}", what, embed.out_channels, stride, sum(count_parameters(m) for m in modules))
        )
    modules = (model.decode, model.fuse, model.mix)
    what = f"Linear of each stage to {model.decode[0].out_features}, fusion, Linear"
    found.append(Part("decoder", what, model.mix.out_features, model.stride, sum(map(count_parameters, modules))))
    if count := count_parameters(model.lmsa):
        found.append(Part("LMSA", "gated depthwise branch", model.mix.out_features, model.stride, count))
    return found


def unet_parts(model):
    """`parts` of a MicroUNet up to its classifier."""
    found, stride = [], 1
    for i, stage in enumerate(model.encoder):
        conv = stage[0][0]
        stride *= conv.stride[0]
        what = "; ".join(filter(None, (conv_text(conv), several(len(stage) - 1, "residual block"))))
        found.append(Part(f"encoder {i + 1}", what, conv.out_channels, stride, count_parameters(stage)))
    if len(model.attention):
        what = several(len(model.attention), "transformer block")
        found.append(Part("attention", what, found[-1].channels, stride, count_parameters(model.attention)))
    for i, stage in enumerate(model.decoder):
        stride //= 2
        conv = stage[0][0]
        what = f"{conv.kernel_size[0]}×{conv.kernel_size[0]} conv" + ("; LMSA" if count_parameters(stage[1]) else "")
        found.append(
            Part(f"decoder {len(model.decoder) - i}", what, conv.out_channels, stride, count_parameters(stage))
        )
    return found


def box(x, y, width, lines, fill):
    """A box with lines of text in its middle, the first one bold."""
    height = 12 + LINE * len(lines)
    frame = element("rect", x=x, y=y, width=width, height=height, rx=4, fill=fill, stroke=INK, stroke_width=0.8)
    return frame + "".join(
        label(x + width / 2, y + 17 + LINE * i, line, text_anchor="middle", font_weight="normal" if i else "bold")
        for i, line in enumerate(lines)
    )


def arrow(*points, dashed=False):
    """A line through (x, y) points with a head at its end."""
    dash = {"stroke_dasharray": "4 3"} if dashed else {}
    path = "M" + "L".join(f"{x:g} {y:g}" for x, y in points)
    (x0, y0), (x1, y1) = points[-2:]
    along = max(abs(x1 - x0), abs(y1 - y0))
    dx, dy = (x1 - x0) / along, (y1 - y0) / along
    head = f"M{x1:g} {y1:g}L{x1 - 7 * dx - 3.5 * dy:g} {y1 - 7 * dy - 3.5 * dx:g}"
    head += f"L{x1 - 7 * dx + 3.5 * dy:g} {y1 - 7 * dy + 3.5 * dx:g}z"
    return element("path", d=path, fill="none", stroke=INK, stroke_width=1.1, **dash) + element(
        "path", d=head, fill=INK
    )


def lines_of(part):
    """The lines of text in a part's box."""
    return [f"{part.name}: {part.channels} ch, 1/{part.stride}", *part.what.split("; ")]


def diagram(model):
    """The network as SVG text, drawn from its modules."""
    draw = draw_segformer if isinstance(model, MicroSegFormer) else draw_unet
    width, height, shapes = draw(model, parts(model))
    return figure(width, height, shapes, f"diagram of {type(model).__name__}")


def draw_unet(model, found):
    """(width, height, shapes) of the U: encoder down the left, decoder up the right, skips between."""
    width, wide, tall, pitch, top, shift = 680, 196, 42, 58, 58, 26
    levels = [part for part in found if part.name.startswith("encoder")]
    rising = [part for part in found if part.name.startswith("decoder")]
    middle = [part for part in found if part.name == "attention"]

    def lines(part):
        what = part.what.replace(", stride 2", "").replace("; ", ", ")
        return [f"{part.name}: {part.channels} ch, 1/{part.stride}", what]

    def place(level, right):
        """The corner and the middle of a level's box, on the left or mirrored on the right."""
        x = 10 + shift * level
        x = width - x - wide if right else x
        return x, top + pitch * level, x + wide / 2

    ends = ["image: 3 ch" + (" + 2 of coordinates" if model.coordinates else "")]
    ends.append(f"classifier: {NUM_CLASSES} ch, ×{model.stride} bilinear")
    shapes = [label(width / 2 + 46, 25, "labels: the likeliest of each pixel", text_anchor="end")]
    for right, text in enumerate(ends):
        x, y, centre = place(0, right)
        shapes.append(box(x, 8, wide, [text], HEAD))
        shapes.append(arrow((centre, y), (centre, 35)) if right else arrow((centre, 35), (centre, y)))
    shapes.append(arrow((place(0, True)[0], 21), (width / 2 + 52, 21)))
    for i, part in enumerate(levels):
        x, y, centre = place(i, False)
        shapes.append(box(x, y, wide, lines(part), ENCODER))
        if i + 1 < len(levels):
            shapes.append(arrow((centre + shift / 2, y + tall), (centre + shift / 2, y + pitch)))
    for part in rising:
        i = int(part.name.split()[1]) - 1
        x, y, centre = place(i, True)
        shapes.append(box(x, y, wide, lines(part), DECODER))
        shapes.append(arrow((place(i, False)[0] + wide, y + 21), (x, y + 21), dashed=True))
        shapes.append(arrow((centre - shift / 2, y + pitch), (centre - shift / 2, y + tall)))
    x, y, centre = place(len(levels) - 1, True)
    start = place(len(levels) - 1, False)[0] + wide
    if middle:
        shapes.append(box(x, y, wide, lines(middle[0]), ENCODER))
        shapes.append(arrow((start, y + 21), (x, y + 21)))
    else:
        shapes.append(element("path", d=f"M{start} {y + 21}H{centre + shift / 2}V{y}", fill="none", stroke=INK))
    shapes.append(label(width / 2, top + 15, "skips, concatenated", text_anchor="middle", fill=INK))
    for i, text in enumerate(("ch: channels", "1/s: stride s", "down: stride 2", "up: ×2 bilinear")):
        shapes.append(label(10, y - 8 + LINE * i, text, fill=INK, font_size=10))
    return width, y + tall + 8, shapes


def draw_segformer(model, found):
    """(width, height, shapes) of four stages in a row and the decoder that gathers them below."""
    width, wide, gap = 680, 152, 18
    stages = [part for part in found if part.name.startswith("stage")]
    last = {part.name: part for part in found}
    embed, stride = model.mix.out_features, model.stride
    shapes = [label(8, 16, "image: 3 ch"), arrow((72, 12), (8 + wide / 2, 12), (8 + wide / 2, 30))]
    for i, part in enumerate(stages):
        x = 8 + (wide + gap) * i
        shapes.append(box(x, 30, wide, lines_of(part), ENCODER))
        shapes.append(box(x, 108, wide, [f"Linear {part.channels} to {embed}"], DECODER))
        if i + 1 < len(stages):
            shapes.append(arrow((x + wide, 58), (x + wide + gap, 58)))
        shapes.append(arrow((x + wide / 2, 87), (x + wide / 2, 108)))
        shapes.append(arrow((x + wide / 2, 135), (x + wide / 2, 156)))
    whole = (wide + gap) * len(stages) - gap
    fusion = (
        f"resized to 1/{stride}, concatenated, Linear {embed * len(stages)} to {embed}, GELU, Linear {embed} to {embed}"
    )
    shapes.append(box(8, 156, whole, ["decoder", fusion], DECODER))
    chain = ["LMSA"] if "LMSA" in last else []
    chain += ["classifier", f"×{stride} bilinear", "labels"]
    about = {"LMSA": last["LMSA"].what if "LMSA" in last else "", "classifier": f"1×1 conv to {NUM_CLASSES}"}
    about |= {"labels": "the likeliest of each pixel", f"×{stride} bilinear": "to the image's size"}
    for i, name in enumerate(chain):
        x = 8 + (wide + gap) * i
        shapes.append(box(x, 222, wide, [name, about[name]], HEAD))
        start = (x + wide / 2, 198) if not i else (x - gap, 243)
        shapes.append(arrow(start, (x + wide / 2, 222) if not i else (x, 243)))
    return width, 272, shapes
