"""Masks in which left and right are reversed as a whole: found and repaired.

In some 7 % of the challenge's masks the person's left and right have traded places: no mirrored image goes with them.

python -c "import sides, numpy as np; print(sides.reversed_sides(np.array([[4, 0, 5]], np.uint8)))"
make check-data        # names every such mask of a data folder
"""

import numpy as np

from labels import FLIP, NUM_CLASSES, SIDES

_LEFT, _RIGHT = np.array(SIDES).T
_MIRROR = np.array(FLIP, np.uint8)


def reversed_sides(mask):
    """Whether a mask (H, W) of uint8 labels has left and right reversed.

    The person's left eye, brow and ear lie at the image's right. A mask is reversed where the centroid of every left
    part lies left of its right partner's, among the pairs with both parts present, and there is such a pair.
    """
    pixels = np.flatnonzero((mask >= _LEFT[0]) & (mask <= _RIGHT[-1]))
    labels = mask.ravel()[pixels]
    count = np.bincount(labels, minlength=NUM_CLASSES)
    x = np.bincount(labels, pixels % mask.shape[1], NUM_CLASSES) / np.maximum(count, 1)
    present = (count[_LEFT] > 0) & (count[_RIGHT] > 0)
    return bool(present.any() and (x[_LEFT] < x[_RIGHT])[present].all())


def swap_sides(mask):
    """A copy of a mask (any shape, labels 0..18) as uint8 with 4<->5, 6<->7, 8<->9; IndexError above label 18."""
    return _MIRROR[mask]
