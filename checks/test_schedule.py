"""Sizes and learning rates by hand."""

import pytest

from errors import UserError
from schedule import cost, learning_rate, parse_sizes, size_at


def rate(epoch, phases, kind="cosine", **more):
    settings = {"lr": 1.0, "warmup": 2, "kind": kind, "floor": 0.0, "period": 4, "growth": 2, **more}
    return learning_rate(epoch, phases, **settings)


def test_sizes():
    assert parse_sizes("128:36,256:12", 200) == [(128, 36), (256, 12)]
    assert parse_sizes("512", 200) == [(512, 200)]
    assert [size_at([(128, 2), (256, 1)], epoch) for epoch in range(3)] == [128, 128, 256]


@pytest.mark.parametrize("text", ["", "100", "128:x", "128:0", "128,256", "1024:3", "128:3:4"])
def test_wrong_sizes_are_refused(text):
    with pytest.raises(UserError, match="--sizes"):
        parse_sizes(text, 5)


def test_cost_counts_pixels():
    assert cost([(128, 2), (256, 1)], 2.5) == 2 * 128**2 + 0.5 * 256**2


def test_cosine_by_hand():
    phases = [(64, 10)]
    assert [rate(epoch, phases) for epoch in (1, 2, 6, 10)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    assert rate(10, phases, floor=0.1) == pytest.approx(0.1)


def test_cosine_runs_over_the_compute_spent():
    # After warm-up 2 + 6 epochs of 64 pixels cost what 2 epochs of 128 cost: half of the way.
    assert rate(8, [(64, 8), (128, 1.5)]) == pytest.approx(0.5)


def test_warm_restarts_begin_at_the_top_again():
    phases = [(64, 30)]
    got = [rate(epoch, phases, "restarts") for epoch in (2, 4, 5.999, 6, 10, 13.999, 14)]
    assert got == pytest.approx([1, 0.5, 0, 1, 0.5, 0, 1], abs=1e-3)


def test_warm_up_takes_half_of_a_short_run():
    assert [rate(epoch, [(64, 2)], warmup=5) for epoch in (0.5, 1, 2)] == pytest.approx([0.5, 1, 0])


def test_constant():
    assert rate(29, [(64, 30)], "constant") == 1.0
