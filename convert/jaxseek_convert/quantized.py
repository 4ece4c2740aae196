"""FP8 with a scale for each block of the weight, as DeepSeek-V3 stores it, read as numbers.

W[i, j] = W8[i, j] * scale_inv[i // b, j // b], b = 128: a product, whatever the name says (DeepSeek-V3's
fp8_cast_bf16.py). Blocks at the edges are cut off, not padded.
"""

from __future__ import annotations

import functools

import ml_dtypes
import numpy as np

from jaxseek_convert.layout import Index

FP8 = np.dtype(ml_dtypes.float8_e4m3fn)


def scale_shape(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of a weight."""
    return tuple(-(-n // b) for n, b in zip(shape, block))


@functools.cache
def _values() -> np.ndarray:
    return np.arange(256, dtype=np.uint8).view(FP8).astype(np.float32)


def dequantize(weight: np.ndarray, scale: np.ndarray, index: Index, block: tuple[int, int]) -> np.ndarray:
    """The part `index` of a [rows, columns] FP8 weight, float32."""
    out = _values()[weight[index].view(np.uint8)]  # a table is twice as fast as a cast
    scale = scale.astype(np.float32)
    for axis, (at, b) in enumerate(zip(index, block)):
        scale = scale.take(range(at.start // b, -(-at.stop // b)), axis).repeat(b, axis)
        skip = at.start % b
        scale = scale.take(range(skip, skip + at.stop - at.start), axis)
    out *= scale
    return out
