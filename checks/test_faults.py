"""A few attempts of every attack in faults.py; random inputs (hypothesis) of what has a plain formula."""

import contextlib
import subprocess
import sys

from common import UserError

import numpy as np
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from augment import Strength, augment, draw, exchange, mix, warp
from evaluate import confusion, official_score
from labels import COLOURS, FLIP, NUM_CLASSES
from options import build_parser, parse, parse_sizes
from train import learning_rate

few = settings(max_examples=10, deadline=None, derandomize=True, database=None)
seeds, fraction = st.integers(0, 2**32 - 1), st.floats(0, 1)
TABLE = torch.tensor(COLOURS) / 255


def painted(count, side, seed):
    """Images (B, 3, S, S) uint8 in the labels' colours, and their masks (B, S, S) of 16 squares."""
    masks = torch.randint(0, NUM_CLASSES, (count, 4, 4), generator=torch.Generator().manual_seed(seed))
    masks = masks.repeat_interleave(side // 4, 1).repeat_interleave(side // 4, 2)
    return (TABLE[masks] * 255).round().byte().permute(0, 3, 1, 2), masks.byte()


def test_attacks_cause_no_loss():
    done = subprocess.run([sys.executable, "-m", "checks.faults", "--short"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@few
@given(seeds, st.sampled_from([64, 96, 128]), fraction, st.floats(0, 180), st.floats(0, 0.5), st.floats(0, 0.4))
def test_fuzz_image_and_mask_move_together(seed, size, flip, rotate, scale, shift):
    params = draw(2, Strength(flip=flip, rotate=rotate, scale=scale, shift=shift), (seed,))
    moved, labels = warp(*painted(2, 256, seed), params["theta"], size)
    # A mirrored image keeps its colours, but its labels change sides, and back.
    mirrored = torch.where(params["flip"].bool()[:, None, None], torch.tensor(FLIP)[labels.long()], labels.long())
    assert torch.equal(exchange(labels, params["flip"]).long(), mirrored)
    labels = labels.long()
    wrong = (moved - TABLE[labels].permute(0, 3, 1, 2)).abs().amax(1) > 0.05
    # Within a pixel of an edge between labels, colours blend.
    neighbours = F.unfold(F.pad(labels[:, None].float(), (1, 1, 1, 1), mode="replicate"), 3).view(2, 9, size, size)
    assert not (wrong & (neighbours == labels[:, None]).all(1))[:, 1:-1, 1:-1].any()


@few
@given(seeds, st.integers(1, 5), fraction, fraction, st.floats(0.01, 5), st.sampled_from([1, 2, 4]))
def test_fuzz_mixed_labels_add_up_to_one(seed, count, mixup, rest, alpha, stride):
    strength = Strength(flip=0.5, mixup=mixup, cutmix=rest * (1 - mixup), mixup_alpha=alpha, cutmix_alpha=alpha)
    images, target = augment(*painted(count, 64, seed), draw(count, strength, (seed,)), 32, stride)
    assert images.shape == (count, 3, 32, 32) and images.min() >= 0 and images.max() <= 1
    target = F.one_hot(target, NUM_CLASSES).permute(0, 3, 1, 2).float() if target.dim() == 3 else target
    assert target.shape == (count, NUM_CLASSES, 32 // stride, 32 // stride) and target.min() >= 0
    assert torch.allclose(target.sum(1), torch.ones(()), atol=1e-5)


@few
@given(seeds, st.integers(2, 4))
def test_fuzz_labels_mix_like_images(seed, count):
    images, masks = painted(count, 32, seed)
    params = draw(count, Strength(mixup=0.5, cutmix=0.5), (seed,))
    mixed, target = mix(images.float() / 255, masks, params, params, 1)
    soft = F.one_hot(target, NUM_CLASSES).permute(0, 3, 1, 2).float() if target.dim() == 3 else target
    assert torch.allclose(torch.einsum("blhw,lc->bchw", soft, TABLE), mixed, atol=1e-5)


@few
@given(seeds, st.integers(1, 40), st.integers(1, 40), st.integers(1, 19), st.integers(1, 19), fraction)
def test_fuzz_score_is_the_mean_f(seed, height, width, true_labels, labels, right):
    rng = np.random.default_rng(seed)
    true = rng.integers(0, true_labels, (height, width), np.uint8)
    pred = np.where(rng.random(true.shape) < right, true, rng.integers(0, labels, true.shape, np.uint8))
    f = [2 * np.sum((pred == k) & (true == k)) / np.sum((pred == k) * 1 + (true == k)) for k in np.unique(true)]
    assert abs(official_score(confusion(pred, true)[None]) - np.mean(f)) < 1e-5


flags = st.sampled_from(sorted({text for action in build_parser()._actions[1:] for text in action.option_strings[-1:]}))
odd = st.sampled_from(["128:36,256:12", "32:0", ":", "{}", '{"a": 1}', "[[[[", "null", "balanced", ",", "1e400", "٣"])
values = st.one_of(st.floats().map(str), st.integers().map(str), odd, st.text(max_size=20))


@few
@given(st.lists(st.one_of(st.tuples(flags), st.tuples(flags, values), st.tuples(values)), max_size=6))
def test_fuzz_flags_are_parsed_or_refused(parts):
    with contextlib.suppress(UserError, SystemExit):
        args, given_names = parse([text for part in parts for text in part])
        rate = learning_rate(args, parse_sizes(args.sizes, args.epochs), 0.5)
        assert 0 <= rate <= args.lr and given_names <= vars(args).keys()
