"""Muon: the orthogonalised step, and what is left to AdamW."""

import pytest
import torch

from muon import COEFFICIENTS, Muon, orthogonalise


@pytest.mark.parametrize("shape", [(12, 40), (40, 12), (16, 16)])
def test_orthogonalise_equals_the_plain_iteration(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)).double()
    a, b, c = COEFFICIENTS
    x = matrix / matrix.norm()
    for _ in range(5):
        x = a * x + b * (x @ x.T) @ x + c * (x @ x.T) @ (x @ x.T) @ x
    other = torch.ones(12, 3)  # of the same short side: both are worked on together
    got, _ = orthogonalise([matrix.float(), other])
    assert torch.allclose(got, x.float(), atol=1e-4)
    assert torch.linalg.svdvals(got).max() < 1.3


def test_singular_values_come_near_one():
    matrix = torch.randn(24, 200, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.logspace(0, -2, 200))
    values = torch.linalg.svdvals(orthogonalise([matrix])[0])
    assert values.min() > 0.6 and values.max() < 1.3


def test_groups_without_the_mark_take_adamw_s_step():
    def parameters():
        torch.manual_seed(1)
        return [torch.nn.Parameter(torch.randn(6, 4, 3, 3)), torch.nn.Parameter(torch.randn(6))]

    (conv, bias), (conv2, bias2) = parameters(), parameters()
    muon = Muon([{"params": [conv], "orthogonal": True}, {"params": [bias]}], lr=0.1, weight_decay=0.5)
    adamw = torch.optim.AdamW([conv2, bias2], lr=0.1, weight_decay=0.5)
    for _ in range(3):
        for p in (conv, bias, conv2, bias2):
            p.grad = torch.ones_like(p) + p.detach()
        muon.step()
        adamw.step()
    assert torch.equal(bias, bias2) and not torch.allclose(conv, conv2)


def test_a_step_of_a_convolution_by_hand():
    conv = torch.nn.Parameter(torch.zeros(4, 2, 3, 3))
    gradient = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(2))
    conv.grad = gradient.clone()
    Muon([{"params": [conv], "orthogonal": True}], lr=0.1, weight_decay=0.5).step()
    # The first momentum points where the gradient does.
    step = orthogonalise([gradient.flatten(1)])[0].view_as(gradient)
    assert torch.allclose(conv, -0.1 * 0.2 * 18**0.5 * step, atol=1e-4)


def test_a_step_that_overflows_is_passed_over():
    conv = torch.nn.Parameter(torch.ones(6, 8))
    muon = Muon([{"params": [conv], "orthogonal": True}], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for factor in (torch.inf, 1.0):
        before = conv.detach().clone()
        scaler.scale((conv * factor).sum()).backward()
        scaler.step(muon)
        scaler.update()
        muon.zero_grad()
        assert conv.isfinite().all() and torch.equal(conv, before) == (factor == torch.inf)
