"""Dropout on the CPU drops as often as it should, and attention with it equals the plain formula."""

import pytest
import torch

import dropout


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("rate", [0.075, 0.5, 0.9])
def test_elements_are_dropped_at_the_rate(rate):
    x = dropout.dropout(torch.ones(1000, 1001), rate)  # 1,001,000: no multiple of 4 times 4 rows
    assert abs((x == 0).double().mean() - rate) < 4 * (rate * (1 - rate) / x.numel()) ** 0.5
    assert torch.allclose(x[x > 0], torch.tensor(1 / (1 - rate)))
    neighbours = (x[:, 1:] == 0) & (x[:, :-1] == 0)
    assert abs(neighbours.double().mean() - rate**2) < 0.003


def test_the_gradient_passes_what_was_kept():
    x = torch.randn(50, 40, requires_grad=True)
    y = dropout.dropout(x, 0.3)
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert torch.allclose(slope * x, y) and slope.unique().tolist() == pytest.approx([0, 1 / 0.7])


def test_nothing_is_dropped_outside_of_training():
    module, x = dropout.Dropout(0.5), torch.randn(7, 5)
    assert torch.equal(module.eval()(x), x) and not torch.equal(module.train()(x), x)


@pytest.mark.parametrize("rate", [0.0, 0.3])
@pytest.mark.parametrize("part", [7, 40, 1 << 18])  # weights of a part: a row, some, all
def test_attention_equals_the_plain_formula(monkeypatch, rate, part):
    monkeypatch.setattr(dropout, "PART_WEIGHTS", part)
    q, k, v, seen = (torch.randn(2, n, 6, dtype=torch.double, requires_grad=True) for n in (11, 9, 9, 11))
    torch.manual_seed(1)
    keep = dropout.keep_mask(torch.Size((2, 11, 9)), rate).double() / (1 - rate)
    plain = ((q @ k.transpose(1, 2) / 6**0.5).softmax(-1) * keep) @ v
    torch.manual_seed(1)
    ours = dropout.attention(q, k, v, rate)
    gradients = [torch.autograd.grad((out * seen).sum(), (q, k, v)) for out in (ours, plain)]
    assert torch.allclose(ours, plain, rtol=0, atol=1e-12)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-12) for a, b in zip(*gradients, strict=True))
