"""The 19 labels of CelebAMask-HQ (Lee et al., arXiv 1907.11922): names, colours, left and right.

Left and right are the person's own, so label 4 (l_eye) lies at the image's right.
"""

NAMES = (
    *("background", "skin", "nose", "eye_g", "l_eye", "r_eye", "l_brow", "r_brow", "l_ear", "r_ear"),
    *("mouth", "u_lip", "l_lip", "hair", "hat", "ear_r", "neck_l", "neck", "cloth"),
)
NUM_CLASSES = len(NAMES)

# RGB of each label, also the palette of every PNG mask.
COLOURS = (
    *((0, 0, 0), (204, 0, 0), (76, 153, 0), (204, 204, 0), (51, 51, 255), (204, 0, 204), (0, 255, 255)),
    *((255, 204, 204), (102, 51, 0), (255, 0, 0), (102, 204, 0), (255, 255, 0), (0, 0, 153), (0, 0, 204)),
    *((255, 51, 153), (0, 204, 204), (0, 51, 0), (255, 153, 51), (0, 204, 0)),
)
PALETTE = [value for colour in COLOURS for value in colour]
HEX_COLOURS = [f"#{bytes(colour).hex()}" for colour in COLOURS]

# Labels that change places in a mirrored image, as (person's left, person's right).
SIDES = ((4, 5), (6, 7), (8, 9))
# FLIP[label] is the label in the mirrored image; the same list reorders channels.
FLIP = list(range(NUM_CLASSES))
for _left, _right in SIDES:
    FLIP[_left], FLIP[_right] = _right, _left
