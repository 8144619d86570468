"""The networks: parameter counts, the reference's own output, and shortcuts that equal the plain layers."""

import json
import re
import zlib
from pathlib import Path

from common import UserError

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import model as networks
from checks.conftest import cases
from checks.references import plain_attention, plain_forward
from model import PARAM_LIMIT, MicroSegFormer, build, check_logits, count_parameters, fold_batch_norm
from tools import check_params

REFERENCE = Path(__file__).with_name("reference")
# The reference's names of weights, as patterns, and ours; numbered modules count from 1 there.
NAMES = r"""
patch_embed(\d)\.proj=embeddings.\1 patch_embed(\d)\.norm=embedding_norms.\1 block(\d)=stages.\1 ^norm(\d)=norms.\1
linear_c(\d)=decode.\1 linear_fuse\.0=fuse linear_fuse\.2=mix conv_seg=classifier attn\.sr=attention.reduce
attn=attention mlp\.fc1=mlp.0 mlp\.fc2=mlp.3 dw_conv3x3=depthwise pw_conv=pointwise lmsa\.bn=lmsa.norm
lmsa\.fc=lmsa.gate decoder\.=
"""
BOTH = ["microsegformer", "microunet"]


def our_name(name):
    for line in NAMES.split():
        name = re.sub(*line.split("="), name)
    return re.sub(r"^(\w+)\.([1-4])\b", lambda match: f"{match[1]}.{int(match[2]) - 1}", name)


def reference_weight(name, shape):
    """The weight that the rule of the reference's README gives a name."""
    rng = np.random.default_rng(zlib.crc32(name.encode()))
    x = rng.standard_normal(shape)
    if name.endswith("running_var"):
        x = 0.5 + 1.5 * rng.random(shape)
    else:
        x = 1 + 0.1 * x if re.search(r"(norm\d?|bn)\.weight$", name) else 0.05 * x
    return torch.from_numpy(x.astype(np.float32))


@cases("key", ["lmsa_eval", "lmsa_train", "plain_eval", "plain_train"])
@cases("forward", [MicroSegFormer.forward, plain_forward])
def test_logits_equal_those_of_the_reference_code(key, forward, monkeypatch):
    shapes = json.loads((REFERENCE / "weights.json").read_text())
    names = [name for name in shapes if key.startswith("lmsa") or ".lmsa." not in name]
    model = MicroSegFormer(lmsa=key.startswith("lmsa"), dropout=0.0)
    state = {our_name(name): reference_weight(name, shapes[name]) for name in names}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lmsa.norm.num_batches_tracked"} and not unexpected
    given = np.random.default_rng(0).random((2, 3, 96, 160)).astype(np.float32)
    image = torch.from_numpy(given).double() / 4 + 0.5  # undoes our standardisation
    if forward is plain_forward:
        monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)
    with torch.no_grad():
        logits = forward(model.double().train(key.endswith("train")), image)[:, :, ::8, ::8].numpy()
    assert np.abs(logits - np.load(REFERENCE / "logits.npz")[key]).max() < 1e-5


def test_first_weights_are_drawn_as_the_references():
    model, mlp = MicroSegFormer(), build("microunet").attention[0].mlp
    for layer, expected in ((model.embeddings[0], (2 / (32 * 7 * 7)) ** 0.5), (model.fuse, 0.02), (mlp[0], 0.02)):
        assert layer.weight.std().item() == pytest.approx(expected, rel=0.05) and not layer.bias.any()


def test_parts_of_the_unet_equal_the_plain_layers():
    x, y = torch.rand(2, 8, 4, 6), torch.rand(2, 4, 8, 12)
    join, block = networks.JoinNorm(12, 5), networks.ResidualBlock(8)
    expected = networks.ConvNorm.forward(join, torch.cat([networks.upsample(x, (8, 12)), y], 1))
    assert torch.allclose(join(x, y), expected, atol=1e-5)
    branch = block.conv2(block.conv1(x))
    gate = block.gate.up(F.relu(block.gate.down(branch.mean((2, 3))))).sigmoid()[:, :, None, None]
    assert torch.allclose(block(x), F.relu(x + gate * branch), atol=1e-5)
    places = F.affine_grid(torch.eye(2, 3).expand(2, 2, 3), (2, 1, 4, 6), align_corners=False)
    assert torch.allclose(networks.coordinates(x), places.permute(0, 3, 1, 2))
    blocks = [block for stage in networks.build("microunet").encoder[1:4] for block in stage[1:]]
    assert [block.conv1[0].dilation[0] for block in blocks] == [1, 1, 1, 1, 1, 1, 2, 4, 1]


def test_parameters_of_a_network_are_counted_shown_and_limited(command):
    counts = [count_parameters(MicroSegFormer(lmsa=lmsa)) for lmsa in (True, False)]
    assert counts == [1_747_923, 1_721_939] and PARAM_LIMIT == 1_821_085
    own = ("--no-lmsa", "1,721,939"), ("--recipe=search", "1,558,355"), ("--name=release", "1,758,835")
    for flags, text in [*own, ("", "microunet of /")]:  # alone: the weights that a submission would have
        status, out, _ = command(check_params.main, *flags.split())
        assert status == 0 and text in out
    wide = "--model=microunet", '--model-args={"widths": [99, 99, 99, 99, 99]}'
    status, _, error = command(check_params.main, *wide)
    assert status == 1 and "FAIL" in error


def test_networks_of_another_grid_or_without_their_attributes_are_refused(monkeypatch):
    model = build("microunet").train()
    check_logits(model)
    assert model.training
    model.stride = 4
    with pytest.raises(UserError, match=r"\(1, 19, 32, 32\) of a 64 px image, not \(1, 19, 16, 16\)"):
        check_logits(model)
    for missing in ("ends", "stride"):
        monkeypatch.delattr(networks.MicroUNet, missing)
        with pytest.raises(UserError, match=f"needs an attribute {missing}"):
            check_logits(build("microunet"))


@cases("name", BOTH)
def test_folded_batch_norm_gives_the_same_logits(name):
    model, image = build(name).train(), torch.rand(4, 3, 64, 96)
    with torch.no_grad():
        for _ in range(3):
            model(image)  # statistics that differ from 0 and 1
        expected = model.eval()(image)
        folded = fold_batch_norm(model)
        assert not any(isinstance(module, torch.nn.BatchNorm2d) for module in folded.modules())
        assert torch.allclose(folded(image), expected, atol=1e-4)


@cases("name", BOTH)
def test_backward_pass_keeps_66_mib_of_an_image_of_512_pixels(name):
    model, kept = build(name, dropout=0.0).to(memory_format=torch.channels_last), {}
    weights = {parameter.data_ptr() for parameter in model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = 0 if storage.data_ptr() in weights else storage.nbytes()
        return tensor  # kept, so that no other has its address

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        logits = model(torch.zeros(1, 3, 512, 512), full_size=False)
    assert 60 < sum(kept.values()) / 2**20 < 68 and logits.requires_grad
