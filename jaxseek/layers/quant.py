"""Quantised weights: int8 with a scale per output, int4 and FP8 with a scale per group of inputs too.

A number is value * scale. There is no zero point, and what is not in MATRICES (embedding, head, router,
norms, biases) stays as it is.
"""

from __future__ import annotations

import math

# Every matrix that may be quantised: its name, and which of its letters are the inputs that are summed over.
MATRICES = {
    "q_DKGH": "D", "k_DKH": "D", "v_DKH": "D", "o_KGHD": "KGH", "q_DNH": "D", "q_a_DQ": "D", "q_b_QNH": "Q",
    "kv_a_DA": "D", "k_b_NPC": "C", "v_b_NHC": "C", "o_NHD": "NH", "k_DH": "D", "gate_DF": "D", "up_DF": "D",
    "down_FD": "F", "gate_EDF": "D", "up_EDF": "D", "down_EFD": "F",
}  # fmt: skip


def group_size(name: str, shape: tuple[int, ...], group: int) -> int:
    """How many neighbours along the last input axis share a scale.

    That is `group`, or where there are several input axes the most that divides the last of them too.
    """
    letters, inputs = name.rsplit("_", 1)[1], MATRICES[name]
    return math.gcd(group, shape[letters.index(inputs[-1]) - len(letters)]) if len(inputs) > 1 else group


def scale_shape(name: str, shape: tuple[int, ...], group: int | None) -> tuple[int, ...]:
    """The shape of the scale of the matrix `name` (the last component of its path) of this shape.

    Outputs, experts and a leading layer axis are as in the matrix. Without a group the input axes are one;
    with a group the last input axis has an entry for each group, of which the last may be short, and other
    input axes are whole.
    """
    letters, inputs = name.rsplit("_", 1)[1], MATRICES[name]
    scale = list(shape)
    if group is None:
        for letter in inputs:
            scale[letters.index(letter) - len(letters)] = 1
    else:
        axis = letters.index(inputs[-1]) - len(letters)
        scale[axis] = -(-shape[axis] // group_size(name, shape, group))
    return tuple(scale)
