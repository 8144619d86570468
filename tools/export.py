"""Export trained weights: as one ONNX file for other programs, or in half precision as runs/release.

python -m tools.export --name a --out parser.onnx            # pip install -r tools/requirements.txt
python -m tools.export --name a --release                    # what prediction and submission use by default

The ONNX file maps `image`, uint8 RGB (N, 3, H, W) with sides in multiples of 32, to `labels`, uint8 (N, H, W). Batch
norm is folded; its metadata contains names, colours and this convention. It replaces an older file only if onnxruntime
gives torch's label to 99.99 % of the pixels. --int8 quantises the convolutions (arXiv 1712.05877) with the ranges of 50
training images: a third of the size, 1.6 times as fast on a CPU with VNNI, and 95 % is enough.
"""

import json
import logging
import shutil
import tempfile
import warnings
from pathlib import Path
from types import SimpleNamespace

import common
from common import ArgumentParser, UserError, atomic, check_target, make_folder, require_packages, run_main, write_text

import torch
from torch import nn
from torch.export import Dim

import checkpoint
import register
from data import find_data_of, find_pairs
from images import read_image
from labels import HEX_COLOURS, NAMES
from views import label_map, predict_logits, resize

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OURS = rb"\x08.{,60}" + common.TITLE.encode()  # how our ONNX files begin, up to their doc_string
SAME, SAME_INT8 = 0.9999, 0.95  # least fraction of pixels to which torch and onnxruntime give the same label
CALIBRATION = 50  # images
ASTRONAUT = Path(__file__).parent.parent / "docs" / "astronaut.jpg"
LICENCE = """These weights were trained on CelebAMask-HQ (Lee et al., arXiv 1907.11922), which is for non-commercial
research and education; the same restriction applies to them. They contain no image of it.
"""


class Exported(nn.Module):
    """A network from uint8 images (N, 3, H, W) to labels (N, H, W)."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, image):
        return self.model(image.float() / 255).argmax(1).to(torch.uint8)


def convert(model, size):
    """torch's ONNXProgram of a network; `size` is the side of the images it was trained on."""
    batch, height, width = Dim("batch"), *(Dim(name, min=2, max=64) for name in ("height", "width"))
    shapes = {0: batch, 2: 32 * height, 3: 32 * width}
    names = {"input_names": ["image"], "output_names": ["labels"]}
    example = torch.zeros(2, 3, 256, 320, dtype=torch.uint8)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # torch reports on its own internals
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = Exported(model).eval()
        program = torch.onnx.export(network, (example,), dynamic_shapes=(shapes,), verbose=False, **names)
    program.model.doc_string = common.TITLE
    program.model.metadata_props.update(
        labels=json.dumps(NAMES),
        colours=json.dumps(HEX_COLOURS),
        input=f"uint8 RGB, NCHW, values 0..255, sides in multiples of 32; trained on portraits of {size} x {size}",
        licence=" ".join(LICENCE.split()),
    )
    return program


@torch.inference_mode()
def compare(path, model, size):
    """The fraction of the pixels of a photo and its mirror image to which an ONNX file gives its network's label.

    The smaller one of two sizes of input, `size` and about half of it.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    photo, fractions = torch.from_numpy(read_image(ASTRONAUT)).permute(2, 0, 1)[None], []
    for side in (size, max(64, size // 64 * 32)):
        images = (resize(torch.cat([photo, photo.flip(3)]), side, side) * 255).byte()
        made = torch.from_numpy(session.run(None, {"image": images.numpy()})[0])
        own = label_map(predict_logits(model, images.float() / 255), side, side)
        fractions.append(float((made == own).float().mean()))
    return min(fractions)


def quantise(path, images):
    """Quantise an ONNX file, in place, with the ranges of its maps on images (1, 3, H, W) uint8, numpy."""
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    inputs = ({"image": image} for image in images)
    reader = SimpleNamespace(get_next=lambda: next(inputs, None))
    logging.getLogger().setLevel(logging.ERROR)  # it warns that it does not know Resize's names
    with tempfile.TemporaryDirectory() as folder:
        prepared = Path(folder, "prepared.onnx")
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        layers = ["Conv", "Add", "Relu"]
        quantization.quantize_static(prepared, path, reader, per_channel=True, op_types_to_quantize=layers)


def write_onnx(weights, out, int8=False, data=None):
    """Write the ONNX file. UserError if a package is missing or onnxruntime gives other labels than torch."""
    require_packages(*PACKAGES)
    check_target(out, OURS)
    model, info = checkpoint.load_model(weights)
    if int8:
        held = {name for name, _ in checkpoint.pairs_in(info, "held_out")}
        paths = [path for path, _ in find_pairs(find_data_of(weights, data)) if path.stem not in held]
    with atomic(out) as temporary:
        print(f"exporting {weights}: some 20 seconds", flush=True)
        convert(model, info["size"]).save(temporary)
        if int8:
            images = (torch.from_numpy(read_image(path)).permute(2, 0, 1)[None] for path in paths[:CALIBRATION])
            quantise(temporary, ((resize(i, info["size"], info["size"]) * 255).byte().numpy() for i in images))
        same, least = compare(temporary, model, info["size"]), SAME_INT8 if int8 else SAME
        if same < least:
            raise UserError(f"onnxruntime gives {same:.4%} of pixels torch's label, below {least:.2%}; nothing written")
    print(f"{out}: {out.stat().st_size / 1e6:.1f} MB; {same:.4%} of pixels of {ASTRONAUT.name} have torch's label")


def write_release(weights, folder, overwrite=False):
    """Create runs/release: the records of the run in `folder`, and the weights in half precision, as best.pt.

    If other weights than the run's are given, its own become validated.pt, with which anyone can check the score.
    """
    release, own = register.RELEASE, folder / "best.pt"
    if (release / "best.pt").is_file() and not overwrite:
        raise UserError(f"{release} exists, the weights that every command uses by default: OVERWRITE=1 replaces them")
    if folder.resolve() == release.resolve():
        raise UserError(f"{folder} is already the release; give another run")
    sources = {"best.pt": weights}
    if own.is_file() and own.resolve() != weights.resolve():
        sources["validated.pt"] = own
    contents = {name: halve(path) for name, path in sources.items()}
    make_folder(release)
    with register.replace_run(release) as made:
        for name in ("args.json", "metrics.jsonl", "best.json"):
            if (folder / name).is_file():
                shutil.copyfile(folder / name, made / name)
        for name, content in contents.items():
            checkpoint.save(made / name, content)
        write_text(made / "LICENCE.txt", LICENCE)
    sizes = [f"{name} {(release / name).stat().st_size / 1e6:.1f} MB from {path}" for name, path in sources.items()]
    print(f"{release}: {', '.join(sizes)}")


def halve(path):
    """A checkpoint with its weights in half precision. UserError if they exceed its range."""
    content = checkpoint.load(path)
    state = {key: v.half() if v.is_floating_point() else v for key, v in content["state_dict"].items()}
    if not all(bool(value.isfinite().all()) for value in state.values()):
        raise UserError(f"some weights of {path} exceed half precision; release another run")
    return {**content, "state_dict": state}


def main():
    parser = ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--name", help="run to export; default the release")
    parser.add_argument("--weights", help="checkpoint, instead of the run's best.pt")
    parser.add_argument("--out", type=Path, help="ONNX file to write")
    parser.switch("--int8", help="the ONNX file computes in 8 bits; needs training images")
    parser.add_argument("--data", help="with --int8: folder with train/; default that of the training, else ./data")
    parser.switch("--release", help="create runs/release instead; needs --name")
    parser.switch("--overwrite", help="with --release: deletes and replaces it, its report and zip")
    args = parser.parse_args()
    if bool(args.out) == args.release or (args.release and (args.int8 or not args.name)):
        raise UserError("give the file to write, OUT=parser.onnx; `make release NAME=a` creates runs/release")
    weights = register.find_weights(args.weights or args.name)
    if args.release:
        write_release(weights, register.find_run(args.name), args.overwrite)
    else:
        write_onnx(weights, args.out, args.int8, args.data)


if __name__ == "__main__":
    run_main(main)
