"""Muon: the orthogonalised step, and what remains AdamW."""

import pytest
import torch
from torch import nn

from options import parse
from train import COEFFICIENTS, Muon, make_optimiser, orthogonalise


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalise_equals_the_plain_iteration(shape):
    matrix, (a, b, c) = random(*shape).double(), COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    result, _ = orthogonalise([matrix.float(), torch.ones(12, 3)])
    assert torch.allclose(result, x.float(), atol=1e-4) and 0.6 < torch.linalg.svdvals(result)[0] < 1.3


def test_first_step_by_hand():
    conv, bias, expected_bias = (torch.nn.Parameter(torch.ones(s)) for s in ((4, 2, 3, 3), (4,), (4,)))
    conv.grad, bias.grad, expected_bias.grad = random(4, 2, 3, 3), random(4), random(4)
    torch.optim.AdamW([expected_bias], lr=0.1, weight_decay=0.5).step()
    Muon([{"params": [conv], "orthogonal": True}, {"params": [bias]}], lr=0.1, weight_decay=0.5).step()
    step = orthogonalise([random(4, 2, 3, 3).flatten(1)])[0].view(4, 2, 3, 3)
    assert torch.allclose(conv, 0.95 - 0.1 * 0.2 * 18**0.5 * step, atol=1e-4)
    assert torch.equal(bias, expected_bias)


def test_hidden_matrices_alone_take_its_step():
    layers = (
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 19, 1),
        nn.Linear(19, 8),
        nn.Conv2d(8, 19, 1),
    )
    model = nn.Sequential(*layers)  # the first, a depthwise, two hidden and the classifier
    model.ends = "0", "4"
    groups = make_optimiser(model, parse(["--optimiser=muon"])[0], torch.device("cpu")).param_groups
    orthogonal = {id(p): group["orthogonal"] for group in groups for p in group["params"]}
    assert [name for name, p in model.named_parameters() if orthogonal[id(p)]] == ["2.weight", "3.weight"]
