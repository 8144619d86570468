"""The networks have the parameters they must have and compute what a literal evaluation computes."""

import pytest
import torch

from checks import plain_microunet, plain_segformer
from errors import UserError
from model import MicroSegFormer, MicroUNet, build
from parameters import PARAM_LIMIT, count_parameters


@pytest.mark.parametrize(("lmsa", "count"), [(True, 1_747_923), (False, 1_721_939)])
def test_reference_has_exactly_its_parameters(lmsa, count):
    assert count_parameters(MicroSegFormer(lmsa=lmsa)) == count


def test_successor_is_below_the_limit():
    assert count_parameters(MicroUNet()) < PARAM_LIMIT == 1_821_085


@pytest.mark.parametrize(
    ("kind", "settings", "plain"),
    [
        (MicroSegFormer, {}, plain_segformer),
        (MicroSegFormer, {"lmsa": False}, plain_segformer),
        (MicroUNet, {}, plain_microunet),
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_economical_evaluation_equals_the_literal_one(kind, settings, plain, training):
    torch.manual_seed(0)
    model = kind(dropout=0.0, **settings).double()  # where rounding cannot hide a mistake, nor look like one
    for parameter in model.parameters():  # biases and norms start at 0 and 1, which would hide a mistake
        parameter.data += 0.05 * torch.randn_like(parameter)
    model.train(training)
    image = torch.rand(2, 3, 96, 128, dtype=torch.double)
    outcomes = []
    for forward in (model, lambda image: plain.plain_forward(model, image)):
        logits = forward(image)
        gradients = torch.autograd.grad((logits * image.mean(1, keepdim=True)).mean(), list(model.parameters()))
        outcomes.append((logits.detach(), torch.cat([g.flatten() for g in gradients])))
    (logits, gradients), (plain_logits, plain_gradients) = outcomes
    assert (logits - plain_logits).abs().max() < 1e-9 * plain_logits.abs().max()
    assert (gradients - plain_gradients).norm() < 1e-9 * plain_gradients.norm()


@pytest.mark.parametrize(("kind", "plain"), [(MicroSegFormer, plain_segformer), (MicroUNet, plain_microunet)])
def test_single_precision_agrees_with_the_literal_evaluation(kind, plain):
    torch.manual_seed(0)
    model, image = kind().eval(), torch.rand(1, 3, 96, 128)
    with torch.no_grad():
        assert (model(image) - plain.plain_forward(model, image)).abs().max() < 1e-4


@pytest.mark.parametrize("arguments", [{"decoder": [32, 48, 64]}, {"lmsa": [9]}, {"lmsa": [-1]}, {"lmsa": 1}])
def test_a_decoder_that_does_not_fit_is_refused(arguments):
    with pytest.raises(UserError, match="cannot be made"):
        build("microunet", **arguments)


def test_dropout_acts_in_training_only():
    torch.manual_seed(0)
    model, image = MicroSegFormer(dropout=0.5), torch.rand(1, 3, 64, 64)
    assert not torch.equal(model(image), model(image))
    model.eval()
    assert torch.equal(model(image), model(image))


@pytest.mark.parametrize("kind", [MicroSegFormer, MicroUNet])
def test_logits_at_both_sizes(kind):
    model, image = kind().eval(), torch.rand(1, 3, 64, 96)
    with torch.no_grad():
        assert model(image).shape == (1, 19, 64, 96)
        assert model(image, full_size=False).shape == (1, 19, 64 // model.stride, 96 // model.stride)


@pytest.mark.parametrize("kind", [MicroSegFormer, MicroUNet])
def test_every_parameter_is_used(kind):
    model = kind()
    model(torch.rand(2, 3, 64, 64)).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in model.named_parameters() if "k" not in n)
