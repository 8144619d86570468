"""Properties that hold for whatever is drawn: hypothesis looks for a counter-example.

python -m pytest checks/test_fuzz.py
"""

import os
import shlex

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import options
from augment import Strength, augment, draw, mix, warp
from checks.test_augment import COLOUR_TABLE, painted
from checks.test_metrics import plain_score
from errors import UserError
from images import by_colour
from labels import FLIP, NUM_CLASSES
from metrics import confusion, official_score
from schedule import learning_rate, parse_sizes
from views import parse_views

few = settings(max_examples=int(os.environ.get("FUZZ_EXAMPLES", 10)), deadline=None, derandomize=True)
seeds = st.tuples(*[st.integers(0, 2**32 - 1)] * 3)
share = st.floats(0, 1)


def case(name):
    def named(function):
        function.case = name
        return function

    return named


@case("image and mask move together")
@few
@given(seeds, st.sampled_from([64, 96, 128]), share, st.floats(0, 180), st.floats(0, 0.5), st.floats(0, 0.4))
def test_a_label_painted_as_a_colour_comes_back_as_that_colour(seed, size, flip, rotate, scale, shift):
    images, masks = painted(2, 256, seed[0])
    drawn = draw(2, Strength(flip=flip, rotate=rotate, scale=scale, shift=shift), seed)
    moved, labels = warp(images, masks, drawn, size)
    # A mirrored image is painted in the colours of before: its labels are exchanged back to be looked up.
    back = torch.where(drawn["flip"].bool()[:, None, None], torch.tensor(FLIP)[labels.long()], labels.long())
    wrong = (moved - COLOUR_TABLE[back].permute(0, 3, 1, 2) / 255).abs().amax(1) > 0.05
    around = F.pad(back[:, None].float(), (1, 1, 1, 1), mode="replicate")
    same = (F.unfold(around, 3).view(2, 9, size, size) == back[:, None]).all(1)
    # All wrong pixels lie within one pixel of an edge between labels; beyond the border an edge may not be seen.
    assert not (wrong & same)[:, 1:-1, 1:-1].any()


@case("mixed labels add up to 1")
@few
@given(seeds, st.integers(1, 5), share, share, st.floats(0.01, 5), st.sampled_from([1, 2, 4]))
def test_mixed_labels_add_up_to_one(seed, count, mixup, rest, alpha, stride):
    images, masks = painted(count, 64, seed[0])
    strength = Strength(flip=0.5, mixup=mixup, cutmix=rest * (1 - mixup), mixup_alpha=alpha, cutmix_alpha=alpha)
    mixed, target = augment(images, masks, draw(count, strength, seed), 32, stride)
    assert mixed.shape == (count, 3, 32, 32) and mixed.isfinite().all() and mixed.min() >= 0 and mixed.max() <= 1
    if target.dim() == 3:
        assert stride == 1 and target.max() < NUM_CLASSES
    else:
        assert target.shape == (count, NUM_CLASSES, 32 // stride, 32 // stride)
        assert target.min() >= 0 and torch.allclose(target.sum(1), torch.ones(()), atol=1e-5)


@case("mixed labels add up to 1")
@few
@given(seeds, st.integers(2, 4))
def test_what_is_mixed_of_the_images_is_mixed_of_the_labels(seed, count):
    images, masks = painted(count, 32, seed[0])
    drawn = draw(count, Strength(mixup=0.5, cutmix=0.5, mixup_alpha=1.0), seed)
    mixed, target = mix(images.float() / 255, masks, drawn, 1)
    shares = F.one_hot(target, NUM_CLASSES).permute(0, 3, 1, 2).float() if target.dim() == 3 else target
    assert torch.allclose(torch.einsum("blhw,lc->bchw", shares, COLOUR_TABLE / 255), mixed, atol=1e-5)


@case("the score is the plain formula")
@few
@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.integers(1, 40), st.integers(1, 19), st.integers(1, 19), share)
def test_score_is_the_plain_formula(seed, height, width, true_labels, labels, right):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, true_labels, (height, width)).astype(np.uint8)
    pred = np.where(rng.random(true.shape) < right, true, rng.integers(0, labels, true.shape)).astype(np.uint8)
    score = official_score(confusion(pred, true)[None])
    assert abs(score - plain_score(pred, true)) < 1e-12 and 0 <= score <= 1


@case("colours give back labels")
@few
@given(st.lists(st.integers(0, 18), min_size=1, max_size=50))
def test_masks_in_colours_give_back_their_labels(labels):
    labels = np.uint8([labels])
    assert np.array_equal(by_colour(Image.fromarray(COLOUR_TABLE.numpy()[labels])), labels)


def flags():
    """Any flags of train.py with any values, and what is none of them."""
    known = sorted(
        {name for action in options.build_parser()._actions for name in action.option_strings} - {"-h", "--help"}
    )
    number = st.one_of(
        st.floats().map(str), st.integers().map(str), st.sampled_from(["1e400", "-0", "٣", "1_0", "0x1"])
    )
    odd = st.sampled_from(
        ["128:36,256:12", "32:0", ":", "{}", '{"a": 1}', "[[[[", "null", "balanced", "lmsa_v1", ",", "1:1"]
    )
    value = st.one_of(number, odd, st.text(max_size=20), st.lists(number, max_size=20).map(",".join))
    name = st.one_of(st.sampled_from(known), st.text(max_size=8).map(lambda text: f"--{text}"))
    return st.lists(st.one_of(st.tuples(name), st.tuples(name, value), st.tuples(value)), max_size=6).map(
        lambda parts: [text for part in parts for text in part]
    )


@case("argument parsing never raises")
@few
@given(flags())
def test_flags_are_parsed_or_refused(argv):
    try:
        args, given_ones = options.parse(argv)
    except UserError as error:
        assert str(error)
        return
    except SystemExit as ended:
        assert any(flag.startswith("--h") for flag in argv) and not ended.code, shlex.join(argv)
        return
    phases = parse_sizes(args.sizes, args.epochs)
    rate = learning_rate(
        0.5, phases, lr=args.lr, warmup=args.warmup, kind="cosine", floor=args.lr_floor, period=1, growth=2
    )
    assert 0 <= rate <= args.lr and given_ones <= vars(args).keys()


@case("argument parsing never raises")
@few
@given(st.one_of(st.text(max_size=20), st.lists(st.floats().map(str), max_size=4).map(",".join)))
def test_views_are_parsed_or_refused(text):
    try:
        flip, scales = parse_views(text)
    except UserError:
        return
    assert isinstance(flip, bool) and all(0.25 <= scale <= 4 for scale in scales)
